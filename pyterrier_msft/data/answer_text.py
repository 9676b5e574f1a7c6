"""The ranking in the text of an LLM's answer: names of candidates, i.e. docnos or positions, best first.

Docnos are replaced with marks first, so that their digits can't be mistaken for positions. Then readers are tried in
order: JSON, numbered lists, and running text with chains ("[2] > [1]"), lines or a sentence. A reader returns None if
the text doesn't have its form, and an empty list if it has but allows several rankings.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# All patterns take linear time: no two neighbouring repetitions match the same character.
TAG = "(?:think(?:ing)?|thought|reasoning)"
# Of a reasoning model, whose beginning or end may be cut off.
THOUGHTS = re.compile(rf"<{TAG}>.*?</{TAG}>|^(?:(?!<{TAG}>).)*?</{TAG}>|<{TAG}>.*", re.DOTALL)
FENCE = re.compile(r"```([^`]+)```")
XML_TAG = re.compile(r"</?[^\W\d]\w*>")
REMARK = re.compile(r"\([^()]*\)")

# Private-use characters, one per docno. A docno without a digit may be a word of a sentence, and has another block.
ID_MARKS, WORD_MARKS = range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)
MARK = re.compile(f"[{chr(ID_MARKS[0])}-{chr(WORD_MARKS[-1])}]")
ID_MARK = re.compile(f"[{chr(ID_MARKS[0])}-{chr(ID_MARKS[-1])}]")
IN_ANGLES = re.compile(rf"<\s*({MARK.pattern}|\d+)\s*>")
BRACKETED_MARK = re.compile(rf"\[\s*{MARK.pattern}\s*\]")
BRACKETED_WORD = r"\[[^\W\d][^\[\]]*\]"  # an unknown docno, if others are in brackets
POSITION = re.compile(r"\[\s*(\d+)\s*\]")
POSITIONS = re.compile(r"\[([\d\s,;]+)\]")  # tied: "[1, 3] > [2]"
NUMBER = re.compile(r"(?<![\w.])(?<!\w[-/:])\d+(?!\w|%|[-./:]\w)")  # isn't part of a word, of 0.5 or of 7/10
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+")
SCORE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:/\d+)?")
WORD = re.compile(r"[^\W_]+")

# A docno ends at a space or comma; if that isn't a docno, at a bracket, quote or arrow; or else at a slash or colon.
DOCNO_PATTERNS = tuple(
    map(re.compile, (r"\[[^\[\]]+\]|[^\[\]]+", r"[^\s,;|、，；]+", r"[^<>=≻→—–()\[\]{}\"'`“”‘’]+", r"[^/:]+"))
)  # fmt: skip
PUNCTUATION = " \t\r\n\"'`“”‘’()[]{}<>.:,;*_#!?…"

COUNTER = re.compile(
    r"(?P<bullet>[ \t>*#|\[(•\"'`-]*)(?:(?P<word>rank(?:ed|ing)?|place|number|no|top)\b[ \t.#:*\[(]*)?"
    rf"(?P<number>\d{{1,5}})(?!\d|\.\d)(?:st|nd|rd|th)?(?P<sign>[^\w(\[{MARK.pattern[1:-1]}]*)(?P<rest>.*)",
    re.IGNORECASE,
)
RANK_IN_HEADER = re.compile(r"[ \t]*\|?[^|\n]*[^|\s][^|\n]*\|[^\n]*\brank", re.IGNORECASE)
NOT_A_NAME = re.compile(r"scor|relevan|rating|rated|grade|point|confiden|rank", re.IGNORECASE)
RANKS, SCORES = ("rank", "position", "order"), ("score", "relevance_score", "relevance")  # keys in JSON
DOCNO = ("docno", "docid", "doc_id", "pid", "id", "_id")
NAMES = (*DOCNO, "document_id", "passage_id", "document", "passage", "doc", "index")
MAX_LABEL_WORDS = 2  # before a name, e.g. "Passage ID 2"
ARROW, BACKWARDS = re.compile("[>≻→]"), re.compile("[<≺←]")
CHAIN_END = re.compile(r"[.:!?](?!\w)")
SENTENCE_END = re.compile(r"(?<!\d)[.!?]\s|\n")
AND = re.compile(r"\b(?:and|then)\b", re.IGNORECASE)
MIN_IDS = 2
# Before a number of documents: "The 3 best ones are 5, 2, 9".
COUNT_WORDS = {"the", "top", "of", "all", "best", "these"}
CONJUNCTIONS = ((), ("and",), ("then",), ("and", "then"))


class DocnoMarks:
    """Replace the docnos in a text with marks: characters that no text has."""

    def __init__(self, docnos: Iterable[str | None]) -> None:
        # A docno that is a number can't be told from a position here.
        names = [docno for docno in dict.fromkeys(docnos) if docno is not None and not docno.isdecimal()]
        self.docnos: dict[str, str] = {}
        for block, is_id in ((ID_MARKS, True), (WORD_MARKS, False)):
            block_names = [name for name in names if _has_digit(name) == is_id]
            self.docnos |= {chr(i): name for i, name in zip(block, block_names, strict=False)}
        exact = {name: mark for mark, name in self.docnos.items()}
        stripped = _distinct((name.strip(PUNCTUATION), mark) for name, mark in exact.items())
        folded = _distinct((key.casefold(), mark) for key, mark in {**stripped, **exact}.items() if _has_digit(key))
        self._tables = ({**stripped, **exact}, folded)

    def mark(self, text: str) -> str:
        """Return the text with marks; docnos in another case are recognized if there are none in the right case."""
        text = MARK.sub("", text)
        for table, fold in zip(self._tables, (False, True), strict=True):
            marked = _mark(text, table, fold, DOCNO_PATTERNS)
            if marked != text:
                return marked
        return text


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


def _distinct(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the marks of docnos by a key, without keys of several docnos, and without numbers."""
    marks: dict[str, set[str]] = {}
    for key, mark in pairs:
        marks.setdefault(key, set()).add(mark)
    return {key: min(found) for key, found in marks.items() if len(found) == 1 and key and not key.isdecimal()}


def _mark(text: str, table: dict[str, str], fold: bool, patterns: tuple[re.Pattern[str], ...]) -> str:
    """Replace the docno that the text is, or those of its parts: the longest parts that are docnos."""
    for key in (text.strip(), text.strip(PUNCTUATION)):
        if mark := table.get(key.casefold() if fold else key):
            return text.replace(key, mark, 1)
    if not patterns:
        return text
    return patterns[0].sub(lambda part: _mark(part.group(), table, fold, patterns[1:]), text)


def read_names(text: str, docnos: Sequence[str | None]) -> list[str]:
    """Return the docnos or positions that an answer ranks, best first; none if the answer is ambiguous."""
    text, marks = THOUGHTS.sub("", text), DocnoMarks(docnos)
    known = {*map(str, range(len(docnos) + 1)), *(docno for docno in docnos if docno is not None)}
    names = _read_json(text, marks, known)
    if names is None:
        marked = XML_TAG.sub(" ", IN_ANGLES.sub(r" \1 ", marks.mark(text)))
        marked = POSITIONS.sub(lambda tied: " ".join(f"[{n}]" for n in re.findall(r"\d+", tied.group())), marked)
        names = _read_numbered_list(marked, known)
        if names is None:
            names = _read_running_text(marked, known)
    return [marks.docnos.get(name, name) for name in names or ()]


# ---- JSON


def _read_json(text: str, marks: DocnoMarks, known: set[str]) -> list[str] | None:
    """Read `["d2", "d1"]`, `{"ranking": [2, 1]}` or `[{"rank": 1, "id": 2}]`, also in a code block or in lines."""
    blocks = FENCE.findall(text)
    body = blocks[-1] if blocks else text
    start, end = min((i for i in (body.find("["), body.find("{")) if i >= 0), default=0), max(map(body.rfind, "]}"))
    lines = ",".join(line.strip().rstrip(",") for line in body.splitlines() if line.strip())
    for part in (body[start : end + 1], f"[{lines}]" if "},{" in lines else ""):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        items = _items_of_json(value)
        if items is not None:
            outside = MARK.search(marks.mark(body[:start] + body[end + 1 :])) or POSITION.search(body[end + 1 :])
            if outside and not blocks and len(items) == 1:
                return None  # "[2], and then d1"
            return _names_of_items([marks.mark(item) for item in items], known, is_ordinal=True) or []
    return None


def _items_of_json(value: Any) -> list[str] | None:
    """Return the items of a ranking, each of which names a candidate; [] if it is ambiguous, None if it isn't one."""
    if isinstance(value, dict):
        if all(isinstance(item, str) and not item.isdecimal() for item in value.values()) and [*value] == [
            str(i) for i in range(1, len(value) + 1)
        ]:
            return [*value.values()]
        lists = [items for items in map(_items_of_json, value.values()) if items is not None]
        return (lists[0] if len(lists) == 1 else []) if lists else None
    if not isinstance(value, list):
        return None
    if value and all(isinstance(item, dict) for item in value):
        return _items_of_objects(value)
    if all(isinstance(item, list) and len(item) == 1 for item in value):
        value = [item[0] for item in value]
    return [*map(str, value)] if all(map(_is_id, value)) else []


def _items_of_objects(objects: list[dict[str, Any]]) -> list[str]:
    """Return the names in a list of objects, in the order of their ranks; none if their scores have another order."""
    objects = [{key.casefold(): value for key, value in item.items()} for item in objects]
    key = next((name for name in NAMES if all(_is_id(item.get(name)) for item in objects)), None)
    if key is None:
        return []
    for name in (*RANKS, *SCORES):
        values = [value for item in objects if isinstance(value := item.get(name), int | float)]
        if name == key or len(values) < len(objects):
            continue
        if name in RANKS and len({*values}) == len(values):
            objects = sorted(objects, key=lambda item: item[name])
            break
        if values != sorted(values, reverse=name in SCORES):
            return []
    return [str(item[key]) for item in objects]


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


# ---- numbered lists


@dataclass(frozen=True)
class NumberedList:
    """Consecutive numbers at the beginnings of lines."""

    lines: range
    items: list[str]  # what follows the numbers
    is_ordinal: bool  # the numbers can only be ranks, e.g. "1." or "Rank 1"; not so "[1] 7", which may be a score


def _read_numbered_list(text: str, known: set[str]) -> list[str] | None:
    """Read lines of a rank and a name, e.g. "1. Passage 2", "[1] d2" or "| 1 | d2 |".

    A ranking before or after the lists counts if it has all their names, as they may only explain it.
    """
    lists = [*_numbered_lists(text)]
    readings = [_names_of_items(found.items, known, found.is_ordinal) for found in lists]
    if not any(readings):
        return [] if any(names == [] for names in readings) else None
    lines, first, last = text.splitlines(), lists[0].lines[0], lists[-1].lines[-1]
    if any(RANK_IN_HEADER.match(line) for line in lines[max(first - 2, 0) : first]):
        return []
    before, after = (
        names if names and {*names}.issuperset(*(reading or () for reading in readings)) else []
        for names in (_read_running_text("\n".join(part), known) for part in (lines[:first], lines[last + 1 :]))
    )
    ranking = _last_complete([names for names in (before, *readings, after) if names])
    if before and not after and ranking != before and not _counts_up(before):
        return []  # the list may be the ranking, or explain it in another order
    return ranking


def _numbered_lists(text: str) -> Iterator[NumberedList]:
    """Find the numbered lists in a text; none if a line has a number out of order."""
    lists: list[list[tuple[int, re.Match[str]]]] = []
    for i, line in enumerate(text.splitlines()):
        found = COUNTER.match(line)
        if found is None or (not found["sign"] and found["rest"][:1].isalnum()):
            continue
        if lists and _continues(lists[-1][-1][1], found):
            lists[-1].append((i, found))
        elif not found["word"] and not found["sign"].strip() and found["rest"][:1].isalpha():
            continue  # a sentence, e.g. "3 passages are relevant"
        elif int(found["number"]) in (0, 1):
            lists.append([(i, found)])
        else:
            return
    for matches in lists:
        if len(matches) > 1:
            first = matches[0][1]
            ordinal = first["word"] or "#" in first["bullet"] or first["sign"].strip()[:1] in (".", ")")
            yield NumberedList(range(matches[0][0], matches[-1][0] + 1), [m["rest"] for _, m in matches], bool(ordinal))


def _continues(last: re.Match[str], line: re.Match[str]) -> bool:
    """Whether a line has the number that follows the last one, and the same signs."""
    signs = [(found["word"] or "", found["sign"].strip()) for found in (last, line)]
    return int(line["number"]) == int(last["number"]) + 1 and signs[0] == signs[1] and not _is_preference(signs[0][1])


def _is_preference(sign: str) -> bool:
    return ">" in sign and not {"-", "="} & {*sign}  # "1 > 2"


def _names_of_items(items: Sequence[str], known: set[str], is_ordinal: bool) -> list[str] | None:
    """Return the candidate that each item names: a mark, a position in brackets, or a number after the same words."""
    for pattern in (MARK, POSITION):
        found = [pattern.search(item) for item in items]
        if sum(map(bool, found)) * 2 > len(items):
            # An item without a known name is an unknown document.
            return [_name(match) if match else item for match, item in zip(found, items, strict=True)]
    cleaned = [clean if NUMBER.search(clean := REMARK.sub(" ", item)) else item for item in items]
    found = [NUMBER.search(item) for item in cleaned]
    names = [_name(match) for match in found if match]
    prefixes = {" ".join(WORD.findall(item[: m.start()])) for m, item in zip(found, cleaned, strict=True) if m}
    if not names or len(names) < len(items) or len(prefixes) > 1 or NOT_A_NAME.search(min(prefixes)):
        return None
    if any(len(NUMBER.findall(item)) > 1 and not re.search(r"[^\W\d]", item) for item in cleaned):
        return []  # one of them is a score
    return names if is_ordinal or (len({*names}) == len(names) and known.issuperset(names)) else []


# ---- running text


@dataclass(frozen=True)
class Mentions:
    """The names in a text and what is between them."""

    names: list[str]
    gaps: list[str]  # before, between and after the names
    clean_gaps: list[str]  # without remarks in parentheses
    are_numbers: bool  # neither docnos nor in brackets

    @classmethod
    def of_text(cls, text: str) -> "Mentions":
        """Find the docnos in a text, or else positions in brackets, or else numbers."""
        clean = REMARK.sub(lambda remark: " " * len(remark.group()), text)
        if not any(pattern.search(clean) for pattern in (MARK, POSITION, NUMBER)):
            clean = text  # all names may be in parentheses
        marks, positions, numbers = (pattern.findall(clean) for pattern in (MARK, POSITION, NUMBER))
        if not marks and len({*MARK.findall(text)}) > 1 and _counts_up(positions or numbers):
            clean, marks = text, MARK.findall(text)  # "Rank 1 (d2), Rank 2 (d1)"
        pattern, n_marks, n_positions = POSITION if positions else NUMBER, len({*marks}), len({*positions})
        if BRACKETED_MARK.search(text):
            pattern = re.compile(f"{MARK.pattern}|{BRACKETED_WORD}")
        elif positions:
            # A few docnos may be words beside the positions, or explain them.
            if n_marks >= max(n_positions, MIN_IDS) and any(map(ID_MARK.match, marks)):
                pattern = MARK
        elif n_marks > 1 or (marks and len(numbers) <= 1):
            pattern = MARK
        found = [*pattern.finditer(clean)]
        ends = [(0, 0), *(match.span() for match in found), (len(text), len(text))]
        gaps, clean_gaps = ([part[a:b] for (_, a), (b, _) in pairwise(ends)] for part in (text, clean))
        return cls([*map(_name, found)], gaps, clean_gaps, pattern is NUMBER)

    def chains(self) -> list[range]:
        """Return the runs of names with only signs, the same word or "and" between them, and their parts by line."""
        runs: list[list[int]] = []
        label: tuple[str, ...] = ()
        for i, gap in enumerate(self.clean_gaps[:-1]):
            words = tuple(map(str.casefold, WORD.findall(gap)))
            is_link = len(words) <= MAX_LABEL_WORDS if ARROW.search(gap) else words in (*CONJUNCTIONS, label)
            if i and is_link and not CHAIN_END.search(gap):
                runs[-1].append(i)
            else:
                runs.append([i])
                label = words[-1:]
        chains = []
        for run in runs:
            breaks = [i for i in run[1:] if "\n" in self.clean_gaps[i] and not self.has_arrow([i - 1, i])]
            lines = [range(a, b) for a, b in pairwise([run[0], *breaks, run[-1] + 1])]
            chains += [range(run[0], run[-1] + 1), *(lines if breaks else [])]
        chains = [chain for chain in chains if len(chain) > 1]
        return [chain for chain in chains if self._is_uniform(chain)] if self.are_numbers else chains

    def has_arrow(self, chain: Sequence[int]) -> bool:
        """Whether a chain has a ">"."""
        return any(ARROW.search(self.clean_gaps[i]) for i in chain[1:])

    def _is_uniform(self, chain: Sequence[int]) -> bool:
        """Whether a chain has an arrow, the same signs between all names, or all its names in a line or on their own.

        If not, it may be a table, such as one of ranks and names, or of names and scores.
        """
        gaps = [self.clean_gaps[i] for i in chain[1:]]
        if any(map(NOT_A_NAME.search, gaps)):
            return False  # "Rank 1 (7), Rank 2 (5)"
        signs = {re.sub(",+", ",", re.sub(r"[\s\w*\"'`-]", "", AND.sub(",", gap))) for gap in gaps}
        return self.has_arrow(chain) or (
            len(signs) == 1 and ("" not in signs or len({"\n" in gap for gap in gaps}) == 1)
        )

    def line_starts(self) -> list[int]:
        """Return the names that begin lines, after the same words or none."""
        prefixes = {
            i: WORD.findall(gap.rpartition("\n")[2])
            for i, gap in enumerate(self.clean_gaps[:-1])
            if "\n" in gap or i == 0
        }
        words = [*prefixes.values()][-1]
        return [i for i, prefix in prefixes.items() if prefix == words and len(words) <= MAX_LABEL_WORDS]

    def with_sentence(self, chain: Sequence[int]) -> list[int]:
        """Return a chain with the names before it in its sentence, and other names after it."""
        start = chain[0]
        while start > 0 and not SENTENCE_END.search(self.clean_gaps[start]):
            start -= 1
        indices, seen = [], {self.names[i] for i in chain}
        for i in range(start, len(self.names)):
            if i in chain or self.names[i] not in seen:
                indices.append(i)
                seen.add(self.names[i])
        return indices

    def are_in_sentence(self) -> bool:
        """Whether all names are in one sentence, and aren't words of it."""
        are_words = all(MARK.match(name) and not ID_MARK.match(name) for name in self.names)
        return not any(map(SENTENCE_END.search, self.clean_gaps[1:-1])) and (len(self.names) == 1 or not are_words)

    def has_strays(self, chain: Sequence[int]) -> bool:
        """Whether a number beside a chain may be a document, rather than the number of documents in it."""
        ranked = {self.names[i] for i in chain}
        return any(
            self.names[i] != str(len(ranked)) or not COUNT_WORDS & {*WORD.findall(self.clean_gaps[i].casefold())[-1:]}
            for i in range(len(self.names))
            if self.names[i] not in ranked
        )

    def is_listing(self, indices: Sequence[int]) -> bool:
        """Whether the names are those of all documents in their order, with words or numbers between them."""
        numbers = [self.names[i] for i in indices]
        between = [DECIMAL.sub("", self.clean_gaps[i]) for i in range(indices[0] + 1, indices[-1] + 1)]
        return _counts_up(numbers) and any(map(WORD.search, between))

    def contradict_scores(self, indices: Sequence[int]) -> bool:
        """Whether each name is followed by a single number, and the numbers are out of order."""
        gaps = [self.gaps[i + 1] for i in indices]
        found = [SCORE.findall(gap) for gap in [*gaps[:-1], gaps[-1].partition("\n")[0]]]
        scores = [float(values[0].partition("/")[0]) for values in found if len(values) == 1]
        is_last_missing = not found[-1]
        return len(scores) + is_last_missing == len(found) and scores not in (
            sorted(scores), sorted(scores, reverse=True)
        )  # fmt: skip


def _read_running_text(text: str, known: set[str]) -> list[str] | None:
    """Read a chain, e.g. "[2] > [1]" or "2, 1", lines that begin with names, or a sentence with docnos."""
    mentions = Mentions.of_text(text)
    if not mentions.names:
        return None
    if len(mentions.names) == 1 and MARK.search(text) and not MARK.match(mentions.names[0]):
        return []  # "[1] d7"
    if any(BACKWARDS.search(gap) for gap in mentions.clean_gaps[1:-1]):
        return []
    chains = mentions.chains()
    chosen = _choose(mentions, chains)
    if not chosen or (chosen not in chains and mentions.is_listing(chosen)):
        return []
    if not mentions.has_arrow(chosen) and mentions.contradict_scores(chosen):
        return []
    return [mentions.names[i] for i in chosen]


def _choose(mentions: Mentions, chains: list[range]) -> Sequence[int]:
    """Return the names of a text that are its ranking; none if there are several rankings, or names beside it."""
    names, lines = mentions.names, mentions.line_starts()
    arrows = [chain for chain in chains if mentions.has_arrow(chain)]
    everything = range(len(names))
    parts: list[Sequence[int]] = [*chains]
    if len(lines) > 1 and (lines == [*everything] or not mentions.are_numbers):  # else: a table of numbers
        parts.insert(0, lines)
    named = {*names}
    complete = [part for part in parts if len(part) == len(named) and {names[i] for i in part} == named]
    if complete:
        return max(complete, key=lambda part: (mentions.has_arrow(part) and part in chains, part[0]))
    if len({tuple(names[i] for i in chain) for chain in arrows}) == 1:
        return arrows[0] if mentions.are_numbers else mentions.with_sentence(arrows[0])
    if mentions.are_numbers:
        if len(parts) == 1 and not mentions.has_strays(parts[0]):
            return parts[0]
        return everything if len(WORD.findall("".join(mentions.gaps))) < MAX_LABEL_WORDS and len(names) == 1 else ()
    if len(named) == len(names) and mentions.are_in_sentence():
        return everything
    if len(parts) == 1 and named == {names[i] for i in parts[0]}:
        return parts[0]
    return ()


def _last_complete(parts: list[list[str]]) -> list[str]:
    """Return the only ranking, or the last that has all names of all; one that counts up only if there is no other."""
    if len(parts) == 1:
        return parts[0]
    named = {name for part in parts for name in part}
    complete = [part for part in parts if len(part) == len(named) and {*part} == named]
    return ([part for part in complete if not _counts_up(part)] or complete or [[]])[-1]


def _counts_up(names: Sequence[str]) -> bool:
    """Whether names are the positions of all documents in their order."""
    return any([*names] == [str(first + i) for i in range(len(names))] for first in (0, 1))


def _name(match: re.Match[str]) -> str:
    """Return the mark, the number without leading zeros, or the unknown docno."""
    name = match[match.lastindex or 0]
    if mark := MARK.search(name):
        return mark.group()
    return name.lstrip("0") or "0" if name.isdecimal() else name
