"""Adapters such as LoRA, by peft: few weights are trained beside those of the backbone, which stay as they are."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pyterrier_msft.model.loading import isolated_rng

CONFIG = "adapter_config.json"


# What of a configuration says where it came from, and not what it computes.
ORIGIN = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


def check(adapter: Any) -> None:
    """Raise a ValueError if this is no adapter of peft's that lives in a model's layers, such as LoRA.

    Raises:
        ImportError: Without peft (extra `[lora]`).
    """
    peft = _peft()
    if not isinstance(adapter, peft.PeftConfig) or adapter.is_prompt_learning:
        raise ValueError(f"expected an adapter such as peft.LoraConfig(r=16), found {type(adapter).__name__}")


def add(network: PreTrainedModel, adapter: Any, *, base: str, revision: str | None, seed: int) -> Any:
    """Put a new adapter into a network, in place.

    The head is trained too, with a pooler if there is one: it may be new, and has to be saved with the adapter.

    Args:
        network: The backbone with its head.
        adapter: The `peft.PeftConfig`; it stays as it is.
        base: The backbone's name or folder, for whoever loads the adapter.
        revision: The backbone's.
        seed: Decides the adapter's first weights.

    Returns:
        The network as peft sees it, around the same modules.
    """
    config = copy.deepcopy(adapter)
    config.task_type = "SEQ_CLS"
    config.base_model_name_or_path, config.revision = base, revision
    if config.modules_to_save is None:
        config.modules_to_save = _head(network)
    with isolated_rng(seed), _quiet():
        wrapped = _peft().get_peft_model(network, config)
    network.eval()
    return wrapped


def load(network: PreTrainedModel, folder: str | Path) -> Any:
    """Put a saved adapter into its backbone, in place; the network as peft sees it."""
    with _quiet():
        wrapped = _peft().PeftModel.from_pretrained(network, str(folder), is_trainable=True)
    network.eval()
    return wrapped


def base_of(folder: str | Path) -> tuple[str, str | None]:
    """The name or folder of the backbone that a saved adapter belongs to, and its revision."""
    config = _peft().PeftConfig.from_pretrained(str(folder))
    return config.base_model_name_or_path, config.revision


def merged(wrapped: Any) -> PreTrainedModel:
    """A plain copy of the network with the adapter's share added to the weights."""
    with _quiet():
        network: PreTrainedModel = copy.deepcopy(wrapped).merge_and_unload()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network.eval()


def settings(wrapped: Any) -> dict[str, Any]:
    """What decides the scores and the training of an adapter besides its weights, for a digest."""
    content = wrapped.active_peft_config.to_dict()
    return {
        key: sorted(set(value)) if isinstance(value, set | list | tuple) else value
        for key, value in sorted(content.items())
        if key not in ORIGIN
    }


def _head(network: PreTrainedModel) -> list[str]:
    modules = [*network.named_children(), *network.base_model.named_children()]
    return [
        name
        for name, module in modules
        if (module in network.children() and name != network.base_model_prefix) or name == "pooler"
        if any(True for _ in module.parameters())
    ]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need the extra [lora]: pip install "pyterrier-msft[lora]"') from error
    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that it is giving up
        yield
