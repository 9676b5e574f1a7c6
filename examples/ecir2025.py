"""The paper as a recipe: contrastive learning (CL), distillation (KD), and both in either order.

Pezzuti, MacAvaney and Tonellotto, ECIR 2025, arXiv 2503.22672, in the authors' settings: `--scale paper`, on MS MARCO,
for a GPU server. `--scale small` runs the same code on what fits a laptop: PyDocs, or files of one's own.

    python examples/ecir2025.py --dry-run
    python examples/ecir2025.py --backbone google/electra-base-discriminator --out electra
    python examples/ecir2025.py --scale small --seeds 1 2 3 --sweep-second-stage 2e-6 2e-5 2e-4 --out small

The second stage's learning rate in the authors' configuration is 6e-12 (FAITHFUL). Whether a second stage that moves
the weights helps is the question of --sweep-second-stage. A run that was interrupted goes on where it was.
"""

import argparse
import dataclasses
import logging
import math
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import AP, RR, R, nDCG
from quickstart import BiEncoder, bm25, minilm, save
from transformers import AutoConfig

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, plots, teachers
from pyterrier_msft.data import runs
from pyterrier_msft.model.precision import resolve_dtype
from pyterrier_msft.significance import equivalence_table, seed_summary

logger = logging.getLogger("ecir2025")

FAITHFUL = 6e-12  # the second stage's learning rate in the authors' configuration
MARGIN = 0.01  # of nDCG@10: two systems less than a point apart are taken as equivalent
DEPTH = 100  # documents that are re-ranked, and that measures look at
MAIN = nDCG @ 10
TESTS = {
    "dl19": "irds:msmarco-passage/trec-dl-2019/judged",
    "dl20": "irds:msmarco-passage/trec-dl-2020/judged",
    "dl-hard": "irds:msmarco-passage/trec-dl-hard",
    "dev-small": "irds:msmarco-passage/dev/small",
}
TEST_QUERIES = {"dl19": 43, "dl20": 54, "dl-hard": 50, "dev-small": 6980}

# nDCG@10 over BM25's top 100 in the paper, in the order of TESTS.
PAPER_BM25 = (0.5121, 0.4769, 0.2886, 0.2301)
PAPER = {
    "google/electra-base-discriminator": {
        "CL": (0.7236, 0.6759, 0.3829, 0.4203),
        "KD": (0.6691, 0.6147, 0.3557, 0.3210),
        "CL-KD": (0.7234, 0.6775, 0.3858, 0.4209),
        "KD-CL": (0.7304, 0.6822, 0.3841, 0.4208),
    },
    "FacebookAI/roberta-base": {
        "CL": (0.7356, 0.6720, 0.4058, 0.4182),
        "KD": (0.6558, 0.6029, 0.3652, 0.3242),
        "CL-KD": (0.7348, 0.6752, 0.4051, 0.4182),
        "KD-CL": (0.7323, 0.6687, 0.3912, 0.4187),
    },
}

# What the paper trained on. ColBERTv2's top 500 of the training queries: Schlatt et al., Rank-DistiLLM, ECIR 2025.
# RankGPT-3.5's permutations of BM25's top 20 for 100,000 of them: Sun et al., EMNLP 2023.
COLBERT_RUN = "https://zenodo.org/records/12528410/files/__colbert__msmarco-passage-train-judged.run?download=1"
RANKGPT = {"marco-train-100k.jsonl.zip": "1OgF4rj89FWSr7pl1c7Hu4x0oQYIMwhik",
           "marco-train-100k-gpt3.5.json": "1z327WOKr70rC4UfOlQVBQnuLxChi_uPs"}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """A size of the experiment: everything about training that isn't data."""

    contrastive: Contrastive
    distillation: Distillation
    max_length: int
    depth: int  # documents that are re-ranked
    queries: int | None  # training queries of CL; None: all
    teacher_queries: int | None
    test_queries: int | None
    validates: bool  # on 1% of the training queries


AUTHORS = {
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "clip_norm": 10.0,
    "freeze_position_embeddings": True,
    "warmup": 0,
    "seed": 42,
    "pairs_per_pass": 128,  # bounds memory; the gradient is that of the whole batch
}
CHEAP = {"learning_rate": 2e-4, "batch_size": 8, "dropout": 0.0}
SCALES = {
    "paper": Scale(
        contrastive=Contrastive(
            n_negatives=99, depth=200, add_missing_positives=True, batch_size=4, gradient_accumulation=4,
            max_steps=2_000_000, eval_every=5_000, patience=5, **AUTHORS,
        ),
        distillation=Distillation(
            depth=20, batch_size=16, gradient_accumulation=2, epochs=15, eval_every=1_000, patience=5, **AUTHORS
        ),
        max_length=256, depth=DEPTH, queries=None, teacher_queries=None, test_queries=None, validates=True,
    ),
    "small": Scale(
        contrastive=Contrastive(n_negatives=3, depth=50, max_steps=125, **CHEAP),
        distillation=Distillation(depth=8, max_steps=63, **CHEAP),
        max_length=64, depth=20, queries=1000, teacher_queries=500, test_queries=300, validates=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Test:
    """Queries to evaluate on, behind one first stage."""

    name: str
    first_stage: str
    results: pd.DataFrame  # qid, query, docno, text, score, rank: the first stage's top DEPTH
    topics: pd.DataFrame
    qrels: pd.DataFrame

    def measures(self) -> list[Any]:
        """The paper's; on TREC DL's grades, 0 to 3, binary measures count what is relevant at 2 or more."""
        rel = 2 if self.qrels["label"].max() >= 3 else 1
        return [nDCG @ 1, nDCG @ 5, nDCG @ 10, AP(rel=rel), RR(rel=rel) @ 10, R(rel=rel) @ 100]


@dataclass(frozen=True)
class Data:
    """What to train and test on."""

    labels: tuple[pd.DataFrame | Path, pd.DataFrame]  # a first stage's results, and qrels: what CL learns from
    ranking: pd.DataFrame  # a teacher's ranking with text: what KD learns from
    tests: list[Test]
    validation: tuple[pd.DataFrame, pd.DataFrame] | None = None
    text: pt.datasets.Dataset | None = None  # where documents that come without their text have it


def main() -> None:
    """Plan, or train and evaluate, and write every table to --out."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pyterrier_msft").setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    scale = SCALES[args.scale]
    changes = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    scale = dataclasses.replace(
        scale,
        contrastive=changed(scale.contrastive, changes),
        distillation=changed(scale.distillation, changes),
        **{name: value for name, value in changes.items() if name in SCALE_SETTINGS},
    )
    if args.dry_run:
        plan(args, scale)
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = load(args, scale, out)
    perquery = run(args, scale, data, out)
    report(args, scale, perquery, out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--backbone", help="default: google/electra-base-discriminator; small: all-MiniLM-L6-v2")
    parser.add_argument("--out", default="ecir2025-out", help="folder for tables, plots and models")
    parser.add_argument("--dry-run", action="store_true", help="show sizes, steps, memory and time, and do nothing")
    parser.add_argument("--sweep-second-stage", type=float, nargs="+", default=[], metavar="RATE",
                        help=f"learning rates of the second stage besides the authors' {FAITHFUL:g}")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="train everything once a seed")
    files = parser.add_argument_group("data of one's own, in place of MS MARCO (paper) and PyDocs (small)")
    files.add_argument("--labels", metavar="JSONL", help="queries with positive and negative passages, for CL")
    files.add_argument("--teacher", metavar="JSONL", help="queries with a teacher's permutation of passages, for KD")
    files.add_argument("--test", nargs="+", metavar="NAME", help=f"{', '.join(TESTS)}, or any dataset of PyTerrier's")
    files.add_argument("--first-stage", nargs="+", default=[], metavar="NAME=RUN",
                       help="TREC runs; {test} in a path becomes the test's name")  # fmt: skip
    settings = parser.add_argument_group("settings in place of the scale's")
    for name, kind in SETTINGS.items():
        settings.add_argument("--" + name.replace("_", "-"), type=kind)
    args = parser.parse_args()
    if (args.labels is None) != (args.teacher is None) or (args.labels and not (args.test and args.first_stage)):
        parser.error("expected --labels, --teacher, --test and --first-stage together, found some of them")
    if any("=" not in given for given in args.first_stage):
        parser.error(f"expected --first-stage NAME=RUN, found {args.first_stage}")
    if any(not rate > 0 for rate in args.sweep_second_stage):
        parser.error(f"expected learning rates above 0, found {args.sweep_second_stage}")
    args.backbone = args.backbone or (minilm() if args.scale == "small" else next(iter(PAPER)))
    return args


SCALE_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_length": int, "depth": int, "queries": int, "teacher_queries": int, "test_queries": int,
}  # fmt: skip
SETTINGS: dict[str, Callable[[str], Any]] = {
    **SCALE_SETTINGS, "learning_rate": float, "n_negatives": int, "max_steps": int, "pairs_per_pass": int,
}  # fmt: skip


def changed(fitter: Any, changes: Mapping[str, Any]) -> Any:
    """A fitter with the settings that it has; `depth` is that of re-ranking, and `max_length` the re-ranker's."""
    names = {f.name for f in dataclasses.fields(fitter)} - SCALE_SETTINGS.keys()
    return dataclasses.replace(fitter, **{name: value for name, value in changes.items() if name in names})


# ---- data


def load(args: argparse.Namespace, scale: Scale, out: Path) -> Data:
    """The data that the command line asks for."""
    if args.labels:
        results, qrels = teachers.read_labelled_passages(args.labels)
        return Data(
            labels=(first_queries(results, scale.queries), qrels),
            ranking=first_queries(teachers.read_permutations(args.teacher), scale.teacher_queries),
            tests=[
                from_run(name, first_stage, path, scale)
                for name in args.test
                for first_stage, path in run_files(args, name)
            ],
        )
    return msmarco(args, scale, out) if args.scale == "paper" else pydocs(scale, out)


def pydocs(scale: Scale, out: Path) -> Data:
    """The docstrings of installed packages; the teacher is a bi-encoder."""
    train, test = pt.get_dataset("pydocs:train"), pt.get_dataset("pydocs:test")
    first_stage = bm25(train, out)
    candidates = first_stage >> train.text_loader()
    topics = train.get_topics().head(scale.queries)
    teacher = BiEncoder(minilm())
    return Data(
        labels=(candidates(topics), train.get_qrels()),
        ranking=teacher((candidates % scale.depth)(topics.head(scale.teacher_queries))),
        tests=[
            Test("pydocs", "BM25", candidates(queries), queries, test.get_qrels())
            for queries in [test.get_topics().head(scale.test_queries)]
        ],
    )


def msmarco(args: argparse.Namespace, scale: Scale, out: Path) -> Data:
    """The paper's training data, test queries and first stages, downloaded."""
    train = pt.get_dataset("irds:msmarco-passage/train/judged")
    downloads = out / "downloads"
    downloads.mkdir(exist_ok=True)
    run_file = downloads / "colbertv2.train.run"
    if not run_file.exists():
        pt.io.download(COLBERT_RUN, str(run_file))
    # The run stays on disk: 503k queries x 500 documents; fit takes each query's top from it.
    topics, qrels = train.get_topics(), train.get_qrels()
    topics = topics[topics["qid"].isin(qrels["qid"])].head(scale.queries or 10**9)
    held_out = topics[topics["qid"].map(int) % 100 == 0] if scale.validates else topics.head(0)
    labelled = qrels[qrels["qid"].isin(topics["qid"]) & ~qrels["qid"].isin(held_out["qid"])]
    validation = None
    if len(held_out):
        pieces = runs.read_run(run_file, depth=DEPTH, topics=held_out)
        candidates = pd.concat([piece.frame() for piece in pieces]).merge(held_out, on="qid")
        validation = train.text_loader()(candidates), qrels[qrels["qid"].isin(held_out["qid"])]
    candidates_file, answers = rankgpt(downloads)
    ranking = teachers.read_permutations(candidates_file, responses=answers)
    ranking = ranking[~ranking["query"].str.strip().isin(held_out["query"].str.strip())]
    tests = []
    for name in args.test or TESTS:
        dataset = pt.get_dataset(TESTS.get(name, name))
        queries = dataset.get_topics().head(scale.test_queries or 10**9)
        for first_stage, retrieve in first_stages(out).items():
            found = (retrieve() >> train.text_loader())(queries)
            tests.append(Test(name, first_stage, found, queries, dataset.get_qrels()))
        tests += [from_run(name, first_stage, path, scale) for first_stage, path in run_files(args, name)]
    if not any(test.first_stage == "ColBERTv2" for test in tests):
        logger.warning("ColBERTv2 is left out: give its runs as --first-stage 'ColBERTv2=runs/colbertv2.{test}.trec'")
    return Data(
        labels=(run_file, labelled),
        ranking=first_queries(ranking, scale.teacher_queries),
        tests=tests,
        validation=validation,
        text=train,
    )


def rankgpt(folder: Path) -> tuple[Path, Path]:
    """RankGPT's queries with candidates, and the answers of the LLM: two files on Google Drive."""
    try:
        import gdown
    except ImportError as error:
        raise ImportError('the paper\'s data need the extra [paper]: pip install "pyterrier-msft[paper]"') from error
    for name, identifier in RANKGPT.items():
        if not (folder / name).exists():
            gdown.download(id=identifier, output=str(folder / name))
        if zipfile.is_zipfile(folder / name):
            with zipfile.ZipFile(folder / name) as archive:
                archive.extract("marco-train-100k.jsonl", folder)
    return folder / "marco-train-100k.jsonl", folder / "marco-train-100k-gpt3.5.json"


def first_stages(out: Path) -> dict[str, Callable[[], pt.Transformer]]:
    """First stages that need no run file, made when they are asked for."""

    def lexical() -> pt.Transformer:
        from pyterrier_pisa import PisaIndex

        return PisaIndex.from_hf("macavaney/msmarco-passage.pisa").bm25(num_results=DEPTH)

    def contriever() -> pt.Transformer:
        try:
            from pyterrier_dr import FlexIndex, SBertBiEncoder
        except ImportError as error:
            raise ImportError('Contriever needs the extra [paper]: pip install "pyterrier-msft[paper]"') from error
        model, index = SBertBiEncoder("facebook/contriever-msmarco", batch_size=256), FlexIndex(str(out / "contriever"))
        if not (out / "contriever" / "pt_meta.json").exists():  # what is written last
            corpus = pt.get_dataset("irds:msmarco-passage").get_corpus_iter()
            (model >> index.indexer(mode="overwrite")).index(corpus)
        return model >> index.torch_retriever(num_results=DEPTH, fp16=True, drop_query_vec=True)

    return {"BM25": lexical, "Contriever": contriever}


def run_files(args: argparse.Namespace, test: str) -> list[tuple[str, str]]:
    """Names and paths of --first-stage for one test."""
    pairs = [given.split("=", 1) for given in args.first_stage]
    return [(name, path.replace("{test}", test)) for name, path in pairs]


def from_run(name: str, first_stage: str, path: str, scale: Scale) -> Test:
    """A test whose first stage is a TREC run."""
    dataset = pt.get_dataset(TESTS.get(name, name))
    topics = dataset.get_topics().head(scale.test_queries or 10**9)
    run = pt.io.read_results(path)
    results = run[run["rank"] < run["rank"].min() + DEPTH].merge(topics[["qid", "query"]], on="qid")
    return Test(name, first_stage, dataset.text_loader()(results), topics, dataset.get_qrels())


def first_queries(frame: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """The rows of the first n queries."""
    return frame if n is None else frame[frame["qid"].isin(frame["qid"].drop_duplicates().head(n))]


# ---- training and evaluation


def run(args: argparse.Namespace, scale: Scale, data: Data, out: Path) -> pd.DataFrame:
    """Train every sequence with every seed and rate; the values of each query.

    Returns:
        test, first_stage, name, seed, second_stage (the learning rate; NaN for one stage), qid, measure, value. A
        system of two stages is named after its rate too: `CL-KD 2e-05`; the authors' has the bare name.
    """
    frames = [evaluate(test, test.first_stage, None) for test in data.tests]
    reranker = MonoCE(
        args.backbone, max_length=scale.max_length, max_query_length=scale.max_length // 3, text=data.text, verbose=True
    )
    cl, kd = Stage(scale.contrastive, *data.labels), Stage(scale.distillation, data.ranking)
    for seed in args.seeds:
        for rate in [FAITHFUL, *args.sweep_second_stage]:
            stages = {"CL": cl, "KD": kd, "CL2": second(cl, rate), "KD2": second(kd, rate)}
            sequences = ["CL", "KD", "CL-KD2", "KD-CL2"] if rate == FAITHFUL else ["CL-KD2", "KD-CL2"]
            trained = fit_sequences(
                reranker, stages, sequences, validation=data.validation, save_dir=out / "models", seeds=[seed]
            )[seed]
            for sequence, ce in trained.items():
                name = sequence.replace("2", "") + ("" if rate == FAITHFUL else f" {rate:g}")
                for test in data.tests:
                    logger.info("%s, seed %d: re-ranking %s of %s", name, seed, test.first_stage, test.name)
                    values = evaluate(test, name, ce.cached(out / "scores"), scale.depth)
                    frames.append(values.assign(seed=seed, second_stage=rate if "-" in sequence else math.nan))
    perquery = pd.concat(frames, ignore_index=True)
    perquery.to_csv(out / "perquery.csv", index=False)
    return perquery


def second(stage: Stage, rate: float) -> Stage:
    """The stage at the learning rate of a second one."""
    return dataclasses.replace(stage, fitter=dataclasses.replace(stage.fitter, learning_rate=rate))


def evaluate(test: Test, name: str, system: pt.Transformer | None, depth: int = DEPTH) -> pd.DataFrame:
    """A system's values for each query and measure; None is the first stage itself."""
    results = test.results
    if system is not None:
        top = results[results["rank"] < results["rank"].min() + depth]
        results = (pt.Transformer.from_df(top) >> system ^ pt.Transformer.from_df(results))(test.topics)
    values = pt.Experiment([results], test.topics, test.qrels, test.measures(), names=[name], perquery=True)
    return values.assign(test=test.name, first_stage=test.first_stage, measure=values["measure"].map(str))


# ---- what came out


def report(args: argparse.Namespace, scale: Scale, perquery: pd.DataFrame, out: Path) -> None:
    """Tables of means, of verdicts and of the sweep, and their plots."""
    means, verdicts = [], []
    for (test, first_stage), values in perquery.groupby(["test", "first_stage"], sort=False):
        place = {"test": test, "first_stage": first_stage}
        slug = re.sub(r"[^\w.-]+", "-", f"{test}-{first_stage}")  # a dataset's name may have slashes
        table = seed_summary(values)
        wide = table.pivot(index="name", columns="measure", values="mean").reindex(table["name"].unique())
        main = table[table["measure"] == str(MAIN)].set_index("name")
        wide = wide.assign(std=main["std"], n_seeds=main["n_seeds"])
        wide["paper"] = [paper_value(args.backbone, name, test, first_stage) for name in wide.index]
        means.append(wide.assign(difference=wide[str(MAIN)] - wide["paper"], **place).reset_index())
        verdict = equivalence_table(values, margin=MARGIN, baseline="CL", measures=[MAIN], correction="holm")
        verdicts.append(verdict.assign(**place))
        rates = values.drop_duplicates("name").set_index("name")["second_stage"]
        if rates.nunique() > 1:
            sweep = values[values["measure"] == str(MAIN)].groupby(["name", "seed"], sort=False)["value"].mean()
            rows = sweep.rename(str(MAIN)).reset_index().assign(**place)
            rows["learning_rate"] = rows["name"].map(rates)
            rows["system"] = rows["name"].str.split(" ").str[0]
            rows.to_csv(out / f"sweep-{slug}.csv", index=False)
            axes = plots.second_stage_learning_rate(rows, margin=MARGIN)
            save(axes, out / f"sweep-{slug}.png")
        save(plots.equivalence(verdict), out / f"equivalence-{slug}.png")
    mean_table, verdict_table = pd.concat(means, ignore_index=True), pd.concat(verdicts, ignore_index=True)
    mean_table.to_csv(out / "results.csv", index=False)
    verdict_table.to_csv(out / "equivalence.csv", index=False)
    for (test, first_stage), rows in mean_table.groupby(["test", "first_stage"], sort=False):
        logger.info("\n%s, top %d of %s (std: of %s over seeds)", test, scale.depth, first_stage, MAIN)
        columns = rows.drop(columns=["test", "first_stage"]).dropna(axis=1, how="all").round(4)
        logger.info(columns.to_string(index=False, na_rep=""))
        chosen = verdict_table[(verdict_table["test"] == test) & (verdict_table["first_stage"] == first_stage)]
        shown = ["system", "baseline", "difference", "ci_low", "ci_high", "p_ttest_holm", "p_tost_holm", "verdict"]
        logger.info("\n%s against CL, margin %g\n%s", MAIN, MARGIN, chosen[shown].round(4).to_string(index=False))


def paper_value(backbone: str, name: str, test: str, first_stage: str) -> float:
    """The paper's nDCG@10; NaN where it has none."""
    if first_stage != "BM25" or test not in TESTS or backbone not in PAPER:
        return math.nan
    values = PAPER_BM25 if name == "BM25" else PAPER[backbone].get(name)
    return math.nan if values is None else values[list(TESTS).index(test)]


# ---- the plan


def plan(args: argparse.Namespace, scale: Scale) -> None:
    """Sizes, steps, memory and time of each stage and of the evaluation, by counting operations."""
    shape = Shape.of(args.backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    speed = SUSTAINED * matmul_speed(device, dtype)
    cl_queries, kd_queries = scale.queries or 503_000, scale.teacher_queries or 100_000
    rates = [FAITHFUL, *args.sweep_second_stage]
    cl, kd = scale.contrastive, scale.distillation
    stages = [
        ("CL", cl, cl_queries, 1 + cl.n_negatives),
        ("KD", kd, kd_queries, kd.depth or DEPTH),
        *((f"CL-KD {rate:g}", kd, kd_queries, kd.depth or DEPTH) for rate in rates),
        *((f"KD-CL {rate:g}", cl, cl_queries, 1 + cl.n_negatives) for rate in rates),
    ]
    rows: list[dict[str, Any]] = []
    for name, fitter, queries, documents in stages:
        lists = fitter.batch_size * fitter.gradient_accumulation
        steps = fitter.max_steps or math.ceil(queries * fitter.epochs / lists)
        # Forward and backward are three times the forward pass; bounded memory computes one more.
        passes = 4 if fitter.pairs_per_pass and fitter.pairs_per_pass < fitter.batch_size * documents else 3
        operations = passes * steps * lists * documents * shape.operations(scale.max_length)
        held = min(fitter.pairs_per_pass or math.inf, fitter.batch_size * documents)
        rows.append({
            "what": name, "queries": f"{queries:,}", "list": documents, "steps (at most)": f"{steps:,}",
            "pairs": f"{steps * lists * documents:,}", "GiB": round(shape.memory(held, scale.max_length) / 2**30, 1),
            "hours (at most)": operations / speed / 3600,
        })  # fmt: skip
    tests = args.test or (TEST_QUERIES if args.scale == "paper" else ["pydocs"])
    queries = sum(TEST_QUERIES.get(test, scale.test_queries or 0) for test in tests)
    n_first_stages = len(args.first_stage) or (3 if args.scale == "paper" else 1)
    pairs = queries * scale.depth * n_first_stages * len(stages)
    hours = pairs * shape.operations(scale.max_length) / speed / 3600
    rows.append({"what": "evaluation", "queries": f"{queries:,}", "list": scale.depth, "steps (at most)": "",
                 "pairs": f"{pairs:,}", "GiB": "", "hours (at most)": hours})  # fmt: skip
    table = pd.DataFrame(rows)
    table["hours (at most)"] = (table["hours (at most)"] * len(args.seeds)).map(lambda hours: f"{hours:,.2f}")
    logger.info("%s, %d tokens a pair, %d seed(s)", args.backbone, scale.max_length, len(args.seeds))
    logger.info("first-stage learning rate %g, second-stage %s", cl.learning_rate, ", ".join(f"{r:g}" for r in rates))
    logger.info(
        "hours: every pair at its full length and no early stop, at %.0f%% of the %.2f TFLOP/s that this machine's %s "
        "multiplies matrices with in %s; retrieval and downloads not counted",
        100 * SUSTAINED, speed / SUSTAINED / 1e12, device.type, str(dtype).removeprefix("torch."),
    )  # fmt: skip
    logger.info("\n%s", table.to_string(index=False))


SUSTAINED = 0.4  # of what the device multiplies large matrices with: what training reaches of it


@dataclass(frozen=True)
class Shape:
    """A transformer encoder's size."""

    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, backbone: str) -> "Shape":
        """From the configuration, which for the paper's two backbones needs no download."""
        if backbone in PAPER:
            return cls(12, 768, 3072, 30522 if "electra" in backbone else 50265)
        config = AutoConfig.from_pretrained(backbone)
        return cls(config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)

    def operations(self, tokens: int) -> float:
        """Floating-point operations of a pair's forward pass."""
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.feed_forward
        return self.layers * tokens * (2 * weights + 4 * tokens * self.hidden)

    def memory(self, pairs: float, tokens: int) -> float:
        """Bytes in training: weights, gradients and AdamW's two moments, and activations.

        Activations: 34 bytes a token and hidden unit in each layer in 16 bits, without the attention's matrices
        (Korthikanti et al., MLSys 2023).
        """
        weights = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.feed_forward)
        return 16 * (weights + self.vocabulary * self.hidden) + 34 * pairs * tokens * self.hidden * self.layers


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, measured for a moment."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        speeds.append(2 * size**3 / (time.perf_counter() - start))
    return float(np.max(speeds))


if __name__ == "__main__":
    main()
