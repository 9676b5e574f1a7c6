"""Models on the Hugging Face hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import ParseResult

from huggingface_hub import snapshot_download

from pyterrier_msft.notices import first_line

# The files that loading needs; repositories may also hold the same weights in other formats.
LOADED_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.py", "*.md", "*.jinja", "bpe.codes")


def fetch(name: str, *, revision: str | None = None, files: Sequence[str] = LOADED_FILES) -> Path:
    """Download a model from the hub, unless it is cached, and return its folder; a ValueError if that fails."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*files]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must be a model's folder or a name on the Hugging Face hub; got {name!r}: {first_line(error)}"
        ) from error


def resolve(url: ParseResult) -> str:
    """Find the model of `pt.Artifact.from_url("hf-model:user/model@revision")` (an entry point of PyTerrier)."""
    name, _, revision = url.path.partition("@")
    return os.fspath(fetch(name, revision=revision or None))
