import itertools
import math
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from ir_measures import nDCG
from matplotlib.figure import Figure

from pyterrier_msft import plots, significance
from pyterrier_msft.significance import equivalence_table

mpl.use("Agg")
import matplotlib.pyplot as plt


def stage(name, steps, *, every=10, evaluate=50, start=0.3, **columns):
    step = np.arange(every, steps + 1, every)
    metric = np.where(step % evaluate == 0, start + step / 1000, math.nan)
    frame = pd.DataFrame({"stage": name, "step": step, "epoch": step / steps, "loss": 1 / step, "learning_rate": 1e-5})
    return frame.assign(**{"nDCG@10": metric, "seconds": step * 0.1, "pairs_per_second": 80.0}, **columns)


TWO_STAGES = pd.concat([stage("Contrastive", 400), stage("Distillation", 200, start=0.7)])
SYSTEMS = pd.concat(
    [
        stage("Contrastive", 400, system="CL"),
        TWO_STAGES.assign(system="CL-KD"),
        stage("Distillation", 200, system="$KD$"),  # no formula
    ]
)
BASE = np.linspace(0.2, 0.8, 40)
DIFFERENCES = np.concatenate([[0.2, 0.15, 0.1], np.zeros(30), np.linspace(-0.01, -0.1, 7)])
PERQUERY = pd.DataFrame(
    [
        (name, f"q{i}", "nDCG@10", v)
        for name, values in {"CL": BASE, "CL-KD": BASE + DIFFERENCES}.items()
        for i, v in enumerate(values)
    ],
    columns=["name", "qid", "measure", "value"],
)
TABLE = equivalence_table(
    pd.concat([PERQUERY, PERQUERY[PERQUERY["name"] == "CL"].assign(name="KD", value=BASE - 0.1)]), margin=0.05
)
SWEEP = pd.DataFrame(
    [("CL-KD", rate, seed, 0.5 + 0.01 * seed) for rate in (1e-8, 1e-6, 1e-4) for seed in (1, 2, 3)]
    + [("CL", math.nan, seed, 0.4 + 0.01 * seed) for seed in (1, 2, 3)],
    columns=["system", "learning_rate", "seed", "nDCG@10"],
)

CALLS = {
    "one system": lambda ax: plots.learning_curve(TWO_STAGES, ax=ax),
    "systems": lambda ax: plots.learning_curve(SYSTEMS, ax=ax),
    "differences": lambda ax: plots.query_differences(PERQUERY, "CL-KD", "CL", measure="nDCG@10", ax=ax),
    "equivalence": lambda ax: plots.equivalence(TABLE, ax=ax),
    "sweep": lambda ax: plots.second_stage_learning_rate(SWEEP, margin=0.01, ax=ax),
    "words": lambda ax: plots.word_importance(["sort", "an", "array"], [0.2, -0.1, 0.1], ax=ax),
}


@pytest.fixture(autouse=True)
def _close():
    plt.close("all")  # what pages of the documentation have drawn in the same process
    yield
    plt.close("all")


def texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("draw", CALLS.values(), ids=list(CALLS))
@pytest.mark.filterwarnings("error")
def test_no_state_is_left(draw):
    settings = dict(mpl.rcParams)
    ax = Figure().add_subplot()
    assert draw(ax) is ax
    assert plt.get_fignums() == []
    assert draw(None).figure.number == 1
    assert plt.get_fignums() == [1]
    assert dict(mpl.rcParams) == settings


@pytest.mark.parametrize("draw", CALLS.values(), ids=list(CALLS))
@pytest.mark.filterwarnings("error")
def test_axes_are_labelled_and_no_text_is_cut_off(draw):
    ax = draw(None)
    assert ax.get_xlabel() or not ax.axison
    assert ax.get_ylabel() or ax.get_yticklabels()[0].get_text()
    figure = ax.figure
    figure.canvas.draw()
    for each in figure.axes:
        for text in each.texts:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in CALLS.values():
        with pytest.raises(ImportError, match=r"pip install pyterrier-msft\[plot\]"):
            draw(None)


# ---- learning_curve


def test_stages_follow_each_other():
    ax = plots.learning_curve(TWO_STAGES)
    loss, metric = ax.figure.axes
    assert loss is ax
    assert loss.get_ylabel() == "training loss (light), running mean (dark)"
    assert metric.get_ylabel() == "validation nDCG@10 (marked)"
    (curve,) = metric.lines
    assert list(curve.get_xdata()) == [50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600]
    *parts, bound = loss.lines
    assert list(bound.get_xdata()) == [400, 400]
    # Of each stage, the raw loss and, where it's long enough to have one, the running mean.
    assert [(line.get_xdata()[0], line.get_xdata()[-1]) for line in parts] == [(10, 400), (10, 400), (410, 600)]
    assert texts(ax) == ["Contrastive", "Distillation"]


def test_the_same_stage_twice():
    ax = plots.learning_curve(pd.concat([stage("CL", 100), stage("CL", 100)]))
    assert texts(ax) == ["CL", "CL"]
    assert list(ax.lines[-1].get_xdata()) == [100, 100]


def test_history_of_a_reranker():
    history = TWO_STAGES.assign(stage=TWO_STAGES["stage"].map({"Contrastive": 1, "Distillation": 2}))
    assert texts(plots.learning_curve(history)) == ["1", "2"]
    assert texts(plots.learning_curve(history.assign(fitter=TWO_STAGES["stage"]))) == ["Contrastive", "Distillation"]


def test_several_systems_are_named():
    loss, metric = plots.learning_curve(SYSTEMS).figure.axes
    assert len(metric.lines) == 3
    assert sorted(texts(metric)) == ["$KD$", "CL", "CL-KD"]
    # A line of stages and the system's name for each, since their stages differ.
    assert texts(loss) == ["Contrastive", "CL", "Contrastive", "Distillation", "CL-KD", "Distillation", "$KD$"]
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in metric.lines}) == 3  # greyscale
    metric.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in metric.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_without_metric_or_loss():
    ax = plots.learning_curve(TWO_STAGES.drop(columns="nDCG@10"))
    assert ax.figure.axes == [ax]
    assert ax.get_ylabel().startswith("training loss")
    for losses in (TWO_STAGES.drop(columns="loss"), TWO_STAGES.assign(loss=math.nan)):
        ax = plots.learning_curve(losses)
        assert ax.figure.axes == [ax]
        assert ax.get_ylabel() == "validation nDCG@10"
        assert ax.lines[0].get_xdata()[-1] == 600


def test_rows_of_evaluation_alone():
    rows = pd.DataFrame({"stage": "CL", "step": [10, 10, 20, 20], "loss": [1, math.nan, 0.5, math.nan]})
    ax = plots.learning_curve(rows.assign(RR=[math.nan, 0.1, math.nan, 0.2]))
    assert [list(line.get_xdata()) for each in ax.figure.axes for line in each.lines] == [[10, 20], [10, 20]]


@pytest.mark.parametrize(
    ("history", "metric", "message"),
    [
        (TWO_STAGES, "RR", r"expected a metric with values, .* \['nDCG@10'\], found 'RR'"),
        (TWO_STAGES.assign(RR=math.nan), "RR", "expected a metric with values, .* found 'RR'"),
        (TWO_STAGES.assign(RR=1.0), None, r"expected metric=, one of the columns \['nDCG@10', 'RR'\], found None"),
        (TWO_STAGES.drop(columns="step"), None, "expected a history with columns stage, step, found .* without step"),
        (TWO_STAGES[["stage", "step"]], None, "expected a column with losses or with a metric"),
    ],
)
def test_mistakes_in_a_history(history, metric, message):
    with pytest.raises(ValueError, match=message):
        plots.learning_curve(history, metric=metric)


# ---- query_differences


def test_bars_are_sorted_and_counted():
    ax = plots.query_differences(PERQUERY.sample(frac=1, random_state=1), "CL-KD", "CL", measure=nDCG @ 10)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], sorted(DIFFERENCES, reverse=True), atol=1e-9)
    assert ax.get_title(loc="left") == "CL-KD against CL\n3 better, 30 equal, 7 worse; mean difference +0.0016"
    assert ax.get_ylabel() == "difference in nDCG@10"
    assert "40 queries" in ax.get_xlabel()


def test_extremes_are_named():
    topics = pd.DataFrame({"qid": ["q0", "q1", "q39"], "query": ["from $5 to $10", "long " * 100, "the worst"]})
    ax = plots.query_differences(PERQUERY, "CL-KD", "CL", measure="nDCG@10", topics=topics, n_labels=2)
    first, second, last, other = texts(ax)
    assert first == "from $5 to $10 (+0.20)"
    assert second.startswith("long long")
    assert second.endswith("… (+0.15)")
    assert last == "the worst (−0.10)"
    assert other.startswith("q38 (−0.0")  # not among the topics
    assert len(texts(plots.query_differences(PERQUERY, "CL-KD", "CL", measure="nDCG@10", n_labels=9))) == 3 + 7


@pytest.mark.parametrize(
    "differences",
    [
        np.linspace(0.5, -0.5, 150),
        np.repeat([1.0, 0.5, 0.0, -1.0], 75),  # many at the extreme
        np.linspace(0.31, 0.3, 50),  # no room beside the bars
        np.concatenate([[1.0], np.full(20, 0.01), np.full(20, -0.01)]),
    ],
)
@pytest.mark.parametrize("n_labels", [1, 5])
def test_names_stand_on_no_bar_and_no_name(differences, n_labels):
    frame = pd.DataFrame({"name": "b", "qid": np.arange(len(differences)), "measure": "RR", "value": 0.0})
    frame = pd.concat([frame, frame.assign(name="a", value=differences)])
    topics = pd.DataFrame({"qid": frame["qid"], "query": "what is the price of " * 9}).drop_duplicates()
    ax = plots.query_differences(frame, "a", "b", measure="RR", topics=topics, n_labels=n_labels)
    ax.figure.canvas.draw()
    names = [mpl.text.Text.get_window_extent(text) for text in ax.texts]  # without the line to the bar
    bars = [bar.get_window_extent() for bar in ax.patches if bar.get_height()]
    assert len(names) >= n_labels
    assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i])
    assert not any(name.overlaps(bar) for name in names for bar in bars)
    assert all(ax.bbox.x0 <= name.x0 <= name.x1 <= ax.bbox.x1 for name in names)
    assert all(ax.bbox.y0 <= name.y0 <= name.y1 <= ax.bbox.y1 for name in names)


def test_no_difference_at_all():
    same = pd.concat([PERQUERY[PERQUERY["name"] == "CL"].assign(name=name) for name in ("a", "b")])
    ax = plots.query_differences(same, "a", "b", measure="nDCG@10")
    assert "0 better, 40 equal, 0 worse" in ax.get_title(loc="left")
    assert not ax.texts


def test_seeds_are_averaged():
    seeds = pd.concat([PERQUERY.assign(seed=s, value=PERQUERY["value"] + s / 10) for s in (1, 2)])
    ax = plots.query_differences(seeds, "CL-KD", "CL", measure="nDCG@10")
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], sorted(DIFFERENCES, reverse=True), atol=1e-9)


@pytest.mark.parametrize(
    ("systems", "options", "message"),
    [
        (("CL-KD", "CL"), {"measure": "RR"}, r"expected a measure among \['nDCG@10'\], found 'RR'"),
        (("CL-KD", "KD"), {"measure": "nDCG@10"}, r"expected systems among \['CL', 'CL-KD'\], found \['KD'\]"),
        (("CL-KD", "CL"), {"measure": "nDCG@10", "topics": pd.DataFrame({"qid": []})}, "expected topics with columns"),
    ],
)
def test_mistakes_in_differences(systems, options, message):
    with pytest.raises(ValueError, match=message):
        plots.query_differences(PERQUERY, *systems, **options)


# ---- equivalence


def test_forest():
    ax = plots.equivalence(TABLE)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["CL-KD − CL", "KD − CL", "KD − CL-KD"]
    (verdicts,) = ax.child_axes
    assert [label.get_text() for label in verdicts.get_yticklabels()] == TABLE["verdict"].to_list()
    assert ax.get_xlabel() == (
        "difference in nDCG@10 (shaded: within the margin)\nmean, 90% (thick) and 95% (thin) confidence interval"
    )
    assert len(ax.lines) == 3 * len(TABLE) + 1  # two intervals and a dot each, and zero
    thin, thick, dot = (line.get_xdata() for line in ax.lines[:3])
    row = TABLE.iloc[0]
    assert list(thick) == [row["ci_low"], row["ci_high"]]
    assert dot[0] == row["difference"]
    wider = equivalence_table(PERQUERY, margin=0.05, alpha=0.025).iloc[0]
    assert list(thin) == pytest.approx([wider["ci_low"], wider["ci_high"]])
    assert [patch.get_datalim(ax.transData).intervalx.tolist() for patch in ax.collections] == [[-0.05, 0.05]] * 3


def test_forest_of_measures_and_correction():
    frame = pd.concat([PERQUERY, PERQUERY.assign(measure="RR")])
    ax = plots.equivalence(equivalence_table(frame, margin={"nDCG@10": 0.05, "RR": 0.1}, correction="holm"))
    labels = [(label.get_text(), label.get_fontweight()) for label in ax.get_yticklabels()]
    assert labels == [("nDCG@10", "bold"), ("CL-KD − CL", "normal"), ("RR", "bold"), ("CL-KD − CL", "normal")]
    assert "Holm's correction" in ax.get_xlabel()


def test_forest_of_a_single_query():
    two = pd.DataFrame({"name": ["a", "b"], "qid": "q", "measure": "RR", "value": [0.1, 0.2]})
    plots.equivalence(equivalence_table(two, margin=0.05)).figure.canvas.draw()


def test_numbers_of_narrow_intervals_dont_overlap():
    row = {"measure": "nDCG@10", "system": "CL-KD", "baseline": "CL", "n_queries": 400, "difference": 0.001}
    row |= {"ci_low": -0.001, "ci_high": 0.003, "ci_level": 0.9, "margin": 0.01, "verdict": significance.BOTH}
    ax = plots.equivalence(pd.DataFrame([row]))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) > 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_mistakes_in_a_table():
    with pytest.raises(ValueError, match=r"expected the frame of equivalence_table .* without verdict"):
        plots.equivalence(TABLE.drop(columns="verdict"))
    with pytest.raises(ValueError, match="expected a table with at least one row, found none"):
        plots.equivalence(TABLE[:0])


# ---- second_stage_learning_rate


def test_sweep():
    ax = plots.second_stage_learning_rate(SWEEP)
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "learning rate of the second stage"
    assert ax.get_ylabel() == "nDCG@10, mean and std. deviation of 3 seeds"
    assert sorted(texts(ax)) == ["CL", "CL-KD"]
    (bars,) = ax.containers
    np.testing.assert_allclose(bars.lines[0].get_xdata(), [1e-8, 1e-6, 1e-4])
    np.testing.assert_allclose(bars.lines[0].get_ydata(), [0.52] * 3)
    np.testing.assert_allclose([segment[:, 1] for segment in bars.lines[2][0].get_segments()], [[0.51, 0.53]] * 3)
    (alone,) = [line for line in ax.lines if len(line.get_ydata()) == 2]
    np.testing.assert_allclose(alone.get_ydata(), 0.42)


def test_sweep_without_seeds_and_systems():
    ax = plots.second_stage_learning_rate(SWEEP[SWEEP["seed"] == 1].drop(columns=["system", "seed"]), margin=0.01)
    assert ax.get_ylabel() == "nDCG@10"
    assert ax.get_xlabel() == "learning rate of the second stage (grey: within 0.01 of one stage alone)"
    assert sorted(texts(ax)) == ["one stage alone", "two stages"]
    assert texts(plots.second_stage_learning_rate(SWEEP[:1])) == ["CL-KD"]  # a single model


@pytest.mark.parametrize(
    ("sweep", "measure", "message"),
    [
        (SWEEP, "RR", "expected a sweep with columns learning_rate, RR, found .* without RR"),
        (SWEEP.assign(learning_rate=0.0), "nDCG@10", r"expected learning rates > 0 .* found \[0.0\]"),
        (SWEEP.assign(learning_rate=math.nan), "nDCG@10", r"expected learning rates > 0 .* found \[\]"),
    ],
)
def test_mistakes_in_a_sweep(sweep, measure, message):
    with pytest.raises(ValueError, match=message):
        plots.second_stage_learning_rate(sweep, measure=measure)


# ---- word_importance


def test_words_are_coloured_by_importance():
    ax = plots.word_importance(["an", "$array$", "of", "numbers"], [0.0, 2.0, -1.0, 1.0])
    assert texts(ax) == ["an", "$array$", "of", "numbers"]
    assert [text.get_style() for text in ax.texts] == ["normal", "normal", "italic", "normal"]
    grounds = [mpl.colors.to_hex(text.get_bbox_patch().get_facecolor()).upper() for text in ax.texts]
    assert grounds == [plots.BLUE, plots.BLUE, plots.ORANGE, plots.BLUE]
    assert [text.get_bbox_patch().get_alpha() for text in ax.texts] == pytest.approx([0, 0.75, 0.375, 0.375])
    assert ax.get_title(loc="left") == (
        "the score falls by up to 2 without a word (blue); rises by up to 1 without those in italics (orange)"
    )


@pytest.mark.parametrize("own", [True, False])
def test_words_stand_in_lines_without_overlaps(own):
    words = ("many words and an_exceedingly_long_one of several lengths " * 12).split()
    ax = plots.word_importance(words, np.arange(len(words)), ax=None if own else Figure((4, 4)).add_subplot())
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert max(box.x1 for box in boxes) <= ax.figure.bbox.x1
    lines = sorted({round(box.y0 + box.y1) for box in boxes}, reverse=True)
    assert len(lines) > 3
    for left, right in itertools.pairwise(boxes):
        assert right.x0 > left.x1 or right.y1 <= left.y0 + 5  # beside it, or on the next line


def test_no_word_matters():
    ax = plots.word_importance(["a", "b"], [0.0, 0.0])
    assert [text.get_bbox_patch().get_alpha() for text in ax.texts] == [0, 0]
    assert ax.get_title(loc="left") == "the score falls by up to 0 without a word (blue)"


@pytest.mark.parametrize(("words", "importance"), [([], []), (["a"], [1.0, 2.0]), (["a"], [math.nan])])
def test_mistakes_in_words(words, importance):
    with pytest.raises(ValueError, match="expected one finite value for each of at least one word, found"):
        plots.word_importance(words, importance)
