"""Explanations of why no query can be learned from."""

import pandas as pd

from pyterrier_msft.data.frames import parents
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.ids import as_ids


def explain_mismatch(results: pd.DataFrame, other: pd.DataFrame, what: str, *, by_document: bool = True) -> str:
    """Explain why results and `other`, called `what`, have no document in common.

    `by_document` says that `other` has documents and not passages, as qrels do.
    """
    if not len(other):
        return f"there are no rows in {what}"
    for column in ("qid", "docno"):
        here, there = as_ids(results[column]), as_ids(other[column])
        compared = parents(here) if column == "docno" and by_document else here
        if not compared.isin(there).any():
            hint = ""
            if here.str.lstrip("0").isin(there.str.lstrip("0")).any() and not here.isin(there).any():
                hint = ". Leading zeros are lost when ids are read as numbers: read them with dtype=str"
            elif column == "docno" and parents(here).isin(parents(there)).any():
                needed = "documents, not passages" if by_document else "passages where the results have them"
                hint = f". A docno that ends in '%p' and a number is a passage: {what} must have {needed}"
            pair = f"{here.iloc[0]!r} in the results and {there.iloc[0]!r} in {what}"
            return f"the {column}s don't match, e.g. {pair}{hint}"
    return f"qids and docnos match, but no document of a query's results is in {what} for that query"


def explain_no_positives(
    report: DataReport, results: pd.DataFrame, grades: pd.Series, min_relevance: float, skip: int = 0
) -> str:
    """Explain why no query has both a relevant document and a negative; `results` may be a sample."""
    judged = grades[grades.index.get_level_values("qid").isin(as_ids(results["qid"]))]
    relevant = grades[grades >= min_relevance].index.to_frame(index=False)
    if not (why := _explain_missing_texts(report)):
        if report.without_relevant < report.queries and report.false_negatives:
            why = "the judge scores all other documents in the top of the results like relevant ones, see margin"
        elif report.without_relevant < report.queries:
            why = "there are relevant documents, but no others in the top of the results to use as negatives"
            why += f", below the first {skip} that skip={skip} leaves out" if skip else ""
        elif not len(judged):
            why = explain_mismatch(results, grades.index.to_frame(index=False), "the qrels")
        elif judged.max() < min_relevance:
            why = f"the highest label of these queries is {judged.max():g}; min_relevance is {min_relevance:g}"
        else:
            why = explain_mismatch(results, relevant, "the qrels")
            if why.startswith("qids and docnos match"):
                why = "the first stage found no relevant document. Add them with add_missing_positives=True"
    return _message("a relevant and a non-relevant document among their results", report, why)


def explain_no_preferences(report: DataReport) -> str:
    """Explain why a teacher ranks no two documents of a query differently."""
    why = _explain_missing_texts(report)
    if not why and report.without_teacher == report.queries:
        why = "the teacher ranked none of them"
    why = why or "each has only one document, or all of its documents have the same score"
    return _message("two documents that the teacher ranks differently", report, why)


def _message(needed: str, report: DataReport, why: str) -> str:
    return f"training queries must have {needed}; 0 of {report.queries:,} queries do: {why}"


def _explain_missing_texts(report: DataReport) -> str:
    """Explain that there are no rows, or none with a text and a query; empty otherwise."""
    if not report.queries:
        return "the results are empty"
    if report.documents:
        return ""
    counts = {"text": report.without_text, "query": report.without_query}
    return ", and ".join(f"{count:,} documents have no {name}" for name, count in counts.items() if count)
