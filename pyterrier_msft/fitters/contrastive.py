"""`Contrastive`: learn from relevance labels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from pyterrier_msft import losses, teachers
from pyterrier_msft.checks import check_choice, check_number
from pyterrier_msft.data.diagnosis import explain_no_positives
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.judging import Judge
from pyterrier_msft.data.labels import from_qrels, grades_of, has_only_ranks, relevant_of
from pyterrier_msft.data.rankings import Rankings, warn_of_contradictions
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.runs import read_run
from pyterrier_msft.data.sampling import NEGATIVE_STRATEGIES
from pyterrier_msft.data.texts import TextLookup, warn_of_other_form
from pyterrier_msft.digests import is_default
from pyterrier_msft.fitters.base import Fitter, TrainingInput, check_reads_no_results


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrastive(Fitter):
    """Learn from relevance labels: relevant documents against negatives from the first stage.

    The default loss is localized contrastive estimation (Gao, Dai and Callan, ECIR 2021). Each epoch samples
    `n_positives` relevant documents and `n_negatives` others per query.

    Args:
        n_positives: Maximum number of relevant documents per group. None: all, e.g. for `losses.multi_positive`.
        n_negatives: Maximum number of negatives per group. 0 is possible with `n_random`.
        depth: Number of top results to sample negatives from; relevant documents may have any rank. None: all.
        skip: Take no negatives from the first `skip` ranks, where many unjudged documents are relevant. With
            `false_negatives="relevant"`, these documents aren't relabelled.
        sample: How negatives are drawn from the top `depth`: "uniform"; "top", the first ones, the same in each epoch;
            or "log", where the weight of the k-th possible negative is 1 / log2(1 + skip + k).
        n_random: Maximum number of further negatives per group, drawn uniformly from the documents of all other groups:
            what the first stage found for other queries, and their relevant documents. Never one that is relevant to
            the query or in its own top `depth`; `judge` doesn't check them. Of several sources, each has its own
            documents and labels.
        min_relevance: Minimum label of a relevant document.
        add_missing_positives: Whether to add relevant documents that the first stage missed, with texts from
            `MonoCE(..., text=...)`.
        judge: A teacher whose scores tell false negatives: unlabelled candidates that are probably relevant. Any form
            that `Distillation(teacher=)` takes, except a mapping. A transformer is applied to the candidates and the
            relevant documents of the results. Candidates that it doesn't score stay negatives.
        margin: A candidate is a false negative if the judge's score of it is at least that of the query's
            lowest-scoring relevant document, minus the margin. It has no effect on queries whose relevant documents
            the judge didn't score. None: only `max_score` applies.
        max_score: A candidate is also a false negative if the judge's score of it is at least this. None: no limit.
        false_negatives: What to do with false negatives: "drop" them, or use them as "relevant", with the label
            `min_relevance`.
        loss: A loss for binary or graded labels.
        **shared: See `Hyperparameters`.
    """

    n_positives: int | None = 1
    n_negatives: int = 7
    depth: int | None = 100
    skip: int = 0
    sample: str = "uniform"
    n_random: int = 0
    min_relevance: float = 1
    add_missing_positives: bool = False
    judge: Any = None
    margin: float | None = 0.0
    max_score: float | None = None
    false_negatives: str = "drop"
    loss: losses.Loss = field(default=losses.localized_contrastive)

    label_kinds: ClassVar[frozenset[str]] = frozenset({"binary", "graded", "order"})
    label_sources: ClassVar[frozenset[str]] = frozenset({"judge"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_positives", "depth"):
            check_number(name, getattr(self, name), integer=True)
        for name in ("n_negatives", "skip", "n_random"):
            check_number(name, getattr(self, name), integer=True, minimum_zero=True, required=True)
        if not self.n_negatives and not self.n_random:
            raise ValueError("n_negatives must be a positive integer without n_random; got 0")
        check_choice("sample", self.sample, NEGATIVE_STRATEGIES)
        if self.depth is not None and self.skip >= self.depth:
            raise ValueError(
                f"skip must be below depth={self.depth}; got {self.skip}. Negatives come from the ranks between them"
            )
        check_number("min_relevance", self.min_relevance, required=True)
        self._check_judge()

    def _check_judge(self) -> None:
        for name in ("margin", "max_score"):
            check_number(name, getattr(self, name), signed=True)
        check_choice("false_negatives", self.false_negatives, ("drop", "relevant"))
        if isinstance(self.judge, Mapping):
            raise ValueError(
                f"judge must be a single teacher with scores; got a mapping of {len(self.judge)}, whose fusion gives "
                "only ranks"
            )
        teachers.check_teacher(self.judge, "judge")
        if self.judge is None:
            unused = [f for f in fields(self) if f.name in {"margin", "max_score", "false_negatives"}]
            for f in unused:
                if not is_default(getattr(self, f.name), f):
                    raise ValueError(f"judge is required by {f.name}={getattr(self, f.name)!r}; got None")
        elif self.margin is None and self.max_score is None:
            raise ValueError("max_score is required by margin=None; got None. A judge needs one of the two")

    def _check_sources(self, qrels: pd.DataFrame | None, load_text: Any, *, is_file: bool) -> None:
        if qrels is None:
            raise ValueError(
                "qrels is required by Contrastive; got None. Pass them as the second argument of fit, or distil a "
                "ranking with MonoCE(..., fitter=Distillation(...))"
            )
        if self.add_missing_positives and load_text is None:
            raise ValueError(
                "text is required by add_missing_positives=True; got None. Pass MonoCE(..., text=dataset) to look up "
                "documents that the first stage missed"
            )
        if is_file:
            check_reads_no_results("judge", self.judge)

    def _read_file(self, path: Path, qrels: Any, topics: pd.DataFrame | None) -> Iterable[Rankings]:
        relevant = relevant_of(grades_of(qrels), self.min_relevance)
        return read_run(path, depth=self.depth, relevant=relevant, topics=topics)

    def _label(self, data: TrainingInput) -> tuple[Groups, DataReport]:
        assert data.qrels is not None

        def load_missing(missing: pd.DataFrame) -> Iterable[Any]:
            if not isinstance(data.results, pd.DataFrame):
                return missing["docno"]  # a file has docnos in place of texts
            assert data.load_text is not None
            loaded = data.load_text(missing)
            return missing["docno"].map(dict(zip(loaded["docno"], loaded[data.text_field], strict=True)))

        if isinstance(data.results, pd.DataFrame):
            warn_of_contradictions(data.results, "first stage's")
            if self.add_missing_positives:
                assert data.load_text is not None
                warn_of_other_form(data.results, data.load_text, data.text_field)
        groups, report = from_qrels(
            data.results, data.qrels, depth=self.depth, n_positives=self.n_positives, n_negatives=self.n_negatives,
            skip=self.skip, n_random=self.n_random, sample=self.sample,
            min_relevance=self.min_relevance, load_missing=load_missing if self.add_missing_positives else None,
            judge=self._judge(data), text_field=data.text_field,
        )  # fmt: skip
        if report.false_negative_examples and not isinstance(data.results, pd.DataFrame):
            assert data.load_text is not None
            report = report.with_example_texts(TextLookup(data.load_text, data.text_field))
        return groups, report

    def _judge(self, data: TrainingInput) -> Judge | None:
        """Apply the judge to the results."""
        if self.judge is None:
            return None
        assert data.qrels is not None
        ranking = teachers.get_ranking(
            self.judge, data.head, depth=self.depth, relevant=relevant_of(grades_of(data.qrels), self.min_relevance),
            text_field=data.text_field, verbose=data.verbose, name="judge",
        )  # fmt: skip
        assert ranking is not None
        if len(ranking) and has_only_ranks(ranking):
            raise ValueError(
                "judge must have scores; got scores that only restate its ranks. Pass those of a model, e.g. a "
                "cross-encoder"
            )
        return Judge(ranking, self.margin, self.max_score, relabels=self.false_negatives == "relevant")

    def _no_data_message(self, report: DataReport, head: pd.DataFrame, qrels: Any) -> str:
        return explain_no_positives(report, head, grades_of(qrels), self.min_relevance, self.skip)
