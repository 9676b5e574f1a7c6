"""Train a re-ranker on any collection, on one or more GPUs, and compare it with its first stage.

    python examples/train.py --out model
    torchrun --nproc_per_node=4 examples/train.py --dataset irds:msmarco-passage/train/judged --run top100.parquet ...

To resume an interrupted run, repeat the command.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt
from ir_measures import RR, nDCG

from pyterrier_msft import Contrastive, Distillation, MonoCE
from pyterrier_msft.pydocs import PyDocs
from pyterrier_msft.training.distributed import rank, run_on_rank_zero


def main() -> None:
    """Train, save to --out, and print the experiment's table."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pyterrier_msft").setLevel(logging.INFO)
    train, test = pt.get_dataset(args.dataset), pt.get_dataset(args.test)
    fitter = (Distillation if args.teacher else Contrastive)(**settings(args))
    ce = MonoCE(args.model, text=train, fitter=fitter, max_length=args.max_length, verbose=True)

    # Rank 0 downloads, indexes and searches, and broadcasts the results.
    data = run_on_rank_zero(lambda: (args.run or candidates(train, args.depth, args.queries), train.get_qrels()))
    if args.dev:
        dev = pt.get_dataset(args.dev)
        data += run_on_rank_zero(lambda: (candidates(dev, args.depth, args.test_queries), dev.get_qrels()))
    ce.fit(*data, checkpoint_dir=Path(args.out) / "checkpoints")
    ce.save(Path(args.out) / "model")

    if rank() == 0:
        first_stage = candidates(test, args.depth, args.test_queries)
        topics = first_stage[["qid", "query"]].drop_duplicates()
        systems = {"first stage": first_stage, "re-ranked": ce(first_stage)}
        table = pt.Experiment(systems, topics, test.get_qrels(), [nDCG @ 10, RR @ 10], baseline="first stage")
        table.to_csv(Path(args.out) / "results.csv", index=False)
        print(table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]].round(4).to_string(index=False))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="pydocs:train", help="the dataset of training queries and documents")
    parser.add_argument("--dev", help="the dataset of validation queries; without it, the last weights are kept")
    parser.add_argument("--test", default="pydocs:test", help="the dataset of test queries")
    parser.add_argument("--run", help="results to train on, all of them: a TREC run or Parquet; default: BM25's")
    parser.add_argument("--model", default="google/electra-base-discriminator", help="a name on the hub, or a folder")
    parser.add_argument("--teacher", help="a run to distil, in place of training on the qrels")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the fitter, e.g. learning_rate=2e-5"
    )
    parser.add_argument("--depth", type=int, default=100, help="documents of the first stage per query")
    parser.add_argument("--max-length", type=int, default=256, help="tokens per pair")
    parser.add_argument("--queries", type=int, help="training queries; default: all")
    parser.add_argument("--test-queries", type=int, help="validation and test queries; default: all")
    parser.add_argument("--out", default="train-out", help="folder for checkpoints, the model and results")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Parse the fitter's settings."""
    found: dict[str, Any] = {"teacher": args.teacher} if args.teacher else {}
    for word in args.set:
        name, _, value = word.partition("=")
        found[name] = int(value) if value.isdigit() else float(value)
    return found


def candidates(dataset: pt.datasets.Dataset, depth: int, queries: int | None) -> pd.DataFrame:
    """Retrieve BM25's results, with their texts, for the dataset's judged queries."""
    topics, qrels = dataset.get_topics(), dataset.get_qrels()
    topics = topics[topics["qid"].isin(qrels[qrels["label"] > 0]["qid"])]
    if isinstance(dataset, PyDocs):
        bm25 = dataset.bm25(num_results=depth)
    else:
        from pyterrier_pisa import PisaIndex

        bm25 = PisaIndex.from_dataset(dataset).bm25(num_results=depth)
    pipeline = bm25 >> dataset.text_loader()
    return pipeline(topics.head(queries) if queries else topics)


if __name__ == "__main__":
    main()
