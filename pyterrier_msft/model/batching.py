"""Batches of pairs of similar length."""

from collections.abc import Sequence

import numpy as np

MAX_BALANCED_BATCHES = 32  # per worker; with more, an uneven last round hardly matters


def length_batches(
    lengths: Sequence[int] | np.ndarray, *, max_tokens: int, max_pairs: int | None = None
) -> list[np.ndarray]:
    """Batch the indices of pairs of similar length, with at most `max_tokens` tokens (padding included) per batch.

    The longest pairs come first, so that a batch too large for the device fails at once.
    """
    order, batches = np.argsort(-np.asarray(lengths), kind="stable"), []
    while len(order):
        fitting = max(1, max_tokens // max(1, int(lengths[order[0]])))
        batch, order = np.split(order, [min(fitting, max_pairs or fitting)])
        batches.append(batch)
    return batches


def balance_batches(batches: list[np.ndarray], lengths: np.ndarray, max_tokens: int, workers: int) -> list[np.ndarray]:
    """Batch the pairs again so that each worker gets the same number of batches, of similar size."""
    target = -(-len(batches) // workers) * workers
    if target > MAX_BALANCED_BATCHES * workers:
        return batches
    for slack in (1.02, 1.05, 1.1, 1.2):  # for padding, and because a pair can't be split
        balanced = length_batches(lengths, max_tokens=min(max_tokens, int(slack * lengths.sum() / target)))
        if len(balanced) <= target:
            return balanced
    return batches
