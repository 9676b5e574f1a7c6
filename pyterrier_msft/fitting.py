"""Prepare a stage's data, train a cross-encoder on it, and record what happened."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd
import torch

from pyterrier_msft.algebra import FitterSum, format_sum
from pyterrier_msft.data.frames import even_step, frame_digest, require_columns
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.mixture import MixedGroups, Source, TrainingResults, as_sources
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.texts import HOW_TO_ADD_TEXTS, TextSource
from pyterrier_msft.digests import format_value, sha256_of
from pyterrier_msft.fitters import Fitter
from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.fingerprint import training_state
from pyterrier_msft.model.record import StageRecord, has_unfinished_head, library_versions
from pyterrier_msft.notices import warn, warn_of_data
from pyterrier_msft.training import distributed
from pyterrier_msft.training.checkpoints import SEMANTICS_VERSION, checkpoint_identity
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.objectives import Objective
from pyterrier_msft.training.plan import Plan, describe_outcome, plan_training
from pyterrier_msft.training.run import train
from pyterrier_msft.training.validation import Validation

ValidationFrames = tuple[pd.DataFrame, pd.DataFrame]  # results and qrels

TRUNCATION_SAMPLE = 1000  # pairs tokenized to estimate how many are truncated


@dataclass(frozen=True)
class PartData:
    """A fitter and the data it trains on."""

    fitter: Fitter
    groups: Groups | MixedGroups
    report: DataReport
    digest: str

    def without(self, qids: Collection[str]) -> Self:
        """Return the data of all other queries."""
        assert isinstance(self.groups, Groups)  # several sources choose no weight of the first stage
        groups = self.groups.without(qids)
        report = dataclasses.replace(self.report, groups=len(groups), documents=len(groups.labels.values))
        return dataclasses.replace(self, groups=groups, report=report, digest=groups.digest())


@dataclass(frozen=True)
class StageData:
    """A stage's fitter, and the data of its parts; only a `FitterSum` has several."""

    fitter: Fitter | FitterSum
    parts: tuple[PartData, ...]

    @property
    def settings(self) -> Hyperparameters:
        """The settings of the stage, which its parts share."""
        return self.parts[0].fitter

    @property
    def qids(self) -> set[str]:
        """The queries of all parts."""
        return {qid for part in self.parts for qid in part.groups.qids}

    @property
    def queries(self) -> set[str]:
        """The texts of the queries of all parts."""
        return {query for part in self.parts for query in part.groups.queries}

    @property
    def digest(self) -> str:
        """A digest of the groups of all parts."""
        first, *others = (part.digest for part in self.parts)
        return sha256_of([first, *others]) if others else first

    def without(self, qids: Collection[str]) -> Self:
        """Return the data of all other queries."""
        return dataclasses.replace(self, parts=tuple(part.without(qids) for part in self.parts))


def prepare_stage(
    fitter: Fitter | FitterSum, results: TrainingResults, qrels: pd.DataFrame | None, texts: TextSource, *,
    verbose: bool,
) -> StageData:  # fmt: skip
    """Check a stage's training data and turn them into groups; warn about what was dropped."""
    sources = as_sources(results, qrels)
    read: list[tuple[Source, pd.DataFrame | None]] = []  # a source with texts, and the topics of its file
    for number, source in enumerate(sources, 1):
        with _prefix_source_errors(number, len(sources)):
            frame, topics = _read_source(source, texts)
        read.append((dataclasses.replace(source, results=frame), topics))
    parts = []
    for part in fitter.parts:
        found = [
            _source_groups(part, source, topics, texts, number=number, n_sources=len(sources), verbose=verbose)
            for number, (source, topics) in enumerate(read, 1)
        ]
        parts.append(_part_data(part, sources, found))
    return StageData(fitter, tuple(parts))


def _read_source(source: Source, texts: TextSource) -> tuple[pd.DataFrame | str | Path, pd.DataFrame | None]:
    """Return a source's results with texts, and the topics of a file without queries."""
    results = source.results
    if isinstance(results, pd.DataFrame):
        require_columns(results, ["qid", "query", "docno"], "training results")
        if texts.source is None and texts.field not in results.columns:
            raise ValueError(
                f"training results must have a column {texts.field!r} with the documents' text; got "
                f"{[*map(str, results.columns)]}{HOW_TO_ADD_TEXTS}"
            )
        return texts.add_to(results.reset_index(drop=True)), None
    if isinstance(results, str | Path):
        return results, texts.topics(results)
    raise ValueError(f"training results must be a data frame or a run's path; got {type(results).__name__}")


def _source_groups(
    fitter: Fitter, source: Source, topics: pd.DataFrame | None, texts: TextSource, *, number: int, n_sources: int,
    verbose: bool,
) -> tuple[Groups, DataReport]:  # fmt: skip
    """Turn a source's data into groups; warn about what was dropped."""
    load_text = None if texts.source is None else texts.load
    with _prefix_source_errors(number, n_sources):
        groups, report = fitter.groups(
            source.results, source.qrels, text_field=texts.field, load_text=load_text, topics=topics, verbose=verbose
        )
    where = f"source {number}: " if n_sources > 1 else ""
    if report.dropped():
        warn_of_data(f"{where}{fitter.objective} dropped {report.dropped()}")
    if report.conflicts():
        warn_of_data(f"{where}{fitter.objective} found {report.conflicts()}")
    return groups, report


@contextlib.contextmanager
def _prefix_source_errors(number: int, n_sources: int) -> Iterator[None]:
    """Put the number of a source before the message of a ValueError, if there are several."""
    try:
        yield
    except ValueError as error:
        if n_sources == 1:
            raise
        raise ValueError(f"source {number}: {error}") from error


def _part_data(fitter: Fitter, sources: Sequence[Source], found: Sequence[tuple[Groups, DataReport]]) -> PartData:
    """Combine the data of a part's sources."""
    if len(sources) == 1 and sources[0].weight == 1:
        groups, report = found[0]
        return PartData(fitter, groups, report, groups.digest())
    for number, (source, (groups, _)) in enumerate(zip(sources, found, strict=True), 1):
        if (draws := source.weight * len(groups)) < 0.5:
            warn_of_data(
                f"source {number} counts for more than its weight: each epoch draws one of its {len(groups):,} "
                f"queries, but {source.weight:g} means {draws:.2g}. Use more of its queries, or a larger weight"
            )
    mixed = MixedGroups(tuple(groups for groups, _ in found), tuple(float(source.weight) for source in sources))
    names = [
        f"source {number}" + ("" if source.weight == 1 else f", weight {source.weight:g}")
        for number, source in enumerate(sources, 1)
    ]
    report = DataReport.of_parts({name: report for name, (_, report) in zip(names, found, strict=True)})
    return PartData(fitter, mixed, report, mixed.digest())


def fit_stages(
    model: CrossEncoder, encoders: Sequence[PairEncoder], prepared: Sequence[StageData], stages: list[StageRecord], *,
    scorer: PairEncoder, validation: ValidationFrames | None, checkpoint_dir: Path | None, progress: str | None,
    first_stage_weight: float = 0.0,
) -> None:  # fmt: skip
    """Train a model in place, stage after stage, and add the stages' records to `stages`.

    Validation measures the model's score of the pairs that `scorer` encodes, plus the weighted score of the first
    stage.
    """
    resumed = stages_to_resume(stages, checkpoint_dir, len(prepared))
    for place, (data, encoder) in enumerate(zip(prepared, encoders, strict=True), 1):
        folder = _stage_dir(checkpoint_dir, place, len(prepared))
        of_several = f", stage {place} of {len(prepared)}" if len(prepared) > 1 else ""
        _train_stage(
            model, encoder, data, stages, place=place, resumed=resumed if place == 1 else [], scorer=scorer,
            validation=validation, first_stage_weight=first_stage_weight, checkpoint_dir=folder,
            progress=None if progress is None else progress + of_several,
        )  # fmt: skip


def stages_to_resume(
    stages: Sequence[StageRecord], checkpoint_dir: Path | None, n_stages: int
) -> Sequence[StageRecord]:
    """Return the records of the interrupted fit that one of `n_stages` stages resumes from its checkpoints, or none."""
    if stages and stages[-1].interrupted is not None:
        resumed = stages[-stages[-1].place :]
        if checkpoint_identity(_stage_dir(checkpoint_dir, 1, n_stages)).get("start weights") == resumed[0].start:
            return resumed
    return []


def _stage_dir(checkpoint_dir: Path | None, place: int, n_stages: int) -> Path | None:
    """Return the folder for the checkpoints of one stage."""
    return checkpoint_dir / f"stage-{place}" if checkpoint_dir is not None and n_stages > 1 else checkpoint_dir


def _train_stage(
    model: CrossEncoder, encoder: PairEncoder, data: StageData, stages: list[StageRecord], *, place: int,
    resumed: Sequence[StageRecord], scorer: PairEncoder, validation: ValidationFrames | None,
    first_stage_weight: float, checkpoint_dir: Path | None, progress: str | None,
) -> None:  # fmt: skip
    """Train a model in place, and add a record of the stage to `stages`.

    `place` is the stage's position in its call of fit, from 1; `checkpoint_dir` is for this stage alone. The records of
    the interrupted fit that it resumes, `resumed`, are replaced.
    """
    settings = data.settings
    start = resumed[0].start if resumed else model.fingerprint
    head_was_new = resumed[0].head_was_new if resumed else model.head_is_new
    learns_head = head_was_new or has_unfinished_head(stages[: len(stages) - len(resumed)])
    measured = None
    if validation and settings.metric is not None:
        measured = Validation(*validation, settings.metric, first_stage_weight)
    objectives = _objectives(model, data, head_is_new=learns_head, validation=measured)
    plans = [objective.plan for objective in objectives]
    record = _new_record(encoder, data, plans, place=place, start=start, head_was_new=head_was_new)
    # A loss that can't be digested can't be recognised later either, which only matters for these.
    is_identified = checkpoint_dir is not None or distributed.world_size() > 1
    identity = {}
    if is_identified:
        identity = {
            **_identity(model, encoder, data, start, head_is_new=learns_head),
            **_validation_identity(scorer, validation, first_stage_weight),
        }
    model.warn_of_read_padding(scorer)
    with _recording(model, record, stages, resumed, settings, plans[0]):
        train(
            model, encoder, objectives, settings, scorer=scorer, validation=measured, checkpoint_dir=checkpoint_dir,
            identity=identity, history=record.history, progress=progress,
        )  # fmt: skip
    _warn_of_no_gain(record, settings, plans[0])


@contextlib.contextmanager
def _recording(
    model: CrossEncoder, record: StageRecord, stages: list[StageRecord], resumed: Sequence[StageRecord],
    settings: Hyperparameters, plan: Plan,
) -> Iterator[None]:  # fmt: skip
    """Add the record of the stage that is trained within the block, in place of the `resumed` ones.

    If training fails before it changes a weight, `stages` and the state of the head are as before.
    """
    before = model.fingerprint if resumed else record.start
    head_is_new = model.head_is_new
    stages[len(stages) - len(resumed) :] = [record]
    model.head_is_new = False
    try:
        yield
    except BaseException:
        record.fingerprint = model.fingerprint
        if record.fingerprint == before:  # nothing was learned
            model.head_is_new = head_is_new
        if record.fingerprint == before and record.place == 1:
            stages[-1:] = resumed
        else:  # the record of a later stage says that its fit isn't complete
            record.interrupted = record.updates
            record.data_report["outcome"] = describe_outcome(record.history, str(settings.metric), plan, None)
        raise
    record.data_report["outcome"] = describe_outcome(record.history, str(settings.metric), plan, settings.patience)
    record.fingerprint = model.fingerprint
    if record.fingerprint == record.start:
        model.head_is_new = record.head_was_new


def _warn_of_no_gain(record: StageRecord, settings: Hyperparameters, plan: Plan) -> None:
    """Warn if a complete stage has changed no weight, or if validation couldn't tell its weights apart."""
    values = record.validations(str(settings.metric))
    if record.fingerprint == record.start and len(values) > 1 and max(values[1:]) <= values[0]:
        warn(
            f"{record.objective} didn't improve the re-ranker, whose weights are as before: validation "
            f"{settings.metric} was {values[0]:.3f} at the start and at most {max(values[1:]):.3f} after. Try "
            "another learning_rate, or more training queries"
        )
    elif record.fingerprint == record.start:
        rate = f"learning_rate={plan.learning_rate}, warmup={settings.warmup}"
        warn(f"{record.objective} changed no weight in {record.updates} updates with {rate}")
    elif len(values) > 2 and len({*values}) == 1:
        warn(
            f"validation {settings.metric} was {values[0]:.3f} each time, so it can't choose weights: the last ones "
            "are kept. Choose another metric, e.g. one with a smaller cutoff"
        )


def warn_of_unfinished(stages: Sequence[StageRecord], checkpoint_dir: Path | None, n_stages: int) -> None:
    """Warn if training starts from the weights of an interrupted fit, and doesn't resume it."""
    if stages and stages[-1].is_unfinished and not stages_to_resume(stages, checkpoint_dir, n_stages):
        warn(
            f"training starts from the weights of a fit that was interrupted at step {stages[-1].interrupted}: to "
            "resume it, pass its checkpoint_dir; else start again with a new re-ranker, or a clone() from before"
        )


def _objectives(
    model: CrossEncoder, data: StageData, *, head_is_new: bool, validation: Validation | None
) -> list[Objective]:
    """Plan the training run: the first part decides, except for the size and number of the other parts' batches."""
    first, *others = [
        plan_training(
            part.fitter, part.groups, width=model.width, head_is_new=head_is_new, is_adapter=model.has_adapter,
            validation=validation if part is data.parts[0] else None,
        )
        for part in data.parts
    ]  # fmt: skip
    own = ("batch_size", "updates_per_epoch", "validation_queries")
    plans = [first, *(dataclasses.replace(first, **{name: getattr(plan, name) for name in own}) for plan in others)]
    return [
        Objective(part.groups, part.fitter.loss, plan, weight, name)
        for part, plan, (weight, _), name in zip(data.parts, plans, data.fitter.terms, data.fitter.names, strict=True)
    ]


def _part_report(encoder: PairEncoder, data: PartData, plan: Plan) -> DataReport:
    """Add to a report how many of a sample of pairs are truncated, and the plan."""
    if isinstance(data.groups, MixedGroups):
        assert data.report.parts is not None
        sources = zip(data.report.parts.items(), data.groups.sources, strict=True)
        parts = {name: _with_truncation(encoder, report, groups) for (name, report), groups in sources}
        report = DataReport.of_parts(parts)
    else:
        report = _with_truncation(encoder, data.report, data.groups)
    return dataclasses.replace(report, plan=str(plan))


def _with_truncation(encoder: PairEncoder, report: DataReport, groups: Groups) -> DataReport:
    """Add to a report how many queries and documents are truncated, in an even sample of lists and of their ranks."""
    step = max(1, len(groups) * 4 // TRUNCATION_SAMPLE)
    lists = [(i, groups.documents[i]) for i in range(0, len(groups), step)]
    sampled = [(i, documents[:: even_step(len(documents), 4)], len(documents)) for i, documents in lists]
    pairs = [(i, document, length / len(kept)) for i, kept, length in sampled for document in kept]
    queries, texts = [groups.queries[i] for i, _, _ in pairs], groups.text(document for _, document, _ in pairs)
    # A document of a long list stands for more documents.
    query_rate, text_rate = encoder.truncation_rates(queries, texts, [weight for _, _, weight in pairs])
    return dataclasses.replace(report, truncated_queries=query_rate, truncated_documents=text_rate)


def _new_record(
    encoder: PairEncoder, data: StageData, plans: Sequence[Plan], *, place: int, start: str, head_was_new: bool
) -> StageRecord:
    fitter = data.fitter
    reports = [_part_report(encoder, part, plan) for part, plan in zip(data.parts, plans, strict=True)]
    report = reports[0] if len(reports) == 1 else DataReport.of_parts(dict(zip(fitter.names, reports, strict=True)))
    digest = ""
    with contextlib.suppress(ValueError):  # of a loss that can't be digested
        digest = sha256_of(fitter.readable_settings())
    losses = [(weight, part.loss) for weight, part in fitter.terms]
    return StageRecord(
        fitter=repr(fitter), objective=fitter.objective,
        loss=format_sum((weight, getattr(loss, "__name__", format_value(loss))) for weight, loss in losses),
        digest=digest, data=data.digest, queries=len(data.qids), documents=report.documents, place=place, start=start,
        head_was_new=head_was_new, seed=data.settings.seed, plan=dataclasses.asdict(plans[0]),
        versions=library_versions(), data_report=dataclasses.asdict(report),
    )  # fmt: skip


def _identity(
    model: CrossEncoder, encoder: PairEncoder, data: StageData, start: str, *, head_is_new: bool
) -> dict[str, str]:
    """Return what determines the result of training, by name. A checkpoint with another identity is refused."""
    return {
        **data.fitter.readable_settings(),
        **{name: str(getattr(encoder, name)) for name in ("max_length", "max_query_length", "passages")},
        "dtype": str(model.dtype),
        **training_state(model.network),
        "whether the head is new": str(head_is_new),
        "data": data.digest[:16],
        "start weights": start,
        "version of training": f"{SEMANTICS_VERSION} with torch {torch.__version__}",
    }


def _validation_identity(
    scorer: PairEncoder, validation: ValidationFrames | None, first_stage_weight: float
) -> dict[str, str]:
    """Return what validation adds to the identity."""
    return {
        "validation": sha256_of([*map(frame_digest, validation)])[:16] if validation else "none",
        "max_length in validation": str(scorer.max_length),
        "the first stage's weight in validation": str(first_stage_weight if validation else 0.0),
    }
