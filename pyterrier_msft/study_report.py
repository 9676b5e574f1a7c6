"""`report`: an experiment as one HTML page, to hand in, to review and to repeat."""

import importlib.util
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyterrier as pt

from pyterrier_msft import significance
from pyterrier_msft.data.frames import as_ids, require_columns
from pyterrier_msft.reranker import MonoCE
from pyterrier_msft.study_page import Run, Study, parts_of, render
from pyterrier_msft.study_tables import TrainedModel


def report(
    systems: Mapping[str, Any] | pd.DataFrame,
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    measures: Sequence[Any],
    *,
    baseline: str | None = None,
    margin: float | Mapping[Any, float] = 0.01,
    alpha: float = 0.05,
    correction: Literal["holm"] | None = "holm",
    rerankers: Mapping[Any, Any] | None = None,
    title: str = "Comparison of re-rankers",
    description: str = "",
    command: str | None = None,
    path: str | Path = "report.html",
) -> Path:
    """Write an experiment as one HTML page: set-up, training, results with tests, differences by query, versions.

    Each system is run once. All pictures are in the file, and it loads nothing from the network. It has no date: the
    same call on the same data writes the same page.

    Args:
        systems: Transformers or results frames by name. For a system that was trained with several seeds, a dictionary
            from each seed to a transformer or frame. Or the frame of `pt.Experiment(perquery=True)`, with a column
            `seed` if there are several; then the page has no documents.
        topics: The test queries: qid and query.
        qrels: qid, docno and label.
        measures: Measures of ir_measures. Differences by query are shown for the first.
        baseline: The name of the system that the others are compared with. None: the first.
        margin: The smallest difference that matters, or a mapping from measure to margin, see `equivalence_table`.
        alpha: The level of the tests.
        correction: "holm" corrects the p-values for the number of comparisons, see `equivalence_table`.
        rerankers: The re-rankers of systems by name, or by seed and name, as `fit_sequences` returns them. None: those
            in the pipelines of `systems`; frames have none.
        title: The page's title.
        description: Text for the beginning: the question, the hypothesis. An empty line begins a paragraph.
        command: The command or code that repeats the experiment. None: that of the running script.
        path: The file to write; an existing one is replaced.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is invalid; raised before a system is run.
        ImportError: Without matplotlib (extra `[plot]`).

    Example:
        >>> path = report(systems, test_topics, test_qrels, [nDCG @ 10, RR @ 10], baseline="BM25")
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('report needs the extra [plot]: pip install "pyterrier-msft[plot]"')
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"path must be a file, e.g. {str(path / 'report.html')!r}; got the folder {str(path)!r}")
    topics = _with_ids(topics, ["qid", "query"], "topics")
    qrels = _with_ids(qrels, ["qid", "docno", "label"], "qrels")
    measures = list(measures) if isinstance(measures, Sequence) and not isinstance(measures, str) else [measures]
    tests: dict[str, Any] = {"margin": margin, "alpha": alpha, "correction": correction}
    if isinstance(systems, pd.DataFrame):
        runs: dict[Run, Any] = {}
        results: dict[Run, pd.DataFrame] = {}
        perquery = _with_ids(systems, ["name", "qid", "measure", "value"], "systems")
        perquery["measure"] = perquery["measure"].map(str)
        models = _models(runs, rerankers, perquery["name"].unique())
    else:
        runs = _runs(systems)
        models = _models(runs, rerankers, systems)
        trial = topics.head(1)[["qid"]].assign(docno="", score=0.0)
        with warnings.catch_warnings(action="ignore"):
            values = _evaluate(dict.fromkeys(runs, trial), topics, qrels, measures)
        _compare(values, measures, baseline, tests)  # checks the arguments
        results = {run: _results(system, topics, run[0]) for run, system in runs.items()}
        perquery = _evaluate(results, topics, qrels, measures)
    study = Study(topics, qrels, perquery, _compare(perquery, measures, baseline, tests), runs, results, models)
    html = render(study, title=title, description=description, tests=tests, command=command or _running_command())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")
    return path


# ---- arguments


def _with_ids(frame: pd.DataFrame, columns: list[str], what: str) -> pd.DataFrame:
    """Check the columns, and convert ids to strings, as PyTerrier's are."""
    require_columns(frame, columns, what)
    ids = {name: as_ids(frame[name]) for name in ("qid", "docno") if name in columns}
    return frame.reset_index(drop=True).assign(**ids)


def _runs(systems: Mapping[str, Any]) -> dict[Run, Any]:
    """Return the transformers or frames by name and seed."""
    if not isinstance(systems, Mapping) or len(systems) < 2:
        got = list(systems) if isinstance(systems, Mapping) else type(systems).__name__
        raise ValueError(f"systems must be a dictionary of at least two systems by name, or a data frame; got {got}")
    runs: dict[Run, Any] = {}
    for name, system in systems.items():
        by_seed = system if isinstance(system, Mapping) else {None: system}
        if not by_seed:
            raise ValueError(f"systems must have at least one seed each; got none for {name!r}")
        runs |= {(str(name), seed): each for seed, each in by_seed.items()}
    for (name, _), system in runs.items():
        if isinstance(system, pd.DataFrame):
            require_columns(system, ["qid", "docno", "score"], f"systems: the results of {name!r}")
        elif not isinstance(system, pt.Transformer):
            kind = type(system).__name__
            raise ValueError(f"systems must be transformers or results frames; got {kind} for {name!r}")
    return runs


def _models(runs: Mapping[Run, Any], rerankers: Mapping[Any, Any] | None, names: Iterable[str]) -> list[TrainedModel]:
    """Return the given re-rankers, or those in the pipelines."""
    given: dict[Run, Any] = {}
    for key, value in (rerankers or {}).items():
        by_seed = {key: value} if isinstance(value, Mapping) else {None: {key: value}}
        given |= {(name, seed): each for seed, by_name in by_seed.items() for name, each in by_name.items()}
    if unknown := [name for name, _ in given if name not in set(names)]:
        raise ValueError(f"rerankers must have the names of systems, {list(names)}; got {unknown[0]!r}")
    models = []
    for (name, seed), system in (runs if rerankers is None else given).items():
        found = list(_rerankers_in(system))
        if rerankers is not None and not found:
            raise ValueError(f"rerankers must be MonoCE objects; got {type(system).__name__} for {name!r}")
        for place, ce in enumerate(found, 1):
            label = [f"seed {seed}"] * (seed is not None) + [f"re-ranker {place}"] * (len(found) > 1)
            models.append(TrainedModel(name, ", ".join(label), _settings(ce), ce.stages))
    return models


def _rerankers_in(system: Any) -> Iterator[MonoCE]:
    """Find the re-rankers in a pipeline, in its order."""
    if isinstance(system, MonoCE):
        yield system
    elif isinstance(system, pt.Transformer):
        for part in parts_of(system):
            yield from _rerankers_in(part)


def _running_command() -> str | None:
    """Return the command of the running script; None in a notebook or an interactive session."""
    is_script = hasattr(sys.modules["__main__"], "__file__")
    return shlex.join(["python", *sys.orig_argv[1:]]) if is_script else None


# ---- evaluation


def _results(system: Any, topics: pd.DataFrame, name: str) -> pd.DataFrame:
    """Run a system, or take its results."""
    found = system if isinstance(system, pd.DataFrame) else system(topics)
    return _with_ids(found, ["qid", "docno", "score"], f"systems: the results of {name!r}")


def _evaluate(
    results: Mapping[Run, pd.DataFrame], topics: pd.DataFrame, qrels: pd.DataFrame, measures: Sequence[Any]
) -> pd.DataFrame:
    """Compute the values by query; with a column seed if a run has one."""
    runs = list(results)
    numbers = [str(k) for k in range(len(runs))]  # names must differ, and those of seeds are the same
    values = pt.Experiment(list(results.values()), topics, qrels, measures, names=numbers, perquery=True)
    of = [runs[int(number)] for number in values["name"]]
    values = values.assign(name=[name for name, _ in of], measure=values["measure"].map(str))
    seeds = pd.Series([seed for _, seed in of], index=values.index, dtype=object)
    return values if seeds.isna().all() else values.assign(seed=seeds)


def _compare(
    perquery: pd.DataFrame, measures: Sequence[Any], baseline: str | None, tests: Mapping[str, Any]
) -> pd.DataFrame:
    first = None if perquery.empty else str(perquery["name"].iloc[0])
    return significance.equivalence_table(perquery, baseline=baseline or first, measures=measures, **tests)


def _settings(ce: MonoCE) -> str:
    weight = ce.first_stage_weight
    settings = {**ce.scoring_settings(), "interpolate": weight if weight is None else float(f"{weight:.4g}")}
    return f"MonoCE({ce.cross_encoder.name!r}, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"
