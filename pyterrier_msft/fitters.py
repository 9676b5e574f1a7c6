"""A fitter declares a stage of fine-tuning: `Contrastive` or `Distillation`."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
import pyterrier as pt

from pyterrier_msft import losses, teachers
from pyterrier_msft.algebra import Combinable
from pyterrier_msft.data.diagnosis import explain_no_positives, explain_no_preferences
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.judging import Judge
from pyterrier_msft.data.labels import from_qrels, from_teacher, grades_of, has_only_ranks, relevant_of
from pyterrier_msft.data.permutations import check_unranked
from pyterrier_msft.data.rankings import Rankings, peek
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.runs import read_run
from pyterrier_msft.data.sampling import LIST_STRATEGIES, NEGATIVE_STRATEGIES, ListSampling
from pyterrier_msft.data.scales import SCALES
from pyterrier_msft.data.texts import TextLookup
from pyterrier_msft.digests import digestible, format_value, is_default, sha256_of
from pyterrier_msft.notices import warn
from pyterrier_msft.training.hyperparameters import Hyperparameters, check_choice, check_number
from pyterrier_msft.training.objectives import Loss

MEMORY_SETTINGS = frozenset({"pairs_per_pass"})  # settings that don't change the result


@dataclass(frozen=True)
class TrainingInput:
    """The data that a fitter labels, see `Fitter.groups`."""

    results: pd.DataFrame | Iterable[Rankings]  # a frame, or the rankings of a file's chunks
    head: pd.DataFrame  # the frame, or a file's first rows, for checks and error messages
    qrels: pd.DataFrame | None
    text_field: str  # the text column of the results
    load_text: Callable[[pd.DataFrame], pd.DataFrame] | None  # adds that column to a frame of docnos
    verbose: bool  # whether to show the progress of a teacher


@dataclass(frozen=True, kw_only=True, repr=False)
class Fitter(Combinable, Hyperparameters):
    """A stage of fine-tuning: an objective, where its labels come from, and hyperparameters."""

    loss: Loss = field(default=losses.localized_contrastive)

    label_kinds: ClassVar[frozenset[str]] = frozenset()  # the kinds of labels that the objective gives to a loss
    label_sources: ClassVar[frozenset[str]] = frozenset()  # the fields that say where labels come from

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.loss):
            raise ValueError(f"loss must be a function, e.g. losses.ranknet; got {self.loss!r}")
        needed = getattr(self.loss, "labels", None)
        if needed is not None and self.label_kinds and needed not in self.label_kinds:
            kinds = " or ".join(sorted(self.label_kinds))
            raise ValueError(
                f"loss must be for {kinds} labels in {type(self).__name__}; got {format_value(self.loss)}, which needs "
                f"{needed} labels"
            )

    @property
    def stages(self) -> "tuple[Fitter]":
        """This stage alone, as a tuple like that of a `FitterSequence`."""
        return (self,)

    @property
    def terms(self) -> "tuple[tuple[float, Fitter]]":
        """This fitter alone, with the weight 1, as a tuple like that of a `FitterSum`."""
        return ((1, self),)

    @property
    def parts(self) -> "tuple[Fitter]":
        """This fitter alone."""
        return (self,)

    @property
    def names(self) -> tuple[str]:
        """The name of this fitter alone."""
        return (self.objective,)

    @property
    def objective(self) -> str:
        """The name of the class."""
        return type(self).__name__

    def replace(self, **settings: Any) -> Self:
        """Copy the fitter with other settings, e.g. `fitter.replace(learning_rate=1e-5)`.

        Raises:
            ValueError: If the fitter has no such setting, or a value is out of range.
        """
        names = [f.name for f in fields(self)]
        if unknown := [name for name in settings if name not in names]:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"They are {', '.join(sorted(names))}"
            raise ValueError(f"settings must be those of {type(self).__name__}; got {unknown[0]!r}. {hint}")
        return replace(self, **settings)

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults."""
        settings = [(f, getattr(self, f.name)) for f in fields(self)]
        changed = [f"{f.name}={format_value(value)}" for f, value in settings if not is_default(value, f)]
        return f"{type(self).__name__}({', '.join(changed)})"

    def groups(
        self,
        results: pd.DataFrame | str | Path,
        qrels: pd.DataFrame | None,
        *,
        text_field: str = "text",
        load_text: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
        topics: pd.DataFrame | None = None,
        verbose: bool = False,
    ) -> tuple[Groups, DataReport]:
        """Convert a first stage's results to training groups, and report on the data.

        `results` is a frame, or a file (see `runs.read_run`) whose texts are looked up in training. `topics` (qid,
        query) is for a file without queries. See `TrainingInput` for the other arguments.
        """
        load = None  # a frame has its texts
        self._check_sources(qrels, load_text, is_file=not isinstance(results, pd.DataFrame))
        rankings: pd.DataFrame | Iterable[Rankings]
        if isinstance(results, pd.DataFrame):
            rankings = head = results
        else:
            path = Path(results)
            if load_text is None:
                is_json = {".json", ".jsonl"} & {*path.suffixes}
                readers = "Read JSON with teachers.read_permutations or teachers.read_labelled_passages"
                how = readers if is_json else "Pass MonoCE(..., text=dataset)"
                raise ValueError(f"text is required for results in {path}; got None. {how}")
            first, rankings = peek(self._read_file(path, qrels, topics))
            head = pd.DataFrame(columns=["qid", "docno"]) if first is None else first.frame()
            load = TextLookup(load_text, text_field)
        groups, report = self._label(TrainingInput(rankings, head, qrels, text_field, load_text, verbose))
        if not len(groups):
            raise ValueError(self._no_data_message(report, head, qrels))
        if report.teacher_looks_inverted():
            warn(
                "the teacher's ranking looks upside down: its rank correlation with the first stage is "
                f"{report.agreement:.2f}. A better document needs a higher score or a lower rank"
            )
        return replace(groups, load=load), report

    # Subclasses implement the following four methods.

    def _check_sources(self, qrels: pd.DataFrame | None, load_text: Any, *, is_file: bool) -> None:
        """Raise a ValueError if a source of the labels is missing, or can't be used with results in a file."""
        raise NotImplementedError

    def _read_file(self, path: Path, qrels: Any, topics: pd.DataFrame | None) -> Iterable[Rankings]:
        """Read the rows of a file that can get a label."""
        raise NotImplementedError

    def _label(self, data: TrainingInput) -> tuple[Groups, DataReport]:
        """Label the documents of the results; the groups may be empty."""
        raise NotImplementedError

    def _no_data_message(self, report: DataReport, head: pd.DataFrame, qrels: Any) -> str:
        """Explain why there are no groups; of a file, `head` has only the first rows."""
        raise NotImplementedError

    def digest(self) -> str:
        """Digest the settings that affect the result, for cache keys; a ValueError if the teacher is a transformer."""
        names = [f.name for f in fields(self) if f.name not in MEMORY_SETTINGS]
        kind = digestible(type(self), "fitter")  # with the code of a user's subclass
        return sha256_of([kind, sorted((name, digestible(getattr(self, name), name)) for name in names)])

    def readable_settings(self) -> dict[str, str]:
        """Return the settings by name, without the sources of labels, which the digest of the groups covers."""
        settings = {"objective": self.objective}
        for f in fields(self):
            if f.name not in self.label_sources | MEMORY_SETTINGS:
                value = getattr(self, f.name)
                is_plain = value is None or isinstance(value, int | float | str)
                # Two functions may have the same name.
                suffix = "" if is_plain else f" ({sha256_of(digestible(value, f.name))[:8]})"
                settings[f.name] = f"{format_value(value)}{suffix}"
        return settings


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrastive(Fitter):
    """Learn from relevance labels: relevant documents against negatives from the first stage.

    The default loss is localized contrastive estimation (Gao, Dai and Callan, ECIR 2021). Each epoch samples
    `n_positives` relevant documents and `n_negatives` others per query.

    Args:
        n_positives: Maximum number of relevant documents per group. None: all, e.g. for `losses.multi_positive`.
        n_negatives: Maximum number of negatives per group.
        depth: Number of top results to sample negatives from; relevant documents may have any rank. None: all.
        skip: Number of first ranks that no negative comes from, because many documents there are relevant without being
            judged.
        sample: How negatives are drawn from the top `depth`: "uniform"; "top", the first ones, the same in each epoch;
            or "log", where the weight of the k-th possible negative is 1 / log2(1 + skip + k).
        n_random: Maximum number of further negatives per group, drawn uniformly from the documents of all other groups:
            what the first stage found for other queries, and their relevant documents. Never one that is relevant to
            the query or in its own top `depth`.
        min_relevance: Minimum label of a relevant document.
        add_missing_positives: Whether to add relevant documents that the first stage missed, with texts from
            `MonoCE(..., text=...)`.
        judge: A teacher with scores, in any form that `Distillation` takes except a mapping, which finds false
            negatives: candidates that may be relevant. A transformer is applied to the candidates and the relevant
            documents of the results. Candidates that it doesn't score stay negatives.
        margin: A candidate is a false negative if the judge's score of it is at least that of the query's lowest
            relevant document, minus the margin. It has no effect on queries whose relevant documents the judge didn't
            score. None: only `max_score` applies.
        max_score: A candidate is also a false negative if its score is at least this. None: no such limit.
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
    loss: Loss = field(default=losses.localized_contrastive)

    label_kinds: ClassVar[frozenset[str]] = frozenset({"binary", "graded", "order"})
    label_sources: ClassVar[frozenset[str]] = frozenset({"judge"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_positives", "depth"):
            check_number(name, getattr(self, name), integer=True)
        check_number("n_negatives", self.n_negatives, integer=True, required=True)
        for name in ("skip", "n_random"):
            check_number(name, getattr(self, name), integer=True, minimum_zero=True, required=True)
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
            _check_reads_no_results("judge", self.judge)

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
        n_documents: Maximum number of documents per list: each epoch draws so many of the `depth` documents anew. None:
            all of them.
        sample: How `n_documents` are drawn: "stratified", one from each of `n_documents` parts of the teacher's ranking
            of nearly equal size; "top", the teacher's first ones, the same in each epoch; "random", uniformly; or
            "top_and_random", half of them (rounded up) the teacher's first ones, and the rest uniformly.
        unranked: What to do with documents that the teacher didn't rank: "drop" them, or rank them "last", tied (not
            for a loss that needs scores).
        scale: How to scale the teacher's scores, for a loss that needs scores: among the scored documents of a query
            in the top `depth`, "zscore" subtracts the mean and divides by the standard deviation (with n, not n - 1),
            and "minmax" maps the lowest score to 0 and the highest to 1. "logit" converts probabilities to log-odds,
            after limiting them to between 1e-6 and 1 - 1e-6. None: as they are. Equal scores stay equal; as without a
            scale, a query with nothing else is left out.
        loss: A loss for ordered labels, or for scores or probabilities if the teacher has them.
        **shared: See `Hyperparameters`.
    """

    teacher: Any = None
    depth: int | None = 20
    n_documents: int | None = None
    sample: str = "stratified"
    unranked: str = "drop"
    scale: str | None = None
    loss: Loss = field(default=losses.ranknet)

    label_kinds: ClassVar[frozenset[str]] = frozenset({"order", "scores", "probabilities"})
    label_sources: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("depth", self.depth, integer=True)
        if self.depth == 1:
            raise ValueError("depth must be at least 2; got 1")
        self._check_sampling()
        teachers.check_teacher(self.teacher)
        check_unranked(self.unranked)
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
            _check_reads_no_results("teacher", self.teacher)

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


def _check_reads_no_results(name: str, teacher: Any) -> None:
    """Raise a ValueError if a teacher needs the results, which are a file."""
    if isinstance(teacher, pt.Transformer | Mapping):
        raise ValueError(f"{name} must be a frame or a file where the results are a file; got {format_value(teacher)}")
