"""How much data does it take? A learning curve by number of training queries, on one collection.

A small re-ranker is trained on more and more labelled queries, with `Contrastive(n_negatives=3, dropout=0.0)`, which is
quick on a laptop, and `interpolate=True`: alone, and after a stage that needs no labels, the distillation of a
bi-encoder's rankings for queries made from the corpus.
Each trained re-ranker is measured with and without the first stage's score, on queries that no stage was trained on.
Values are appended to perquery.csv and weights.csv in --out as they are measured; repeat the command to resume.
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
from ir_measures import nDCG
from quickstart import bm25, folder_name, judged, minilm, texts
from scipy import stats

from pyterrier_msft import Contrastive, Distillation, MonoCE, PrependScore, teachers, unlabelled

MEASURE = nDCG @ 10
ALONE, INTERPOLATED = "model", "model + first stage"
SHARED = ("train", "test", "depth", "test_queries", "made_queries")  # arguments that all values in a folder have
KEYS = ["dataset", "recipe", "queries", "seed", "fold", "system"]
RECIPES = ("labels", "labels, score in the text", "labels, after a bi-encoder", "teacher", "teacher, then labels")
LENGTHS = {"pydocs": 64, "irds:vaswani": 64}  # tokens per pair; 96 for longer texts


@dataclass(frozen=True)
class Fold:
    """Topics and qrels to train and to test on."""

    train: pd.DataFrame
    train_qrels: pd.DataFrame
    test: pd.DataFrame
    test_qrels: pd.DataFrame


def main() -> None:
    """Measure what is missing in --out, then write a table and a plot."""
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        settings = {name: getattr(args, name) for name in SHARED}
        keep_settings(out / "settings.json", args.dataset, settings, args.backbone)
        study = Study(args, out)
        for seed, size, recipe in itertools.product(args.seeds, args.sizes, args.recipes):
            study.measure(recipe, 0 if recipe == "teacher" else size, seed)
    perquery = pd.read_csv(out / "perquery.csv", dtype={"qid": str})
    table = summary(perquery)
    weights = pd.read_csv(out / "weights.csv")
    table.to_csv(out / "results.csv", index=False)
    print(table.round(4).to_string(index=False))
    plot(table, weights).savefig(out / "learning-curve.png", dpi=150, bbox_inches="tight")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="learning-curve", help="folder for the results of all datasets")
    parser.add_argument("--dataset", default="pydocs", help="pydocs, or e.g. irds:beir/scifact")
    parser.add_argument("--train", help="the variant with the training queries, e.g. train")
    parser.add_argument("--test", help="the variant with the test queries; without variants, two folds are made")
    parser.add_argument("--backbone", default=minilm(), help="a folder or a name on the Hugging Face hub")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000, 3000], help="training queries")
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--test-queries", type=int, default=400)
    parser.add_argument("--made-queries", type=int, default=1000, help="queries made from the corpus")
    parser.add_argument("--depth", type=int, default=20, help="documents to re-rank")
    parser.add_argument("--report-only", action="store_true", help="only write the table and the plot again")
    return parser.parse_args()


def keep_settings(path: Path, name: str, settings: dict[str, Any], backbone: str) -> None:
    """Store the settings of the values in a folder; raise a ValueError if those that are there have others."""
    settings = settings | {"backbone": "/".join(Path(backbone).parts[-2:])}  # without where packages are installed
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get(name, settings) != settings:
        raise ValueError(f"{path.parent} holds values of {name} with {known[name]}; got {settings}. Use another --out")
    path.write_text(json.dumps(known | {name: settings}, indent=1))


class Study:
    """Trains and measures re-rankers on one collection."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self.args, self.path, self.weights_path = args, out / "perquery.csv", out / "weights.csv"
        self.max_length = LENGTHS.get(args.dataset, 96)
        train, test = self._dataset(args.train or "train"), self._dataset(args.test or "test")
        retrieve = bm25(train, out / folder_name(args.dataset))
        self.candidates = retrieve >> texts(train)
        self.folds = self._folds(train, test)
        self.top = self.candidates % args.depth
        self.tests = [self.top(fold.test) for fold in self.folds]
        self.made = unlabelled.make_queries(train.get_corpus_iter(verbose=False), n=args.made_queries)
        # Without titles, as many of these queries are titles, and a text that begins with its query teaches little.
        self.untitled = retrieve % 8 >> train.text_loader(fields=["text"])
        # Each seed and size needs its rankings of the same test queries.
        self.teacher = teachers.cached(unlabelled.BiEncoder(minilm()), out / "teacher", batch_size=64)
        self.distilled: dict[int, MonoCE] = {}
        for number, results in enumerate(self.tests):
            self._save("first stage", 0, 0, number, {"first stage": results})
            if not self._has("bi-encoder + first stage", 0, 0, number):
                self._save("bi-encoder + first stage", 0, 0, number, {"teacher": self.teacher(results)})

    def _dataset(self, part: str) -> Any:
        name = self.args.dataset
        if name == "pydocs":
            return pt.get_dataset(f"pydocs:{part}")
        return pt.get_dataset(f"{name}/{part}" if self.args.test else name)

    def _folds(self, train: Any, test: Any) -> list[Fold]:
        """Split the topics. A dataset without variants has two folds; each half is tested by training on the other."""
        topics, qrels = judged(train)
        topics = topics.sort_values("qid", ignore_index=True)
        if self.args.test is None and self.args.dataset != "pydocs":
            topics = topics.sample(frac=1, random_state=0)
            halves = topics[::2], topics[1::2]
            return [Fold(halves[0], qrels, halves[1], qrels), Fold(halves[1], qrels, halves[0], qrels)]
        test_topics, test_qrels = judged(test)
        test_topics = test_topics.sort_values("qid", ignore_index=True)
        return [Fold(topics, qrels, test_topics.head(self.args.test_queries), test_qrels)]

    def measure(self, recipe: str, size: int, seed: int) -> None:
        """Train with a recipe and measure, unless that was done before."""
        size = min(size, *(len(fold.train) for fold in self.folds))
        for number, (fold, test) in enumerate(zip(self.folds, self.tests, strict=True)):
            if self._has(recipe, size, seed, number):
                continue
            if recipe.startswith("labels"):
                start = MonoCE(self.args.backbone, max_length=self.max_length, seed=seed)
            else:
                start = self._distil(seed).clone()
            if recipe == "teacher":
                self._save(recipe, 0, seed, number, {ALONE: start(test)})
                continue
            topics = fold.train.sample(size, random_state=seed)
            fitter = Contrastive(n_negatives=3, dropout=0.0, seed=seed)
            if recipe == "labels, score in the text":
                with_score = PrependScore()
                start.fit(with_score(self.top(topics)), fold.train_qrels, fitter=fitter)
                self._save(recipe, size, seed, number, {ALONE: start(with_score(test))})
                continue
            ce = start.apply_attributes(interpolate=True)
            results, to_rank = self.candidates(topics), test
            if recipe == "labels, after a bi-encoder":  # whose score, which contains BM25's, is the first stage's
                results, to_rank = self.teacher((self.candidates % 50)(topics)), self.teacher(test)
            ce.fit(results, fold.train_qrels, fitter=fitter)
            print(ce.data_report, flush=True)
            both = ce(to_rank)
            alone = model_alone(ce, both)
            weight = ce.first_stage_weight * spread(to_rank) / spread(alone)  # in standard deviations of both scores
            row = pd.DataFrame({"system": ["weight"], "value": [weight]})
            self._append(self.weights_path, [recipe, size, seed, number], row)
            self._save(recipe, size, seed, number, {ALONE: alone, INTERPOLATED: both})

    def _distil(self, seed: int) -> MonoCE:
        """Distil the teacher's rankings for the made queries; once per seed."""
        if seed not in self.distilled:
            ce = MonoCE(self.args.backbone, max_length=self.max_length, seed=seed)
            fitter = Distillation(teacher=self.teacher, depth=8, epochs=2, dropout=0.0, seed=seed)
            self.distilled[seed] = ce.fit(self.untitled(self.made), fitter=fitter)
        return self.distilled[seed]

    def _has(self, recipe: str, queries: int, seed: int, fold: int) -> bool:
        if not self.path.is_file():
            return False
        done = pd.read_csv(self.path, usecols=KEYS)
        wanted = {"dataset": self.args.dataset, "recipe": recipe, "queries": queries, "seed": seed, "fold": fold}
        return bool((done[[*wanted]] == pd.Series(wanted)).all(axis=1).any())

    def _save(self, recipe: str, queries: int, seed: int, fold: int, systems: dict[str, pd.DataFrame]) -> None:
        if self._has(recipe, queries, seed, fold):
            return
        qrels = self.folds[fold].test_qrels
        topics = next(iter(systems.values()))[["qid", "query"]].drop_duplicates()
        rows = pt.Experiment([*systems.values()], topics, qrels, [MEASURE], names=[*systems], perquery=True)
        rows = rows.rename(columns={"name": "system"})[["system", "qid", "value"]]
        self._append(self.path, [recipe, queries, seed, fold], rows)

    def _append(self, path: Path, run: list[Any], rows: pd.DataFrame) -> None:
        """Add the rows of a run to a file, at once, so that an interruption leaves none of its systems out."""
        *of_run, _ = KEYS
        rows = rows.assign(**dict(zip(of_run, [self.args.dataset, *run], strict=True)))[[*of_run, *rows.columns]]
        rows.to_csv(path, mode="a", header=not path.is_file(), index=False, float_format="%.4f")


def model_alone(ce: MonoCE, both: pd.DataFrame) -> pd.DataFrame:
    """Return the results of a re-ranker that interpolates without the first stage's score."""
    return both.assign(score=both["score"] - ce.first_stage_weight * both["first_stage_score"])


def spread(results: pd.DataFrame) -> float:
    """Return the standard deviation of the scores of a query's documents, averaged over queries."""
    return float(results.groupby("qid")["score"].std().mean()) or 1.0  # if all scores are equal


def summary(perquery: pd.DataFrame) -> pd.DataFrame:
    """Average over seeds, and compare with the first stage by a paired t-test over queries."""
    first = perquery[perquery["system"] == "first stage"].set_index(["dataset", "qid"])["value"]
    rows = []
    for keys, frame in perquery.groupby(["dataset", "recipe", "queries", "system"], sort=False):
        by_seed = frame.groupby("seed")["value"].mean()
        values = frame.groupby(["dataset", "qid"])["value"].mean()
        paired = pd.concat([values, first.loc[[keys[0]]]], axis=1, join="inner").to_numpy()
        p = stats.ttest_rel(*paired.T).pvalue if keys[3] != "first stage" else np.nan
        rows.append([*keys, len(by_seed), values.mean(), by_seed.min(), by_seed.max(), p])
    columns = ["dataset", "recipe", "queries", "system", "seeds", str(MEASURE), "lowest seed", "highest seed", "p"]
    return pd.DataFrame(rows, columns=columns)


def plot(table: pd.DataFrame, weights: pd.DataFrame) -> Any:
    """Plot the measure and the first stage's weight by the number of training queries, in a column for each dataset."""
    from matplotlib import pyplot

    names = table["dataset"].unique()
    size = 3.6 * len(names), 5.2
    figure, panels = pyplot.subplots(
        2, len(names), figsize=size, layout="constrained", squeeze=False, sharex="col", height_ratios=[2, 1]
    )
    styles = {
        ("labels", ALONE): ("C1", "o", ":"), ("labels", INTERPOLATED): ("C0", "o", "-"),
        ("labels, score in the text", ALONE): ("C3", "^", "-"),
        ("labels, after a bi-encoder", INTERPOLATED): ("C4", "D", "-"),
        ("teacher, then labels", ALONE): ("C1", "s", ":"), ("teacher, then labels", INTERPOLATED): ("C2", "s", "-"),
    }  # fmt: skip
    for name, (panel, lower) in zip(names, panels.T, strict=True):
        rows = table[table["dataset"] == name]
        levels = rows[rows["queries"] == 0].set_index(["recipe", "system"])[str(MEASURE)]
        for (recipe, system), level in levels.items():
            line = {"first stage": "-", "bi-encoder + first stage": "--"}.get(recipe, "-." if system == ALONE else ":")
            panel.axhline(level, color="0.4", linestyle=line, linewidth=1, label=recipe)
        for (recipe, system), (colour, marker, line) in styles.items():
            look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.3}
            part = rows[(rows["recipe"] == recipe) & (rows["system"] == system)].sort_values("queries")
            if len(part):
                value = part[str(MEASURE)]
                # Of a single seed, rounding makes them slightly negative.
                errors = [(value - part["lowest seed"]).clip(lower=0), (part["highest seed"] - value).clip(lower=0)]
                panel.errorbar(part["queries"], value, errors, capsize=2, label=f"{recipe}: {system}", **look)
            chosen = weights[(weights["dataset"] == name) & (weights["recipe"] == recipe)]
            if system == INTERPOLATED and len(chosen):
                lower.plot(chosen.groupby("queries")["value"].median(), **look)
        panel.set_xscale("log")
        panel.set_title(name.removeprefix("irds:"))
        lower.set_xlabel("labelled training queries")
        lower.set_ylim(bottom=0)
        sizes = sorted(rows.loc[rows["queries"] > 0, "queries"].unique())
        lower.set_xticks(sizes, [str(size) for size in sizes])
        lower.minorticks_off()
    panels[0][0].set_ylabel(str(MEASURE))
    panels[1][0].set_ylabel("weight of the\nfirst stage's score")
    found = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels[0]]
    handles = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


if __name__ == "__main__":
    main()
