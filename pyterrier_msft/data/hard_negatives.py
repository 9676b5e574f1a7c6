"""Read data sets of sentence-transformers with mined negatives."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.permutations import text_id
from pyterrier_msft.notices import warn

LABELS, SCORES = ("label", "labels"), ("score", "scores")  # names of columns
# Names of columns of ids: those that end in a word "id", and common compounds.
ID_NAME = re.compile(r"(.*[\W_])?ids?|[pq]ids?|docno|(query|doc|document|passage|corpus)ids?", re.IGNORECASE)
FORMS = (
    "columns of texts (a query, a positive and negatives), or a query, a passage and a label or score, or a query with "
    "lists of passages and of labels or scores"
)


def read_hard_negatives(dataset: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Convert a data set that sentence-transformers trains on to results and qrels.

    The forms are those of `sentence_transformers.util.mine_hard_negatives` and of its published data sets; the first
    column is the query:

    - triplets and n-tuples: a positive and one or more negatives, and perhaps `scores`, a list of their scores;
      `labels` that aren't whole numbers are scores, too, as for sentence-transformers' distillation losses;
    - labeled pairs: a passage and its `label` or `score`;
    - labeled lists: a list of passages and a list of their `labels` or `scores`.

    Queries and passages have no ids there, so equal texts are the same query or passage. A passage that is both
    positive and negative for a query is relevant: of several labels of a passage, the highest one is used; of several
    scores, the first one. A warning gives the count.

    Args:
        dataset: A split as a `datasets.Dataset`, e.g. of `datasets.load_dataset(name, split="train")`, or the same as a
            frame.

    Returns:
        Results (qid, query, docno, text, and score if there are scores) and qrels (qid, docno, label; without rows if
        there are only scores), for `Contrastive`; the scores are those of a teacher for `Distillation`.

    Raises:
        ValueError: If the columns have another form, or one has ids.
    """
    frame = dataset.to_pandas() if hasattr(dataset, "to_pandas") else dataset
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"dataset must be a split or a frame; got {type(dataset).__name__}, e.g. load it with split=")
    if of_ids := [name for name in frame.columns if ID_NAME.fullmatch(str(name))]:
        raise ValueError(
            f"dataset must have texts instead of ids; got the column {of_ids[0]!r} in {[*frame.columns]}. Remove the "
            "column, or replace its ids with texts"
        )
    texts = [name for name in frame.columns if name not in LABELS + SCORES]
    values = [name for name in frame.columns if name in LABELS + SCORES]
    if not len(frame) or len(texts) < 2 or len(values) > 1 or (len(texts) == 2 and not values):
        raise ValueError(f"dataset must have rows with {FORMS}; got {len(frame)} rows of {[*frame.columns]}")
    rows = pd.DataFrame(_rows(frame, texts, values), columns=["query", "text", "value", "is_positive"])
    # The columns of a tuple say which passage is the positive. Labels that aren't grades are then a teacher's scores.
    has_scores = bool(values) and (values[0] in SCORES or (len(texts) > 2 and bool((rows["value"] % 1 != 0).any())))
    ids = {name: {text: text_id(text) for text in rows[name].unique()} for name in ("query", "text")}
    rows = rows.assign(qid=rows["query"].map(ids["query"]), docno=rows["text"].map(ids["text"]))
    rows["label"] = rows["is_positive"].astype(float) if has_scores or not values else rows["value"]
    _warn_of_doubts(rows, has_scores=has_scores)
    rows["label"] = rows.groupby(["qid", "docno"], sort=False)["label"].transform("max")
    rows = rows.drop_duplicates(["qid", "docno"], ignore_index=True)
    results = rows[["qid", "query", "docno", "text"]]
    if has_scores:
        results = results.assign(score=rows["value"].astype(float))
    qrels = rows.loc[rows["label"] > 0, ["qid", "docno", "label"]].reset_index(drop=True)
    whole = (qrels["label"] % 1 == 0).all()  # as ir_measures needs
    return results, qrels.astype({"label": int}) if whole else qrels


def _warn_of_doubts(rows: pd.DataFrame, *, has_scores: bool) -> None:
    """Warn if a passage has several labels or scores for a query, or if passages look like ids."""
    by_pair = rows.groupby(["qid", "docno"], sort=False)
    checked = {"label": ("labels", "highest")} | ({"value": ("scores", "first")} if has_scores else {})
    for column, (what, used) in checked.items():
        if count := int((by_pair[column].nunique() > 1).sum()):
            pairs = "1 pair" if count == 1 else f"{count:,} pairs"
            warn(f"dataset has {pairs} of a query and a passage with several {what}: the {used} one is used")
    if rows["text"].str.fullmatch("[!-~]+").all():  # ASCII without spaces
        warn(f"no passage of dataset has a space, e.g. {rows['text'].iloc[0]!r}. If these are ids, pass texts instead")


def _rows(frame: pd.DataFrame, texts: list[str], values: list[str]) -> Iterator[tuple[str, str, float, bool]]:
    """Return the query, a passage, its label or score, and whether it is the positive of a tuple."""
    is_tuple = len(texts) > 2
    columns = [frame[name] for name in (*texts, *values)]
    for number, row in enumerate(zip(*columns, strict=True), 1):
        query, *passages = row[: len(texts)]
        value = row[len(texts)] if values else np.nan
        if not is_tuple and not isinstance(passages[0], str):
            passages = _items(passages[0], number)
        numbers = np.atleast_1d(np.asarray(value, dtype=object))
        if not values:
            numbers = np.full(len(passages), np.nan)
        if len(numbers) != len(passages):
            raise ValueError(
                f"row {number}: {values[0]} must be one per passage; got {len(numbers)} of {len(passages)}"
            )
        for place, (passage, own) in enumerate(zip(passages, numbers, strict=True)):
            if not isinstance(query, str) or not isinstance(passage, str):
                bad = query if not isinstance(query, str) else passage
                raise ValueError(f"row {number}: queries and passages must be texts; got {bad!r}. Ids aren't enough")
            if values and np.isnan(float(own)):
                raise ValueError(f"row {number}: {values[0]} must be numbers; got {own!r}")
            yield query, passage, float(own), is_tuple and place == 0


def _items(passages: Any, number: int) -> list[Any]:
    if isinstance(passages, list | tuple | np.ndarray):
        return [*passages]
    raise ValueError(f"row {number}: queries and passages must be texts; got {passages!r}. Ids aren't enough")
