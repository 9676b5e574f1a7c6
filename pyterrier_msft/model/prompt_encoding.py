"""Encode pairs in a prompt's template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pyterrier_msft.model.encoding import PairEncoder, clean
from pyterrier_msft.model.prompts import QUERY, Prompt
from pyterrier_msft.model.template import Encoded


class Pair(NamedTuple):
    """The token ids of a pair in its template."""

    before: list[int]
    text: list[int]
    after: list[int]

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.before) + len(self.text) + len(self.after)


@dataclass(frozen=True)
class PromptEncoder(PairEncoder):
    """Tokenizes pairs in a template, which is never cut.

    Query and text are cut as `PairEncoder` cuts them. A pair is tokenized as a whole, because a token may reach from
    the template into the query or the text; such a token counts as part of the template.
    """

    prompt: Prompt = field(kw_only=True)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(f"template needs a fast tokenizer; got {type(self.tokenizer).__name__}")
        if self._room < 2:
            tokens = self.max_length - self._room
            raise ValueError(
                f"max_length must be at least {tokens + 2}, since the template has {tokens} tokens; got "
                f"{self.max_length}"
            )

    def windows(
        self, queries: Sequence[Any], texts: Sequence[Any], *, keep: bool = False
    ) -> tuple[Encoded, np.ndarray]:
        """Encode each pair in as many windows of the text as it needs, at most `passages`; `keep` has no effect."""
        parsed, cleaned = self._parse_queries(queries), [clean(text) for text in texts]
        prefixes = [self._prefix(text) for text in cleaned]
        pairs = self._pairs([query.long for query in parsed], prefixes)
        for i, (query, text, prefix) in enumerate(zip(parsed, cleaned, prefixes, strict=True)):
            if query.short != query.long and pairs[i].tokens > self.max_length:
                pairs[i] = self._shortened(query.long, query.short, prefix)
            # A prefix of few, long words may be too short to fill the windows.
            if len(prefix) < len(text) and len(pairs[i].text) < self._max_text_tokens:
                pairs[i] = self._shortened(query.long, query.short, text)
        ids, owners = [], []
        for i, pair in enumerate(pairs):
            room = max(0, self.max_length - len(pair.before) - len(pair.after))
            step = max(1, room - self._stride)
            count = 1 if len(pair.text) <= room else min(self.passages, 1 - (room - len(pair.text)) // step)
            for start in range(0, count * step, step):
                ids.append(pair.before + self._part(pair.text, start, room) + pair.after)
                owners.append(i)
        columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        return Encoded.from_lists(columns), np.array(owners, dtype=np.int64)

    def _part(self, text: list[int], start: int, room: int) -> list[int]:
        if self.tokenizer.truncation_side == "left":
            end = len(text) - start
            return text[max(0, end - room) : end]
        return text[start : start + room]

    def _shortened(self, query: str, short: str, text: str) -> Pair:
        """Encode a pair with the longest part of the query that leaves room for the text, but at least `short`."""
        pair = self._pairs([query], [text])[0]
        tokens = self._tokenize([query], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][0]
        excess = pair.tokens - self.max_length
        kept = len(tokens) - max(0, excess)
        if excess <= 0:
            return pair
        return self._pairs([self._cut(query, tokens, kept) if kept > self.query_limit else short], [text])[0]

    def _pairs(self, queries: list[str], texts: list[str]) -> list[Pair]:
        if not queries:
            return []
        start, first, middle, _, end = self.prompt.pieces
        filled, spans = [], []
        for query, text in zip(queries, texts, strict=True):
            before = start + query + middle if first == QUERY else start
            after = end if first == QUERY else middle + query + end
            filled.append(before + text + after)
            spans.append((len(before), len(before) + len(text)))
        found = self._tokenize(filled, add_special_tokens=False, return_offsets_mapping=True)
        return [
            _split(ids, np.array(offsets, dtype=np.int64).reshape(-1, 2), *span)
            for ids, offsets, span in zip(found["input_ids"], found["offset_mapping"], spans, strict=True)
        ]

    @cached_property
    def _room(self) -> int:
        """The maximum number of tokens of query and text together."""
        return self.max_length - self._pairs([""], [""])[0].tokens


def _split(ids: list[int], offsets: np.ndarray, start: int, end: int) -> Pair:
    """Split a pair's tokens at those of the text, which lie between two characters."""
    inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0]))
    if not len(inside):
        position = int(np.searchsorted(offsets[:, 1], end, side="right"))
        return Pair(ids[:position], [], ids[position:])
    first, last = int(inside[0]), int(inside[-1])
    return Pair(ids[:first], ids[first : last + 1], ids[last + 1 :])
