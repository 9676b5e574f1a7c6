"""What all fitters have in common."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
import pyterrier as pt

from pyterrier_msft import losses
from pyterrier_msft.algebra import Combinable
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.rankings import Rankings, peek
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.texts import TextLookup
from pyterrier_msft.digests import digestible, format_value, is_default, sha256_of
from pyterrier_msft.notices import warn_of_data
from pyterrier_msft.training.hyperparameters import Hyperparameters

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

    loss: losses.Loss = field(default=losses.localized_contrastive)

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
            path = Path(results).expanduser()
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
            warn_of_data(
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


def check_reads_no_results(name: str, teacher: Any) -> None:
    """Raise a ValueError if a teacher needs the results, which are a file."""
    if isinstance(teacher, pt.Transformer | Mapping):
        raise ValueError(f"{name} must be a frame or a file where the results are a file; got {format_value(teacher)}")
