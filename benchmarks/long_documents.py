"""Compare treatments of documents longer than max_length: truncated, scored in windows, or trained in windows.

Half of PyDocs' documents become long: each is placed at a random position among texts of the other half, whose queries
are left out. BM25 searches the long documents.

    pip install -c constraints.txt -e ".[demo]" && python benchmarks/long_documents.py
"""

import argparse
import tempfile
import time

import numpy as np
import pandas as pd
import pyterrier as pt
from common import minilm
from ir_measures import RR, nDCG
from pyterrier_pisa import PisaIndex

from pyterrier_msft import Contrastive, MonoCE
from pyterrier_msft.pydocs import silenced


def main() -> None:
    """Train, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=256, help="training queries")
    parser.add_argument("--test-queries", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=40)
    parser.add_argument("--others", type=int, default=2, help="texts of other documents in each document")
    parser.add_argument("--words", type=int, default=16, help="of each text")
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    train, test = pt.get_dataset("pydocs:train"), pt.get_dataset("pydocs:test")
    documents = long_documents(pd.DataFrame(train.get_corpus_iter()), args)
    texts = documents.set_index("docno")["text"]
    with_text = pt.apply.text(lambda row: texts[row["docno"]])
    judged = answerable(test, documents).sample(args.test_queries, random_state=args.seed), test.get_qrels()
    fitter = Contrastive(n_negatives=3, depth=None, learning_rate=2e-4, batch_size=8, dropout=0.0, seed=args.seed)
    sliding = pt.text.sliding(text_attr="text", length=args.words, stride=args.words // 2, prepend_attr=None)

    with tempfile.TemporaryDirectory() as folder:
        bm25 = index(documents, folder) % args.depth
        candidates = bm25 >> with_text
        found = candidates(answerable(train, documents).sample(3 * args.queries, random_state=args.seed))
        found = found.merge(train.get_qrels(), on=["qid", "docno"])["qid"].unique()[: args.queries]
        topics = train.get_topics()[train.get_topics()["qid"].isin(found)]

        def trained(data: pt.Transformer, **settings: int) -> MonoCE:
            start = time.perf_counter()
            ce = MonoCE(
                minilm(), max_length=args.max_length, max_query_length=args.max_length // 4, seed=args.seed,
                fitter=fitter, **settings,
            )  # fmt: skip
            ce.fit(data(topics), train.get_qrels())
            print(f"training took {time.perf_counter() - start:.0f} s: {ce.data_report}", flush=True)
            return ce

        truncated, maxp, passages = trained(candidates), trained(candidates, passages=4), trained(candidates >> sliding)
        systems = {
            "BM25": bm25,
            "truncated": candidates >> truncated,
            "truncated, scored in windows": candidates >> truncated.apply_attributes(passages=4),
            "sliding, every passage labelled": candidates >> sliding >> passages >> pt.text.max_passage(),
            "passages=4": candidates >> maxp,
        }
        table = pt.Experiment(systems, *judged, [nDCG @ 10, RR @ 10], baseline="truncated, scored in windows")
    print(table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]].round(4).to_string(index=False))


def long_documents(documents: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """Place each document's text at a random position among the texts of others."""
    rng = np.random.default_rng(args.seed)
    documents = documents.sample(frac=1, random_state=args.seed)
    pieces = documents["text"].str.split().str[: args.words].str.join(" ").to_numpy()
    half = len(pieces) // 2
    texts = []
    for own in pieces[:half]:
        parts = [*rng.choice(pieces[half:], args.others)]
        parts.insert(rng.integers(args.others + 1), own)
        texts.append(" ".join(parts))
    return documents[["docno"]].head(half).assign(text=texts)


def answerable(dataset: pt.datasets.Dataset, documents: pd.DataFrame) -> pd.DataFrame:
    """Select the queries of which all relevant documents are left."""
    qrels, topics = dataset.get_qrels(), dataset.get_topics()
    removed = qrels[~qrels["docno"].isin(documents["docno"])]["qid"]
    return topics[~topics["qid"].isin(removed)]


def index(documents: pd.DataFrame, folder: str) -> pt.Transformer:
    """Index the long documents for BM25."""
    pisa = PisaIndex(folder, text_field="text")
    with silenced():
        pisa.index(documents.to_dict("records"))
        bm25 = pisa.bm25(num_results=100)
        bm25.search("a query")
    return bm25


if __name__ == "__main__":
    main()
