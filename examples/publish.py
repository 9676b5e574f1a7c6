"""Evaluate a re-ranker and publish it on the Hugging Face hub, with a card that says how it was made and how it does.

A model that `ce.save` wrote is taken from its folder; without one a small model is trained on PyDocs. With --dry-run
the card is printed and nothing leaves the machine.

    hf auth login
    python examples/publish.py models/CL-KD --repo user/model --license apache-2.0
"""

import argparse
from pathlib import Path

import pyterrier as pt
from ir_measures import RR, nDCG
from pyterrier_pisa import PisaIndex
from quickstart import minilm

from pyterrier_msft import Contrastive, MonoCE


def main() -> None:
    """Load or train, evaluate, and publish."""
    args = arguments()
    train, test = pt.get_dataset("pydocs:train"), pt.get_dataset("pydocs:test")
    bm25 = PisaIndex.from_dataset(train).bm25() % args.depth
    candidates = bm25 >> train.text_loader()
    ce = MonoCE.load(args.model) if args.model else small(args, candidates, train)

    systems = {"BM25": bm25, args.repo: candidates >> ce}
    topics = test.get_topics().head(args.test_queries)
    table = pt.Experiment(systems, topics, test.get_qrels(), [nDCG @ 10, RR @ 10], baseline="BM25")
    table = table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]]
    card = {"license": args.license, "metrics": table, "language": "en"}
    if args.dry_run:
        ce.save(args.out, **card)
        print((Path(args.out) / "README.md").read_text())
    else:
        print(ce.push_to_hub(args.repo, private=args.private, **card))


def small(args: argparse.Namespace, candidates: pt.Transformer, train: pt.datasets.Dataset) -> MonoCE:
    """A re-ranker for trying this out."""
    fitter = Contrastive(n_negatives=3, learning_rate=2e-4, batch_size=8, dropout=0.0)
    ce = MonoCE(args.backbone or minilm(), max_length=64, fitter=fitter, verbose=True)
    return ce.fit(candidates(train.get_topics().head(args.queries)), train.get_qrels())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder that ce.save wrote; default: train a small one")
    parser.add_argument("--repo", default="user/pydocs-reranker", help="the model's name on the hub")
    parser.add_argument("--license", help="such as apache-2.0; mind the backbone's and the data's")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    parser.add_argument("--dry-run", action="store_true", help="save to --out, print the card, upload nothing")
    parser.add_argument("--out", default="to-publish", help="the folder of a dry run")
    parser.add_argument("--backbone", help="of the small one; default: all-MiniLM-L6-v2")
    parser.add_argument("--queries", type=int, default=1000, help="to train the small one on")
    parser.add_argument("--test-queries", type=int, default=400)
    parser.add_argument("--depth", type=int, default=20, help="documents that are re-ranked")
    return parser.parse_args()


if __name__ == "__main__":
    main()
