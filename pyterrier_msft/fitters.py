"""What a stage of fine-tuning is, declared: `Contrastive`, `Distillation`, and sequences of them by `>>`."""

import dataclasses
import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pyterrier as pt

from pyterrier_msft import losses, teachers
from pyterrier_msft.data.frames import as_ids, frame_digest
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.labels import bare_ranks, from_qrels, from_teacher, grades_of, mismatch, relevant_of
from pyterrier_msft.data.permutations import check_unranked
from pyterrier_msft.data.rankings import Rankings
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.runs import pieces
from pyterrier_msft.model.encoding import clean
from pyterrier_msft.notices import warn
from pyterrier_msft.training.hyperparameters import Hyperparameters, check_number
from pyterrier_msft.training.trainer import Loss

ENOUGH = 32  # documents without a text, and none with one, after which there is no text to be hoped for
PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class FitterSequence:
    """Fitters one after another, on the same data: `Contrastive() >> Distillation(teacher=...)`."""

    stages: tuple["Fitter", ...]

    def __rshift__(self, other: "Fitter | FitterSequence") -> "FitterSequence":
        return FitterSequence((*self.stages, *_stages(other)))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.stages))

    def digest(self) -> str:
        """A digest of all that decides the result."""
        return _sha256([stage.digest() for stage in self.stages])


@dataclass(frozen=True, kw_only=True, repr=False)
class Fitter(Hyperparameters):
    """A stage of fine-tuning: an objective, what it learns from, and its hyperparameters."""

    loss: Loss = field(default=losses.localized_contrastive)

    supplies: ClassVar[frozenset[str]] = frozenset()  # the kinds of labels that this objective's data can give
    sources: ClassVar[frozenset[str]] = frozenset()  # the fields that say where the labels come from

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.loss):
            raise ValueError(f"expected a loss function such as losses.ranknet, found {self.loss!r}")

    @property
    def stages(self) -> tuple["Fitter", ...]:
        """The stages in order: just this one."""
        return (self,)

    def __rshift__(self, other: "Fitter | FitterSequence") -> FitterSequence:
        return FitterSequence((self, *_stages(other)))

    def __repr__(self) -> str:
        """As it was written: what differs from the defaults."""
        changed = [
            f"{f.name}={_written(getattr(self, f.name))}"
            for f in fields(self)
            if not _same(getattr(self, f.name), {} if f.default is MISSING else f.default)
        ]
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
        """What this objective learns from, out of a first stage's results, and what was found in the data.

        Args:
            results: qid, query, docno, text, and score or rank; or a file of these without the text, see `runs.pieces`.
            qrels: qid, docno, label.
            text_field: The results' column of text.
            load_text: Adds the column of text to a frame of docnos.
            topics: qid, query: for a file without the queries' text.
            verbose: Whether to show the progress of a teacher that has to be run.

        Raises:
            ValueError: If a column is missing or nothing is left to learn from.
        """
        self._check_source(qrels, load_text)
        if isinstance(results, pd.DataFrame):
            sample: pd.DataFrame | Rankings | None = results
            groups, report = self._read(results, qrels, text_field=text_field, load_text=load_text, verbose=verbose)
        else:
            if load_text is None:
                is_json = {".json", ".jsonl"} & {*Path(results).suffixes}
                how = "; JSON is read by teachers.read_permutations or read_labelled_passages" if is_json else ""
                raise ValueError(f"expected MonoCE(..., text=dataset) with results in {results}, found no text{how}")
            groups, report, sample = self._read_file(results, qrels, topics, text_field, load_text)
        if not len(groups):
            if not isinstance(sample, pd.DataFrame):
                sample = pd.DataFrame(columns=["qid", "docno"]) if sample is None else sample.frame()
            raise ValueError(self._nothing(report, sample, qrels))
        if report.upside_down():
            warn(
                "the teacher's ranking looks upside down: its rank correlation with the first stage is "
                f"{report.agreement:.2f}; a score must be higher, and a rank lower, for a better document"
            )
        return groups, report

    def _read_file(
        self,
        path: str | Path,
        qrels: pd.DataFrame | None,
        topics: pd.DataFrame | None,
        text_field: str,
        load_text: Callable[[pd.DataFrame], pd.DataFrame],
    ) -> tuple[Groups, DataReport, Rankings | None]:
        """Groups of a file's pieces, where docnos stand for texts until these are needed; and the first piece."""
        fitter, relevant = self._for_file(qrels)
        first: list[Rankings] = []

        def read() -> Iterator[Rankings]:
            for piece in pieces(path, depth=fitter.depth, relevant=relevant, topics=topics):
                if not first and len(piece.query):
                    first.append(piece)
                yield piece

        groups, report = fitter._read(
            read(),
            qrels,
            text_field=text_field,
            load_text=lambda missing: missing.assign(**{text_field: missing["docno"]}),
        )

        counts: Counter[str] = Counter()

        def load(docnos: list[str]) -> list[str]:
            distinct = pd.DataFrame({"docno": list(dict.fromkeys(docnos))})
            loaded = load_text(distinct)
            texts = dict(zip(loaded["docno"], loaded[text_field], strict=True))
            found = [clean(texts.get(docno)) for docno in docnos]
            missing = [docno for docno, text in zip(docnos, found, strict=True) if not text.strip()]
            counts["found"] += len(docnos) - len(missing)
            counts["missing"] += len(missing)
            if missing and counts["missing"] == len(missing):  # for the first time
                warn(f"documents without text, such as {missing[0]!r}, are read as empty")
            if not counts["found"] and counts["missing"] >= ENOUGH:
                raise ValueError(
                    f"expected texts from MonoCE(..., text=dataset), found none of {counts['missing']} documents, such "
                    f"as {missing[0]!r}"
                )
            return found

        return dataclasses.replace(groups, load=load), report, first[0] if first else None

    def _for_file(self, qrels: pd.DataFrame | None) -> tuple[Any, pd.DataFrame | None]:
        """The fitter that reads a file's pieces, and what is taken from any depth."""
        return self, None

    def _check_source(self, qrels: pd.DataFrame | None, load_text: Any) -> None:
        """Raise a ValueError if what the labels come from isn't given."""

    def _read(
        self,
        results: pd.DataFrame | Iterable[Rankings],
        qrels: pd.DataFrame | None,
        *,
        text_field: str,
        load_text: Callable[[pd.DataFrame], pd.DataFrame] | None,
        verbose: bool = False,
    ) -> tuple[Groups, DataReport]:
        """The groups of a frame, or of a file's pieces; there may be none."""
        raise NotImplementedError

    def _nothing(self, report: DataReport, results: pd.DataFrame, qrels: pd.DataFrame | None) -> str:
        """What to say when nothing is left to learn from; `results` are all of them, or a sample."""
        raise NotImplementedError

    def digest(self) -> str:
        """A digest of all that decides the result (not of how fast it comes), for cache keys.

        Raises:
            ValueError: If the teacher is a transformer, whose content can't be told before it is run.
        """
        return self._digest(frozenset({"pairs_per_pass"}))

    def settings_digest(self) -> str:
        """A digest without where the labels come from: with that of the groups, it tells all that `digest` does."""
        return self._digest(self.sources | {"pairs_per_pass"})

    def readable_settings(self) -> dict[str, str]:
        """What `settings_digest` is of, by name and as far as it can be read: for saying what differs.

        Without `pairs_per_pass`, which may be changed when a training is gone on with.
        """
        settings = {"objective": type(self).__name__}
        for f in fields(self):
            if f.name not in {*self.sources, "pairs_per_pass"}:
                value = getattr(self, f.name)
                plain = value is None or isinstance(value, int | float | str)
                # Two functions of one name may differ.
                content = "" if plain else f" ({_sha256(_content(value, f.name))[:8]})"
                settings[f.name] = f"{_written(value)}{content}"
        return settings

    def _digest(self, without: frozenset[str]) -> str:
        values = {f.name: _content(getattr(self, f.name), f.name) for f in fields(self) if f.name not in without}
        return _sha256([type(self).__name__, sorted(values.items())])

    def _check_labels(self) -> None:
        needed = getattr(self.loss, "labels", None)
        if needed is not None and needed not in self.supplies:
            raise ValueError(
                f"expected a loss for {' or '.join(sorted(self.supplies))} labels in {type(self).__name__}, found "
                f"{_written(self.loss)}, which needs {needed} labels"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrastive(Fitter):
    """Learns from relevance labels: a relevant document against negatives of the first stage.

    The default is the localized contrastive objective of Gao, Dai and Callan (ECIR 2021). An epoch takes each query
    once: `n_positives` of its relevant documents and `n_negatives` of the others, both drawn anew.

    Args:
        n_positives: Relevant documents a group, fewer where there are fewer; None takes all of a query, for losses
            such as `losses.multi_positive`.
        n_negatives: Documents that are not relevant, a group.
        depth: How deep in the results negatives are looked for; relevant documents may stand at any depth.
        min_relevance: The least label of a relevant document.
        add_missing_positives: Whether relevant documents that the first stage missed are learnt from too; their
            text comes from the re-ranker's `text`.
        loss: A loss for binary or graded labels.
        **shared: See `Hyperparameters`.
    """

    n_positives: int | None = 1
    n_negatives: int = 7
    depth: int | None = 100
    min_relevance: float = 1
    add_missing_positives: bool = False
    loss: Loss = field(default=losses.localized_contrastive)

    supplies: ClassVar[frozenset[str]] = frozenset({"binary", "graded", "order"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_positives", "n_negatives", "depth"):
            check_number(name, getattr(self, name), whole=True)
        check_number("min_relevance", self.min_relevance)
        self._check_labels()

    def _check_source(self, qrels: pd.DataFrame | None, load_text: Any) -> None:
        if qrels is None:
            raise ValueError(
                "expected qrels to learn from, found None: give them as the second argument of fit, or distil a "
                "ranking by MonoCE(..., fitter=Distillation(...))"
            )
        if self.add_missing_positives and load_text is None:
            raise ValueError(
                "expected MonoCE(..., text=dataset) with add_missing_positives=True, found no text: the results "
                "don't have the text of documents that the first stage missed"
            )

    def _for_file(self, qrels: pd.DataFrame | None) -> tuple[Any, pd.DataFrame | None]:
        assert qrels is not None
        return self, relevant_of(grades_of(qrels), self.min_relevance)

    def _read(
        self,
        results: pd.DataFrame | Iterable[Rankings],
        qrels: pd.DataFrame | None,
        *,
        text_field: str,
        load_text: Callable[[pd.DataFrame], pd.DataFrame] | None,
        verbose: bool = False,
    ) -> tuple[Groups, DataReport]:
        assert qrels is not None
        load_missing = None
        if self.add_missing_positives:
            assert load_text is not None
            load = load_text

            def load_missing(missing: pd.DataFrame) -> Iterable[Any]:
                loaded = load(missing)
                return missing["docno"].map(dict(zip(loaded["docno"], loaded[text_field], strict=True)))

        return from_qrels(
            results, qrels, depth=self.depth, n_positives=self.n_positives, n_negatives=self.n_negatives,
            min_relevance=self.min_relevance, load_missing=load_missing, text_field=text_field,
        )  # fmt: skip

    def _nothing(self, report: DataReport, results: pd.DataFrame, qrels: pd.DataFrame | None) -> str:
        assert qrels is not None
        grades = grades_of(qrels)
        relevant = grades[grades >= self.min_relevance].index.to_frame(index=False)
        mine = grades.index.get_level_values("qid").isin(as_ids(results["qid"]))
        if why := _no_texts(report):
            pass
        elif report.without_relevant < report.queries:
            why = "the relevant documents are there, but no others in the top of the results, to be negatives"
        elif mine.any() and not (grades[mine] >= self.min_relevance).any():
            highest = grades[mine].max()
            why = f"the highest label of these queries is {highest:g}, and min_relevance is {self.min_relevance:g}"
        else:
            why = mismatch(results, relevant if mine.any() else qrels, "the qrels")
            if mine.any() and why.startswith("qids and docnos match"):
                why = "the first stage found no relevant document; add_missing_positives=True adds them"
        return (
            "expected queries with a relevant document and one that is not among their results, found none of "
            f"{report.queries:,} queries: {why}"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Distillation(Fitter):
    """Learns from a teacher's ranking of the first stage's documents, such as an LLM's.

    The default is RankNet (Burges et al., ICML 2005) on the pairs that the teacher orders. Labels are the teacher's
    ranks, or its scores for a loss that needs scores.

    Args:
        teacher: None: the incoming ranking is the teacher's. Else a result frame (qid, docno, score or rank); the
            path of a TREC run, or of permutations (`.jsonl`, see `teachers.read_permutations`), each plain or `.gz`;
            a transformer or pipeline, which is run on the documents to learn from (`teachers.cached` lets an
            interrupted run go on); or a mapping of names to these, fused by reciprocal rank (`teachers.fuse`).
        depth: Documents a query, from the top of the results.
        unranked: What becomes of documents that the teacher didn't rank: "drop" leaves them out, "last" places them
            below all others, tied among themselves (not for a loss that needs scores).
        loss: A loss for ordered labels, or for scores where the teacher has them.
        **shared: See `Hyperparameters`.
    """

    teacher: Any = None
    depth: int | None = 20
    unranked: str = "drop"
    loss: Loss = field(default=losses.ranknet)

    supplies: ClassVar[frozenset[str]] = frozenset({"order", "scores"})
    sources: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("depth", self.depth, whole=True)
        if self.depth == 1:
            raise ValueError("expected a depth of at least 2, found 1")
        teachers.check(self.teacher)
        check_unranked(self.unranked)
        self._check_labels()
        if self._keeps_scores and self.unranked == "last":
            raise ValueError(
                f"expected unranked='drop' with {_written(self.loss)}, which learns from scores, found 'last': "
                "what the teacher didn't rank has none"
            )
        if self._keeps_scores and isinstance(self.teacher, Mapping):
            raise ValueError(
                f"expected one teacher with scores for {_written(self.loss)}, found {len(self.teacher)} to fuse, which "
                "gives ranks; take a loss for ranks, such as losses.ranknet"
            )

    @property
    def _keeps_scores(self) -> bool:
        return getattr(self.loss, "labels", None) == "scores"

    def _for_file(self, qrels: pd.DataFrame | None) -> tuple[Any, pd.DataFrame | None]:
        if isinstance(self.teacher, pt.Transformer | Mapping):
            raise ValueError(
                "expected a teacher's ranking as a frame or a file with results in a file, found "
                f"{_written(self.teacher)}"
            )
        teacher = None if self.teacher is None else teachers.ranking(self.teacher, pd.DataFrame())
        return dataclasses.replace(self, teacher=teacher), None

    def _read(
        self,
        results: pd.DataFrame | Iterable[Rankings],
        qrels: pd.DataFrame | None,
        *,
        text_field: str,
        load_text: Callable[[pd.DataFrame], pd.DataFrame] | None,
        verbose: bool = False,
    ) -> tuple[Groups, DataReport]:
        ranking = self.teacher  # with results in a file, see _for_file
        if isinstance(results, pd.DataFrame):
            ranking = teachers.ranking(self.teacher, results, depth=self.depth, text_field=text_field, verbose=verbose)
        scored = ranking
        if ranking is None and isinstance(results, pd.DataFrame):
            scored = results
        elif ranking is None and not isinstance(results, pd.DataFrame):  # a file's first piece with rows tells
            rest, head = iter(results), []
            for piece in rest:
                head.append(piece)
                if len(piece.query):
                    scored = piece.scores()
                    break
            results = chain(head, rest)
        if self._keeps_scores and scored is not None and bare_ranks(scored):
            raise ValueError(
                f"expected a teacher with scores for {_written(self.loss)}, found a ranking whose scores only restate "
                "its ranks; take a loss for ranks, such as losses.ranknet"
            )
        return from_teacher(
            results, ranking, depth=self.depth, keep_scores=self._keeps_scores, unranked=self.unranked,
            text_field=text_field,
        )  # fmt: skip

    def _nothing(self, report: DataReport, results: pd.DataFrame, qrels: pd.DataFrame | None) -> str:
        why = _no_texts(report) or (
            "each has one document alone, or all have the same score"
            if report.queries > report.without_teacher
            else "the teacher has none of them"
        )
        found = f"none of {report.queries:,} queries"
        return f"expected queries with documents that the teacher puts in an order, found {found}: {why}"


def check_fitter(fitter: Any) -> "Fitter | FitterSequence":
    """The fitter itself; a ValueError for anything else."""
    if isinstance(fitter, Fitter | FitterSequence):
        return fitter
    if isinstance(fitter, type) and issubclass(fitter, Fitter):
        raise ValueError(f"expected a fitter such as {fitter.__name__}(), found the class {fitter.__name__}")
    raise ValueError(f"expected a fitter such as Contrastive() or Distillation(teacher=...), found {fitter!r}")


def _stages(other: Any) -> tuple[Fitter, ...]:
    if isinstance(other, pt.Transformer):
        raise ValueError(
            f"expected a fitter after a fitter, found the transformer {other!r}: "
            "a fitter goes into MonoCE(..., fitter=...)"
        )
    return check_fitter(other).stages


def _no_texts(report: DataReport) -> str:
    """Whether there is nothing to learn from for lack of rows, texts or queries; empty if not."""
    if not report.queries:
        return "the results are empty"
    if report.documents or not (report.without_text or report.without_query):
        return ""
    return (
        f"{report.without_text:,} documents have no text, and those of {report.without_query:,} more no query"
        if report.without_query
        else f"{report.without_text:,} documents have no text"
    )


def _same(value: Any, default: Any) -> bool:
    return value is default or (
        not isinstance(value, pd.DataFrame) and type(value) is type(default) and value == default
    )


def _written(value: Any) -> str:
    """A value as the user may have written it, without addresses and without a frame's rows."""
    if isinstance(value, pd.DataFrame):
        return f"<{len(value):,} rows>"
    if inspect.isfunction(value):
        return f"losses.{value.__name__}" if value.__module__ == losses.__name__ else value.__qualname__
    if type(value).__module__ == losses.__name__:
        return f"losses.{value!r}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, pt.Transformer):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return str(value) if not isinstance(value, str | Path) else repr(str(value))


def _content(value: Any, name: str) -> Any:
    """What of a value decides the result, as something that JSON can hold."""
    if isinstance(value, pd.DataFrame):
        return frame_digest(value)
    if isinstance(value, Mapping):
        return sorted((key, _content(item, name)) for key, item in value.items())
    if name == "teacher" and isinstance(value, str | Path):
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    if inspect.isfunction(value):
        # A function of the user's may change under the same name; ours change with the package's digest.
        source = None
        if not value.__module__.startswith(PACKAGE):
            try:
                source = inspect.getsource(value)
            except OSError as error:
                raise ValueError(f"expected a function whose source can be read, found {value!r}") from error
        captured = [_content(cell.cell_contents, name) for cell in value.__closure__ or ()]
        defaults = [_content(part, name) for part in (value.__defaults__, value.__kwdefaults__)]
        return [value.__module__, value.__qualname__, source, captured, defaults]
    if isinstance(value, partial):
        return ["partial", *(_content(part, name) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, pt.Transformer):
        raise ValueError(
            f"expected a {name} whose content can be told, found the transformer {_written(value)}: run it on the "
            f"results first and give the frame that comes out, such as {name}=transformer(results)"
        )
    if is_dataclass(value):  # a loss with parameters, or one made of others
        return [type(value).__qualname__, *(_content(getattr(value, f.name), f.name) for f in fields(value))]
    if isinstance(value, list | tuple):
        return [_content(item, name) for item in value]
    if value is None or isinstance(value, int | float | str):
        return value
    written = repr(value)
    if " at 0x" not in written:
        return written
    # The address is another one in each process.
    return [type(value).__module__, type(value).__qualname__, _content(getattr(value, "__dict__", {}), name)]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
