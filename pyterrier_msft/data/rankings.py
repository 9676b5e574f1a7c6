"""Result frames to clean rankings, with numbers in place of strings."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import PASSAGE, as_ids, as_texts, order_key, require_columns, without_text

# ---- results as numbers


@dataclass(frozen=True)
class Rankings:
    """Results made clean, with numbers in place of strings: one row a (qid, docno) that has a text.

    A query's rows stand together, its best first. A frame of results becomes this, and so does each piece of a file.
    """

    qids: list[str]
    queries: list[str]  # for each qid
    docnos: dict[str, int]  # the numbers of docnos, and of the documents that passages are of
    texts: dict[str, int]  # the numbers of texts; of a file's pieces, those of the docnos
    query: np.ndarray  # (rows,) indices into qids
    document: np.ndarray  # (rows,) the docno's number
    judged: np.ndarray  # (rows,) the number of the docno that qrels know: a passage is judged as its document
    text: np.ndarray  # (rows,) the text's number
    key: np.ndarray  # (rows,) float64, higher is better
    ordered_by: str | None  # the results' column that `key` is from; None: it is the order of the results
    counts: dict[str, int]  # of a DataReport

    @property
    def order(self) -> np.ndarray:
        """(rows,) each row's place in its query, from 0 for the best."""
        return places(self.query)

    def frame(self, kept: np.ndarray | slice = slice(None)) -> pd.DataFrame:
        """The qid and docno of rows."""
        docnos = [*self.docnos]
        return pd.DataFrame(
            {
                "qid": [self.qids[i] for i in self.query[kept]],
                "docno": [docnos[i] for i in self.document[kept]],
            }
        )

    def scores(self) -> pd.DataFrame:
        """Queries' numbers as qid, and the score if the results had one: what `bare_ranks` looks at."""
        return pd.DataFrame({"qid": self.query, **({"score": self.key} if self.ordered_by == "score" else {})})

    def find(self, frame: pd.DataFrame, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a frame of distinct (qid, docno) has what the rows have, whose documents are `document` or `judged`.

        Returns:
            (rows,) the place in the frame, -1 for none, and (places,) whether it is that of a row.
        """
        numbers = {qid: number for number, qid in enumerate(self.qids)}
        query = np.array([numbers.get(qid, -1) for qid in frame["qid"]], dtype=np.int64)
        document = np.array([self.docnos.get(docno, -1) for docno in frame["docno"]], dtype=np.int64)
        known = np.flatnonzero((query >= 0) & (document >= 0))
        place = pd.Index(_pairs(query[known], document[known])).get_indexer(pd.Index(_pairs(self.query, documents)))
        place = np.append(known, -1)[place]
        taken = np.zeros(len(frame), dtype=bool)
        taken[place[place >= 0]] = True
        return place, taken


def clean_results(results: pd.DataFrame, *, text_field: str) -> tuple[Rankings, np.ndarray]:
    """A frame's rankings, without duplicates (of which the best is kept) and without empty texts.

    Returns:
        The rankings, and for each of their rows its place in the results.

    Raises:
        ValueError: If a column is missing, an id is missing, a score is not a number, or a text is something else.
    """
    require_columns(results, ["qid", "query", "docno", text_field], "training results")
    query, qids = pd.factorize(as_ids(results["qid"]))
    document, distinct = pd.factorize(as_ids(results["docno"]))
    docnos = {docno: place for place, docno in enumerate(distinct)}
    parents = parent_numbers([*docnos], docnos)
    no_query, no_text = (without_text(results[column]) for column in ("query", text_field))
    key = order_key(results)
    ordered_by = None if key is None else "score" if "score" in results.columns else "rank"
    if key is None:
        key = -np.arange(len(results), dtype=np.float64)
    row = best_first(query, key)
    unique = row[~pd.Series(_pairs(query[row], document[row])).duplicated().to_numpy()]
    kept = unique[~(no_query | no_text)[unique]]
    text, texts = pd.factorize(as_texts(results[text_field]).iloc[kept])
    queries = as_texts(results["query"]).to_numpy(dtype=object)
    asked = unique[~no_query[unique]]
    asked = asked[starts(query[asked])]
    best = np.full(len(qids), "", dtype=object)
    best[query[asked]] = queries[asked]
    rankings = Rankings(
        qids=list(qids),
        queries=list(best),
        docnos=docnos,
        texts={text: place for place, text in enumerate(texts)},
        query=query[kept],
        document=document[kept],
        judged=parents[document[kept]],
        text=text,
        key=key[kept],
        ordered_by=ordered_by,
        counts={
            "queries": len(qids),
            "duplicates": len(row) - len(unique),
            "without_query": int(no_query[unique].sum()),
            "without_text": int((no_text & ~no_query)[unique].sum()),
            "several_queries": len(np.unique(query[kept][queries[kept] != best[query[kept]]])),
        },
    )
    return rankings, kept


def parent_numbers(names: Iterable[str], docnos: dict[str, int]) -> np.ndarray:
    """The numbers of the documents that docnos are of, if they are passages."""
    return number((re.sub(PASSAGE, "", name) if "%p" in name else name for name in names), docnos)


def best_first(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The rows in order: a query's together, its best first, equals as they came."""
    same = query[1:] == query[:-1]
    if (query[1:] >= query[:-1]).all() and (~same | (key[1:] <= key[:-1])).all():
        return np.arange(len(query))  # as rankings mostly are, and sorting is slow
    return np.lexsort((-key, query))


def starts(query: np.ndarray) -> np.ndarray:
    """Where each query's rows begin, which stand together."""
    return np.flatnonzero(np.diff(query, prepend=-1))


def places(query: np.ndarray) -> np.ndarray:
    """(rows,) each row's place, from 0, among its query's, which stand together."""
    return np.arange(len(query)) - _spread(starts(query), query)


def _spread(values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(rows,) of one value a query."""
    return np.repeat(values, np.diff(np.append(starts(query), len(query))))


def _pairs(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    """A number for each (query, document)."""
    return (query.astype(np.int64) << 32) | document


def number(names: Iterable[str], numbers: dict[str, int]) -> np.ndarray:
    """Names' numbers; a new name gets the next."""
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


class ByQuery:
    """A frame's rows, found by their qids (strings) without a look at all of them."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame.sort_values("qid", kind="stable", ignore_index=True)
        qids = self.frame["qid"]
        begins = np.flatnonzero(~qids.duplicated().to_numpy())
        self.rows = dict(zip(qids.iloc[begins], map(range, begins, [*begins[1:], len(qids)]), strict=True))

    def of(self, qids: Iterable[str]) -> pd.DataFrame:
        """The rows of some queries."""
        return self.frame.iloc[[*chain.from_iterable(self.rows.get(qid, ()) for qid in qids)]]


def top_documents(results: pd.DataFrame, *, depth: int | None, text_field: str = "text") -> pd.DataFrame:
    """The documents that `from_teacher` takes of the results, for a teacher to rank.

    Returns:
        The results' columns, ids as strings and rank (from 0) set anew, a query's rows together and its best first.
    """
    rankings, row = clean_results(results, text_field=text_field)
    order = rankings.order
    if depth is not None:
        row, order = row[order < depth], order[order < depth]
    top = results.iloc[row].reset_index(drop=True)
    return top.assign(qid=as_ids(top["qid"]), docno=as_ids(top["docno"]), rank=order)


def _pieces(results: pd.DataFrame | Iterable[Rankings], text_field: str) -> Iterable[Rankings]:
    if isinstance(results, pd.DataFrame):
        return [clean_results(results, text_field=text_field)[0]]
    return results
