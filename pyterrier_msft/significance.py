"""Paired tests over queries: is a re-ranker better, worse or equivalent, or is it undecided?

A t-test that finds no difference doesn't show that there is none; an equivalence test with a stated margin can.

- `tost`: the equivalence test, for `pt.Experiment(test=...)`.
- `equivalence_table`: both tests, a confidence interval and a verdict for each pair of systems and measure.
- `seed_summary`: how much a system's mean varies with the seed of its training.

The last two take the frame of `pt.Experiment(perquery=True)`, with the columns name, qid, measure and value. If systems
were trained several times, a column `seed` tells the runs apart.

**Seeds.** Queries are the sample; seeds aren't. Runs with several seeds share their queries, and counting them as more
queries would make p-values arbitrarily small. So a system's values are first averaged over its seeds, query by query,
and n is the number of queries (Sakai 2018). The tests generalize to other queries, *given* the average of the trained
models. How far training runs differ isn't in the p-values but in `seed_summary`; report both (Bouthillier et al.
2021). Systems may have different numbers of seeds; one that isn't trained has one row per query, with any seed or NaN.

**Missing values.** Queries without a value in any system (PyTerrier gives NaN if there are no qrels) are left out, and
n_queries doesn't count them. A query that only some runs have is an error.

**Several comparisons.** With `correction="holm"`, the probability of any false verdict in a family is at most alpha,
whatever the dependence between systems and measures. The family has two null hypotheses per row, no difference and a
difference of at least the margin. Only one of the two can be true, which `holm` makes use of.

References:
    - Schuirmann: A Comparison of the Two One-Sided Tests Procedure and the Power Approach for Assessing the Equivalence
      of Average Bioavailability. J. Pharmacokinetics and Biopharmaceutics 15(6), 1987.
    - Lakens: Equivalence Tests: A Practical Primer for t Tests, Correlations, and Meta-Analyses. Social Psychological
      and Personality Science 8(4), 2017.
    - Holm: A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6(2), 1979.
    - Shaffer: Modified Sequentially Rejective Multiple Test Procedures. Journal of the American Statistical Association
      81(395), 1986.
    - Sakai: Laboratory Experiments in Information Retrieval. Springer, 2018.
    - Bouthillier et al.: Accounting for Variance in Machine Learning Benchmarks. MLSys 2021.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtr, stdtrit

from pyterrier_msft.notices import warn

BETTER = "better"
WORSE = "worse"
EQUIVALENT = "equivalent within the margin"
BETTER_WITHIN = "better, but within the margin"
WORSE_WITHIN = "worse, but within the margin"
UNDECIDED = "undecided"


class Outcome(NamedTuple):
    """A test's statistic and p-value, in the order that PyTerrier and scipy use."""

    statistic: float
    pvalue: float


@dataclass(frozen=True)
class tost:  # a class, so that it can be pickled, compared and printed; used like a function
    """A paired equivalence test: two one-sided t-tests (TOST).

    The null hypothesis is that the true mean difference is at least `margin` away from zero. A small p-value shows
    that the systems are equivalent within the margin. Called with the two systems' values per query, it returns
    `(statistic, p)`: the t and the p-value of the one-sided test with the larger p-value. That is the test against the
    bound closer to the observed mean: +margin if the first system is better.

    The result is never NaN, which PyTerrier would count as a rejection. If all differences are the same, p is 0 if
    that difference is smaller than the margin, and else 1; with fewer than two queries p is 1.

    >>> table = pt.Experiment(
    ...     systems, topics, qrels, [nDCG @ 10], baseline="CL", test=tost(0.01), correction="holm"
    ... )

    PyTerrier's column names don't change: "nDCG@10 p-value" is the TOST's, and "nDCG@10 reject" is True where
    *equivalence* is shown.

    Args:
        margin: The smallest difference that matters, in the measure's unit (0.01: one point of nDCG). Choose it before
            the experiment, by what a user would notice, not by the data.

    Raises:
        ValueError: If the margin isn't a positive number; when called, if the values aren't finite or not paired.

    References:
        Schuirmann 1987, Lakens 2017 (see the module).
    """

    margin: float

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    def __call__(self, a: npt.ArrayLike, b: npt.ArrayLike) -> Outcome:
        """Test whether two systems are equivalent, given one value per query each, in the same order.

        Pairs with a NaN are left out, with a warning.
        """
        x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"a and b must have one value per query each; got shapes {x.shape} and {y.shape}")
        known = ~(np.isnan(x) | np.isnan(y))
        if not known.all():
            warn(f"tost left out {(~known).sum()} of {known.size} queries without a value (NaN)")
        return _tost(_differences(x[known], y[known]), self.margin)


class _Differences(NamedTuple):
    """Summary of paired differences."""

    n: int
    mean: float
    se: float  # standard error of the mean; 0: no variance; NaN: fewer than two queries


def _differences(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> _Differences:
    if len(x) < 2:
        return _Differences(len(x), float(np.mean(x - y)) if len(x) else math.nan, math.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        d = x - y
        mean, sd = float(d.mean()), float(d.std(ddof=1))
    if not (math.isfinite(mean) and math.isfinite(sd)):
        raise ValueError(f"values must be finite; got a mean difference of {mean} with standard deviation {sd}")
    # 0.31 - 0.3 and 0.51 - 0.5 aren't the same number: rounding errors count neither as spread nor as a difference.
    rounding = 4 * np.finfo(float).eps * max(np.abs(x).max(), np.abs(y).max())
    if sd <= rounding:
        return _Differences(len(d), mean if abs(mean) > rounding else 0.0, 0.0)
    return _Differences(len(d), mean, sd / math.sqrt(len(d)))


def paired_t_test(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return the p-value of the two-sided paired t-test of one value per query each, in the same order."""
    return _ttest(_differences(np.asarray(a, dtype=float), np.asarray(b, dtype=float)))


def _ttest(d: _Differences) -> float:
    """The p-value of the two-sided paired t-test, also without variance."""
    if d.n < 2:
        return 1.0
    if d.se == 0:
        return 0.0 if d.mean else 1.0
    return 2 * float(stdtr(d.n - 1, -abs(d.mean / d.se)))


def _tost(d: _Differences, margin: float) -> Outcome:
    """The one-sided t-test against the bound closer to the mean, which has the larger p-value of the two."""
    if d.n < 2:
        return Outcome(0.0, 1.0)
    inside = margin - abs(d.mean)  # > 0: the mean lies within the margin
    if d.se > 0:
        t = inside / d.se
        p = float(stdtr(d.n - 1, -t))
    elif math.isclose(abs(d.mean), margin):
        t, p = 0.0, 1.0
    else:
        t, p = math.copysign(math.inf, inside), float(inside <= 0)
    return Outcome(-t if d.mean >= 0 else t, p)


def _interval(d: _Differences, level: float) -> tuple[float, float]:
    """The t interval of the mean; NaN for fewer than two queries."""
    half = float(stdtrit(d.n - 1, (1 + level) / 2)) * d.se if d.n > 1 else math.nan
    return d.mean - half, d.mean + half


def holm(p: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Correct the p-values of a family of tests for their number (Holm 1979), keeping their order.

    Comparing the corrected values with alpha keeps the probability of any false rejection below alpha, whatever the
    dependence between the tests. It is uniformly more powerful than Bonferroni's correction.

    Args:
        p: [n] p-values; or [n, k], if at most one of the k null hypotheses in a row can be true. Then each p-value,
            from the smallest, is multiplied by the number of rows with a hypothesis that isn't rejected yet (Shaffer
            1986). Up to the first false rejection, at most this many hypotheses are true, so Bonferroni's bound holds.
    """
    p = np.asarray(p, dtype=float)
    last_of_row = np.sort(p if p.ndim == 1 else p.max(axis=1))  # (n,): a row is rejected with its largest p-value
    ordered = np.sort(p, axis=None)
    open_rows = len(p) - np.searchsorted(last_of_row, ordered)  # those not rejected before
    corrected = np.minimum(np.maximum.accumulate(open_rows * ordered), 1)
    return np.asarray(corrected[np.searchsorted(ordered, p)])


def equivalence_table(
    perquery: pd.DataFrame,
    *,
    margin: float | Mapping[Any, float],
    baseline: str | None = None,
    measures: Iterable[Any] | None = None,
    alpha: float = 0.05,
    correction: Literal["holm"] | None = None,
    family: Literal["table", "measure"] = "table",
) -> pd.DataFrame:
    """Compare systems query by query: t-test, equivalence test, confidence interval and a verdict.

    The verdict on `system` compares the two p-values (corrected, if a correction is given) with alpha:

    - "better" or "worse" (than the baseline): the t-test rejects equal means. As it is two-sided, the direction is that
      of the difference;
    - "equivalent within the margin": the TOST rejects a difference of `margin` or more;
    - "better, but within the margin" or "worse, but within the margin": both reject; there is a difference, and it is
      smaller than what matters (frequent with many queries);
    - "undecided": neither rejects; there are too few queries to tell. It does *not* mean "no difference".

    The confidence interval is the TOST's, of level 1 - 2 alpha (90% for alpha = .05): without a correction, the TOST
    rejects exactly if the interval lies within ±margin (Lakens 2017). It is narrower than the t-test's of level
    1 - alpha, and isn't corrected. See the module for seeds and missing values.

    Args:
        perquery: Columns name, qid, measure and value, as of `pt.Experiment(perquery=True)`; optionally seed.
        margin: The smallest difference that matters, in the measure's unit; or a mapping from measure to margin.
        baseline: The system that each other one is compared with. None: compare all pairs.
        measures: The measures to compare by, in this order. None: all.
        alpha: The level of each test; with a correction, the probability of any false verdict in a family.
        correction: "holm" corrects both tests' p-values for the number of comparisons in a family, see the module.
        family: What is corrected together: the whole "table"; or each "measure" on its own, as in `pt.Experiment`, so
            that every measure has a chance of alpha of a false verdict.

    Returns:
        A row for each measure and pair: measure, system, baseline, n_queries, mean, baseline_mean, difference (system -
        baseline), ci_low, ci_high, ci_level, margin, p_ttest, p_tost, (p_ttest_holm, p_tost_holm,) verdict.

    Raises:
        ValueError: If a column, system, measure or margin is missing or invalid, if runs have different queries, or if
            a run has several values for a query.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be between 0 and 0.5; got {alpha!r}")
    if correction not in {None, "holm"}:
        raise ValueError(f"correction must be None or 'holm'; got {correction!r}")
    if family not in {"table", "measure"}:
        raise ValueError(f"family must be 'table' or 'measure'; got {family!r}")
    names = _systems(perquery, at_least=2)
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline must be one of {names}; got {baseline!r}")
    chosen = _measures(perquery, measures)
    margins = _margins(margin, chosen)
    pairs = [(baseline, n) for n in names if n != baseline] if baseline is not None else list(combinations(names, 2))
    rows: list[dict[str, Any]] = []
    for measure in chosen:
        values = query_values(perquery, measure)
        for base, system in pairs:
            compared = {"measure": measure, "system": system, "baseline": base}
            rows.append(compared | _comparison(values[system], values[base], margins[measure], 1 - 2 * alpha))
    table = pd.DataFrame(rows)
    if correction == "holm":
        table = _with_holm(table, by_measure=family == "measure")
    return _with_verdicts(table, alpha, suffix="" if correction is None else "_holm")


def _comparison(values: pd.Series, baseline: pd.Series, margin: float, level: float) -> dict[str, Any]:
    x, y = values.to_numpy(), baseline.to_numpy()
    d = _differences(x, y)
    low, high = _interval(d, level)
    return {
        "n_queries": d.n, "mean": x.mean(), "baseline_mean": y.mean(), "difference": d.mean,
        "ci_low": low, "ci_high": high, "ci_level": level,
        "margin": margin, "p_ttest": _ttest(d), "p_tost": _tost(d, margin).pvalue,
    }  # fmt: skip


def _with_holm(table: pd.DataFrame, *, by_measure: bool) -> pd.DataFrame:
    parts = [part for _, part in table.groupby("measure", sort=False)] if by_measure else [table]
    corrected = np.concatenate([holm(part[["p_ttest", "p_tost"]]) for part in parts])  # rows are ordered by measure
    return table.assign(p_ttest_holm=corrected[:, 0], p_tost_holm=corrected[:, 1])


def _with_verdicts(table: pd.DataFrame, alpha: float, *, suffix: str) -> pd.DataFrame:
    different, equivalent = table[f"p_ttest{suffix}"] < alpha, table[f"p_tost{suffix}"] < alpha
    better = table["difference"] > 0
    conditions = [different & equivalent & better, different & equivalent, different & better, different, equivalent]
    choices = [BETTER_WITHIN, WORSE_WITHIN, BETTER, WORSE, EQUIVALENT]
    return table.assign(verdict=np.select(conditions, choices, default=UNDECIDED).astype(object))


def seed_summary(perquery: pd.DataFrame) -> pd.DataFrame:
    """Compute each system's mean and its standard deviation over the seeds of its training.

    `mean` and `std` are those of the seeds' means over queries. So std says how far another training run would land
    from this one on the *same* queries, and nothing about other queries (Bouthillier et al. 2021).

    Args:
        perquery: Columns name, qid, measure and value, as of `pt.Experiment(perquery=True)`; optionally seed.

    Returns:
        A row for each system and measure: name, measure, mean, std (with n_seeds - 1 degrees of freedom; NaN for a
        single seed), n_seeds, n_queries.

    Raises:
        ValueError: If a column is missing, runs have different queries, or a run has several values for a query.
    """
    runs = {measure: _runs(perquery, measure) for measure in _measures(perquery, None)}
    rows = []
    for name in _systems(perquery):
        for measure, by_name in runs.items():
            n_queries, n_seeds = by_name[name].shape
            means = by_name[name].mean()  # over queries, one for each seed
            rows.append((name, measure, means.mean(), means.std(ddof=1), n_seeds, n_queries))
    return pd.DataFrame(rows, columns=["name", "measure", "mean", "std", "n_seeds", "n_queries"])


def query_values(perquery: pd.DataFrame, measure: Any) -> pd.DataFrame:
    """Return a measure's value for each query (index qid) and system (column), averaged over the system's seeds.

    Raises:
        ValueError: As in `equivalence_table`.
    """
    return pd.DataFrame({name: runs.mean(axis=1) for name, runs in _runs(perquery, str(measure)).items()})


def _runs(perquery: pd.DataFrame, measure: str) -> dict[str, pd.DataFrame]:
    """A measure's values as a frame of queries × seeds for each system. All have the same queries, and no NaN."""
    names = _systems(perquery)
    rows = perquery[perquery["measure"].map(str) == measure]
    if rows.empty:
        raise ValueError(f"measure must be one of {_measures(perquery, None)}; got {measure!r}")
    # As text, so that the NaN of a system that isn't trained is a seed like any other.
    rows = rows.assign(seed=rows["seed"].map(str) if "seed" in rows else "")
    repeated = rows[rows.duplicated(["name", "seed", "qid"])]
    if len(repeated):
        raise ValueError(
            f"perquery must have one value of {measure} for each name, qid and seed; got {len(repeated)} duplicates, "
            f"e.g. for {repeated['name'].iloc[0]!r}, query {repeated['qid'].iloc[0]!r}. Add a column 'seed'"
        )
    qids = rows.loc[rows["value"].notna(), "qid"].unique()
    if not len(qids):
        raise ValueError(f"perquery must have values of {measure}; got only NaN. Check the qids of the qrels")
    runs: dict[str, pd.DataFrame] = {}
    missing: dict[str, int] = {}
    examples: dict[str, None] = {}  # an ordered set
    for name in names:
        run = rows[rows["name"] == name].pivot(index="qid", columns="seed", values="value").astype(float).reindex(qids)
        incomplete = run.count(axis=1) < max(run.shape[1], 1)  # all, for a system without a row of this measure
        if incomplete.any():
            missing[name] = int(incomplete.sum())
            examples |= dict.fromkeys(map(str, qids[incomplete][:3]))
        runs[name] = run
    if missing:
        raise ValueError(
            f"runs must have values of {measure} for the same {len(qids)} queries; got queries without one: {missing}, "
            f"e.g. {', '.join(list(examples)[:3])}. Evaluate all systems on the same topics, or keep the shared queries"
        )
    return runs


def _systems(perquery: pd.DataFrame, *, at_least: int = 1) -> list[str]:
    """The systems, in their order."""
    if {"name", "qid", "measure", "value"} - set(perquery):
        raise ValueError(
            f"perquery must have the columns ['name', 'qid', 'measure', 'value']; got {list(perquery)}. Pass the frame "
            "of pt.Experiment(..., perquery=True)"
        )
    names = list(perquery["name"].unique())
    if len(names) < at_least:
        raise ValueError(f"perquery must have at least {at_least} systems; got {names}")
    return names


def _measures(perquery: pd.DataFrame, measures: Iterable[Any] | None) -> list[str]:
    _systems(perquery)
    found = list(dict.fromkeys(perquery["measure"].map(str)))
    if measures is None:
        return found
    chosen = list(dict.fromkeys(map(str, [measures] if isinstance(measures, str) else measures)))
    if not chosen or set(chosen) - set(found):
        raise ValueError(f"measures must be among {found}; got {chosen}")
    return chosen


def _margins(margin: float | Mapping[Any, float], measures: list[str]) -> dict[str, float]:
    by_name = {str(m): v for m, v in margin.items()} if isinstance(margin, Mapping) else dict.fromkeys(measures, margin)
    if missing := [m for m in measures if m not in by_name]:
        raise ValueError(f"margin must have a value for each of {measures}; got none for {missing}")
    for value in by_name.values():
        _check_margin(value)
    return {m: float(by_name[m]) for m in measures}


def _check_margin(margin: Any) -> None:
    if not isinstance(margin, int | float | np.number) or isinstance(margin, bool) or not 0 < margin < math.inf:
        raise ValueError(f"margin must be a number > 0 in the measure's unit, e.g. 0.01; got {margin!r}")
