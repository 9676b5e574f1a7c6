"""Result frames with qrels, or with a teacher's ranking, to groups that a listwise loss learns from.

A group is a query with some of its documents and a label for each, higher being better. Ranks become labels here
and nowhere else.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

PASSAGE = r"%p\d+$"  # what pt.text.sliding appends to a docno
SAMPLED = 64  # documents whose texts tell one source of texts from another
AT_ONCE = 1_000_000  # strings or rows that are worked on together, where all would need copies of all


@dataclass(frozen=True)
class Group:
    """One query's documents as they go into a batch: `texts` and `labels` have the same length."""

    qid: str
    query: str
    texts: list[str]
    labels: np.ndarray  # (documents,) float32, higher is better


class Ragged(Sequence[np.ndarray]):
    """Arrays of different lengths, kept in one: half a million lists would be as many objects."""

    def __init__(self, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        self.values = values  # all, one after another
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # of each array, and the end

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        return self.values[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class Groups:
    """All that a stage trains on, a list a query, from which each epoch draws its groups.

    Without `n_negatives` a draw takes the whole list. With it, a draw takes `n_positives` of the documents with a
    label above 0 (None: all) and `n_negatives` of the others (fewer where there are fewer), anew each epoch.
    """

    qids: list[str]
    queries: list[str]
    texts: list[str]  # each distinct text once, in the order of the lists
    documents: Ragged  # for each query, int32 indices into texts, the best-ranked first
    labels: Ragged  # for each query, float32 labels of its documents
    n_negatives: int | None = None
    n_positives: int | None = 1
    load: Callable[[list[str]], list[str]] | None = None  # then `texts` are docnos, whose texts this looks up

    def __len__(self) -> int:
        return len(self.qids)

    def text(self, documents: Iterable[int]) -> list[str]:
        """The texts of documents given as indices."""
        found = [self.texts[i] for i in documents]
        return found if self.load is None else self.load(found)

    def draw(self, index: int, *, seed: int, epoch: int) -> Group:
        """The group of one query in one epoch: the same for the same arguments, whatever was drawn before."""
        return self.draw_all([(index, epoch)], seed=seed)[0]

    def draw_all(self, wanted: Sequence[tuple[int, int]], *, seed: int) -> list[Group]:
        """As `draw`, for each (index, epoch), with one look-up of texts for all."""
        drawn = [self._draw(index, seed=seed, epoch=epoch) for index, epoch in wanted]
        texts = iter(self.text(document for documents, _ in drawn for document in documents))
        return [
            Group(self.qids[index], self.queries[index], [next(texts) for _ in documents], labels)
            for (index, _), (documents, labels) in zip(wanted, drawn, strict=True)
        ]

    def _draw(self, index: int, *, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        documents, labels = self.documents[index], self.labels[index]
        if self.n_negatives is None:
            return documents, labels
        rng = np.random.default_rng([seed, epoch, index])
        relevant = labels > 0
        chosen = np.concatenate(
            [
                _choose(rng, np.flatnonzero(relevant), self.n_positives),
                _choose(rng, np.flatnonzero(~relevant), self.n_negatives),
            ]
        )
        return documents[chosen], labels[chosen]

    def lengths(self) -> np.ndarray:
        """Characters of each query's longest document with the query: what batches of like length are made by.

        Of the query alone where texts are looked up only when they are needed.
        """
        queries = np.array([len(query) for query in self.queries], dtype=np.int64)
        if self.load is not None or not len(self):
            return queries
        characters = np.array([len(text) for text in self.texts], dtype=np.int64)
        longest: np.ndarray = np.maximum.reduceat(characters[self.documents.values], self.documents.starts[:-1])
        return queries + longest

    def digest(self) -> str:
        """A digest of the content, for cache keys: whatever the labels come from, they are told here.

        Of texts that are looked up when they are needed, some are looked up for it.
        """
        digest = hashlib.sha256(f"{self.n_negatives} {self.n_positives} {self.load is None}".encode())
        for strings in (self.qids, self.queries, self.texts):
            for start in range(0, len(strings), AT_ONCE):
                part = strings[start : start + AT_ONCE]
                digest.update(np.array([len(part), *map(len, part)], dtype="<i8").data)
                digest.update("".join(part).encode("utf-8", "surrogatepass"))
        if self.load is not None and self.texts:
            some = self.load(self.texts[:: -(-len(self.texts) // SAMPLED)])
            digest.update("\0".join(some).encode("utf-8", "surrogatepass"))
        digest.update(self.documents.starts.astype("<i8", copy=False).data)
        digest.update(self.documents.values.astype("<i4", copy=False).data)
        digest.update(self.labels.values.astype("<f4", copy=False).data)
        return digest.hexdigest()


def ranked(results: pd.DataFrame, scores: np.ndarray) -> pd.DataFrame:
    """Results with these scores and the ranks that they make."""
    # Under a plain index: after `|` the frame's is not unique, and it may have a level called qid.
    found = pt.model.add_ranks(results.reset_index(drop=True).assign(score=scores))
    return found.set_axis(results.index[found.index])


def _choose(rng: np.random.Generator, items: np.ndarray, n: int | None) -> np.ndarray:
    return items if n is None or n >= len(items) else rng.choice(items, n, replace=False)


@dataclass(frozen=True)
class DataReport:
    """What a stage found in its training data, counted before training. Shares are between 0 and 1."""

    queries: int = 0
    groups: int = 0
    documents: int = 0  # query-document pairs that groups are drawn from
    duplicates: int = 0  # pairs given more than once
    without_text: int = 0  # pairs
    without_query: int = 0  # pairs whose query has no text
    without_relevant: int = 0  # queries
    unjudged: int = 0  # queries without a relevant document that the qrels don't have at all
    without_negatives: int = 0  # queries
    without_teacher: int = 0  # queries
    unranked_by_teacher: int = 0  # pairs, left out
    ranked_last: int = 0  # pairs that the teacher did not rank, placed below all others
    judged_twice: int = 0  # pairs with two labels in the qrels, of which the higher counts
    several_queries: int = 0  # qids with several texts, of which the best-ranked document's counts
    tied_labels: float = 0.0  # of the pairs of documents in a list, by a teacher
    agreement: float | None = None  # mean rank correlation of the teacher with the first stage, -1 to 1
    truncated_queries: float = 0.0
    truncated_documents: float = 0.0

    def __repr__(self) -> str:
        lines = [f"{self.groups:,} of {self.queries:,} queries to learn from, with {self.documents:,} documents"]
        unjudged = f" ({self.unjudged:,} of them not in the qrels)" if self.unjudged else ""
        counts = {
            f"queries without a relevant document{unjudged}": self.without_relevant,
            "queries without a document that is not relevant": self.without_negatives,
            "queries without the teacher's ranking": self.without_teacher,
            "documents that the teacher did not rank": self.unranked_by_teacher,
            "documents without text": self.without_text,
            "documents whose query has no text": self.without_query,
            "documents given twice for a query": self.duplicates,
        }
        lines += [f"{count:,} {what}: left out" for what, count in counts.items() if count]
        taken = {
            "documents that the teacher did not rank: placed below all others": self.ranked_last,
            "documents with two labels in the qrels: the higher counts": self.judged_twice,
            "qids with several queries: that of the best-ranked document counts": self.several_queries,
        }
        lines += [f"{count:,} {what}" for what, count in taken.items() if count]
        shares = {
            "of the teacher's pairs of documents are tied": self.tied_labels,
            "of the queries are cut to fit (max_query_length)": self.truncated_queries,
            "of the documents are cut to fit (max_length)": self.truncated_documents,
        }
        lines += [f"{share:.1%} {what}" for what, share in shares.items() if share]
        if self.agreement is not None:
            lines.append(f"teacher and first stage agree by a rank correlation of {self.agreement:.2f}")
        return "\n  ".join(["DataReport:", *lines])

    @classmethod
    def total(cls, reports: Sequence["DataReport"]) -> "DataReport":
        """The report on pieces of data: counts added up, shares averaged over the groups."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            found = [(getattr(report, f.name), report.groups) for report in reports]
            known = [(value, weight) for value, weight in found if value is not None]
            if f.type is int:
                values[f.name] = sum(value for value, _ in known)
            elif total := sum(weight for _, weight in known):
                values[f.name] = sum(value * weight for value, weight in known) / total
        return cls(**values)

    def dropped(self) -> str:
        """What was left out, in words, for a warning; empty if nothing was."""
        return "; ".join(self._lines(": left out"))

    def contradictions(self) -> str:
        """Where the data say two things, and which was taken, in words, for a warning; empty if nowhere."""
        return "; ".join(f"{line} counts" for line in self._lines(" counts"))

    def _lines(self, end: str) -> list[str]:
        return [line.strip().removesuffix(end) for line in repr(self).split("\n") if line.endswith(end)]

    def upside_down(self) -> bool:
        """Whether the teacher seems to rank the worst first: it contradicts the first stage on the whole."""
        return self.agreement is not None and self.agreement < -0.2


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


# ---- lists


@dataclass(frozen=True)
class _Lists:
    """A part of the groups to be: what one of the results' pieces gives."""

    qids: list[str]
    queries: list[str]
    texts: dict[str, int]
    documents: Ragged
    labels: Ragged

    @classmethod
    def of(cls, rankings: Rankings, kept: np.ndarray, label: np.ndarray) -> "_Lists":
        """Of the rows that are kept, with (rows,) labels."""
        query = rankings.query[kept]
        begins = starts(query)
        lengths = np.diff(np.append(begins, len(query)))
        return cls(
            [rankings.qids[i] for i in query[begins]],
            [rankings.queries[i] for i in query[begins]],
            rankings.texts,
            Ragged(rankings.text[kept].astype(np.int32), lengths),
            Ragged(label[kept].astype(np.float32), lengths),
        )


def _joined(
    parts: Iterable[tuple[_Lists, DataReport]], *, n_negatives: int | None, n_positives: int | None
) -> tuple[Groups, DataReport]:
    """Lists as groups, sorted by qid, so that the order of the results doesn't decide what a seed draws."""
    made, reports = [], []
    for lists, report in parts:
        made.append(lists)
        reports.append(report)
    qids = [qid for lists in made for qid in lists.qids]
    queries = [query for lists in made for query in lists.queries]
    order = sorted(range(len(qids)), key=qids.__getitem__)
    documents = _in_order([lists.documents for lists in made], order, np.int32)
    labels = _in_order([lists.labels for lists in made], order, np.float32)
    texts = _renumber(documents.values, [*made[0].texts] if made else [])
    groups = Groups(
        [qids[i] for i in order], [queries[i] for i in order], texts, documents, labels, n_negatives, n_positives
    )
    return groups, DataReport.total(reports)


def _in_order(parts: list[Ragged], order: list[int], dtype: Any) -> Ragged:
    arrays = [array for part in parts for array in part]
    values = np.concatenate([arrays[i] for i in order]) if order else np.empty(0, dtype)
    return Ragged(values, [len(arrays[i]) for i in order])


def _renumber(numbers: np.ndarray, names: list[str]) -> list[str]:
    """Change the numbers in place to the order in which they come; the names by these."""
    new = np.full(len(names), -1, dtype=np.int32)
    found: list[str] = []
    for start in range(0, len(numbers), AT_ONCE):
        part = numbers[start : start + AT_ONCE]
        unseen = pd.unique(part[new[part] < 0])
        new[unseen] = np.arange(len(found), len(found) + len(unseen))
        found += [names[i] for i in unseen]
        numbers[start : start + AT_ONCE] = new[part]
    return found


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
