"""A fitter declares a stage of fine-tuning: `Contrastive` or `Distillation`. `>>` joins them to sequences."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pyterrier as pt

from pyterrier_msft import losses, teachers
from pyterrier_msft.data.diagnosis import explain_no_positives, explain_no_preferences
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.labels import from_qrels, from_teacher, grades_of, has_only_ranks, relevant_of
from pyterrier_msft.data.permutations import check_unranked
from pyterrier_msft.data.rankings import Rankings, peek
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.runs import read_run
from pyterrier_msft.data.texts import TextLookup
from pyterrier_msft.digests import digestible, format_value, is_default, sha256_of
from pyterrier_msft.notices import warn
from pyterrier_msft.training.hyperparameters import Hyperparameters, check_number
from pyterrier_msft.training.trainer import Loss

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


@dataclass(frozen=True)
class FitterSequence:
    """Fitters in sequence, on the same data: `Contrastive() >> Distillation(teacher=...)`."""

    stages: tuple["Fitter", ...]

    def __rshift__(self, other: "Fitter | FitterSequence") -> "FitterSequence":
        return FitterSequence((*self.stages, *_stages_of(other)))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.stages))

    def digest(self) -> str:
        """Digest everything that determines the result, see `Fitter.digest`."""
        return sha256_of([stage.digest() for stage in self.stages])


@dataclass(frozen=True, kw_only=True, repr=False)
class Fitter(Hyperparameters):
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
    def stages(self) -> tuple["Fitter", ...]:
        """This stage alone, as a tuple like that of a `FitterSequence`."""
        return (self,)

    def __rshift__(self, other: "Fitter | FitterSequence") -> FitterSequence:
        return FitterSequence((self, *_stages_of(other)))

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
        settings = {"objective": type(self).__name__}
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
        min_relevance: Minimum label of a relevant document.
        add_missing_positives: Whether to add relevant documents that the first stage missed, with texts from
            `MonoCE(..., text=...)`.
        loss: A loss for binary or graded labels.
        **shared: See `Hyperparameters`.
    """

    n_positives: int | None = 1
    n_negatives: int = 7
    depth: int | None = 100
    min_relevance: float = 1
    add_missing_positives: bool = False
    loss: Loss = field(default=losses.localized_contrastive)

    label_kinds: ClassVar[frozenset[str]] = frozenset({"binary", "graded", "order"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_positives", "depth"):
            check_number(name, getattr(self, name), integer=True)
        check_number("n_negatives", self.n_negatives, integer=True, required=True)
        check_number("min_relevance", self.min_relevance, required=True)

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

        return from_qrels(
            data.results, data.qrels, depth=self.depth, n_positives=self.n_positives, n_negatives=self.n_negatives,
            min_relevance=self.min_relevance, load_missing=load_missing if self.add_missing_positives else None,
            text_field=data.text_field,
        )  # fmt: skip

    def _no_data_message(self, report: DataReport, head: pd.DataFrame, qrels: Any) -> str:
        return explain_no_positives(report, head, grades_of(qrels), self.min_relevance)


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
        unranked: What to do with documents that the teacher didn't rank: "drop" them, or rank them "last", tied (not
            for a loss that needs scores).
        loss: A loss for ordered labels, or for scores if the teacher has them.
        **shared: See `Hyperparameters`.
    """

    teacher: Any = None
    depth: int | None = 20
    unranked: str = "drop"
    loss: Loss = field(default=losses.ranknet)

    label_kinds: ClassVar[frozenset[str]] = frozenset({"order", "scores"})
    label_sources: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("depth", self.depth, integer=True)
        if self.depth == 1:
            raise ValueError("depth must be at least 2; got 1")
        teachers.check_teacher(self.teacher)
        check_unranked(self.unranked)
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

    @property
    def _needs_scores(self) -> bool:
        return getattr(self.loss, "labels", None) == "scores"

    def _check_sources(self, qrels: pd.DataFrame | None, load_text: Any, *, is_file: bool) -> None:
        if is_file and isinstance(self.teacher, pt.Transformer | Mapping):
            raise ValueError(
                f"teacher must be a frame or a file where the results are a file; got {format_value(self.teacher)}"
            )

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
            data.results, ranking, depth=self.depth, keep_scores=self._needs_scores, unranked=self.unranked,
            text_field=data.text_field,
        )  # fmt: skip

    def _no_data_message(self, report: DataReport, head: pd.DataFrame, qrels: Any) -> str:
        return explain_no_preferences(report)


def check_fitter(fitter: Any) -> "Fitter | FitterSequence":
    """Return the fitter; raise a ValueError if it is something else."""
    if isinstance(fitter, Fitter | FitterSequence):
        return fitter
    if isinstance(fitter, type) and issubclass(fitter, Fitter):
        raise ValueError(f"fitter must be an object; got the class {fitter.__name__}. Write {fitter.__name__}()")
    raise ValueError(f"fitter must be e.g. Contrastive() or Distillation(teacher=...); got {fitter!r}")


def _stages_of(other: Any) -> tuple[Fitter, ...]:
    if isinstance(other, pt.Transformer):
        raise ValueError(
            f"fitter >> must be followed by a fitter; got {other!r}. Pass fitters to MonoCE(..., fitter=...)"
        )
    return check_fitter(other).stages
