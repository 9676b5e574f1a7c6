"""Choose the weight that the first stage's score has in a re-ranker's score."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ir_measures import nDCG

from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.data.validation import validation_frames
from pyterrier_msft.fitting import StageData, ValidationFrames, fit_stages
from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.record import StageRecord
from pyterrier_msft.notices import warn
from pyterrier_msft.training.validation import Validation

# Weights to try, relative to the standard deviations of both scores: 0, and steps of half an octave up to 32, where the
# model does little more than break ties of the first stage.
RELATIVE_WEIGHTS = (0.0, *(2 ** (step / 2) for step in range(-6, 11)))
# With fewer training queries, cross-validation chooses the weight, as they are too few to do without some of them.
MIN_QUERIES_FOR_HOLD_OUT = 1000
HELD_OUT_QUERIES = 200
MAX_PAIRS = 20_000  # to score for the choice


@dataclass(frozen=True)
class Interpolation:
    """The choice of a weight: `score = model's score + weight * first stage's score`."""

    weight: float
    relative_weight: float  # in standard deviations of the scores of a query's documents
    queries: int  # that chose it
    metric: str
    value: float  # of the metric, with the weight
    model: float  # of the model alone
    first_stage: float  # of the first stage alone

    def __str__(self) -> str:
        return (
            f"first stage's weight {self.weight:.3g} ({self.relative_weight:.2g} in standard deviations): on "
            f"{self.queries:,} queries, {self.metric} is {self.value:.3f}, of the model alone {self.model:.3f}, of the "
            f"first stage {self.first_stage:.3f}"
        )


@dataclass(frozen=True)
class Scored:
    """Results of queries that the model wasn't trained on, with its score of each row."""

    validation: Validation
    scores: np.ndarray


def choose_weight(parts: Sequence[Scored], metric: Any) -> Interpolation:
    """Choose the weight with the best value of a metric, as the mean of five neighbouring weights.

    The metric of few queries jumps from weight to weight; the mean of neighbours is steadier. Each part is scored by
    a model of its own, so scores are divided by their standard deviation first: that of the scores of a query's
    documents, over all queries of the part.
    """
    model_scales = [_spread(part.scores, part.validation.results) for part in parts]
    first_scales = [_spread(part.validation.results["score"], part.validation.results) for part in parts]
    model_scale, first_scale = float(np.mean(model_scales)), float(np.mean(first_scales))
    everything = Validation(
        pd.concat([part.validation.results for part in parts], ignore_index=True),
        pd.concat([part.validation.qrels for part in parts], ignore_index=True),
        metric,
    )
    model = np.concatenate([part.scores / scale for part, scale in zip(parts, model_scales, strict=True)])
    first = everything.results["score"].to_numpy() / first_scale
    values = np.array([everything.measure(model + weight * first) for weight in RELATIVE_WEIGHTS])
    smooth = np.convolve(np.pad(values, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    best = int(smooth.argmax())
    return Interpolation(
        weight=float(RELATIVE_WEIGHTS[best] * model_scale / first_scale),
        relative_weight=RELATIVE_WEIGHTS[best],
        queries=everything.queries,
        metric=str(metric),
        value=float(values[best]),
        model=float(values[0]),
        first_stage=everything.measure(first),
    )


def _spread(scores: Any, results: pd.DataFrame) -> float:
    """Return the standard deviation of the scores of a query's documents, over all queries."""
    values = pd.Series(np.asarray(scores, dtype=np.float64))
    deviations = values - values.groupby(results["qid"].to_numpy()).transform("mean")
    return float(np.sqrt((deviations**2).mean())) or 1.0


def held_out_frames(
    results: pd.DataFrame | str | Path, qrels: pd.DataFrame | None, texts: TextSource
) -> ValidationFrames:
    """Return the training results and qrels that can choose a weight, checked.

    Raises:
        ValueError: If there are none: the training queries have no labels, or their results are in a file.
    """
    if isinstance(results, str | Path) or qrels is None:
        found = "qrels=None" if qrels is None else f"results in the file {results}"
        raise ValueError(
            "validation is required by interpolate=True where training queries can't choose the first stage's weight; "
            f"got {found} and no validation. Pass validation results and qrels to fit, or a number as interpolate"
        )
    frames = validation_frames(results, qrels, texts, what="training", with_scores=True)
    assert frames is not None
    return frames


@dataclass(frozen=True)
class Splits:
    """The parts of the training queries that are held out to choose a weight."""

    frames: ValidationFrames
    parts: list[set[str]]  # qids

    @classmethod
    def of(cls, frames: ValidationFrames, prepared: Sequence[StageData]) -> "Splits":
        """Split at random: two halves for cross-validation, or, of many queries, one part to hold out."""
        trained = {qid for data in prepared for qid in data.groups.qids}
        qids = np.array(sorted(trained & {*frames[0]["qid"]}))
        np.random.default_rng(0).shuffle(qids)
        if len(qids) >= MIN_QUERIES_FOR_HOLD_OUT:
            return cls(frames, [{*qids[:HELD_OUT_QUERIES]}])
        return cls(frames, [{*qids[::2]}, {*qids[1::2]}])

    def validation(self, part: int, metric: Any) -> Validation:
        """Return the results and qrels of a part, or of a sample of its queries if they have very many documents."""
        results, qrels = (frame[frame["qid"].isin(self.parts[part])].reset_index(drop=True) for frame in self.frames)
        validation = Validation(results, qrels, metric)
        affordable = MAX_PAIRS / len(self.parts) / max(1, len(results))
        return validation.sample(max(25, int(validation.queries * affordable)))


def fit_reranker(
    model: CrossEncoder, encoders: Sequence[PairEncoder], prepared: Sequence[StageData], stages: list[StageRecord], *,
    candidates: ValidationFrames | None, validation: ValidationFrames | None, checkpoint_dir: Path | None,
    verbose: bool,
) -> None:  # fmt: skip
    """Train a model in place as `fit_stages` does; with `candidates`, also choose a weight, and record it.

    The validation queries choose it. Without them, training queries do: of many, some are held out; fewer are scored by
    copies of the model, each trained on the other half (cross-validation), before the model is trained on all.

    Args:
        model: The model.
        encoders: The encoder of each stage's pairs.
        prepared: Each stage's data.
        stages: The records, to which those of the new stages are added.
        candidates: The results and qrels that choose the weight: of the validation queries, or of the training queries
            (see `held_out_frames`). None: no weight is chosen.
        validation: The validation results and qrels.
        checkpoint_dir: The folder for checkpoints.
        verbose: Whether to show progress bars.
    """
    metric = prepared[-1].fitter.metric or nDCG @ 10
    options: dict[str, Any] = {"validation": validation, "verbose": verbose}

    def score(scorer: CrossEncoder, data: Validation) -> Scored:
        return Scored(data, data.score(scorer.network, encoders[-1], scorer.dtype))

    if candidates is None:
        fit_stages(model, encoders, prepared, stages, checkpoint_dir=checkpoint_dir, **options)
        if validation is not None:
            _warn_if_below_first_stage(stages[-1], Validation(*validation, metric))
        return
    splits = None if validation is not None else Splits.of(candidates, prepared)
    if splits is None:
        fit_stages(model, encoders, prepared, stages, checkpoint_dir=checkpoint_dir, **options)
        parts = [score(model, Validation(*candidates, metric))]
    elif len(splits.parts) == 1:
        rest = [data.without(splits.parts[0]) for data in prepared]
        fit_stages(model, encoders, rest, stages, checkpoint_dir=checkpoint_dir, **options)
        parts = [score(model, splits.validation(0, metric))]
    else:
        parts = []
        for part, qids in enumerate(splits.parts):
            copy, rest = model.clone(), [data.without(qids) for data in prepared]
            folder = None if checkpoint_dir is None else checkpoint_dir / f"half-{part + 1}"
            fit_stages(copy, encoders, rest, [], checkpoint_dir=folder, **options)
            parts.append(score(copy, splits.validation(part, metric)))
        fit_stages(model, encoders, prepared, stages, checkpoint_dir=checkpoint_dir, **options)
    choice = choose_weight(parts, metric)
    stages[-1].interpolation = dataclasses.asdict(choice)
    stages[-1].data_report["interpolation"] = str(choice)
    if choice.value <= choice.first_stage:
        warn(f"re-ranking isn't better than the first stage: {choice}")


def _warn_if_below_first_stage(stage: StageRecord, validation: Validation) -> None:
    first, values = validation.first_stage, stage.validations(str(validation.metric))
    if first is not None and values and max(values) < first:
        warn(
            f"re-ranking is worse than the first stage: validation {validation.metric} is {max(values):.3f}, of the "
            f"first stage {first:.3f}. MonoCE(..., interpolate=True) combines both"
        )
