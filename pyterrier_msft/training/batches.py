"""The order of queries in a training run, and batches of groups as tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pyterrier_msft.data.groups import Group, Groups
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

GroupIndex = tuple[int, int]  # a query's index, and the epoch (or PADDING_GROUP)


class BatchSchedule(Sampler[list[GroupIndex]]):
    """All batches of a training run. The content of the n-th batch depends only on the seed and n.

    So a resumed run continues exactly, and negatives are resampled every epoch; no `set_epoch` needed.
    """

    def __init__(self, groups: Groups, plan: Plan, *, seed: int) -> None:
        self.plan, self.seed = plan, seed
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
            yield [(int(query), epoch) for query in batch[rank::world_size]] or [(int(batch[0]), PADDING_GROUP)]

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        batch_size = self.plan.batch_size
        window = batch_size * max(1, min(MAX_SORTED_BATCHES, self.plan.updates_per_epoch // 8))
        windows = np.split(order, range(window, len(order), window))
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in windows])
        batches = np.split(order, range(batch_size, len(order), batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class GroupDataset(Dataset[Group]):
    """The groups of a schedule's batches, drawn on access."""

    groups: Groups
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

    def _chunks(self, lengths: np.ndarray) -> list[np.ndarray]:
        chunks = length_batches(lengths, max_tokens=self.max_tokens, max_pairs=self.max_pairs)
        threads = min(self.threads, int(lengths.sum()) // MIN_TOKENS_PER_THREAD)
        if threads > 1 and self.max_pairs is None:
            return balance_batches(chunks, lengths, self.max_tokens, threads)
        return chunks
