"""Evaluate a re-ranker and publish it on the Hugging Face hub, with a card that describes its training and results.

Pass the folder of a saved model; without one, a small model is trained on PyDocs. --dry-run only prints the card, and
uploads nothing.

    hf auth login
    python examples/publish.py models/CL-KD --repo user/model --license apache-2.0
"""

import argparse
from pathlib import Path

import pyterrier as pt
from ir_measures import RR, nDCG
from quickstart import minilm

from pyterrier_msft import Contrastive, MonoCE


def main() -> None:
    """Load or train, evaluate, and publish."""
    args = arguments()
    train, test = pt.get_dataset("pydocs:train"), pt.get_dataset("pydocs:test")
    bm25 = train.bm25(num_results=args.depth)
    candidates = bm25 >> train.text_loader()
    ce = MonoCE.load(args.model) if args.model else train_small_model(args, candidates, train)

    systems = {"BM25": bm25, args.repo: candidates >> ce}
    topics = test.get_topics().head(args.test_queries)
    table = pt.Experiment(systems, topics, test.get_qrels(), [nDCG @ 10, RR @ 10], baseline="BM25")
    table = table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]]
    card = {"license": args.license, "metrics": table, "language": "en"}
    if args.dry_run:
        ce.save(args.out, **card)
        print((Path(args.out) / "README.md").read_text(encoding="utf-8"))
    else:
        print(ce.push_to_hub(args.repo, private=args.private, **card))


def train_small_model(args: argparse.Namespace, candidates: pt.Transformer, train: pt.datasets.Dataset) -> MonoCE:
    """Train a re-ranker to try this out."""
    fitter = Contrastive(n_negatives=3, learning_rate=2e-4, batch_size=8, dropout=0.0)
    ce = MonoCE(args.backbone or minilm(), max_length=64, fitter=fitter, verbose=True)
    return ce.fit(candidates(train.get_topics().head(args.queries)), train.get_qrels())


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder written by ce.save; default: train a small model")
    parser.add_argument("--repo", default="user/pydocs-reranker", help="the model's name on the hub")
    parser.add_argument("--license", help="e.g. apache-2.0; check those of the backbone and the data")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="save to --out, print the card, upload nothing")
    parser.add_argument("--out", default="to-publish", help="folder for a dry run")
    parser.add_argument("--backbone", help="of the small model; default: all-MiniLM-L6-v2")
    parser.add_argument("--queries", type=int, default=1000, help="training queries of the small model")
    parser.add_argument("--test-queries", type=int, default=400)
    parser.add_argument("--depth", type=int, default=20, help="documents to re-rank")
    return parser.parse_args()


if __name__ == "__main__":
    main()
