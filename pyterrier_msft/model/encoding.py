"""Encode (query, text) pairs as token ids and padded batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[list[int]]]  # a tokenizer's columns ("input_ids", ...), one list of integers per pair

CHARACTERS_PER_TOKEN = 12  # how much of a long text is tokenized: twice as much as any language needs
WINDOW_OVERLAP = 1 / 8  # between consecutive windows of a text, as a fraction of max_length
MAX_BALANCED_BATCHES = 32  # per worker; with more, an uneven last round hardly matters


@dataclass(frozen=True)
class PairEncoder:
    """Tokenizes pairs as `[CLS] query [SEP] text [SEP]`, or whatever the tokenizer's template is.

    The text is truncated to the room left by the query. The query is truncated only beyond `max_query_length` tokens
    (None: half of `max_length`), so that a long query can't displace the text. With `passages`, a text that doesn't
    fit is read in windows, see `windows`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_query_length: int | None = None
    passages: int = 1

    def __call__(self, queries: Sequence[Any], texts: Sequence[Any]) -> Encoded:
        """Encode pairs, truncated but not padded. Missing values (None, NaN) are read as empty texts."""
        queries, texts, prefixes = self._prepare(queries, texts)
        encoded = self._encode(queries, prefixes)
        for i, (query, text, prefix) in enumerate(zip(queries, texts, prefixes, strict=True)):
            # A prefix of few, long words may be too short to fill the pair.
            if len(prefix) < len(text) and len(encoded["input_ids"][i]) < self.max_length:
                for key, (values,) in self._encode([query], [text]).items():
                    encoded[key][i] = values
        return encoded

    def windows(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[Encoded, np.ndarray]:
        """Encode each pair in as many windows of the text as it needs, at most `passages`.

        Windows fill the space beside the query, and overlap, so that a phrase that one cuts is whole in the next.

        Returns:
            The windows, and for each of them the index of its pair.

        Raises:
            ValueError: If `passages` is above 1 and the tokenizer isn't a fast one: slow ones can't make windows.
        """
        if self.passages == 1:
            return self(queries, texts), np.arange(len(queries))
        if not self.tokenizer.is_fast:
            raise ValueError(f"passages={self.passages} needs a fast tokenizer; got {type(self.tokenizer).__name__}")
        queries, texts, prefixes = self._prepare(queries, texts)
        encoded, pair = self._encode_windows(queries, prefixes)
        is_cut = np.array([len(prefix) < len(text) for text, prefix in zip(texts, prefixes, strict=True)], dtype=bool)
        # If all windows of a prefix are kept, the prefix may be too short.
        if (is_cut & (np.bincount(pair, minlength=len(texts)) <= self.passages)).any():
            encoded, pair = self._encode_windows(queries, texts)
        position = np.arange(len(pair)) - np.searchsorted(pair, pair)  # of a window in its text
        kept = np.flatnonzero(position < self.passages)
        return {key: [values[i] for i in kept] for key, values in encoded.items()}, pair[kept]

    def pad(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Pad the chosen pairs to tensors [pairs, tokens], where tokens is a multiple of 8 or `max_length`."""
        chosen = {key: [values[i] for i in indices] for key, values in encoded.items()}
        longest = max(len(ids) for ids in chosen["input_ids"])
        length = max(longest, min(-(-longest // 8) * 8, self.max_length))  # the model may have no more positions
        options = {"padding": "max_length", "max_length": length, "return_tensors": "pt", "verbose": False}
        return dict(self.tokenizer.pad(chosen, **options))

    def truncation_rates(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[float, float]:
        """Return the shares (0 to 1) of the pairs whose query, and whose text, is truncated."""
        if not len(queries):
            return 0.0, 0.0
        truncated = self._truncate_queries(queries)
        query_rate = float(np.mean([truncated[clean(query)] != clean(query) for query in queries]))
        if self.passages > 1:
            _, pair = replace(self, passages=self.passages + 1).windows(queries, texts)
            return query_rate, float(np.mean(np.bincount(pair) > self.passages))
        # A pair is truncated if it has at least one more token.
        longer = PairEncoder(self.tokenizer, self.max_length + 1, self.query_limit)
        return query_rate, float(np.mean([len(ids) > self.max_length for ids in longer(queries, texts)["input_ids"]]))

    @property
    def query_limit(self) -> int:
        """The maximum number of tokens of a query."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - 1
        return max(1, min(room, self.max_query_length or self.max_length // 2))

    def _prepare(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
        """Return the truncated queries, the cleaned texts, and the prefixes of the texts worth tokenizing."""
        truncated = self._truncate_queries(queries)
        cleaned = [clean(text) for text in texts]
        return [truncated[clean(query)] for query in queries], cleaned, [self._prefix(text) for text in cleaned]

    def _truncate_queries(self, queries: Sequence[Any]) -> dict[str, str]:
        # `truncation="only_second"` fails where the query alone is too long, so queries are truncated beforehand. As
        # strings, so that the tokenizer still applies its template to the pair.
        distinct = list(dict.fromkeys(clean(query) for query in queries))
        limit = self.query_limit
        options = {"add_special_tokens": False, "truncation": True, "max_length": limit + 1, "verbose": False}
        if not distinct:
            return {}
        if not self.tokenizer.is_fast:  # no offsets
            ids = self.tokenizer(distinct, **options)["input_ids"]
            return {
                q: self.tokenizer.decode(i[:limit]) if len(i) > limit else q for q, i in zip(distinct, ids, strict=True)
            }
        offsets = self.tokenizer(distinct, return_offsets_mapping=True, **options)["offset_mapping"]
        return {q: q[: o[limit - 1][1]] if len(o) > limit else q for q, o in zip(distinct, offsets, strict=True)}

    def _prefix(self, text: str) -> str:
        """Return the beginning of a long text that is worth tokenizing, cut at a blank, where tokenizers split."""
        limit = CHARACTERS_PER_TOKEN * self.max_length * self.passages
        if len(text) <= 2 * limit or self.tokenizer.truncation_side != "right":
            return text
        blank = text.find(" ", limit, 2 * limit)
        return text if blank < 0 else text[:blank]

    def _encode(self, queries: list[str], texts: list[str], **options: Any) -> Encoded:
        options = {"truncation": "only_second", "max_length": self.max_length, "verbose": False, **options}
        return dict(self.tokenizer(queries, texts, **options))

    def _encode_windows(self, queries: list[str], texts: list[str]) -> tuple[Encoded, np.ndarray]:
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.query_limit
        stride = max(0, min(int(self.max_length * WINDOW_OVERLAP), room - 1))
        encoded = self._encode(queries, texts, return_overflowing_tokens=True, stride=stride)
        return encoded, np.array(encoded.pop("overflow_to_sample_mapping"), dtype=np.int64)


def clean(text: Any) -> str:
    """Convert a value to a string for tokenizers: missing values are empty, lone surrogates become '?'."""
    if not isinstance(text, str):
        nan = isinstance(text, float | np.floating) and math.isnan(text)
        return "" if nan or text is None or text is pd.NA or text is pd.NaT else str(text)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


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
