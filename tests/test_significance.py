import itertools
import math
import pickle
import warnings
from io import StringIO

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ir_measures import RR, nDCG
from pandas.testing import assert_frame_equal
from scipy.stats import ttest_1samp, ttest_rel
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from pyterrier_msft.significance import equivalence_table, holm, query_values, seed_summary, tost

VALUES = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
PAIRS = st.integers(0, 12).flatmap(
    lambda n: st.tuples(hnp.arrays(float, n, elements=VALUES), hnp.arrays(float, n, elements=VALUES))
)
MARGINS = st.floats(1e-6, 2)

# Differences from CL: +-.01 in turn for KD-CL, -.2 and -.22 for KD, none for CL-KD.
PERQUERY = pd.read_csv(
    StringIO("""name,qid,measure,value
CL,q1,nDCG@10,0.50
CL,q2,nDCG@10,0.60
CL,q3,nDCG@10,0.70
CL,q4,nDCG@10,0.80
CL-KD,q1,nDCG@10,0.50
CL-KD,q2,nDCG@10,0.60
CL-KD,q3,nDCG@10,0.70
CL-KD,q4,nDCG@10,0.80
KD,q1,nDCG@10,0.30
KD,q2,nDCG@10,0.38
KD,q3,nDCG@10,0.50
KD,q4,nDCG@10,0.58
KD-CL,q1,nDCG@10,0.51
KD-CL,q2,nDCG@10,0.59
KD-CL,q3,nDCG@10,0.71
KD-CL,q4,nDCG@10,0.79
""")
)


def perquery(values, measure="nDCG@10", **columns):
    """A frame of the values of q1, q2, … of each system."""
    rows = [(name, f"q{i}", measure, v) for name, vs in values.items() for i, v in enumerate(vs, 1)]
    return pd.DataFrame(rows, columns=["name", "qid", "measure", "value"]).assign(**columns)


# ---- tost


def test_tost_by_hand():
    # Differences .02, .04, .06: mean .04, standard deviation .02, standard error .02/√3. Against the margin .1:
    # t = (.04 - .1) / (.02/√3) = -3√3. Student's t with 2 degrees of freedom has the cdf (1 + t/√(2 + t²)) / 2.
    t, p = tost(0.1)([0.52, 0.64, 0.76], [0.5, 0.6, 0.7])
    assert t == pytest.approx(-3 * math.sqrt(3))
    assert p == pytest.approx((1 - math.sqrt(27 / 29)) / 2)
    assert tost(0.1)([0.5, 0.6, 0.7], [0.52, 0.64, 0.76]) == pytest.approx((-t, p))


@given(PAIRS, MARGINS)
def test_tost_equals_statsmodels(pair, margin):
    a, b = pair
    assume(len(a) > 1 and (a - b).std() > 1e-9)
    outcome = tost(margin)(a, b)
    p, low, high = ttost_paired(a, b, -margin, margin)
    assert outcome.pvalue == outcome[1] == pytest.approx(p, rel=1e-6, abs=1e-12)
    assert outcome.statistic == outcome[0] == pytest.approx((high if (a - b).mean() >= 0 else low)[0], rel=1e-6)


@given(PAIRS, MARGINS)
def test_tost_is_never_nan(pair, margin):
    outcome = tost(margin)(*pair)
    assert 0 <= outcome.pvalue <= 1
    assert not math.isnan(outcome.statistic)
    assert tost(margin)(*pair[::-1]).pvalue == outcome.pvalue


@given(PAIRS, MARGINS, st.floats(1, 10))
def test_a_wider_margin_is_easier(pair, margin, factor):
    assert tost(margin * factor)(*pair).pvalue <= tost(margin)(*pair).pvalue + 1e-12  # of rounding


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        ([0.3, 0.5, 0.7], [0.3, 0.5, 0.7], 0),
        ([0.3, 0.5, 0.7], [0.295, 0.495, 0.695], 0),  # the same difference up to rounding
        ([0.3, 0.5, 0.7], [0.31, 0.51, 0.71], 1),  # at the margin isn't within it
        ([0.3, 0.5, 0.7], [0.32, 0.52, 0.72], 1),
        ([0.5], [0.5], 1),
        ([], [], 1),
    ],
)
def test_tost_without_variance(a, b, p):
    assert tost(0.01)(a, b).pvalue == p


def test_tost_leaves_out_queries_without_a_value():
    with pytest.warns(UserWarning, match="tost left out 2 of 5 queries"):
        outcome = tost(0.1)([0.52, 0.64, 0.76, math.nan, 1], [0.5, 0.6, 0.7, 0, math.nan])
    assert outcome == tost(0.1)([0.52, 0.64, 0.76], [0.5, 0.6, 0.7])


@pytest.mark.parametrize("margin", [0, -0.01, math.nan, math.inf, "0.01", None, True])
def test_tost_requires_a_positive_margin(margin):
    with pytest.raises(ValueError, match=r"margin must be a number > 0 .* got "):
        tost(margin)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [([1, 2], [1], r"\(2,\) and \(1,\)"), ([[1, 2]], [[1, 2]], r"\(1, 2\)"), ([1, math.inf], [1, 2], "inf")],
)
def test_tost_requires_pairs_of_finite_numbers(a, b, found):
    with pytest.raises(ValueError, match=f"must .* got .*{found}"):
        tost(0.01)(a, b)


def test_tost_can_be_printed_pickled_and_hashed():
    test = tost(margin=0.01)
    assert repr(test) == "tost(margin=0.01)"
    assert pickle.loads(pickle.dumps(test)) == test
    assert len({test, tost(0.01)}) == 1


def test_tost_in_an_experiment():
    topics = pd.DataFrame({"qid": ["1", "2", "3"], "query": ["a", "b", "c"]})
    docnos = ["d1", "d2", "d3"]
    qrels = pd.DataFrame({"qid": ["1", "2", "3"], "docno": docnos, "label": 1})

    def system(*rankings):
        rows = [(q, d, -r, r) for q, ranking in zip("123", rankings, strict=True) for r, d in enumerate(ranking)]
        return pt.Transformer.from_df(pd.DataFrame(rows, columns=["qid", "docno", "score", "rank"]))

    systems = {
        "CL": system(docnos, docnos, docnos),
        "CL-KD": system(docnos, docnos, docnos),
        "KD": system(docnos[::-1], docnos, docnos[::-1]),
    }
    table = pt.Experiment(systems, topics, qrels, [RR, nDCG @ 10], baseline="CL", test=tost(0.01), correction="holm")
    assert table["RR p-value"].to_list()[1] == 0
    assert table["RR reject"].to_list() == [False, True, False]  # True: equivalent
    assert not table["RR p-value corrected"].iloc[1:].isna().any()

    by_query = pt.Experiment(systems, topics, qrels, [RR, nDCG @ 10], perquery=True)
    table = equivalence_table(by_query, margin={RR: 0.01, nDCG @ 10: 0.02}, baseline="CL", measures=[RR])
    assert table["system"].to_list() == ["CL-KD", "KD"]
    assert table["p_tost"].to_list() == [0, tost(0.01)([1 / 3, 1 / 2, 1], [1, 1 / 2, 1 / 3]).pvalue]


# ---- holm


@settings(max_examples=6, deadline=None)  # multipletests runs the garbage collector: 0.3 s per call with torch loaded
@given(hnp.arrays(float, st.integers(1, 20), elements=st.floats(0, 1) | st.sampled_from([0.0, 0.01, 1.0])))
def test_holm_equals_statsmodels(p):
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], atol=1e-15)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04]), [0.06, 0.03, 0.06])
    assert len(holm([])) == 0


def test_holm_of_hypotheses_that_exclude_one_another_by_hand():
    # In order: .001 and .002 times 3 rows, .01 and .02 times 2 (the first row is rejected), .04 and .5 times 1.
    corrected = holm([[0.001, 0.002], [0.5, 0.04], [0.01, 0.02]])
    np.testing.assert_allclose(corrected, [[0.003, 0.006], [0.5, 0.04], [0.02, 0.04]])
    # .02 · 2 is more than .03 · 1: corrected values keep the order of the others.
    np.testing.assert_allclose(holm([[0.02, 0.02], [0.03, 0.9]]), [[0.04, 0.04], [0.04, 0.9]])


@settings(deadline=None)
@given(
    hnp.arrays(float, st.tuples(st.integers(1, 4), st.just(2)), elements=st.floats(0, 1) | st.sampled_from([0, 0.01])),
    st.sampled_from([0.05, 0.3]),
)
def test_holm_rejects_what_closed_testing_rejects(p, alpha):
    # A hypothesis is rejected if Bonferroni rejects each set of hypotheses that holds it and could be true together
    # (Marcus et al. 1976): one hypothesis per row at most.
    choices = itertools.product([None, 0, 1], repeat=len(p))
    together = [[(i, j) for i, j in enumerate(choice) if j is not None] for choice in choices]
    kept = {
        each for chosen in together if chosen and min(p[c] for c in chosen) * len(chosen) >= alpha for each in chosen
    }
    assert {tuple(index) for index in np.argwhere(holm(p) >= alpha)} == kept


# ---- equivalence_table


def test_table_by_hand():
    table = equivalence_table(PERQUERY, margin=0.05, baseline="CL")
    # KD: the differences are -.2, -.22, -.2, -.22; mean -.21, standard error √(4 · .01² / 3) / 2 = .01/√3.
    # t(.95; 3) = 2.3534: half an interval is .013587.
    expected = pd.DataFrame(
        {
            "measure": "nDCG@10",
            "system": ["CL-KD", "KD", "KD-CL"],
            "baseline": "CL",
            "n_queries": 4,
            "mean": [0.65, 0.44, 0.65],
            "baseline_mean": 0.65,
            "difference": [0.0, -0.21, 0.0],
            "ci_low": [0.0, -0.223587, -0.013587],
            "ci_high": [0.0, -0.196413, 0.013587],
            "ci_level": 0.9,
            "margin": 0.05,
        }
    )
    assert_frame_equal(table[expected.columns], expected, atol=1e-6)
    assert table["p_ttest"].to_list() == pytest.approx([1, 4.56e-5, 1], rel=1e-2)
    assert table["p_tost"].to_list() == pytest.approx([0, 1, 1.62e-3], rel=1e-2)
    assert list(table)[-3:] == ["p_ttest", "p_tost", "verdict"]
    assert table["verdict"].to_list() == [
        "equivalent within the margin",
        "worse",
        "equivalent within the margin",
    ]


@given(PAIRS, MARGINS)
def test_table_agrees_with_the_tests(pair, margin):
    a, b = pair
    assume(len(a) > 1)
    row = equivalence_table(perquery({"a": a, "b": b}), margin=margin).iloc[0]
    assert row["p_tost"] == tost(margin)(a, b).pvalue
    assume((a - b).std() > 1e-9)
    both = ttest_rel(b, a)
    assert row["p_ttest"] == pytest.approx(both.pvalue, rel=1e-6, abs=1e-12)
    interval = both.confidence_interval(0.9)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))
    # As documented, the interval lies within the margin exactly if TOST rejects.
    within = max(-row["ci_low"], row["ci_high"])
    if within != pytest.approx(margin):
        assert (within < margin) == (row["p_tost"] < 0.05)


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [
        (0.03, 0.001, "better"),
        (-0.03, 0.001, "worse"),
        (0.0, 0.001, "equivalent within the margin"),
        (0.005, 0.001, "better, but within the margin"),
        (-0.005, 0.001, "worse, but within the margin"),
        (0.005, 0.1, "undecided"),
    ],
)
def test_verdicts(shift, spread, verdict):
    base = np.linspace(0.2, 0.8, 20)
    other = base + shift + spread * np.tile([1, -1], 10)
    assert equivalence_table(perquery({"a": base, "b": other}), margin=0.01)["verdict"].to_list() == [verdict]


def test_verdict_follows_the_correction():
    rng = np.random.default_rng(7)
    base = rng.uniform(size=30)
    frame = perquery({"base": base} | {f"s{i}": base + rng.normal(0.004, 0.01, 30) for i in range(6)})
    plain = equivalence_table(frame, margin=0.01)
    corrected = equivalence_table(frame, margin=0.01, correction="holm")
    np.testing.assert_allclose(corrected[["p_ttest_holm", "p_tost_holm"]], holm(plain[["p_ttest", "p_tost"]]))
    assert_frame_equal(corrected[list(plain)[:-1]], plain[list(plain)[:-1]])
    different, equivalent = corrected["p_ttest_holm"] < 0.05, corrected["p_tost_holm"] < 0.05
    assert (corrected["verdict"].str.startswith(("better", "worse")) == different).all()
    assert (corrected["verdict"].str.contains("within") == equivalent).all()
    assert (plain["verdict"] != corrected["verdict"]).any()


def test_correction_by_hand():
    # p_ttest is 1, 4.56e-5 and 1, p_tost 0, 1 and 1.62e-3: three rows are open until the end.
    table = equivalence_table(PERQUERY, margin=0.05, baseline="CL", correction="holm")
    assert table["p_ttest_holm"].to_list() == pytest.approx([1, 3 * 4.56e-5, 1], rel=1e-2)
    assert table["p_tost_holm"].to_list() == pytest.approx([0, 1, 3 * 1.62e-3], rel=1e-2)


def test_a_family_is_the_table_or_a_measure():
    frame = pd.concat([PERQUERY, PERQUERY.assign(measure="RR"), PERQUERY.assign(measure="AP")])
    corrected = ["p_ttest_holm", "p_tost_holm"]

    def table(frame, **options):
        return equivalence_table(frame, margin=0.05, baseline="CL", correction="holm", **options)

    alone = table(PERQUERY)[corrected].to_numpy()
    np.testing.assert_allclose(table(frame, family="measure")[corrected], np.tile(alone, (3, 1)))
    np.testing.assert_allclose(table(frame)[corrected], np.tile(np.minimum(1, 3 * alone), (3, 1)))
    assert_frame_equal(table(frame, measures=["RR"]), table(frame, measures=["RR"], family="measure"))


@pytest.mark.parametrize("correlation", [0, 0.8])
@pytest.mark.parametrize("differences", [[0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0.5, 2]])
def test_false_verdicts_in_a_family_are_rarer_than_alpha(differences, correlation):
    # In units of the margin: 0 is a true null hypothesis of the t-test, 1 and 2 are true ones of the TOST. Differences
    # vary so little that almost all false hypotheses are rejected, the worst case for Holm's procedure.
    trials, n = 2000, 20
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(trials, 1, n)), rng.normal(size=(trials, len(differences), n))
    values = np.array(differences)[:, None] + 0.1 * (correlation**0.5 * shared + (1 - correlation) ** 0.5 * own)
    p_ttest = ttest_1samp(values, 0, axis=-1).pvalue
    sides = [
        ttest_1samp(values, bound, axis=-1, alternative=side).pvalue for bound, side in ((-1, "greater"), (1, "less"))
    ]
    is_true = np.array([[d == 0, d >= 1] for d in differences])
    rejected = np.array([holm(p) < 0.05 for p in np.stack([p_ttest, np.maximum(*sides)], axis=-1)])
    assert (rejected & is_true).any(axis=(1, 2)).mean() < 0.06  # 0.05 and two standard errors
    assert rejected[:, ~is_true].mean() > 0.9


def test_all_pairs_and_measures_in_order():
    frame = pd.concat([PERQUERY, PERQUERY.assign(measure="RR")])
    table = equivalence_table(frame, margin={"nDCG@10": 0.01, "RR": 0.1}, measures=[RR, nDCG @ 10])
    assert list(zip(table["measure"], table["baseline"], table["system"], strict=True))[:4] == [
        ("RR", "CL", "CL-KD"),
        ("RR", "CL", "KD"),
        ("RR", "CL", "KD-CL"),
        ("RR", "CL-KD", "KD"),
    ]
    assert table["margin"].to_list() == [0.1] * 6 + [0.01] * 6


def test_queries_without_qrels_are_left_out():
    unjudged = perquery({name: [math.nan] for name in ("CL", "CL-KD", "KD", "KD-CL")}).assign(qid="q0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = equivalence_table(pd.concat([unjudged, PERQUERY]), margin=0.05)
    assert_frame_equal(table, equivalence_table(PERQUERY, margin=0.05))


def test_a_single_query_is_undecided():
    row = equivalence_table(perquery({"a": [0.5], "b": [0.5]}), margin=0.05).iloc[0]
    assert (row["verdict"], row["p_ttest"], row["p_tost"]) == ("undecided", 1, 1)
    assert math.isnan(row["ci_low"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.drop(columns="qid"), {}, r"must have the columns .* got \['name', 'measure', 'value'\]"),
        (lambda f: f[f["name"] == "CL"], {}, r"at least 2 systems; got \['CL'\]"),
        (lambda f: f, {"baseline": "BM25"}, "baseline must be one of .* got 'BM25'"),
        (lambda f: f, {"measures": ["AP"]}, r"measures must be among .* got \['AP'\]"),
        (lambda f: f, {"measures": []}, r"measures must be among .* got \[\]"),
        (lambda f: f, {"margin": {"RR": 0.1}}, r"margin must have a value for each .* none for \['nDCG@10'\]"),
        (lambda f: f, {"margin": -1}, "margin must be a number > 0"),
        (lambda f: f, {"alpha": 0.5}, "alpha must be between 0 and 0.5; got 0.5"),
        (lambda f: f, {"correction": "bonferroni"}, "correction must be None or 'holm'; got 'bonferroni'"),
        (lambda f: f, {"family": "system"}, "family must be 'table' or 'measure'; got 'system'"),
        (lambda f: f.drop(index=1), {}, r"the same 4 queries; got queries without one: \{'CL': 1\}, e.g. q2\."),
        (lambda f: f.assign(value=f["value"].where(f.index != 6)), {}, r"\{'CL-KD': 1\}, e.g. q3\."),
        (lambda f: f.assign(measure=f["measure"].where(f["name"] != "KD", "AP")), {}, r"\{'KD': 4\}"),
        (lambda f: pd.concat([f, f]), {}, "must have one value .* got 16 duplicates.*column 'seed'"),
        (lambda f: f.assign(value=math.nan), {}, "must have values of nDCG@10; got only NaN"),
    ],
)
def test_invalid_input_is_rejected(change, options, message):
    with pytest.raises(ValueError, match=message):
        equivalence_table(change(PERQUERY), **{"margin": 0.05} | options)


# ---- seeds


def test_seeds_are_not_queries():
    runs = [perquery({"CL": [0.5, 0.6, 0.7 + d], "KD": [0.4, 0.5 - d, 0.6]}, seed=d) for d in (0.0, 0.01, 0.02)]
    bm25 = perquery({"BM25": [0.3, 0.3, 0.3]}, seed=math.nan)
    frame = pd.concat([bm25, *runs])
    averaged = perquery({"BM25": [0.3, 0.3, 0.3], "CL": [0.5, 0.6, 0.71], "KD": [0.4, 0.49, 0.6]})
    assert_frame_equal(equivalence_table(frame, margin=0.05), equivalence_table(averaged, margin=0.05))

    expected = pd.DataFrame(
        {
            "name": ["BM25", "CL", "KD"],
            "measure": "nDCG@10",
            "mean": [0.3, 1.81 / 3, 1.49 / 3],
            "std": [math.nan, 0.01 / 3, 0.01 / 3],
            "n_seeds": [1, 3, 3],
            "n_queries": 3,
        }
    )
    assert_frame_equal(seed_summary(frame), expected)
    assert_frame_equal(
        query_values(frame, nDCG @ 10).loc[["q1", "q2", "q3"]].reset_index(drop=True),
        pd.DataFrame({"BM25": [0.3] * 3, "CL": [0.5, 0.6, 0.71], "KD": [0.4, 0.49, 0.6]}),
    )


def test_more_seeds_give_no_smaller_p():
    rng = np.random.default_rng(3)
    one = perquery({"a": rng.uniform(size=20), "b": rng.uniform(size=20)}, seed=0)
    many = pd.concat([one.assign(seed=s) for s in range(50)])
    assert_frame_equal(equivalence_table(many, margin=0.1), equivalence_table(one, margin=0.1))


def test_a_seed_without_a_query_is_rejected():
    runs = [perquery({"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.3]}, seed=s) for s in (1, 2)]
    frame = pd.concat(runs, ignore_index=True).drop(index=2)
    for function in (seed_summary, lambda f: equivalence_table(f, margin=0.1)):
        with pytest.raises(ValueError, match=r"\{'a': 1\}, e.g. q3"):
            function(frame)


def test_summary_without_seeds():
    summary = seed_summary(pd.concat([PERQUERY, PERQUERY.assign(measure="RR")]))
    assert summary["name"].to_list() == ["CL", "CL", "CL-KD", "CL-KD", "KD", "KD", "KD-CL", "KD-CL"]
    assert summary["n_seeds"].eq(1).all()
    assert summary["std"].isna().all()
