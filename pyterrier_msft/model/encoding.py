"""Pairs to token ids and padded batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers

Encoded = dict[str, list[list[int]]]  # a tokenizer's columns ("input_ids", ...), one list of integers a pair


# A text's first characters that are tokenised, for each token that is read; twice what the longest language takes.
CHARACTERS_PER_TOKEN = 12


MANY = 32  # batches a worker, from which on it matters little that one has a batch more than another


OVERLAP = 1 / 8  # of max_length: what two windows of a text share


# ---- pairs


@dataclass(frozen=True)
class PairEncoder:
    """Tokenises pairs as `[CLS] query [SEP] text [SEP]`, or as the tokenizer has it.

    The text is cut to what is left beside the query; the query is cut only beyond `max_query_length` tokens
    (None: half of `max_length`), so that a long query can't push the text out. With `passages`, a text that doesn't
    fit is read in windows, each beside the query, see `windows`.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_length: int
    max_query_length: int | None = None
    passages: int = 1

    def windows(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[Encoded, np.ndarray]:
        """Encode pairs, each in as many windows as it needs, and at most `passages`.

        A text's windows are as long as fits beside the query, and each begins with the end of the one before, so that
        what one cuts apart is whole in the other.

        Returns:
            The windows, and for each of them the index of its pair.

        Raises:
            ValueError: If there shall be several, and the tokenizer has none of its own in Rust to make them.
        """
        if self.passages == 1:
            return self(queries, texts), np.arange(len(queries))
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer with passages={self.passages}, found {type(self.tokenizer).__name__}"
            )
        cut, whole, beginnings = self._strings(queries, texts)
        encoded, pair = self._encode_windows(cut, beginnings)
        # A beginning that gives no window more than is read was perhaps too short.
        counts = np.bincount(pair, minlength=len(whole))
        if any(
            len(beginning) < len(text) and count <= self.passages
            for text, beginning, count in zip(whole, beginnings, counts, strict=True)
        ):
            encoded, pair = self._encode_windows(cut, whole)
        place = np.arange(len(pair)) - np.searchsorted(pair, pair)
        kept = np.flatnonzero(place < self.passages)
        return {key: [values[i] for i in kept] for key, values in encoded.items()}, pair[kept]

    def _encode_windows(self, queries: list[str], texts: list[str]) -> tuple[Encoded, np.ndarray]:
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.query_limit
        encoded = dict(
            self.tokenizer(
                queries, texts, truncation="only_second", max_length=self.max_length, verbose=False,
                return_overflowing_tokens=True, stride=max(0, min(int(self.max_length * OVERLAP), room - 1)),
            )
        )  # fmt: skip
        return encoded, np.array(encoded.pop("overflow_to_sample_mapping"), dtype=np.int64)

    def __call__(self, queries: Sequence[Any], texts: Sequence[Any]) -> Encoded:
        """Encode pairs, each truncated and none padded. Missing values (None, NaN) are read as the empty text."""
        cut, whole, beginnings = self._strings(queries, texts)
        encoded = self._encode(cut, beginnings)
        # A beginning that doesn't fill the pair up, of few and long words, was too short.
        wrong = [
            i
            for i, (text, beginning) in enumerate(zip(whole, beginnings, strict=True))
            if len(beginning) < len(text) and len(encoded["input_ids"][i]) < self.max_length
        ]
        if wrong:
            again = self._encode([cut[i] for i in wrong], [whole[i] for i in wrong])
            for key, values in again.items():
                for i, value in zip(wrong, values, strict=True):
                    encoded[key][i] = value
        return encoded

    def _strings(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
        """The queries as they are read, the texts, and what of each is worth tokenising."""
        short = self._cut_queries(queries)
        whole = [clean(text) for text in texts]
        return [short[clean(query)] for query in queries], whole, [self._beginning(text) for text in whole]

    def _encode(self, queries: list[str], texts: list[str]) -> Encoded:
        return dict(self.tokenizer(queries, texts, truncation="only_second", max_length=self.max_length, verbose=False))

    def _beginning(self, text: str) -> str:
        """What of a long text is worth tokenising: whole words, since tokenizers split texts at blanks first."""
        limit = CHARACTERS_PER_TOKEN * self.max_length * self.passages
        if len(text) <= 2 * limit or self.tokenizer.truncation_side != "right":
            return text
        blank = text.find(" ", limit, 2 * limit)
        return text if blank < 0 else text[:blank]

    @property
    def query_limit(self) -> int:
        """The most tokens of a query that are read."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - 1
        return max(1, min(room, self.max_query_length or self.max_length // 2))

    def _cut_queries(self, queries: Sequence[Any]) -> dict[str, str]:
        # `truncation="only_second"` fails where the query alone is too long, so queries are cut first, and as
        # text, to be tokenised with their pair as the tokenizer wants it.
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

    def truncated(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[float, float]:
        """The share of queries and of texts (0 to 1) that don't fit and are cut, counted on the pairs given."""
        if not len(queries):
            return 0.0, 0.0
        short = self._cut_queries(queries)
        cut_queries = np.mean([short[clean(query)] != clean(query) for query in queries])
        if self.passages > 1:
            _, pair = replace(self, passages=self.passages + 1).windows(queries, texts)
            return float(cut_queries), float(np.mean(np.bincount(pair) > self.passages))
        lengths = [len(ids) for ids in self([*queries], [*texts])["input_ids"]]
        full = [i for i, length in enumerate(lengths) if length >= self.max_length]
        # Exactly as long as the limit is not cut: a pair is, if one more token would be there to take.
        longer = PairEncoder(self.tokenizer, self.max_length + 1, self.query_limit)
        longer_ids = longer([queries[i] for i in full], [texts[i] for i in full])["input_ids"] if full else []
        return float(cut_queries), sum(len(ids) > self.max_length for ids in longer_ids) / len(lengths)


def clean(text: Any) -> str:
    """A string that every tokenizer takes: missing values are empty, lone surrogates become '?'."""
    if not isinstance(text, str):
        nan = isinstance(text, float | np.floating) and math.isnan(text)
        return "" if nan or text is None or text is pd.NA or text is pd.NaT else str(text)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def length_batches(
    lengths: Sequence[int] | np.ndarray, *, max_tokens: int, max_pairs: int | None = None
) -> list[np.ndarray]:
    """Group pairs of like length: indices of batches of at most `max_tokens` tokens, padding counted.

    The longest pairs come first, so that a batch that doesn't fit the device is met at once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        fitting = max(1, max_tokens // max(1, int(lengths[order[start]])))
        stop = start + (min(fitting, max_pairs) if max_pairs else fitting)
        batches.append(order[start:stop])
        start = stop
    return batches


def shared_out(batches: list[np.ndarray], lengths: np.ndarray, max_tokens: int, workers: int) -> list[np.ndarray]:
    """As many batches for each worker, of like size, so that none is idle at the end."""
    wanted = -(-len(batches) // workers) * workers
    if wanted > MANY * workers:
        return batches
    for slack in (1.02, 1.05, 1.1, 1.2):  # for padding, and since batches are of whole pairs
        even = length_batches(lengths, max_tokens=min(max_tokens, int(slack * lengths.sum() / wanted)))
        if len(even) <= wanted:
            return even
    return batches


def pad(
    tokenizer: transformers.PreTrainedTokenizerBase, encoded: Encoded, indices: Sequence[int] | np.ndarray
) -> dict[str, torch.Tensor]:
    """The chosen pairs as tensors [pairs, longest], the longest rounded up to a multiple of 8."""
    chosen = {key: [values[i] for i in indices] for key, values in encoded.items()}
    return dict(tokenizer.pad(chosen, pad_to_multiple_of=8, return_tensors="pt", verbose=False))
