"""Digest a network's weights and what affects its scores."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pyterrier_msft.model import adapters
from pyterrier_msft.model.decoders import WordScore, prompt_of
from pyterrier_msft.model.labels import LogOdds
from pyterrier_msft.model.modular import ModularNetwork

DROPOUT_FIELDS = re.compile(".*dropout.*|.*layerdrop|.*pdrop")  # of a network's configuration
# Fields of a network's configuration that don't affect its scores: names, token ids, the precision, training settings.
UNSCORED_FIELDS = re.compile(
    "architectures|auto_map|finetuning_task|id2label|initializer_.*|label2id|output_.*|problem_type|reference_compile|"
    "return_dict|sbert_ce_.*|sentence_transformers|task_specific_params|transformers_version|use_cache|_?name_or_path|"
    f".*dtype|.*_token_ids?|{DROPOUT_FIELDS.pattern}"
)


def fingerprint_of(network: PreTrainedModel, peft_model: Any) -> str:
    """Digest a network's weights, and what affects its scores in its configuration and in that of its adapter.

    This takes a third of a second for BERT-base.
    """
    state, digest = network.state_dict(), hashlib.sha256()
    hooks = [repr(hook) for hook in network._forward_hooks.values() if isinstance(hook, LogOdds | WordScore)]
    modules = network.head.configuration if isinstance(network, ModularNetwork) else None
    prompt = prompt_of(network)
    digest.update("".join([*hooks, *([] if prompt is None else [prompt.template])]).encode())
    if modules is not None:
        digest.update(json.dumps(modules, sort_keys=True).encode())
    digest.update(json.dumps(_digestible_config(network.config), sort_keys=True, default=str).encode())
    if peft_model is not None:
        config = adapters.digestible_config(peft_model)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _digestible_config(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a network's configuration that affect its scores and aren't its class's defaults."""
    try:
        defaults = type(config)().to_dict()
    except (TypeError, ValueError):  # a class without defaults
        defaults = {}
    return _scored_fields(config.to_diff_dict(), defaults)


def _scored_fields(fields: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
    defaults, found = defaults if isinstance(defaults, Mapping) else {}, {}
    for name, value in fields.items():
        if not UNSCORED_FIELDS.fullmatch(str(name)) and (name not in defaults or value != defaults[name]):
            scored = _scored_fields(value, defaults.get(name)) if isinstance(value, Mapping) else value
            if scored != {}:
                found[name] = scored
    return found


def dropout_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a network's configuration that set dropout, which the fingerprint leaves out."""

    def find(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in sorted((str(key), settings[key]) for key in settings):
            if isinstance(value, Mapping):
                found |= find(value, f"{prefix}{name}.")
            elif value is not None and DROPOUT_FIELDS.fullmatch(name):
                found[f"{prefix}{name}"] = value
        return found

    return find(config.to_dict(), "")
