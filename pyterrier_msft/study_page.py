"""The page of `report`: its sections, and its rendering."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_msft import plots, significance
from pyterrier_msft import study_tables as tables
from pyterrier_msft.data.frames import frame_digest
from pyterrier_msft.ids import as_ids
from pyterrier_msft.pipelines import parts_of
from pyterrier_msft.study_tables import Picture, Table, TrainedModel

EXTREMES = 5  # queries with the largest gains, and with the largest losses
TOP_DOCUMENTS = 3  # of each of these queries
QUERY_LENGTH, TEXT_LENGTH = 300, 160  # characters

LEGEND = {
    significance.BETTER: "the t-test rejects that the means are equal, and the difference is positive.",
    significance.WORSE: "the t-test rejects that the means are equal, and the difference is negative.",
    significance.EQUIVALENT: "the equivalence test (TOST) rejects a difference of the margin or more.",
    significance.BETTER_WITHIN: "both tests reject: the difference is positive, and smaller than the margin.",
    significance.WORSE_WITHIN: "both tests reject: the difference is negative, and smaller than the margin.",
    significance.UNDECIDED: "neither rejects: there are too few queries to tell. It doesn't mean “no difference”.",
}

Run = tuple[str, Any]  # a system's name, and its seed or None


@dataclass(frozen=True)
class Study:
    """What a page is made from."""

    topics: pd.DataFrame
    qrels: pd.DataFrame
    perquery: pd.DataFrame
    table: pd.DataFrame  # of equivalence_table
    runs: dict[Run, Any]  # transformers or frames; empty if only the values by query are known
    results: dict[Run, pd.DataFrame]
    models: list[TrainedModel]

    @property
    def measures(self) -> list[str]:
        """The compared measures."""
        return list(self.table["measure"].unique())

    @property
    def baseline(self) -> str:
        """The name of the system that the others are compared with."""
        return str(self.table["baseline"].iloc[0])

    @property
    def has_seeds(self) -> bool:
        """Whether seeds of training are known."""
        return "seed" in self.perquery and bool(self.perquery["seed"].notna().any())

    def results_of(self, system: str) -> pd.DataFrame | None:
        """Return the results of a system, with the first of its seeds."""
        return next((frame for (name, _), frame in self.results.items() if name == system), None)


def render(study: Study, *, title: str, description: str, tests: Mapping[str, Any], command: str | None) -> str:
    """Write the page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pyterrier_msft", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    rows = study.table.to_dict("records")
    systems = [str(row["system"]) for row in rows if row["measure"] == study.measures[0]]
    verdicts, pairs = {*study.table["verdict"]}, None
    if len(systems) > 1:
        pairs = significance.equivalence_table(study.perquery, measures=study.measures[:1], **tests)
        verdicts |= {*pairs["verdict"]}
    forest = tables.picture(
        lambda: plots.equivalence(study.table),
        "Forest plot of the differences in the table, with their intervals and the margin.",
        "Differences with their intervals; the margin is shaded.",
    )
    return environment.get_template("report.html").render(
        title=title,
        paragraphs=[part for part in description.split("\n\n") if part.strip()],
        findings=[
            *(tables.in_words(row) for row in rows if row["measure"] == study.measures[0]),
            *tables.equal_models(study.models),
        ],
        setup=_setup(study, tests),
        systems=_systems_table(study),
        models=tables.models_table(study.models) if study.models else None,
        stages=tables.stages_table(study.models) if any(model.stages for model in study.models) else None,
        data_reports=tables.data_reports(study.models),
        curves=tables.training_pictures(study.models, study.measures),
        means=tables.means_table(study.perquery, study.measures),
        comparisons=tables.comparison_table(study.table),
        pairs=None if pairs is None else tables.pairs_table(pairs),
        legend={verdict: text for verdict, text in LEGEND.items() if verdict in verdicts},
        forest=forest,
        measure=study.measures[0],
        by_query=[_by_query(study, system) for system in systems],
        has_seeds=study.has_seeds,
        versions=tables.versions_table(study.models),
        command=command,
    )


def _setup(study: Study, tests: Mapping[str, Any]) -> dict[str, str]:
    judged = study.topics["qid"].isin(study.qrels["qid"]).sum()
    topics = study.topics[["qid", "query"]].sort_values("qid")
    qrels = study.qrels[["qid", "docno", "label"]].sort_values(["qid", "docno"])
    corrected = "Holm's correction over all comparisons" if tests["correction"] else "no correction for their number"
    return {
        "Test queries": f"{len(topics):,}, {judged:,} of them with judgments (digest {frame_digest(topics)[:16]})",
        "Judgments": f"{len(qrels):,} (digest {frame_digest(qrels)[:16]})",
        "Measures": ", ".join(study.measures),
        "Baseline": study.baseline,
        "Tests": f"paired t-test and equivalence test (TOST), alpha = {tests['alpha']:g}, {corrected}",
    }


def _systems_table(study: Study) -> Table:
    """Tabulate what each system is."""
    rows = []
    for name in study.perquery["name"].unique():
        system = next((each for (found, _), each in study.runs.items() if found == name), None)
        results = study.results_of(name)
        what = "results" if system is None or isinstance(system, pd.DataFrame) else _describe(system)
        count = tables.UNKNOWN if results is None else f"{len(results):,} for {results['qid'].nunique():,} queries"
        rows.append([str(name), what, count, ", ".join(_seeds(study, name)) or tables.UNKNOWN])
    columns = [("System", "text"), ("What it is", "code"), ("Documents", "number"), ("Seeds", "text")]
    columns = columns if study.has_seeds else columns[:-1]
    return Table("Systems", columns, [row[: len(columns)] for row in rows])


def _seeds(study: Study, name: str) -> list[str]:
    if not study.has_seeds:
        return []
    return list(as_ids(study.perquery.loc[study.perquery["name"] == name, "seed"].dropna()).unique())


def _describe(transformer: pt.Transformer) -> str:
    """Return the repr, or the names of the classes where it is an address in memory."""
    text = repr(transformer)
    if " object at 0x" not in text:
        return text
    parts = ", ".join(_describe(part) for part in parts_of(transformer))
    return f"{type(transformer).__name__}({parts})"


# ---- differences by query


def _by_query(study: Study, system: str) -> dict[str, Any]:
    """Return a system's differences from the baseline: a plot, and the queries that gained and lost most."""
    measure, baseline = study.measures[0], study.baseline
    perquery = study.perquery[study.perquery["name"].isin([system, baseline])]
    values = significance.query_values(perquery, measure)
    difference = (values[system] - values[baseline]).round(12).sort_values(ascending=False, kind="stable")
    gained = difference[difference > 0].head(EXTREMES)
    lost = difference[difference < 0].iloc[::-1].head(EXTREMES)
    by_query = values.to_dict("index")
    queries = dict(zip(study.topics["qid"], study.topics["query"], strict=True))
    columns = [("Query", "text"), ("qid", "code"), *((name, "number") for name in (baseline, system, "Difference"))]
    parts, documents = [], []
    for what, found in {"gained": gained, "lost": lost}.items():
        rows = []
        for qid, change in found.items():
            query = tables.excerpt(queries.get(qid, qid), QUERY_LENGTH)
            numbers = [tables.number(by_query[qid][name]) for name in (baseline, system)]
            rows.append([query, str(qid), *numbers, tables.signed(change)])
            documents.append({"query": query, "change": tables.signed(change), "qid": qid})
        parts.append(Table(f"Queries that {what} most with {system}", columns, rows))
    plot = _difference_plot(study, perquery, system, difference)
    return {"system": system, "picture": plot, "tables": parts, "documents": _with_documents(study, system, documents)}


def _difference_plot(study: Study, perquery: pd.DataFrame, system: str, difference: pd.Series) -> Picture:
    measure = study.measures[0]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    counts = f"{better:,} queries better, {len(difference) - better - worse:,} equal, {worse:,} worse"
    return tables.picture(
        lambda: plots.query_differences(perquery, system, study.baseline, measure=measure, topics=study.topics),
        f"Bar chart of the difference in {measure} between {system} and {study.baseline} by query: {counts}.",
        f"Difference in {measure} by query: {counts}",
    )


def _with_documents(study: Study, system: str, queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the top documents, and the best relevant one, of the baseline and of a system to queries.

    Return none if there are no results.
    """
    compared = {name: study.results_of(name) for name in (study.baseline, system)}
    wanted = [query["qid"] for query in queries]
    found = {name: frame[frame["qid"].isin(wanted)] for name, frame in compared.items() if frame is not None}
    if not found:
        return []
    texts = {
        row["docno"]: tables.excerpt(row["text"], TEXT_LENGTH)
        for frame in found.values() if "text" in frame
        for row in frame[frame["text"].notna()].to_dict("records")
    }  # fmt: skip
    judged = study.qrels[study.qrels["qid"].isin(wanted)]
    labels = dict(zip(zip(judged["qid"], judged["docno"], strict=True), judged["label"], strict=True))
    for query in queries:
        query["lists"] = {}
        for name, frame in found.items():
            # Ties are in the order of trec_eval.
            ranked = frame[frame["qid"] == query["qid"]].sort_values(["score", "docno"], ascending=False)
            found_labels = [labels.get((query["qid"], docno)) for docno in ranked["docno"]]
            relevant = [rank for rank, label in enumerate(found_labels) if label is not None and label > 0]
            shown = [*range(min(TOP_DOCUMENTS, len(ranked)))]
            # What a ranking gained or lost is often the place of its best relevant document, further down.
            shown += [rank for rank in relevant[:1] if rank >= TOP_DOCUMENTS]
            query["lists"][_with_first_seed(study, name)] = [
                {"rank": rank + 1, "docno": docno, "text": texts.get(docno, ""), "label": _label(found_labels[rank])}
                for rank, docno in zip(shown, ranked["docno"].iloc[shown], strict=True)
            ]
    return queries


def _with_first_seed(study: Study, name: str) -> str:
    """Return a system's name and, of several seeds, the one whose results are shown."""
    seeds = [seed for system, seed in study.results if system == name]
    return f"{name}, seed {seeds[0]}" if len(seeds) > 1 else name


def _label(label: Any) -> str:
    return "not judged" if label is None else f"relevance {label}"
