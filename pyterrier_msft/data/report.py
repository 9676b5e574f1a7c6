"""DataReport: counts of a stage's training data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class DataReport:
    """Counts of a stage's training data, made before training. Rates are between 0 and 1."""

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
    unranked_by_teacher: int = 0  # query-document pairs, dropped
    ranked_last: int = 0  # query-document pairs that the teacher didn't rank, placed last
    judged_twice: int = 0  # query-document pairs with two different labels; the higher one is used
    several_queries: int = 0  # qids with different query texts; that of the best-ranked document is used
    tied_labels: float = 0.0  # rate, over the pairs of a query's documents, of ties by the teacher
    agreement: float | None = None  # mean rank correlation of the teacher with the first stage, -1 to 1
    truncated_queries: float = 0.0
    truncated_documents: float = 0.0
    plan: Any = None  # a text: how the training run is set up
    interpolation: Any = None  # a text: the choice of the first stage's weight

    def __repr__(self) -> str:
        lines = [f"{self.groups:,} of {self.queries:,} queries to train on, with {self.documents:,} documents"]
        lines += [f"dropped {line}" for line in self._dropped()]
        lines += self._conflicts()
        if self.ranked_last:
            lines.append(f"placed {_count(self.ranked_last, 'document')} last that the teacher didn't rank")
        rates = {
            "of the teacher's pairs of documents are tied": self.tied_labels,
            "of the queries are truncated (max_length, max_query_length)": self.truncated_queries,
            "of the documents are truncated (max_length)": self.truncated_documents,
        }
        lines += [f"{rate:.1%} {what}" for what, rate in rates.items() if rate]
        if self.agreement is not None:
            lines.append(f"rank correlation of the teacher with the first stage: {self.agreement:.2f}")
        lines += [text for text in (self.plan, self.interpolation) if text]
        return "\n  ".join(["DataReport:", *lines])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        """Restore a report from `dataclasses.asdict`, ignoring unknown fields of other versions."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    @classmethod
    def total(cls, reports: Sequence["DataReport"]) -> "DataReport":
        """Combine the reports of chunks: add up counts, average rates over groups."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            found = [(getattr(report, f.name), report.groups) for report in reports]
            known = [(value, weight) for value, weight in found if value is not None]
            if f.type is int:
                values[f.name] = sum(value for value, _ in known)
            elif f.type is Any:
                continue  # not known before all chunks are read
            elif total := sum(weight for _, weight in known):
                values[f.name] = sum(value * weight for value, weight in known) / total
        return cls(**values)

    def dropped(self) -> str:
        """Describe what was dropped; empty if nothing was."""
        return "; ".join(self._dropped())

    def conflicts(self) -> str:
        """Describe contradictions in the data; empty if there are none."""
        return "; ".join(self._conflicts())

    def teacher_looks_inverted(self) -> bool:
        """Whether the teacher contradicts the first stage, as if its order were reversed."""
        return self.agreement is not None and self.agreement < -0.2

    def _dropped(self) -> list[str]:
        unjudged = f" ({self.unjudged:,} of them not in the qrels)" if self.unjudged else ""
        queries = {
            f"without a relevant document{unjudged}": self.without_relevant,
            "without a non-relevant document": self.without_negatives,
            "that the teacher didn't rank": self.without_teacher,
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

    def _conflicts(self) -> list[str]:
        labels = f"{_count(self.judged_twice, 'document')} with two labels in the qrels: the higher one is used"
        queries = f"{_count(self.several_queries, 'qid')} with several queries: the best-ranked document's is used"
        return [labels] * bool(self.judged_twice) + [queries] * bool(self.several_queries)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
