"""Plots of training runs, comparisons and explanations.

Each function draws into `ax`, or into a new figure, and returns the Axes, so that titles, limits and saving are up to
the caller: `learning_curve(ce.history).figure.savefig("curve.pdf")`. Colours are those of Okabe and Ito, which
colour-blind readers can distinguish; line styles and markers distinguish the same in greyscale. No global setting is
changed. They need the extra [plot]: `pip install "pyterrier-msft[plot]"`.
"""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtrit

from pyterrier_msft import significance
from pyterrier_msft.plot_style import (
    BLUE,
    COLOURS,
    GREY,
    LIGHT_GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    VERMILLION,
    line_style,
    new_axes,
    require_columns,
)
from pyterrier_msft.selection_plots import grid, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLOURS", "MARKERS", "equivalence", "grid", "learning_curve", "query_differences", "reliability",
    "word_importance",
]  # fmt: skip

SMOOTHING_WINDOWS = 20  # number of the running mean's windows in a stage
MIN_STAGE_WIDTH = 0.15  # share of the x-axis; if a stage is narrower, names alternate between two lines
LABEL_LINE = 14.0  # points between the lines of labels
LETTER_WIDTH = 5.0  # points of an average letter of small text

TEXT_WIDTH = 95  # characters of a line of text

# How `equivalence` draws a verdict: colour, marker, and how it's filled.
VERDICT_STYLES = {
    significance.BETTER: (VERMILLION, "D", "full"),
    significance.WORSE: (VERMILLION, "D", "full"),
    significance.BETTER_WITHIN: (PURPLE, "D", "left"),
    significance.WORSE_WITHIN: (PURPLE, "D", "left"),
    significance.EQUIVALENT: (BLUE, "o", "full"),
    significance.UNDECIDED: (GREY, "o", "none"),
}


def learning_curve(history: pd.DataFrame, *, ax: "Axes | None" = None, metric: str | None = None) -> "Axes":
    """Plot the training loss (above) and the validation metric (below) against training steps.

    Stages are plotted one after the other, with a dotted line between them; they are named at the top, or in the
    legend of several systems. The curve of the loss breaks there, as the losses of two objectives aren't comparable. A
    single system has its raw loss in light grey and the running mean in dark grey; several have only the running mean.
    A ring marks the step of each stage whose weights `fit` keeps.

    Args:
        history: Rows of training runs in their order, e.g. `MonoCE.history`, with the columns stage, step (from the
            stage's start), loss, and one named after the metric, e.g. "nDCG@10". NaN: not measured at this step. A
            column fitter names the stages; a column system separates several curves; kept says which step's weights
            are kept (without it, those with the best metric).
        ax: The subplot to draw into, which is split in two if there is both a loss and a metric. None: a new figure.
        metric: The metric's column. None: the only column named after a measure, if there is one.

    Returns:
        The Axes of the loss. Those of the metric are last in `figure.axes`; without a loss, they are returned.

    Raises:
        ValueError: If a column is missing, the metric isn't there, several columns could be the metric, or `ax` isn't
            a subplot.
    """
    require_columns(history, ["stage", "step"], "history")
    metric = _metric_column(history, metric)
    has_loss = "loss" in history and bool(history["loss"].notna().any())
    if not has_loss and metric is None:
        raise ValueError(f"history must have a loss or a metric with values; got {list(history)}")
    has_both = has_loss and metric is not None
    ax = new_axes(ax, (7.5, 5.0 if has_both else 4.2))
    below = _split(ax) if has_both else ax
    systems = history.groupby("system", sort=False, dropna=False) if "system" in history else [("", history)]
    curves = {str(name): _consecutive(frame) for name, frame in systems}
    if has_loss:
        _plot_losses(ax, curves)
    if metric is not None:
        _plot_metric(below, curves, metric)
    ax.figure.align_ylabels([ax, below])
    below.set_xlabel("training step")
    below.set_xlim(0, max(float(curve["x"].max()) for curve in curves.values()) * 1.02)
    for x in {end for curve in curves.values() for _, end in _stages(curve)[:-1]}:
        for panel in {ax, below}:
            panel.axvline(x, color=GREY, linestyle=":", linewidth=1.0, zorder=0)
    if len(curves) > 1:
        _add_legend(below, curves, marked=metric is not None)
    else:
        _name_stages(ax, next(iter(curves.values())))
    return ax


def query_differences(
    perquery: pd.DataFrame,
    system: str,
    baseline: str,
    *,
    measure: Any,
    topics: pd.DataFrame | None = None,
    n_labels: int = 3,
    ax: "Axes | None" = None,
) -> "Axes":
    """Plot a bar for each query: how much better or worse `system` is than `baseline`, in descending order.

    This shows whether a few queries changed much or many a little, and which queries to look at.

    Args:
        perquery: Columns name, qid, measure and value, as in `pt.Experiment(perquery=True)`. With a column seed, each
            system's values are averaged over its seeds.
        system: The system's name.
        baseline: The name of the system that it's compared with.
        measure: The measure, or its name.
        topics: Columns qid and query, to label bars with queries in place of qids.
        n_labels: How many of the largest gains, and of the largest losses, are labelled.
        ax: The Axes to draw into. None: a new figure.

    Raises:
        ValueError: If a column, system or the measure is missing, or the systems have different queries.
    """
    require_columns(perquery, ["name"], "perquery")
    if missing := {system, baseline} - set(perquery["name"]):
        raise ValueError(f"systems must be among {list(perquery['name'].unique())}; got {sorted(missing)}")
    values = significance.query_values(perquery[perquery["name"].isin([system, baseline])], measure)
    differences = (values[system] - values[baseline]).sort_values(ascending=False, kind="stable")
    d = differences.to_numpy().round(12)  # averages over seeds may differ by 1e-17
    labels = [str(qid) for qid in differences.index]
    if topics is not None:
        require_columns(topics, ["qid", "query"], "topics")
        queries = dict(zip(topics["qid"].map(str), topics["query"].map(str), strict=True))
        labels = [queries.get(qid, qid) for qid in labels]

    ax = new_axes(ax, (7.5, 4.2))
    n, gains, losses = len(d), int((d > 0).sum()), int((d < 0).sum())
    width = 0.85 if n <= 60 else 1.0  # gaps between many bars would flicker
    ax.bar(range(n), d, width=width, color=[BLUE if v > 0 else ORANGE for v in d])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlim(-0.01 * n - 0.5, 1.01 * n - 0.5)
    ax.set_xlabel(f"{n} queries, in descending order of the difference")
    ax.set_xticks([])
    ax.set_ylabel(f"difference in {measure}", parse_math=False)
    counts = f"{gains} better, {n - gains - losses} equal, {losses} worse; mean difference {_signed(d.mean(), 4)}"
    ax.set_title(f"{system} against {baseline}\n{counts}", loc="left", fontsize="medium", parse_math=False)
    _label_extremes(ax, d, labels, min(n_labels, gains), min(n_labels, losses))
    return ax


def equivalence(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Plot the table of `significance.equivalence_table` as a forest plot: differences, intervals, margins, verdicts.

    The dot is the mean difference. The thick bar is the table's interval (90% for alpha = .05): a pair is equivalent
    if the bar lies within the shaded margin. The thin bar is the t-test's interval (95%): a pair is different if it
    doesn't touch zero. The intervals aren't corrected; with Holm's correction, verdicts can be more cautious.

    Args:
        table: The frame of `significance.equivalence_table`. Rows with the same measure are grouped.
        ax: The Axes to draw into. None: a new figure with a height for the number of rows.

    Raises:
        ValueError: If columns are missing, or there are no rows.
    """
    needed = ["measure", "system", "baseline", "n_queries", "difference", "ci_low", "ci_high", "ci_level", "margin"]
    require_columns(table, [*needed, "verdict"], "table")
    if table.empty:
        raise ValueError("table must have at least one row; got none")
    groups = list(table.groupby("measure", sort=False))
    has_headings = len(groups) > 1  # the measure's name above its rows
    ax = new_axes(ax, (7.5, 1.3 + 0.36 * (len(table) + has_headings * len(groups))))
    lines: list[tuple[str, str]] = []  # the text on the left and on the right of each line, from the top
    for measure, rows in groups:
        if has_headings:
            lines.append((str(measure), ""))
        for row in rows.to_dict("records"):
            _plot_comparison(ax, row, y=len(lines))
            lines.append((f"{row['system']} − {row['baseline']}", str(row["verdict"])))
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    ax.locator_params(axis="x", nbins=5)  # names and verdicts leave little width for numbers of four digits
    ax.set_ylim(len(lines) - 0.5, -0.5)
    left, right = zip(*lines, strict=True)
    ax.set_yticks(range(len(lines)), left, parse_math=False)
    ax.tick_params(axis="y", length=0)
    for label, verdict in zip(ax.get_yticklabels(), right, strict=True):
        label.set_fontweight("normal" if verdict else "bold")
    verdicts = ax.secondary_yaxis("right")
    verdicts.set_yticks(range(len(lines)), right)
    verdicts.tick_params(axis="y", length=0)
    level = float(table["ci_level"].iloc[0])
    corrected = "\nverdicts with Holm's correction, intervals without" if "p_tost_holm" in table else ""
    ax.set_xlabel(
        f"difference in {'the measure' if has_headings else table['measure'].iloc[0]} (shaded: within the margin)\n"
        f"mean, {100 * level:.4g}% (thick) and {50 + 50 * level:.4g}% (thin) confidence interval{corrected}",
        parse_math=False,
    )
    return ax


def _metric_column(history: pd.DataFrame, metric: str | None) -> str | None:
    """The column of the validation metric: the given one, or the only one named after a measure."""
    measures = [str(c) for c in history if _is_measure(str(c)) and history[c].notna().any()]
    if metric is not None:
        if str(metric) not in history or history[str(metric)].isna().all():
            raise ValueError(f"metric must be a column with values, e.g. one of {measures}; got {str(metric)!r}")
        return str(metric)
    if len(measures) > 1:
        raise ValueError(f"metric must be given, as one of the columns {measures}; got None")
    return measures[0] if measures else None


def _is_measure(name: str) -> bool:
    import ir_measures

    try:
        ir_measures.parse_measure(name)
    except (NameError, ValueError):
        return False
    return True


def _consecutive(history: pd.DataFrame) -> pd.DataFrame:
    """Add part (the number of the stage) and x (the step, counted from the first stage's start)."""
    stage, step = history["stage"], history["step"]
    part = ((stage != stage.shift()) | (step < step.shift())).cumsum()
    lengths = step.groupby(part).max()
    return history.assign(part=part, x=step + part.map(lengths.cumsum() - lengths))


def _split(ax: "Axes") -> "Axes":
    """Leave the upper half of a subplot to its Axes; return new Axes in the lower half, with the same x-axis."""
    place = ax.get_subplotspec()
    if place is None:
        raise ValueError("ax must be a subplot, e.g. of plt.subplots(); got Axes at a fixed position")
    halves = place.subgridspec(2, 1, hspace=0.08)
    ax.set_subplotspec(halves[0])
    ax.tick_params(labelbottom=False)
    return ax.figure.add_subplot(halves[1], sharex=ax)


def _plot_losses(ax: "Axes", curves: Mapping[str, pd.DataFrame]) -> None:
    is_single, is_smoothed = len(curves) == 1, False
    for k, curve in enumerate(curves.values()):
        for _, part in curve[curve["loss"].notna()].groupby("part"):
            window = max(1, len(part) // SMOOTHING_WINDOWS)
            is_smoothed |= window > 1
            smooth = part["loss"].rolling(window, center=True, min_periods=1).mean()
            if is_single:
                if window > 1:
                    ax.plot(part["x"], part["loss"], color=LIGHT_GREY, linewidth=0.7)
                ax.plot(part["x"], smooth, color=GREY, linewidth=1.4)
            else:
                ax.plot(part["x"], smooth, linewidth=1.2, **line_style(k))
    smoothing = "\n(light), running mean (dark)" if is_single else "\n(running mean)"
    ax.set_ylabel("training loss" + smoothing * is_smoothed)


def _plot_metric(ax: "Axes", curves: Mapping[str, pd.DataFrame], metric: str) -> None:
    for k, curve in enumerate(curves.values()):
        rows = curve[curve[metric].notna()]
        colour = line_style(k) if len(curves) > 1 else {"color": BLUE}
        ax.plot(rows["x"], rows[metric], marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=1.6, **colour)
        known = rows["kept"].eq(True) if "kept" in rows else False
        kept = rows.assign(kept=known).sort_values(["kept", metric, "x"]).drop_duplicates("stage", keep="last")
        ax.scatter(kept["x"], kept[metric], s=90, facecolors="none", edgecolors=colour["color"])
    ax.set_ylabel(f"validation {metric}\n(ring: kept)", parse_math=False)


def _stages(curve: pd.DataFrame) -> list[tuple[str, float]]:
    """The stages' names and the x at which they end."""
    parts = curve.groupby("part")
    names = parts["fitter" if "fitter" in curve else "stage"].first().map(str)
    return list(zip(names, parts["x"].max().map(float), strict=True))


def _name_stages(ax: "Axes", curve: pd.DataFrame) -> None:
    names, ends = zip(*_stages(curve), strict=True)
    widths = np.diff([0.0, *ends])
    crowded = widths.min() < MIN_STAGE_WIDTH * ends[-1]
    labels = [name + "\n" * (i % 2 if crowded else 0) for i, name in enumerate(names)]
    top = ax.secondary_xaxis("top")  # its tick labels, unlike other texts, get room in any layout
    top.set_xticks(np.array(ends) - widths / 2, labels, parse_math=False)
    top.tick_params(axis="x", length=0)


def _add_legend(ax: "Axes", curves: Mapping[str, pd.DataFrame], *, marked: bool) -> None:
    """Name the systems and their stages below the axis' label."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    stages = {name: ", then ".join(stage for stage, _ in _stages(curve)) for name, curve in curves.items()}
    differ = len(set(stages.values())) > 1
    handles = [
        Line2D([], [], marker=MARKERS[k % len(MARKERS)] if marked else None, markersize=4, **line_style(k),
               label=f"{name} ({stages[name]})" if differ else name)
        for k, name in enumerate(curves)
    ]  # fmt: skip
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)  # inches
    legend = ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0,
        ncols=2 if differ else 4, fontsize="small",
        title=None if differ else next(iter(stages.values())), title_fontsize="small", alignment="left", frameon=False,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label_extremes(ax: "Axes", d: npt.NDArray[np.float64], labels: list[str], n_gains: int, n_losses: int) -> None:
    """Label the first `n_gains` bars above all bars, and the last `n_losses` below, one per line."""
    n, box = len(d), ax.get_window_extent()
    points = 72 / ax.figure.dpi
    line = min(LABEL_LINE / (box.height * points), 0.8 / max(n_gains + n_losses, 1))  # in the height of the Axes
    low, high = min(d.min(), 0.0), max(d.max(), 0.0)
    padding = 0.03
    unit = (high - low or 1.0) / (1 - line * (n_gains + n_losses) - 2 * padding)
    ax.set_ylim(low - unit * (line * n_losses + padding), high + unit * (line * n_gains + padding))
    letters = int(box.width * points / LETTER_WIDTH)
    for k in range(max(n_gains, n_losses)):
        for sign, count, bar in ((1, n_gains, k), (-1, n_losses, n - 1 - k)):
            if k >= count:
                continue
            value = f" ({_signed(d[bar], 2)})"
            x = k + 1 + 0.02 * n  # bars between the end of the axis and the text
            width = max(int(letters * (1 - x / n)) - len(value), 2)
            ax.annotate(
                textwrap.shorten(labels[bar], width, placeholder=" …") + value,
                xy=(bar, d[bar]),
                xytext=(x - 0.5 if sign > 0 else n - 0.5 - x, 0.5 + sign * (0.5 - line * (k + 0.5))),
                textcoords=("data", "axes fraction"),
                ha="left" if sign > 0 else "right",
                va="center",
                fontsize="small",
                parse_math=False,  # queries may have dollar signs
                arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0, "color": GREY,
                            "relpos": (float(sign < 0), 0.5)},
            )  # fmt: skip


def _plot_comparison(ax: "Axes", row: Mapping[Any, Any], y: float) -> None:
    colour, marker, fill = VERDICT_STYLES.get(str(row["verdict"]), (GREY, "o", "none"))
    ax.fill_betweenx([y - 0.5, y + 0.5], -row["margin"], row["margin"], color="0.9", linewidth=0, zorder=0)
    bar: dict[str, Any] = {"color": colour, "solid_capstyle": "butt"}
    ax.plot(_ttest_interval(row), [y, y], linewidth=1.2, **bar)
    ax.plot([row["ci_low"], row["ci_high"]], [y, y], linewidth=3.6, **bar)
    dot: dict[str, Any] = {"marker": marker, "fillstyle": fill, "markerfacecoloralt": "white"}
    ax.plot(row["difference"], y, color=colour, markersize=8, **dot)


def _ttest_interval(row: Mapping[Any, Any]) -> tuple[float, float]:
    """Compute the t-test's interval, of level 1 - alpha, from the table's interval, of level 1 - 2 alpha."""
    alpha, df = (1 - row["ci_level"]) / 2, max(row["n_queries"] - 1, 1)
    half = stdtrit(df, 1 - alpha / 2) / stdtrit(df, 1 - alpha) * (row["ci_high"] - row["ci_low"]) / 2
    return row["difference"] - half, row["difference"] + half


def _signed(value: float, digits: int) -> str:
    """Format with the minus sign of matplotlib's axes."""
    return f"{value:+.{digits}f}".replace("-", "−")


def word_importance(words: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Print a document's text with its words in colour: blue words raise its score, and orange ones lower it.

    The darkest word is the one that changes this score most, so compare colours within a text only. Grey words have no
    effect at all, usually because the model doesn't read that far.

    Args:
        words: The rows of one document in the result of `explain`: columns docno, word, importance.
        ax: The Axes to draw into. None: a new figure.

    Raises:
        ValueError: If a column is missing, or `words` has several documents or queries, or none.

    Example:
        >>> ax = word_importance(explain(ce, results.head(1), max_words=40))
    """
    require_columns(words, ["docno", "word", "importance"], "words")
    for name, selected in (("docno", "document"), ("qid", "query")):
        if name in words.columns and words[name].nunique() != 1:
            raise ValueError(
                f"words must be those of one {selected}; got {words[name].nunique()}. Select one by its {name}"
            )
    lines: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for word, importance in zip(words["word"], words["importance"], strict=True):
        if lines[-1] and column + len(word) > TEXT_WIDTH:
            lines.append([])
            column = 0
        lines[-1].append((column, word, importance))
        column += len(word) + 1
    ax = new_axes(ax, (7.5, 0.28 * len(lines) + 0.4))
    ax.set(xlim=(0, TEXT_WIDTH + 1), ylim=(len(lines) - 0.5, -0.5))
    ax.set_axis_off()
    highest, lowest = words["importance"].max(), words["importance"].min()
    largest = max(highest, -lowest) or 1.0
    for y, line in enumerate(lines):
        for x, word, importance in line:
            colour = BLUE if importance >= 0 else ORANGE
            box = {"facecolor": colour, "alpha": 0.75 * abs(importance) / largest, "edgecolor": "none", "pad": 1.5}
            ink = "black" if importance else GREY
            ax.text(x, y, word, family="monospace", fontsize=9, va="center", parse_math=False, bbox=box, color=ink)
    title = f"The score falls by up to {max(highest, 0):.2g} without a word (blue)"
    if lowest < 0:
        title += f", and rises by up to {-lowest:.2g} (orange)"
    ax.set_title(title, loc="left", fontsize="medium")
    return ax
