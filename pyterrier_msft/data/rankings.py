"""Clean rankings: results as arrays of integer ids, without duplicates and empty texts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import (
    FIRST_STAGE_SCORE,
    PASSAGE_SUFFIX,
    as_numbers,
    as_texts,
    is_blank,
    order_column,
    order_key,
    require,
    require_columns,
    tie_key,
)
from pyterrier_msft.ids import as_ids
from pyterrier_msft.notices import warn_of_data


@dataclass(frozen=True)
class Rankings:
    """The rankings of some queries, as columns of integer ids: each row is a document with text.

    Rows are grouped by query, best document first. `clean_results` makes one Rankings of a whole frame, `read_run`
    one of each chunk of a file. Singular names are columns of ids; plural names map between ids and strings.
    """

    qids: list[str]
    query_texts: list[str]  # of each qid
    docnos: dict[str, int]  # docno -> document id; parent documents of passages have ids too
    texts: dict[str, int]  # text -> text id; for a file, the same dict as docnos
    query: np.ndarray  # (rows,) index into qids and query_texts
    document: np.ndarray  # (rows,) document id
    parent: np.ndarray  # (rows,) document id without the passage suffix: qrels judge whole documents
    text: np.ndarray  # (rows,) text id
    key: np.ndarray  # (rows,) float64 sort key, higher is better
    ordered_by: str | None  # the column that `key` is from; None: the order of the rows
    counts: dict[str, Any]  # fields of a DataReport

    @property
    def rank(self) -> np.ndarray:
        """Each row's rank in its query, from 0."""
        return rank_in_query(self.query)

    def queries_with(self, rows: np.ndarray) -> np.ndarray:
        """Return a mask of the queries that have at least one of the rows, which are given as a mask."""
        return np.bincount(self.query[rows], minlength=len(self.qids)) > 0

    def with_text_of(self, rows: np.ndarray) -> np.ndarray:
        """Return a mask of the rows whose query has the same text in one of the rows that are given as a mask."""
        pairs = _pair_ids(self.query, self.text)
        return np.isin(pairs, pairs[rows])

    def frame(self, rows: np.ndarray | slice = slice(None)) -> pd.DataFrame:
        """Return the qid and docno of rows, and their score unless they are ordered by rank."""
        docnos = [*self.docnos]
        qids = [self.qids[i] for i in self.query[rows]]
        frame = pd.DataFrame({"qid": qids, "docno": [docnos[i] for i in self.document[rows]]})
        return frame.assign(score=self.key[rows]) if self.ordered_by == "score" else frame

    def match(self, pairs: pd.DataFrame, documents: np.ndarray) -> np.ndarray:
        """Return each row's position among distinct pairs of qid and docno, -1 if it isn't there.

        `documents` is the column of ids to match: `document` or `parent`.
        """
        query_ids = {qid: i for i, qid in enumerate(self.qids)}
        query = np.array([query_ids.get(qid, -1) for qid in pairs["qid"]], dtype=np.int64)
        document = np.array([self.docnos.get(docno, -1) for docno in pairs["docno"]], dtype=np.int64)
        known = np.flatnonzero((query >= 0) & (document >= 0))
        index = pd.Index(_pair_ids(query[known], document[known]))
        return np.append(known, -1)[index.get_indexer(pd.Index(_pair_ids(self.query, documents)))]

    def lookup(self, pairs: pd.DataFrame, column: str, documents: np.ndarray, default: float) -> np.ndarray:
        """Look up each row's value in a column of distinct pairs, see `match`; the default if its pair isn't there."""
        return np.append(pairs[column].to_numpy(), default)[self.match(pairs, documents)]  # index -1 is the default


def clean_results(results: pd.DataFrame, *, text_field: str) -> tuple[Rankings, np.ndarray]:
    """Convert a frame of results to rankings; drop empty texts, and all but the best of duplicate rows.

    Also return the positions of the rankings' rows in the results.
    """
    require_columns(results, ["qid", "query", "docno", text_field], "training results")
    query, qids = pd.factorize(as_ids(results["qid"]))
    document, distinct = pd.factorize(as_ids(results["docno"]))
    docnos = {docno: i for i, docno in enumerate(distinct)}
    parent = parent_ids([*docnos], docnos)
    no_query, no_text = (is_blank(results[column]) for column in ("query", text_field))
    key = order_key(results)
    if key is None:
        key = -np.arange(len(results), dtype=np.float64)
    row = best_first(query, key, tie_key(results))
    unique = row[~pd.Series(_pair_ids(query[row], document[row])).duplicated().to_numpy()]
    kept = unique[~(no_query | no_text)[unique]]
    text, texts = pd.factorize(as_texts(results[text_field]).iloc[kept])
    queries = as_texts(results["query"]).to_numpy(dtype=object)
    with_query = unique[~no_query[unique]]
    best = with_query[query_offsets(query[with_query])]
    query_texts = np.full(len(qids), "", dtype=object)
    query_texts[query[best]] = queries[best]
    rankings = Rankings(
        qids=list(qids),
        query_texts=list(query_texts),
        docnos=docnos,
        texts={text: i for i, text in enumerate(texts)},
        query=query[kept],
        document=document[kept],
        parent=parent[document[kept]],
        text=text,
        key=key[kept],
        ordered_by=order_column(results.columns),
        counts={
            "queries": len(qids),
            "duplicates": len(row) - len(unique),
            "without_query": int(no_query[unique].sum()),
            "without_text": int((no_text & ~no_query)[unique].sum()),
            "several_queries": len(np.unique(query[kept][queries[kept] != query_texts[query[kept]]])),
        },
    )
    return rankings, kept


def as_rankings(results: pd.DataFrame | Iterable[Rankings], text_field: str) -> Iterable[Rankings]:
    """Return the rankings of a frame, or those of a file's chunks as they are."""
    if isinstance(results, pd.DataFrame):
        return [clean_results(results, text_field=text_field)[0]]
    return results


def peek(chunks: Iterable[Rankings]) -> tuple[Rankings | None, Iterable[Rankings]]:
    """Return the first chunk with rows, and all chunks."""
    head, rest = [], iter(chunks)
    for chunk in rest:
        head.append(chunk)
        if len(chunk.query):
            return chunk, chain(head, rest)
    return None, head


def clean_ranking(ranking: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return each pair of qid and docno once, best first, with a key (higher is better)."""
    require_columns(ranking, ["qid", "docno"], what)
    key = order_key(ranking)
    if key is None:
        raise ValueError(f"{what} must have a score or a rank; got {[*map(str, ranking.columns)]}")
    frame = pd.DataFrame({"qid": as_ids(ranking["qid"]), "docno": as_ids(ranking["docno"]), "key": key})
    return frame.iloc[best_first(np.zeros(len(key)), key, tie_key(ranking))].drop_duplicates(["qid", "docno"])


def first_stage_scores(results: pd.DataFrame, what: str) -> np.ndarray:
    """Return the first stage's scores of results, called `what` in messages; warn if they contradict the ranks.

    Results that were re-ranked with interpolation before have them in `FIRST_STAGE_SCORE`.

    Raises:
        ValueError: If there are none, or if one isn't a finite number.
    """
    column = FIRST_STAGE_SCORE if FIRST_STAGE_SCORE in results.columns else "score"
    require_columns(results, [column], what)
    scores = as_numbers(results[column], column)
    require(np.isfinite(scores), results[column], f"{column}s must be finite")
    if column == "score":
        warn_of_contradictions(results, "first stage's")
    return scores


def warn_of_contradictions(ranking: pd.DataFrame, whose: str) -> None:
    """Warn if a ranking has ranks and scores of different orders; `whose` says whose ranking it is."""
    if not {"qid", "rank", "score"} <= {*ranking.columns}:
        return
    ranks = pd.to_numeric(ranking["rank"], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    scores = as_numbers(ranking["score"], "score")
    ordered = pd.DataFrame({"qid": as_ids(ranking["qid"]), "rank": ranks, "score": scores}).dropna()
    by_rank = ordered.sort_values(["qid", "rank"], kind="stable").groupby("qid")
    steps = by_rank["score"].diff().where(by_rank["rank"].diff() > 0)  # equal ranks contradict nothing
    n_up, n_steps = int((steps > 0).sum()), int((steps.abs() > 0).sum())
    if n_up > 0.1 * n_steps:
        warn_of_data(
            f"the {whose} ranking has a rank and a score that contradict each other for {n_up:,} of {n_steps:,} "
            "neighbouring documents: the score is used. Drop the column that is out of date"
        )


def top_documents(
    results: pd.DataFrame, *, depth: int | None, text_field: str = "text", relevant: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return the rows of results that `from_teacher` uses, by query, best first, with string ids and new ranks.

    With `relevant` (qid, docno), also return these documents at any rank, as `from_qrels` uses them.
    """
    rankings, row = clean_results(results, text_field=text_field)
    kept = within_depth(rankings.query, depth)
    if relevant is not None:
        kept |= rankings.match(relevant, rankings.parent) >= 0
    top = results.iloc[row[kept]].reset_index(drop=True)
    return top.assign(qid=as_ids(top["qid"]), docno=as_ids(top["docno"]), rank=rankings.rank[kept])


# ---- rows by query


class RowsByQuery:
    """A frame with fast lookup of rows by qid (a string)."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame.sort_values("qid", kind="stable", ignore_index=True)
        qids = self.frame["qid"]
        offsets = np.flatnonzero(~qids.duplicated().to_numpy())
        self.rows = dict(zip(qids.iloc[offsets], map(range, offsets, [*offsets[1:], len(qids)]), strict=True))

    def of(self, qids: Iterable[str]) -> pd.DataFrame:
        """Return the rows of some queries."""
        return self.frame.iloc[[*chain.from_iterable(self.rows.get(qid, ()) for qid in qids)]]


def assign_ids(names: Iterable[str], ids: dict[str, int]) -> np.ndarray:
    """Return the ids of names, adding new names to `ids`."""
    return np.array([ids.setdefault(name, len(ids)) for name in names], dtype=np.int64)


def parent_ids(docnos: Iterable[str], ids: dict[str, int]) -> np.ndarray:
    """Return the ids of the documents that passages belong to; other documents keep their own."""
    return assign_ids((re.sub(PASSAGE_SUFFIX, "", name) if "%p" in name else name for name in docnos), ids)


def best_first(query: np.ndarray, key: np.ndarray, ties: np.ndarray | None = None) -> np.ndarray:
    """Return the indices that sort rows by query, descending key, and descending key of ties; then as they are."""
    ties = np.zeros(len(key)) if ties is None else ties
    same = query[1:] == query[:-1]
    falls = (key[1:] < key[:-1]) | ((key[1:] == key[:-1]) & (ties[1:] <= ties[:-1]))
    if (query[1:] >= query[:-1]).all() and (~same | falls).all():
        return np.arange(len(query))  # the usual case, much faster than sorting
    return np.lexsort((-ties, -key, query))


def query_offsets(query: np.ndarray) -> np.ndarray:
    """Return the position of each query's first row; rows are grouped by query."""
    return np.flatnonzero(np.diff(query, prepend=-1))


def rank_in_query(query: np.ndarray) -> np.ndarray:
    """Return each row's position in its query, from 0; rows are grouped by query."""
    offsets = query_offsets(query)
    return np.arange(len(query)) - np.repeat(offsets, np.diff(np.append(offsets, len(query))))


def within_depth(query: np.ndarray, depth: int | None) -> np.ndarray:
    """Return a mask of the rows in the top `depth` of their query; None: all."""
    return np.ones(len(query), dtype=bool) if depth is None else rank_in_query(query) < depth


def _pair_ids(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Encode each pair of query and document as one integer."""
    return (query.astype(np.int64) << 32) | document
