"""What the answers of a teacher name: docnos, or positions of candidates that count from 1 or from 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyterrier_msft.data.answer_text import read_names
from pyterrier_msft.notices import warn

MAX_STRAYS = 0.02  # share of answers in which an LLM may name a position that doesn't exist


@dataclass(frozen=True)
class Answer:
    """A teacher's answer: entries that name candidates, best first."""

    docnos: Sequence[str | None]  # of the candidates
    entries: Sequence[str]  # positions or docnos
    preference: int  # above 0: the entries fit docnos better; below 0: positions; 0: both fit equally
    are_strings: bool = False  # whether the file has strings as entries, rather than integers

    @classmethod
    def of_text(cls, text: str, docnos: Sequence[str | None]) -> "Answer":
        """Find the docnos or positions in an LLM's text; numbers are positions unless they fit docnos better."""
        names, known, positions = read_names(text, docnos), {*docnos}, {*_positions(len(docnos) + 1, 0)}
        return cls(docnos, names, sum(name in known for name in names) - sum(name in positions for name in names))

    @classmethod
    def of_list(cls, entries: Sequence[str | int], docnos: Sequence[str | None]) -> "Answer":
        """Take the entries of a permutation, where "7" may be a position or a docno."""
        names, known, positions = [*map(str, entries)], {*docnos}, {*_positions(len(docnos), 1)}
        preference = sum(name in known for name in names) - sum(name in positions for name in names)
        return cls(docnos, names, preference, all(isinstance(entry, str) for entry in entries))

    def is_complete(self, first: int) -> bool:
        """Whether the entries are all positions, counted from `first`."""
        return {*self.entries} == {*_positions(len(self.docnos), first)}

    def by_docno(self) -> list[int | None]:
        """Return the index of each entry's candidate, None if it is unknown; of equal docnos, the first is used."""
        known = {docno: i for i, docno in reversed([*enumerate(self.docnos)])}
        return [known.get(entry) for entry in self.entries]

    def by_position(self, first: int) -> list[int | None]:
        """Return the index of each entry's candidate, None if it is unknown; positions count from `first`.

        All are unknown in a complete permutation that counts from another number.
        """
        if self.is_complete(1 - first):
            return [None] * len(self.entries)
        known = {position: i for i, position in enumerate(_positions(len(self.docnos), first))}
        return [known.get(entry) for entry in self.entries]


def resolve(answers: Mapping[int, Answer], path: str | Path) -> dict[int, list[int | None]]:
    """Return the indices of candidates that the answers of a file name; answers are given by line number.

    The file decides what a single answer can't tell: whether positions count from 1 or from 0, and whether entries that
    fit both are docnos.
    """
    votes = sum((answer.preference > 0) - (answer.preference < 0) for answer in answers.values())

    def names_docnos(answer: Answer) -> bool:
        return (answer.preference or votes or int(answer.are_strings)) > 0

    first = _first_position({i: answer for i, answer in answers.items() if not names_docnos(answer)}, path)
    return {
        i: answer.by_docno() if names_docnos(answer) else answer.by_position(first) for i, answer in answers.items()
    }


def _first_position(answers: Mapping[int, Answer], path: str | Path) -> int:
    """Return what the positions in a file count from, 1 or 0: complete permutations tell, else 0 or the last one.

    Neither does if it is as rare as an LLM's mistakes.
    """
    answers = {i: answer for i, answer in answers.items() if answer.entries and len(answer.docnos) > 1}
    from_0, from_1 = ([i for i, answer in answers.items() if answer.is_complete(first)] for first in (0, 1))
    if len(from_0) + len(from_1) > MAX_STRAYS * len(answers):
        if len(from_0) == len(from_1):
            raise ValueError(
                f"{path}: positions must be counted from 1 in all lines, or from 0 in all; got 1 to n in line "
                f"{from_1[0]} and 0 to n - 1 in line {from_0[0]}"
            )
        return int(len(from_1) > len(from_0))
    n_first = sum("0" in answer.entries for answer in answers.values())
    n_last = sum(str(len(answer.docnos)) in answer.entries for answer in answers.values())
    is_clear = abs(n_first - n_last) > MAX_STRAYS * len(answers)
    if answers and not is_clear:
        warn(
            f"{path}: positions are read as counted from 1, but they may count from 0. No permutation is complete, "
            f"{n_first:,} name 0, and {n_last:,} the number of candidates. Docnos in place of positions are unambiguous"
        )
    return int(n_last >= n_first or not is_clear)


def _positions(n: int, first: int) -> list[str]:
    return [str(first + i) for i in range(n)]
