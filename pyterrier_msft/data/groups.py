"""Groups of documents to train on, and the sampling of their documents in each epoch."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import even_step
from pyterrier_msft.data.rankings import Rankings, query_offsets

DIGEST_SAMPLE = 64  # documents in a digest of a text source
CHUNK_SIZE = 1_000_000  # strings or rows processed at once, to bound temporary copies


@dataclass(frozen=True)
class Group:
    """A query with the documents that an epoch trains on: `texts` and `labels` have the same length."""

    qid: str
    query: str
    texts: list[str]
    labels: np.ndarray  # (documents,) float32, higher is better


@dataclass(frozen=True)
class Sampling:
    """The settings of `sample_documents`; their repr is part of `Groups.digest`."""

    n_positives: int | None  # per group, at most; None: all
    n_negatives: int  # per group, at most


def sample_documents(labels: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> np.ndarray:
    """Sample the positives and negatives of a group, uniformly and without replacement.

    It runs once per query and epoch. docs/development.md has the steps to add a strategy.

    Args:
        labels: (documents,) Labels of a query's documents in the order of the first stage; positives have a label
            above 0. Negatives come from the top `depth` only, so an index below `depth` is the rank (from 0) among the
            documents that can be used.
        sampling: The settings.
        rng: The generator of random numbers, seeded for a query and an epoch.

    Returns:
        Indices of the sampled documents.
    """
    positives, negatives = np.flatnonzero(labels > 0), np.flatnonzero(labels == 0)
    if sampling.n_positives is not None and sampling.n_positives < len(positives):
        positives = rng.choice(positives, sampling.n_positives, replace=False)
    if sampling.n_negatives < len(negatives):
        negatives = rng.choice(negatives, sampling.n_negatives, replace=False)
    return np.concatenate([positives, negatives])


class Ragged(Sequence[np.ndarray]):
    """A sequence of arrays of different lengths, stored in one array, which takes far less memory than a list."""

    def __init__(self, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        self.values = values  # the arrays, concatenated
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # of each array, and of the end

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        position = range(len(self))[index]
        return self.values[self.offsets[position] : self.offsets[position + 1]]


@dataclass(frozen=True)
class Groups:
    """The training data of a stage: each query's documents with labels, from which each epoch draws a group.

    With `sampling`, a group has the documents that `sample_documents` chooses; without it, all of the query's.
    """

    qids: list[str]
    queries: list[str]
    texts: list[str]  # distinct texts; with `load`, docnos
    documents: Ragged  # per query: its documents as int32 indices into texts, best-ranked first
    labels: Ragged  # per query: float32 labels of its documents
    sampling: Sampling | None = None
    load: Callable[[list[str]], list[str]] | None = None  # looks up the texts of docnos

    def __len__(self) -> int:
        return len(self.qids)

    def without(self, qids: Collection[str]) -> Self:
        """Return the groups of all other queries."""
        chosen = [i for i, qid in enumerate(self.qids) if qid not in qids]
        return replace(
            self,
            qids=[self.qids[i] for i in chosen],
            queries=[self.queries[i] for i in chosen],
            documents=_concatenate([self.documents[i] for i in chosen], np.int32),
            labels=_concatenate([self.labels[i] for i in chosen], np.float32),
        )

    def drawn_documents(self) -> int:
        """Return the number of documents that an epoch draws."""
        if self.sampling is None:
            return len(self.labels.values)
        positives = np.add.reduceat(self.labels.values > 0, self.labels.offsets[:-1])
        negatives = np.add.reduceat(self.labels.values == 0, self.labels.offsets[:-1])
        limit = len(self.labels.values) if self.sampling.n_positives is None else self.sampling.n_positives
        return int(np.minimum(positives, limit).sum() + np.minimum(negatives, self.sampling.n_negatives).sum())

    def text(self, documents: Iterable[int]) -> list[str]:
        """Return the texts of documents, given as indices into `texts`."""
        texts = [self.texts[i] for i in documents]
        return texts if self.load is None else self.load(texts)

    def draw_all(self, requests: Sequence[tuple[int, int]], *, seed: int) -> list[Group]:
        """Draw the groups of (index, epoch) pairs; each depends only on its pair and the seed."""
        drawn = [self._draw(index, epoch, seed) for index, epoch in requests]
        texts = iter(self.text(document for documents, _ in drawn for document in documents))
        return [
            Group(self.qids[index], self.queries[index], [next(texts) for _ in documents], labels)
            for (index, _), (documents, labels) in zip(requests, drawn, strict=True)
        ]

    def _draw(self, index: int, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        documents, labels = self.documents[index], self.labels[index]
        if self.sampling is None:
            return documents, labels
        sampled = sample_documents(labels, self.sampling, np.random.default_rng([seed, epoch, index]))
        return documents[sampled], labels[sampled]

    def lengths(self) -> np.ndarray:
        """Return the length in characters of each query plus its longest document, for batches of similar length.

        Texts that have to be looked up aren't counted.
        """
        queries = np.array([len(query) for query in self.queries], dtype=np.int64)
        if self.load is not None or not len(self):
            return queries
        characters = np.array([len(text) for text in self.texts], dtype=np.int64)
        longest: np.ndarray = np.maximum.reduceat(characters[self.documents.values], self.documents.offsets[:-1])
        return queries + longest

    def digest(self) -> str:
        """Digest the content, for cache keys; texts that have to be looked up are sampled."""
        digest = hashlib.sha256(f"{self.sampling} {self.load is None}".encode())
        for strings in (self.qids, self.queries, self.texts):
            for start in range(0, len(strings), CHUNK_SIZE):
                chunk = strings[start : start + CHUNK_SIZE]
                digest.update(np.array([len(chunk), *map(len, chunk)], dtype="<i8").data)
                digest.update("".join(chunk).encode("utf-8", "surrogatepass"))
        if self.load is not None and self.texts:
            sample = self.load(self.texts[:: even_step(len(self.texts), DIGEST_SAMPLE)])
            digest.update("\0".join(sample).encode("utf-8", "surrogatepass"))
        digest.update(self.documents.offsets.astype("<i8", copy=False).data)
        digest.update(self.documents.values.astype("<i4", copy=False).data)
        digest.update(self.labels.values.astype("<f4", copy=False).data)
        return digest.hexdigest()


class GroupsBuilder:
    """Collects labelled documents, ranking by ranking, and builds Groups; fields are as in Groups."""

    def __init__(self) -> None:
        self.qids: list[str] = []
        self.queries: list[str] = []
        self.documents: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.texts: dict[str, int] = {}

    def add(self, rankings: Rankings, keep: np.ndarray, labels: np.ndarray) -> dict[str, int]:
        """Add the rows in the mask `keep`; return the number of groups and documents, as fields of a DataReport.

        Each call adds new queries; the rankings of all calls share one numbering of texts.
        """
        query = rankings.query[keep]
        offsets = query_offsets(query)
        lengths = np.diff(np.append(offsets, len(query)))
        self.qids += [rankings.qids[i] for i in query[offsets]]
        self.queries += [rankings.query_texts[i] for i in query[offsets]]
        self.documents += Ragged(rankings.text[keep].astype(np.int32), lengths)
        self.labels += Ragged(labels[keep].astype(np.float32), lengths)
        self.texts = rankings.texts
        return {"groups": len(offsets), "documents": len(query)}

    def build(self, sampling: Sampling | None = None) -> Groups:
        """Build groups sorted by qid, so that the order of results doesn't change what a seed samples."""
        order = sorted(range(len(self.qids)), key=self.qids.__getitem__)
        documents = _concatenate([self.documents[i] for i in order], np.int32)
        labels = _concatenate([self.labels[i] for i in order], np.float32)
        qids, queries = ([names[i] for i in order] for names in (self.qids, self.queries))
        texts = _renumber(documents.values, [*self.texts])
        return Groups(qids, queries, texts, documents, labels, sampling)


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> Ragged:
    return Ragged(np.concatenate(arrays) if arrays else np.empty(0, dtype), [*map(len, arrays)])


def _renumber(ids: np.ndarray, names: list[str]) -> list[str]:
    """Renumber ids in place by first occurrence; return the names in the order of the new ids."""
    new_ids = np.full(len(names), -1, dtype=np.int32)
    used: list[str] = []
    for start in range(0, len(ids), CHUNK_SIZE):
        chunk = ids[start : start + CHUNK_SIZE]
        unseen = pd.unique(chunk[new_ids[chunk] < 0])
        new_ids[unseen] = np.arange(len(used), len(used) + len(unseen))
        used += [names[i] for i in unseen]
        ids[start : start + CHUNK_SIZE] = new_ids[chunk]
    return used
