"""Arrays of different lengths, stored in one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Ragged(Sequence[np.ndarray]):
    """A sequence of arrays of different lengths, stored in one array, which takes far less memory than a list."""

    def __init__(self, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        self.values = values  # the arrays, concatenated
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # of each array, and of the end

    @classmethod
    def concatenate(cls, arrays: list[np.ndarray], dtype: Any) -> "Ragged":
        """Store the arrays of a list."""
        return cls(np.concatenate(arrays) if arrays else np.empty(0, dtype), [*map(len, arrays)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        position = range(len(self))[index]
        return self.values[self.offsets[position] : self.offsets[position + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The length of each array."""
        return np.diff(self.offsets)

    def take(self, indices: Sequence[int]) -> "Ragged":
        """Return some of the arrays."""
        return Ragged.concatenate([self[i] for i in indices], self.values.dtype)

    def count(self, is_counted: Any) -> Any:
        """Count, for each array, the true values of a mask of `values`."""
        counts = np.concatenate([[0], np.cumsum(is_counted, dtype=np.int64)])
        return np.diff(counts[self.offsets])
