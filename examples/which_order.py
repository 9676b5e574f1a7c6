"""Labels, a teacher's rankings, or both, and in which order? The paper's question, with the power to answer it.

A small re-ranker is trained on labels (CL), by distillation (KD), on both in either order with several learning rates
for the second stage, and on both at once (CL+KD), with many seeds, and measured on all test queries. Every seed draws
its own training queries. Nothing is chosen by validation: all systems keep the weights of their last update. Values are
appended to seed-<n>.csv in --out as they are measured; repeat the command to resume.
"""

import argparse
from pathlib import Path

import pandas as pd
import pyterrier as pt
from ir_measures import nDCG
from learning_curve import keep_settings, model_alone
from quickstart import bm25, judged, minilm, texts

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, plots, unlabelled
from pyterrier_msft.significance import equivalence_table, seed_summary

MEASURE = nDCG @ 10
ALONE, INTERPOLATED = "nDCG@10", "nDCG@10 with BM25's score"
MARGIN = 0.01  # the smallest difference that matters
DEPTH = 10  # documents to re-rank
VALIDATION_QUERIES = 100  # they choose the weight of BM25's score


def main() -> None:
    """Measure what is missing in --out, then write tables and plots."""
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        settings = {name: getattr(args, name) for name in ("dataset", "max_length", "queries", "test_queries")}
        keep_settings(out / "settings.json", "the systems", settings, args.backbone)
        study = Study(args, out)
        for seed in args.seeds:
            study.measure(seed)
    perquery = read(out, args.seeds)
    print(seed_summary(perquery).round(4).to_string(index=False))
    trained = perquery[~perquery["name"].isin(["BM25", "teacher"])]
    for measure in (ALONE, INTERPOLATED):
        table = equivalence_table(trained, margin=MARGIN, baseline="CL", measures=[measure], correction="holm")
        name = measure.replace("@", "-").replace(" ", "-").replace("'", "")
        table.to_csv(out / f"{name}.csv", index=False)
        plots.equivalence(table).figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
        columns = ["system", "mean", "difference", "ci_low", "ci_high", "p_ttest_holm", "p_tost_holm", "verdict"]
        print(f"\n{measure}, compared with CL\n{table[columns].round(4).to_string(index=False)}")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="which-order", help="folder for results and models")
    parser.add_argument("--dataset", default="pydocs", help="pydocs, or e.g. irds:beir/scifact, with train and test")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per pair")
    parser.add_argument("--backbone", default=minilm(), help="a folder or a name on the Hugging Face hub")
    parser.add_argument("--queries", type=int, default=1000, help="training queries of each seed")
    parser.add_argument("--test-queries", type=int, default=10_000, help="at most; there are some 1,900")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-6, 2e-5, 2e-4], help="of the second stage")
    parser.add_argument("--sequences", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--report-only", action="store_true", help="only write the tables and the plots again")
    return parser.parse_args()


class Study:
    """Trains and measures the systems of a seed."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self.args, self.out = args, out
        separator = ":" if args.dataset == "pydocs" else "/"
        train, test = (pt.get_dataset(f"{args.dataset}{separator}{part}") for part in ("train", "test"))
        self.retrieve = bm25(train, out / "bm25") % 50 >> texts(train)
        self.top = self.retrieve % DEPTH
        self.topics, self.qrels = judged(train)
        if args.dataset == "pydocs":
            validation_topics, validation_qrels = judged(pt.get_dataset("pydocs:dev"))
        else:  # the first queries of a random order
            self.topics, validation_qrels = self.topics.sample(frac=1, random_state=0), self.qrels
            validation_topics, self.topics = self.topics[:VALIDATION_QUERIES], self.topics[VALIDATION_QUERIES:]
        self.validation = self.top(validation_topics.head(VALIDATION_QUERIES)), validation_qrels
        topics, self.test_qrels = judged(test)
        self.test_topics = topics.head(args.test_queries)
        relevant = self.test_qrels.loc[self.test_qrels["label"] > 0, ["qid", "docno"]]
        found = self.top(self.test_topics).merge(relevant)["qid"]
        # The values of the other queries are 0 in any order of their candidates.
        self.test = self.top(self.test_topics[self.test_topics["qid"].isin(found)])
        self.teacher = unlabelled.BiEncoder(minilm())

    def stages(self, seed: int) -> dict[str, Stage]:
        """Return the first stages, and for each learning rate the second stages."""
        queries = min(self.args.queries, len(self.topics))
        results = self.retrieve(self.topics.sample(queries, random_state=seed))
        shared = {"learning_rate": 2e-4, "batch_size": 8, "dropout": 0.0, "metric": None, "seed": seed}
        labels = Contrastive(n_negatives=3, epochs=2, **shared)
        taught = self.teacher(results[results["rank"] < DEPTH])
        ranking = Distillation(teacher=taught, depth=8, epochs=1, **shared)  # as many documents as `labels` sees
        both = labels + ranking.replace(epochs=None, batch_size=4)  # as many documents of each
        stages = {
            "CL": Stage(labels, results, self.qrels),
            "KD": Stage(ranking, results),
            "CL+KD": Stage(both, results, self.qrels),
        }
        for rate in self.args.rates:
            stages[f"CL {rate:g}"] = Stage(labels.replace(learning_rate=rate), results, self.qrels)
            stages[f"KD {rate:g}"] = Stage(ranking.replace(learning_rate=rate), results)
        return stages

    def measure(self, seed: int) -> None:
        """Train and measure the systems of a seed that aren't in its file yet."""
        path = self.out / f"seed-{seed}.csv"
        done = {*pd.read_csv(path)["name"]} if path.is_file() else set()
        for name, ranker in {"BM25": pt.Transformer.identity(), "teacher": self.teacher}.items():
            if name not in done:
                self.save(path, name, ranked := ranker(self.test), ranked)
        rates = [f"{rate:g}" for rate in self.args.rates]
        orders = [f"{first}-{second} {rate}" for first, second in (("CL", "KD"), ("KD", "CL")) for rate in rates]
        wanted = [name for name in self.args.sequences or ["CL", "KD", "CL+KD", *orders] if name not in done]
        if not wanted:
            return
        start = MonoCE(self.args.backbone, max_length=self.args.max_length, interpolate=True, seed=seed)
        stages = self.stages(seed)
        for name in wanted:
            trained = fit_sequences(start, stages, [name], validation=self.validation, save_dir=self.out / "models")
            ce = trained[name]
            both = ce(self.test)
            self.save(path, name, model_alone(ce, both), both)

    def save(self, path: Path, name: str, alone: pd.DataFrame, both: pd.DataFrame) -> None:
        """Append a system's values to a file."""
        values = {}
        for measure, results in {ALONE: alone, INTERPOLATED: both}.items():
            rows = pt.Experiment([results], self.test_topics, self.test_qrels, [MEASURE], names=[name], perquery=True)
            values[measure] = rows.set_index("qid")["value"]
            print(f"{path.stem} {name}: {measure} {rows['value'].mean():.4f}", flush=True)
        rows = pd.DataFrame(values).rename_axis("qid").reset_index()
        rows.insert(0, "name", name)
        rows.to_csv(path, mode="a", header=not path.is_file(), index=False, float_format="%.4f")


def read(out: Path, seeds: list[int]) -> pd.DataFrame:
    """Read the values of all seeds, with a row for each system, seed, query and measure."""
    wide = pd.concat(
        [pd.read_csv(out / f"seed-{seed}.csv", dtype={"qid": str}).assign(seed=seed) for seed in seeds],
        ignore_index=True,
    )
    return wide.melt(["name", "seed", "qid"], [ALONE, INTERPOLATED], "measure")


if __name__ == "__main__":
    main()
