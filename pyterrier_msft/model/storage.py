"""Folders of models: check them, write them, and replace one model by another."""

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyterrier_msft.model import adapters
from pyterrier_msft.model.card import model_card
from pyterrier_msft.model.record import RECORD, ModelRecord, StageRecord, library_versions

if TYPE_CHECKING:
    from pyterrier_msft.model.cross_encoder import CrossEncoder

# Files that `write_model` may write, and that may be removed when another model takes its place.
MODEL_FILES = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    adapters.CONFIG, "adapter_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", RECORD, "pt_meta.json", "README.md",
)  # fmt: skip
ARTIFACT = {"type": "cross_encoder", "format": "hf", "package_hint": "pyterrier-msft"}  # for `pt.Artifact`
PARTIAL = ".saving"  # where a model is written before its files are moved into place


def check_source(model: str) -> None:
    """Raise a ValueError for a folder without a complete model; whether a hub name exists, only the hub knows."""
    path = Path(model)
    if path.is_dir():
        check_complete(path)
        if (path / adapters.CONFIG).is_file():
            raise ValueError(f"model must be a model's folder; got an adapter's. Load it with MonoCE.load({model!r})")
        if not (path / "config.json").is_file():
            raise ValueError(f"model must be a folder with config.json; got {model!r} without it")
    elif path.is_file() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ValueError(f"model must be a model's folder or a name on the Hugging Face hub; got {model!r}")


def check_complete(folder: Path) -> None:
    """Raise a ValueError if a save was killed while it moved files, so that those of two models may be mixed."""
    if (folder / PARTIAL / RECORD).is_file():
        raise ValueError(f"model must be complete; a save to {str(folder)!r} was interrupted. Save the model again")


def check_target(folder: Path) -> None:
    """Raise a ValueError unless a folder is new, a model's, or without files (except hidden ones)."""
    found = [folder.name] if folder.is_file() else []
    if folder.is_dir():
        found = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if found and "config.json" not in found and adapters.CONFIG not in found:
        raise ValueError(f"path must be a new folder or a model's; got {str(folder)!r} with the file {found[0]!r}")


def write_model(
    model: "CrossEncoder", folder: Path, settings: dict[str, Any], stages: list[StageRecord], *, name: str,
    merged: bool, **card: Any,
) -> None:  # fmt: skip
    """Write a model into an empty folder, with a record of the settings and stages and a card (see `model_card`)."""
    fingerprint = model.write(folder, max_length=settings["max_length"], merged=merged)
    record = ModelRecord(settings, model.hub_name, model.head_is_new, fingerprint, stages, library_versions())
    is_adapter = model.has_adapter and not merged
    (folder / "pt_meta.json").write_text(json.dumps(ARTIFACT))
    (folder / "README.md").write_text(model_card(record, name=name, is_adapter=is_adapter, **card))
    record.write(folder)  # last, see check_complete


@contextlib.contextmanager
def replace_model(folder: Path) -> Iterator[Path]:
    """Give a temporary folder for `write_model`, then move its files into `folder` in place of the old model's.

    An exception inside the block leaves the old model as it was. Files that aren't a model's stay in any case.
    """
    partial, is_new = folder / PARTIAL, not folder.is_dir()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(folder if is_new else partial, ignore_errors=True)
        raise
    names = sorted((path.name for path in partial.iterdir()), key=lambda name: name == RECORD)  # the record last
    for path in [*folder.iterdir()]:
        is_own = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in MODEL_FILES)
        if is_own and path.is_file() and path.name not in names:
            path.unlink()
    for name in names:
        os.replace(partial / name, folder / name)
    partial.rmdir()
