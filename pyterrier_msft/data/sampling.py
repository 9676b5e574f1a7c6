"""Which of a query's documents an epoch trains on. All random numbers come from the generator that is passed."""

from dataclasses import dataclass

import numpy as np

from pyterrier_msft.data.ragged import Ragged

NEGATIVE_STRATEGIES = ("uniform", "top", "log")
LIST_STRATEGIES = ("stratified", "top", "random", "top_and_random")


@dataclass(frozen=True)
class NegativeSampling:
    """Samples the positives and negatives of a group, without replacement. docs/development.md: adding a strategy."""

    n_positives: int | None  # per group, at most; None: all
    n_negatives: int  # per group, at most
    skip: int = 0  # ranks of the first stage that no negative comes from
    strategy: str = "uniform"  # for the negatives

    def draw(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the indices of the documents that an epoch trains on.

        Args:
            labels: (documents,) Labels of a query's documents in the order of the first stage; positives have a label
                above 0, and negatives 0.
            rng: The generator of random numbers, seeded for a query and an epoch.
        """
        positives, negatives = np.flatnonzero(labels > 0), np.flatnonzero(labels == 0)
        if self.n_positives is not None and self.n_positives < len(positives):
            positives = rng.choice(positives, self.n_positives, replace=False)
        if self.n_negatives < len(negatives):
            negatives = self._draw_negatives(negatives, rng)
        return np.concatenate([positives, negatives])

    def _draw_negatives(self, negatives: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.strategy == "top":
            return negatives[: self.n_negatives]
        weights = None
        if self.strategy == "log":
            weights = 1 / np.log2(1 + self.skip + np.arange(1, len(negatives) + 1))
            weights /= weights.sum()
        return rng.choice(negatives, self.n_negatives, replace=False, p=weights)

    def total(self, labels: Ragged) -> int:
        """Return the number of documents that an epoch draws for queries with these labels."""
        positives, negatives = labels.count(labels.values > 0), labels.count(labels.values == 0)
        limit = len(labels.values) if self.n_positives is None else self.n_positives
        return int(np.minimum(positives, limit).sum() + np.minimum(negatives, self.n_negatives).sum())


@dataclass(frozen=True)
class ListSampling:
    """Samples the documents of a list that a teacher ranked, without replacement."""

    n_documents: int  # per group, at most
    strategy: str

    def draw(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the indices of the documents that an epoch trains on, in ascending order.

        Args:
            labels: (documents,) Labels of a query's documents, higher is better. The order of tied documents is kept.
            rng: The generator of random numbers, seeded for a query and an epoch.
        """
        n, size = self.n_documents, len(labels)
        if n >= size:
            return np.arange(size)
        by_rank = np.argsort(-labels, kind="stable")  # the teacher's order
        if self.strategy == "stratified":
            bounds = np.arange(n + 1) * size // n
            return np.sort(by_rank[rng.integers(bounds[:-1], bounds[1:])])
        n_top = {"top": n, "random": 0, "top_and_random": (n + 1) // 2}[self.strategy]
        return np.sort(np.append(by_rank[:n_top], rng.choice(by_rank[n_top:], n - n_top, replace=False)))

    def total(self, labels: Ragged) -> int:
        """Return the number of documents that an epoch draws for queries with these labels."""
        return int(np.minimum(labels.lengths, self.n_documents).sum())


@dataclass(frozen=True)
class RandomNegatives:
    """Further negatives of each group, sampled uniformly from the documents of all other groups."""

    n: int  # per group, at most
    avoided: Ragged  # per query: documents outside its group that aren't sampled for it

    def draw(self, index: int, own: np.ndarray, n_documents: int, rng: np.random.Generator) -> np.ndarray:
        """Return documents, as integers below `n_documents`, for the query at an index.

        Args:
            index: The query's index.
            own: The documents of its group, which aren't drawn.
            n_documents: Number of documents of all groups.
            rng: The generator of random numbers, seeded for a query and an epoch.
        """
        excluded = self._excluded(index, own)
        n_allowed = n_documents - len(excluded)
        nth = rng.choice(n_allowed, min(self.n, n_allowed), replace=False)
        # Add the number of excluded documents that are smaller than the nth allowed one.
        return nth + np.searchsorted(excluded - np.arange(len(excluded)), nth, side="right")

    def total(self, documents: Ragged, n_documents: int) -> int:
        """Return the number of documents that an epoch draws for groups with these documents."""
        left = n_documents - documents.lengths - self.avoided.lengths  # at least
        total = int(np.minimum(left, self.n)[left >= self.n].sum())
        scarce = [len(self._excluded(int(i), documents[i])) for i in np.flatnonzero(left < self.n)]
        return total + sum(min(self.n, n_documents - n_excluded) for n_excluded in scarce)

    def _excluded(self, index: int, own: np.ndarray) -> np.ndarray:
        return np.union1d(own, self.avoided[index])
