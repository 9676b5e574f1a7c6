"""Folders of models."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyterrier_msft.model import adapters
from pyterrier_msft.model.loading import quiet_transformers, suit

RECORD = "msft.json"


ARTIFACT = {"type": "cross_encoder", "format": "hf", "package_hint": "pyterrier-msft"}


LEFTOVER_SECONDS = 86400  # after which a half-written model is nobody's


def _beside(path: Path, what: str) -> Path:
    """Where `save` puts the model before, or the one after, for the moment of the change."""
    return path.with_name(f".{path.name}.{what}")


def recover(path: Path) -> None:
    """Put back the model that a save had moved aside when it was killed."""
    old = _beside(path, "old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def _check_folder(model: str) -> None:
    """Say at once that a folder is not there or holds no model; a hub name can't be told before it is asked for."""
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / adapters.CONFIG).is_file():
            raise ValueError(f"expected a model's folder, found an adapter's: give it to MonoCE.load({model!r})")
        if not (path / "config.json").is_file():
            raise ValueError(f"expected a model's folder with config.json, found {model!r} without it")
    elif path.is_file() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ValueError(f"expected a model's folder or a name on the Hugging Face hub, found {model!r}")


def _absolute(model: str) -> str:
    """A folder from wherever it is looked for; a hub name as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _record_in(model: str | Path) -> dict[str, Any]:
    """What `save` recorded in a folder; empty where it didn't."""
    record = Path(model) / RECORD
    return json.loads(record.read_text()) if record.is_file() else {}


def _fingerprint(network: PreTrainedModel, settings: dict[str, Any] | None = None) -> str:
    state = network.state_dict()
    digest = hashlib.sha256(b"" if settings is None else json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _one_score(model: PreTrainedModel) -> PreTrainedModel:
    kind = type(model)
    if kind.__module__.startswith("transformers.") and "ForSequenceClassification" not in kind.__name__:
        raise ValueError(f"expected a model loaded by AutoModelForSequenceClassification, found {kind.__name__}")
    if model.config.num_labels != 1:
        raise ValueError(f"expected a model with one label (a score), found {model.config.num_labels}")
    # In float32, whatever it was saved in: in half precision most of AdamW's steps would be rounded away.
    return model.float().eval()


def _tokenizer_of(network: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(network.name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a tokenizer beside the loaded model, found none at {network.name_or_path!r}: save both to a "
            "folder and give MonoCE the folder"
        ) from error
    suit(tokenizer, network, network.name_or_path)
    return tokenizer
