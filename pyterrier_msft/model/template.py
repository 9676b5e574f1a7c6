"""Token ids in flat arrays: joined to pairs as a tokenizer would, and padded, without a loop over pairs."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import NamedTuple, Self

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


class Encoded(Mapping[str, list[list[int]]]):
    """Encoded pairs. As a mapping, it has a tokenizer's columns ("input_ids", ...), with a list of integers per pair.

    Attributes:
        columns: The columns, each with the numbers of all pairs in one array, (tokens,).
        lengths: (pairs,) The number of each pair's tokens.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        self.columns, self.lengths = columns, lengths
        self._starts = np.cumsum(lengths) - lengths

    @classmethod
    def from_lists(cls, columns: Mapping[str, list[list[int]]]) -> Self:
        """Convert what a tokenizer returns."""
        lengths = np.array([len(ids) for ids in columns["input_ids"]], dtype=np.int64)
        flat = {key: np.fromiter(chain.from_iterable(values), np.int32) for key, values in columns.items()}
        return cls(flat, lengths)

    def __getitem__(self, key: str) -> list[list[int]]:
        column = self.columns[key]
        return [column[start : start + n].tolist() for start, n in zip(self._starts, self.lengths, strict=True)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def pad(
        self, indices: np.ndarray, length: int, *, padding: Mapping[str, int], left: bool
    ) -> dict[str, torch.Tensor]:
        """Pad the chosen pairs to tensors [pairs, length], with 0 in columns that `padding` doesn't name."""
        lengths = self.lengths[indices][:, None]
        is_token = np.arange(length) >= length - lengths if left else np.arange(length) < lengths
        tokens = ranges(self._starts[indices], lengths[:, 0])
        batch = {}
        for key, column in self.columns.items():
            padded = np.full(is_token.shape, padding.get(key, 0), dtype=np.int64)
            padded[is_token] = column[tokens]
            batch[key] = torch.from_numpy(padded)
        return batch


class Template(NamedTuple):
    """A tokenizer's template, as segments: one for each special token, one for the query, and one for the text."""

    query: int  # the query's index among the segments
    text: int
    columns: dict[str, np.ndarray]  # the value of each segment's tokens, (segments,); no ids of query and text

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self | None:
        """Read the template off a pair; None if it can't be read."""
        pair = tokenizer(["a"], ["b"], verbose=False)
        sequence = pair.sequence_ids(0)  # 0 for tokens of the query, 1 for those of the text, None for special tokens
        starts = [i for i, part in enumerate(sequence) if part is None or part not in sequence[:i]]
        segments = [sequence[i] for i in starts]
        if not {0, 1} <= {*segments}:
            return None
        columns = {key: np.array(values[0], dtype=np.int32)[starts] for key, values in pair.items()}
        return cls(segments.index(0), segments.index(1), columns)

    def join(self, ids: np.ndarray, query: np.ndarray, text: np.ndarray) -> Encoded:
        """Join pairs: `query` and `text`, (2, pairs), are starts and lengths of their tokens in `ids`."""
        segments = len(self.columns["input_ids"])
        starts = np.tile(len(ids) + np.arange(segments), (query.shape[1], 1))  # (pairs, segments)
        lengths = np.ones_like(starts)
        for segment, part in ((self.query, query), (self.text, text)):
            starts[:, segment], lengths[:, segment] = part
        tokens = ranges(starts.ravel(), lengths.ravel())
        columns = {
            key: np.concatenate([ids, values])[tokens] if key == "input_ids"
            else np.repeat(np.tile(values, len(lengths)), lengths.ravel())
            for key, values in self.columns.items()
        }  # fmt: skip
        return Encoded(columns, lengths.sum(axis=1))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges from `starts` that have these lengths."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)


def longest_first(query: np.ndarray, text: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens of queries and texts are kept by tokenizers' truncation "longest_first"."""
    shorter = np.minimum(query, text)
    longer = np.maximum(shorter, room - shorter)
    exceeds = shorter + longer > room  # both are cut
    shorter, longer = np.where(exceeds, room // 2, shorter), np.where(exceeds, room - room // 2, longer)
    is_shorter = query <= text
    return (
        np.minimum(query, np.where(is_shorter, shorter, longer)),
        np.minimum(text, np.where(is_shorter, longer, shorter)),
    )
