"""Grid search over the settings of a fitter: validation queries choose."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.algebra import FitterSum
from pyterrier_msft.checks import check_seeds
from pyterrier_msft.data.validation import validation_frames
from pyterrier_msft.digests import format_value
from pyterrier_msft.fitters import Fitter
from pyterrier_msft.fitting import ValidationFrames
from pyterrier_msft.notices import deduplicate_data_warnings, message_prefix, warn
from pyterrier_msft.reranker import MonoCE
from pyterrier_msft.sequences import Stage, fit_sequences
from pyterrier_msft.training.validation import Validation

logger = logging.getLogger(__name__)

STAGE = "grid"  # the stage's name, which the folders in save_dir start with
# Settings that must be the same in all combinations, and where they are set.
SET_ELSEWHERE = {"metric": "metric=", "seed": "seeds="}


@dataclass(frozen=True, eq=False, repr=False)
class GridResult:
    """What `fit_grid` found; `plots.grid` draws it.

    Args:
        table: A row for each combination, in the order of the grid: its settings, the value of the metric for the
            validation queries (with seeds, the mean, and the columns lowest and highest), and the number of updates and
            the seconds that training took (with seeds, their means). Settings that look the same, such as two frames,
            are numbered in the order of their list.
        best: The re-ranker with the best combination; with seeds, the best of its seeds.
        best_setting: That combination.
        metric: The column of the metric.
        first_stage: The first stage's value of the metric; None if the validation results have neither score nor rank.
        start: The value of the re-ranker before training; None if its head was untrained.
    """

    table: pd.DataFrame
    best: MonoCE
    best_setting: dict[str, Any]
    metric: str
    first_stage: float | None
    start: float | None

    def __repr__(self) -> str:
        row = self.table.to_dict("records")[int(self.table[self.metric].to_numpy().argmax())]
        setting = ", ".join(f"{name}={row[name]}" for name in self.best_setting)
        others = {"first stage": self.first_stage, "before training": self.start}
        known = "".join(f", {name} {value:.3f}" for name, value in others.items() if value is not None)
        return (
            f"GridResult(best of {len(self.table)}: {setting}; validation {self.metric} {row[self.metric]:.3f}{known})"
        )


@deduplicate_data_warnings()
def fit_grid(
    reranker: MonoCE,
    stage: Stage,
    grid: Mapping[str, Sequence[Any]],
    *,
    validation: ValidationFrames,
    metric: Any = None,
    save_dir: str | Path | None = None,
    seeds: Sequence[int] | None = None,
) -> GridResult:
    """Train a copy of a re-ranker with each combination of a fitter's settings, and choose one by validation.

    Args:
        reranker: The re-ranker that each training run starts from; it isn't changed.
        stage: The fitter and its data.
        grid: The values to try by the fitter's settings, e.g.
            `{"learning_rate": [1e-4, 2e-4], "n_negatives": [3, 7]}`.
        validation: Results and qrels of other queries, which also choose the weights of each training run. The
            chosen combination's value is the best of many, so it is too optimistic: report that of test queries.
        metric: The `ir_measures` measure to maximize, in each training run too. None: the fitter's `metric`.
        save_dir: Folder to keep each result in, so that a later call reuses it, also with a larger grid, and an
            interrupted call is resumed; see `fit_sequences`.
        seeds: Train each combination once per seed and compare the means, as a small difference may be due to chance.

    Returns:
        The table of all combinations, and the best re-ranker. Only the latter is kept in memory.

    Raises:
        ValueError: If the fitter has no such setting, a value is out of range, a list is empty, or the metric has no
            value; raised before training.
    """
    if len(stage.fitter.stages) > 1:
        raise ValueError(
            f"stage must have a single fitter; got {stage.fitter!r}. Search the stages one after the other: pass the "
            "best re-ranker of the first grid to the second one"
        )
    fitter = stage.fitter.stages[0]
    if metric is not None:
        fitter = fitter.replace(metric=metric)
    if fitter.parts[0].metric is None:
        raise ValueError("metric is required by fit_grid; got None, and a fitter without one")
    combinations = _combinations(fitter, grid)
    if seeds is not None and not len(seeds):
        raise ValueError("seeds must be a non-empty list or None; got none")
    seeds = None if seeds is None else check_seeds(seeds)
    evaluator = _Evaluator.of(reranker, validation, fitter.parts[0].metric)
    before = evaluator.start(reranker)
    rows: list[dict[str, Any]] = []
    best: tuple[float, MonoCE, dict[str, Any]] | None = None
    for number, (setting, shown, candidate) in enumerate(combinations, 1):
        with message_prefix(f"combination {number} of {len(combinations)}"):
            found, trained = _try(reranker, dataclasses.replace(stage, fitter=candidate), evaluator, save_dir, seeds)
        rows.append(shown | found)
        value = found[evaluator.metric]
        logger.info("%d of %d: %s has %s %.4f", number, len(combinations), shown, evaluator.metric, value)
        if best is None or value > best[0]:
            best = value, trained, setting
        del trained  # so that no more models are in memory than needed
    assert best is not None
    if len(rows) > 1 and len({row[evaluator.metric] for row in rows}) == 1:
        warn(
            f"all {len(rows)} combinations have a validation {evaluator.metric} of {best[0]:.3f}; the first one is "
            "returned. Choose another metric, e.g. one with a smaller cutoff, or more validation queries"
        )
    return GridResult(pd.DataFrame(rows), best[1], best[2], evaluator.metric, evaluator.first_stage, before)


def _combinations(
    fitter: Fitter | FitterSum, grid: Mapping[str, Sequence[Any]]
) -> list[tuple[dict[str, Any], dict[str, Any], Fitter | FitterSum]]:
    """Return each combination of the settings, how the table shows it, and its fitter, which checks the values."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"grid must map settings to lists of values; got {grid!r}")
    lists = {}
    for name, values in grid.items():
        if name in SET_ELSEWHERE:
            raise ValueError(f"grid must not vary {name!r}. Use {SET_ELSEWHERE[name]} instead")
        if isinstance(values, np.ndarray):
            values = values.tolist()  # noqa: PLW2901
        if not isinstance(values, list | tuple | range) or not len(values):
            raise ValueError(f"grid must map {name!r} to a non-empty list of values; got {format_value(values)}")
        lists[name] = [*zip(values, _shown(values), strict=True)]
    combinations = []
    for chosen in itertools.product(*lists.values()):
        setting = {name: value for name, (value, _) in zip(lists, chosen, strict=True)}
        shown = {name: text for name, (_, text) in zip(lists, chosen, strict=True)}
        combinations.append((setting, shown, fitter.replace(**setting)))
    return combinations


def _shown(values: Sequence[Any]) -> list[Any]:
    """Return values as the table shows them: numbers and strings, or texts, numbered if several are the same."""
    texts = [None if isinstance(value, int | float | str) else format_value(value) for value in values]
    return [
        value if text is None else f"{text} ({texts[: k + 1].count(text)})" if texts.count(text) > 1 else text
        for k, (value, text) in enumerate(zip(values, texts, strict=True))
    ]


def _try(
    reranker: MonoCE, stage: Stage, evaluator: "_Evaluator", save_dir: str | Path | None, seeds: Sequence[int] | None
) -> tuple[dict[str, Any], MonoCE]:  # fmt: skip
    """Train with one combination, once per seed; return its results for the table, and the best re-ranker."""
    values: list[float] = []
    runs: list[Mapping[str, Any]] = []
    best: MonoCE | None = None
    for seed in [None] if seeds is None else seeds:
        start = reranker if seed is None else reranker.reseeded(seed)
        own = stage if seed is None else dataclasses.replace(stage, fitter=stage.fitter.replace(seed=seed))
        trained = fit_sequences(start, {STAGE: own}, [STAGE], validation=evaluator.frames, save_dir=save_dir)[STAGE]
        value = evaluator.value(trained)
        if best is None or value > max(values):
            best = trained
        values.append(value)
        runs.append(trained.stages[-1].history[-1])
    assert best is not None
    row = {evaluator.metric: float(np.mean(values))}
    if seeds is not None:
        row |= {"lowest": min(values), "highest": max(values)}
    row |= {name: np.mean([run[key] for run in runs]) for name, key in (("updates", "step"), ("seconds", "seconds"))}
    return row, best


@dataclass(frozen=True)
class _Evaluator:
    """Measures re-rankers on all validation queries, with the scores that `transform` gives."""

    frames: ValidationFrames  # the user's
    data: Validation
    results: pd.DataFrame  # those of `data`, as input of `transform`

    @classmethod
    def of(cls, reranker: MonoCE, validation: ValidationFrames, metric: Any) -> "_Evaluator":
        results, qrels = (None, None) if validation is None else validation
        frames = validation_frames(results, qrels, reranker.text_source, with_scores=reranker.interpolate is not False)
        if frames is None:
            raise ValueError("validation is required by fit_grid; got None")
        data = Validation(*frames, metric)
        if math.isnan(data.measure(np.zeros(len(frames[0])))):
            raise ValueError(f"metric must have a value for the validation queries; got NaN of {data.metric}")
        return cls(validation, data, frames[0].rename(columns={"text": reranker.text_field}))

    @property
    def metric(self) -> str:
        return str(self.data.metric)

    def value(self, reranker: MonoCE) -> float:
        return self.data.measure(reranker.transform(self.results)["score"].to_numpy())

    def start(self, reranker: MonoCE) -> float | None:
        """Return the value of a re-ranker before training; None if it can't score yet."""
        is_new = reranker.cross_encoder.head_is_new or reranker.first_stage_weight is None
        return None if is_new else self.value(reranker)

    @property
    def first_stage(self) -> float | None:
        return self.data.first_stage if "score" in self.data.results else None
