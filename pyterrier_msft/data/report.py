"""DataReport: counts of a stage's training data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

EXAMPLES = 3  # in a data report
EXAMPLE_LENGTH = 60  # characters of a text
MIN_QUERIES_FOR_AGREEMENT = 5  # with the first stage: fewer queries prove nothing


class FalseNegative(NamedTuple):
    """A candidate that may be relevant, as an example in a data report."""

    query: str  # its beginning
    text: str  # the same
    score: float  # by the judge
    relevant_score: float | None  # the lowest of the query's relevant documents; None if the judge scored none of them

    def __str__(self) -> str:
        relevant = "not scored" if self.relevant_score is None else f"{self.relevant_score:.4g}"
        return f"{self.score:.4g} (relevant: {relevant}) for {self.query!r}: {self.text!r}"


def beginning(text: str) -> str:
    """Return the beginning of a text, in one line."""
    line = " ".join(text[: 2 * EXAMPLE_LENGTH].split())
    return line if len(line) <= EXAMPLE_LENGTH else f"{line[: EXAMPLE_LENGTH - 1]}…"


@dataclass(frozen=True)
class DataReport:
    """Counts of a stage's training data, made before training. Rates are between 0 and 1.

    Of a sum of fitters, or of several sources, they are totals and means over its `parts`, each of which has its own
    report.
    """

    queries: int = 0
    groups: int = 0  # queries to train on
    documents: int = 0  # query-document pairs to train on
    duplicates: int = 0  # repeated query-document pairs
    without_text: int = 0  # query-document pairs
    without_query: int = 0  # query-document pairs with an empty query
    without_relevant: int = 0  # queries
    unjudged: int = 0  # queries that aren't in the qrels
    without_negatives: int = 0  # queries
    copies_of_positives: int = 0  # query-document pairs with the text of a relevant document, not used as negatives
    without_teacher: int = 0  # queries
    without_preference: int = 0  # queries of which the teacher ranks a single document, or all equally
    unranked_by_teacher: int = 0  # query-document pairs, dropped
    ranked_last: int = 0  # query-document pairs that the teacher didn't rank, placed last
    judged_twice: int = 0  # query-document pairs with two different labels; the higher one is used
    several_queries: int = 0  # qids with different query texts; that of the best-ranked document is used
    false_negatives: int = 0  # query-document pairs that the judge scored like relevant ones, not used as negatives
    relabelled: int = 0  # the same, used as relevant
    unjudged_negatives: int = 0  # query-document pairs that the judge didn't score, used as negatives
    unjudged_positives: int = 0  # queries without a relevant document that the judge scored
    false_negative_examples: tuple[FalseNegative, ...] = ()  # a few
    tied_labels: float = 0.0  # rate, over the pairs of a query's documents, of ties by the teacher
    agreement: float | None = None  # mean rank correlation of the teacher with the first stage, -1 to 1
    truncated_queries: float = 0.0
    truncated_documents: float = 0.0
    plan: str | None = None  # how the training run is set up
    outcome: str | None = None  # with validation, which step was kept, and why training ended early, if it did
    interpolation: str | None = None  # the choice of the first stage's weight
    advice: str | None = None
    parts: "dict[str, DataReport] | None" = None  # of a sum of fitters, or of several sources, by name

    def __repr__(self) -> str:
        return "\n  ".join(["DataReport:", *self._lines()])

    def _lines(self) -> list[str]:
        if self.parts:
            found = {name: part._lines() for name, part in self.parts.items()}
            lines = [line for name, own in found.items() for line in (f"{name}:", *(f"  {line}" for line in own))]
            return lines + self._of_training()
        lines = [f"{self.groups:,} of {self.queries:,} queries to train on, with {self.documents:,} documents"]
        lines += [f"dropped {line}" for line in self._dropped()]
        lines += self._conflicts()
        if self.ranked_last:
            lines.append(f"placed {_count(self.ranked_last, 'document')} last that the teacher didn't rank")
        lines += self._judged()
        rates = {
            "of the teacher's pairs of documents are tied": self.tied_labels,
            "of the queries are truncated (max_length, max_query_length)": self.truncated_queries,
            "of the documents are truncated (max_length)": self.truncated_documents,
        }
        lines += [f"{rate:.1%} {what}" for what, rate in rates.items() if rate]
        if self.agreement is not None:
            lines.append(f"rank correlation of the teacher with the first stage: {self.agreement:.2f}")
        return lines + self._of_training()

    def _of_training(self) -> list[str]:
        return [text for text in (self.plan, self.outcome, self.interpolation, self.advice) if text]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        """Restore a report from `dataclasses.asdict`, ignoring unknown fields of other versions."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if known.get("parts"):
            known["parts"] = {name: cls.from_dict(part) for name, part in known["parts"].items()}
        examples = [FalseNegative(*example) for example in known.pop("false_negative_examples", ())]
        return cls(**known, false_negative_examples=tuple(examples))

    @classmethod
    def total(cls, reports: Sequence["DataReport"]) -> "DataReport":
        """Combine the reports of chunks: add up counts, average rates over groups or documents, keep a few examples.

        The other fields aren't known before all chunks are read.
        """
        examples = [example for report in reports for example in report.false_negative_examples]
        values: dict[str, Any] = {"false_negative_examples": tuple(examples[:EXAMPLES])}
        for f in fields(cls):
            if f.type is int:
                values[f.name] = sum(getattr(report, f.name) for report in reports)
            elif f.type in {float, float | None}:
                unit = "documents" if f.name == "truncated_documents" else "groups"
                known = [report for report in reports if getattr(report, f.name) is not None]
                if total := sum(getattr(report, unit) for report in known):
                    values[f.name] = sum(getattr(report, f.name) * getattr(report, unit) for report in known) / total
        return cls(**values)

    @classmethod
    def of_parts(cls, parts: Mapping[str, "DataReport"]) -> "DataReport":
        """Combine the reports of the parts of a sum of fitters, or of several sources, by name."""
        return replace(cls.total([*parts.values()]), parts=dict(parts))

    def with_example_texts(self, load: Callable[[list[str]], list[str]]) -> "DataReport":
        """Replace the docnos in the examples with the beginnings of the texts, which `load` looks up."""
        texts = load([example.text for example in self.false_negative_examples])
        pairs = zip(self.false_negative_examples, texts, strict=True)
        examples = tuple(example._replace(text=beginning(text) or example.text) for example, text in pairs)
        return replace(self, false_negative_examples=examples)

    def dropped(self) -> str:
        """Describe what was dropped; empty if nothing was."""
        return "; ".join(self._dropped())

    def conflicts(self) -> str:
        """Describe contradictions in the data; empty if there are none."""
        return "; ".join(self._conflicts())

    def teacher_looks_inverted(self) -> bool:
        """Whether the teacher contradicts the first stage, as if its order were reversed."""
        return self.agreement is not None and self.agreement < -0.2 and self.groups >= MIN_QUERIES_FOR_AGREEMENT

    def _dropped(self) -> list[str]:
        unjudged = f" ({self.unjudged:,} of them not in the qrels)" if self.unjudged else ""
        queries = {
            f"without a relevant document{unjudged}": self.without_relevant,
            "without a non-relevant document": self.without_negatives,
            "that the teacher didn't rank": self.without_teacher,
            "in which the teacher prefers no document to another": self.without_preference,
        }
        documents = {
            "that the teacher didn't rank": self.unranked_by_teacher,
            "without text": self.without_text,
            "with an empty query": self.without_query,
            "with the text of a relevant document": self.copies_of_positives,
        }
        lines = [f"{count:,} of {self.queries:,} queries {what}" for what, count in queries.items() if count]
        lines += [f"{_count(count, 'document')} {what}" for what, count in documents.items() if count]
        return lines + ([_count(self.duplicates, "duplicate result")] if self.duplicates else [])

    def _judged(self) -> list[str]:
        """Describe what the judge of false negatives found."""
        lines = []
        if number := self.false_negatives or self.relabelled:
            done = "dropped" if self.false_negatives else "used as relevant"
            lines.append(f"{done} {_count(number, 'negative')} that the judge scored like a relevant document, e.g.")
            lines += [f"  {example}" for example in self.false_negative_examples]
        if self.unjudged_negatives:
            lines.append(f"kept {_count(self.unjudged_negatives, 'negative')} that the judge didn't score")
        return lines

    def _conflicts(self) -> list[str]:
        labels = f"{_count(self.judged_twice, 'document')} with two labels in the qrels: the higher one is used"
        queries = f"{_count(self.several_queries, 'qid')} with several queries: the best-ranked document's is used"
        margin = (
            f"{self.unjudged_positives:,} of {self.queries:,} queries whose relevant documents the judge didn't score"
        )
        found = {
            labels: self.judged_twice,
            queries: self.several_queries,
            f"{margin}: margin has no effect there": self.unjudged_positives,
        }
        return [line for line, count in found.items() if count]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
