"""Digest a network's weights, its tokenizer, and what else affects its scores."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pyterrier_msft.model import adapters
from pyterrier_msft.model.decoders import WordScore, prompt_of
from pyterrier_msft.model.labels import LogOdds
from pyterrier_msft.model.modular import ModularNetwork

# Stored beside the fingerprint in a saved model's record. Increase it when `fingerprint_of` would give the same model
# another fingerprint.
FINGERPRINT_VERSION = 2
DROPOUT_FIELDS = re.compile(".*dropout.*|.*layerdrop|.*pdrop")  # of a network's configuration
# Fields of a network's configuration that don't affect its scores: names, token ids, the precision, training settings.
UNSCORED_FIELDS = re.compile(
    "architectures|attention_type|auto_map|finetuning_task|id2label|initializer_.*|label2id|output_.*|problem_type|reference_compile|"
    "return_dict|sbert_ce_.*|sentence_transformers|task_specific_params|transformers_version|use_cache|_?name_or_path|"
    f".*dtype|.*_token_ids?|{DROPOUT_FIELDS.pattern}"
)
# Packages whose classes of networks don't count: loading a folder creates the same class again.
LIBRARIES = {"transformers", "transformers_modules", "pyterrier_msft"}
# A fast tokenizer's components that decide the ids. Each call sets truncation and padding anew.
TOKENIZER_COMPONENTS = ("model", "normalizer", "pre_tokenizer", "post_processor")
# Settings of any tokenizer that decide how a pair is cut and padded. The lengths are the re-ranker's own.
TOKENIZER_SETTINGS = ("padding_side", "truncation_side", "pad_token_id", "pad_token_type_id", "split_special_tokens")
# Attributes of a tokenizer without such components that don't affect its ids; some differ after saving and loading.
UNTOKENIZED_FIELDS = re.compile(
    "_.*|.*_file|backend|chat_template|clean_up_.*|model_max_length|name_or_path|response_template|total_vocab_size|"
    "verbose"
)


def fingerprint_of(network: PreTrainedModel, peft_model: Any, tokenizer: Tokenizer) -> str:
    """Digest a network's weights and its tokenizer, and what affects its scores in its and its adapter's configuration.

    This takes a third of a second for BERT-base, 2% of it for the tokenizer.
    """
    state, digest = network.state_dict(), hashlib.sha256()
    hooks = [repr(hook) for hook in network._forward_hooks.values() if isinstance(hook, LogOdds | WordScore)]
    modules = network.head.configuration if isinstance(network, ModularNetwork) else None
    prompt = prompt_of(network)
    digest.update("".join([*hooks, *([] if prompt is None else [prompt.template])]).encode())
    kind = type(network)
    if kind.__module__.partition(".")[0] not in LIBRARIES:  # a user's, whose forward may be its own
        digest.update(f"{kind.__module__}.{kind.__qualname__}".encode())
    if modules is not None:
        digest.update(json.dumps(modules, sort_keys=True).encode())
    digest.update(json.dumps(_digestible_config(network.config), sort_keys=True, default=str).encode())
    if peft_model is not None:
        config = adapters.digestible_config(peft_model)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for part in _tokenizer_state(tokenizer):
        digest.update(hashlib.sha256(part).digest())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the values of a tensor as bytes."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    # A single element counts as contiguous whatever its stride, but can't be viewed as bytes then.
    data: memoryview = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data
    return data


def _tokenizer_state(tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield what decides a tokenizer's ids: equal bytes in every process, and after saving and loading."""
    settings: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in TOKENIZER_SETTINGS}
    settings["inputs"] = sorted(tokenizer.model_input_names)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        for name in TOKENIZER_COMPONENTS:
            component = getattr(backend, name)
            yield b"" if component is None else component.__getstate__()  # its part of tokenizer.json
        added = backend.get_added_tokens_decoder()
    else:
        found = vars(tokenizer)
        settings["class"] = type(tokenizer).__qualname__
        settings["attributes"] = {
            name: value for name, value in found.items()
            if isinstance(value, bool | int | float | str) and not UNTOKENIZED_FIELDS.fullmatch(name)
        }  # fmt: skip
        yield json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        yield json.dumps(sorted((rank, merge) for merge, rank in found.get("bpe_ranks", {}).items())).encode()
        yield found["sp_model"].serialized_model_proto() if "sp_model" in found else b""
        added = tokenizer.added_tokens_decoder
    settings["added"] = {number: repr(token) for number, token in sorted(added.items())}  # with its flags
    yield json.dumps(settings, sort_keys=True).encode()


def _digestible_config(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a network's configuration that affect its scores and aren't its class's defaults."""
    return _scored_fields(config.to_diff_dict(), adapters.defaults_of(config))


def _scored_fields(fields: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
    defaults, found = defaults if isinstance(defaults, Mapping) else {}, {}
    for name, value in fields.items():
        if not UNSCORED_FIELDS.fullmatch(str(name)) and (name not in defaults or value != defaults[name]):
            scored = _scored_fields(value, defaults.get(name)) if isinstance(value, Mapping) else value
            if scored != {}:
                found[name] = scored
    return found


def training_state(network: PreTrainedModel) -> dict[str, str]:
    """Return, by name, what affects the training of a network and not its scores, which the fingerprint leaves out."""
    fields = _dropout_fields(network.config)
    modules = [[name, m.p] for name, m in network.named_modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    frozen = sorted(name for name, parameter in network.named_parameters() if not parameter.requires_grad)
    return {
        "the model's dropout": ", ".join(f"{name}={value}" for name, value in fields.items()),
        "the dropout of its modules": _short_digest(modules),
        "its frozen parameters": _short_digest(frozen) if frozen else "none",
    }


def _short_digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _dropout_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a network's configuration that set dropout."""

    def find(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in sorted((str(key), settings[key]) for key in settings):
            if isinstance(value, Mapping):
                found |= find(value, f"{prefix}{name}.")
            elif value is not None and DROPOUT_FIELDS.fullmatch(name):
                found[f"{prefix}{name}"] = value
        return found

    return find(config.to_dict(), "")
