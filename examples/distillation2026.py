"""Train a cross-encoder as in the follow-up study: one of nine backbones with one of six objectives.

Morand et al., Reproducing and Comparing Distillation Techniques for Cross-Encoders, arXiv 2603.03010. The settings are
those of the configuration files in github.com/xpmir/cross-encoders; docs/distillation2026.md says what isn't known.

    python examples/distillation2026.py --tiny --objective margin-mse
    python examples/distillation2026.py --backbone electra --objective infonce --out electra-infonce \
        --test irds:msmarco-passage/trec-dl-2019/judged=splade.dl19.trec

To resume an interrupted run, repeat the command.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt
from ir_measures import RR, nDCG
from quickstart import minilm

from pyterrier_msft import Contrastive, Distillation, MonoCE, losses

BACKBONES = {
    "ettin-17m": "jhu-clsp/ettin-encoder-17m", "ettin-32m": "jhu-clsp/ettin-encoder-32m",
    "ettin-68m": "jhu-clsp/ettin-encoder-68m", "ettin-150m": "jhu-clsp/ettin-encoder-150m",
    "minilm-l12": "microsoft/MiniLM-L12-H384-uncased", "bert-base": "bert-base-uncased",
    "electra": "google/electra-base-discriminator", "roberta": "FacebookAI/roberta-base",
    "deberta-v3": "microsoft/deberta-v3-base",
}  # fmt: skip
SMALL = {"ettin-17m", "ettin-32m", "minilm-l12", "ettin-68m"}  # these have another learning rate and batch size
SHARED: dict[str, Any] = {"learning_rate": 1e-5, "max_steps": 200_000, "warmup": 5_000, "weight_decay": 0.0}
SHARED |= {"clip_norm": 1.0, "eval_every": 5_000}
OBJECTIVES = {
    "bce": Contrastive(n_negatives=1, loss=losses.binary_cross_entropy, batch_size=32, **SHARED),
    "hinge": Contrastive(n_negatives=1, loss=losses.Hinge(margin=1.0), batch_size=32, **SHARED),
    "margin-mse": Distillation(depth=2, loss=losses.margin_mse, batch_size=32, **SHARED),
    "infonce": Contrastive(n_negatives=7, depth=500, loss=losses.localized_contrastive, batch_size=4, **SHARED),
    "ranknet": Distillation(depth=50, loss=losses.ranknet, batch_size=1, **SHARED),
    "adr-mse": Distillation(depth=50, loss=losses.adr_mse, batch_size=1, **SHARED),
}
MAX_QUERY_LENGTH, MAX_LENGTH = 32, 291  # 32 tokens of the query, 256 of the passage, and 3 special tokens

# MS MARCO's triples with the scores of Hofstätter et al.'s ensemble (2020): scores of both, qid, positive, negative.
TRIPLES = "https://zenodo.org/record/4068216/files/bert_cat_ensemble_msmarcopassage_train_scores_ids.tsv?download=1"
# Rank-DistiLLM (Schlatt et al., ECIR 2025): ColBERTv2's top 500; RankZephyr's order of the top 50 of 10,000 queries.
RANK_DISTILLM = "https://zenodo.org/records/12528410/files/"
COLBERT = RANK_DISTILLM + "__colbert__msmarco-passage-train-judged.run?download=1"
RANKZEPHYR = RANK_DISTILLM + "__rankzephyr-colbert-10000-sampled-50__msmarco-passage-train-judged.run?download=1"
DATA = {"infonce": COLBERT, "ranknet": RANKZEPHYR, "adr-mse": RANKZEPHYR}  # the others: TRIPLES
TRAIN = "irds:msmarco-passage/train/judged"
Test = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]  # results with texts, topics, qrels


def main() -> None:
    """Train, save to --out, and print how each test is re-ranked."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pyterrier_msft").setLevel(logging.INFO)
    backbone = BACKBONES.get(args.backbone, args.backbone)
    fitter = OBJECTIVES[args.objective].replace(seed=args.seed)
    if args.backbone in SMALL:  # a batch of one list stays one list
        fitter = fitter.replace(learning_rate=7e-6, batch_size=2 * fitter.batch_size if fitter.batch_size > 1 else 1)
    if args.tiny:
        fitter = fitter.replace(learning_rate=1e-3, max_steps=3, warmup=0, eval_every=None)
    url = DATA.get(args.objective, TRIPLES)
    print(backbone, fitter, "PyDocs" if args.tiny else args.data or url, sep="\n")
    if args.dry_run:
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    dataset, validation = pt.get_dataset("pydocs:train" if args.tiny else TRAIN), ()
    if args.tiny:
        (results, _, qrels), tests = pydocs("train"), {"pydocs:test=": pydocs("test")}
    else:
        results, qrels = args.data or out / url.partition("?")[0].rpartition("/")[2], dataset.get_qrels()
        if not args.data and not Path(results).exists():
            pt.io.download(url, str(results))
        if url == TRIPLES:
            n = fitter.max_steps * fitter.batch_size
            results, qrels = read_triples(results, n, dataset.get_topics(), out / "triples.parquet")
        tests = {given: read_run(given, depth=1000) for given in args.test}
        validation = read_run(args.validate, depth=100)[::2] if args.validate else ()
    length = {"max_length": 64 if args.tiny else MAX_LENGTH, "max_query_length": MAX_QUERY_LENGTH}
    ce = MonoCE(backbone, text=dataset, **length, seed=args.seed, verbose=True)
    qrels = qrels if isinstance(fitter, Contrastive) else None
    ce.fit(results, qrels, *validation, fitter=fitter, checkpoint_dir=out / "checkpoints")
    ce.save(out / "model")
    tables = []
    for name, (candidates, topics, judged) in tests.items():
        systems = {"first stage": candidates, "re-ranked": ce(candidates)}
        tables.append(pt.Experiment(systems, topics, judged, [nDCG @ 10, RR @ 10]).assign(test=name))
    if tables:
        pd.concat(tables).to_csv(out / "results.csv", index=False)
        print(pd.concat(tables).round(4).to_string(index=False))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help=f"{', '.join(BACKBONES)}, a name on the hub, or a folder; default: electra")
    parser.add_argument("--objective", choices=OBJECTIVES, default="infonce")
    parser.add_argument("--data", help="a file in place of the download, in the same format")
    parser.add_argument("--test", nargs="+", default=[], metavar="NAME=RUN", help="re-rank the top 1,000 of TREC runs")
    parser.add_argument("--validate", metavar="NAME=RUN", help="choose the weights on the top 100 of this run")
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--out", default="distillation2026-out", help="folder for the model and results")
    parser.add_argument("--dry-run", action="store_true", help="only print the settings")
    parser.add_argument("--tiny", action="store_true", help="three steps on PyDocs, without downloads")
    args = parser.parse_args()
    if wrong := [given for given in [*args.test, args.validate or "="] if "=" not in given]:
        parser.error(f"--test and --validate must be NAME=RUN, with a PyTerrier dataset's name; got {wrong[0]!r}")
    args.backbone = args.backbone or (minilm() if args.tiny else "electra")
    return args


def read_triples(path: str | Path, n: int, topics: pd.DataFrame, parquet: Path) -> tuple[Path, pd.DataFrame]:
    """Write the first n triples to a file of results; each is a query of its own, with its positive in the qrels."""
    import polars as pl

    names = ["score0", "score1", "qid", "docno0", "docno1"]
    triples = pd.read_csv(path, sep="\t", names=names, nrows=n, dtype=dict.fromkeys(names[2:], str))
    queries = triples["qid"].map(topics.set_index("qid")["query"])
    triples = triples.assign(qid=triples["qid"] + "-" + triples.index.astype(str), query=queries)
    sides = [triples[["qid", "query", f"docno{i}", f"score{i}"]] for i in (0, 1)]  # positives, negatives
    sides = [side.set_axis(["qid", "query", "docno", "score"], axis=1) for side in sides]
    results = pd.concat(sides).sort_index(kind="stable")
    pl.DataFrame({name: column.tolist() for name, column in results.items()}).write_parquet(parquet)
    return parquet, sides[0][["qid", "docno"]].assign(label=1)


def read_run(given: str, *, depth: int) -> Test:
    """Read the top of a run, given with its dataset as NAME=RUN."""
    name, _, path = given.partition("=")
    dataset, run = pt.get_dataset(name), pt.io.read_results(path)
    topics = dataset.get_topics()
    top = run[run["rank"] < run["rank"].min() + depth].merge(topics[["qid", "query"]], on="qid")
    return dataset.text_loader()(top), topics, dataset.get_qrels()


def pydocs(part: str) -> Test:
    """Return BM25's top 10 of some queries of PyDocs, whose scores are those of a teacher."""
    dataset = pt.get_dataset(f"pydocs:{part}")
    topics = dataset.get_topics().head(24)
    return (dataset.bm25() % 10 >> dataset.text_loader())(topics), topics, dataset.get_qrels()


if __name__ == "__main__":
    main()
