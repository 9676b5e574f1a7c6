"""Are two re-rankers different, equivalent, or is it undecided? Paired tests over queries.

That a t-test finds no difference does not show that there is none; an equivalence test with a stated margin can.

- `tost`: the equivalence test, in the form that `pt.Experiment(test=…)` takes.
- `equivalence_table`: both tests, a confidence interval and a verdict for each pair of systems and measure.
- `seed_summary`: how far a system's mean varies with the seed it was trained with.

The input of the latter two is the frame of `pt.Experiment(perquery=True)` with columns name, qid, measure and value;
one of several training runs has a further column `seed`.

References:
    - Schuirmann: A Comparison of the Two One-Sided Tests Procedure and the Power Approach for Assessing the Equivalence
      of Average Bioavailability. J. Pharmacokinetics and Biopharmaceutics 15(6), 1987.
    - Lakens: Equivalence Tests: A Practical Primer for t Tests, Correlations, and Meta-Analyses. Social Psychological
      and Personality Science 8(4), 2017.
    - Holm: A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6(2), 1979.
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

DIFFERENT = "different"
EQUIVALENT = "equivalent within the margin"
BOTH = "different, but within the margin"
UNDECIDED = "undecided"


class Outcome(NamedTuple):
    """A test's statistic and p-value, in the order in which PyTerrier and scipy have them."""

    statistic: float
    pvalue: float


@dataclass(frozen=True)
class tost:  # a class, so that it pickles, compares and prints as it was written; used like a function
    """A paired equivalence test: two one-sided t-tests (TOST).

    The null hypothesis is that the true mean difference is at least `margin` away from zero; a small p-value says that
    the systems are equivalent as far as the margin goes. Called with the two systems' values per query it gives
    `(statistic, p)`: p is the larger of the two one-sided p-values, and the statistic is the t of that test, against
    the bound that is nearer to the observed mean (+margin if a is ahead).

    The test never gives a NaN, which PyTerrier would count as a rejection: differences that are all the same give
    p = 0 if they are smaller than the margin and 1 otherwise; of fewer than two queries nothing is known, and p = 1.

    >>> table = pt.Experiment(
    ...     systems, topics, qrels, [nDCG @ 10], baseline="CL", test=tost(0.01), correction="holm"
    ... )

    PyTerrier labels its columns as ever: "nDCG@10 p-value" is then the TOST's, and "nDCG@10 reject" is True where
    *equivalence* is shown.

    Args:
        margin: the smallest difference that matters, in the measure's unit (0.01: one point of nDCG). It is chosen
            beforehand, from what a user of the system would notice, not from the data.

    Raises:
        ValueError: the margin isn't a positive number; or, when called, the values aren't finite or don't pair up.

    References:
        Schuirmann 1987, Lakens 2017 (see the module).
    """

    margin: float

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    def __call__(self, a: npt.ArrayLike, b: npt.ArrayLike) -> Outcome:
        """Tests whether `a` and `b`, one value a query each and in the same order, are equivalent.

        A pair with a NaN is left out, with a warning that counts them.
        """
        x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"expected two sequences of one value a query, found shapes {x.shape} and {y.shape}")
        known = ~(np.isnan(x) | np.isnan(y))
        if not known.all():
            warn(f"tost: {(~known).sum()} of {known.size} queries have no value (NaN), left out")
        return _tost(_differences(x[known], y[known]), self.margin)


class _Differences(NamedTuple):
    """What the tests need to know of the paired differences."""

    n: int
    mean: float
    se: float  # standard error of the mean; 0: there is no variance; NaN: fewer than two queries


def _differences(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> _Differences:
    if len(x) < 2:
        return _Differences(len(x), float(np.mean(x - y)) if len(x) else math.nan, math.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        d = x - y
        mean, sd = float(d.mean()), float(d.std(ddof=1))
    if not (math.isfinite(mean) and math.isfinite(sd)):
        raise ValueError(f"expected finite values, found a mean difference of {mean} with standard deviation {sd}")
    # 0.31 - 0.3 and 0.51 - 0.5 are not the same number: what subtraction's rounding leaves is neither spread nor mean.
    rounding = 4 * np.finfo(float).eps * max(np.abs(x).max(), np.abs(y).max())
    if sd <= rounding:
        return _Differences(len(d), mean if abs(mean) > rounding else 0.0, 0.0)
    return _Differences(len(d), mean, sd / math.sqrt(len(d)))


def _ttest(d: _Differences) -> float:
    """The p-value of the two-sided paired t-test; also where there is no variance."""
    if d.n < 2:
        return 1.0
    if d.se == 0:
        return 0.0 if d.mean else 1.0
    return 2 * float(stdtr(d.n - 1, -abs(d.mean / d.se)))


def _tost(d: _Differences, margin: float) -> Outcome:
    """The one of the two one-sided t-tests that has the larger p: always the one against the nearer bound."""
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
    """Adjusts p-values of one family of tests for their number (Holm 1979); the order stays.

    Compared with alpha, the adjusted values keep the probability of any false rejection below alpha, whatever the
    dependence between the tests. Less strict than Bonferroni's correction, and never worse.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted.clip(max=1.0, out=adjusted)
    return adjusted


def equivalence_table(
    perquery: pd.DataFrame,
    *,
    margin: float | Mapping[Any, float],
    baseline: str | None = None,
    measures: Iterable[Any] | None = None,
    alpha: float = 0.05,
    correction: Literal["holm"] | None = None,
) -> pd.DataFrame:
    """Compares systems query by query: t-test, equivalence test, confidence interval and a verdict in words.

    The verdict of a row, from its two p-values (the corrected ones, where a correction was asked for) and alpha:

    - "different": the t-test rejects that the means are the same;
    - "equivalent within the margin": the TOST rejects that they are `margin` or more apart;
    - "different, but within the margin": both reject; there is a difference, and it's smaller than what matters
      (with many queries the commonest case);
    - "undecided": neither does; there are too few queries to tell. It is *not* a finding of "no difference".

    **Interval.** It is the one of level 1 - 2 alpha (90% for alpha = .05), since that is the TOST's: without a
    correction, TOST rejects exactly where this interval lies within ±margin (Lakens 2017). It's narrower than the one
    of level 1 - alpha that belongs to the t-test, and it isn't corrected for the number of rows.

    **Seeds.** Queries are the sample, seeds are not: runs of several seeds share the queries, and counting them as
    further queries would make the p-values as small as one likes. So a system's values are first averaged over its
    seeds, query by query, and n is the number of queries (paired tests over queries: Sakai 2018). The tests then speak
    of other queries of this kind, *given* the average of the models that were trained. What a further training run
    would bring isn't in the p-values; it's in `seed_summary`, to be read beside them (Bouthillier et al. 2021
    measure how much such variance changes comparisons). Systems may have different numbers of
    seeds, and one that isn't trained has one row a query, with any seed, NaN too.

    **Missing values.** Topics that have no value in any system (PyTerrier gives NaN where there are no qrels) take no
    part; column n_queries says how many do. A query that some runs have and others lack is an error.

    Args:
        perquery: name, qid, measure, value, as from `pt.Experiment(perquery=True)`; with several training runs of a
            system also seed.
        margin: the smallest difference that matters, in the measure's unit; one for all, or a mapping from measure (or
            its name) to margin.
        baseline: name of the system with which each other one is compared; None compares all pairs.
        measures: the measures (or their names) to compare by, in this order; None takes all.
        alpha: the level of each of the two tests.
        correction: "holm" corrects each of the two columns of p-values for the number of rows (Holm 1979).

    Returns:
        A row for each measure and pair: measure, system, baseline, n_queries, mean and baseline_mean (in the measure's
        unit), difference (system - baseline), ci_low, ci_high, ci_level, margin, p_ttest, p_tost, (p_ttest_holm,
        p_tost_holm,) verdict.

    Raises:
        ValueError: a column, system, measure or margin is missing or makes no sense; runs differ in their queries; a
            run has several values for a query.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"expected alpha between 0 and 0.5, found {alpha!r}")
    if correction not in {None, "holm"}:
        raise ValueError(f"expected correction None or 'holm', found {correction!r}")
    names = _names(perquery, at_least=2)
    if baseline is not None and baseline not in names:
        raise ValueError(f"expected a baseline among {names}, found {baseline!r}")
    wanted = _measures(perquery, measures)
    margins = _margins(margin, wanted)
    pairs = [(baseline, n) for n in names if n != baseline] if baseline is not None else list(combinations(names, 2))
    level = 1 - 2 * alpha

    rows: list[dict[str, Any]] = []
    for measure in wanted:
        values = query_values(perquery, measure)
        for base, system in pairs:
            x, y = values[system].to_numpy(), values[base].to_numpy()
            d = _differences(x, y)
            low, high = _interval(d, level)
            rows.append(
                {
                    "measure": measure,
                    "system": system,
                    "baseline": base,
                    "n_queries": d.n,
                    "mean": x.mean(),
                    "baseline_mean": y.mean(),
                    "difference": d.mean,
                    "ci_low": low,
                    "ci_high": high,
                    "ci_level": level,
                    "margin": margins[measure],
                    "p_ttest": _ttest(d),
                    "p_tost": _tost(d, margins[measure]).pvalue,
                }
            )
    table = pd.DataFrame(rows)
    suffix = ""
    if correction == "holm":
        suffix = "_holm"
        table = table.assign(p_ttest_holm=holm(table["p_ttest"]), p_tost_holm=holm(table["p_tost"]))
    decided = zip(table[f"p_ttest{suffix}"] < alpha, table[f"p_tost{suffix}"] < alpha, strict=True)
    return table.assign(verdict=[_verdict(different, equivalent) for different, equivalent in decided])


def seed_summary(perquery: pd.DataFrame) -> pd.DataFrame:
    """Gives each system's mean and its standard deviation over the seeds it was trained with.

    A seed's mean is over queries; `mean` and `std` are those of these means. So std says how far another training run
    would land from this one on the *same* queries (Bouthillier et al. 2021), and nothing of other queries.

    Args:
        perquery: name, qid, measure, value, as from `pt.Experiment(perquery=True)`; with several training runs of a
            system also seed. Topics without a value in any run take no part.

    Returns:
        A row for each system and measure: name, measure, mean, std (n_seeds - 1 in the denominator; NaN for a single
        seed, where it's unknown), n_seeds, n_queries.

    Raises:
        ValueError: a column is missing; runs differ in their queries; a run has several values for a query.
    """
    runs = {measure: _runs(perquery, measure) for measure in _measures(perquery, None)}
    rows = []
    for name in _names(perquery):
        for measure, by_name in runs.items():
            n_queries, n_seeds = by_name[name].shape
            means = by_name[name].mean()  # over queries, one for each seed
            rows.append((name, measure, means.mean(), means.std(ddof=1), n_seeds, n_queries))
    return pd.DataFrame(rows, columns=["name", "measure", "mean", "std", "n_seeds", "n_queries"])


def query_values(perquery: pd.DataFrame, measure: Any) -> pd.DataFrame:
    """Gives a measure's value for each query (index qid) and system (column), averaged over the system's seeds.

    Raises:
        ValueError: as for `equivalence_table`.
    """
    return pd.DataFrame({name: runs.mean(axis=1) for name, runs in _runs(perquery, str(measure)).items()})


def _runs(perquery: pd.DataFrame, measure: str) -> dict[str, pd.DataFrame]:
    """One measure's values, for each system a frame of queries × seeds. All have the same queries, without a NaN."""
    names = _names(perquery)
    rows = perquery[perquery["measure"].map(str) == measure]
    if rows.empty:
        raise ValueError(f"expected a measure among {_measures(perquery, None)}, found {measure!r}")
    # As text, so that the NaN of a system that isn't trained is a seed like any other.
    rows = rows.assign(seed=rows["seed"].map(str) if "seed" in rows else "")
    repeated = rows[rows.duplicated(["name", "seed", "qid"])]
    if len(repeated):
        raise ValueError(
            f"expected one value of {measure} for each name, qid and seed, found {len(repeated)} more, the first for "
            f"{repeated['name'].iloc[0]!r}, query {repeated['qid'].iloc[0]!r}; several runs need a column 'seed'"
        )
    qids = rows.loc[rows["value"].notna(), "qid"].unique()
    if not len(qids):
        raise ValueError(f"expected queries with a value of {measure}, found none (do topics and qrels share qids?)")
    runs: dict[str, pd.DataFrame] = {}
    lacking: dict[str, int] = {}
    examples: dict[str, None] = {}  # an ordered set
    for name in names:
        run = rows[rows["name"] == name].pivot(index="qid", columns="seed", values="value").astype(float).reindex(qids)
        incomplete = run.count(axis=1) < max(run.shape[1], 1)  # a system without a row for this measure lacks them all
        if incomplete.any():
            lacking[name] = int(incomplete.sum())
            examples |= dict.fromkeys(map(str, qids[incomplete][:3]))
        runs[name] = run
    if lacking:
        raise ValueError(
            f"expected a value of {measure} from every run for the same {len(qids)} queries, found queries without "
            f"one: {lacking}, such as {', '.join(list(examples)[:3])}; evaluate all systems on the same topics, or "
            "keep the queries that they share"
        )
    return runs


def _names(perquery: pd.DataFrame, *, at_least: int = 1) -> list[str]:
    """The systems in the order in which they come."""
    if missing := {"name", "qid", "measure", "value"} - set(perquery):
        raise ValueError(
            "expected columns name, qid, measure, value as from pt.Experiment(perquery=True), "
            f"found {list(perquery)} without {sorted(missing)}"
        )
    names = list(perquery["name"].unique())
    if len(names) < at_least:
        raise ValueError(f"expected at least {at_least} systems, found {names}")
    return names


def _measures(perquery: pd.DataFrame, measures: Iterable[Any] | None) -> list[str]:
    _names(perquery)
    found = list(dict.fromkeys(perquery["measure"].map(str)))
    if measures is None:
        return found
    wanted = list(dict.fromkeys(map(str, [measures] if isinstance(measures, str) else measures)))
    if not wanted or set(wanted) - set(found):
        raise ValueError(f"expected measures among {found}, found {wanted}")
    return wanted


def _margins(margin: float | Mapping[Any, float], measures: list[str]) -> dict[str, float]:
    by_name = {str(m): v for m, v in margin.items()} if isinstance(margin, Mapping) else dict.fromkeys(measures, margin)
    if missing := [m for m in measures if m not in by_name]:
        raise ValueError(f"expected a margin for each of {measures}, found none for {missing}")
    for value in by_name.values():
        _check_margin(value)
    return {m: float(by_name[m]) for m in measures}


def _check_margin(margin: Any) -> None:
    if not isinstance(margin, int | float | np.number) or isinstance(margin, bool) or not 0 < margin < math.inf:
        raise ValueError(f"expected a margin > 0 in the measure's unit, such as 0.01, found {margin!r}")


def _verdict(different: bool, equivalent: bool) -> str:
    if different:
        return BOTH if equivalent else DIFFERENT
    return EQUIVALENT if equivalent else UNDECIDED
