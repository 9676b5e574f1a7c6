"""Groups of documents to train on, from which each epoch draws."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import even_step
from pyterrier_msft.data.ragged import Ragged
from pyterrier_msft.data.rankings import Rankings, query_offsets
from pyterrier_msft.data.sampling import ListSampling, NegativeSampling, RandomNegatives

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
class Groups:
    """The training data of a stage: each query's documents with labels, from which each epoch draws a group.

    With `sampling`, a group has the documents that it draws; without it, all of the query's.
    """

    qids: list[str]
    queries: list[str]
    texts: list[str]  # distinct texts; with `load`, docnos
    documents: Ragged  # per query: its documents as int32 indices into texts, best-ranked first
    labels: Ragged  # per query: float32 labels of its documents
    sampling: NegativeSampling | ListSampling | None = None
    load: Callable[[list[str]], list[str]] | None = None  # looks up the texts of docnos
    random: RandomNegatives | None = None

    def __len__(self) -> int:
        return len(self.qids)

    def without(self, qids: Collection[str]) -> Self:
        """Return the groups of all other queries."""
        chosen = [i for i, qid in enumerate(self.qids) if qid not in qids]
        return replace(
            self,
            qids=[self.qids[i] for i in chosen],
            queries=[self.queries[i] for i in chosen],
            documents=self.documents.take(chosen),
            labels=self.labels.take(chosen),
            random=self.random and replace(self.random, avoided=self.random.avoided.take(chosen)),
        )

    def groups_per_epoch(self) -> int:
        """Return the number of groups that an epoch draws."""
        return len(self)

    def epoch(self, number: int, *, seed: int) -> np.ndarray:
        """Return what an epoch draws: rows of a query's index and the epoch's number."""
        return np.stack([np.arange(len(self)), np.full(len(self), number)], axis=1)

    def drawn_documents(self) -> int:
        """Return the number of documents that an epoch draws."""
        drawn = len(self.labels.values) if self.sampling is None else self.sampling.total(self.labels)
        return drawn + (0 if self.random is None else self.random.total(self.documents, len(self.texts)))

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
        own, labels = self.documents[index], self.labels[index]
        if self.sampling is None:
            return own, labels
        rng = np.random.default_rng([seed, epoch, index])
        sampled = self.sampling.draw(labels, rng)
        documents, labels = own[sampled], labels[sampled]
        if self.random is not None:
            others = self.random.draw(index, own, len(self.texts), rng)
            documents, labels = np.append(documents, others), np.append(labels, np.zeros(len(others), np.float32))
        return documents, labels

    def lengths(self) -> np.ndarray:
        """Return the length in characters of each query plus its longest document, for batches of similar length.

        Texts that have to be looked up aren't counted, nor are random negatives.
        """
        queries = np.array([len(query) for query in self.queries], dtype=np.int64)
        if self.load is not None or not len(self):
            return queries
        characters = np.array([len(text) for text in self.texts], dtype=np.int64)
        longest: np.ndarray = np.maximum.reduceat(characters[self.documents.values], self.documents.offsets[:-1])
        return queries + longest

    def digest(self) -> str:
        """Digest the content, for cache keys; texts that have to be looked up are sampled."""
        n_random = 0 if self.random is None else self.random.n
        digest = hashlib.sha256(f"{self.sampling} {n_random} {self.load is None}".encode())
        for strings in (self.qids, self.queries, self.texts):
            for start in range(0, len(strings), CHUNK_SIZE):
                chunk = strings[start : start + CHUNK_SIZE]
                digest.update(np.array([len(chunk), *map(len, chunk)], dtype="<i8").data)
                digest.update("".join(chunk).encode("utf-8", "surrogatepass"))
        if self.load is not None and self.texts:
            sample = self.load(self.texts[:: even_step(len(self.texts), DIGEST_SAMPLE)])
            digest.update("\0".join(sample).encode("utf-8", "surrogatepass"))
        for documents in [self.documents] if self.random is None else [self.documents, self.random.avoided]:
            digest.update(documents.offsets.astype("<i8", copy=False).data)
            digest.update(documents.values.astype("<i4", copy=False).data)
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

    def add(self, rankings: Rankings, keep: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
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

    def build(
        self,
        sampling: NegativeSampling | ListSampling | None = None,
        *,
        n_random: int = 0,
        avoided: pd.DataFrame | None = None,
    ) -> Groups:
        """Build groups sorted by qid, so that the order of results doesn't change what a seed samples.

        `n_random` further negatives per group are drawn from all groups, except `avoided`: pairs of qid and text id.
        """
        order = sorted(range(len(self.qids)), key=self.qids.__getitem__)
        documents = Ragged.concatenate([self.documents[i] for i in order], np.int32)
        labels = Ragged.concatenate([self.labels[i] for i in order], np.float32)
        qids, queries = ([names[i] for i in order] for names in (self.qids, self.queries))
        new_ids, texts = _renumber(documents.values, [*self.texts])
        random = None if avoided is None else RandomNegatives(n_random, _by_query(avoided, qids, new_ids))
        return Groups(qids, queries, texts, documents, labels, sampling, random=random)


def _by_query(pairs: pd.DataFrame, qids: list[str], new_ids: np.ndarray) -> Ragged:
    """Return the new text ids of pairs of qid and text id by query, without texts that have none."""
    index = pairs["qid"].map({qid: i for i, qid in enumerate(qids)})
    ids = new_ids[pairs["text"].to_numpy(np.int64)]
    known = index.notna().to_numpy() & (ids >= 0)
    distinct = np.unique(np.stack([index[known].to_numpy(np.int64), ids[known]]), axis=1)
    return Ragged(distinct[1].astype(np.int32), np.bincount(distinct[0], minlength=len(qids)))


def _renumber(ids: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Renumber ids in place by first occurrence; return the new id of each, -1 for unused ones, and their names."""
    new_ids = np.full(len(names), -1, dtype=np.int32)
    used: list[str] = []
    for start in range(0, len(ids), CHUNK_SIZE):
        chunk = ids[start : start + CHUNK_SIZE]
        unseen = pd.unique(chunk[new_ids[chunk] < 0])
        new_ids[unseen] = np.arange(len(used), len(used) + len(unseen))
        used += [names[i] for i in unseen]
        ids[start : start + CHUNK_SIZE] = new_ids[chunk]
    return new_ids, used
