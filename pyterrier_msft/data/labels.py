"""Labels of training documents, from qrels or from a teacher's ranking."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.diagnosis import explain_mismatch
from pyterrier_msft.data.frames import as_numbers, as_texts, is_blank, order_column, require, require_columns
from pyterrier_msft.data.groups import Groups, GroupsBuilder
from pyterrier_msft.data.judging import Judge
from pyterrier_msft.data.rankings import Rankings, RowsByQuery, as_rankings, assign_ids, clean_ranking, within_depth
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.sampling import ListSampling, NegativeSampling
from pyterrier_msft.data.scales import check_probabilities, scale_scores
from pyterrier_msft.ids import as_ids

MAX_GRADE = 10_000  # of labels that measures read
SUBTOPIC = "iteration"  # PyTerrier's name of the qrels' column

# ---- from qrels


def from_qrels(
    results: pd.DataFrame | Iterable[Rankings],
    qrels: pd.DataFrame,
    *,
    depth: int | None,
    n_negatives: int,
    min_relevance: float,
    n_positives: int | None = 1,
    skip: int = 0,
    n_random: int = 0,
    sample: str = "uniform",
    load_missing: Callable[[pd.DataFrame], Iterable[Any]] | None = None,
    judge: Judge | None = None,
    text_field: str = "text",
) -> tuple[Groups, DataReport]:
    """Label documents by relevance, for a contrastive loss.

    A positive is a document with a grade of at least `min_relevance`, at any rank; its label is the grade. Negatives
    are the other documents in the top `depth`, below the first `skip`, judged or not, with label 0, except those with
    exactly the text of a positive; in results from a file, whose texts aren't known yet, these aren't left out. A
    passage (docno `d%p0`) has the grade of its document. Positives that the results lack are added with the texts that
    `load_missing` returns for a frame of qid, query and docno. The false negatives that a judge finds are left out, or
    become positives with the grade `min_relevance`. For the settings, see `Contrastive`.
    """
    grades = grades_of(qrels)
    judged = set(grades.index.get_level_values("qid"))
    relevant = RowsByQuery(relevant_of(grades, min_relevance))
    builder, reports, own = GroupsBuilder(), [], OwnDocuments()
    for chunk in as_rankings(results, text_field):
        positives = relevant.of(chunk.qids)
        rankings = chunk if load_missing is None else _add_missing(chunk, positives, load_missing)
        labels = rankings.lookup(positives, "label", rankings.parent, default=0.0)
        in_top = within_depth(rankings.query, depth)
        candidates = in_top & (rankings.rank >= skip)
        is_negative, is_copy, found = _find_negatives(rankings, labels, candidates, judge, min_relevance)
        is_positive = labels > 0
        has_positive = rankings.queries_with(is_positive)
        has_both = has_positive & rankings.queries_with(is_negative)
        is_used = (is_positive | is_negative) & has_both[rankings.query]
        added = builder.add(rankings, is_used, labels)
        if n_random:
            own.add(rankings, is_used, in_top & ~is_used)
        reports.append(
            DataReport(
                **added,
                **rankings.counts,
                without_relevant=rankings.counts["queries"] - int(has_positive.sum()),
                unjudged=sum(qid not in judged for qid in rankings.qids),
                without_negatives=int(has_positive.sum()) - added["groups"],
                copies_of_positives=int(is_copy.sum()),
                **found,
            )
        )
    if judge is not None:
        judge.check_overlap()
    report = replace(DataReport.total(reports), judged_twice=count_judged_twice(qrels))
    avoided = own.avoided(relevant.frame) if n_random else None
    sampling = NegativeSampling(n_positives, n_negatives, skip, sample)
    return builder.build(sampling, n_random=n_random, avoided=avoided), report


def _find_negatives(
    rankings: Rankings, labels: np.ndarray, candidates: np.ndarray, judge: Judge | None, min_relevance: float
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return masks of the negatives and of the copies of positives among candidates, and what the judge found.

    The labels of false negatives that become positives are changed in place.
    """
    is_other = candidates & (labels <= 0)
    is_copy = is_other & rankings.with_text_of(labels > 0)
    found: dict[str, Any] = {}
    if judge is not None:
        is_false, found = judge.find(rankings, labels > 0, is_other & ~is_copy)
        is_other &= ~is_false
        if judge.relabels:
            labels[is_false] = min_relevance
            is_copy = is_other & rankings.with_text_of(labels > 0)
    return is_other & ~is_copy, is_copy, found


class OwnDocuments:
    """Collects what random negatives of a query must not be: its relevant documents, and others that it found."""

    def __init__(self) -> None:
        self.unused: list[pd.DataFrame] = []  # qid and text id
        self.texts: list[pd.DataFrame] = []  # document id (of passages: of the whole) and text id
        self.docnos: dict[str, int] = {}

    def add(self, rankings: Rankings, used: np.ndarray, unused: np.ndarray) -> None:
        """Add the rows of groups, and rows that aren't in the group of their query, as masks."""
        qids = np.array(rankings.qids, dtype=object)[rankings.query[unused]]
        self.unused.append(pd.DataFrame({"qid": qids, "text": rankings.text[unused]}))
        texts = pd.DataFrame({"document": rankings.parent[used], "text": rankings.text[used]})
        self.texts.append(texts.drop_duplicates())
        self.docnos = rankings.docnos

    def avoided(self, relevant: pd.DataFrame) -> pd.DataFrame:
        """Return pairs of qid and text id, given the relevant documents (qid, docno) of the qrels."""
        if not self.texts:
            return pd.DataFrame({"qid": [], "text": []})
        ids = relevant["docno"].map(self.docnos)
        found = relevant[["qid"]].assign(document=ids)[ids.notna()]
        found = found.merge(pd.concat(self.texts).drop_duplicates(), on="document")
        return pd.concat([*self.unused, found[["qid", "text"]]], ignore_index=True)


def grades_of(qrels: pd.DataFrame) -> pd.Series:
    """Return the labels of qrels, indexed by qid and docno as strings; if a pair has two labels, the higher one."""
    return _labels_by_pair(qrels).max()


def whole_grades(qrels: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return the grades of qrels, see `grades_of`, as a frame: qid, docno, label; `what` names the labels.

    If the column `iteration` has several values, which are subtopics for diversity measures, the frame has it, too, and
    a row for each subtopic. The row with a pair's highest label is the last one: it is what other measures read.

    Raises:
        ValueError: If a label isn't a whole number of at most `MAX_GRADE`, which the measures of ir_measures need.
    """
    subtopics = [SUBTOPIC] if SUBTOPIC in qrels.columns and qrels[SUBTOPIC].nunique() > 1 else []
    grades = _labels_by_pair(qrels, *subtopics).max()
    if (fractions := grades[grades % 1 != 0]).size:
        raise ValueError(f"{what} must be whole numbers, which measures need; got {fractions.iloc[0]}")
    if grades.max() > MAX_GRADE:  # trec_eval counts the documents of each grade up to the highest
        raise ValueError(f"{what} must be at most {MAX_GRADE:,}, which measures need; got {grades.max():,.0f}")
    frame = grades.astype(int).reset_index(name="label")
    return frame.sort_values(["qid", "docno", "label"], ignore_index=True) if subtopics else frame


def count_judged_twice(qrels: pd.DataFrame) -> int:
    """Return how many pairs of qid and docno have different labels in qrels."""
    labels = _labels_by_pair(qrels)
    return int((labels.min() < labels.max()).sum())


def relevant_of(grades: pd.Series, min_relevance: float) -> pd.DataFrame:
    """Return the relevant documents among grades (see `grades_of`): qid, docno, label."""
    return grades[grades >= min_relevance].reset_index(name="label")


def _labels_by_pair(qrels: pd.DataFrame, *more: str) -> Any:
    """Group the labels of valid qrels by qid, docno, and more columns of ids."""
    require_columns(qrels, ["qid", "docno", "label"], "qrels")
    labels = as_numbers(qrels["label"], "label")
    require(np.isfinite(labels), labels, "labels must be finite numbers")
    names = ["qid", "docno", *more]
    index = pd.MultiIndex.from_arrays([as_ids(qrels[name]) for name in names], names=names)
    return pd.Series(labels, index=index).groupby(level=names)


def _add_missing(
    rankings: Rankings, positives: pd.DataFrame, load: Callable[[pd.DataFrame], Iterable[Any]]
) -> Rankings:
    """Add the positives that are missing in rankings, each at the end of its query's ranking."""
    is_found = np.isin(np.arange(len(positives)), rankings.match(positives, rankings.parent))
    query_ids = {qid: i for i, qid in enumerate(rankings.qids) if rankings.query_texts[i]}
    missing = positives[~is_found & positives["qid"].isin(query_ids).to_numpy()]
    if not len(missing):
        return rankings
    query = missing["qid"].map(query_ids).to_numpy(dtype=np.int64)
    wanted = missing[["qid", "docno"]].assign(query=[rankings.query_texts[i] for i in query])
    texts = pd.Series([*load(wanted.reset_index(drop=True))], dtype=object, name="text")
    has_text = ~is_blank(texts)
    document = assign_ids(missing["docno"][has_text], rankings.docnos)
    query = np.concatenate([rankings.query, query[has_text]])
    order = np.argsort(query, kind="stable")

    def extend(column: np.ndarray, values: Any) -> np.ndarray:
        return np.concatenate([column, np.broadcast_to(values, len(document))])[order]

    return replace(
        rankings,
        query=query[order],
        document=extend(rankings.document, document),
        parent=extend(rankings.parent, document),
        text=extend(rankings.text, assign_ids(as_texts(texts)[has_text], rankings.texts)),
        key=extend(rankings.key, -np.inf),
        counts={**rankings.counts, "without_text": rankings.counts["without_text"] + int((~has_text).sum())},
    )


# ---- from a teacher


def from_teacher(
    results: pd.DataFrame | Iterable[Rankings],
    ranking: pd.DataFrame | None,
    *,
    depth: int | None,
    keep_scores: bool = False,
    scale: str | None = None,
    probabilities: bool = False,
    unranked: str = "drop",
    sampling: ListSampling | None = None,
    text_field: str = "text",
) -> tuple[Groups, DataReport]:
    """Label the first stage's top documents by a teacher's ranking (None: the results' own), for distillation.

    A label is the number of the query's documents that the teacher ranks lower; with `keep_scores`, the teacher's
    score, scaled by `scale` among the query's documents (`probabilities`: a ValueError unless that is between 0 and 1).
    In a query that the teacher ranked, documents that it left out are dropped (`unranked="drop"`) or tied last
    ("last", without `keep_scores`). With `sampling`, an epoch draws a part of these documents.
    """
    teacher = None
    if ranking is not None:
        teacher = RowsByQuery(clean_ranking(ranking, "teacher's ranking"))
        _check_order(order_column(ranking.columns), keep_scores=keep_scores)
    builder, reports, unmatched_sample = GroupsBuilder(), [], pd.DataFrame()
    n_tied = n_pairs = 0
    for rankings in as_rankings(results, text_field):
        key = _teacher_key(rankings, teacher, keep_scores=keep_scores)
        in_top, is_missing = within_depth(rankings.query, depth), np.isnan(key)
        is_known = rankings.queries_with(in_top & ~is_missing)
        if not is_known.any() and not len(unmatched_sample):
            unmatched_sample = rankings.frame(in_top)
        if unranked == "last":
            key[is_missing & is_known[rankings.query]] = -np.inf
        ranked = in_top & ~np.isnan(key)
        if keep_scores:
            key[ranked] = _scaled(key[ranked], rankings.query[ranked], scale, probabilities=probabilities)
        lower, tied, others = _count_others(rankings.query, key, ranked)
        # A query without any preference between two documents can't be learned from.
        has_preference = rankings.queries_with(lower > 0)[rankings.query]
        usable = ranked & has_preference
        n_tied += int(tied[usable].sum())
        n_pairs += int(others[usable].sum())
        n_missing = int((in_top & is_missing & has_preference).sum())
        counts = builder.add(rankings, usable, key if keep_scores else lower)
        reports.append(
            DataReport(
                **counts,
                **rankings.counts,
                without_preference=int(is_known.sum()) - counts["groups"],
                without_teacher=rankings.counts["queries"] - int(is_known.sum()),
                unranked_by_teacher=n_missing if unranked == "drop" else 0,
                ranked_last=n_missing if unranked == "last" else 0,
                agreement=None if teacher is None else _agreement(rankings, key, usable),
            )
        )
    report = DataReport.total(reports)
    if ranking is not None and len(unmatched_sample) and report.without_teacher == report.queries:
        why = explain_mismatch(unmatched_sample, ranking, "the teacher's ranking", by_document=False)
        raise ValueError(f"teacher must rank documents of the results; got none in common: {why}")
    return builder.build(sampling), replace(report, tied_labels=n_tied / max(1, n_pairs))


def _teacher_key(rankings: Rankings, teacher: RowsByQuery | None, *, keep_scores: bool) -> np.ndarray:
    """Return the teacher's sort key of each row, higher is better; NaN where it has none. Without a teacher, a copy."""
    if teacher is None:
        _check_order(rankings.ordered_by, keep_scores=keep_scores)
        return rankings.key.copy()
    return rankings.lookup(teacher.of(rankings.qids), "key", rankings.document, default=np.nan)


def _scaled(scores: np.ndarray, query: np.ndarray, scale: str | None, *, probabilities: bool) -> np.ndarray:
    """Check a teacher's scores, and scale them among each query's documents."""
    require(np.isfinite(scores), scores, "teacher scores must be finite numbers")
    scaled = scale_scores(scores, query, scale)
    if probabilities:
        check_probabilities(scaled)
    else:
        _check_precision(scaled, query)
    return scaled


def _check_precision(scores: np.ndarray, query: np.ndarray) -> None:
    """Raise a ValueError if many scores that differ are equal as labels, which are float32."""
    distinct, rounded = (
        len(pd.DataFrame({"query": query, "score": values}).drop_duplicates())
        for values in (scores, scores.astype(np.float32))
    )
    if rounded < 0.8 * distinct:
        raise ValueError(
            f"teacher scores must differ in the first seven digits; {distinct - rounded:,} of {distinct:,} are equal "
            f"to others then, e.g. {scores[0]!r} is rounded. Subtract a constant, or set scale='zscore'"
        )


def has_only_ranks(ranking: pd.DataFrame) -> bool:
    """Tell whether the scores of a ranking only restate its ranks, e.g. 1/rank or depth - rank.

    In such scores, a document's distance from the top of its query depends only on its rank.
    """
    if "score" not in ranking.columns or not len(ranking):
        return True
    frame = clean_ranking(ranking, "teacher's ranking")
    frame = frame[frame.groupby("qid")["key"].transform("nunique") > 1]  # other queries have no order to restate
    if not len(frame):
        return False
    by_query = frame.groupby("qid")["key"]
    rank, levels = by_query.rank(ascending=False, method="min"), by_query.nunique()
    from_top = by_query.transform("max") - frame["key"]
    has_steps_of_1 = bool(np.allclose(from_top, rank - 1))
    tied = frame[frame.duplicated(["qid", "key"], keep=False)]
    if len(tied):
        # Ranks are tied only below all others (`unranked="last"`). Two distinct scores are grades, unless they are 0
        # and -1, minus the rank.
        is_last = (tied["key"] == by_query.transform("min")[tied.index]).all()
        return bool(has_steps_of_1 and is_last and (levels.max() > 2 or np.allclose(frame["key"], 1 - rank)))
    if len(levels) == 1:  # no other query to compare with
        return has_steps_of_1
    by_rank = from_top.groupby(rank)
    return bool((by_rank.max() - by_rank.min() < 1e-9).all())


def _check_order(ordered_by: str | None, *, keep_scores: bool) -> None:
    """Raise a ValueError if a teacher's ranking has no order, or no scores where they are the labels."""
    if ordered_by is None or (keep_scores and ordered_by != "score"):
        needed = "a score" if keep_scores else "a score or a rank"
        raise ValueError(f"teacher's ranking must have {needed}; got {ordered_by or 'neither'}")


def _count_others(query: np.ndarray, key: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Count, for some rows, the query's other rows: those with a lower key, those with the same key, and all."""
    by_query = pd.Series(key[rows]).groupby(query[rows])
    lowest, highest = by_query.rank(method="min"), by_query.rank(method="max")
    counts = np.zeros((3, len(key)))
    counts[:, rows] = lowest - 1, highest - lowest, by_query.transform("size") - 1
    return counts


def _agreement(rankings: Rankings, key: np.ndarray, rows: np.ndarray) -> float | None:
    """Return Spearman's correlation of the teacher's key with the first stage's order, averaged over queries."""
    if rankings.ordered_by is None or not rows.any():
        return None
    query = rankings.query[rows]
    ranks = pd.DataFrame({"teacher": key[rows], "first": -rankings.rank[rows]}).groupby(query).rank()
    centred = ranks - ranks.groupby(query).transform("mean")
    products = centred**2
    products["both"] = centred["teacher"] * centred["first"]
    sums = products.groupby(query).sum()
    return float((sums["both"] / np.sqrt(sums["teacher"] * sums["first"])).mean())
