"""The tables and pictures of `report`, as text and image data for its template."""

import base64
import importlib.metadata
import io
import math
import platform
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from pyterrier_msft import plots, significance
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.model.record import StageRecord, history_frame, library_versions, metric_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIBRARIES = ("numpy", "pandas", "scipy", "ir_measures", "matplotlib")  # besides those that affect training
PICTURE_DPI = 130
UNKNOWN = "–"


class Table(NamedTuple):
    """A table of texts."""

    caption: str
    columns: list[tuple[str, str]]  # the heading of each column and its kind: "text", "number" or "code"
    rows: list[list[str]]


class Picture(NamedTuple):
    """An image in a page."""

    data: str  # its address, which holds its content
    alt: str
    caption: str


@dataclass(frozen=True)
class TrainedModel:
    """A re-ranker of a system, with one of its seeds."""

    system: str
    label: str  # what tells it from others of the system; empty if there is only one
    settings: str
    fingerprint: str
    stages: list[StageRecord]

    @property
    def name(self) -> str:
        """The system and what tells its models apart."""
        return f"{self.system}, {self.label}" if self.label else self.system


# ---- text


def number(value: float, digits: int = 4) -> str:
    """Format a number; a dash if there is none."""
    return UNKNOWN if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """Format a difference, with its sign."""
    return UNKNOWN if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def p_value(p: float) -> str:
    """Format a p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def excerpt(text: Any, length: int) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[:length].rstrip() + " …"


# ---- results


def means_table(perquery: pd.DataFrame, measures: Sequence[str]) -> Table:
    """Tabulate each system's mean, with the standard deviation over seeds if a system has several."""
    summary = significance.seed_summary(perquery[perquery["measure"].isin(measures)])
    values = {(row["name"], row["measure"]): row for row in summary.to_dict("records")}
    queries = summary.groupby("measure")["n_queries"].first()
    has_seeds = bool((summary["n_seeds"] > 1).any())
    rows = []
    for name in summary["name"].unique():
        cells = [values[name, measure] for measure in measures]
        seeds = [str(cells[0]["n_seeds"])] if has_seeds else []
        spreads = [f" ± {number(cell['std'])}" if cell["n_seeds"] > 1 else "" for cell in cells]
        rows.append([str(name), *seeds, *(number(c["mean"]) + s for c, s in zip(cells, spreads, strict=True))])
    counts = ", ".join(sorted({f"{n:,}" for n in queries}))
    spread = ", ± its standard deviation over the seeds of training" if has_seeds else ""
    columns = [("System", "text"), *((name, "number") for name in ["Seeds"] * has_seeds + [*measures])]
    return Table(f"Mean over {counts} queries{spread}", columns, rows)


def comparison_table(table: pd.DataFrame) -> Table:
    """Tabulate the frame of `equivalence_table`, whose rows have the same baseline."""
    baseline = str(table["baseline"].iloc[0])
    rows = [
        [str(row["measure"]), str(row["system"]), number(row["mean"]), number(row["baseline_mean"]), *_tested(row)]
        for row in table.to_dict("records")
    ]
    columns = [("Measure", "text"), ("System", "text"), ("Mean", "number"), (baseline, "number"), *_test_columns(table)]
    return Table(f"Differences from {baseline}{_corrected(table)}", columns, rows)


def pairs_table(table: pd.DataFrame) -> Table:
    """Tabulate the frame of `equivalence_table` of all pairs by one measure."""
    rows = [[str(row["system"]), str(row["baseline"]), *_tested(row)] for row in table.to_dict("records")]
    columns = [("System", "text"), ("Compared with", "text"), *_test_columns(table)]
    return Table(f"All {len(rows)} pairs by {table['measure'].iloc[0]}{_corrected(table)}", columns, rows)


def _test_columns(table: pd.DataFrame) -> list[tuple[str, str]]:
    level = f"{100 * float(table['ci_level'].iloc[0]):.4g}% interval (TOST)"
    names = ["Difference", level, "Margin", "p (t-test)", "p (TOST)"]
    return [*((name, "number") for name in names), ("Verdict", "text")]


def _tested(row: Mapping[Any, Any]) -> list[str]:
    suffix = _suffix(row)
    return [
        signed(row["difference"]), _interval(row), f"±{row['margin']:g}", p_value(row[f"p_ttest{suffix}"]),
        p_value(row[f"p_tost{suffix}"]), str(row["verdict"]),
    ]  # fmt: skip


def _suffix(row: Mapping[Any, Any]) -> str:
    """Return the end of the names of the p-values to show."""
    return "_holm" if "p_ttest_holm" in row else ""


def _corrected(table: pd.DataFrame) -> str:
    comparisons = "1 comparison" if len(table) == 1 else f"{len(table)} comparisons"
    return f", p-values with Holm's correction for {comparisons}" if "p_ttest_holm" in table else ""


def in_words(row: Mapping[Any, Any]) -> str:
    """Describe a row of `equivalence_table`."""
    level = f"{100 * row['ci_level']:.4g}%"
    means = f"{number(row['mean'])} against {number(row['baseline_mean'])} of {row['baseline']}"
    p = p_value(row[f"p_ttest{_suffix(row)}"])
    corrected = " with Holm's correction" if _suffix(row) else ""
    p = f"p {'' if p.startswith('<') else '= '}{p}{corrected}"
    interval = f"{signed(row['difference'])}, {p}, {level} interval of the equivalence test {_interval(row)}"
    return f"{row['system']}: {row['measure']} {means} ({interval}): {row['verdict']}."


def _interval(row: Mapping[Any, Any]) -> str:
    return f"[{signed(row['ci_low'])}, {signed(row['ci_high'])}]"


# ---- training


def models_table(models: Sequence[TrainedModel]) -> Table:
    """Tabulate the settings of re-rankers."""
    rows = [[model.name, model.settings, model.fingerprint] for model in models]
    return Table("Re-rankers", [("System", "text"), ("Re-ranker", "code"), ("Weights", "code")], rows)


def equal_models(models: Sequence[TrainedModel]) -> list[str]:
    """Name the systems whose models have the same weights, as after a stage of which validation kept nothing."""
    by_weights: dict[str, list[TrainedModel]] = {}
    for model in models:
        by_weights.setdefault(model.fingerprint, []).append(model)
    return [
        f"{' and '.join(model.name for model in same)} have the same weights, so a comparison of them says nothing "
        "about their training."
        for same in by_weights.values()
        if len({model.system for model in same}) > 1
    ]


def stages_table(models: Sequence[TrainedModel]) -> Table:
    """Tabulate the stages of training."""
    rows = []
    for model in models:
        for place, stage in enumerate(model.stages, 1):
            validation = ", ".join(f"{name} {number(value)}" for name, value in stage.metrics.items())
            counts = [f"{stage.queries:,}", f"{stage.documents:,}", stage.updates_text, str(stage.seed)]
            outcome = stage.data_report.get("outcome")
            rows.append([model.name, str(place), stage.fitter, *counts, validation or UNKNOWN, outcome or "last step"])
    numbers = [(name, "number") for name in ("Queries", "Documents", "Updates", "Seed", "Validation")]
    columns = [("System", "text"), ("Stage", "number"), ("Objective and settings", "code"), *numbers]
    columns.append(("Weights", "text"))
    return Table("Stages of training", columns, rows)


def data_reports(models: Sequence[TrainedModel]) -> list[tuple[str, list[str]]]:
    """Return what each stage found in its data, as lines, with the names of the stages that found the same."""
    names: dict[tuple[str, ...], list[str]] = {}
    for model in models:
        for place, stage in enumerate(model.stages, 1):
            if stage.data_report:
                report = repr(DataReport.from_dict(stage.data_report))
                name = model.name + f", stage {place}" * (len(model.stages) > 1)
                names.setdefault(tuple(textwrap.dedent(report.partition("\n")[2]).splitlines()), []).append(name)
    return [("; ".join(systems), list(lines)) for lines, systems in names.items()]


def training_pictures(models: Sequence[TrainedModel], measures: Sequence[str]) -> list[Picture]:
    """Plot learning curves: of all systems, or of the seeds of each system."""
    trained = [model for model in models if any(stage.history for stage in model.stages)]
    histories = [history_frame(model.stages).assign(system=model.label or model.system) for model in trained]
    groups: dict[str, list[pd.DataFrame]] = {}
    for model, history in zip(trained, histories, strict=True):
        groups.setdefault(model.system if model.label else "", []).append(history)
    pictures = []
    for system, frames in groups.items():
        history = pd.concat(frames, ignore_index=True)
        metrics = metric_columns(map(str, history))
        metric = next((name for name in measures if name in metrics), metrics[0] if metrics else None)
        if metric is None and history["loss"].isna().all():
            continue
        what = "Training loss" + f" and {metric} on the validation queries" * (metric is not None)
        of = f"of {system}, by seed" if system else f"of {', '.join(history['system'].unique())}"
        draw = partial(plots.learning_curve, history, metric=metric)
        pictures.append(picture(draw, f"Line plot. {what} {of}.", f"{what} {of}"))
    return pictures


# ---- versions


def versions_table(models: Sequence[TrainedModel]) -> Table:
    """Tabulate the versions of packages: of this installation, and those that the models were trained with."""
    here = {"Python": platform.python_version(), **library_versions()}
    here |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    recorded = [stage.versions for model in models for stage in model.stages if stage.versions]
    rows = []
    for name in dict.fromkeys([*here, *(name for versions in recorded for name in versions)]):
        found = dict.fromkeys(versions[name] for versions in recorded if name in versions)
        rows.append([name, here.get(name, UNKNOWN), *([", ".join(found) or UNKNOWN] if recorded else [])])
    columns = [(name, "text") for name in ("Package", "Evaluation", "Training")[: 2 + bool(recorded)]]
    return Table(f"Versions, on {platform.system()} {platform.machine()}", columns, rows)


# ---- pictures


def picture(draw: Callable[[], "Axes"], alt: str, caption: str) -> Picture:
    """Draw with matplotlib's own style, whatever the user's is, and leave no figure open."""
    from matplotlib import pyplot

    with pyplot.style.context("default", after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's text has the query
        figure = draw().get_figure(root=True)
        assert figure is not None
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=PICTURE_DPI, bbox_inches="tight")
        pyplot.close(figure)
    data = base64.b64encode(content.getvalue()).decode()
    return Picture(f"data:image/png;base64,{data}", alt, caption)
