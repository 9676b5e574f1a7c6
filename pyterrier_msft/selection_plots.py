"""Plots for choices that validation makes: of hyperparameters, and of a threshold. Public in `plots`."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_msft.checks import check_number
from pyterrier_msft.ids import as_ids
from pyterrier_msft.plot_style import BLUE, GREY, LIGHT_GREY, MARKERS, VERMILLION, line_style, new_axes, require_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyterrier_msft.grid import GridResult


def grid(result: "GridResult", *, ax: "Axes | None" = None) -> "Axes":
    """Plot the validation metric of each combination that `fit_grid` has trained.

    The setting with the most values is on the x-axis; the combinations of the others are lines. A ring marks the best
    combination. With seeds, a dot is the mean and a bar the range. A dashed line is the first stage.

    If the best value of a setting is at an end of its list, extend the list there: with `save_dir`, only the new
    combinations are trained.

    Args:
        result: What `fit_grid` returned.
        ax: The Axes to draw into. None: a new figure.
    """
    table, metric = result.table, result.metric
    names = sorted(result.best_setting, key=lambda name: -table[name].nunique())
    across, others = names[0], [name for name in names[1:] if table[name].nunique() > 1]
    ticks = list(dict.fromkeys(table[across]))
    ax = new_axes(ax, (6.0, 4.0))
    lines = table.groupby(others, sort=False, dropna=False) if others else [((), table)]
    for k, (values, rows) in enumerate(lines):
        x = [ticks.index(value) for value in rows[across]]
        label = ", ".join(f"{name}={value}" for name, value in zip(others, values, strict=True))
        ax.plot(x, rows[metric], marker=MARKERS[k % len(MARKERS)], markersize=5, label=label, **line_style(k))
        if "lowest" in rows:
            ax.vlines(x, rows["lowest"], rows["highest"], color=line_style(k)["color"], linewidth=1.0)
    best = table.to_dict("records")[int(table[metric].to_numpy().argmax())]
    ring: dict[str, Any] = {"marker": "o", "markersize": 13, "fillstyle": "none", "markeredgewidth": 1.6}
    ax.plot(ticks.index(best[across]), best[metric], color=VERMILLION, linestyle="", **ring)
    if result.first_stage is not None:
        ax.axhline(result.first_stage, color=GREY, linestyle="--", linewidth=1.0, zorder=0)
        ax.annotate(
            "first stage", (1, result.first_stage), xycoords=("axes fraction", "data"), xytext=(-3, 3),
            textcoords="offset points", ha="right", color=GREY, fontsize="small",
        )  # fmt: skip
    ax.set_xticks(range(len(ticks)), [str(value) for value in ticks], parse_math=False)
    ax.set_xlabel(across, parse_math=False)
    ax.set_ylabel(f"validation {metric}", parse_math=False)
    if others:
        for text in ax.legend(fontsize="small", frameon=False).get_texts():
            text.set_parse_math(False)
    return ax


def reliability(
    results: pd.DataFrame, qrels: pd.DataFrame, *, n_bins: int = 10, min_relevance: float = 1, ax: "Axes | None" = None
) -> "Axes":
    """Plot how often documents are relevant against the predicted probability (reliability diagram).

    Each dot is a bin of documents with similar probabilities, with their number and a 95% interval (Wilson's). Dots on
    the diagonal mean that the probabilities are right; below it, that they are too high. The title has the Brier score,
    the mean squared error of the probabilities, and the expected calibration error, the bins' mean distance from the
    diagonal.

    Args:
        results: Scored results of a calibrated re-ranker, `MonoCE.calibrate`: qid, docno and probability. Take queries
            that neither `fit` nor `calibrate` has seen. Of passages, `pt.text.max_passage()` makes documents.
        qrels: Their labels: qid, docno, label. Queries without a label are left out; in the others, documents without
            a label count as not relevant.
        n_bins: Number of bins of equal width.
        min_relevance: Minimum label of a relevant document.
        ax: The Axes to draw into. None: a new figure.

    Raises:
        ValueError: If a column is missing, a probability isn't a number or a document is repeated, no document is
            relevant, or `min_relevance` isn't positive.
    """
    from scipy.stats import binomtest  # takes long to import

    check_number("min_relevance", min_relevance, required=True)
    require_columns(results, ["qid", "docno", "probability"], "results")
    require_columns(qrels, ["qid", "docno", "label"], "qrels")
    ids, judged = (frame[["qid", "docno"]].apply(as_ids) for frame in (results, qrels))
    is_judged = ids["qid"].isin(judged["qid"]).to_numpy()
    pairs, rows = ids[is_judged], results[is_judged]
    p = rows["probability"].to_numpy(dtype=np.float64)
    if repeated := int(pairs.duplicated().sum()):
        raise ValueError(f"results must have each document once per query; got {repeated:,} duplicates")
    if missing := int(np.isnan(p).sum()):
        raise ValueError(f"probability must be a number in every row; got NaN in {missing:,} of {len(p):,}")
    positives = judged[(qrels["label"] >= min_relevance).to_numpy()]
    y = pd.MultiIndex.from_frame(pairs).isin(pd.MultiIndex.from_frame(positives)).astype(float)
    if not y.any():
        raise ValueError("results must have a relevant document in the qrels; got none. Check that the ids match")
    bins = pd.Series(np.minimum((p * n_bins).astype(int), n_bins - 1))
    dots = pd.DataFrame({"p": p, "y": y}).groupby(bins).agg(n=("p", "size"), p=("p", "mean"), y=("y", "mean"))
    error = float((dots["n"] * (dots["p"] - dots["y"]).abs()).sum() / len(p))
    shares = zip(dots["y"], dots["n"], strict=True)
    intervals = [binomtest(round(share * n), n).proportion_ci(method="wilson") for share, n in shares]

    ax = new_axes(ax, (4.8, 4.8))
    ax.plot([0, 1], [0, 1], color=LIGHT_GREY, linestyle="--", linewidth=1.0, zorder=0)
    ax.vlines(dots["p"], *zip(*intervals, strict=True), color=BLUE, linewidth=1.2)
    ax.plot(dots["p"], dots["y"], color=BLUE, marker="o", markersize=5, linewidth=1.0)
    for n, x, (_, top) in zip(dots["n"], dots["p"], intervals, strict=True):
        ax.annotate(f"{n:,}", (x, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize="x-small")
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.03, 1.08)
    ax.set_xlabel("predicted probability")
    ax.set_ylabel("share of relevant documents")
    brier = float(np.mean((p - y) ** 2))
    title = f"{len(p):,} documents of {rows['qid'].nunique():,} queries\n"
    scores = f"Brier score {brier:.4f}, expected calibration error {error:.4f}"
    ax.set_title(title + scores, loc="left", fontsize="medium")
    return ax
