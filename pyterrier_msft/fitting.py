"""Prepare a stage's data, train a cross-encoder on it, and record what happened."""

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd

from pyterrier_msft.data.frames import even_step, frame_digest, require_columns
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.digests import format_value, sha256_of
from pyterrier_msft.fitters import Fitter
from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.fingerprint import dropout_settings
from pyterrier_msft.model.record import StageRecord, library_versions
from pyterrier_msft.notices import warn
from pyterrier_msft.training import distributed
from pyterrier_msft.training.checkpoints import checkpoint_identity
from pyterrier_msft.training.plan import Plan, plan_training
from pyterrier_msft.training.run import train
from pyterrier_msft.training.validation import Validation

ValidationFrames = tuple[pd.DataFrame, pd.DataFrame]  # results and qrels

TRUNCATION_SAMPLE = 1000  # pairs tokenized to estimate how many are truncated


@dataclass(frozen=True)
class StageData:
    """A fitter and the data it trains on."""

    fitter: Fitter
    groups: Groups
    report: DataReport
    digest: str

    def without(self, qids: Collection[str]) -> Self:
        """Return the data of all other queries."""
        groups = self.groups.without(qids)
        report = dataclasses.replace(self.report, groups=len(groups), documents=len(groups.labels.values))
        return dataclasses.replace(self, groups=groups, report=report, digest=groups.digest())


def prepare_stage(
    fitter: Fitter, results: pd.DataFrame | str | Path, qrels: pd.DataFrame | None, texts: TextSource, *, verbose: bool
) -> StageData:
    """Check a stage's training data and turn them into groups; warn about what was dropped."""
    topics = None
    if isinstance(results, pd.DataFrame):
        require_columns(results, ["qid", "query", "docno"], "training results")
        if texts.source is None and texts.field not in results.columns:
            raise ValueError(
                f"training results must have a column {texts.field!r} with the documents' text; got "
                f"{[*map(str, results.columns)]}. Put dataset.text_loader() before MonoCE, or pass "
                "MonoCE(..., text=dataset)"
            )
        results = texts.add_to(results.reset_index(drop=True))
    elif isinstance(results, str | Path):
        topics = texts.topics(results)
    else:
        raise ValueError(f"training results must be a data frame or a run's path; got {type(results).__name__}")
    load_text = None if texts.source is None else texts.load
    groups, report = fitter.groups(
        results, qrels, text_field=texts.field, load_text=load_text, topics=topics, verbose=verbose
    )
    if report.dropped():
        warn(f"{type(fitter).__name__} dropped {report.dropped()}")
    if report.conflicts():
        warn(f"{type(fitter).__name__} found {report.conflicts()}")
    return StageData(fitter, groups, report, groups.digest())


def fit_stages(
    model: CrossEncoder, encoders: Sequence[PairEncoder], prepared: Sequence[StageData], stages: list[StageRecord], *,
    validation: ValidationFrames | None, checkpoint_dir: Path | None, verbose: bool,
) -> None:  # fmt: skip
    """Train a model in place, stage after stage, and add the stages' records to `stages`."""
    for place, (data, encoder) in enumerate(zip(prepared, encoders, strict=True), 1):
        folder = _stage_dir(checkpoint_dir, place, len(prepared))
        _train_stage(
            model, encoder, data, stages, place=place, validation=validation, checkpoint_dir=folder, verbose=verbose
        )


def stages_to_resume(
    stages: Sequence[StageRecord], checkpoint_dir: Path | None, n_stages: int
) -> Sequence[StageRecord]:
    """Return the records of an interrupted fit that one of `n_stages` stages would resume; empty if there is none."""
    return _stages_to_resume(stages, _stage_dir(checkpoint_dir, 1, n_stages))


def _stage_dir(checkpoint_dir: Path | None, place: int, n_stages: int) -> Path | None:
    """Return the folder for the checkpoints of one stage."""
    return checkpoint_dir / f"stage-{place}" if checkpoint_dir is not None and n_stages > 1 else checkpoint_dir


def _train_stage(
    model: CrossEncoder, encoder: PairEncoder, data: StageData, stages: list[StageRecord], *, place: int,
    validation: ValidationFrames | None, checkpoint_dir: Path | None, verbose: bool,
) -> None:  # fmt: skip
    """Train a model in place, and add a record of the stage to `stages`.

    `place` is the stage's position in its call of fit, from 1; `checkpoint_dir` is for this stage alone.
    """
    fitter, before = data.fitter, model.fingerprint
    resumed = _stages_to_resume(stages, checkpoint_dir) if place == 1 else []
    start = resumed[0].start if resumed else before
    measured = Validation(*validation, fitter.metric) if validation and fitter.metric is not None else None
    head_before = model.head_is_new
    was_new = resumed[0].head_was_new if resumed else head_before
    plan = plan_training(
        fitter, data.groups, width=model.width, head_is_new=was_new, is_adapter=model.has_adapter, validation=measured
    )
    record = _new_record(encoder, data, plan, place, start)
    record.head_was_new = was_new
    # A loss that can't be digested can't be recognised later either, which only matters for these.
    is_identified = checkpoint_dir is not None or distributed.world_size() > 1
    stages[len(stages) - len(resumed) :] = [record]
    model.head_is_new = False
    try:
        train(
            model, encoder, data.groups, fitter.loss, fitter, plan=plan, validation=measured,
            checkpoint_dir=checkpoint_dir,
            identity=_identity(model, encoder, data, validation, start) if is_identified else {},
            history=record.history, verbose=verbose,
        )  # fmt: skip
    except BaseException:
        record.fingerprint = model.fingerprint
        if record.fingerprint == before:  # nothing was learned
            model.head_is_new = head_before
        if record.fingerprint == before and place == 1:
            stages[-1:] = resumed
        else:  # the record of a later stage says that its fit isn't complete
            record.interrupted = record.updates
        raise
    record.fingerprint = model.fingerprint
    if record.fingerprint == start:
        model.head_is_new = was_new
        values = record.validations(str(fitter.metric))
        if len(values) > 1 and max(values[1:]) <= values[0]:
            warn(
                f"{type(fitter).__name__} didn't improve the re-ranker, whose weights are as before: validation "
                f"{fitter.metric} was {values[0]:.3f} at the start and at most {max(values[1:]):.3f} after. Try "
                "another learning_rate, or more training queries"
            )
        else:
            settings = f"learning_rate={plan.learning_rate}, warmup={fitter.warmup}"
            warn(f"{type(fitter).__name__} changed no weight in {record.updates} updates with {settings}")


def _stages_to_resume(stages: Sequence[StageRecord], checkpoint_dir: str | Path | None) -> Sequence[StageRecord]:
    """Return the records of the interrupted fit that training resumes from its checkpoints; empty if there is none."""
    if stages and stages[-1].interrupted is not None:
        resumed = stages[-stages[-1].place :]
        if checkpoint_identity(checkpoint_dir).get("start weights") == resumed[0].start:
            return resumed
    return []


def _new_record(encoder: PairEncoder, data: StageData, plan: Plan, place: int, start: str) -> StageRecord:
    groups, fitter = data.groups, data.fitter
    step = max(1, len(groups) * 4 // TRUNCATION_SAMPLE)
    lists = [(i, groups.documents[i]) for i in range(0, len(groups), step)]
    sample = [(i, document) for i, documents in lists for document in documents[:: even_step(len(documents), 4)]]
    queries, texts = [groups.queries[i] for i, _ in sample], groups.text(document for _, document in sample)
    query_rate, text_rate = encoder.truncation_rates(queries, texts)
    report = dataclasses.replace(
        data.report, truncated_queries=query_rate, truncated_documents=text_rate, plan=str(plan)
    )
    digest = ""
    with contextlib.suppress(ValueError):  # of a loss that can't be digested
        digest = sha256_of(fitter.readable_settings())
    return StageRecord(
        fitter=repr(fitter), loss=getattr(fitter.loss, "__name__", format_value(fitter.loss)), digest=digest,
        data=data.digest, queries=len(groups), documents=report.documents, place=place, start=start, seed=fitter.seed,
        plan=dataclasses.asdict(plan),
        versions=library_versions(), data_report=dataclasses.asdict(report),
    )  # fmt: skip


def _identity(
    model: CrossEncoder, encoder: PairEncoder, data: StageData, validation: ValidationFrames | None, start: str
) -> dict[str, str]:
    """Return what determines the result of training, by name. A checkpoint with another identity is refused."""
    dropout = dropout_settings(model.network.config)
    return {
        **data.fitter.readable_settings(),
        **{name: str(getattr(encoder, name)) for name in ("max_length", "max_query_length", "passages")},
        "dtype": str(model.dtype),
        "the model's dropout": ", ".join(f"{name}={value}" for name, value in dropout.items()),
        "data": data.digest[:16],
        "validation": sha256_of([*map(frame_digest, validation)])[:16] if validation else "none",
        "start weights": start,
    }
