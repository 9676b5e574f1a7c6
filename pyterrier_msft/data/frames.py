"""Columns, ids and texts of the frames that users give."""

import hashlib
from collections.abc import Iterable
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

PASSAGE = r"%p\d+$"  # what pt.text.sliding appends to a docno


def ranked(results: pd.DataFrame, scores: np.ndarray) -> pd.DataFrame:
    """Results with these scores and the ranks that they make."""
    # Under a plain index: after `|` the frame's is not unique, and it may have a level called qid.
    found = pt.model.add_ranks(results.reset_index(drop=True).assign(score=scores))
    return found.set_axis(results.index[found.index])


def as_ids(values: pd.Series) -> pd.Series:
    """Ids as strings, with a plain index: after `|` a result frame's index is not unique.

    Blanks at the ends are cut, and the whole numbers that pandas makes floats of, where one is missing, are read as
    what they were: 1.0 is "1".

    Raises:
        ValueError: If an id is missing, or no Unicode text.
    """
    values = values.reset_index(drop=True)
    require_ids(values.to_frame(), [values.name])
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    if pd.api.types.is_float_dtype(values):
        values = values.astype(object)
    if values.dtype == object and any(issubclass(kind, float | np.floating) for kind in set(map(type, values))):
        values = values.map(_whole)
    try:
        return values.astype(str).str.strip()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected every {values.name} in Unicode, found {error.object!r}") from error


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float | np.floating) and float(value).is_integer() else value


def without_text(values: pd.Series) -> np.ndarray:
    """Which of a column's values are no text: missing (None, NaN, NA) or blank.

    Raises:
        ValueError: If there is something else than text and numbers, such as a list of passages.
    """
    if _is_text(values):
        spaces = values.str.isspace().to_numpy(dtype=bool, na_value=False)
        empty = (values == "").to_numpy(dtype=bool, na_value=False)
        return values.isna().to_numpy(dtype=bool) | spaces | empty
    column = values.tolist()
    kinds = set(map(type, column))
    for kind in kinds:
        if not issubclass(kind, str | Number | np.bool_ | type(None) | type(pd.NA) | type(pd.NaT)):
            raise ValueError(f"expected text in the column {values.name!r}, found {kind.__name__} in it")
    blank = np.fromiter((isinstance(text, str) and not text.strip() for text in column), bool, len(column))
    return values.isna().to_numpy(dtype=bool) | blank


def as_texts(values: pd.Series) -> pd.Series:
    """A column's texts with a plain index: a number as it is written, what is missing as the empty text.

    Lone surrogates, which no tokenizer takes, become '?'.
    """
    plain = values.reset_index(drop=True)
    if _is_text(values):
        return plain.fillna("")
    missing = plain.isna().to_numpy(dtype=bool)
    column = ["" if gone else str(text) for text, gone in zip(plain.tolist(), missing, strict=True)]
    return pd.Series(
        [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in column], dtype=str
    )


def _is_text(values: pd.Series) -> bool:
    """Whether the dtype admits nothing but text, and of that only what is valid."""
    return isinstance(values.dtype, pd.StringDtype | pd.ArrowDtype) and pd.api.types.is_string_dtype(values.dtype)


def order_key(frame: pd.DataFrame) -> np.ndarray | None:
    """What orders a result frame, higher being better: the score, else the negative rank, else None."""
    if "score" in frame.columns:
        key = _numbers(frame["score"], "score")
    elif "rank" in frame.columns:
        key = -_numbers(frame["rank"], "rank")
    else:
        return None
    return check_numbers(key)


def check_numbers(key: np.ndarray) -> np.ndarray:
    """The scores themselves; a ValueError if one is not a number."""
    if np.isnan(key).any():
        raise ValueError(f"expected a number as every score, found {int(np.isnan(key).sum())} NaN")
    return key


def _numbers(values: pd.Series, what: str) -> np.ndarray:
    try:
        return pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        numbers = pd.to_numeric(values.astype(str), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        raise ValueError(
            f"expected a number as every {what}, found {_some(values.to_numpy()[np.isnan(numbers)])}"
        ) from error


def _some(values: np.ndarray) -> str:
    return f"{len(values):,} such as {values[0]!r}" if len(values) else "none"


# How other tools call PyTerrier's columns.
ELSEWHERE = {
    "qid": ("query_id", "queryid", "topic", "topic_id", "q_id"),
    "docno": ("doc_id", "docid", "document_id", "pid", "passage_id", "d_id"),
    "query": ("query_text", "question", "title"),
    "text": ("body", "contents", "content", "passage", "doc_text"),
    "label": ("relevance", "rel", "grade", "judgment"),
    "score": ("sim", "similarity"),
}


def require_columns(frame: Any, columns: list[str], what: str) -> None:
    """Raise a ValueError that names what is expected and what is there, and what may help."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"expected {what} as a data frame, found {type(frame).__name__}")
    names = list(map(str, frame.columns))
    if missing := [column for column in columns if column not in frame.columns]:
        others = {other: column for column in missing for other in ELSEWHERE.get(column, ()) if other in frame.columns}
        levels = [name for name in frame.index.names if name in missing]
        hint = ""
        if others:
            hint = f"; rename them by .rename(columns={others})"
        elif levels:
            hint = f"; {', '.join(map(repr, levels))} is in the index: give frame.reset_index()"
        elif "label" in missing and "score" in frame.columns:
            hint = "; these look like results: are the arguments swapped?"
        elif "query" in missing and "label" in frame.columns:
            hint = "; these look like qrels: are the arguments swapped?"
        elif "docno" in missing and "query" in frame.columns:
            hint = "; these look like topics: give what a first stage finds for them, first_stage(topics)"
        raise ValueError(f"expected columns {columns} in {what}, found {names}{hint}")
    if twice := [column for column in (*columns, "score", "rank") if names.count(column) > 1]:
        raise ValueError(f"expected one column {twice[0]!r} in {what}, found {names.count(twice[0])}")


def require_ids(frame: pd.DataFrame, columns: Iterable[Any]) -> None:
    """Raise a ValueError that counts the rows without an id."""
    for column in columns:
        if missing := int(frame[column].isna().sum()):
            raise ValueError(f"expected a {column} in every row, found {missing:,} of {len(frame):,} without")


def frame_digest(frame: pd.DataFrame) -> str:
    """A digest of a frame's content and column names, for cache keys: another order of rows is another digest."""
    digest = hashlib.sha256(repr(sorted(map(str, frame.columns))).encode())
    for column in sorted(frame.columns, key=str):
        values = frame[column]
        if not pd.api.types.is_numeric_dtype(values):
            values = values.astype(str)
        digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy().tobytes())
    return digest.hexdigest()
