"""The page of `report`, read by an HTML parser."""

import importlib.util
import re
import sys
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import make_part, write_tiny_bert
from ir_measures import RR, nDCG
from scipy import stats

from pyterrier_msft import Contrastive, MonoCE, Stage, fit_sequences, report
from pyterrier_msft.significance import equivalence_table

mpl.use("Agg")
from matplotlib import pyplot

PART = make_part("te", n_queries=12, seed=3)
TOPICS = PART.results[["qid", "query"]].drop_duplicates()
QRELS = PART.qrels
BASE = PART.results
# Relevant documents first; but last in the query where they are first in BASE.
WORSE = BASE.loc[BASE.index[(BASE["quality"] > 0) & (BASE["rank"] == 0)][0], "qid"]
BETTER = BASE.assign(score=BASE["quality"].where(BASE["qid"] != WORSE, -BASE["quality"]) - BASE["rank"] / 100)
MEASURES = [nDCG @ 5, RR]
VOID = {"meta", "img", "br"}
pytestmark = pytest.mark.filterwarnings("ignore:re-ranking")


class Page(HTMLParser):
    """The tables, images, links and texts of a page; an AssertionError if its tags aren't nested properly."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.images, self.links, self.ids, self.texts = [], {}, [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in {"th", "td"}:
            assert tag == "td" or attributes["scope"] in {"row", "col"}
            self.rows[-1].append("")
        if tag == "caption":
            self.caption = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            assert self.caption not in self.tables
            self.tables[self.caption] = pd.DataFrame(self.rows[1:], columns=self.rows[0])

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.open and self.open[-1] == "caption":
            self.caption += data
        elif {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of one stage, validated."""
    part = make_part("tr", n_queries=16, seed=1)
    ce = MonoCE(
        write_tiny_bert(tmp_path_factory.mktemp("models") / "tiny"), max_length=24, dtype="float32", device="cpu"
    )
    stage = Stage(
        Contrastive(n_negatives=3, max_steps=4, batch_size=8, eval_every=2, learning_rate=1e-2),
        part.results,
        part.qrels,
    )
    dev = make_part("va", n_queries=4, seed=2)
    return fit_sequences(ce, {"CL": stage}, ["CL"], validation=(dev.results, dev.qrels), seeds=[7, 8])


def write(path, trained, **options):
    systems = {"first <stage>": BASE, "CL": BETTER}
    given = {"rerankers": trained[7], "description": "One.\n\nTwo & three.", "command": "make all", **options}
    return report(systems, TOPICS, QRELS, MEASURES, path=path, **given)


@pytest.fixture(scope="module")
def path(tmp_path_factory, trained):
    pyplot.close("all")
    before = dict(mpl.rcParams)
    path = write(tmp_path_factory.mktemp("pages") / "new" / "page.html", trained)
    assert pyplot.get_fignums() == []
    assert dict(mpl.rcParams) == before
    return path


@pytest.fixture(scope="module")
def page(path):
    return Page(path)


def test_the_page_is_whole_and_accessible(page):
    assert len(page.source) < 500_000
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors <= set(page.ids)
    assert all(link.startswith(("#", "data:image/png;base64,iVBOR")) for link in page.links)
    assert not re.search(r"https?:|@import|url\(", page.source)
    assert [image["alt"] for image in page.images[:2]] == [
        "Line plot. Training loss and nDCG@10 on the validation queries of CL.",
        "Forest plot of the differences in the table, with their intervals and the margin.",
    ]
    (bars,) = page.images[2:]
    assert bars["alt"].startswith("Bar chart of the difference in nDCG@5 between CL and first <stage> by query: ")
    assert "<p>One.</p>\n<p>Two &amp; three.</p>" in page.source


def test_the_same_call_writes_the_same_page(tmp_path, path, trained):
    with pyplot.style.context("dark_background"):  # whatever the user's style is
        again = write(tmp_path / "page.html", trained)
    assert again.read_bytes() == path.read_bytes()


def reciprocal_ranks(frame):
    ranked = frame.sort_values("score", ascending=False)
    ranks = ranked.groupby("qid").cumcount() + 1
    relevant = ranked.merge(QRELS, on=["qid", "docno"]).set_index("qid").index
    found = ranked.assign(rr=1 / ranks).merge(QRELS, on=["qid", "docno"]).set_index("qid")["rr"]
    return found.reindex(sorted(relevant))


def test_values_tests_and_verdicts(page):
    base, better = reciprocal_ranks(BASE), reciprocal_ranks(BETTER)
    means = page.tables["Mean over 12 queries"].set_index("System")["RR"]
    assert means.to_dict() == {"first <stage>": f"{base.mean():.4f}", "CL": f"{better.mean():.4f}"}
    table = page.tables["Differences from first <stage>, p-values with Holm's correction for 2 comparisons"]
    row = table[table["Measure"] == "RR"].iloc[0]
    assert row["Difference"] == f"+{(better - base).mean():.4f}"
    low, high = stats.ttest_rel(better, base).confidence_interval(0.9)
    assert row["90% interval (TOST)"] == f"[{low:+.4f}, {high:+.4f}]".replace("-", "−")
    assert row["Margin"] == "±0.01"
    assert row["Verdict"] == "better"
    assert row["p (TOST)"] == "1.000"
    assert "better the t-test rejects" in page.text
    assert "undecided" not in page.text  # the legend has only the verdicts that occur
    nDCG_row = table[table["Measure"] == "nDCG@5"].iloc[0]
    assert f"CL: nDCG@5 {nDCG_row['Mean']} against {nDCG_row['first <stage>']} of first <stage>" in page.text


def test_all_pairs_of_three_systems(tmp_path):
    systems = {"BM25": BASE, "CL": BETTER, "KD": BASE.assign(score=BASE["quality"])}
    options = {"margin": {nDCG @ 5: 0.02, RR: 0.01}, "alpha": 0.1}
    page = Page(report(systems, TOPICS, QRELS, MEASURES, path=tmp_path / "page.html", **options))
    table = page.tables["All 3 pairs by nDCG@5, p-values with Holm's correction for 3 comparisons"]
    perquery = pt.Experiment([*systems.values()], TOPICS, QRELS, [nDCG @ 5], names=[*systems], perquery=True)
    expected = equivalence_table(perquery, margin=0.02, alpha=0.1, correction="holm")
    assert table["System"].tolist() == expected["system"].tolist() == ["CL", "KD", "KD"]
    assert table["Compared with"].tolist() == expected["baseline"].tolist() == ["BM25", "BM25", "CL"]
    assert table["Verdict"].tolist() == expected["verdict"].tolist()
    assert [float(p.removeprefix("< ")) for p in table["p (t-test)"]] == pytest.approx(
        expected["p_ttest_holm"], abs=1e-3
    )
    assert all(verdict in page.text for verdict in table["Verdict"])


def test_two_systems_have_one_pair(page):
    assert not any(caption.startswith("All ") for caption in page.tables)


def _top(frame: pd.DataFrame, qid: str) -> pd.DataFrame:
    return frame[frame["qid"] == qid].nlargest(3, "score")


def test_extremes_and_their_documents(page):
    gained = page.tables["Queries that gained most with CL"]
    lost = page.tables["Queries that lost most with CL"]
    assert len(gained) == 5
    assert lost["qid"].tolist() == [WORSE]
    query = TOPICS.set_index("qid")["query"][WORSE]
    assert lost["Query"].tolist() == [query]
    assert lost["Difference"].str.startswith("−").all()
    assert gained["Difference"].is_monotonic_decreasing
    for qid in [*gained["qid"], WORSE]:
        below = [not _top(frame, qid)["docno"].isin(QRELS["docno"]).any() for frame in (BASE, BETTER)]
        assert page.source.count(f"<code>{qid}d") == 6 + sum(below)  # the top three, and the relevant one
    documents = page.source.partition(f"<h4>{query}")[2].partition("<h4>")[0]
    top = _top(BETTER, WORSE)
    found = re.findall(rf"<code>({WORSE}d\d)</code> <span class=\"faint\">\((.*?)\)</span> (.*?)</li>", documents)
    assert found[3:6] == [(docno, "not judged", text) for docno, text in zip(top["docno"], top["text"], strict=True)]
    relevant = QRELS.set_index("qid")["docno"]
    first = gained["qid"].iloc[0]
    assert f'<code>{relevant[first]}</code> <span class="faint">(relevance 1)' in page.source


def test_the_best_relevant_document_is_shown_with_its_rank(tmp_path):
    last = BASE.assign(score=BASE["score"].where(~BASE["docno"].isin(QRELS["docno"]), -100.0))
    page = Page(report({"CL": BETTER, "last": last}, TOPICS, QRELS, [RR], path=tmp_path / "page.html"))
    lost = page.tables["Queries that lost most with last"]["qid"]
    assert len(lost) == 5
    for qid in lost:
        query, docno = TOPICS.set_index("qid")["query"][qid], QRELS.set_index("qid")["docno"][qid]
        shown = page.source.partition(f"<h4>{query}")[2].partition("<h4>")[0]
        ranks = re.findall(r'<li value="(\d+)"><code>(.*?)<', shown)
        assert [rank for rank, _ in ranks[-4:]] == ["1", "2", "3", str((BASE["qid"] == qid).sum())]
        assert ranks[-1][1] == docno


def test_training_is_described(page, trained):
    ce = trained[7]["CL"]
    stage = page.tables["Stages of training"].iloc[0]
    expected = ["CL", "1", repr(ce.stages[0].fitter).strip("'"), "16", "64", "4", "7"]
    assert stage.tolist()[:7] == [*expected[:4], f"{ce.stages[0].documents}", *expected[5:]]
    kept = ce.history[ce.history["kept"]]
    assert stage["Validation"] == f"nDCG@10 {kept['nDCG@10'].item():.4f}"
    assert stage["Weights"] == ce.data_report.outcome
    assert stage["Weights"].startswith("kept step ")
    assert page.tables["Re-rankers"]["Weights"].tolist() == [ce.fingerprint]
    assert "max_length=24" in page.tables["Re-rankers"]["Re-ranker"].iloc[0]
    for line in repr(ce.data_report).splitlines()[1:]:
        assert line.strip() in page.text


def test_versions_and_command(page, trained, tmp_path, monkeypatch):
    versions = page.tables["Versions, on " + next(c for c in page.tables if c.startswith("Versions"))[13:]]
    versions = versions.set_index("Package")
    assert versions.at["numpy", "Evaluation"] == np.__version__
    assert versions.at["transformers", "Training"] == trained[7]["CL"].stages[0].versions["transformers"]
    assert "<pre><code>make all</code></pre>" in page.source
    perquery = pt.Experiment([BASE, BETTER], TOPICS, QRELS, [RR], names=["a", "b"], perquery=True)
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "study.py", "--out", "a folder"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "study.py", raising=False)
    of_values = Page(report(perquery, TOPICS, QRELS, [RR], baseline="a", path=tmp_path / "page.html"))
    assert "python study.py --out 'a folder'" in of_values.text
    # From the values by query alone: the same results, without documents.
    difference = of_values.tables["Differences from a, p-values with Holm's correction for 1 comparison"]["Difference"]
    assert difference.tolist() == [f"+{(reciprocal_ranks(BETTER) - reciprocal_ranks(BASE)).mean():.4f}"]
    assert "top documents" not in of_values.text
    assert "#training" not in of_values.links


def test_the_order_of_systems_is_that_of_the_call(tmp_path):
    systems = {name: BASE.assign(score=BASE["score"] * (-1) ** k) for k, name in enumerate("zyxwvutsrqpo")}
    page = Page(report(systems, TOPICS, QRELS, [RR], path=tmp_path / "page.html"))
    assert page.tables["Mean over 12 queries"]["System"].tolist() == [*systems]


def test_documents_with_the_same_score_are_in_the_order_that_is_measured(tmp_path):
    tied = BASE.assign(score=0.0)
    page = Page(report({"CL": BETTER, "tied": tied}, TOPICS, QRELS, [nDCG @ 1], path=tmp_path / "page.html"))
    qid = page.tables["Queries that lost most with tied"]["qid"].iloc[0]
    shown = page.source.partition(f"<h4>{TOPICS.set_index('qid')['query'][qid]}")[2].partition("<h4>")[0]
    found = re.findall(rf"<code>({qid}d\d)</code>", shown.partition("<p>tied</p>")[2])
    assert found[:3] == sorted(BASE.loc[BASE["qid"] == qid, "docno"], reverse=True)[:3]


def test_only_the_judgments_of_the_topics_count(tmp_path):
    others = pd.concat([QRELS, QRELS.assign(qid="x" + QRELS["qid"])])
    systems = {"a": BASE, "b": BETTER}
    pages = [report(systems, TOPICS, qrels, [RR], path=tmp_path / "page.html").read_text() for qrels in (QRELS, others)]
    assert pages[0] == pages[1]


def test_systems_are_run_once_and_seeds_are_averaged(tmp_path, trained):
    calls = []

    def first_stage(topics):
        calls.append(len(topics))
        return BASE

    first = pt.apply.generic(first_stage)
    by_seed = {seed: first >> each["CL"] for seed, each in trained.items()}
    page = Page(report({"BM25": first, "CL": by_seed}, TOPICS, QRELS, [RR], path=tmp_path / "page.html"))
    assert calls == [12, 12, 12]
    means = page.tables["Mean over 12 queries, ± its standard deviation over the seeds of training"].set_index("System")
    values = [reciprocal_ranks(ce["CL"](BASE)).mean() for ce in trained.values()]
    assert means.at["CL", "RR"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert means["Seeds"].tolist() == ["1", "2"]
    assert page.tables["Systems"]["Seeds"].tolist() == ["–", "7, 8"]
    # The re-rankers are found in the pipelines.
    assert page.tables["Stages of training"]["System"].tolist() == ["CL, seed 7", "CL, seed 8"]
    assert page.tables["Stages of training"]["Seed"].tolist() == ["7", "8"]
    assert page.images[0]["alt"] == "Line plot. Training loss and nDCG@10 on the validation queries of CL, by seed."
    assert " at 0x" not in page.text
    # Documents are those of one seed, values are means over seeds.
    assert "<p>CL, seed 7</p>" in page.source
    assert "<p>BM25</p>" in page.source


def test_systems_with_the_same_weights_are_told(tmp_path, trained):
    same = {seed: {"CL": each["CL"], "CL-KD": trained[7]["CL"].clone()} for seed, each in trained.items()}
    systems = {"BM25": BASE, "CL": BETTER, "CL-KD": BETTER}
    page = Page(report(systems, TOPICS, QRELS, [RR], rerankers=same, path=tmp_path / "page.html"))
    assert "CL, seed 7 and CL-KD, seed 7 and CL-KD, seed 8 have the same weights" in page.text
    assert "CL, seed 8 have" not in page.text


def test_without_matplotlib(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ImportError, match=r'report needs the extra \[plot\]: pip install "pyterrier-msft\[plot\]"'):
        report({"a": BASE, "b": BETTER}, TOPICS, QRELS, [RR])


@pytest.mark.filterwarnings("ignore:.*gives random")
def test_digest_of_the_evaluated_weights(backbone, tmp_path):
    part = make_part("tr", n_queries=16, seed=1)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    ce.fit(part.results, part.qrels, fitter=Contrastive(n_negatives=3, max_steps=1, warmup=0, learning_rate=1e-2))
    old = ce.fingerprint
    with torch.no_grad():
        ce.cross_encoder.network.classifier.weight.mul_(-1)
    systems = {"a": BASE, "b": pt.Transformer.from_df(BASE) >> ce}
    page = report(systems, TOPICS, QRELS, [RR], path=tmp_path / "page.html").read_text()
    assert ce.fingerprint != old
    assert ce.fingerprint in page
    assert old not in page


def test_repeated_documents_and_topics(tmp_path):
    options = {"path": tmp_path / "page.html"}
    with pytest.raises(ValueError, match=r"systems must return each document once per query; got \d+ duplicates"):
        report({"a": BASE, "b": pd.concat([BASE, BASE])}, TOPICS, QRELS, [RR], **options)
    with pytest.raises(ValueError, match="topics must have each qid once; got"):
        report({"a": BASE, "b": BETTER}, pd.concat([TOPICS, TOPICS]), QRELS, [RR], **options)
