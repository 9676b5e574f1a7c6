"""Validation of user-given frames: columns, ids, numbers and texts."""

import hashlib
from collections.abc import Iterable
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

PASSAGE_SUFFIX = r"%p\d+$"  # pt.text.sliding appends it to a docno
# The column in which a re-ranker that interpolates keeps the scores that it replaces.
FIRST_STAGE_SCORE = "first_stage_score"

# Names that other tools give to PyTerrier's columns.
COLUMN_ALIASES = {
    "qid": ("query_id", "queryid", "topic", "topic_id", "q_id"),
    "docno": ("doc_id", "docid", "document_id", "pid", "passage_id", "d_id"),
    "query": ("query_text", "question", "title"),
    "text": ("body", "contents", "content", "passage", "doc_text"),
    "label": ("relevance", "rel", "grade", "judgment"),
    "score": ("sim", "similarity"),
}


def even_step(length: int, n: int) -> int:
    """Return the step that visits at most `n` of `length` items, spread evenly."""
    return max(1, -(-length // n))


def parents(docnos: pd.Series) -> pd.Series:
    """Return the documents of passages; other docnos are left as they are."""
    return docnos.str.replace(PASSAGE_SUFFIX, "", regex=True)


def with_scores(results: pd.DataFrame, scores: np.ndarray) -> pd.DataFrame:
    """Set the scores of results, and the ranks that follow from them."""
    # After `|` the index isn't unique, and it may have a level called qid, so add_ranks gets a plain one.
    ranked = pt.model.add_ranks(results.reset_index(drop=True).assign(score=scores))
    return ranked.set_axis(results.index[ranked.index])


# ---- checks


def require_columns(frame: Any, columns: list[str], what: str) -> None:
    """Raise a ValueError with a hint unless `frame`, called `what` in messages, has each of the columns once."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"{what} must be a data frame; got {type(frame).__name__}")
    names = [*map(str, frame.columns)]
    if missing := [column for column in columns if column not in frame.columns]:
        raise ValueError(f"{what} must have the columns {columns}; got {names}{_columns_hint(frame, missing)}")
    if repeated := [column for column in (*columns, "score", "rank") if names.count(column) > 1]:
        raise ValueError(f"{what} must have one column {repeated[0]!r}; got {names.count(repeated[0])}")


def _columns_hint(frame: pd.DataFrame, missing: list[str]) -> str:
    if renames := {alias: name for name in missing for alias in COLUMN_ALIASES.get(name, ()) if alias in frame.columns}:
        return f". Rename them: .rename(columns={renames})"
    if levels := [name for name in frame.index.names if name in missing]:
        return f". The index has {', '.join(map(repr, levels))}: call .reset_index()"
    if "score" in missing:
        return ". MonoCE(..., interpolate=...) adds the first stage's score to the model's; `|` and `&` drop it"
    if "label" in missing and "score" in frame.columns:
        return ". These look like results: check the order of the arguments"
    if "query" in missing and "label" in frame.columns:
        return ". These look like qrels: check the order of the arguments"
    if "docno" in missing and "query" in frame.columns:
        return ". These look like topics: pass the results of a first stage, first_stage(topics)"
    return ""


def require(valid: np.ndarray, values: Any, rule: str) -> None:
    """Raise a ValueError with the rule, the number of values that break it, and an example, unless all are valid."""
    if not valid.all():
        invalid = np.asarray(values)[~valid]
        verb = "isn't" if len(invalid) == 1 else "aren't"
        raise ValueError(f"{rule}; {len(invalid):,} of {len(valid):,} {verb}, e.g. {invalid.tolist()[0]!r}")


# ---- columns


def is_blank(values: pd.Series) -> np.ndarray:
    """Return a mask of missing (None, NaN, NA), empty and whitespace texts; a ValueError for other types."""
    if _has_text_dtype(values):
        return (values.isna() | (values == "") | values.str.isspace()).to_numpy(dtype=bool)
    column = values.tolist()
    for kind in set(map(type, column)):
        if not issubclass(kind, str | Number | np.bool_ | type(None) | type(pd.NA) | type(pd.NaT)):
            raise ValueError(f"column {values.name!r} must contain text; got {kind.__name__}")
    blank = np.fromiter((isinstance(text, str) and not text.strip() for text in column), bool, len(column))
    return values.isna().to_numpy(dtype=bool) | blank


def as_texts(values: pd.Series) -> pd.Series:
    """Convert a column to strings with a plain index; missing values become empty, lone surrogates '?'."""
    values = values.reset_index(drop=True)
    if _has_text_dtype(values):
        return values.fillna("")
    missing = values.isna().to_numpy(dtype=bool)
    texts = ["" if is_missing else str(text) for text, is_missing in zip(values.tolist(), missing, strict=True)]
    valid = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
    return pd.Series(valid, dtype=str)


def _has_text_dtype(values: pd.Series) -> bool:
    """Whether the dtype admits nothing but valid Unicode strings."""
    return isinstance(values.dtype, pd.StringDtype | pd.ArrowDtype) and pd.api.types.is_string_dtype(values.dtype)


def as_numbers(values: pd.Series, name: str) -> np.ndarray:
    """Convert a column to float64; raise a ValueError for NaN and for what isn't a number."""
    try:
        numbers = pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError):
        numbers = pd.to_numeric(values.astype(str), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    require(~np.isnan(numbers), values, f"{name}s must be numeric")
    return numbers


def order_column(columns: Iterable[str]) -> str | None:
    """Choose the column that orders results: score if there is one, else rank, else None."""
    return next((name for name in ("score", "rank") if name in columns), None)


def order_key(frame: pd.DataFrame) -> np.ndarray | None:
    """Return the sort key of results, higher is better: the score, else the negative rank, else None."""
    column = order_column(frame.columns)
    if column is None:
        return None
    numbers = as_numbers(frame[column], column)
    return numbers if column == "score" else -numbers


def tie_key(frame: pd.DataFrame) -> np.ndarray | None:
    """Return the sort key of documents with equal scores, higher is better: the negative rank, or None."""
    if not {"score", "rank"} <= {*frame.columns}:
        return None
    ranks = pd.to_numeric(frame["rank"], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return -ranks if np.isfinite(ranks).all() else None  # ranks aren't needed, so they aren't refused


def frame_digest(frame: pd.DataFrame) -> str:
    """Digest a frame's content and column names, for cache keys; the order of rows matters, that of columns doesn't."""
    digest = hashlib.sha256(repr(sorted(map(str, frame.columns))).encode())
    order = sorted(range(frame.shape[1]), key=lambda i: str(frame.columns[i]))  # a name may occur twice
    for i in order:
        values = frame.iloc[:, i]
        if values.dtype == object:
            values = values.map(lambda value: value.tolist() if isinstance(value, np.ndarray) else value)
        if not pd.api.types.is_numeric_dtype(values):
            values = values.astype(str)
        digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy().tobytes())
    return digest.hexdigest()
