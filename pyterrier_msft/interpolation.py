"""Choose the weight that the first stage's score has in a re-ranker's score."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ir_measures import nDCG

from pyterrier_msft.algebra import weighted_sum
from pyterrier_msft.data.mixture import TrainingResults, as_sources
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.data.validation import validation_frames
from pyterrier_msft.fitting import StageData, ValidationFrames, fit_stages, stages_to_resume
from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.record import StageRecord
from pyterrier_msft.notices import warn, warn_of_data
from pyterrier_msft.training.hyperparameters import parse_metric
from pyterrier_msft.training.plan import plan_training
from pyterrier_msft.training.validation import Validation

# Weights to try, relative to the standard deviations of both scores: 0, and steps of half an octave up to 32, where the
# model does little more than break ties of the first stage.
RELATIVE_WEIGHTS = (0.0, *(2 ** (step / 2) for step in range(-6, 11)))
# With fewer training queries, cross-validation chooses the weight, as they are too few to do without some of them.
MIN_QUERIES_FOR_HOLD_OUT = 1000
HELD_OUT_QUERIES = 200
MIN_QUERIES = 20
SPREAD_QUERIES = 10  # to estimate the spread of the scores of a query's documents
MAX_PAIRS = 10_000  # to score for the choice
DOMINANT_WEIGHT = 8.0  # in standard deviations of both scores: the model hardly changes the first stage's order
OUTLIER_RATIO = 8  # of the two estimates of the first stage's spread; for BM25, it is about 2 to 4


@dataclass(frozen=True)
class Interpolation:
    """The choice of a weight: `score = model's score + weight * first stage's score`."""

    weight: float
    relative_weight: float  # in standard deviations of the scores of a query's documents, maybe without outliers
    queries: int  # that chose it
    metric: str
    value: float  # of the metric, with the weight
    model: float  # of the model alone
    first_stage: float  # of the first stage alone

    def __str__(self) -> str:
        changes_little = ", so the model changes little" if self.relative_weight >= DOMINANT_WEIGHT else ""
        return (
            f"first stage's weight {self.weight:.3g}, with {self.metric} {self.value:.3f} on {self.queries:,} queries "
            f"(model alone {self.model:.3f}, first stage {self.first_stage:.3f}); weighted, its scores vary "
            f"{self.relative_weight:.2g} times as much as the model's{changes_little}"
        )


@dataclass(frozen=True)
class Scored:
    """Results of queries, with a model's score of each row."""

    data: Validation
    scores: np.ndarray

    @classmethod
    def by(cls, model: CrossEncoder, encoder: PairEncoder, data: Validation) -> "Scored":
        """Score the results."""
        return cls(data, data.score(model.network, encoder, model.dtype))

    @property
    def spread(self) -> float:
        """The standard deviation of the scores of a query's documents, over all queries."""
        return _spread(self.scores, self.data.results["qid"])

    @property
    def first_stage_spread(self) -> float:
        """The same for the first stage's scores."""
        return _spread(self.data.results["score"].to_numpy(), self.data.results["qid"])


def _spread(scores: np.ndarray, qids: pd.Series) -> float:
    values = pd.Series(scores)
    deviations = values - values.groupby(qids.to_numpy()).transform("mean")
    return float(np.sqrt((deviations**2).mean())) or 1.0


def _spread_without_outliers(scores: np.ndarray, qids: pd.Series) -> float:
    """Estimate the standard deviation by medians of each query's distinct scores; NaN if no query has two."""
    distinct = pd.DataFrame({"qid": qids.to_numpy(), "score": scores}).drop_duplicates()
    deviations = (distinct["score"] - distinct.groupby("qid")["score"].transform("median")).abs()
    medians = deviations.groupby(distinct["qid"]).median()
    return 1.4826 * float(medians[medians > 0].median())  # the factor is that of a normal distribution


def best_weight(parts: Sequence[Scored], metric: Any, *, spread: float) -> Interpolation:
    """Choose the weight with the best value of a metric, as the mean of five neighbouring weights.

    The metric of few queries jumps from weight to weight; the mean of neighbours is steadier.

    Args:
        parts: Queries that their model wasn't trained on. Each part's scores are divided by their spread, because the
            parts may be scored by different models.
        metric: The `ir_measures` measure.
        spread: That of the scores that the weight is for.
    """
    everything = Validation(
        pd.concat([part.data.results for part in parts], ignore_index=True),
        pd.concat([part.data.qrels for part in parts], ignore_index=True),
        metric,
    )
    model = np.concatenate([part.scores / part.spread for part in parts])
    first = everything.results["score"].to_numpy()
    units = [float(np.mean([part.first_stage_spread for part in parts]))]
    typical = _spread_without_outliers(first, everything.results["qid"])
    # A few extreme scores, such as -1e9 in a padded list, may make up the spread; no weight on the grid then suits the
    # other documents. But they may also be what matters, so the metric decides between both units.
    if units[0] > OUTLIER_RATIO * typical:
        units.append(typical)
    curves = np.array(
        [[everything.measure(model + weight * (first / unit)) for weight in RELATIVE_WEIGHTS] for unit in units]
    )
    smooth = [np.convolve(np.pad(values, 2, mode="edge"), np.full(5, 0.2), mode="valid") for values in curves]
    unit, best = (int(index) for index in np.unravel_index(np.argmax(smooth), curves.shape))
    return Interpolation(
        weight=float(RELATIVE_WEIGHTS[best] * spread / units[unit]),
        relative_weight=RELATIVE_WEIGHTS[best],
        queries=everything.queries,
        metric=str(metric),
        value=float(curves[unit, best]),
        model=float(curves[0, 0]),
        first_stage=everything.measure(first),
    )


class InterpolationMixin:
    """The method of a re-ranker that chooses the first stage's weight without training."""

    def choose_weight(
        self: Any, results: pd.DataFrame, qrels: pd.DataFrame, *, metric: Any = nDCG @ 10
    ) -> Interpolation:
        """Set `interpolate` to the weight that is best for labelled queries; nothing is trained.

        Use it for a published cross-encoder, and for another collection or first stage than those of `fit`. All results
        are scored. A later `fit` keeps the weight, unless you set `interpolate=True` again.

        Args:
            results: A first stage's results, like those of `transform`. They must be of **other queries** than those
                that the model was trained on.
            qrels: Their labels: qid, docno, label.
            metric: The `ir_measures` measure to maximize.

        Returns:
            The choice. Print it to see the metric with the weight, of the model alone, and of the first stage.

        Raises:
            ValueError: If the model is untrained, the results have no scores, or no document is relevant.
        """
        if self.cross_encoder.head_is_new:
            raise ValueError(
                f"choose_weight needs a trained model; got {self!r}, whose head is untrained. Call fit first"
            )
        if (measure := parse_metric(metric)) is None:
            raise ValueError("metric is required by choose_weight; got None")
        frames = validation_frames(results, qrels, self.text_source, what="choose_weight", with_scores=True)
        if frames is None:
            raise ValueError("results and qrels are required by choose_weight; got None")
        data = Validation(*frames, measure)
        data.check_metric()
        warn_of_few_queries([data])
        scored = Scored(data, self.score(self.prepare(data.results.rename(columns={"text": self.text_field}))))
        choice = best_weight([scored], measure, spread=scored.spread)
        _warn_if_not_better(choice, None)
        self.interpolate = choice.weight
        if self.stages:  # a published model has no record of its training
            _record(choice, self.stages[-1])
        return choice


def warn_of_few_queries(parts: Sequence[Validation]) -> None:
    """Warn if so few queries choose a weight that it is a guess."""
    if (queries := sum(part.queries for part in parts)) < MIN_QUERIES:
        warn_of_data(
            f"{queries} labelled queries choose the first stage's weight: with fewer than {MIN_QUERIES}, it's a guess. "
            "Label more, or set a number as interpolate"
        )


def candidates_of(results: TrainingResults, qrels: pd.DataFrame | None, texts: TextSource) -> ValidationFrames | None:
    """Return the training results and qrels that can choose a weight; None, with a warning, if there are no labels.

    Raises:
        ValueError: If the results have no scores, or the labels aren't whole numbers.
    """
    sources = as_sources(results, qrels)
    is_mixture = len(sources) > 1 or sources[0].weight != 1
    results, qrels = sources[0].results, sources[0].qrels
    if is_mixture or not isinstance(results, pd.DataFrame) or qrels is None:
        found = "several or weighted sources" if is_mixture else "without qrels" if qrels is None else "in a file"
        warn_of_data(
            f"no weight is chosen for the first stage's score: the training results are {found}, and there are no "
            "validation results. Pass validation results and qrels, or set a number as interpolate"
        )
        return None
    return validation_frames(results, qrels, texts, what="training", with_scores=True)


@dataclass(frozen=True)
class HeldOut:
    """The training queries that choose a weight, in parts: each is held out from training once."""

    frames: ValidationFrames
    parts: list[set[str]]  # qids

    @classmethod
    def of(cls, frames: ValidationFrames, prepared: Sequence[StageData]) -> "HeldOut":
        """Split at random: two halves for cross-validation, or, of many queries, one part.

        Raises:
            ValueError: If there are too few queries.
        """
        trained = {qid for data in prepared for qid in data.qids}
        # A query that occurs under several qids is held out as a whole.
        queries = frames[0].drop_duplicates("qid").set_index("qid")["query"]
        queries = queries[queries.index.isin(trained)].sort_index()
        distinct = queries.drop_duplicates()
        if len(distinct) < MIN_QUERIES:
            raise ValueError(
                f"training results must have at least {MIN_QUERIES} queries to learn from for interpolate=True; got "
                f"{len(distinct)}. Pass validation results and qrels, or a number as interpolate"
            )
        order = np.random.default_rng(0).permutation(len(distinct))
        is_large = len(order) >= MIN_QUERIES_FOR_HOLD_OUT
        chosen = [order[:HELD_OUT_QUERIES]] if is_large else [order[::2], order[1::2]]
        parts = [{*queries.index[queries.isin(distinct.iloc[part])]} for part in chosen]
        for part in (part for data in prepared for part in data.parts):
            if any(held_out.issuperset(part.groups.qids) for held_out in parts):
                raise ValueError(
                    f"{part.fitter.objective} must have queries besides those that are held out for interpolate=True; "
                    f"got {len(part.groups)} in all. Pass validation results and qrels, or a number as interpolate"
                )
        return cls(frames, parts)

    def data(self, part: int, metric: Any) -> Validation:
        """Return the results and qrels of a part, or of a sample of its queries."""
        results, qrels = (frame[frame["qid"].isin(self.parts[part])].reset_index(drop=True) for frame in self.frames)
        return _affordable(Validation(results, qrels, metric), MAX_PAIRS // len(self.parts))


def _affordable(data: Validation, pairs: int) -> Validation:
    """Return a sample of the queries with so many pairs, but at least 25 queries."""
    return data.sample(max(25, int(data.queries * pairs / max(1, len(data.results)))))


def _without(data: StageData, qids: set[str]) -> StageData:
    """Leave queries out, and see the others as often and in batches of the same size."""
    plans = [plan_training(part.fitter, part.groups, width=1, head_is_new=True) for part in data.parts]
    fitters = [
        part.fitter.replace(
            max_steps=None, epochs=plans[0].epochs, batch_size=plan.batch_size // part.fitter.gradient_accumulation
        )
        for part, plan in zip(data.parts, plans, strict=True)
    ]
    rest = data.without(qids)
    parts = [dataclasses.replace(part, fitter=fitter) for part, fitter in zip(rest.parts, fitters, strict=True)]
    weights = [weight for weight, _ in data.fitter.terms]
    return StageData(weighted_sum(zip(weights, fitters, strict=True)), tuple(parts))


@dataclass(frozen=True)
class CrossValidation:
    """Halves of the queries, each scored by a copy of the model that was trained on the other half."""

    scored: list[Scored]
    shrinkage: float  # of the spread of scores, from queries that a model was trained on to others


def _cross_validate(
    model: CrossEncoder, encoders: Sequence[PairEncoder], prepared: Sequence[StageData], stages: list[StageRecord], *,
    held_out: HeldOut, parts: Sequence[Validation], scorer: PairEncoder, checkpoint_dir: Path | None,
    progress: str | None,
) -> CrossValidation:  # fmt: skip
    """Train a copy of the model without each half of the queries, and score the half; see `fit_reranker`."""
    scored, shrinkage = [], []
    for number, qids in enumerate(held_out.parts):
        copy, rest = model.clone(), [_without(data, qids) for data in prepared]
        folder = None if checkpoint_dir is None else checkpoint_dir / f"half-{number + 1}"
        bar = None if progress is None else f"{progress} on half {number + 1} of 2"
        fit_stages(copy, encoders, rest, [*stages], scorer=scorer, validation=None, checkpoint_dir=folder, progress=bar)
        scored.append(Scored.by(copy, scorer, parts[number]))
        seen = Scored.by(copy, scorer, parts[1 - number].sample(SPREAD_QUERIES))
        shrinkage.append(scored[-1].spread / seen.spread)
        del copy  # before the next one is made
    return CrossValidation(scored, float(np.mean(shrinkage)))


def fit_reranker(
    model: CrossEncoder, encoders: Sequence[PairEncoder], prepared: Sequence[StageData], stages: list[StageRecord], *,
    interpolate: bool | float, scorer: PairEncoder, held_out: HeldOut | None, validation: ValidationFrames | None,
    checkpoint_dir: Path | None, progress: str | None,
) -> None:  # fmt: skip
    """Train a model in place as `fit_stages` does; with `interpolate=True`, also choose a weight, and record it.

    The validation queries choose it. Without them, training queries do: of many, some are held out; fewer are scored by
    copies of the model, each trained on the other half (cross-validation), before the model is trained on all.

    Args:
        model: The model.
        encoders: The encoder of each stage's pairs.
        prepared: Each stage's data.
        stages: The records, to which those of the new stages are added.
        interpolate: The re-ranker's setting.
        scorer: The encoder of the pairs that the re-ranker scores.
        held_out: The training queries that choose the weight, without validation.
        validation: The validation results and qrels.
        checkpoint_dir: The folder for checkpoints.
        progress: The name of the progress bars. None: they are not shown.
    """
    metric = prepared[-1].settings.metric or nDCG @ 10
    before: float | None = None  # the metric of the re-ranker before training
    parts: list[Validation] = []  # what chooses the weight
    halves: CrossValidation | None = None
    _check_validation(prepared, validation)
    if held_out is not None:
        resumed = stages_to_resume(stages, checkpoint_dir, len(prepared))
        _warn_of_earlier_labels(stages[: len(stages) - len(resumed)])
        parts = [held_out.data(part, metric) for part in range(len(held_out.parts))]
        if len(parts) == 1:
            prepared = [data.without(held_out.parts[0]) for data in prepared]
        else:
            halves = _cross_validate(
                model, encoders, prepared, stages, held_out=held_out, parts=parts, scorer=scorer,
                checkpoint_dir=checkpoint_dir, progress=progress,
            )  # fmt: skip
    elif interpolate is True and validation is not None:
        warn_of_few_queries(parts := [_affordable(Validation(*validation, metric), MAX_PAIRS)])
        if stages and stages[-1].interpolation:
            start = dataclasses.replace(parts[0], first_stage_weight=stages[-1].interpolation["weight"])
            before, _ = start.values(model.network, scorer, model.dtype)
    fit_stages(
        model, encoders, prepared, stages, scorer=scorer, validation=validation, checkpoint_dir=checkpoint_dir,
        progress=progress, first_stage_weight=0.0 if interpolate is True else float(interpolate),
    )  # fmt: skip
    if not interpolate and validation is None:
        _advise(stages[-len(prepared) :])
    if interpolate is not True and validation is not None:
        _warn_if_below_first_stage(stages[-1], Validation(*validation, metric))
    if not parts:
        return
    try:
        choice = _choose(model, scorer, parts, halves, metric)
    except BaseException:
        stages[-1].interrupted = stages[-1].updates  # so that a repeated call resumes here
        raise
    _record(choice, stages[-1])
    _warn_if_not_better(choice, before)


def _choose(
    model: CrossEncoder, scorer: PairEncoder, parts: Sequence[Validation], halves: CrossValidation | None, metric: Any
) -> Interpolation:
    """Choose the weight for a trained model, see `fit_reranker`."""
    if halves is None:
        unseen = Scored.by(model, scorer, parts[0])
        return best_weight([unseen], metric, spread=unseen.spread)
    # The model was trained on these queries, which spread its scores more than others do.
    trained = [Scored.by(model, scorer, data.sample(SPREAD_QUERIES)).spread for data in parts]
    return best_weight(halves.scored, metric, spread=float(np.mean(trained)) * halves.shrinkage)


def _record(choice: Interpolation, stage: StageRecord) -> None:
    stage.interpolation = dataclasses.asdict(choice)
    stage.data_report["interpolation"] = str(choice)


def _check_validation(prepared: Sequence[StageData], validation: ValidationFrames | None) -> None:
    """Raise a ValueError if a stage's settings need other validation data."""
    for settings in (data.settings for data in prepared):
        if settings.patience is not None and (validation is None or settings.metric is None):
            raise ValueError(
                f"patience needs validation results and qrels, and a metric; got patience={settings.patience} without. "
                "Pass them to fit, or leave out patience"
            )
        if settings.metric is not None and validation is not None:
            Validation(*validation, settings.metric).check_metric()


def _advise(stages: Sequence[StageRecord]) -> None:
    """Say in the report of a new head's training on few queries what to expect of the model alone."""
    queries = max(stage.data_report["groups"] for stage in stages)
    if stages[0].head_was_new and queries < MIN_QUERIES_FOR_HOLD_OUT:
        stages[-1].data_report["advice"] = (
            f"a new re-ranker that is trained on fewer than {MIN_QUERIES_FOR_HOLD_OUT:,} queries is often worse than "
            "its first stage: compare them, and try interpolate=True, which adds the first stage's score"
        )


def _warn_if_not_better(choice: Interpolation, before: float | None) -> None:
    if choice.value <= choice.first_stage:
        warn(f"re-ranking isn't better than the first stage: {choice}")
    if before is not None and choice.value < before:
        warn(
            f"re-ranking is worse than before this fit: validation {choice.metric} is {choice.value:.4f}, but was "
            f"{before:.4f}. With interpolate=True, the model alone decides which weights are kept. Set a number as "
            "interpolate, or keep a clone() from before this fit"
        )


def _warn_of_earlier_labels(stages: Sequence[StageRecord]) -> None:
    if earlier := [stage.fitter for stage in stages if "Contrastive" in stage.objective.split()]:
        warn(
            f"the first stage's weight may be too small: an earlier fit, {earlier[-1]}, may have learned the labels of "
            "the queries that choose it. Pass validation results of other queries"
        )


def _warn_if_below_first_stage(stage: StageRecord, validation: Validation) -> None:
    value = stage.metrics.get(str(validation.metric))
    if value is None or "score" not in validation.results:
        return
    first = validation.sample(stage.plan["validation_queries"]).first_stage
    if value < first:
        warn(
            f"re-ranking is worse than the first stage: validation {validation.metric} is {value:.3f}, but "
            f"{first:.3f} for the first stage. MonoCE(..., interpolate=True) combines both"
        )
