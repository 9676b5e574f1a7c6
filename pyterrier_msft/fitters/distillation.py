"""`Distillation`: learn from a teacher's ranking."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from pyterrier_msft import losses, teachers
from pyterrier_msft.checks import check_choice, check_number
from pyterrier_msft.data.diagnosis import explain_no_preferences
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.labels import from_teacher, has_only_ranks
from pyterrier_msft.data.permutations import UNRANKED
from pyterrier_msft.data.rankings import Rankings
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.runs import read_run
from pyterrier_msft.data.sampling import LIST_STRATEGIES, ListSampling
from pyterrier_msft.data.scales import SCALES
from pyterrier_msft.digests import format_value
from pyterrier_msft.fitters.base import Fitter, TrainingInput, check_reads_no_results


@dataclass(frozen=True, kw_only=True, repr=False)
class Distillation(Fitter):
    """Learn from a teacher's ranking of the first stage's documents, e.g. that of an LLM.

    The default loss is RankNet (Burges et al., ICML 2005) over the pairs that the teacher orders. Labels are the
    teacher's ranks, or its scores if the loss needs scores.

    Args:
        teacher: A result frame (qid, docno, score or rank); the path of a TREC run, or of permutations (`.jsonl`, see
            `teachers.read_permutations`), plain or `.gz`; a transformer or pipeline, which is applied to the training
            documents (`teachers.cached` makes that resumable); or a mapping of names to these, fused by reciprocal
            rank (`teachers.fuse`). None: the training results are the teacher's ranking.
        depth: Documents per query, from the top of the results.
        n_documents: Maximum number of documents per list. Each epoch draws them anew from the top `depth`. None: all.
        sample: How `n_documents` are drawn: "stratified", one from each of `n_documents` parts of the teacher's ranking
            of nearly equal size; "top", the teacher's first ones, the same in each epoch; "random", uniformly; or
            "top_and_random", half of them (rounded up) the teacher's first ones, and the rest uniformly.
        unranked: What to do with documents that the teacher didn't rank: "drop" them, or rank them "last", tied (not
            for a loss that needs scores).
        scale: How to scale the teacher's scores, for a loss that needs scores: among the scored documents of a query
            in the top `depth`, "zscore" subtracts the mean and divides by the standard deviation (with n, not n - 1),
            and "minmax" maps the lowest score to 0 and the highest to 1. "logit" converts probabilities to log-odds,
            after limiting them to between 1e-6 and 1 - 1e-6. None: as they are. Queries whose
            scores are all equal are left out.
        loss: A loss for ordered labels, or for scores or probabilities if the teacher has them.
        **shared: See `Hyperparameters`.
    """

    teacher: Any = None
    depth: int | None = 20
    n_documents: int | None = None
    sample: str = "stratified"
    unranked: str = "drop"
    scale: str | None = None
    loss: losses.Loss = field(default=losses.ranknet)

    label_kinds: ClassVar[frozenset[str]] = frozenset({"order", "scores", "probabilities"})
    label_sources: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("depth", self.depth, integer=True)
        if self.depth == 1:
            raise ValueError("depth must be at least 2; got 1")
        self._check_sampling()
        teachers.check_teacher(self.teacher)
        check_choice("unranked", self.unranked, UNRANKED)
        self._check_scale()
        if self._needs_scores and self.unranked == "last":
            raise ValueError(
                f"unranked must be 'drop' with {format_value(self.loss)}, which needs scores; got 'last'. Documents "
                "that the teacher didn't rank have no score"
            )
        if self._needs_scores and isinstance(self.teacher, Mapping):
            raise ValueError(
                f"teacher must be a single teacher with scores for {format_value(self.loss)}; got a mapping of "
                f"{len(self.teacher)}, whose fusion gives only ranks. Use a loss for ranks, e.g. losses.ranknet"
            )

    def _check_sampling(self) -> None:
        check_number("n_documents", self.n_documents, integer=True)
        check_choice("sample", self.sample, LIST_STRATEGIES)
        if self.n_documents is None:
            if self.sample != "stratified":
                raise ValueError(
                    f"n_documents is required by sample={self.sample!r}; got None, which means all documents"
                )
        elif self.n_documents == 1:
            raise ValueError("n_documents must be at least 2; got 1")
        elif self.depth is not None and self.n_documents > self.depth:
            raise ValueError(
                f"n_documents must be at most depth={self.depth}; got {self.n_documents}. They are drawn from the "
                "`depth` documents of a query"
            )

    def _check_scale(self) -> None:
        if self.scale is None:
            return
        check_choice("scale", self.scale, SCALES)
        if not self._needs_scores:
            raise ValueError(
                f"scale must be None with {format_value(self.loss)}, which doesn't need scores; got {self.scale!r}. "
                "Use a loss for scores, e.g. losses.mse, or declare your own with @losses.needs('scores')"
            )
        if self._needs_probabilities and self.scale != "minmax":
            raise ValueError(
                f"scale must be None or 'minmax' with {format_value(self.loss)}, which needs probabilities; got "
                f"{self.scale!r}. Use a loss for scores, e.g. losses.mse"
            )

    @property
    def _needs_scores(self) -> bool:
        return getattr(self.loss, "labels", None) == "scores" or self._needs_probabilities

    @property
    def _needs_probabilities(self) -> bool:
        return getattr(self.loss, "labels", None) == "probabilities"

    def _check_sources(self, qrels: pd.DataFrame | None, load_text: Any, *, is_file: bool) -> None:
        if is_file:
            check_reads_no_results("teacher", self.teacher)

    def _read_file(self, path: Path, qrels: Any, topics: pd.DataFrame | None) -> Iterable[Rankings]:
        return read_run(path, depth=self.depth, topics=topics)

    def _label(self, data: TrainingInput) -> tuple[Groups, DataReport]:
        ranking = teachers.get_ranking(
            self.teacher, data.head, depth=self.depth, text_field=data.text_field, verbose=data.verbose
        )
        scored = data.head if ranking is None else ranking
        if self._needs_scores and len(scored) and has_only_ranks(scored):
            raise ValueError(
                f"teacher must have scores for {format_value(self.loss)}; got scores that only restate its ranks. Use "
                "a loss for ranks, e.g. losses.ranknet"
            )
        return from_teacher(
            data.results, ranking, depth=self.depth, keep_scores=self._needs_scores, scale=self.scale,
            probabilities=self._needs_probabilities, unranked=self.unranked,
            sampling=None if self.n_documents is None else ListSampling(self.n_documents, self.sample),
            text_field=data.text_field,
        )  # fmt: skip

    def _no_data_message(self, report: DataReport, head: pd.DataFrame, qrels: Any) -> str:
        return explain_no_preferences(report)
