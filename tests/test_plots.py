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
        stage("Distillation", 200, system="$KD$"),  # not a formula
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

WORDS = pd.DataFrame({"docno": "d", "word": ["sort", "$an$", "array"] * 20, "importance": [2.0, -1.0, 0.0] * 20})

CALLS = {
    "one system": lambda ax: plots.learning_curve(TWO_STAGES, ax=ax),
    "systems": lambda ax: plots.learning_curve(SYSTEMS, ax=ax),
    "differences": lambda ax: plots.query_differences(PERQUERY, "CL-KD", "CL", measure="nDCG@10", ax=ax),
    "equivalence": lambda ax: plots.equivalence(TABLE, ax=ax),
    "words": lambda ax: plots.word_importance(WORDS, ax=ax),
}


@pytest.fixture(autouse=True)
def _close():
    plt.close("all")  # figures of the documentation's pages, tested in the same process
    yield
    plt.close("all")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def stage_names(ax):
    (top,) = ax.child_axes
    return [label.get_text() for label in top.get_xticklabels()]


@pytest.mark.parametrize("draw", CALLS.values(), ids=list(CALLS))
@pytest.mark.filterwarnings("error")
def test_settings_and_other_figures_stay_unchanged(draw):
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
    if ax.axison:  # not a text
        assert ax.figure.axes[-1].get_xlabel()
        assert ax.get_ylabel() or ax.get_yticklabels()[0].get_text()
    figure = ax.figure
    figure.canvas.draw()
    for each in figure.axes:
        for text in [*each.texts, *(label for axis in each.child_axes for label in axis.get_xticklabels())]:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in CALLS.values():
        with pytest.raises(ImportError, match=r'pip install "pyterrier-msft\[plot\]"'):
            draw(None)


# ---- learning_curve


def test_stages_are_plotted_one_after_the_other():
    ax = plots.learning_curve(TWO_STAGES)
    loss, metric = ax.figure.axes
    assert loss is ax
    assert loss.get_ylabel() == "training loss\n(light), running mean (dark)"
    assert metric.get_ylabel() == "validation nDCG@10\n(ring: kept)"
    ax.figure.canvas.draw()
    assert loss.get_window_extent().y0 > metric.get_window_extent().y1  # above it
    assert loss.get_xlim() == metric.get_xlim()
    curve, boundary = metric.lines
    assert list(curve.get_xdata()) == [50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600]
    *parts, loss_boundary = loss.lines
    assert list(boundary.get_xdata()) == list(loss_boundary.get_xdata()) == [400, 400]
    # The raw loss of each stage, and its running mean if it's long enough.
    assert [(line.get_xdata()[0], line.get_xdata()[-1]) for line in parts] == [(10, 400), (10, 400), (410, 600)]
    assert stage_names(ax) == ["Contrastive", "Distillation"]


def test_the_same_stage_twice():
    ax = plots.learning_curve(pd.concat([stage("CL", 100), stage("CL", 100)]))
    assert stage_names(ax) == ["CL", "CL"]
    assert list(ax.lines[-1].get_xdata()) == [100, 100]


def test_history_of_a_reranker():
    history = TWO_STAGES.assign(stage=TWO_STAGES["stage"].map({"Contrastive": 1, "Distillation": 2}))
    assert stage_names(plots.learning_curve(history)) == ["1", "2"]
    ax = plots.learning_curve(history.assign(fitter=TWO_STAGES["stage"]))
    assert stage_names(ax) == ["Contrastive", "Distillation"]


def test_names_of_short_stages_dont_overlap():
    ax = plots.learning_curve(pd.concat([TWO_STAGES, stage("Contrastive", 20), stage("Distillation", 20)]))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.child_axes[0].get_xticklabels()]
    assert [name.count("\n") for name in stage_names(ax)] == [0, 1, 0, 1]  # on two levels
    assert not boxes[3].overlaps(boxes[1])
    assert not boxes[2].overlaps(boxes[0])


def test_several_systems_are_named_with_their_stages():
    _, metric = plots.learning_curve(SYSTEMS).figure.axes
    curves = metric.lines[:3]
    assert all(list(boundary.get_xdata()) == [400, 400] for boundary in metric.lines[3:])
    names = ["CL (Contrastive)", "CL-KD (Contrastive, then Distillation)", "$KD$ (Distillation)"]
    assert [text.get_text() for text in metric.get_legend().get_texts()] == names
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in curves}) == 3  # greyscale
    for curve, handle in zip(curves, metric.get_legend().get_lines(), strict=True):
        assert (curve.get_color(), curve.get_marker()) == (handle.get_color(), handle.get_marker())
    seeds = pd.concat([TWO_STAGES.assign(system=f"seed {seed}") for seed in (1, 2)])
    legend = plots.learning_curve(seeds).figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["seed 1", "seed 2"]
    assert legend.get_title().get_text() == "Contrastive, then Distillation"


def test_without_metric_or_loss():
    ax = plots.learning_curve(TWO_STAGES.drop(columns="nDCG@10"))
    assert ax.figure.axes == [ax]
    assert ax.get_ylabel().startswith("training loss")
    for losses in (TWO_STAGES.drop(columns="loss"), TWO_STAGES.assign(loss=math.nan)):
        ax = plots.learning_curve(losses)
        assert ax.figure.axes == [ax]
        assert ax.get_ylabel().startswith("validation nDCG@10")
        assert ax.lines[0].get_xdata()[-1] == 600


def test_rows_with_only_a_metric():
    rows = pd.DataFrame({"stage": "CL", "step": [10, 10, 20, 20], "loss": [1, math.nan, 0.5, math.nan]})
    ax = plots.learning_curve(rows.assign(RR=[math.nan, 0.1, math.nan, 0.2]))
    assert [list(line.get_xdata()) for each in ax.figure.axes for line in each.lines] == [[10, 20], [10, 20]]


@pytest.mark.parametrize(
    ("history", "metric", "message"),
    [
        (TWO_STAGES, "RR", r"metric must be a column with values, .* \['nDCG@10'\]; got 'RR'"),
        (TWO_STAGES.assign(RR=math.nan), "RR", "metric must be a column with values, .* got 'RR'"),
        (TWO_STAGES.assign(RR=1.0), None, r"metric must be given, as one of the columns \['nDCG@10', 'RR'\]; got None"),
        (
            TWO_STAGES.drop(columns="step"),
            None,
            r"history must have the columns .* without \['step'\]",
        ),
        (TWO_STAGES[["stage", "step"]], None, "history must have a loss or a metric with values"),
    ],
)
def test_invalid_histories_are_rejected(history, metric, message):
    with pytest.raises(ValueError, match=message):
        plots.learning_curve(history, metric=metric)


def test_a_ring_marks_the_kept_step():
    one = TWO_STAGES[TWO_STAGES["stage"] == "Contrastive"]
    rings = plots.learning_curve(one).figure.axes[1].collections[0]
    assert rings.get_offsets().tolist() == [[400, pytest.approx(one["nDCG@10"].max())]]
    kept = one.assign(kept=one["step"] == 150)
    rings = plots.learning_curve(kept).figure.axes[1].collections[0]
    assert rings.get_offsets().tolist() == [[150, pytest.approx(one.set_index("step").at[150, "nDCG@10"])]]


def test_both_panels_fit_into_a_subplot():
    figure = plt.figure(layout="constrained", figsize=(12, 5))
    left, right = figure.subplots(1, 2)
    plots.learning_curve(TWO_STAGES, ax=right)
    figure.canvas.draw()
    panels = [each.get_window_extent() for each in figure.axes if each is not left]
    assert len(panels) == 2
    assert all(panel.x0 > left.get_window_extent().x1 for panel in panels)
    with pytest.raises(ValueError, match="ax must be a subplot"):
        plots.learning_curve(TWO_STAGES, ax=plt.figure().add_axes((0, 0, 1, 1)))


# ---- query_differences


def test_bars_are_sorted_and_counted():
    ax = plots.query_differences(PERQUERY.sample(frac=1, random_state=1), "CL-KD", "CL", measure=nDCG @ 10)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], sorted(DIFFERENCES, reverse=True), atol=1e-9)
    assert ax.get_title(loc="left") == "CL-KD against CL\n3 better, 30 equal, 7 worse; mean difference +0.0016"
    assert ax.get_ylabel() == "difference in nDCG@10"
    assert "40 queries" in ax.get_xlabel()


def test_extremes_are_labelled():
    topics = pd.DataFrame({"qid": ["q0", "q1", "q39"], "query": ["from $5 to $10", "long " * 100, "the worst"]})
    ax = plots.query_differences(PERQUERY, "CL-KD", "CL", measure="nDCG@10", topics=topics, n_labels=2)
    best, worst, second, second_worst = texts(ax)
    assert best == "from $5 to $10 (+0.20)"
    assert second.startswith("long long")
    assert second.endswith("… (+0.15)")
    assert worst == "the worst (−0.10)"
    assert second_worst.startswith("q38 (−0.0")  # not in topics
    assert len(texts(plots.query_differences(PERQUERY, "CL-KD", "CL", measure="nDCG@10", n_labels=9))) == 3 + 7


@pytest.mark.parametrize(
    "differences",
    [
        np.linspace(0.5, -0.5, 150),
        np.repeat([1.0, 0.5, 0.0, -1.0], 75),  # many equal extremes
        np.linspace(0.31, 0.3, 50),  # no free room
        np.concatenate([[1.0], np.full(20, 0.01), np.full(20, -0.01)]),
    ],
)
@pytest.mark.parametrize("n_labels", [1, 5])
def test_labels_overlap_neither_bars_nor_labels(differences, n_labels):
    frame = pd.DataFrame({"name": "b", "qid": np.arange(len(differences)), "measure": "RR", "value": 0.0})
    frame = pd.concat([frame, frame.assign(name="a", value=differences)])
    topics = pd.DataFrame({"qid": frame["qid"], "query": "what is the price of " * 9}).drop_duplicates()
    ax = plots.query_differences(frame, "a", "b", measure="RR", topics=topics, n_labels=n_labels)
    ax.figure.canvas.draw()
    labels = [mpl.text.Text.get_window_extent(text) for text in ax.texts]  # without the line to the bar
    bars = [bar.get_window_extent() for bar in ax.patches if bar.get_height()]
    assert len(labels) >= n_labels
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    assert not any(label.overlaps(bar) for label in labels for bar in bars)
    assert all(ax.bbox.x0 <= label.x0 <= label.x1 <= ax.bbox.x1 for label in labels)
    assert all(ax.bbox.y0 <= label.y0 <= label.y1 <= ax.bbox.y1 for label in labels)


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
        (("CL-KD", "CL"), {"measure": "RR"}, r"measure must be one of \['nDCG@10'\]; got 'RR'"),
        (("CL-KD", "KD"), {"measure": "nDCG@10"}, r"systems must be among \['CL', 'CL-KD'\]; got \['KD'\]"),
        (("CL-KD", "CL"), {"measure": "nDCG@10", "topics": pd.DataFrame({"qid": []})}, "topics must have the columns"),
    ],
)
def test_invalid_comparisons_are_rejected(systems, options, message):
    with pytest.raises(ValueError, match=message):
        plots.query_differences(PERQUERY, *systems, **options)


# ---- equivalence


def test_forest_plot():
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


def test_forest_plot_of_measures_with_correction():
    frame = pd.concat([PERQUERY, PERQUERY.assign(measure="RR")])
    ax = plots.equivalence(equivalence_table(frame, margin={"nDCG@10": 0.05, "RR": 0.1}, correction="holm"))
    labels = [(label.get_text(), label.get_fontweight()) for label in ax.get_yticklabels()]
    assert labels == [("nDCG@10", "bold"), ("CL-KD − CL", "normal"), ("RR", "bold"), ("CL-KD − CL", "normal")]
    assert "Holm's correction" in ax.get_xlabel()


def test_forest_plot_of_a_single_query():
    two = pd.DataFrame({"name": ["a", "b"], "qid": "q", "measure": "RR", "value": [0.1, 0.2]})
    plots.equivalence(equivalence_table(two, margin=0.05)).figure.canvas.draw()


def test_tick_labels_of_narrow_intervals_dont_overlap():
    row = {"measure": "nDCG@10", "system": "CL-KD", "baseline": "CL", "n_queries": 400, "difference": 0.001}
    row |= {"ci_low": -0.001, "ci_high": 0.003, "ci_level": 0.9, "margin": 0.01, "verdict": significance.BETTER_WITHIN}
    ax = plots.equivalence(pd.DataFrame([row]))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) > 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_invalid_tables_are_rejected():
    with pytest.raises(ValueError, match=r"table must have the columns .* without \['verdict'\]"):
        plots.equivalence(TABLE.drop(columns="verdict"))
    with pytest.raises(ValueError, match="table must have at least one row"):
        plots.equivalence(TABLE[:0])


# ---- words


def test_words_are_coloured_by_their_importance():
    ax = plots.word_importance(WORDS)
    assert [text.get_text() for text in ax.texts] == [*WORDS["word"]]
    boxes = [text.get_bbox_patch() for text in ax.texts[:3]]
    assert [round(box.get_alpha(), 3) for box in boxes] == [0.75, 0.375, 0.0]
    assert boxes[0].get_facecolor()[:3] != boxes[1].get_facecolor()[:3]
    assert ax.get_title(loc="left").endswith("by up to 2 without a word (blue), and rises by up to 1 (orange)")
    ax.figure.canvas.draw()
    edges = [text.get_window_extent().x1 for text in ax.texts]
    assert max(edges) <= ax.get_window_extent().x1  # long texts are wrapped
    first, second = (ax.texts[i].get_window_extent() for i in (0, 1))
    assert first.x1 < second.x0


def test_words_without_importance():
    ax = plots.word_importance(WORDS.assign(importance=0.0))
    assert {text.get_bbox_patch().get_alpha() for text in ax.texts} == {0.0}
    assert {text.get_color() for text in ax.texts} == {plots.GREY}


def test_words_of_several_documents_are_rejected():
    with pytest.raises(ValueError, match=r"words must be those of one document; got 2\. Select one by its docno"):
        plots.word_importance(pd.concat([WORDS, WORDS.assign(docno="e")]))
    with pytest.raises(ValueError, match=r"words must be those of one query; got 2\. Select one by its qid"):
        plots.word_importance(pd.concat([WORDS.assign(qid="q1"), WORDS.assign(qid="q2")]))
    with pytest.raises(ValueError, match="words must be those of one document; got 0"):
        plots.word_importance(WORDS[:0])
    with pytest.raises(ValueError, match=r"words must have the columns .* without \['importance'\]"):
        plots.word_importance(WORDS.drop(columns="importance"))
