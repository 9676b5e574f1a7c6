"""Lists of documents with labels, and the groups that an epoch draws from them."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.rankings import Rankings, starts
from pyterrier_msft.data.report import DataReport

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


def _choose(rng: np.random.Generator, items: np.ndarray, n: int | None) -> np.ndarray:
    return items if n is None or n >= len(items) else rng.choice(items, n, replace=False)


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
