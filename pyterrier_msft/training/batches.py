"""The order of queries in a training run, and batches of groups as tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pyterrier_msft.data.groups import Group, Groups
from pyterrier_msft.data.mixture import MixedGroups
from pyterrier_msft.model.batching import balance_batches, length_batches
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.training import distributed
from pyterrier_msft.training.plan import Plan

# Tokens per forward pass; fewer passes are faster on a GPU, smaller ones fit a CPU's caches.
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 65536}
MIN_TOKENS_PER_THREAD = 512  # with fewer, a thread costs more than it saves
# Queries of similar length share a batch: of at most so many batches, and of an eighth of an epoch. More would reduce
# padding, but make batches less random.
MAX_SORTED_BATCHES = 16
# Stands in for the epoch where a rank has no query in a batch: it scores one text, which isn't part of the loss.
PADDING_GROUP = -1

GroupIndex = tuple[int, int]  # a query's index, and the epoch or another number of a draw (or PADDING_GROUP)


class BatchSchedule(Sampler[list[GroupIndex]]):
    """All batches of a training run. The content of the n-th batch depends only on the seed and n.

    So a resumed run continues exactly, and negatives are resampled every epoch; no `set_epoch` needed.
    """

    def __init__(self, groups: Groups | MixedGroups, plan: Plan, *, seed: int) -> None:
        self.groups, self.plan, self.seed = groups, plan, seed
        self.lengths = groups.lengths()  # (queries,) characters

    def __len__(self) -> int:
        return self.plan.updates

    def __iter__(self) -> Iterator[list[GroupIndex]]:
        """Iterate over this rank's share of each batch."""
        rank, world_size = distributed.rank(), distributed.world_size()
        for number in range(self.plan.updates):
            epoch, place = divmod(number, self.plan.updates_per_epoch)
            if place == 0:
                batches = self._epoch_batches(epoch)
            batch = batches[place]
            own = [(int(query), int(draw)) for query, draw in batch[rank::world_size]]
            yield own or [(int(batch[0, 0]), PADDING_GROUP)]

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        draws = self.groups.epoch(epoch, seed=self.seed)
        lengths = self.lengths[draws[:, 0]]
        order = rng.permutation(len(draws))
        batch_size = self.plan.batch_size
        window = batch_size * max(1, min(MAX_SORTED_BATCHES, self.plan.updates_per_epoch // 8))
        windows = np.split(order, range(window, len(order), window))
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in windows])
        batches = np.split(draws[order], range(batch_size, len(order), batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]


class StepSchedule(Sampler[list[list[GroupIndex]]]):
    """All steps of a training run: in each, a batch for each objective."""

    def __init__(self, schedules: Sequence[BatchSchedule]) -> None:
        self.schedules = schedules

    def __len__(self) -> int:
        return len(self.schedules[0])

    def __iter__(self) -> Iterator[list[list[GroupIndex]]]:
        """Iterate over this rank's share of each step."""
        return map(list, zip(*self.schedules, strict=True))


@dataclass(frozen=True)
class GroupDataset(Dataset[Group]):
    """The groups of a schedule's batches, drawn on access."""

    groups: Groups | MixedGroups
    seed: int

    def __getitems__(self, indices: list[GroupIndex]) -> list[Group]:
        """Draw a batch of groups at once, so that their texts are looked up together."""
        groups = self.groups.draw_all([(query, max(epoch, 0)) for query, epoch in indices], seed=self.seed)
        return [
            replace(group, texts=group.texts[:1], labels=group.labels[:0]) if epoch == PADDING_GROUP else group
            for group, (_, epoch) in zip(groups, indices, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True)
class StepDataset(Dataset[list[Group]]):
    """The groups of a schedule's steps: in each, a batch for each objective."""

    datasets: Sequence[GroupDataset]

    def __getitems__(self, step: list[list[GroupIndex]]) -> list[list[Group]]:
        """Draw the groups of a step."""
        return [dataset.__getitems__(batch) for dataset, batch in zip(self.datasets, step, strict=True)]

    def __len__(self) -> int:
        return len(self.datasets[0])


@dataclass(frozen=True)
class Collator:
    """Turn groups into a batch of tensors.

    A batch is a dictionary of

    - chunks: token ids (and masks) of the pairs, in chunks of similar length, each [pairs, tokens];
    - slots: [pairs] the index of each pair's score in the flattened [G, L], in the order of the chunks; the windows
      of one document have the same index;
    - labels: [G, L] float;
    - mask: [G, L] bool, True for a document;
    - qids: the G queries' ids.
    """

    encoder: PairEncoder
    max_tokens: int  # per chunk
    max_pairs: int | None  # per chunk
    threads: int = 1  # to balance the chunks between; ignored with `max_pairs`
    keeps_ids: bool = False  # so that texts aren't tokenized again in later epochs

    def __call__(self, groups: list[Group]) -> dict[str, Any]:
        """Turn groups into a batch."""
        width = max(len(group.texts) for group in groups)
        labels = torch.zeros(len(groups), width)
        mask = torch.zeros(len(groups), width, dtype=torch.bool)
        is_scored = mask.clone()  # the mask, and the text of a padding group
        for row, group in enumerate(groups):
            labels[row, : len(group.labels)] = torch.from_numpy(group.labels)
            mask[row, : len(group.labels)] = True
            is_scored[row, : len(group.texts)] = True
        queries = [group.query for group in groups for _ in group.texts]
        texts = [text for group in groups for text in group.texts]
        encoded, document = self.encoder.windows(queries, texts, keep=self.keeps_ids)
        chunks = self._chunks(encoded.lengths)
        slots = is_scored.flatten().nonzero().squeeze(-1)[torch.from_numpy(document)]
        return {
            "chunks": [self.encoder.pad(encoded, chunk) for chunk in chunks],
            "slots": slots[torch.from_numpy(np.concatenate(chunks))],
            "labels": labels,
            "mask": mask,
            "qids": [group.qid for group in groups],
        }

    def step(self, batches: list[list[Group]]) -> dict[str, Any]:
        """Turn the groups of a step into a batch: the chunks of all objectives, and under `parts` the rest of each."""
        parts = [self(groups) for groups in batches]
        return {"chunks": [chunk for part in parts for chunk in part.pop("chunks")], "parts": parts}

    def _chunks(self, lengths: np.ndarray) -> list[np.ndarray]:
        chunks = length_batches(lengths, max_tokens=self.max_tokens, max_pairs=self.max_pairs)
        threads = min(self.threads, int(lengths.sum()) // MIN_TOKENS_PER_THREAD)
        if threads > 1 and self.max_pairs is None:
            return balance_batches(chunks, lengths, self.max_tokens, threads)
        return chunks
