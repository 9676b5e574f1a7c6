"""The ranking in the text of an LLM's answer: docnos or positions of candidates, best first.

Few forms are read: JSON, a chain ("[2] > [1]"), a line of names ("2, 1"), and lines of one name each, with or without
ranks. In any other text, names may belong to an explanation.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

# All patterns take linear time: no two neighbouring repetitions match the same character.
FLAGS = re.DOTALL | re.IGNORECASE
TAG = "(?:think(?:ing)?|thought|reasoning)"
# Of a reasoning model, whose beginning or end may be cut off.
THOUGHTS = re.compile(rf"<{TAG}>.*?</{TAG}>|^(?:(?!<{TAG}>).)*?</{TAG}>|<{TAG}>.*", FLAGS)
ANSWER = re.compile(r"<(?:answer|ranking)>((?:(?!<(?:answer|ranking)>).)*?)</(?:answer|ranking)>", FLAGS)
FENCE = re.compile(r"```\w*([^`]+)```")

FULL_WIDTH = str.maketrans("：＞＝，、；。．（）［］【】", ":>=,,;..()[][]")

MARKUP = " \t\r\n*_`'\"“”‘’<>(){}|#.,;:!-–—•"  # around a name
LABEL = re.compile(r"(?:(?:passage|document|doc|candidate|docno|id)\b[\s#:_-]*){0,2}", re.IGNORECASE)
BRACKETS = re.compile(r"\[([^\[\]]*)\]")
NUMBER = re.compile(r"(\d{1,9})(?![\w%]|[.,:/-]\d)")
NUMBER_ALONE = re.compile(rf"{NUMBER.pattern}(?![ \t]*\w)")  # isn't a number of something, as in "3 points"
UNKNOWN = re.compile(r"(?=\D*\d)(?=[\W\d_]*[^\W\d_])[^\s\[\]]+")  # may be a docno of another document
ARROW = re.compile(r"[>≻→=]+")
LEAD_ENDS = re.compile(r":(?!\w)"), re.compile(r"\b(?:is|are)\s")
RANKING = re.compile(r"\b(?:ranking|ranked|order|answer)\b", re.IGNORECASE)
COUNTER = re.compile(
    r"[\W_]*?(?P<ordinal>#|(?:rank|place|number|no)\b[^\w\n]*)?(?P<number>\d{1,5})(?P<sign>[^\w\n\[>≻→=]*)(?P<rest>.*)",
    re.IGNORECASE,
)
RANKS, SCORES = ("rank", "position", "order"), ("score", "relevance_score", "relevance")  # keys in JSON
DOCNO = ("docno", "docid", "doc_id", "pid", "id", "_id")
NAMES = (*DOCNO, "document_id", "passage_id", "document", "passage", "doc", "index")


def read_names(text: str, docnos: Sequence[str | None]) -> list[str]:
    """Return the docnos or positions that an answer ranks, best first; none if it has no form that is read."""
    text = THOUGHTS.sub("", text)
    for block in (ANSWER, FENCE):
        if found := block.findall(text):
            text = found[-1]
    candidates = Candidates(docnos)
    if all(docno == docno.translate(FULL_WIDTH) for docno in candidates.docnos):
        text = text.translate(FULL_WIDTH)
    if (in_json := _read_json(text, candidates)) is not None:
        return in_json
    for read in (_read_chains, _read_lines):
        rankings = [names for names in read(text, candidates) if names]
        if any(len(names) >= min(2, len(docnos)) for names in rankings):
            return _only_complete(rankings)
    return []


def _only_complete(rankings: list[list[str]]) -> list[str]:
    """Return the ranking with all names of all rankings; none if there are two."""
    names = {name for ranking in rankings for name in ranking}
    complete = [ranking for ranking in rankings if {*ranking} == names]
    return complete[0] if complete and all(ranking == complete[0] for ranking in complete) else []


class Candidates:
    """Finds the names of a query's candidates in text: docnos, or positions as plain numbers."""

    def __init__(self, docnos: Sequence[str | None]) -> None:
        self.in_order, self.docnos = [*docnos], {docno for docno in docnos if docno}
        self.max_length = max(map(len, self.docnos), default=0)

    def whole(self, text: str) -> str | None:
        """Return the name that a text is, with brackets, quotation marks or a word such as "Passage"; None if none."""
        inner = text.strip(MARKUP + "[]")
        for name in (text.strip(), inner, LABEL.sub("", inner, count=1).strip(MARKUP + "[]")):
            if name in self.docnos:
                return name
        if NUMBER.fullmatch(name):
            return _position(name)
        return name if UNKNOWN.fullmatch(name) else None

    def at_end(self, text: str) -> str | None:
        """Return the name that a text is or ends with: one in brackets, or after words such as "The ranking:"."""
        if name := self.whole(text):
            return name
        text = text.rstrip(MARKUP)
        lead, brackets, rest = text.rpartition("[") if text.endswith("]") else ("", "", "")
        if "[" in lead or not brackets:
            lead, rest = _split_lead(text)
        return None if any(word.strip(MARKUP) in self.docnos for word in lead.split()) else self.whole(rest)

    def at_start(self, text: str, *, numbers: bool = True) -> str | None:
        """Return the name that a text begins with; `numbers`: also a position without brackets and a word before it."""
        text = text.lstrip(MARKUP)
        unlabelled = LABEL.sub("", text, count=1).lstrip(MARKUP)
        if docno := self._docno_at_start(text) or self._docno_at_start(unlabelled):
            return docno
        if brackets := BRACKETS.match(unlabelled):
            return self.whole(brackets[1])
        has_label = unlabelled != text
        if number := (NUMBER if has_label else NUMBER_ALONE).match(unlabelled):
            is_docno = number[1] in self.docnos and int(number[1]) > len(self.in_order)
            return _position(number[1]) if numbers or has_label or is_docno else None
        token = unlabelled.split(maxsplit=1)[0].rstrip(MARKUP) if unlabelled else ""
        return token if UNKNOWN.fullmatch(token) else None

    def _docno_at_start(self, text: str) -> str | None:
        """Return the longest docno that a text begins with, unless it may be a position."""
        for end in range(min(self.max_length, len(text)), 0, -1):
            if text[:end] in self.docnos and not text[:end].isdecimal() and not text[end : end + 1].isalnum():
                return text[:end]
        return None

    def lists(self, names: Sequence[str]) -> bool:
        """Whether names are those of the first candidates in their order."""
        n = len(names)
        orders = ([*self.in_order[:n]], *([str(first + i) for i in range(n)] for first in (0, 1)))
        return [*names] in orders


def _position(number: str) -> str:
    return number.lstrip("0") or "0"


# ---- JSON


def _read_json(text: str, candidates: Candidates) -> list[str] | None:
    """Read `["d2", "d1"]`, `{"ranking": [2, 1]}` or `[{"rank": 1, "id": 2}]`, also one object per line."""
    start, end = min((i for i in map(text.find, "[{") if i >= 0), default=0), max(map(text.rfind, "]}")) + 1
    if text[end:].strip(MARKUP) or text[:start].rstrip()[-1:] not in ("", ":"):
        return None
    lines = ",".join(line.strip().rstrip(",") for line in text[start:end].splitlines() if line.strip())
    for part in (text[start:end], f"[{lines}]" if "},{" in lines else ""):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lists = [item for item in value.values() if isinstance(item, list)]
            if not lists:
                texts = "\n".join(item for item in value.values() if isinstance(item, str))
                return _only_complete([*_read_chains(texts, candidates)])
            value = lists[0] if len(lists) == 1 else []
        if isinstance(value, list):
            names = [candidates.whole(str(item)) if _is_id(item) else None for item in _items(value)]
            return [name for name in names if name] if all(names) else []
    return None


def _items(values: list[Any]) -> list[Any]:
    """Return what names the candidates, in the order of the ranks; nothing if scores have another order."""
    if not values or not all(isinstance(value, dict) for value in values):
        return values
    objects = [{key.casefold(): item for key, item in value.items()} for value in values]
    key = next((name for name in NAMES if all(_is_id(value.get(name)) for value in objects)), None)
    for name in (*RANKS, *SCORES):
        numbers = [number for value in objects if isinstance(number := value.get(name), int | float)]
        if name == key or len(numbers) < len(objects):
            continue
        if name in RANKS and len({*numbers}) == len(numbers):
            objects = sorted(objects, key=lambda value: value[name])
            break
        if numbers != sorted(numbers, reverse=name in SCORES):
            return []
    return [value[key] for value in objects] if key else []


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


# ---- chains


def _read_chains(text: str, candidates: Candidates) -> Iterator[list[str]]:
    """Read "[2] > [1]" within a text or over several lines."""
    lines = [*filter(None, map(str.strip, text.splitlines()))]
    joined = lines[:1]
    for last, line in pairwise(lines):
        continues = candidates.at_end(ARROW.split(last)[-1]) if ARROW.match(line) else ARROW.match(last[-1])
        if continues and not _item(line, candidates):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    for line in joined:
        parts = [part for part in ARROW.split(line) if part.strip(MARKUP)]
        if len(parts) > 1:
            middle = map(candidates.whole, parts[1:-1])
            names = _alike([candidates.at_end(parts[0]), *middle, candidates.at_start(parts[-1])])
            yield names if len({"[" in part for part in parts}) == 1 else []  # "[2] = 9" is a score


# ---- lines


class Item(NamedTuple):
    """A line of a rank and a name, e.g. "1. Passage 2", "[1] d2" or "| 1 | d2 |"."""

    rank: int
    name: str
    is_bare: bool  # whether nothing else is in the line


def _read_lines(text: str, candidates: Candidates) -> Iterator[list[str]]:
    """Read numbered lists, lines of several names, and consecutive lines of one name."""
    lines = [*filter(None, map(str.strip, text.splitlines()))]
    items = [_item(line, candidates) for line in lines]
    listed: set[int] = set()
    for run in _runs(items):
        listed.update(run)
        found = [item for i in run if (item := items[i])]
        names = [item.name for item in found]
        if all(item.is_bare for item in found) or not candidates.lists(names):  # else: comments on each candidate
            yield names
    column: list[str] = []
    for i, line in enumerate([*lines, ""]):
        row = [] if i in listed else _row(line, candidates)
        if len(row) == 1:
            column += row
        else:
            yield from (column, row)
            column = []


def _item(line: str, candidates: Candidates) -> Item | None:
    found = COUNTER.match(line)
    if found is None or ARROW.match(found["rest"]):
        return None
    # After "1." or "Rank 1:", a plain number is a name; after "[1]" or "1:", it may be a score.
    is_ordinal = bool(found["ordinal"]) or found["sign"].strip()[:1] in (".", ")")
    name = candidates.at_start(found["rest"], numbers=is_ordinal)
    return Item(int(found["number"]), name, candidates.whole(found["rest"]) is not None) if name else None


def _runs(items: Sequence[Item | None]) -> Iterator[list[int]]:
    """Return the indices of items with consecutive ranks from 0 or 1; other lines may be between them."""
    run: list[int] = []
    last = -1
    for i, item in enumerate(items):
        if item is None:
            continue
        if run and item.rank == last + 1:
            run.append(i)
        else:
            if len(run) > 1:
                yield run
            run = [i] if item.rank in (0, 1) else []
        last = item.rank
    if len(run) > 1:
        yield run


def _row(line: str, candidates: Candidates) -> list[str]:
    """Return the names that a line consists of, maybe after words such as "The ranking is"; none if it has others."""
    lead, rest = _split_lead(line)
    line = (rest if RANKING.search(lead) else line).replace("][", "] [").strip(MARKUP)
    for parts in ([line], re.split("[,;]", line) if re.search("[,;]", line) else line.split()):
        if names := _alike([candidates.whole(part) for part in parts if part.strip()]):
            return names
    return []


def _alike(names: Sequence[str | None]) -> list[str]:
    """Return names that are all numbers, or all docnos; nothing if one is missing."""
    found = [name for name in names if name]
    return found if len(found) == len(names) and len({*map(str.isdecimal, found)}) == 1 else []


def _split_lead(text: str) -> tuple[str, str]:
    """Split a text after words without brackets that end with ":", "is" or "are"; the first part may be empty."""
    for end in LEAD_ENDS:
        if (found := end.search(text)) and "[" not in text[: found.start()]:
            return text[: found.start()], text[found.end() :]
    return "", text
