"""Digests and printed forms of fitters' settings."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_msft import losses
from pyterrier_msft.data.frames import frame_digest

PACKAGE = __name__.partition(".")[0]


def format_value(value: Any) -> str:
    """Format a value as a user would write it, without memory addresses or the rows of frames."""
    if isinstance(value, pd.DataFrame):
        return f"<{len(value):,} rows>"
    if inspect.isfunction(value):
        return f"losses.{value.__name__}" if value.__module__ == losses.__name__ else value.__qualname__
    if type(value).__module__ == losses.__name__:
        return f"losses.{value!r}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, pt.Transformer):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return str(value) if not isinstance(value, str | Path) else repr(str(value))


def is_default(value: Any, field: "Field[Any]") -> bool:
    """Whether a value is the default of its field."""
    default = {} if field.default is MISSING else field.default
    if value is default or isinstance(value, pd.DataFrame):
        return value is default
    return type(value) is type(default) and bool(value == default)


def sha256_of(content: Any) -> str:
    """Digest JSON-serializable content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digestible(value: Any, name: str) -> Any:
    """Convert a setting to JSON-serializable content that changes whenever the setting does.

    The path of a teacher is replaced with a digest of the file. Raise a ValueError for a transformer or a function
    without source code, because their content isn't known.
    """
    if isinstance(value, pd.DataFrame):
        return frame_digest(value)
    if isinstance(value, Mapping):
        return sorted((key, digestible(item, name)) for key, item in value.items())
    if name == "teacher" and isinstance(value, str | Path):
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    if inspect.isfunction(value):
        return _digestible_function(value, name)
    if isinstance(value, partial):
        return ["partial", *(digestible(part, name) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, pt.Transformer):
        raise ValueError(
            f"{name} must not be a transformer where a digest is needed; got {format_value(value)}. Apply it to the "
            f"results first, and pass its output: {name}=transformer(results)"
        )
    if is_dataclass(value):  # e.g. a loss with parameters
        return [type(value).__qualname__, *(digestible(getattr(value, f.name), f.name) for f in fields(value))]
    if isinstance(value, list | tuple):
        return [digestible(item, name) for item in value]
    if value is None or isinstance(value, int | float | str):
        return value
    written = repr(value)
    if " at 0x" not in written:
        return written
    # A repr with a memory address differs between processes.
    return [type(value).__module__, type(value).__qualname__, digestible(getattr(value, "__dict__", {}), name)]


def _digestible_function(function: Any, name: str) -> Any:
    source = None
    if function.__module__.partition(".")[0] != PACKAGE:  # a user may change a function and keep its name
        try:
            source = inspect.getsource(function)
        except OSError as error:
            raise ValueError(f"{name} must be a function with readable source code; got {function!r}") from error
    captured = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [function.__module__, function.__qualname__, source, *digestible([captured, defaults], name)]
