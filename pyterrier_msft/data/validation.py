"""Validation data: checked results and qrels of queries that aren't trained on."""

import contextlib
from collections.abc import Collection

import pandas as pd

from pyterrier_msft.data.diagnosis import explain_mismatch
from pyterrier_msft.data.frames import (
    FIRST_STAGE_SCORE,
    as_texts,
    is_blank,
    order_key,
    parents,
    require_columns,
)
from pyterrier_msft.data.labels import whole_grades
from pyterrier_msft.data.mixture import TrainingResults, as_sources
from pyterrier_msft.data.rankings import first_stage_scores, warn_of_contradictions
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.ids import as_ids
from pyterrier_msft.notices import warn_of_data


def validation_frames(
    results: pd.DataFrame | None, qrels: pd.DataFrame | None, texts: TextSource, *, what: str = "validation",
    with_scores: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame] | None:  # fmt: skip
    """Check validation results and qrels, and reduce them to what a measure needs; None if neither was given.

    These are the judged queries' results (qid, query, docno, text, and the first stage's score if there is one) and
    qrels (see `whole_grades`), with ids as strings. `with_scores` requires the score; `what` names the data in
    messages.
    """
    if results is None and qrels is None:
        return None
    if results is None or qrels is None:
        missing, given = ("results", "qrels") if results is None else ("qrels", "results")
        raise ValueError(f"{what} {missing} are required with {what} {given}; got None")
    require_columns(results, ["qid", "query", "docno"], f"{what} results")
    labels = whole_grades(qrels, f"{what} labels")
    results = texts.add_to(results.reset_index(drop=True))
    require_columns(results, ["qid", "query", "docno", texts.field], f"{what} results")
    # A passage has the label of its document, as in training.
    docno = parents(as_ids(results["docno"]))
    frame = pd.DataFrame({"qid": as_ids(results["qid"]), "docno": docno})
    frame["query"], frame["text"] = as_texts(results["query"]), as_texts(results[texts.field])
    if with_scores:
        frame["score"] = first_stage_scores(results, f"{what} results")
    else:
        with contextlib.suppress(ValueError):  # not needed, so not refused
            if (key := order_key(results)) is not None:
                frame["score"] = key
            warn_of_contradictions(results, "first stage's")
    labels = labels[labels["qid"].isin(frame["qid"].unique())]
    judged = frame["qid"].isin(labels["qid"].unique())
    relevant = pd.MultiIndex.from_frame(labels.loc[labels["label"] > 0, ["qid", "docno"]])
    if not pd.MultiIndex.from_frame(frame[["qid", "docno"]]).isin(relevant).any():
        reason = "all labels are 0 or less" if judged.any() and not len(relevant) else ""
        if not reason and len(frame):
            reason = explain_mismatch(frame, qrels, "the qrels")
        raise ValueError(f"{what} results must contain a relevant document; got none{': ' * bool(reason)}{reason}")
    if blank := int((is_blank(results["query"]) | is_blank(results[texts.field]))[judged].sum()):
        warn_of_data(f"{blank:,} {what} documents have no text or no query; it is read as empty")
    if what == "validation" and (unjudged := frame.loc[~judged, "qid"].nunique()):
        warn_of_data(f"validation leaves out {unjudged:,} of {frame['qid'].nunique():,} queries, which have no labels")
    return frame[judged].reset_index(drop=True), labels


def warn_of_shared_queries(results: pd.DataFrame, trained: Collection[str]) -> None:
    """Warn if the texts of validation queries are trained on; qids may be the same by chance."""
    queries = results.drop_duplicates("qid")["query"]
    if shared := int((queries.isin(trained) & (queries != "")).sum()):
        warn_of_data(f"{shared} validation queries are also training queries; the metric will be too optimistic")


def warn_of_mixed_scores(training: TrainingResults, validation: pd.DataFrame) -> None:
    """Warn if only some of the results have the column that replaces `score` as the first stage's score."""
    frames = [source.results for source in as_sources(training, None) if isinstance(source.results, pd.DataFrame)]
    has_column = [FIRST_STAGE_SCORE in frame.columns for frame in (*frames, validation)]
    if any(has_column) and not all(has_column):
        which = "validation" if has_column[-1] else "training"
        warn_of_data(
            f"only the {which} results have the column {FIRST_STAGE_SCORE!r}, which is used instead of 'score': "
            "training and validation may be on different scales. Drop the column if 'score' is the first stage's"
        )
