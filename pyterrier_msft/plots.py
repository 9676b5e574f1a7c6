"""Pictures of a training run and of what came of it: learning curves, differences, equivalence, sweeps, words.

Each function draws into `ax`, or into a new figure where none is given, and returns the Axes, so that titles, limits
and saving stay with the caller: `learning_curve(ce.history).figure.savefig("curve.pdf")`. Colours are those of Okabe
and Ito, which colour-blind readers tell apart; form or position says the same once more, so that a greyscale print
does. Nothing global is changed. matplotlib comes with `pip install pyterrier-msft[plot]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

from pyterrier_msft import significance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
# Black first: with one or two systems, the usual case, lightness alone separates the curves.
COLOURS = ("black", VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 2)))
GREY, LIGHT = "0.45", "0.75"
_TIE: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0}  # between a thing and its name


def learning_curve(history: pd.DataFrame, *, ax: "Axes | None" = None, metric: str | None = None) -> "Axes":
    """Draws the training loss (left axis) and the validation metric (right axis) over the training steps.

    Stages follow each other along the x-axis, though their steps start anew; a dotted line shows where one ends, and
    their names stand at the top. Loss curves break there, since another objective's loss is another quantity.

    One system has its raw loss in light grey and its running mean in dark grey. Several systems show the running mean
    only, and the system's name beside the end of its curve.

    Args:
        history: what the training recorded, in its order, such as `MonoCE.history`: stage (a name or number; a column
            fitter names it better), step (counted from the stage's start), loss and a column named after the metric,
            such as "nDCG@10"; NaN where a row has no loss or no evaluation. With a column system, a curve each. Other
            columns don't matter.
        ax: where to draw; None makes a figure.
        metric: the metric's column; None finds it by its name, and leaves it out where there is none.

    Returns:
        The Axes of the loss; the metric's is its twin, last in `figure.axes`. Without any loss the metric's Axes alone.

    Raises:
        ValueError: a column is missing, the metric isn't there, or several could be meant.
    """
    _require(history, ["stage", "step"], "a history with columns")
    metric = _metric(history, metric)
    has_loss = "loss" in history and bool(history["loss"].notna().any())
    if not has_loss and metric is None:
        raise ValueError(f"expected a column with losses or with a metric, found {list(history)} without a value")
    ax = _axes(ax, (7.5, 4.2))
    systems = history.groupby("system", sort=False, dropna=False) if "system" in history else [("", history)]
    curves = {str(name): _consecutive(frame) for name, frame in systems}
    several, smoothed = len(curves) > 1, False
    right = (ax.twinx() if has_loss else ax) if metric is not None else None

    ends: dict[str, tuple[Axes, float, float]] = {}
    for k, (name, curve) in enumerate(curves.items()):
        style = _style(k)
        losses = curve[curve["loss"].notna()] if has_loss else curve[:0]
        for _, part in losses.groupby("part"):
            window = max(1, len(part) // 20)
            smooth = part["loss"].rolling(window, center=True, min_periods=1).mean()
            smoothed |= window > 1
            if several:
                ax.plot(part["x"], smooth, alpha=1.0 if right is None else 0.45, linewidth=1.2, **style)
            else:
                if window > 1:
                    ax.plot(part["x"], part["loss"], color=LIGHT, linewidth=0.7)
                ax.plot(part["x"], smooth, color=GREY, linewidth=1.4)
            ends[name] = (ax, part["x"].iloc[-1], smooth.iloc[-1])
        if right is not None and curve[metric].notna().any():
            evaluated = curve[curve[metric].notna()]
            style |= {"marker": MARKERS[k % len(MARKERS)]} | ({} if several else {"color": BLUE})
            right.plot(evaluated["x"], evaluated[metric], linewidth=1.6, markersize=4, **style)
            ends[name] = (right, evaluated["x"].iloc[-1], evaluated[metric].iloc[-1])

    ax.set_xlabel("training step")
    if has_loss:
        raw = " (light), running mean (dark)" if smoothed else ""
        ax.set_ylabel("training loss" + (", running mean" * smoothed if several else raw))
    if right is not None:
        right.set_ylabel(f"validation {metric}" + " (marked)" * has_loss, parse_math=False)
    end = max(float(curve["x"].max()) for curve in curves.values())
    names_width = _margin_for(ax, curves) if several else 0.0
    ax.set_xlim(-0.02 * end, end * (1.02 + names_width))
    top = _stage_names(ax, curves, end)
    for each in [ax] if right is None or right is ax else [ax, right]:
        low, high = each.get_ylim()
        each.set_ylim(low, high + (high - low) * top / (1 - top))
    if several:
        _name_curves(ends, 1.02 * end, list(curves))
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
    """Draws a bar for each query: by how much `system` is better or worse than `baseline`, the best gains first.

    A mean hides whether a few queries changed much or many a little; and the queries at both ends are those to look at.

    Args:
        perquery: name, qid, measure, value, as from `pt.Experiment(perquery=True)`; with a column seed, each system's
            values are averaged over its seeds.
        system: the system's name.
        baseline: the name of the one that it's compared with.
        measure: the measure, or its name.
        topics: qid, query: shows the query's text instead of its qid.
        n_labels: how many of the greatest gains, and of the greatest losses, are named.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: a column, system or the measure is missing; the systems differ in their queries.
    """
    _require(perquery, ["name"], "the frame of pt.Experiment(perquery=True) with columns")
    if missing := {system, baseline} - set(perquery["name"]):
        raise ValueError(f"expected systems among {list(perquery['name'].unique())}, found {sorted(missing)}")
    values = significance.query_values(perquery[perquery["name"].isin([system, baseline])], measure)
    difference = (values[system] - values[baseline]).sort_values(ascending=False, kind="stable")
    # What averages over seeds leave as 1e-17 is no change.
    d = difference.to_numpy().round(12)
    texts = [str(qid) for qid in difference.index]
    if topics is not None:
        _require(topics, ["qid", "query"], "topics with columns")
        queries = dict(zip(topics["qid"].map(str), topics["query"].map(str), strict=True))
        texts = [queries.get(qid, qid) for qid in texts]

    ax = _axes(ax, (7.5, 4.2))
    n, gains, losses = len(d), int((d > 0).sum()), int((d < 0).sum())
    # Many bars melt together without gaps, which would only flicker.
    ax.bar(range(n), d, width=0.85 if n <= 60 else 1.0, color=[BLUE if v > 0 else ORANGE for v in d])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlim(-0.01 * n - 0.5, 1.01 * n - 0.5)
    ax.set_xlabel(f"{n} queries, from the greatest gain to the greatest loss")
    ax.set_xticks([])
    ax.set_ylabel(f"difference in {measure}", parse_math=False)
    counts = f"{gains} better, {n - gains - losses} equal, {losses} worse; mean difference {_signed(d.mean(), 4)}"
    ax.set_title(f"{system} against {baseline}\n{counts}", loc="left", fontsize="medium", parse_math=False)
    _name_extremes(ax, d, texts, min(n_labels, gains), min(n_labels, losses))
    return ax


def equivalence(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Draws a forest plot of `significance.equivalence_table`: differences, intervals, margins and verdicts.

    The dot is the mean difference. The thick bar is the table's interval (90% for alpha = .05): a pair is equivalent
    where it lies within the shaded margin. The thin one is the t-test's (95%): a pair is different where it doesn't
    touch zero. With Holm's correction a verdict can be more cautious than its intervals, which aren't corrected; the
    x-axis says so.

    Args:
        table: the frame of `significance.equivalence_table`; rows of one measure stand together.
        ax: where to draw; None makes a figure that is as high as the table is long.

    Raises:
        ValueError: columns are missing, or there is no row.
    """
    needed = ["measure", "system", "baseline", "n_queries", "difference", "ci_low", "ci_high", "ci_level", "margin"]
    _require(table, [*needed, "verdict"], "the frame of equivalence_table with columns")
    if table.empty:
        raise ValueError("expected a table with at least one row, found none")
    styles = {
        significance.DIFFERENT: (VERMILLION, "D", "full"),
        significance.BOTH: (PURPLE, "D", "left"),
        significance.EQUIVALENT: (BLUE, "o", "full"),
        significance.UNDECIDED: (GREY, "o", "none"),
    }
    groups = list(table.groupby("measure", sort=False))
    headed = len(groups) > 1  # a line with the measure's name above its rows
    ax = _axes(ax, (7.5, 1.3 + 0.36 * (len(table) + headed * len(groups))))
    ticks: list[tuple[float, str, str]] = []  # y, text at the left, text at the right
    y = 0.0
    for measure, rows in groups:
        if headed:
            ticks.append((y, str(measure), ""))
            y += 1
        for row in rows.to_dict("records"):
            colour, marker, fill = styles.get(str(row["verdict"]), (GREY, "o", "none"))
            ax.fill_betweenx([y - 0.5, y + 0.5], -row["margin"], row["margin"], color="0.9", linewidth=0, zorder=0)
            bar: dict[str, Any] = {"color": colour, "solid_capstyle": "butt"}
            ax.plot(_wider(row), [y, y], linewidth=1.2, **bar)
            ax.plot([row["ci_low"], row["ci_high"]], [y, y], linewidth=3.6, **bar)
            dot: dict[str, Any] = {"marker": marker, "fillstyle": fill, "markerfacecoloralt": "white"}
            ax.plot(row["difference"], y, color=colour, markersize=8, **dot)
            ticks.append((y, f"{row['system']} − {row['baseline']}", str(row["verdict"])))
            y += 1
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    ax.locator_params(axis="x", nbins=5)  # names and verdicts leave little width for numbers of four digits
    ax.set_ylim(y - 0.5, -0.5)
    at, left, right = zip(*ticks, strict=True)
    ax.set_yticks(at, left, parse_math=False)
    ax.tick_params(axis="y", length=0)
    for label, verdict in zip(ax.get_yticklabels(), right, strict=True):
        label.set_fontweight("normal" if verdict else "bold")
    # The verdicts are tick labels of a second axis, for which every layout makes room.
    verdicts = ax.secondary_yaxis("right")
    verdicts.set_yticks(at, right)
    verdicts.tick_params(axis="y", length=0)
    level = float(table["ci_level"].iloc[0])
    corrected = "\nverdicts with Holm's correction, intervals without" if "p_tost_holm" in table else ""
    ax.set_xlabel(
        f"difference in {'the measure' if headed else table['measure'].iloc[0]} (shaded: within the margin)\n"
        f"mean, {100 * level:.4g}% (thick) and {50 + 50 * level:.4g}% (thin) confidence interval{corrected}",
        parse_math=False,
    )
    return ax


def second_stage_learning_rate(
    sweep: pd.DataFrame, *, measure: Any = "nDCG@10", margin: float | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Draws a measure against the second stage's learning rate, beside what one stage alone reaches.

    The question that the paper leaves undone: is a second stage without effect, or was its learning rate too small to
    have one? Each small circle is a trained model, the curve is the mean over seeds, and error bars (a band for the
    single stage) are the standard deviation over seeds.

    Args:
        sweep: a row for each trained model: learning_rate of the second stage, or NaN for a model of one stage; a
            column named after the measure; seed or other columns as one likes. With a column system, a curve (or a
            line, for one stage) each, with its name.
        measure: the measure, or its name.
        margin: shades what is no more than this above or below each single stage's mean, in the measure's unit.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: a column is missing, no row has a learning rate, or one isn't positive.
    """
    measure = str(measure)
    _require(sweep, ["learning_rate", measure], "a sweep with columns")
    sweep = sweep.reset_index(drop=True)  # frames put together may repeat their index
    rates = sweep["learning_rate"].astype(float)
    if not (rates > 0).any() or (rates <= 0).any():
        raise ValueError(f"expected learning rates > 0 (NaN: one stage), found {sorted(set(rates.dropna().to_list()))}")
    ax = _axes(ax, (7.5, 4.2))
    ax.set_xscale("log")
    default = np.where(rates.isna(), "one stage alone", "two stages")
    systems = sweep["system"].map(str) if "system" in sweep else pd.Series(default, index=sweep.index)
    frame = pd.DataFrame({"system": systems, "rate": rates, "value": sweep[measure].astype(float)})
    single, double = frame[rates.isna()], frame[rates.notna()]
    order = list(dict.fromkeys([*double["system"], *single["system"]]))
    low, high = float(rates.min()), float(rates.max())
    decades = max(float(np.log10(high / low)), 1.0)
    left, right = low / 10 ** (0.04 * decades), high * 10 ** (0.06 * decades)
    ax.set_xlim(left, right * 10 ** (1.1 * decades * _margin_for(ax, order)))
    ends: dict[str, tuple[Axes, float, float]] = {}
    for k, name in enumerate(order):
        style, marker = _style(k), MARKERS[k % len(MARKERS)]
        colour = style["color"]
        alone = single.loc[single["system"] == name, "value"]
        if len(alone):
            mean, std = float(alone.mean()), float(alone.std(ddof=1))
            if margin is not None:
                ax.fill_between([left, right], mean - margin, mean + margin, color="0.93", linewidth=0, zorder=0)
            if std > 0:
                ax.fill_between([left, right], mean - std, mean + std, color=colour, alpha=0.15, linewidth=0, zorder=1)
            ax.plot([left, right], [mean, mean], linewidth=1.2, **style)
            ends[name] = (ax, right, mean)
        runs = double[double["system"] == name]
        if len(runs):
            # Curves a little side by side, so that one's error bars don't cover another's.
            shift = 10 ** (decades * 0.012 * (k - (double["system"].nunique() - 1) / 2))
            values = runs.groupby("rate")["value"]
            at, means, stds = values.mean().index.to_numpy() * shift, values.mean().to_numpy(), values.std().fillna(0)
            ax.plot(runs["rate"] * shift, runs["value"], "o", markersize=3, fillstyle="none", color=colour, alpha=0.5)
            ax.errorbar(at, means, stds.to_numpy(), marker=marker, capsize=3, **style)
            ends[name] = (ax, float(at[-1]), float(means[-1]))
    shaded = "" if margin is None or single.empty else f" (grey: within {margin:g} of one stage alone)"
    ax.set_xlabel("learning rate of the second stage" + shaded)
    seeds = double.groupby(["system", "rate"]).size()
    few, many = int(seeds.min()), int(seeds.max())
    spread = f", mean and std. deviation of {many if few == many else f'{few} to {many}'} seeds" if many > 1 else ""
    ax.set_ylabel(measure + spread, parse_math=False)
    _name_curves(ends, right * 10 ** (0.01 * decades), order)
    return ax


def word_importance(words: Sequence[str], importance: npt.ArrayLike, *, ax: "Axes | None" = None) -> "Axes":
    """Writes a text, each word on a ground that is the stronger the more the word matters.

    Such as by erasure (Li, Monroe and Jurafsky, 2016, arXiv 1612.08220): a word's importance is by how much the score
    falls when the word is left out. Where the score rises instead, the word is in italics, on orange.

    Args:
        words: the text's words in order.
        importance: a value for each; below 0 the word counts against the document.
        ax: where to write; None makes a figure that is as high as the text is long.

    Raises:
        ValueError: there are no words, or not one finite value for each.
    """
    values = np.asarray(importance, dtype=float)
    if not len(words) or values.shape != (len(words),) or not np.isfinite(values).all():
        raise ValueError(
            f"expected one finite value for each of at least one word, found {len(words)} words and values of shape "
            f"{values.shape}" + ", not all finite" * (not np.isfinite(values).all())
        )
    size, gap, line = 11.0, 6.0, 20.0  # points: the letters, between words, between lines
    width = 7.5 * 72 if ax is None else ax.get_window_extent().width / ax.figure.dpi * 72
    places: list[tuple[float, float]] = []
    x, y = gap, 0.0
    for word in words:
        room = _width(word, size)
        if places and x + room > width - gap:
            x, y = gap, y + line
        places.append((x, y))
        x += room + gap
    ax = _axes(ax, (7.5, (y + 2.5 * line) / 72))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(y + line, -line)
    strongest = np.abs(values).max() or 1.0
    for word, value, (left, below) in zip(words, values, places, strict=True):
        ground = {
            "facecolor": BLUE if value >= 0 else ORANGE,
            "alpha": 0.75 * abs(value) / strongest,  # black letters stay readable on the strongest
            "edgecolor": "none",
            "pad": 1.5,
        }
        style = "normal" if value >= 0 else "italic"
        ax.text(left, below, word, fontsize=size, style=style, va="center", parse_math=False, bbox=ground)
    rises = f"; rises by up to {-values.min():.2g} without those in italics (orange)" if values.min() < 0 else ""
    falls = f"the score falls by up to {max(values.max(), 0):.2g} without a word (blue){rises}"
    ax.set_title(falls, loc="left", fontsize="medium", parse_math=False)
    return ax


def _width(word: str, size: float) -> float:
    """A word's width in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(word, FontProperties(size=size), ismath=False)[0])


def _axes(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("the plots need matplotlib: pip install pyterrier-msft[plot]") from e
    return plt.subplots(figsize=size, layout="constrained")[1]


def _style(k: int) -> dict[str, Any]:
    """How the k-th system's curve looks."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": LINES[k % len(LINES)]}


def _require(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    if missing := [c for c in columns if c not in frame]:
        raise ValueError(f"expected {what} {', '.join(columns)}, found {list(frame)} without {', '.join(missing)}")


def _metric(history: pd.DataFrame, metric: str | None) -> str | None:
    """The column of the validation metric: the one asked for, or the only one that is named like a measure."""
    measures = [str(c) for c in history if _is_measure(str(c)) and history[c].notna().any()]
    if metric is not None:
        if str(metric) not in history or history[str(metric)].isna().all():
            raise ValueError(f"expected a metric with values, such as the columns {measures}, found {str(metric)!r}")
        return str(metric)
    if len(measures) > 1:
        raise ValueError(f"expected metric=, one of the columns {measures}, found None")
    return measures[0] if measures else None


def _is_measure(name: str) -> bool:
    import ir_measures

    try:
        ir_measures.parse_measure(name)
    except (NameError, ValueError):
        return False
    return True


def _consecutive(history: pd.DataFrame) -> pd.DataFrame:
    """Adds part (a stage's number) and x (the step, counted on from the stages before)."""
    stage, step = history["stage"], history["step"]
    part = ((stage != stage.shift()) | (step < step.shift())).cumsum()
    lengths = step.groupby(part).max()
    return history.assign(part=part, x=step + part.map(lengths.cumsum() - lengths))


def _stage_names(ax: "Axes", curves: Mapping[str, pd.DataFrame], end: float) -> float:
    """Writes the stages' names along the top and draws their bounds; returns the share of the height that this takes.

    One line of names if all systems have the same stages, else a line and a bar for each system.
    """
    layouts: dict[str, list[tuple[str, float, float]]] = {}
    for name, curve in curves.items():
        stops = curve.groupby("part")["x"].max().to_list()
        stages = curve.groupby("part")["fitter" if "fitter" in curve else "stage"].first().map(str).to_list()
        layouts[name] = list(zip(stages, [0.0, *stops[:-1]], stops, strict=True))
    for x in sorted({start for layout in layouts.values() for _, start, _ in layout} - {0.0}):
        ax.axvline(x, color=GREY, linestyle=":", linewidth=1.0, zorder=0)
    letter, line = end / _letters(ax), _line(ax)
    transform = ax.get_xaxis_transform()  # x in steps, y as a share of the height
    write: dict[str, Any] = {"transform": transform, "va": "center", "fontsize": "small", "parse_math": False}
    ground = {"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 0.5}  # hides a bound that crosses a name
    distinct = len(set(map(tuple, layouts.values()))) > 1
    top = 0.5 * line
    for k, (name, layout) in enumerate([*layouts.items()][: None if distinct else 1]):
        lines: list[
            float
        ] = []  # where the text on each line ends: a short stage's name may not fit beside the last one
        for stage, start, stop in layout:
            half = (len(stage) + 1) * letter / 2
            x = max(min((start + stop) / 2, end - half), half)
            level = next((i for i, until in enumerate(lines) if until <= x - half), len(lines))
            lines[level : level + 1] = [x + half]
            ax.text(x, 1 - top - (level + 0.5) * line, stage, ha="center", bbox=ground, **write)
        top += (len(lines) + 0.1) * line
        if distinct:
            colour, gap = _style(k)["color"], 0.008 * end
            for _, start, stop in layout:
                ax.plot([start + gap, stop - gap], [1 - top] * 2, transform=transform, color=colour, linewidth=2)
            ax.text(layout[-1][2] + letter, 1 - top, name, color=colour, bbox=ground, **write)
            top += 0.3 * line
    return min(top + 0.5 * line, 0.6)


def _name_curves(ends: Mapping[str, "tuple[Axes, float, float]"], at: float, order: Sequence[str]) -> None:
    """Writes each curve's name at x = `at`, tied to the curve's end by a dotted line, without overlaps."""
    names = [name for name in order if name in ends]
    if not names:
        return
    heights = []
    for name in names:
        ax, _, y = ends[name]
        low, high = ax.get_ylim()
        heights.append((y - low) / (high - low))
    ax = ends[names[-1]][0]
    gap = 1.05 * _line(ax)
    placed = _spread(np.array(heights), gap, gap / 2, 1 - gap / 2)
    transform = ax.get_xaxis_transform()  # x as the data's, y as a share of the height
    for name, height, label in zip(names, heights, placed, strict=True):
        colour = _style(order.index(name))["color"]
        ax.annotate(
            name,
            xy=(ends[name][1], height),
            xytext=(at, label),
            xycoords=transform,
            textcoords=transform,
            annotation_clip=False,
            va="center",
            fontsize="small",
            color=colour,
            parse_math=False,
            arrowprops={**_TIE, "color": colour, "linestyle": ":", "relpos": (0, 0.5)},
        )


def _spread(positions: npt.NDArray[np.float64], gap: float, low: float, high: float) -> npt.NDArray[np.float64]:
    """Moves positions, as little as possible, to be `gap` apart, from `low` on and (where they fit) up to `high`."""
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    # Least squares under y[i + 1] >= y[i] + gap is isotonic regression of y[i] - i * gap.
    even = isotonic_regression(positions[order] - steps).x
    placed = np.empty_like(positions)
    placed[order] = even.clip(low, max(high - gap * (len(positions) - 1), low)) + steps
    return placed


def _name_extremes(ax: "Axes", d: npt.NDArray[np.float64], texts: list[str], n_gains: int, n_losses: int) -> None:
    """Names the first `n_gains` and the last `n_losses` bars of the falling `d`, where no bar is in the way.

    That is beside the bars, about at the height of their ends: gains at the right of theirs, losses at the left. Where
    other bars leave too little room, names stand above (below) all bars, and the y-axis gets longer.
    """
    n = len(d)
    # Of each side: its sign, how many names, and all bars from the outermost inwards, this side's being positive.
    sides = [(sign, k, bars) for sign, k, bars in ((1, n_gains, d), (-1, n_losses, -d[::-1])) if k]
    edges = {1: max(d[0], 0.0), -1: max(-d[-1], 0.0)}
    tops, places = dict(edges), {}
    for _ in range(4):  # the longer the axis, the higher a line of text in the measure's unit; this settles quickly
        gap = 1.3 * _line(ax) * (sum(tops.values()) or 1.0)
        for sign, k, bars in sides:
            heights = _spread(bars[:k][::-1], gap, 0.6 * gap, np.inf)[::-1]
            taller = np.array([(bars > height - 0.6 * gap).sum() for height in heights])
            taller = np.maximum.accumulate(np.maximum(taller, np.arange(k) + 1))  # no name before its own bar
            if taller.max() > 0.5 * n:
                heights, taller = edges[sign] + gap * np.arange(k, 0, -1), np.full(k, k)
            tops[sign] = max(edges[sign], heights[0] + 0.5 * gap)
            places[sign] = zip(heights, taller, strict=True)
    pad = 0.04 * (sum(tops.values()) or 1.0)
    ax.set_ylim(-tops[-1] - pad, tops[1] + pad)
    for sign, place in places.items():
        for k, (height, taller) in enumerate(place):
            bar, offset = (k if sign > 0 else n - 1 - k), taller + 0.03 * n  # bars between the axis' end and the name
            room = int(_letters(ax) * (1 - offset / n)) - len(" (+0.00)") - 1
            ax.annotate(
                f"{_cut(texts[bar], room)} ({_signed(d[bar], 2)})",
                xy=(bar, d[bar]),
                xytext=(offset - 0.5 if sign > 0 else n - 0.5 - offset, sign * height),
                ha="left" if sign > 0 else "right",
                va="center",
                fontsize="small",
                parse_math=False,  # a query may well hold two dollar signs
                arrowprops={**_TIE, "color": GREY, "relpos": (float(sign < 0), 0.5)},
            )


def _wider(row: Mapping[Any, Any]) -> tuple[float, float]:
    """The interval of level 1 - alpha that belongs to the t-test, from the table's one of level 1 - 2 alpha."""
    alpha, df = (1 - row["ci_level"]) / 2, max(row["n_queries"] - 1, 1)
    half = stdtrit(df, 1 - alpha / 2) / stdtrit(df, 1 - alpha) * (row["ci_high"] - row["ci_low"]) / 2
    return row["difference"] - half, row["difference"] + half


def _cut(text: str, letters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: max(letters - 1, 1)].rstrip() + "…"


def _signed(value: float, digits: int) -> str:
    """With the minus sign that matplotlib's axes have."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _margin_for(ax: "Axes", names: Iterable[str]) -> float:
    """How much wider the x-axis must get, as a share of its length, to hold the curves' names at the right."""
    share = min((max(map(len, names)) + 3) / _letters(ax), 0.5)
    return share / (1 - share)


def _letters(ax: "Axes") -> float:
    """About how many letters of small text fit into the width of `ax`."""
    return float(ax.get_window_extent().width / ax.figure.dpi * 72 / (0.55 * _small()))


def _line(ax: "Axes") -> float:
    """The height of a line of small text, as a share of the height of `ax`."""
    return float(1.3 * _small() / (ax.get_window_extent().height / ax.figure.dpi * 72))


def _small() -> float:
    from matplotlib.font_manager import FontProperties

    return float(FontProperties(size="small").get_size_in_points())
