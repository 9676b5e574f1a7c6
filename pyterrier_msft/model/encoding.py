"""Encode (query, text) pairs as token ids and padded batches."""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from pyterrier_msft.model.template import Encoded, Template, longest_first, ranges

Lists = dict[str, list[list[int]]]  # a tokenizer's columns ("input_ids", ...), with a list of integers per pair

CHARACTERS_PER_TOKEN = 12  # how much of a long text is tokenized: twice as much as any language needs
WINDOW_OVERLAP = 1 / 8  # between consecutive windows of a text, as a fraction of max_length
MAX_KEPT_TOKENS = 2**28  # of texts whose token ids are kept, with four bytes each

# A fast tokenizer keeps the options of a call, so another thread's call would change them before they are used.
_TOKENIZER_LOCK = threading.Lock()

# Decide whether a tokenizer's pairs can be joined from the ids of queries and texts.
SAMPLE = ["", "a", " b", "What is 3.14?", "Größe\n\U0001f642 [SEP] </s>", "one two three four five six seven eight"]
_TEMPLATES: WeakKeyDictionary[PreTrainedTokenizerBase, Template | None] = WeakKeyDictionary()

T = TypeVar("T")


class Query(NamedTuple):
    """A query, truncated as a string, so that the tokenizer still applies its template to the pair."""

    tokens: int  # of the whole query, at most one more than a pair has room for
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
        return self.windows(queries, texts)[0]

    def windows(
        self, queries: Sequence[Any], texts: Sequence[Any], *, keep: bool = False
    ) -> tuple[Encoded, np.ndarray]:
        """Encode each pair in as many windows of the text as it needs, at most `passages`.

        Windows fill the space beside the query, and overlap, so that a phrase that one cuts is whole in the next. If
        there are several, all have the same query, of at most `query_limit` tokens.

        Args:
            queries: The queries.
            texts: The texts.
            keep: Whether to keep the token ids of queries and texts for later calls.

        Returns:
            The windows, and for each of them the index of its pair.

        Raises:
            ValueError: If `passages` is above 1 and the tokenizer isn't a fast one: slow ones can't make windows.
        """
        if self.passages > 1 and not self.tokenizer.is_fast:
            raise ValueError(f"passages={self.passages} needs a fast tokenizer; got {type(self.tokenizer).__name__}")
        template = find_template(self.tokenizer)
        if template is None:
            return self._windows_of_tokenizer(queries, texts)
        return self._windows_of_template(template, queries, texts, keep=keep)

    def pad(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Pad the chosen pairs to tensors [pairs, tokens]; of several, tokens is a multiple of 8 or `max_length`."""
        indices = np.asarray(indices)
        length = int(encoded.lengths[indices].max())
        if len(indices) > 1:  # a single pair isn't padded, because some models read padding
            length = max(length, min(-(-length // 8) * 8, self.max_length))  # the model may have no more positions
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return encoded.pad(indices, length, padding=padding, left=self.tokenizer.padding_side == "left")

    def truncates_query(self, queries: Sequence[Any], texts: Sequence[Any]) -> np.ndarray:
        """Return whether each pair's query is truncated, bool [pairs]. Tokenizes only texts beside a long query."""
        parsed, limit = self._parse_queries(queries), self.query_limit
        is_truncated = np.array([query.tokens > limit for query in parsed], dtype=bool)
        long = np.flatnonzero(is_truncated).tolist()
        if self.max_query_length is None and long:
            is_truncated[long] = self._exceeds_length([queries[i] for i in long], [texts[i] for i in long])
        return is_truncated

    def truncation_rates(
        self, queries: Sequence[Any], texts: Sequence[Any], weights: Sequence[float] | None = None
    ) -> tuple[float, float]:
        """Return the shares (0 to 1) of the pairs whose query, and whose text, is truncated.

        `weights` are how many texts each text stands for.
        """
        if not len(queries):
            return 0.0, 0.0
        query_rate = float(self.truncates_query(queries, texts).mean())
        if self.passages > 1:
            _, pair = replace(self, passages=self.passages + 1).windows(queries, texts)
            return query_rate, float(np.average(np.bincount(pair) > self.passages, weights=weights))
        # A text is truncated if it doesn't fit beside the shortest form of the query.
        capped = replace(self, max_query_length=self.query_limit)
        return query_rate, float(np.average(capped._exceeds_length(queries, texts), weights=weights))

    @cached_property
    def query_limit(self) -> int:
        """The number of tokens to which a query is truncated beside a long text."""
        limit = self._room // 2 if self.max_query_length is None else min(self._room - 1, self.max_query_length)
        return max(1, limit)

    @cached_property
    def _room(self) -> int:
        """The maximum number of tokens of query and text together."""
        return self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)

    def _exceeds_length(self, queries: Sequence[Any], texts: Sequence[Any]) -> np.ndarray:
        """Return whether each pair has more than `max_length` tokens, bool [pairs]."""
        longer = replace(self, max_length=self.max_length + 1, passages=1)
        is_longer: np.ndarray = longer(queries, texts).lengths > self.max_length
        return is_longer

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

    # ---- pairs joined from the ids of queries and texts, each of which is tokenized once

    def _windows_of_template(
        self, template: Template, queries: Sequence[Any], texts: Sequence[Any], *, keep: bool
    ) -> tuple[Encoded, np.ndarray]:
        query, distinct_queries = distinct(queries)
        text, distinct_texts = distinct(texts)
        kept_queries, kept_texts = self._kept if keep else (None, None)
        query_ids = self._recall(kept_queries, distinct_queries, self._query_ids)
        text_ids = self._recall(kept_texts, distinct_texts, self._text_ids)
        parts = [*(ids for ids, _ in query_ids), *(ids for _, ids in query_ids), *text_ids]  # short, long, texts
        lengths = np.array([len(ids) for ids in parts], dtype=np.int64)
        starts, room = np.cumsum(lengths) - lengths, self._room
        text = text + 2 * len(query_ids)
        fits = lengths[query] + lengths[text] < room  # with room for more of the query
        query = query + len(query_ids) * fits
        # (pairs,) tokens: of the whole, and what is kept of them
        n_query, n_text = lengths[query], lengths[text]
        long_query, long_text = longest_first(n_query, n_text, room)
        query_kept = np.where(fits, long_query, n_query)
        text_kept = np.where(fits, long_text, np.minimum(n_text, room - n_query))
        step = np.maximum(1, text_kept - self._stride)
        n_windows = np.where(fits, 1, np.minimum(self.passages, 1 - (text_kept - n_text) // step))
        pair = np.repeat(np.arange(len(query)), n_windows)
        skipped = ranges(np.zeros_like(n_windows), n_windows) * step[pair]  # tokens before a window
        n_window = np.minimum(text_kept[pair], n_text[pair] - skipped)
        query_start, text_start = starts[query][pair], starts[text][pair] + skipped
        if self.tokenizer.truncation_side == "left":
            query_start = query_start + (n_query - query_kept)[pair]
            text_start = (starts + lengths)[text][pair] - skipped - n_window
        ids = np.concatenate([np.empty(0, np.int32), *parts])
        windows = np.stack([query_start, query_kept[pair]]), np.stack([text_start, n_window])
        return template.join(ids, *windows), pair

    @cached_property
    def _kept(self) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
        """The ids of queries and texts that are kept for later calls."""
        return {}, {}

    def _recall(
        self, kept: dict[str, T] | None, strings: list[str], make: Callable[[list[str]], Iterable[T]]
    ) -> list[T]:
        """Make a value for each of some distinct strings, unless it is kept; then keep it, as long as there is room."""
        if kept is None:
            return [*make(strings)]
        missing = [string for string in strings if string not in kept]
        made = dict(zip(missing, make(missing), strict=True))
        if (len(kept) + len(made)) * self._max_text_tokens <= MAX_KEPT_TOKENS:
            kept.update(made)
        return [made[string] if string in made else kept[string] for string in strings]

    def _query_ids(self, queries: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenize queries in their short and their long form."""
        parsed = self._parse_queries(queries)
        forms = list(dict.fromkeys(form for query in parsed for form in (query.short, query.long)))
        ids = dict(zip(forms, self._ids(forms), strict=True))
        return [(ids[query.short], ids[query.long]) for query in parsed]

    def _text_ids(self, texts: list[str]) -> list[np.ndarray]:
        """Tokenize as much of each text as `passages` windows can have, and one token more."""
        prefixes = [self._prefix(text) for text in texts]
        ids = self._ids(prefixes)
        # A prefix of few, long words may be too short to fill the windows.
        too_short = [
            i for i, (text, prefix) in enumerate(zip(texts, prefixes, strict=True))
            if len(prefix) < len(text) and len(ids[i]) < self._max_text_tokens
        ]  # fmt: skip
        for i, whole in zip(too_short, self._ids([texts[i] for i in too_short]), strict=True):
            ids[i] = whole
        return ids

    def _ids(self, strings: list[str]) -> list[np.ndarray]:
        if not strings:
            return []
        # Without the tokenizer's own call, which takes twice as long in Python.
        with _TOKENIZER_LOCK:
            self.tokenizer.set_truncation_and_padding(
                padding_strategy=PaddingStrategy.DO_NOT_PAD, truncation_strategy=TruncationStrategy.LONGEST_FIRST,
                max_length=self._max_text_tokens, stride=0, pad_to_multiple_of=None, padding_side=None,
            )  # fmt: skip
            found = self.tokenizer.backend_tokenizer.encode_batch_fast(strings, add_special_tokens=False)
            self.tokenizer.backend_tokenizer.no_truncation()  # or it would be saved
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    @cached_property
    def _max_text_tokens(self) -> int:
        return max(1, self._room) * self.passages + 1

    @cached_property
    def _stride(self) -> int:
        return max(0, min(int(self.max_length * WINDOW_OVERLAP), self._room - self.query_limit - 1))

    # ---- pairs encoded by the tokenizer, if its pairs are more than query and text in a template

    def _windows_of_tokenizer(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[Encoded, np.ndarray]:
        parsed, texts = self._parse_queries(queries), [clean(text) for text in texts]
        prefixes = [self._prefix(text) for text in texts]
        short = [query.short for query in parsed]
        encoded, pair = self._encode_windows(short, prefixes)
        is_cut = np.array([len(prefix) < len(text) for text, prefix in zip(texts, prefixes, strict=True)], dtype=bool)
        # If all windows of a prefix are kept, the prefix may be too short.
        if self.passages > 1 and (is_cut & (np.bincount(pair, minlength=len(texts)) <= self.passages)).any():
            encoded, pair = self._encode_windows(short, texts)
        is_single = (np.bincount(pair, minlength=len(texts)) == 1)[pair]
        with_room = {
            window: (parsed[i].long, texts[i])
            for window, i in enumerate(pair.tolist())
            # There is room for more of the query, or a prefix of few, long words is too short to fill the pair.
            if is_single[window] and (is_cut[i] or parsed[i].short != parsed[i].long)
            and len(encoded["input_ids"][window]) < self.max_length
        }  # fmt: skip
        self._encode_longer(encoded, with_room)
        position = np.arange(len(pair)) - np.searchsorted(pair, pair)  # of a window in its text
        kept = np.flatnonzero(position < self.passages)
        return Encoded.from_lists({key: [values[i] for i in kept] for key, values in encoded.items()}), pair[kept]

    def _encode_windows(self, queries: list[str], texts: list[str]) -> tuple[Lists, np.ndarray]:
        if self.passages == 1:
            return self._encode(queries, texts), np.arange(len(queries))
        encoded = self._encode(queries, texts, return_overflowing_tokens=True, stride=self._stride)
        return encoded, np.array(encoded.pop("overflow_to_sample_mapping"), dtype=np.int64)

    def _encode_longer(self, encoded: Lists, pairs: dict[int, tuple[str, str]]) -> None:
        """Replace the encoded pairs at some indices; their queries may take the room that the texts leave."""
        if not pairs:
            return
        queries, texts = zip(*pairs.values(), strict=True)
        strategy = "longest_first" if self.max_query_length is None else "only_second"
        for key, columns in self._encode([*queries], [*texts], truncation=strategy).items():
            for i, values in zip(pairs, columns, strict=True):
                encoded[key][i] = values

    def _encode(self, queries: list[str], texts: list[str], **options: Any) -> Lists:
        # "only_second" fails where the query alone is too long, so queries are truncated beforehand.
        options = {"truncation": "only_second", "max_length": self.max_length, **options}
        return dict(self._tokenize(queries, texts, **options))


def find_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Return a tokenizer's template, if joining the ids of query and text gives its pairs; None if it doesn't."""
    if tokenizer not in _TEMPLATES:
        template = Template.of(tokenizer) if tokenizer.is_fast else None
        if template is not None:
            queries, texts = zip(*product(SAMPLE, SAMPLE), strict=True)
            room = len(template.columns["input_ids"]) - 2
            for encoder in (PairEncoder(tokenizer, room + 9), PairEncoder(tokenizer, room + 9, passages=2)):
                joined, _ = encoder._windows_of_template(template, queries, texts, keep=False)
                if joined != encoder._windows_of_tokenizer(queries, texts)[0]:
                    template = None
                    break
        _TEMPLATES[tokenizer] = template
    return _TEMPLATES[tokenizer]


def distinct(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Return the index of each value, (values,), in the list of the distinct ones, which are cleaned."""
    indices: dict[str, int] = {}
    index = [indices.setdefault(clean(value), len(indices)) for value in values]
    return np.array(index, dtype=np.int64), [*indices]


def clean(text: Any) -> str:
    """Convert a value to a string for tokenizers: missing values are empty, lone surrogates become '?'."""
    if not isinstance(text, str):
        nan = isinstance(text, float | np.floating) and math.isnan(text)
        return "" if nan or text is None or text is pd.NA or text is pd.NaT else str(text)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
