"""Choose the weight that the first stage's score has beside a model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.training.validation import Validation

# Weights to try, relative to the standard deviations of both scores: 0, and steps of half an octave up to 32, where the
# model does little more than break ties of the first stage.
RELATIVE_WEIGHTS = (0.0, *(2 ** (step / 2) for step in range(-6, 11)))
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
        return (
            f"first stage's weight {self.weight:.3g} (weighted, its scores vary {self.relative_weight:.2g} times as "
            f"much as the model's): on {self.queries:,} queries, {self.metric} is {self.value:.3f} (model alone "
            f"{self.model:.3f}, first stage {self.first_stage:.3f})"
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


def choose_weight(parts: Sequence[Scored], metric: Any, *, spread: float) -> Interpolation:
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


class ValidationOfSum(Validation):
    """Validation of a model's score plus the first stage's, with the weight that is best each time."""

    def value(self, network: PreTrainedModel, encoder: PairEncoder, dtype: torch.dtype) -> float:
        """Score the results as the re-ranker does, and measure them with the best weight."""
        scored = Scored(self, self.score(network, encoder, dtype))
        return choose_weight([scored], self.metric, spread=scored.spread).value


def validation_of(frames: tuple[pd.DataFrame, pd.DataFrame], metric: Any, *, interpolate: bool | float) -> Validation:
    """Return the validation of what a re-ranker with this setting scores."""
    if interpolate is True:
        return ValidationOfSum(*frames, metric)
    return Validation(*frames, metric, float(interpolate))
