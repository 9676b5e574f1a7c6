"""Sources of training data in one stage: their groups, and how often an epoch draws from each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.checks import check_number
from pyterrier_msft.data.groups import Group, Groups

TrainingResults = pd.DataFrame | str | Path | Sequence[Any]  # a sequence of sources, see Stage

MAX_SEED = 2**32  # of a fitter


@dataclass(frozen=True)
class Source:
    """A source of training data, see `Stage`."""

    results: pd.DataFrame | str | Path
    qrels: pd.DataFrame | None = None
    weight: float = 1


def as_sources(results: Any, qrels: pd.DataFrame | None) -> list[Source]:
    """Return the sources of training data: those of a list, or the results and qrels as a single one.

    Raises:
        ValueError: If an item of the list isn't a source, or a weight isn't positive.
    """
    if not isinstance(results, list | tuple):
        return [Source(results, qrels)]
    if qrels is not None:
        raise ValueError("qrels must be None where results are a list; write [(results, qrels), (results, qrels)]")
    if not results:
        raise ValueError("training results must have at least one source; got an empty list")
    return [_as_source(item, number) for number, item in enumerate(results, 1)]


def _as_source(item: Any, number: int) -> Source:
    parts = item if isinstance(item, tuple) else (item,)
    if not 1 <= len(parts) <= 3:
        wanted = "(results, qrels) or (results, qrels, weight)"
        raise ValueError(f"source {number} must be {wanted}; got a tuple of {len(parts)}")
    source = Source(*parts)
    check_number(f"source {number}: weight", source.weight, required=True)
    return source


@dataclass(frozen=True)
class MixedGroups:
    """The groups of weighted sources, which stay separate; has the methods of `Groups` that training needs.

    An epoch draws each query of a source with the weight 1 once. A source of n queries with the weight w gives
    round(w * n) groups, at least one: each query floor(w) times, each time with newly sampled documents, and the rest
    from a random order of its queries, which the next epoch continues. So over the epochs, its queries are drawn
    equally often.
    """

    sources: tuple[Groups, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @cached_property
    def _offsets(self) -> np.ndarray:
        """The index of each source's first query, and of the end."""
        return np.cumsum([0, *map(len, self.sources)])

    @property
    def qids(self) -> list[str]:
        """The qid of each query; sources may share qids."""
        return [qid for source in self.sources for qid in source.qids]

    @property
    def queries(self) -> list[str]:
        """The text of each query."""
        return [query for source in self.sources for query in source.queries]

    @property
    def load(self) -> Any:
        """The function that looks up the texts of a source; None if all sources have theirs in memory."""
        return next((source.load for source in self.sources if source.load is not None), None)

    def _draws(self) -> list[int]:
        """Return the number of groups that an epoch draws from each source."""
        pairs = zip(self.sources, self.weights, strict=True)
        return [max(1, round(weight * len(source))) for source, weight in pairs]

    def groups_per_epoch(self) -> int:
        """Return the number of groups that an epoch draws."""
        return sum(self._draws())

    def drawn_documents(self) -> int:
        """Return the number of documents that an epoch draws, on average."""
        counts = zip(self.sources, self._draws(), strict=True)
        return round(sum(source.drawn_documents() * draws / len(source) for source, draws in counts))

    def epoch(self, number: int, *, seed: int) -> np.ndarray:
        """Return what an epoch draws: rows of a query's index, and a number that its sampled documents depend on."""
        parts = []
        for place, (source, draws) in enumerate(zip(self.sources, self._draws(), strict=True)):
            rounds, rest = divmod(draws, len(source))
            order = np.random.default_rng([seed, place, 0, 1]).permutation(len(source))
            chosen = [np.arange(len(source))] * rounds
            if rest:
                chosen.append(np.sort(order[(number * rest + np.arange(rest)) % len(source)]))
            first_draw = number * len(chosen)
            parts += [
                np.stack([self._offsets[place] + indices, np.full(len(indices), first_draw + i)], axis=1)
                for i, indices in enumerate(chosen)
            ]
        return np.concatenate(parts)

    def draw_all(self, requests: Sequence[tuple[int, int]], *, seed: int) -> list[Group]:
        """Draw the groups of pairs from `epoch`; each depends only on its pair and the seed."""
        place = np.searchsorted(self._offsets, [index for index, _ in requests], side="right") - 1
        drawn: dict[int, Group] = {}
        for i in np.unique(place).tolist():
            own = np.flatnonzero(place == i).tolist()
            pairs = [(int(requests[k][0] - self._offsets[i]), requests[k][1]) for k in own]
            # Sources with the same queries need other random numbers.
            drawn |= zip(own, self.sources[i].draw_all(pairs, seed=seed + MAX_SEED * i), strict=True)
        return [drawn[k] for k in range(len(requests))]

    def lengths(self) -> np.ndarray:
        """Return the length of each query as `Groups.lengths`, without documents if any texts have to be looked up."""
        if self.load is None:
            return np.concatenate([source.lengths() for source in self.sources])
        return np.array([len(query) for source in self.sources for query in source.queries], dtype=np.int64)

    def digest(self) -> str:
        """Digest the content of all sources, and their weights."""
        content = [(source.digest(), float(weight)) for source, weight in zip(self.sources, self.weights, strict=True)]
        return hashlib.sha256(repr(content).encode()).hexdigest()
