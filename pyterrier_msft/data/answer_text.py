"""The ranking in the text of an LLM's answer: docnos or positions of candidates, best first.

Few forms are read: a chain ("[2] > [1]"), also within other text; and JSON, a line of names ("2, 1"), or lines of one
name each, with or without ranks, if nothing but a heading comes before them. All other text may be an explanation.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

# All patterns take linear time: no two neighbouring repetitions match the same character.
FLAGS = re.DOTALL | re.IGNORECASE
TAG = "(?:think(?:ing)?|thought|reasoning)"
# Of a reasoning model, whose beginning or end may be cut off.
THOUGHTS = re.compile(rf"<{TAG}>.*?</{TAG}>|^(?:(?!<{TAG}>).)*?</{TAG}>|<{TAG}>.*", FLAGS)
ANSWER = re.compile(r"<(?:answer|ranking)>((?:(?!</?(?:answer|ranking)>).)*)", FLAGS)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
FENCE = re.compile(r"```(?:\w*\n)?([^`]+)```")
WIDE = str.maketrans({"：": ": ", "，": ", ", "、": ", ", "；": "; ", "。": ". ", "【": "[", "】": "]"})

MARKUP = " \t\r\n*_`'\"“”‘’<>(){}|#.,;:!-–—•"  # around a name
LABELS = "(?:passage|document|doc|candidate|docno|id)"
LABEL = re.compile(rf"{LABELS}\b[\s#:_-]*", re.IGNORECASE)
LABELLED = re.compile(rf"{LABELS}[\s#:_-]*\d", re.IGNORECASE)
MAX_LABELS = 2  # before a name, e.g. "Passage ID 2"
BRACKETS = re.compile(r"\[([^\[\]]*)\]")
NUMBER = re.compile(r"(\d{1,9})(?![\w%]|[.,:/-]\d)")
UNKNOWN = re.compile(r"(?=\D*\d)(?=[\W\d_]*[^\W\d_])[^\s\[\]]+")  # may be a docno of another document
END = re.compile(r"[\s*_`'\"“”‘’>\])]*(?:$|[|(:–—-])")  # after a name: nothing, or a comment, but not a sentence
ARROW = re.compile(r"[>≻→=]+")
LEAD_ENDS = re.compile(r":(?!\w)"), re.compile(r"\b(?:is|are)\s")
HEADING = re.compile(r"\b(?:ranking|ranked|order|answer|result)\b", re.IGNORECASE)
# Words by which a list isn't a ranking, or not with the best document first.
OTHER = re.compile(
    r"\b(?:scores?|ratings?|ranks|irrelevant|not|least|worst|lowest|ascending|exclu\w*)\b", re.IGNORECASE
)
BEST_FIRST = re.compile(r"\b(?:most|best|highest)\b[^.:\n]{0,40}?\b(?:least|worst|lowest)\b", FLAGS)
SCORE = re.compile(r"(?<![\w./])\d+(?:\.\d+)?(?=(?:/\d+)?(?![\w/]))")
COUNTER = re.compile(
    r"[\W_]*?(?P<ordinal>#|(?:rank|place|number|no)\b[^\w\n]*)?(?P<number>\d{1,5})(?!\w)(?P<sign>[^\w\n\[>≻→=]*)"
    r"(?P<rest>.*)",
    re.IGNORECASE,
)
RANK_KEY = re.compile(r"(?:(?:new|final)[ _-]?)?rank(?:ing)?|order|position")
DOCNO = ("docno", "docid", "doc_id", "pid", "id", "_id")
NAME_KEYS = (*DOCNO, "document_id", "passage_id", "document", "passage", "doc", "index")


def read_names(text: str, docnos: Sequence[str | None]) -> list[str]:
    """Return the docnos or positions that an answer ranks, best first; none if it has no form that is read."""
    text = THOUGHTS.sub("", text)
    for block in (ANSWER, BOXED, FENCE):
        found = [*block.finditer(text)]
        if len({match[1] for match in found}) == 1:
            if OTHER.search(text[: found[0].start()].rstrip().rpartition("\n")[2]):
                return []  # "The scores:"
            text = found[0][1]
    candidates = Candidates(docnos)
    if all(docno == _narrow(docno) for docno in candidates.docnos):
        text = _narrow(text)
    if (in_json := _read_json(text, candidates)) is not None:
        return in_json
    for read in (_read_chains, _read_lists):
        readings = [reading for reading in read(text, candidates) if reading.names]
        if any(len(reading.names) >= min(2, len(docnos)) for reading in readings):
            return _choose(readings)
    return []


def _narrow(text: str) -> str:
    """Replace full-width characters."""
    return unicodedata.normalize("NFKC", text.translate(WIDE))


class Reading(NamedTuple):
    """Names in a text that may be its ranking."""

    names: list[str]
    is_ranking: bool  # whether nothing speaks against it


def _choose(readings: Sequence[Reading]) -> list[str]:
    """Return the ranking with all names of all readings; none if there are two."""
    names = {name for reading in readings for name in reading.names}
    complete = [reading for reading in readings if {*reading.names} == names]
    is_clear = complete and all(reading == Reading(complete[0].names, True) for reading in complete)
    return complete[0].names if is_clear else []


class Candidates:
    """Finds the names of a query's candidates in text: docnos, or positions as plain numbers."""

    def __init__(self, docnos: Sequence[str | None]) -> None:
        self.in_order = [*docnos]
        self.docnos = {docno for docno in docnos if docno}
        folded = {docno.casefold(): docno for docno in self.docnos}
        self.folded = folded if len(folded) == len(self.docnos) else {}
        self.max_length = max(map(len, self.docnos), default=0)
        # "Document 2" may be the docno "doc-2".
        self.has_labels = any(map(LABELLED.match, self.docnos))

    def docno(self, text: str) -> str | None:
        """Return the docno that a text is, maybe in another case."""
        return text if text in self.docnos else self.folded.get(text.casefold())

    @cached_property
    def within(self) -> re.Pattern[str]:
        """Finds docnos that aren't numbers."""
        names = "|".join(re.escape(docno) for docno in sorted(self.docnos, reverse=True) if not docno.isdecimal())
        return re.compile(rf"(?<![a-zA-Z0-9])(?:{names})(?![a-zA-Z0-9])" if names else r"(?!)")

    def whole(self, text: str) -> str | None:
        """Return the name that a text is, with brackets, quotation marks or a word such as "Passage"; None if none."""
        names = [text.strip(), text.strip(MARKUP + "[]")]
        for _ in range(MAX_LABELS):
            if label := LABEL.match(names[-1]):
                names.append(names[-1][label.end() :].strip(MARKUP + "[]"))
        for name in names:
            if docno := self.docno(name):
                return docno
        if NUMBER.fullmatch(names[-1]):
            return None if len(names) > 2 and self.has_labels else _position(names[-1])
        return names[1] if UNKNOWN.fullmatch(names[1]) and not self.within.search(names[1]) else None

    def at_end(self, text: str) -> str | None:
        """Return the name that a text is or ends with: one in brackets, or after words such as "The ranking:"."""
        if name := self.whole(text):
            return name
        text = text.rstrip(MARKUP)
        lead, brackets, rest = text.rpartition("[") if text.endswith("]") else ("", "", "")
        if "[" in lead or not brackets:
            lead, rest = _split_lead(text)
        return None if OTHER.search(lead) or self.within.search(lead) else self.whole(rest)

    def at_start(self, text: str, *, labels: int = MAX_LABELS) -> tuple[str | None, str]:
        """Return the name that a text begins with, maybe after words such as "Passage", and what follows."""
        for end in range(min(self.max_length, len(text)), 0, -1):
            if (docno := self.docno(text[:end])) and not text[end : end + 1].isalnum():
                return docno, text[end:]
        if brackets := BRACKETS.match(text):
            return self.whole(brackets[0]), text[brackets.end() :]
        if labels and (label := LABEL.match(text)):
            name, rest = self.at_start(text[label.end() :].lstrip(MARKUP), labels=labels - 1)
            return (None if self.has_labels and name and name.isdecimal() else name), rest
        if number := NUMBER.match(text):
            return _position(number[1]), text[number.end() :]
        token, _, rest = text.partition(" ")
        return self.whole(token.rstrip(MARKUP)), rest

    def lists(self, names: Sequence[str]) -> bool:
        """Whether names are those of the first candidates in their order."""
        n = len(names)
        orders = ([*self.in_order[:n]], *([str(first + i) for i in range(n)] for first in (0, 1)))
        return [*names] in orders

    def are_docnos(self, names: Sequence[str]) -> bool:
        """Whether names can't be positions."""
        return any(not name.isdecimal() or (name in self.docnos and int(name) > len(self.in_order)) for name in names)

    def mentioned(self, text: str, are_docnos: bool) -> set[str]:
        """Return the docnos, or the positions in brackets, that a text names."""
        if are_docnos:
            return {*self.within.findall(text)}
        return {name for found in BRACKETS.findall(text) if (name := self.whole(found)) and name.isdecimal()}


def _position(number: str) -> str:
    return number.lstrip("0") or "0"


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


def _is_heading(text: str) -> bool:
    """Whether a ranking may follow a line."""
    if text.lstrip().startswith("|"):
        first, *others = text.strip(" |").split("|")
        return bool(re.match(r"\W*(?:#|rank|no\b)", first, re.IGNORECASE)) and "rank" not in "".join(others).lower()
    text = BEST_FIRST.sub("", text)
    return not text.strip() or bool(HEADING.search(text) and not OTHER.search(text))


# ---- JSON


def _read_json(text: str, candidates: Candidates) -> list[str] | None:
    """Read `["d2", "d1"]`, `{"ranking": [2, 1]}` or `[{"rank": 1, "id": 2}]`, also one object per line."""
    start, end = min((i for i in map(text.find, "[{") if i >= 0), default=0), max(map(text.rfind, "]}")) + 1
    lead = text[:start].strip()
    if text[end:].strip(MARKUP) or (lead and lead[-1] != ":"):
        return None
    lines = ",".join(line.strip().rstrip(",") for line in text[start:end].splitlines() if line.strip())
    for part in (text[start:end], f"[{lines}]" if "},{" in lines else ""):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            value = {key.replace("_", " "): item for key, item in value.items() if isinstance(item, list | str)}
            rankings = [item for key, item in value.items() if HEADING.search(key) and not OTHER.search(key)]
            lists = [item for item in value.values() if isinstance(item, list)]
            is_clear = len(rankings or lists) == 1 and (rankings or not any(map(OTHER.search, value)))
            value = (rankings or lists)[0] if is_clear else []
            if isinstance(value, str):
                return read_names(value, candidates.in_order)
        if isinstance(value, list):
            ids = _ids(value) if _is_heading(lead.splitlines()[-1] if lead else "") else []
            return _alike([candidates.whole(name) for name in ids])
    return None


def _ids(values: list[Any]) -> list[str]:
    """Return what names the candidates, in the order of their ranks; nothing if scores have another order."""
    if not values or not all(isinstance(value, dict) for value in values):
        return [str(value) for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
    objects = [{key.casefold(): item for key, item in value.items()} for value in values]
    name_key = next((key for key in NAME_KEYS if all(isinstance(value.get(key), str | int) for value in objects)), None)
    if name_key is None:
        return []
    keys = [key for key in objects[0] if key != name_key]
    for key in sorted(keys, key=lambda key: RANK_KEY.fullmatch(key) is None):  # ranks first
        numbers = [_number(value.get(key)) for value in objects]
        ranks = [number for number in numbers if number is not None]
        if RANK_KEY.fullmatch(key) and len({*ranks}) == len(objects):
            return [str(objects[i][name_key]) for i in np.argsort(ranks)]
        if not _falls(numbers) and (None not in numbers or re.search("scor|relevan|rank|rating|grade|label", key)):
            return []
    return [str(value[name_key]) for value in objects]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _falls(numbers: Sequence[float | None]) -> bool:
    """Whether scores, of which none is missing, fit the order of a ranking."""
    return all(a is not None and b is not None and a >= b for a, b in pairwise(numbers))


# ---- chains


def _read_chains(text: str, candidates: Candidates) -> Iterator[Reading]:
    """Read "[2] > [1]" within a text or over several lines."""
    lines = [*filter(None, map(str.strip, text.splitlines()))]
    joined = lines[:1]
    for last, line in pairwise(lines):
        continues = candidates.at_end(ARROW.split(last)[-1]) if ARROW.match(line) else ARROW.match(last[-1])
        if continues and not _item(line, candidates):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    for i, line in enumerate(joined):
        parts = ARROW.split(line)
        is_cut_off = i == len(joined) - 1 and "[" in parts[-1] and "]" not in parts[-1]
        parts = parts[0 if parts[0].strip(MARKUP) else 1 : -1 if is_cut_off or not parts[-1].strip(MARKUP) else None]
        if len(parts) < 2 or not re.search("[>≻→]", line):  # "[1] = [2]" is no ranking
            continue
        last_name, rest = candidates.at_start(parts[-1].lstrip(MARKUP))
        names = _alike([candidates.at_end(parts[0]), *map(candidates.whole, parts[1:-1]), last_name])
        if names:
            is_example = candidates.lists(names) and len(names) < len(candidates.in_order)  # "the form is [1] > [2]"
            has_scores = len({"[" in part for part in parts}) > 1  # "[2] = 9"
            in_last = candidates.mentioned(parts[-1], candidates.are_docnos(names))
            has_others = not in_last <= {*names}  # "[2] > [1], [3]"
            has_scores |= "[" not in line and bool(re.match(r"\s*\w", rest))  # "5 > 3 is true"
            yield Reading(names, not (is_example or has_scores or has_others))


# ---- lists


class Item(NamedTuple):
    """A line of a rank and a name, e.g. "1. Passage 2", "[1] d2" or "| 1 | d2 |"."""

    rank: int
    name: str | None  # None if a line has a rank and anything else
    comment: str


def _read_lists(text: str, candidates: Candidates) -> Iterator[Reading]:
    """Read numbered lists, lines of several names, and consecutive lines of one name."""
    lines = [line for line in text.splitlines() if line.strip(MARKUP)]
    items = [_item(line, candidates) for line in lines]
    mentioned = {are_docnos: candidates.mentioned(text, are_docnos) for are_docnos in (False, True)}

    def read(block: Sequence[int], names: list[str], is_ranking: bool = True, has_comments: bool = False) -> Reading:
        """Read names in some of the lines; the others may say that they aren't the ranking."""
        is_listing = candidates.lists(names) and (has_comments or len(block) < len(lines))
        heading = lines[block[0] - 1] if block[0] else ""
        has_all = not names or mentioned[candidates.are_docnos(names)] <= {*names}
        return Reading(names, is_ranking and has_all and _is_heading(heading) and not is_listing)

    listed: set[int] = set()
    for run in _runs(items):
        listed.update(run)
        found = [item for i in run if (item := items[i])]
        scores = [SCORE.findall(item.comment) for item in found]
        fits = any(len(numbers) != 1 for numbers in scores) or _falls([float(*numbers) for numbers in scores])
        has_comments = any(item.comment.strip(MARKUP) for item in found)
        yield read(run, _alike([item.name for item in found]), fits, has_comments)
    block: list[int] = []
    column: list[str] = []
    for i in range(len(lines) + 1):
        row = _row(lines[i], candidates) if i < len(lines) and i not in listed else []
        if len(row) == 1:
            block.append(i)
            column += row
            continue
        if column:
            yield read(block, _alike(column))
        if row:
            yield read([i], row)
        block, column = [], []


def _item(line: str, candidates: Candidates) -> Item | None:
    found = COUNTER.match(line)
    docno, _ = candidates.at_start(line.lstrip(MARKUP))
    if found is None or ARROW.match(found["rest"]) or (docno in candidates.docnos and not docno.isdecimal()):
        return None
    sign, rest = found["sign"], found["rest"].lstrip(MARKUP)
    # After "1." or "Rank 1:", a plain number is a name; after "[1]" or "1:", it may be a score.
    is_ordinal = bool(found["ordinal"]) or sign.strip()[:1] in (".", ")")
    name, comment = candidates.at_start(rest)
    if name is None or not END.match(comment):
        return Item(int(found["number"]), None, "") if is_ordinal else None
    if not is_ordinal and not candidates.are_docnos([name]) and (rest[0].isdigit() or "]" in sign):
        return None
    return Item(int(found["number"]), name, comment)


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
    line = (rest if lead and _is_heading(lead) else line).replace("][", "] [").strip(MARKUP)
    for parts in ([line], re.split("[,;]", line) if re.search("[,;]", line) else line.split()):
        if names := _alike([candidates.whole(part) for part in parts if part.strip()]):
            return names
    return []
