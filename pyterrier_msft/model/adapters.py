"""Adapters of peft, such as LoRA: small weights that are trained beside a frozen backbone."""

import copy
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pyterrier_msft.model.decoders import WordLayer, words_of
from pyterrier_msft.model.files import is_unknown, missing_files
from pyterrier_msft.model.loading import isolated_rng

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Fields of an adapter's configuration that don't affect what it computes.
ORIGIN_FIELDS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


def check(adapter: Any) -> None:
    """Raise a ValueError unless an adapter is a peft configuration, e.g. of LoRA, that `fit` can train."""
    kind, peft = type(adapter).__name__, _peft()
    if not isinstance(adapter, peft.PeftConfig) or adapter.is_prompt_learning:
        raise ValueError(f"adapter must be a peft configuration like LoraConfig(r=16); got {kind}")
    if not hasattr(adapter, "modules_to_save"):  # then peft freezes the head
        instead = "trainable_token_indices" if isinstance(adapter, peft.TrainableTokensConfig) else "r"
        raise ValueError(
            f"adapter must have modules_to_save to train the head, too; got {kind}. Pass LoraConfig({instead}=...)"
        )
    if isinstance(adapter, peft.AdaLoraConfig) or getattr(adapter, "use_asa", False):
        instead = "LoraConfig(r=...)" if isinstance(adapter, peft.AdaLoraConfig) else "use_asa=False"
        raise ValueError(
            f"adapter must have fixed ranks, since fit never calls update_and_allocate; got {kind}. Pass {instead}"
        )


def add(network: PreTrainedModel, adapter: Any, *, base: str, revision: str | None, seed: int) -> Any:
    """Add a new adapter to a network, in place, and return the `PeftModel` around the same modules.

    The head and, if there is one, the pooler are trained and saved with the adapter, since they may be new. A decoder
    that scores with words has no head to train. The backbone's name (or folder) and revision are recorded, so that the
    adapter can be loaded.
    """
    config = copy.deepcopy(adapter)
    config.inference_mode = False  # True in a configuration that was loaded
    is_decoder = words_of(network) is not None
    config.task_type = "CAUSAL_LM" if is_decoder else "SEQ_CLS"
    config.base_model_name_or_path, config.revision = base, revision
    is_target = _peft().tuners.tuners_utils.check_target_module_exists
    for name in [name for name, module in network.named_modules() if isinstance(module, WordLayer)]:
        if getattr(config, "target_modules", None) and is_target(config, name):
            raise ValueError(f"adapter must not have target_modules with {name!r}, the layer that scores words")
    if config.modules_to_save is None and not is_decoder:
        config.modules_to_save = _head_modules(network)
    plain_weights = {*network.state_dict()}
    with isolated_rng(seed), _ignore_future_warnings():
        peft_model = _peft().get_peft_model(network, config)
    peft_model.plain_weights = plain_weights
    network.eval()
    return peft_model


def load(network: PreTrainedModel, folder: str | Path) -> Any:
    """Load a saved adapter into its backbone, in place, and return the `PeftModel`."""
    plain_weights = {*network.state_dict()}
    with _ignore_future_warnings():
        peft_model = _peft().PeftModel.from_pretrained(network, str(folder), is_trainable=True)
    peft_model.plain_weights = plain_weights
    network.eval()
    return peft_model


def is_adapter(folder: Path, name: str, revision: str | None) -> bool:
    """Whether the model of a name has an adapter's files in a folder; a ValueError if there are only some of them."""
    has_config, has_weights = (folder / CONFIG).is_file(), any((folder / file).is_file() for file in WEIGHTS)
    if has_config and not has_weights:
        raise missing_files(name, WEIGHTS[:1], revision)
    if has_weights and not has_config and is_unknown(name, CONFIG, revision):
        raise missing_files(name, [CONFIG], revision)
    return has_config


def backbone_of(folder: str | Path) -> tuple[str, str | None]:
    """Return the backbone (name or folder) of a saved adapter, and its revision."""
    config = _peft().PeftConfig.from_pretrained(str(folder))
    return config.base_model_name_or_path, config.revision


def merge(peft_model: Any) -> PreTrainedModel:
    """Copy a network with its adapter merged into the weights.

    Raises:
        ValueError: If peft can't merge the adapter, or if the copy hasn't exactly the weights of a plain network.
    """
    merged = copy.deepcopy(peft_model)
    _unwrap_saved_modules(merged)
    try:
        with _ignore_future_warnings():
            network = merged.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise _cannot_merge(peft_model, str(error).rstrip(".")) from error
    if wrong := network.state_dict().keys() ^ peft_model.plain_weights:
        raise _cannot_merge(peft_model, f"{len(wrong)} weights would be missing or left over, e.g. {min(wrong)!r}")
    return network.requires_grad_(True).eval()


def digestible_config(peft_model: Any) -> dict[str, Any]:
    """Return the fields of an adapter's configuration that affect its scores or its training, for a digest."""
    config = peft_model.active_peft_config
    defaults = defaults_of(config)
    # Other versions of peft have more fields, with defaults.
    return {
        key: sorted(set(value)) if isinstance(value, set | list | tuple) else value
        for key, value in config.to_dict().items()
        if key not in ORIGIN_FIELDS and (key not in defaults or value != defaults[key])
    }


def defaults_of(config: Any) -> dict[str, Any]:
    """Return the defaults of a configuration's class; empty if it has none."""
    try:
        defaults: dict[str, Any] = type(config)().to_dict()
    except (TypeError, ValueError):
        return {}
    return defaults


def _head_modules(network: PreTrainedModel) -> list[str]:
    backbone, children = network.base_model_prefix, dict(network.named_children())
    if backbone not in children:
        raise ValueError(
            f"adapter must name the head in modules_to_save for {type(network).__name__}, which has no module "
            f"{backbone!r}; got None"
        )
    poolers = [(name, module) for name, module in children.pop(backbone).named_children() if name == "pooler"]
    return [name for name, module in (*children.items(), *poolers) if any(p.requires_grad for p in module.parameters())]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need the extra [lora]: pip install "pyterrier-msft[lora]"') from error
    return peft


def _unwrap_saved_modules(peft_model: Any) -> None:
    """Replace the wrappers of `modules_to_save` with the trained modules.

    peft unwraps them when it merges, but not for LN tuning, and for most adapters only if the module itself has a
    weight. BERT's pooler and RoBERTa's head consist of layers that have one.
    """
    wrappers = [pair for pair in peft_model.named_modules() if isinstance(pair[1], _peft().utils.ModulesToSaveWrapper)]
    for name, wrapper in reversed(wrappers):  # those within others first
        parent, _, child = name.rpartition(".")
        setattr(peft_model.get_submodule(parent), child, wrapper.modules_to_save[wrapper.active_adapters[0]])


def _cannot_merge(peft_model: Any, reason: str) -> ValueError:
    kind = type(peft_model.active_peft_config).__name__
    return ValueError(
        f"adapter must be one that peft can merge to be saved with merged=True, or to score with dtype='int8'; got "
        f"{kind}: {reason}. Pass merged=False or another dtype"
    )


def _ignore_future_warnings() -> Any:
    return warnings.catch_warnings(action="ignore", category=FutureWarning)  # about names that peft still uses
