"""Encode (query, text) pairs as token ids and padded batches."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

Encoded = dict[str, list[list[int]]]  # a tokenizer's columns ("input_ids", ...), one list of integers per pair

CHARACTERS_PER_TOKEN = 12  # how much of a long text is tokenized: twice as much as any language needs
WINDOW_OVERLAP = 1 / 8  # between consecutive windows of a text, as a fraction of max_length
MAX_BALANCED_BATCHES = 32  # per worker; with more, an uneven last round hardly matters

# A fast tokenizer keeps the options of a call, so another thread's call would change them before they are used.
_TOKENIZER_LOCK = threading.Lock()


class Query(NamedTuple):
    """A query, truncated as a string, so that the tokenizer still applies its template to the pair."""

    tokens: int  # of the whole query, as far as they could fit a pair
    short: str  # the `query_limit` tokens that a pair always keeps
    long: str  # all tokens that a pair may keep


@dataclass(frozen=True)
class PairEncoder:
    """Tokenizes pairs as `[CLS] query [SEP] text [SEP]`, or whatever the tokenizer's template is.

    In a pair that doesn't fit, the text is truncated first, and the query only beyond half of the tokens, as far as the
    text needs them. This is Hugging Face's `longest_first`, except that the query never gets the odd token. With
    `max_query_length`, every query is truncated to that many tokens, and the text to the room left. With `passages`, a
    text that doesn't fit is read in windows, see `windows`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_query_length: int | None = None
    passages: int = 1

    def __call__(self, queries: Sequence[Any], texts: Sequence[Any]) -> Encoded:
        """Encode pairs, truncated but not padded. Missing values (None, NaN) are read as empty texts."""
        parsed, texts, prefixes = self._prepare(queries, texts)
        encoded, again = self._encode([query.short for query in parsed], prefixes), {}
        for i, (query, text, prefix) in enumerate(zip(parsed, texts, prefixes, strict=True)):
            # There is room for more of the query, or a prefix of few, long words is too short to fill the pair.
            is_cut = query.short != query.long or len(prefix) < len(text)
            if is_cut and len(encoded["input_ids"][i]) < self.max_length:
                again[i] = query.long, text
        self._encode_again(encoded, again)
        return encoded

    def windows(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[Encoded, np.ndarray]:
        """Encode each pair in as many windows of the text as it needs, at most `passages`.

        Windows fill the space beside the query, and overlap, so that a phrase that one cuts is whole in the next. If
        there are several, all have the same query, of at most `query_limit` tokens.

        Returns:
            The windows, and for each of them the index of its pair.

        Raises:
            ValueError: If `passages` is above 1 and the tokenizer isn't a fast one: slow ones can't make windows.
        """
        if self.passages == 1:
            return self(queries, texts), np.arange(len(queries))
        if not self.tokenizer.is_fast:
            raise ValueError(f"passages={self.passages} needs a fast tokenizer; got {type(self.tokenizer).__name__}")
        parsed, texts, prefixes = self._prepare(queries, texts)
        short = [query.short for query in parsed]
        encoded, pair = self._encode_windows(short, prefixes)
        is_cut = np.array([len(prefix) < len(text) for text, prefix in zip(texts, prefixes, strict=True)], dtype=bool)
        # If all windows of a prefix are kept, the prefix may be too short.
        if (is_cut & (np.bincount(pair, minlength=len(texts)) <= self.passages)).any():
            encoded, pair = self._encode_windows(short, texts)
        is_single = (np.bincount(pair, minlength=len(texts)) == 1)[pair]
        again = {
            window: (parsed[i].long, texts[i])
            for window, i in enumerate(pair.tolist())
            if is_single[window] and parsed[i].short != parsed[i].long  # a query with room for more of it
            and len(encoded["input_ids"][window]) < self.max_length
        }  # fmt: skip
        self._encode_again(encoded, again)
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

    def truncates_query(self, queries: Sequence[Any], texts: Sequence[Any]) -> np.ndarray:
        """Return whether each pair's query is truncated, bool [pairs]. Tokenizes only texts beside a long query."""
        parsed, limit = self._parse_queries(queries), self.query_limit
        is_truncated = np.array([query.tokens > limit for query in parsed], dtype=bool)
        long = np.flatnonzero(is_truncated).tolist()
        if self.max_query_length is None and long:
            is_truncated[long] = self._exceeds_length([queries[i] for i in long], [texts[i] for i in long])
        return is_truncated

    def truncation_rates(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[float, float]:
        """Return the shares (0 to 1) of the pairs whose query, and whose text, is truncated."""
        if not len(queries):
            return 0.0, 0.0
        query_rate = float(self.truncates_query(queries, texts).mean())
        if self.passages > 1:
            _, pair = replace(self, passages=self.passages + 1).windows(queries, texts)
            return query_rate, float(np.mean(np.bincount(pair) > self.passages))
        # A text is truncated if it doesn't fit beside the shortest form of the query.
        capped = replace(self, max_query_length=self.query_limit)
        return query_rate, float(capped._exceeds_length(queries, texts).mean())

    @property
    def query_limit(self) -> int:
        """The number of tokens to which a query is truncated beside a long text."""
        limit = self._room // 2 if self.max_query_length is None else min(self._room - 1, self.max_query_length)
        return max(1, limit)

    @property
    def _room(self) -> int:
        """The maximum number of tokens of query and text together."""
        return self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)

    def _exceeds_length(self, queries: Sequence[Any], texts: Sequence[Any]) -> np.ndarray:
        """Return whether each pair has more than `max_length` tokens, bool [pairs]."""
        longer = replace(self, max_length=self.max_length + 1, passages=1)
        return np.array([len(ids) > self.max_length for ids in longer(queries, texts)["input_ids"]], dtype=bool)

    def _prepare(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[list[Query], list[str], list[str]]:
        """Return the parsed queries, the cleaned texts, and the prefixes of the texts worth tokenizing."""
        cleaned = [clean(text) for text in texts]
        return self._parse_queries(queries), cleaned, [self._prefix(text) for text in cleaned]

    def _parse_queries(self, queries: Sequence[Any]) -> list[Query]:
        cleaned = [clean(query) for query in queries]
        distinct = list(dict.fromkeys(cleaned))
        if not distinct:
            return []
        room, limit = max(1, self._room), self.query_limit
        options = {"add_special_tokens": False, "truncation": True, "max_length": room + 1}
        column = "offset_mapping" if self.tokenizer.is_fast else "input_ids"
        found = self._tokenize(distinct, return_offsets_mapping=self.tokenizer.is_fast, **options)[column]
        parsed = {}
        for query, tokens in zip(distinct, found, strict=True):
            short = self._shorten(query, tokens, limit)
            long = self._cut(query, tokens, room) if self.max_query_length is None else short
            parsed[query] = Query(len(tokens), short, long)
        return [parsed[query] for query in cleaned]

    def _shorten(self, query: str, tokens: list[Any], limit: int) -> str:
        """Truncate a query to at most `limit` tokens."""
        if len(tokens) <= limit:
            return query
        for kept in range(limit, 0, -1):
            # A part may have more tokens than in the whole, e.g. if a token is one byte of a character.
            short = self._cut(query, tokens, kept)
            if len(self._tokenize([short], add_special_tokens=False)["input_ids"][0]) <= limit:
                return short
        return ""

    def _cut(self, query: str, tokens: list[Any], kept: int) -> str:
        """Cut a query after some of its tokens, which are offsets or, if the tokenizer isn't a fast one, ids."""
        if len(tokens) <= kept:
            return query
        keeps_end = self.tokenizer.truncation_side == "left"
        if not self.tokenizer.is_fast:
            return str(self.tokenizer.decode(tokens[-kept:] if keeps_end else tokens[:kept]))
        return query[tokens[-kept][0] :] if keeps_end else query[: tokens[kept - 1][1]]

    def _prefix(self, text: str) -> str:
        """Return the beginning of a long text that is worth tokenizing, cut at a blank, where tokenizers split."""
        limit = CHARACTERS_PER_TOKEN * self.max_length * self.passages
        if len(text) <= 2 * limit or self.tokenizer.truncation_side != "right":
            return text
        blank = text.find(" ", limit, 2 * limit)
        return text if blank < 0 else text[:blank]

    def _tokenize(self, *texts: list[str], **options: Any) -> BatchEncoding:
        with _TOKENIZER_LOCK:
            return self.tokenizer(*texts, verbose=False, **options)

    def _encode(self, queries: list[str], texts: list[str], **options: Any) -> Encoded:
        # "only_second" fails where the query alone is too long, so queries are truncated beforehand.
        options = {"truncation": "only_second", "max_length": self.max_length, **options}
        return dict(self._tokenize(queries, texts, **options))

    def _encode_again(self, encoded: Encoded, pairs: dict[int, tuple[str, str]]) -> None:
        """Replace what is encoded at some indices, with queries that may take the room that their text leaves."""
        if not pairs:
            return
        queries, texts = zip(*pairs.values(), strict=True)
        strategy = "longest_first" if self.max_query_length is None else "only_second"
        for key, columns in self._encode([*queries], [*texts], truncation=strategy).items():
            for i, values in zip(pairs, columns, strict=True):
                encoded[key][i] = values

    def _encode_windows(self, queries: list[str], texts: list[str]) -> tuple[Encoded, np.ndarray]:
        stride = max(0, min(int(self.max_length * WINDOW_OVERLAP), self._room - self.query_limit - 1))
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
