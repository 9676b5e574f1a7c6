"""Reproduce the paper: contrastive learning (CL), distillation (KD), and both in either order.

Pezzuti, MacAvaney and Tonellotto, ECIR 2025, arXiv 2503.22672. `--scale paper` uses the authors' settings on MS MARCO,
and needs a GPU server. `--scale small` runs the same code on a laptop, with PyDocs or your own files.

    python examples/ecir2025.py --dry-run
    python examples/ecir2025.py --backbone google/electra-base-discriminator --out electra
    python examples/ecir2025.py --scale small --seeds 1 2 3 --sweep-second-stage 2e-6 2e-5 --out small

The second stage has the first stage's learning rate, as in the command of the authors' README; other files of theirs
name 6e-12 and 1e-8. --sweep-second-stage trains it at further rates, to show how much the rate matters. To resume an
interrupted run, repeat the command.
"""

import argparse
import dataclasses
import logging
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt
import torch
from cost import Shape, matmul_speed
from ir_measures import AP, RR, R, nDCG
from quickstart import bm25, minilm, save

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, plots, report, teachers, unlabelled
from pyterrier_msft.data import runs
from pyterrier_msft.model.precision import resolve_dtype
from pyterrier_msft.significance import equivalence_table, seed_summary

logger = logging.getLogger("ecir2025")

MARGIN = 0.01  # of nDCG@10: a smaller difference counts as equivalent
DEPTH = 100  # documents that are re-ranked and evaluated
SUSTAINED = 0.4  # share of the speed of matrix products that training reaches
MAIN = nDCG @ 10
TESTS = {
    "dl19": "irds:msmarco-passage/trec-dl-2019/judged",
    "dl20": "irds:msmarco-passage/trec-dl-2020/judged",
    "dl-hard": "irds:msmarco-passage/trec-dl-hard",
    "dev-small": "irds:msmarco-passage/dev/small",
}
TEST_QUERIES = {"dl19": 43, "dl20": 54, "dl-hard": 50, "dev-small": 6980}

# The paper's nDCG@10 over BM25's top 100, in the order of TESTS.
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

# The paper's training data. ColBERTv2's top 500 of the training queries: Schlatt et al., Rank-DistiLLM, ECIR 2025.
# RankGPT-3.5's permutations of BM25's top 20 for 100,000 of them: Sun et al., EMNLP 2023.
COLBERT_RUN = "https://zenodo.org/records/12528410/files/__colbert__msmarco-passage-train-judged.run?download=1"
RANKGPT = {"marco-train-100k.jsonl.zip": "1OgF4rj89FWSr7pl1c7Hu4x0oQYIMwhik",
           "marco-train-100k-gpt3.5.json": "1z327WOKr70rC4UfOlQVBQnuLxChi_uPs"}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """All settings of the experiment apart from data."""

    contrastive: Contrastive
    distillation: Distillation
    max_length: int
    depth: int  # documents to re-rank
    queries: int | None  # for CL; None: all
    teacher_queries: int | None  # for KD
    test_queries: int | None
    validates: bool  # on 1% of the training queries


AUTHORS = {
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "clip_norm": 10.0,
    "freeze_position_embeddings": True,
    "warmup": 0,
    "seed": 42,
    "pairs_per_pass": 128,  # bounds memory; the gradient is unchanged
}
SMALL = {"learning_rate": 2e-4, "epochs": 1, "batch_size": 8, "dropout": 0.0}
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
        contrastive=Contrastive(n_negatives=3, depth=50, max_steps=125, **SMALL),
        distillation=Distillation(depth=8, max_steps=63, **SMALL),
        max_length=64, depth=20, queries=1000, teacher_queries=500, test_queries=300, validates=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Test:
    """Test queries with the results of one first stage."""

    name: str
    first_stage: str
    results: pd.DataFrame  # qid, query, docno, text, score, rank: the top DEPTH
    topics: pd.DataFrame
    qrels: pd.DataFrame

    def measures(self) -> list[Any]:
        """The paper's measures; with TREC DL's grades from 0 to 3, binary measures count grades of at least 2."""
        rel = 2 if self.qrels["label"].max() >= 3 else 1
        return [nDCG @ 1, nDCG @ 5, nDCG @ 10, AP(rel=rel), RR(rel=rel) @ 10, R(rel=rel) @ 100]


@dataclass(frozen=True)
class Data:
    """Training and test data."""

    labels: tuple[pd.DataFrame | Path, pd.DataFrame]  # for CL: a first stage's results, and qrels
    ranking: pd.DataFrame  # for KD: a teacher's ranking, with text
    tests: list[Test]
    validation: tuple[pd.DataFrame, pd.DataFrame] | None = None
    text: pt.datasets.Dataset | None = None  # of documents whose results have none


def main() -> None:
    """Estimate the cost; or train, evaluate, and write all tables and a report to --out."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pyterrier_msft").setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    scale = SCALES[args.scale]
    changes = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    scale = dataclasses.replace(
        scale,
        contrastive=with_settings(scale.contrastive, changes),
        distillation=with_settings(scale.distillation, changes),
        **{name: value for name, value in changes.items() if name in SCALE_SETTINGS},
    )
    if args.dry_run:
        plan(args, scale)
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = load(args, scale, out)
    perquery, rerankers = run(args, scale, data, out)
    write_tables(args, scale, perquery, out)
    write_reports(data.tests, perquery, rerankers, out)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--backbone", help="default: google/electra-base-discriminator; small: all-MiniLM-L6-v2")
    parser.add_argument("--out", default="ecir2025-out", help="folder for tables, plots and models")
    parser.add_argument("--dry-run", action="store_true", help="only print sizes, steps, memory and time")
    parser.add_argument("--sweep-second-stage", type=float, nargs="+", default=[], metavar="RATE",
                        help="further learning rates for the second stage")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="train all systems with each seed")
    files = parser.add_argument_group("your own data, in place of MS MARCO (paper) and PyDocs (small)")
    files.add_argument("--labels", metavar="JSONL", help="queries with positive and negative passages, for CL")
    files.add_argument("--teacher", metavar="JSONL", help="queries with a teacher's permutation of passages, for KD")
    files.add_argument("--test", nargs="+", metavar="NAME", help=f"{', '.join(TESTS)}, or any PyTerrier dataset")
    files.add_argument("--first-stage", nargs="+", default=[], metavar="NAME=RUN",
                       help="TREC runs; {test} in a path is replaced by the test's name")  # fmt: skip
    settings = parser.add_argument_group("settings that replace the scale's")
    for name, kind in SETTINGS.items():
        settings.add_argument("--" + name.replace("_", "-"), type=kind)
    args = parser.parse_args()
    if (args.labels is None) != (args.teacher is None) or (args.labels and not (args.test and args.first_stage)):
        parser.error("--labels, --teacher, --test and --first-stage must be given together")
    if any("=" not in given for given in args.first_stage):
        parser.error(f"--first-stage must be NAME=RUN; got {args.first_stage}")
    if any(not rate > 0 for rate in args.sweep_second_stage):
        parser.error(f"--sweep-second-stage must be learning rates > 0; got {args.sweep_second_stage}")
    args.backbone = args.backbone or (minilm() if args.scale == "small" else next(iter(PAPER)))
    return args


SCALE_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_length": int, "depth": int, "queries": int, "teacher_queries": int, "test_queries": int,
}  # fmt: skip
SETTINGS: dict[str, Callable[[str], Any]] = {
    **SCALE_SETTINGS, "learning_rate": float, "n_negatives": int, "max_steps": int, "pairs_per_pass": int,
}  # fmt: skip


def with_settings(fitter: Any, changes: Mapping[str, Any]) -> Any:
    """Change the settings that a fitter has; `depth` and `max_length` are those of the re-ranker."""
    names = {f.name for f in dataclasses.fields(fitter)} - SCALE_SETTINGS.keys()
    return fitter.replace(**{name: value for name, value in changes.items() if name in names})


# ---- data


def load(args: argparse.Namespace, scale: Scale, out: Path) -> Data:
    """Load the data that the command line asks for."""
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
    """Load PyDocs, with a bi-encoder as teacher."""
    train, test = pt.get_dataset("pydocs:train"), pt.get_dataset("pydocs:test")
    first_stage = bm25(train, out)
    candidates = first_stage >> train.text_loader()
    topics, test_topics = train.get_topics().head(scale.queries), test.get_topics().head(scale.test_queries)
    teacher = unlabelled.BiEncoder(minilm(), max_length=64, verbose=True)
    return Data(
        labels=(candidates(topics), train.get_qrels()),
        ranking=teacher((candidates % scale.depth)(topics.head(scale.teacher_queries))),
        tests=[Test("pydocs", "BM25", candidates(test_topics), test_topics, test.get_qrels())],
    )


def msmarco(args: argparse.Namespace, scale: Scale, out: Path) -> Data:
    """Download the paper's training data, test queries and first stages."""
    train = pt.get_dataset("irds:msmarco-passage/train/judged")
    downloads = out / "downloads"
    downloads.mkdir(exist_ok=True)
    run_file = downloads / "colbertv2.train.run"
    if not run_file.exists():
        pt.io.download(COLBERT_RUN, str(run_file))
    # The run stays on disk: 503k queries x 500 documents, of which fit reads each query's top.
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
        logger.warning("skipping ColBERTv2: pass its runs with --first-stage 'ColBERTv2=runs/colbertv2.{test}.trec'")
    return Data(
        labels=(run_file, labelled),
        ranking=first_queries(ranking, scale.teacher_queries),
        tests=tests,
        validation=validation,
        text=train,
    )


def rankgpt(folder: Path) -> tuple[Path, Path]:
    """Download RankGPT's queries with candidates, and the LLM's answers: two files on Google Drive."""
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
    """First stages that need no run file, as functions that build them."""

    def lexical() -> pt.Transformer:
        from pyterrier_pisa import PisaIndex

        return PisaIndex.from_hf("macavaney/msmarco-passage.pisa").bm25(num_results=DEPTH)

    def contriever() -> pt.Transformer:
        try:
            from pyterrier_dr import FlexIndex, SBertBiEncoder
        except ImportError as error:
            raise ImportError('Contriever needs the extra [paper]: pip install "pyterrier-msft[paper]"') from error
        model, index = SBertBiEncoder("facebook/contriever-msmarco", batch_size=256), FlexIndex(str(out / "contriever"))
        if not (out / "contriever" / "pt_meta.json").exists():  # written last
            corpus = pt.get_dataset("irds:msmarco-passage").get_corpus_iter()
            (model >> index.indexer(mode="overwrite")).index(corpus)
        return model >> index.torch_retriever(num_results=DEPTH, fp16=True, drop_query_vec=True)

    return {"BM25": lexical, "Contriever": contriever}


def run_files(args: argparse.Namespace, test: str) -> list[tuple[str, str]]:
    """The names and paths of --first-stage for one test."""
    pairs = [given.split("=", 1) for given in args.first_stage]
    return [(name, path.replace("{test}", test)) for name, path in pairs]


def from_run(name: str, first_stage: str, path: str, scale: Scale) -> Test:
    """Load a test with a TREC run as first stage."""
    dataset = pt.get_dataset(TESTS.get(name, name))
    topics = dataset.get_topics().head(scale.test_queries or 10**9)
    run = pt.io.read_results(path)
    results = run[run["rank"] < run["rank"].min() + DEPTH].merge(topics[["qid", "query"]], on="qid")
    return Test(name, first_stage, dataset.text_loader()(results), topics, dataset.get_qrels())


def first_queries(frame: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """Select the rows of the first n queries."""
    return frame if n is None else frame[frame["qid"].isin(frame["qid"].drop_duplicates().head(n))]


# ---- training and evaluation


Rerankers = dict[int, dict[str, MonoCE]]  # by seed and name


def run(args: argparse.Namespace, scale: Scale, data: Data, out: Path) -> tuple[pd.DataFrame, Rerankers]:
    """Train all sequences with each seed and learning rate, and evaluate them by query.

    Returns:
        test, first_stage, name, seed, second_stage (the learning rate; NaN for one stage), qid, measure, value. A
        sequence trained at a rate of the sweep has the rate in its name: `CL-KD 2e-05`. And the re-rankers, without
        those of the sweep, which would need too much memory.
    """
    frames = [evaluate(test, test.first_stage, None) for test in data.tests]
    reranker = MonoCE(args.backbone, max_length=scale.max_length, text=data.text, verbose=True)
    cl, kd = Stage(scale.contrastive, *data.labels), Stage(scale.distillation, data.ranking)
    default, rerankers = scale.contrastive.learning_rate, {}
    for seed in args.seeds:
        for rate in second_stage_rates(args, scale):
            stages = {"CL": cl, "KD": kd, "CL2": at_rate(cl, rate), "KD2": at_rate(kd, rate)}
            sequences = ["CL", "KD", "CL-KD2", "KD-CL2"] if rate == default else ["CL-KD2", "KD-CL2"]
            trained = fit_sequences(
                reranker, stages, sequences, validation=data.validation, save_dir=out / "models", seeds=[seed]
            )[seed]
            for sequence, ce in trained.items():
                name = sequence.replace("2", "") + ("" if rate == default else f" {rate:g}")
                for test in data.tests:
                    logger.info("%s, seed %d: re-ranking %s of %s", name, seed, test.first_stage, test.name)
                    values = evaluate(test, name, ce.cached(out / "scores"), scale.depth)
                    frames.append(values.assign(seed=seed, second_stage=rate if "-" in sequence else math.nan))
            if rate == default:
                rerankers[seed] = {sequence.replace("2", ""): ce for sequence, ce in trained.items()}
    perquery = pd.concat(frames, ignore_index=True)
    perquery.to_csv(out / "perquery.csv", index=False)
    return perquery, rerankers


def second_stage_rates(args: argparse.Namespace, scale: Scale) -> list[float]:
    """The learning rates of the second stage: the first stage's, and those of the sweep."""
    return list(dict.fromkeys([scale.contrastive.learning_rate, *args.sweep_second_stage]))


def at_rate(stage: Stage, rate: float) -> Stage:
    """Change a stage's learning rate."""
    return dataclasses.replace(stage, fitter=stage.fitter.replace(learning_rate=rate))


def evaluate(test: Test, name: str, system: pt.Transformer | None, depth: int = DEPTH) -> pd.DataFrame:
    """Compute a system's values by query and measure; None: of the first stage alone."""
    results = test.results
    if system is not None:
        top = results[results["rank"] < results["rank"].min() + depth]
        results = (pt.Transformer.from_df(top) >> system ^ pt.Transformer.from_df(results))(test.topics)
    values = pt.Experiment([results], test.topics, test.qrels, test.measures(), names=[name], perquery=True)
    return values.assign(test=test.name, first_stage=test.first_stage, measure=values["measure"].map(str))


# ---- results


def slug(test: str, first_stage: str) -> str:
    """The part of a file's name that stands for a test; a dataset's name may have slashes."""
    return re.sub(r"[^\w.-]+", "-", f"{test}-{first_stage}")


def write_reports(tests: list[Test], perquery: pd.DataFrame, rerankers: Rerankers, out: Path) -> None:
    """Write a page for each test."""
    for test in tests:
        values = perquery[(perquery["test"] == test.name) & (perquery["first_stage"] == test.first_stage)]
        page = report(
            values, test.topics, test.qrels, [MAIN], baseline="CL", margin=MARGIN, rerankers=rerankers,
            title=f"Labels, a teacher's rankings, or both? {test.name}, top of {test.first_stage}",
            path=out / f"report-{slug(test.name, test.first_stage)}.html",
        )  # fmt: skip
        logger.info("The report: %s", page)


def write_tables(args: argparse.Namespace, scale: Scale, perquery: pd.DataFrame, out: Path) -> None:
    """Write and print tables of means, of verdicts and of the sweep, and save their plots."""
    means, verdicts = [], []
    for (test, first_stage), values in perquery.groupby(["test", "first_stage"], sort=False):
        place = {"test": test, "first_stage": first_stage}
        name = slug(test, first_stage)
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
            rows.to_csv(out / f"sweep-{name}.csv", index=False)
            save(sweep_plot(rows), out / f"sweep-{name}.png")
        save(plots.equivalence(verdict), out / f"equivalence-{name}.png")
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


def sweep_plot(rows: pd.DataFrame) -> "plots.Axes":
    """Plot the measure against the second stage's learning rate, beside the systems of one stage.

    Lines are means over seeds, with the standard deviation; circles are single models; grey is within MARGIN of CL.
    """
    from matplotlib import pyplot

    axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")[1]
    axes.set_xscale("log")
    for k, (system, models) in enumerate(rows.groupby("system", sort=False)):
        colour, values = plots.COLOURS[k % len(plots.COLOURS)], models[str(MAIN)]
        if models["learning_rate"].isna().all():
            mean, std = values.mean(), values.std()
            axes.axhline(mean, color=colour, linestyle="--", label=system)
            if std > 0:
                axes.axhspan(mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
            if system == "CL":
                axes.axhspan(mean - MARGIN, mean + MARGIN, color="0.93", linewidth=0, zorder=0)
        else:
            by_rate = models.groupby("learning_rate")[str(MAIN)].agg(["mean", "std"]).fillna(0)
            marker = plots.MARKERS[k % len(plots.MARKERS)]
            axes.errorbar(by_rate.index, by_rate["mean"], by_rate["std"], color=colour, marker=marker, capsize=3,
                          label=system)  # fmt: skip
            axes.plot(models["learning_rate"], values, "o", markersize=3, fillstyle="none", color=colour, alpha=0.5)
    axes.set_xlabel(f"learning rate of the second stage (grey: within {MARGIN:g} of CL)")
    axes.set_ylabel(f"{MAIN}, mean and std. deviation over seeds", parse_math=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize="small")
    return axes


def paper_value(backbone: str, name: str, test: str, first_stage: str) -> float:
    """The paper's nDCG@10; NaN if it has none."""
    if first_stage != "BM25" or test not in TESTS or backbone not in PAPER:
        return math.nan
    values = PAPER_BM25 if name == "BM25" else PAPER[backbone].get(name)
    return math.nan if values is None else values[list(TESTS).index(test)]


# ---- dry run


def plan(args: argparse.Namespace, scale: Scale) -> None:
    """Print sizes and steps, and estimate memory and time by counting operations."""
    shape = Shape.of(args.backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    speed = SUSTAINED * matmul_speed(device, dtype)
    cl_queries, kd_queries = scale.queries or 503_000, scale.teacher_queries or 100_000
    rates = second_stage_rates(args, scale)
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
        # The backward pass costs two forward passes, and gradient caching one more.
        batch_pairs = fitter.batch_size * documents
        held = min(fitter.pairs_per_pass or math.inf, batch_pairs)  # pairs in memory at once
        passes = 4 if held < batch_pairs else 3
        operations = passes * steps * lists * documents * shape.operations(scale.max_length)
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
    logger.info("%s, %d tokens per pair, %d seed(s)", args.backbone, scale.max_length, len(args.seeds))
    logger.info("first-stage learning rate %g, second-stage %s", cl.learning_rate, ", ".join(f"{r:g}" for r in rates))
    logger.info(
        "hours: all pairs at full length and without early stopping, at %.0f%% of the %.2f TFLOP/s of this machine's "
        "matrix products (%s, %s); without retrieval and downloads",
        100 * SUSTAINED, speed / SUSTAINED / 1e12, device.type, str(dtype).removeprefix("torch."),
    )  # fmt: skip
    logger.info("\n%s", table.to_string(index=False))


if __name__ == "__main__":
    main()
