"""From qrels, or from a teacher's ranking, to labels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import (
    PASSAGE,
    _numbers,
    _some,
    as_ids,
    as_texts,
    order_key,
    require_columns,
    without_text,
)
from pyterrier_msft.data.groups import Groups, _joined, _Lists
from pyterrier_msft.data.rankings import ByQuery, Rankings, _pieces, _spread, number, starts
from pyterrier_msft.data.report import DataReport

# ---- objectives


def from_qrels(
    results: pd.DataFrame | Iterable[Rankings],
    qrels: pd.DataFrame,
    *,
    depth: int | None,
    n_negatives: int,
    min_relevance: float,
    n_positives: int | None = 1,
    load_missing: Callable[[pd.DataFrame], Iterable[Any]] | None = None,
    text_field: str = "text",
) -> tuple[Groups, DataReport]:
    """Groups of relevant documents and negatives, for a contrastive loss.

    A document of at least `min_relevance` is relevant, with its grade as label, wherever it stands in the results;
    the others, judged or not, are negatives if they stand in the top `depth`, with label 0. Passages (docno `d%p0`)
    have their document's grade. An epoch takes each query once, with a relevant document drawn anew.

    Args:
        results: The first stage's results, as a frame or as the pieces of a file.
        qrels: qid, docno, label.
        depth: How deep negatives are looked for. None: anywhere.
        n_negatives: Negatives a draw.
        min_relevance: The least label of a relevant document, above 0.
        n_positives: Relevant documents a draw. None: all.
        load_missing: Gives the texts of a frame of qid, query and docno. With it, relevant documents that the
            results lack are learnt from too.
        text_field: A frame's column of text.
    """
    if not min_relevance > 0:
        raise ValueError(f"expected min_relevance above 0, found {min_relevance}")
    grades = grades_of(qrels)
    judged = set(grades.index.get_level_values("qid"))
    relevant = ByQuery(relevant_of(grades, min_relevance))

    def lists() -> Iterator[tuple[_Lists, DataReport]]:
        for piece in _pieces(results, text_field):
            wanted = relevant.of(piece.qids)
            rankings = piece if load_missing is None else _with_missing(piece, wanted, load_missing)
            place, _ = rankings.find(wanted, rankings.judged)
            label = np.append(wanted["label"].to_numpy(), 0.0)[place]  # at -1 there is a 0
            kept = np.ones(len(label), dtype=bool) if depth is None else (label > 0) | (rankings.order < depth)
            n = len(rankings.qids)
            has_relevant = np.bincount(rankings.query[label > 0], minlength=n) > 0
            has_negative = np.bincount(rankings.query[kept & (label == 0)], minlength=n) > 0
            made = _Lists.of(rankings, kept & (has_relevant & has_negative)[rankings.query], label)
            n_relevant = int(has_relevant.sum())
            yield (
                made,
                DataReport(
                    groups=len(made.qids),
                    documents=len(made.labels.values),
                    without_relevant=rankings.counts["queries"] - n_relevant,
                    unjudged=sum(qid not in judged for qid in rankings.qids),
                    without_negatives=n_relevant - len(made.qids),
                    **rankings.counts,
                ),
            )

    groups, report = _joined(lists(), n_negatives=n_negatives, n_positives=n_positives)
    return groups, replace(report, judged_twice=_judged_twice(qrels))


def relevant_of(grades: pd.Series, min_relevance: float) -> pd.DataFrame:
    """The relevant documents of what `grades_of` gives: qid, docno, label."""
    return grades[grades >= min_relevance].reset_index(name="label")


def _with_missing(
    rankings: Rankings, relevant: pd.DataFrame, load: Callable[[pd.DataFrame], Iterable[Any]]
) -> Rankings:
    """The rankings with the relevant documents that they lack, each at the end of its query's."""
    # What has no query's text can't be learnt from.
    asked = [qid for qid, query in zip(rankings.qids, rankings.queries, strict=True) if query]
    missing = relevant[~rankings.find(relevant, rankings.judged)[1] & relevant["qid"].isin(asked).to_numpy()]
    if not len(missing):
        return rankings
    numbers = {qid: place for place, qid in enumerate(rankings.qids)}
    query = missing["qid"].map(numbers).to_numpy(dtype=np.int64)
    wanted = missing[["qid", "docno"]].assign(query=[rankings.queries[i] for i in query])
    texts = pd.Series([*load(wanted.reset_index(drop=True))], dtype=object, name="text")
    has_text = ~without_text(texts)
    document = number(missing["docno"][has_text], rankings.docnos)
    query = np.concatenate([rankings.query, query[has_text]])
    order = np.argsort(query, kind="stable")

    def added(values: np.ndarray, extra: Any) -> np.ndarray:
        return np.concatenate([values, np.broadcast_to(extra, len(document))])[order]

    return replace(
        rankings,
        query=query[order],
        document=added(rankings.document, document),
        judged=added(rankings.judged, document),
        text=added(rankings.text, number(as_texts(texts)[has_text], rankings.texts)),
        key=added(rankings.key, -np.inf),
        counts={**rankings.counts, "without_text": rankings.counts["without_text"] + int((~has_text).sum())},
    )


def from_teacher(
    results: pd.DataFrame | Iterable[Rankings],
    ranking: pd.DataFrame | None,
    *,
    depth: int | None,
    keep_scores: bool = False,
    unranked: str = "drop",
    text_field: str = "text",
) -> tuple[Groups, DataReport]:
    """Groups of the first stage's top `depth` documents with the teacher's ranking as labels, for distillation.

    Args:
        results: The first stage's results, as a frame or as the pieces of a file; with `ranking=None` they are the
            teacher's.
        ranking: The teacher's: qid, docno and score, or rank where there is no score.
        depth: Documents a query, from the top of the results. None: all.
        keep_scores: Whether the teacher's scores are the labels; else its ranks are, a label being the number of
            the list's documents that the teacher places below (equal for equal scores).
        unranked: What becomes of documents that the teacher didn't rank, in a list that it knows: "drop" leaves them
            out, "last" places them below all others, tied among themselves.
        text_field: A frame's column of text.

    Raises:
        ValueError: If neither the results nor the ranking say an order, or they have no query in common.
    """
    if keep_scores and unranked == "last":
        raise ValueError("expected unranked='drop' with the teacher's scores as labels, found 'last'")
    teacher = None if ranking is None else ByQuery(_teacher(ranking, keep_scores))
    n_known, stranger, ties = 0, pd.DataFrame(), np.zeros(2, dtype=np.int64)

    def lists() -> Iterator[tuple[_Lists, DataReport]]:
        nonlocal n_known, stranger, ties
        for rankings in _pieces(results, text_field):
            if teacher is None:
                _check_order(rankings.ordered_by, results, keep_scores)
                key, missing = rankings.key.copy(), np.zeros(len(rankings.key), dtype=bool)
            else:
                ranked = teacher.of(rankings.qids)
                key = np.append(ranked["key"].to_numpy(), np.nan)[rankings.find(ranked, rankings.document)[0]]
                missing = np.isnan(key)
            kept = np.ones(len(key), dtype=bool) if depth is None else rankings.order < depth
            missing &= kept
            n = len(rankings.qids)
            known = np.bincount(rankings.query[kept & ~missing], minlength=n) > 0
            n_known += int(known.sum())
            if not n_known and not len(stranger):
                stranger = rankings.frame(kept)
            if unranked == "last":
                key[missing & known[rankings.query]] = -np.inf
            kept &= ~np.isnan(key)
            query, key, order = rankings.query[kept], key[kept], rankings.order[kept]
            if keep_scores and not np.isfinite(key).all():
                raise ValueError(f"expected finite scores of a teacher, found {_some(key[~np.isfinite(key)])}")
            below = _below(query, key)
            # A list of one document, or whose documents are all tied, has nothing to say.
            told = np.bincount(query[below > 0], minlength=n) > 0
            label = np.zeros(len(kept))
            label[kept] = key if keep_scores else below
            made = _Lists.of(rankings, kept & told[rankings.query], label)
            ties += _ties(query[told[query]], key[told[query]])
            agreement = None
            if teacher is not None and rankings.ordered_by is not None:
                agreement = _agreement(query[told[query]], key[told[query]], order[told[query]])
            n_missing = int((missing & told[rankings.query]).sum())
            yield (
                made,
                DataReport(
                    groups=len(made.qids),
                    documents=len(made.labels.values),
                    without_teacher=rankings.counts["queries"] - int(known.sum()),
                    unranked_by_teacher=n_missing if unranked == "drop" else 0,
                    ranked_last=n_missing if unranked == "last" else 0,
                    agreement=agreement,
                    **rankings.counts,
                ),
            )

    groups, report = _joined(lists(), n_negatives=None, n_positives=None)
    if ranking is not None and len(stranger) and not n_known:
        raise ValueError(
            "expected the teacher's ranking to share queries and documents with the results, found none in common: "
            + mismatch(stranger, ranking, "the teacher's ranking")
        )
    return groups, replace(report, tied_labels=float(ties[0] / ties[1]) if ties[1] else 0.0)


def bare_ranks(ranking: pd.DataFrame) -> bool:
    """Whether a ranking's scores only restate its ranks, as 1/rank or depth - rank do, and are no model's scores.

    Such scores differ within a query, and depend on the place alone, counted from the top or from the bottom.
    """
    if "score" not in ranking.columns or not len(ranking):
        return True
    scores = pd.to_numeric(ranking["score"]).astype(float).reset_index(drop=True)
    by_query = scores.groupby(as_ids(ranking["qid"]))
    if (by_query.nunique() < by_query.size()).any():
        return False
    place = by_query.rank(ascending=False)
    if by_query.ngroups == 1:  # nothing to compare with: whole steps of one are the mark of ranks
        return bool(np.allclose(by_query.transform("max") - scores, place - 1))
    from_top = by_query.transform("max") - scores
    return any(bool((values.groupby(place).agg(np.ptp) < 1e-9).all()) for values in (from_top, scores))


def grades_of(qrels: pd.DataFrame) -> pd.Series:
    """Qrels as a series of labels over (qid, docno), ids as strings; of a pair judged twice the higher label.

    Raises:
        ValueError: If a column or an id is missing, or a label is not a finite number.
    """
    return _labels(qrels).groupby(level=[0, 1]).max()


def _labels(qrels: pd.DataFrame) -> pd.Series:
    require_columns(qrels, ["qid", "docno", "label"], "qrels")
    labels = _numbers(qrels["label"], "label")
    if not np.isfinite(labels).all():
        raise ValueError(f"expected a number as every label, found {_some(labels[~np.isfinite(labels)])}")
    index = pd.MultiIndex.from_arrays([as_ids(qrels["qid"]), as_ids(qrels["docno"])], names=["qid", "docno"])
    return pd.Series(labels, index=index)


def _judged_twice(qrels: pd.DataFrame) -> int:
    labels = _labels(qrels)
    if labels.index.is_unique:
        return 0
    return int((labels.groupby(level=[0, 1]).nunique() > 1).sum())


def mismatch(results: pd.DataFrame, other: pd.DataFrame, what: str) -> str:
    """Why results and `other` (qrels, or a teacher's ranking) have no document in common, in words."""
    if not len(other):
        return f"there are no rows in {what}"
    for column in ("qid", "docno"):
        here, there = as_ids(results[column]), as_ids(other[column])
        if column == "docno":
            here = here.str.replace(PASSAGE, "", regex=True)
        if not here.isin(there).any():
            zeros = here.str.lstrip("0").isin(there.str.lstrip("0")).any()
            why = "; zeros at the beginning are lost where ids are read as numbers: dtype=str" if zeros else ""
            pair = f"{here.iloc[0]!r} in the results and {there.iloc[0]!r} in {what}"
            return f"the {column}s don't match, such as {pair}{why}"
    return f"qids and docnos match, but no document of a query's results is in {what} for that query"


# ---- a teacher's order


def _teacher(ranking: pd.DataFrame, keep_scores: bool) -> pd.DataFrame:
    """A ranking as qid, docno (strings, each pair once) and key (higher is better)."""
    require_columns(ranking, ["qid", "docno"], "a teacher's ranking")
    key = order_key(ranking)
    ordered_by = None if key is None else "score" if "score" in ranking.columns else "rank"
    _check_order(ordered_by, ranking, keep_scores)
    frame = pd.DataFrame({"qid": as_ids(ranking["qid"]), "docno": as_ids(ranking["docno"]), "key": key})
    # Of a document ranked twice the better place.
    return frame.sort_values("key", ascending=False, kind="stable").drop_duplicates(["qid", "docno"])


def _check_order(ordered_by: str | None, ranking: Any, keep_scores: bool) -> None:
    if ordered_by is None:
        raise ValueError(
            f"expected a score or a rank in the teacher's ranking, found columns {list(map(str, ranking.columns))}"
        )
    if keep_scores and ordered_by != "score":
        raise ValueError("expected a column 'score' in the teacher's ranking, found ranks only")


def _runs_of_ties(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows by query and key, lowest first, and where a run of equal keys begins among them."""
    row = np.lexsort((key, query))
    new = np.diff(query[row], prepend=-1) != 0
    new[1:] |= key[row][1:] != key[row][:-1]
    return row, np.flatnonzero(new)


def _below(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(rows,) how many of the query's keys are lower; its rows stand together."""
    row, begins = _runs_of_ties(query, key)
    below = np.empty(len(row), dtype=np.int64)
    below[row] = np.repeat(begins, np.diff(np.append(begins, len(row)))) - _spread(starts(query), query)
    return below


def _ties(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """[ordered pairs of a query's documents that are tied, all of them]."""
    _, begins = _runs_of_ties(query, key)
    tied, all_ = (np.diff(np.append(part, len(query))) for part in (begins, starts(query)))
    return np.array([(tied * (tied - 1)).sum(), (all_ * (all_ - 1)).sum()])


def _agreement(query: np.ndarray, key: np.ndarray, order: np.ndarray) -> float | None:
    """Spearman's correlation of the teacher's order with the first stage's, the mean over queries."""
    ranks = pd.DataFrame({"teacher": key, "first": -order}).groupby(query).rank()
    centred = ranks - ranks.groupby(query).transform("mean")
    products = pd.DataFrame(
        {
            "both": centred["teacher"] * centred["first"],
            "teacher": centred["teacher"] ** 2,
            "first": centred["first"] ** 2,
        }
    )
    sums = products.groupby(query).sum()
    correlation: pd.Series[float] = sums["both"] / np.sqrt(sums["teacher"] * sums["first"])
    return float(correlation.mean()) if len(correlation) else None
