"""Single files of a model, in its folder or on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a model's file, downloaded if the model is on the hub; None if there is no such file."""
    try:
        path = Path(name, file) if Path(name).is_dir() else Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:  # also offline, for a file that isn't in the hub's cache
        return None
    return path if path.is_file() else None


def read_json(name: str, file: str, revision: str | None = None) -> Any:
    """Read a model's JSON file; an empty dictionary if there is none."""
    path = find_file(name, file, revision)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
