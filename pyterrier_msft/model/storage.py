"""Folders of models: check them, write them, and replace one model with another."""

import contextlib
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyterrier_msft.model import adapters
from pyterrier_msft.model.files import CROSS_ENCODER_FILES, MODULES, read_json
from pyterrier_msft.model.record import RECORD, ModelRecord

FIRST = "pt_meta.json"  # the file that `finish_save` moves first
# Files that `MonoCE.save` may write, and that may be removed when another model takes its place.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", adapters.CONFIG, "adapter_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", *CROSS_ENCODER_FILES, RECORD, FIRST, "README.md",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "tokenizer*.json")  # of any of these, a model's folder has one
MODULE_FILES = ("config.json", "model.safetensors")  # in the folder of each module of a CrossEncoder
PARTIAL = ".saving"  # the sub-folder in which a model is written before its files are moved into place


def check_source(model: str) -> None:
    """Raise a ValueError for a folder without a complete model; whether a hub name exists, only the hub knows."""
    path = Path(model)
    if path.is_dir():
        finish_save(path)
        if (path / adapters.CONFIG).is_file():
            raise ValueError(f"model must be a model's folder; got an adapter's. Load it with MonoCE.load({model!r})")
        if not (path / "config.json").is_file():
            raise ValueError(f"model must be a folder with config.json; got {model!r} without it")
    elif path.is_file() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ValueError(f"model must be a model's folder or a name on the Hugging Face hub; got {model!r}")


def check_target(folder: Path, module_folders: Sequence[str] = ()) -> None:
    """Raise a ValueError unless a folder is new, a model's, or without files (except hidden ones).

    The names of `module_folders` must be free, or those of the old model's modules.
    """
    found = [folder.name] if folder.is_file() else []
    if folder.is_dir():
        found = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if found and not _is_model(folder):
        raise ValueError(f"path must be a new folder or a model's; got {str(folder)!r} with the file {found[0]!r}")
    old = {folder / name for name in module_files(folder)}
    for path in (folder / name for name in module_folders):
        if path.is_file() or (path.is_dir() and set(path.iterdir()) - old):
            raise ValueError(f"path must have no files of your own in {path.name!r}; got {str(folder)!r}. Move them")


def _is_model(folder: Path) -> bool:
    """Whether a folder's files are a model's; other programs have a config.json, too."""
    if not folder.is_dir():
        return False
    if (folder / RECORD).is_file() or (folder / adapters.CONFIG).is_file():
        return True
    config = None
    with contextlib.suppress(ValueError):  # a broken file
        config = read_json(str(folder), "config.json")
    has_weights = any(_matches(path, WEIGHTS) for path in folder.iterdir())
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys()) and has_weights


def module_files(folder: Path) -> list[str]:
    """List the files that a model may have in the folders of the modules that its modules.json names."""
    modules = None
    with contextlib.suppress(ValueError):  # a broken file
        modules = read_json(str(folder), MODULES) if folder.is_dir() else None
    names = [str(module.get("path")) for module in modules or [] if isinstance(module, dict)]
    return [f"{name}/{file}" for name in names if re.fullmatch(r"\d+_\w+", name) for file in MODULE_FILES]


@contextlib.contextmanager
def replace_model(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder for a model's files, then move them into `folder` in place of the old model's.

    An exception inside the block leaves the old model as it was. Files that aren't a model's are always kept; a
    README.md that isn't a card as this package wrote it becomes README.old.md.
    """
    finish_save(folder)
    partial, is_new = folder / PARTIAL, not folder.is_dir()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # others have put files there meanwhile
                folder.rmdir()
        raise
    card = folder / "README.md"
    if card.is_file() and not is_unchanged(card):
        names = ("README.old.md", *(f"README.old-{number}.md" for number in range(2, 1000)))
        os.replace(card, next(path for name in names if not (path := folder / name).exists()))
    finish_save(folder)


def is_unchanged(card: Path) -> bool:
    """Whether a model card is as this package wrote it, beside a record."""
    try:
        record = ModelRecord.read(card.parent)
    except ValueError:  # a damaged record
        record = ModelRecord()
    return record.has_written(card.read_text(encoding="utf-8", errors="replace"))


def finish_save(folder: Path) -> None:
    """Move the files of a complete `PARTIAL` into the folder, also after a save was killed while moving them."""
    partial = folder / PARTIAL
    if not (partial / RECORD).is_file():
        return
    names = {path.name for path in partial.iterdir()}
    if FIRST in names:  # no file has been moved: the folder's files are those of the old model
        # Even if the new model has a module's folder of this name, which couldn't replace it. Before modules.json.
        for path in [folder / name for name in module_files(folder)]:
            if path.is_file():
                path.unlink()
            with contextlib.suppress(OSError):  # it has other files, or has been removed
                path.parent.rmdir()
        for path in [*folder.iterdir()]:
            if path.is_file() and _matches(path, MODEL_FILES) and path.name not in names:
                path.unlink()
    for name in sorted(names, key=lambda name: (name == RECORD, name != FIRST)):  # the record last
        if (partial / name).is_dir():
            with contextlib.suppress(OSError):  # there is none
                (folder / name).rmdir()
        with contextlib.suppress(FileNotFoundError):  # moved by another process that loads the model
            os.replace(partial / name, folder / name)
    partial.rmdir()


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
