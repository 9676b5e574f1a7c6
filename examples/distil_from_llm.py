"""Distil an LLM's rankings, read from a file, into a small re-ranker.

Each line of the file has a query, its passages, and the LLM's permutation of them, in the format of RankGPT, RankLLM or
rerankers. A fifth of the queries is held out to evaluate how well each system agrees with the LLM.

    python examples/distil_from_llm.py permutations.jsonl --backbone cross-encoder/ms-marco-MiniLM-L6-v2
"""

import argparse
import logging

import pandas as pd
import pyterrier as pt
from ir_measures import nDCG
from quickstart import minilm

from pyterrier_msft import Distillation, MonoCE, losses
from pyterrier_msft.data.permutations import read_permutations


def main() -> None:
    """Read, distil, compare, save."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    ranked = read_permutations(args.rankings)
    queries = ranked["qid"].drop_duplicates().sample(frac=1, random_state=args.seed)
    if len(queries) < 10:
        raise SystemExit(f"{args.rankings} must have at least 10 queries; got {len(queries)}")
    held_out = ranked["qid"].isin(queries.head(len(queries) // 5))
    train, test = ranked[~held_out], ranked[held_out]

    # Without teacher=..., the training results are the teacher's ranking.
    fitter = Distillation(
        depth=None, loss=losses.ranknet, epochs=args.epochs, learning_rate=args.learning_rate, batch_size=8,
        seed=args.seed,
    )  # fmt: skip
    ce = MonoCE(args.backbone or minilm(), max_length=args.max_length, fitter=fitter, seed=args.seed, verbose=True)
    ce.fit(train, None)
    print(ce.data_report)

    topics = test[["qid", "query"]].drop_duplicates()
    candidates = pt.Transformer.from_df(test.drop(columns=["score", "rank"], errors="ignore"))
    # The LLM's ranking as grades, from n - 1 for the best of n passages to 0 for the last.
    grades = test.assign(label=test.groupby("qid")["rank"].rank(ascending=False).astype(int) - 1)
    systems = {"words in common": candidates >> pt.apply.doc_score(overlap), "distilled": candidates >> ce}
    table = pt.Experiment(
        systems, topics, grades[["qid", "docno", "label"]], [nDCG @ 1, nDCG @ 5], baseline="words in common"
    )
    print(f"Agreement with the LLM on {len(topics)} held-out queries:")
    brief = [column for column in table.columns if not column.endswith((" +", " -"))]
    print(table[brief].round(4).to_string(index=False))
    ce.save(args.out, metrics=table[brief])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rankings", help="a .jsonl file, plain or .gz; see teachers.read_permutations")
    parser.add_argument("--backbone", help="a folder or a name on the Hugging Face hub; default: all-MiniLM-L6-v2")
    parser.add_argument("--out", default="distilled", help="folder for the model")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def overlap(row: pd.Series) -> float:
    """Compute the share of the query's words that are in the text."""
    words = set(row["query"].lower().split())
    return len(words & set(row["text"].lower().split())) / max(1, len(words))


if __name__ == "__main__":
    main()
