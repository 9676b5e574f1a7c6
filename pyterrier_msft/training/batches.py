"""The order of queries, and the collator."""

import contextlib
import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pyterrier_msft.data.groups import Group, Groups
from pyterrier_msft.model.encoding import PairEncoder, length_batches, pad, shared_out
from pyterrier_msft.training import distributed as processes
from pyterrier_msft.training.hyperparameters import Hyperparameters

FEWEST_TOKENS = 512  # a core, for less of which threads aren't worth their while


AHEAD = 2  # batches made before they are needed


# Batches sorted by length together: longer windows save padding and make batches less random.
SORTED_BATCHES = 16


# ---- batches

# In place of an epoch: for a process that a short batch has no query for. It scores one text that has no label and no
# place in the loss, since all processes must take part in a step.
FILLER = -1


class _Batches:
    """All batches of a training, by number: what the n-th holds depends on the seed and n alone.

    So a resumed run goes on exactly, and the negatives of an epoch are new ones without anyone being told of epochs.
    """

    def __init__(self, groups: Groups, settings: Hyperparameters) -> None:
        self.groups, self.seed, self.batch_size = groups, settings.seed, settings.batch_size
        self.lengths = groups.lengths()
        self.per_epoch = math.ceil(len(groups) / settings.batch_size)
        accumulation = settings.gradient_accumulation
        self.updates = settings.max_steps or max(1, math.ceil(self.per_epoch * settings.epochs / accumulation))
        self.total = self.updates * accumulation
        if settings.max_steps is None:
            self.total = min(self.total, max(1, math.ceil(self.per_epoch * settings.epochs)))

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """This process's share of each batch, as (query's index, epoch)."""
        rank, count = processes.rank(), processes.count()
        for number in range(self.total):
            epoch, place = divmod(number, self.per_epoch)
            if place == 0:
                batches = self._epoch(epoch)
            share = [(index, epoch) for index in batches[place][rank::count]]
            yield share or [(batches[place][0], FILLER)]

    def __getitems__(self, wanted: list[tuple[int, int]]) -> list[Group]:
        """A batch at once, as DataLoader asks for it: where texts are looked up, in one look-up."""
        groups = self.groups.draw_all([(index, max(epoch, 0)) for index, epoch in wanted], seed=self.seed)
        return [
            replace(group, texts=group.texts[:1], labels=group.labels[:0]) if epoch == FILLER else group
            for group, (_, epoch) in zip(groups, wanted, strict=True)
        ]

    def __getitem__(self, index_and_epoch: tuple[int, int]) -> Group:
        return self.__getitems__([index_and_epoch])[0]

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.groups))
        window = self.batch_size * SORTED_BATCHES
        order = np.concatenate(
            [
                part[np.argsort(self.lengths[part], kind="stable")]
                for part in np.split(order, range(window, len(order), window))
            ]
        )
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        # The short batch, if there is one, must not become the first of a window by shuffling alone: any place will do.
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class _Collator:
    """Groups to what one step needs: chunks of padded pairs, and where their scores belong in [G, L].

    Several windows of a document belong to one place.
    """

    encoder: PairEncoder
    max_tokens: int
    max_pairs: int | None
    cores: int = 1  # that shall have chunks of like size

    def __call__(self, groups: list[Group]) -> dict[str, Any]:
        width = max(len(group.texts) for group in groups)
        labels = torch.zeros(len(groups), width)  # (G, L)
        mask = torch.zeros(len(groups), width, dtype=torch.bool)  # (G, L)
        scored = mask.clone()
        for row, group in enumerate(groups):
            labels[row, : len(group.labels)] = torch.from_numpy(group.labels)
            mask[row, : len(group.labels)] = True
            scored[row, : len(group.texts)] = True  # as the mask, but for a filler
        encoded, pair = self.encoder.windows(
            [group.query for group in groups for _ in group.texts], [text for group in groups for text in group.texts]
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        parts = length_batches(lengths, max_tokens=self.max_tokens, max_pairs=self.max_pairs)
        cores = min(self.cores, int(lengths.sum()) // FEWEST_TOKENS)
        if cores > 1 and self.max_pairs is None:
            parts = shared_out(parts, lengths, self.max_tokens, cores)
        places = scored.flatten().nonzero().squeeze(-1)  # (pairs,) where the n-th pair stands in the flattened [G, L]
        places = places[torch.from_numpy(pair)]  # (windows,)
        return {
            "chunks": [pad(self.encoder.tokenizer, encoded, part) for part in parts],
            "places": places[torch.from_numpy(np.concatenate(parts))],
            "labels": labels,
            "mask": mask,
            "qids": [group.qid for group in groups],
        }


class _ReadAhead:
    """An iterator that makes the next items in a thread, while the model is at work."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item, error = self._ready.get()
        if error is not None:
            self._put((None, error))  # once more, should one ask again
            raise error
        return item

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            raise StopIteration
        except BaseException as error:  # whatever it is, it is raised where the item is taken
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False

    def close(self) -> None:
        """End the thread, also before the end of the items."""
        self._stopped.set()
        self._thread.join()
