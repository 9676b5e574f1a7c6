"""What a stage found in its training data."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class DataReport:
    """What a stage found in its training data, counted before training. Shares are between 0 and 1."""

    queries: int = 0
    groups: int = 0
    documents: int = 0  # query-document pairs that groups are drawn from
    duplicates: int = 0  # pairs given more than once
    without_text: int = 0  # pairs
    without_query: int = 0  # pairs whose query has no text
    without_relevant: int = 0  # queries
    unjudged: int = 0  # queries without a relevant document that the qrels don't have at all
    without_negatives: int = 0  # queries
    without_teacher: int = 0  # queries
    unranked_by_teacher: int = 0  # pairs, left out
    ranked_last: int = 0  # pairs that the teacher did not rank, placed below all others
    judged_twice: int = 0  # pairs with two labels in the qrels, of which the higher counts
    several_queries: int = 0  # qids with several texts, of which the best-ranked document's counts
    tied_labels: float = 0.0  # of the pairs of documents in a list, by a teacher
    agreement: float | None = None  # mean rank correlation of the teacher with the first stage, -1 to 1
    truncated_queries: float = 0.0
    truncated_documents: float = 0.0

    def __repr__(self) -> str:
        lines = [f"{self.groups:,} of {self.queries:,} queries to learn from, with {self.documents:,} documents"]
        unjudged = f" ({self.unjudged:,} of them not in the qrels)" if self.unjudged else ""
        counts = {
            f"queries without a relevant document{unjudged}": self.without_relevant,
            "queries without a document that is not relevant": self.without_negatives,
            "queries without the teacher's ranking": self.without_teacher,
            "documents that the teacher did not rank": self.unranked_by_teacher,
            "documents without text": self.without_text,
            "documents whose query has no text": self.without_query,
            "documents given twice for a query": self.duplicates,
        }
        lines += [f"{count:,} {what}: left out" for what, count in counts.items() if count]
        taken = {
            "documents that the teacher did not rank: placed below all others": self.ranked_last,
            "documents with two labels in the qrels: the higher counts": self.judged_twice,
            "qids with several queries: that of the best-ranked document counts": self.several_queries,
        }
        lines += [f"{count:,} {what}" for what, count in taken.items() if count]
        shares = {
            "of the teacher's pairs of documents are tied": self.tied_labels,
            "of the queries are cut to fit (max_query_length)": self.truncated_queries,
            "of the documents are cut to fit (max_length)": self.truncated_documents,
        }
        lines += [f"{share:.1%} {what}" for what, share in shares.items() if share]
        if self.agreement is not None:
            lines.append(f"teacher and first stage agree by a rank correlation of {self.agreement:.2f}")
        return "\n  ".join(["DataReport:", *lines])

    @classmethod
    def total(cls, reports: Sequence["DataReport"]) -> "DataReport":
        """The report on pieces of data: counts added up, shares averaged over the groups."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            found = [(getattr(report, f.name), report.groups) for report in reports]
            known = [(value, weight) for value, weight in found if value is not None]
            if f.type is int:
                values[f.name] = sum(value for value, _ in known)
            elif total := sum(weight for _, weight in known):
                values[f.name] = sum(value * weight for value, weight in known) / total
        return cls(**values)

    def dropped(self) -> str:
        """What was left out, in words, for a warning; empty if nothing was."""
        return "; ".join(self._lines(": left out"))

    def contradictions(self) -> str:
        """Where the data say two things, and which was taken, in words, for a warning; empty if nowhere."""
        return "; ".join(f"{line} counts" for line in self._lines(" counts"))

    def _lines(self, end: str) -> list[str]:
        return [line.strip().removesuffix(end) for line in repr(self).split("\n") if line.endswith(end)]

    def upside_down(self) -> bool:
        """Whether the teacher seems to rank the worst first: it contradicts the first stage on the whole."""
        return self.agreement is not None and self.agreement < -0.2
