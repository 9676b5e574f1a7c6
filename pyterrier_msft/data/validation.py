"""Validation data: checked results and qrels of queries that aren't trained on."""

from collections.abc import Collection

import pandas as pd

from pyterrier_msft.data.diagnosis import explain_mismatch
from pyterrier_msft.data.frames import PASSAGE_SUFFIX, as_ids, as_texts, is_blank, require_columns
from pyterrier_msft.data.labels import grades_of
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.notices import warn


def validation_frames(
    results: pd.DataFrame | None, qrels: pd.DataFrame | None, texts: TextSource
) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Check validation results and qrels, and reduce them to what a measure needs; None if neither was given.

    These are the judged queries' results (qid, query, docno, text) and qrels (qid, docno, label), with ids as strings.
    """
    if results is None and qrels is None:
        return None
    if results is None or qrels is None:
        missing, given = ("results", "qrels") if results is None else ("qrels", "results")
        raise ValueError(f"validation {missing} are required with validation {given}; got None")
    require_columns(results, ["qid", "query", "docno"], "validation results")
    labels = grades_of(qrels).rename("label").reset_index()
    if (fractions := labels["label"][labels["label"] % 1 != 0]).size:
        raise ValueError(f"validation labels must be whole numbers, which measures need; got {fractions.iloc[0]}")
    results = texts.add_to(results.reset_index(drop=True))
    require_columns(results, ["qid", "query", "docno", texts.field], "validation results")
    # A passage has the label of its document, as in training.
    docno = as_ids(results["docno"]).str.replace(PASSAGE_SUFFIX, "", regex=True)
    frame = pd.DataFrame({"qid": as_ids(results["qid"]), "docno": docno})
    frame["query"], frame["text"] = as_texts(results["query"]), as_texts(results[texts.field])
    labels = labels[labels["qid"].isin(frame["qid"].unique())]
    judged = frame["qid"].isin(labels["qid"].unique())
    relevant = pd.MultiIndex.from_frame(labels.loc[labels["label"] > 0, ["qid", "docno"]])
    if not pd.MultiIndex.from_frame(frame[["qid", "docno"]]).isin(relevant).any():
        reason = "all labels are 0 or less" if judged.any() and not len(relevant) else ""
        if not reason and len(frame):
            reason = explain_mismatch(frame, qrels, "the qrels")
        raise ValueError(f"validation results must contain a relevant document; got none{': ' * bool(reason)}{reason}")
    if blank := int((is_blank(results["query"]) | is_blank(results[texts.field]))[judged].sum()):
        warn(f"{blank:,} validation documents have no text or no query; it is read as empty")
    return frame[judged].reset_index(drop=True), labels.astype({"label": int})


def warn_of_shared_queries(results: pd.DataFrame, trained: Collection[str]) -> None:
    """Warn if validation queries are trained on."""
    if shared := int(results["qid"].drop_duplicates().isin(trained).sum()):
        warn(f"{shared} validation queries are also training queries; the metric will be too optimistic")
