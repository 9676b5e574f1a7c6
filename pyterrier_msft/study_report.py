"""`report`: an experiment as one HTML page, to hand in, to review and to repeat."""

import importlib.util
import shlex
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyterrier as pt

from pyterrier_msft import significance
from pyterrier_msft.data.frames import PASSAGE_SUFFIX, require_columns
from pyterrier_msft.data.labels import count_judged_twice, whole_grades
from pyterrier_msft.ids import as_ids
from pyterrier_msft.notices import deduplicate_data_warnings, shows_progress, warn
from pyterrier_msft.pipelines import all_parts_of
from pyterrier_msft.reranker import MonoCE
from pyterrier_msft.study_page import Run, Study, render
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
        qrels: qid, docno and label; of two labels of a document, the higher one counts.
        measures: Measures of ir_measures. Differences by query are shown for the first.
        baseline: The name of the system that the others are compared with. None: the first; required for a frame of
            values.
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
    _require_matplotlib()
    path = _page_path(path)
    tests: dict[str, Any] = {"margin": margin, "alpha": alpha, "correction": correction}
    comparison = _Comparison.of(topics, qrels, measures, baseline, tests)
    if isinstance(systems, pd.DataFrame):
        study = _study_of_values(systems, comparison, rerankers)
    else:
        study = _study_of_runs(systems, comparison, rerankers)
    html = render(study, title=title, description=description, tests=tests, command=command or _running_command())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")
    return path


@dataclass(frozen=True)
class _Comparison:
    """What systems are compared on, and how."""

    topics: pd.DataFrame
    qrels: pd.DataFrame
    measures: Sequence[Any]
    baseline: str | None
    tests: Mapping[str, Any]  # the options of `equivalence_table`

    @classmethod
    def of(
        cls, topics: pd.DataFrame, qrels: pd.DataFrame, measures: Any, baseline: Any, tests: Mapping[str, Any]
    ) -> "_Comparison":
        """Check the queries and their judgments."""
        topics = _with_ids(topics, ["qid", "query"], "topics")
        if repeated := int(topics["qid"].duplicated().sum()):
            raise ValueError(f"topics must have each qid once; got {repeated:,} repeated rows")
        judgments = whole_grades(qrels, "labels")
        judgments = judgments[judgments["qid"].isin(topics["qid"])].reset_index(drop=True)
        if twice := count_judged_twice(qrels):
            documents = "1 document" if twice == 1 else f"{twice:,} documents"
            warn(f"qrels have {documents} with two labels: the higher one is used")
        measures = list(measures) if isinstance(measures, Sequence) and not isinstance(measures, str) else [measures]
        return cls(topics, judgments, measures, None if baseline is None else str(baseline), tests)

    @property
    def judged(self) -> set[str]:
        """The queries with judgments."""
        return {*self.topics["qid"]} & {*self.qrels["qid"]}

    def evaluate(self, results: Mapping[Run, pd.DataFrame]) -> pd.DataFrame:
        """Compute the values by query; with a column seed if a run has one."""
        runs = list(results)
        # Names must differ, and those of seeds are the same; pt.Experiment sorts by name.
        numbers = [f"{k:06}" for k in range(len(runs))]
        values = pt.Experiment(
            list(results.values()), self.topics, self.qrels, self.measures, names=numbers, perquery=True
        )
        of = [runs[int(number)] for number in values["name"]]
        values = values.assign(name=[name for name, _ in of], measure=values["measure"].map(str))
        seeds = pd.Series([seed for _, seed in of], index=values.index, dtype=object)
        return values if seeds.isna().all() else values.assign(seed=seeds)

    def table(self, perquery: pd.DataFrame) -> pd.DataFrame:
        """Test the differences from the baseline; check the arguments of the tests."""
        first = None if perquery.empty else perquery["name"].iloc[0]
        baseline = first if self.baseline is None else self.baseline
        return significance.equivalence_table(perquery, baseline=baseline, measures=self.measures, **self.tests)


def _study_of_values(values: pd.DataFrame, comparison: _Comparison, rerankers: Mapping[Any, Any] | None) -> Study:
    """Make a study of the values by query."""
    perquery = _with_ids(values, ["name", "qid", "measure", "value"], "systems")
    if comparison.baseline is None:
        raise ValueError(
            "baseline is required with a frame of values, as pt.Experiment sorts the systems by name; got None"
        )
    names = _distinct_names(perquery["name"].unique())
    perquery = perquery.assign(name=perquery["name"].map(str), measure=perquery["measure"].map(str))
    evaluated, judged = {*perquery.loc[perquery["value"].notna(), "qid"]}, comparison.judged
    if other := evaluated ^ judged:
        raise ValueError(
            f"systems must have values for the {len(judged):,} topics that the qrels judge, and for no others; got "
            f"{len(evaluated - judged):,} other queries and {len(judged - evaluated):,} topics without values, e.g. "
            f"{min(other)!r}. Pass the topics and qrels that the values were computed with"
        )
    models = _models({}, rerankers, names)
    return Study(comparison.topics, comparison.qrels, perquery, comparison.table(perquery), {}, {}, models)


def _study_of_runs(systems: Any, comparison: _Comparison, rerankers: Mapping[Any, Any] | None) -> Study:
    """Run each system once, and evaluate it."""
    runs, topics = _runs(systems), comparison.topics
    trial = topics.head(1)[["qid"]].assign(docno="", score=0.0)
    with warnings.catch_warnings(action="ignore"):
        comparison.table(comparison.evaluate(dict.fromkeys(runs, trial)))  # checks the arguments
    models = _models(runs, rerankers, list(dict.fromkeys(name for name, _ in runs)))
    bar = pt.tqdm(runs.items(), desc="report", unit="system", disable=not shows_progress(None))
    with deduplicate_data_warnings():
        results = {run: _results(system, topics, run[0]) for run, system in bar}
    _warn_of_missing_queries(results, comparison.judged)
    _warn_of_passages(results, comparison.qrels)
    perquery = comparison.evaluate(results)
    return Study(topics, comparison.qrels, perquery, comparison.table(perquery), runs, results, models)


# ---- arguments


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('report needs the extra [plot]: pip install "pyterrier-msft[plot]"')


def _page_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"path must be a file, e.g. {str(path / 'report.html')!r}; got the folder {str(path)!r}")
    return path


def _distinct_names(names: Collection[Any]) -> list[str]:
    """Return names of systems as strings, which must differ."""
    by_text: dict[str, Any] = {}
    for name in names:
        if str(name) in by_text:
            raise ValueError(f"systems must have names that differ as text; got {by_text[str(name)]!r} and {name!r}")
        by_text[str(name)] = name
    return list(by_text)


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
    for name, system in zip(_distinct_names(systems), systems.values(), strict=True):
        by_seed = system if isinstance(system, Mapping) else {None: system}
        if not by_seed:
            raise ValueError(f"systems must have at least one seed each; got none for {name!r}")
        runs |= {(name, seed): each for seed, each in by_seed.items()}
    for (name, _), system in runs.items():
        if isinstance(system, pd.DataFrame):
            require_columns(system, ["qid", "docno", "score"], f"systems: the results of {name!r}")
        elif not isinstance(system, pt.Transformer):
            kind = type(system).__name__
            raise ValueError(f"systems must be transformers or results frames; got {kind} for {name!r}")
    return runs


def _models(runs: Mapping[Run, Any], rerankers: Mapping[Any, Any] | None, names: list[str]) -> list[TrainedModel]:
    """Return the given re-rankers, or those in the pipelines."""
    given: dict[Run, Any] = {}
    for key, value in (rerankers or {}).items():
        by_seed = {key: value} if isinstance(value, Mapping) else {None: {key: value}}
        given |= {(str(name), seed): each for seed, by_name in by_seed.items() for name, each in by_name.items()}
    if unknown := [name for name, _ in given if name not in names]:
        raise ValueError(f"rerankers must have the names of systems, {names}; got {unknown[0]!r}")
    models = []
    for (name, seed), system in (runs if rerankers is None else given).items():
        found = [part for part in all_parts_of(system) if isinstance(part, MonoCE)]
        if rerankers is not None and not found:
            raise ValueError(f"rerankers must be MonoCE objects; got {type(system).__name__} for {name!r}")
        for place, ce in enumerate(found, 1):
            label = [f"seed {seed}"] * (seed is not None) + [f"re-ranker {place}"] * (len(found) > 1)
            models.append(TrainedModel(name, ", ".join(label), _settings(ce), ce.fingerprint, ce.stages))
    return models


def _running_command() -> str | None:
    """Return the command of the running script; None in a notebook or an interactive session."""
    is_script = hasattr(sys.modules["__main__"], "__file__")
    return shlex.join(["python", *sys.orig_argv[1:]]) if is_script else None


# ---- evaluation


def _results(system: Any, topics: pd.DataFrame, name: str) -> pd.DataFrame:
    """Run a system, or take its results."""
    found = system if isinstance(system, pd.DataFrame) else system(topics)
    found = _with_ids(found, ["qid", "docno", "score"], f"systems: the results of {name!r}")
    if repeated := int(found.duplicated(["qid", "docno"]).sum()):
        raise ValueError(
            f"systems must return each document once per query; got {repeated:,} duplicates from {name!r}. Of "
            "passages, pt.text.max_passage() makes documents"
        )
    return found


def _warn_of_missing_queries(results: Mapping[Run, pd.DataFrame], judged: set[str]) -> None:
    for (name, seed), frame in results.items():
        if missing := judged - {*frame["qid"]}:
            system = f"{name!r}" if seed is None else f"{name!r}, seed {seed},"
            warn(
                f"systems: {system} has no results for {len(missing):,} of {len(judged):,} judged queries, e.g. "
                f"{min(missing)!r}; their values are 0"
            )


def _warn_of_passages(results: Mapping[Run, pd.DataFrame], qrels: pd.DataFrame) -> None:
    """Warn about systems that return passages, which the labels of documents don't match."""
    if qrels["docno"].str.contains(PASSAGE_SUFFIX).any():
        return
    for name, frame in {name: frame for (name, _), frame in results.items()}.items():
        if as_ids(frame["docno"]).str.contains(PASSAGE_SUFFIX).any():
            warn(
                f"systems: {name!r} returns passages, whose docnos end in '%p' and a number, and the qrels have "
                "documents: its values are 0. End it with pt.text.max_passage()"
            )


def _settings(ce: MonoCE) -> str:
    weight = ce.first_stage_weight
    settings = {**ce.scoring_settings(), "interpolate": weight if weight is None else float(f"{weight:.4g}")}
    return f"MonoCE({ce.cross_encoder.name!r}, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"
