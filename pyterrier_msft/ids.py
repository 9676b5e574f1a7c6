"""Ids of queries and documents as strings, in the same way everywhere."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd


def require_ids(frame: pd.DataFrame, columns: Iterable[Any]) -> None:
    """Raise a ValueError if an id is missing."""
    for column in columns:
        if missing := int(frame[column].isna().sum()):
            raise ValueError(f"{column} is required in every row; {missing:,} of {len(frame):,} rows have none")


def as_ids(values: pd.Series) -> pd.Series:
    """Convert ids to strings without surrounding whitespace, with a plain index; every row must have an id.

    Integers that pandas stored as floats, because other values were missing, become integers again: 1.0 gives "1".
    """
    values = values.reset_index(drop=True)
    require_ids(values.to_frame(), [values.name])
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    if pd.api.types.is_float_dtype(values):
        values = values.astype(object)
    if values.dtype == object and any(issubclass(kind, float | np.floating) for kind in set(map(type, values))):
        values = values.map(_undo_float)
    try:
        return values.astype(str).str.strip()
    except UnicodeEncodeError as error:
        raise ValueError(f"{values.name} must be valid Unicode; got {error.object!r}") from error


def _undo_float(value: Any) -> Any:
    return int(value) if isinstance(value, float | np.floating) and float(value).is_integer() else value
