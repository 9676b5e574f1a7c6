"""A test for each row of docs/bad-input.md, and frames thrown together at `fit` and `transform`."""

import json
import re
import shutil
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import WORDS, make_part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir_measures import RR
from pandas.testing import assert_frame_equal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

from pyterrier_msft import Contrastive, Distillation, MonoCE, losses

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"
NAN = float("nan")
PART = make_part("tr", n_queries=8, seed=1)
RESULTS, QRELS = PART.results, PART.qrels
SHORT = Contrastive(n_negatives=3, max_steps=1, warmup=0, learning_rate=1e-2, batch_size=4)


def row(test: Any) -> Any:
    """Marks the test of a row of the page."""
    test.row = test.__name__.removeprefix("test_")
    return test


def test_page_and_tests_name_each_other():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == {test.row for test in globals().values() if hasattr(test, "row")}


@pytest.fixture(scope="module")
def scorer(backbone) -> MonoCE:
    """A re-ranker that isn't trained here, and doesn't warn of it."""
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    ce._load()
    ce._head_is_new = False
    return ce


@pytest.fixture
def new(scorer) -> MonoCE:
    """A re-ranker to train."""
    return scorer.clone()


def refused(match: str, *data: Any, fitter: Any = SHORT, **settings: Any) -> None:
    """`fit` refuses, before a model is loaded: that one isn't there."""
    with pytest.raises(ValueError, match=match) as caught:
        MonoCE("nobody/nothing", **settings).fit(*data, fitter=fitter)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


def fitted(*data: Any, fitter: Any = SHORT, ce: MonoCE | None = None) -> Any:
    """What a fitter makes of the data: (groups, report), and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups, report, _ = (ce or MonoCE("nobody/nothing"))._prepare(fitter, *data)
    return groups, report, [str(w.message) for w in caught if w.category is UserWarning]


def same_groups(results: pd.DataFrame, qrels: pd.DataFrame | None, fitter: Any = SHORT) -> None:
    """These data are read as the plain ones are."""
    kept = results.iloc[0]["qid"]
    expected, _, _ = fitted(RESULTS, QRELS, fitter=fitter)
    groups, report, said = fitted(results, qrels, fitter=fitter)
    assert len(groups) == len(expected) == report.queries, kept
    assert groups.texts == expected.texts or sorted(groups.texts) == sorted(expected.texts)
    assert [x.tolist() for x in groups.labels] == [x.tolist() for x in expected.labels]
    assert not said


def numbered(frame: pd.DataFrame, kind: Any) -> pd.DataFrame:
    """Qids tr0 … as numbers of a kind."""
    return frame.assign(qid=frame["qid"].str.removeprefix("tr").astype(int).astype(kind).array)


# ---- frames


@row
@pytest.mark.parametrize("column", ["qid", "docno", "query", "text"])
def test_missing_columns(column):
    refused(f"expected .*{column}.*found", RESULTS.drop(columns=column), QRELS)
    with pytest.raises(pt.validate.InputValidationError) as caught:
        MonoCE("nobody/nothing")(RESULTS.drop(columns=column))
    assert re.search(f"expected columns .*'{column}'.* in results, found", caught.value.__notes__[0])
    if column in QRELS:
        refused("expected columns .* in qrels", RESULTS, QRELS.drop(columns=column))


@row
def test_other_column_names():
    other = QRELS.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    refused("rename them by .*'query_id': 'qid', 'doc_id': 'docno', 'relevance': 'label'", RESULTS, other)
    refused("rename them by .*'doc_id': 'docno'", RESULTS.rename(columns={"docno": "doc_id"}), QRELS)


@row
def test_ids_in_the_index():
    refused(r"'qid', 'docno' is in the index: give frame\.reset_index\(\)", RESULTS.set_index(["qid", "docno"]), QRELS)


@row
def test_a_column_twice(scorer):
    twice = pd.concat([RESULTS, RESULTS[["text"]]], axis=1)
    refused("expected one column 'text' in training results, found 2", twice, QRELS)
    with pytest.raises(ValueError, match="expected one column 'text' in results, found 2"):
        scorer(twice)


@row
def test_topics_for_results():
    topics = RESULTS[["qid", "query"]].drop_duplicates()
    refused(r"found \['qid', 'query'\]; these look like topics", topics, QRELS)
    with pytest.raises(pt.validate.InputValidationError) as caught:
        MonoCE("nobody/nothing")(topics)
    assert "these look like topics" in caught.value.__notes__[0]


@row
def test_swapped_arguments():
    refused("these look like qrels: are the arguments swapped", QRELS, RESULTS)
    refused("these look like results: are the arguments swapped", RESULTS, RESULTS)
    refused("these look like qrels: are the arguments swapped", RESULTS, QRELS, QRELS, RESULTS)


@row
def test_no_frame(scorer):
    refused("found dict", {"qid": ["q"]}, QRELS)
    refused("expected qrels as a data frame, found list", RESULTS, [("q", "d", 1)])
    refused("expected qrels to learn from, found None", RESULTS)
    refused("expected qrels with the validation results, found None", RESULTS, QRELS, RESULTS)
    refused("expected validation results with the validation qrels, found None", RESULTS, QRELS, None, QRELS)
    with pytest.raises(ValueError, match="expected results as a data frame, found NoneType"):
        scorer.transform(None)


@row
def test_empty_results():
    out = MonoCE("nobody/nothing")(RESULTS.head(0))
    assert {"score", "rank"} <= {*out.columns}
    assert not len(out)
    refused("found none of 0 queries: the results are empty", RESULTS.head(0), QRELS)
    refused("found none of 0 queries: the results are empty", RESULTS.head(0), None, fitter=Distillation())


@row
def test_no_judged_query():
    other = QRELS.assign(qid="x" + QRELS["qid"])
    refused("none of 8 queries: the qids don't match, such as 'tr0' in the results and 'xtr0'", RESULTS, other)
    refused("none of 8 queries: there are no rows in the qrels", RESULTS, QRELS.head(0))
    report, said = fitted(RESULTS, QRELS.head(3))[1:]
    assert (report.without_relevant, report.unjudged) == (5, 5)
    assert said == ["Contrastive leaves out: 5 queries without a relevant document (5 of them not in the qrels)"]


@row
@pytest.mark.parametrize("kind", [int, float, str, "category", object, "Int64"])
def test_ids_of_other_types(kind, new):
    for results, qrels in ((RESULTS, numbered(QRELS, kind)), (numbered(RESULTS, kind), QRELS)):
        text = results.assign(qid=results["qid"].astype(str).str.removeprefix("tr").str.removesuffix(".0"))
        same_groups(text if results is RESULTS else results, qrels if results is RESULTS else numbered(qrels, str))
    teacher = numbered(RESULTS, kind)[["qid", "docno", "score"]]
    assert len(fitted(numbered(RESULTS, str), None, fitter=Distillation(teacher=teacher))[0]) == 8
    frame, labels = new._validation_frame(numbered(RESULTS, str), numbered(QRELS, kind))
    assert (len(frame), len(labels)) == (64, 8)


@row
def test_ids_with_blanks():
    same_groups(RESULTS, QRELS.assign(qid=QRELS["qid"] + " ", docno=" " + QRELS["docno"]))


@row
@pytest.mark.parametrize("column", ["qid", "docno"])
@pytest.mark.parametrize("missing", [None, NAN, pd.NA])
def test_missing_ids(column, missing, scorer):
    frame = RESULTS.astype({column: object})
    frame.loc[3, column] = missing
    refused(f"expected a {column} in every row, found 1 of 64 without", frame, QRELS)
    refused(f"expected a {column} in every row, found 1 of 64 without", RESULTS, QRELS, frame, QRELS)
    with pytest.raises(ValueError, match=f"expected a {column} in every row, found 1 of 64 without"):
        scorer(frame)


@row
def test_duplicates(scorer):
    twice = pd.concat([RESULTS, RESULTS.head(2)])
    once = scorer(RESULTS)["score"].tolist()
    np.testing.assert_allclose(scorer(twice)["score"], [*once, *once[:2]], atol=1e-6)
    groups, report, said = fitted(twice, QRELS)
    assert (groups.digest(), report.duplicates) == (fitted(RESULTS, QRELS)[0].digest(), 2)
    assert said == ["Contrastive leaves out: 2 documents given twice for a query"]


@row
def test_several_queries_of_a_qid(scorer):
    frame = RESULTS.copy()
    frame.loc[3, "query"] = "w99"
    assert scorer(frame)["score"].tolist()[4:] == scorer(RESULTS)["score"].tolist()[4:]
    assert scorer(frame)["score"][3] != scorer(RESULTS)["score"][3]
    groups, report, said = fitted(frame, QRELS)
    assert (groups.queries[0], report.several_queries) == (RESULTS["query"][0], 1)
    assert said == ["Contrastive found 1 qids with several queries: that of the best-ranked document counts"]


@row
def test_several_texts_of_a_docno(scorer):
    frame = RESULTS.head(16).assign(docno=["a", "b", "c", "d", "e", "f", "g", "h"] * 2)
    assert scorer(frame)["score"].tolist() == scorer(RESULTS.head(16))["score"].tolist()
    groups, _, _ = fitted(frame, pd.DataFrame([("tr0", "b", 1), ("tr1", "b", 1)], columns=["qid", "docno", "label"]))
    assert [groups.text(documents) for documents in groups.documents] == [
        frame["text"][:8].tolist(), frame["text"][8:].tolist(),
    ]  # fmt: skip


@row
@pytest.mark.parametrize("kind", ["category", object, "string", "string[pyarrow]"])
def test_other_dtypes(kind, scorer):
    frame = RESULTS.astype(dict.fromkeys(["qid", "docno", "query", "text"], kind))
    assert_frame_equal(scorer(frame)[["score", "rank"]], scorer(RESULTS)[["score", "rank"]])
    same_groups(frame.astype({"score": object}), QRELS.astype({"qid": kind, "docno": kind}).astype({"label": "Int64"}))


@row
@pytest.mark.parametrize(
    "index",
    [
        pd.Index([0] * 64),
        pd.Index(RESULTS["qid"], name="qid"),
        pd.MultiIndex.from_arrays([RESULTS["qid"], [1] * 64], names=["qid", "text"]),
    ],
)
def test_any_index(index, scorer, tmp_path):
    frame = RESULTS.set_axis(index)
    for transformer in (scorer, scorer.cached(tmp_path)):
        out = transformer.transform(frame)
        assert out.index.equals(index)
        assert_frame_equal(out.reset_index(drop=True), scorer(RESULTS), atol=1e-6)
    same_groups(frame, QRELS.set_axis(QRELS["qid"]))


# ---- texts


@row
@pytest.mark.parametrize("missing", [None, NAN, pd.NA, "", " \t"])
def test_missing_text(missing, scorer, tmp_path):
    frame = RESULTS.astype({"text": object})
    gone = RESULTS.index[RESULTS["quality"] == 0][[0, 9]]
    frame.loc[gone, "text"] = missing
    empty = RESULTS.assign(text=RESULTS["text"].where(~RESULTS.index.isin(gone), ""))
    for transformer in (scorer, scorer.cached(tmp_path)):
        with pytest.warns(UserWarning, match="of 64 rows to score, 2 without 'text': read as empty") as caught:
            out = transformer(frame)
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        with pytest.warns(UserWarning, match="2 without 'text'"):
            np.testing.assert_allclose(out["score"], scorer(empty)["score"], atol=1e-6)
    groups, report, said = fitted(frame, QRELS)
    assert (report.without_text, len(groups.text(groups.documents[0]))) == (2, 7)
    assert said == ["Contrastive leaves out: 2 documents without text"]
    refused("none of 8 queries: 64 documents have no text", RESULTS.assign(text=missing), QRELS)


@row
@pytest.mark.parametrize("missing", [None, NAN, pd.NA, ""])
def test_missing_query(missing, scorer):
    frame = RESULTS.astype({"query": object})
    frame.loc[frame["qid"] == "tr2", "query"] = missing
    with pytest.warns(UserWarning, match="of 64 rows to score, 8 without 'query': read as empty"):
        scorer(frame)
    groups, report, said = fitted(frame, QRELS)
    assert (len(groups), report.without_query) == (7, 8)
    assert "tr2" not in groups.qids
    assert "8 documents whose query has no text" in said[0]
    refused("none of 8 queries: .* no query", frame.assign(query=missing), QRELS)


@row
def test_numbers_as_text(scorer):
    numbers, written = (
        RESULTS.assign(text=range(64), query=7),
        RESULTS.assign(text=[str(i) for i in range(64)], query="7"),
    )
    assert scorer(numbers)["score"].tolist() == scorer(written)["score"].tolist()
    assert fitted(numbers, QRELS)[0].digest() == fitted(written, QRELS)[0].digest()


@row
@pytest.mark.parametrize("value", [["w1", "w2"], {"text": "w1"}, b"w1", pd.Timestamp(0)])
def test_what_is_no_text(value, scorer):
    frame = RESULTS.assign(text=[value] * 64)
    kind = type(value).__name__
    refused(f"expected text in the column 'text', found {kind}", frame, QRELS)
    with pytest.raises(ValueError, match=f"expected text in the column 'text', found {kind}"):
        scorer(frame)


@row
def test_a_very_long_text(scorer):
    long = RESULTS.head(8).assign(text=RESULTS["text"] + " w1" * 350_000)
    cut = RESULTS.head(8).assign(text=RESULTS["text"] + " w1" * 24)
    assert scorer(long)["score"].tolist() == scorer(cut)["score"].tolist()
    word = scorer(RESULTS.head(1).assign(text="x" * 1_000_000))
    assert np.isfinite(word["score"]).all()


@row
def test_a_very_long_query(scorer, new):
    long, cut = RESULTS.assign(query=" w9" * 10_000), RESULTS.assign(query=" w9" * 12)
    assert scorer(long)["score"].tolist() == scorer(cut)["score"].tolist()
    assert scorer(long)["score"][:8].nunique() == 8  # the text has its room
    new.fit(long, QRELS, fitter=SHORT)
    assert "100.0% of the queries are cut to fit (max_query_length)" in repr(new.data_report)


STRANGE = ["w1\x00w2", "w1 \ud800 w2", "\u202eמילה w1", "w1 🙂 w2", "e\u0301 \u200b", "\x07"]


@row
@pytest.mark.parametrize("text", STRANGE)
def test_strange_characters(text, scorer, new, tmp_path):
    def with_text(text: str) -> pd.DataFrame:
        texts = [text if i == 2 else other for i, other in enumerate(RESULTS["text"].head(8))]
        return RESULTS.head(8).assign(query=pd.Series([text] * 8, dtype=object), text=pd.Series(texts, dtype=object))

    frame, expected = with_text(text), with_text(text.replace("\ud800", "?"))
    out = scorer(frame)
    assert out["score"].tolist() == scorer(expected)["score"].tolist()
    np.testing.assert_allclose(scorer.cached(tmp_path)(frame)["score"], out["score"], atol=1e-6)
    new.fit(frame, QRELS, fitter=SHORT)


class Losing:
    """A text source that lacks some documents."""

    def text_loader(self, fields):
        texts = RESULTS[["docno", *fields]].head(5)
        return pt.apply.generic(lambda frame: frame.merge(texts, on="docno"))


@row
def test_a_text_loader_that_loses_rows(scorer):
    without = RESULTS.drop(columns="text")
    refused("expected 64 rows from the text loader, as many as it got, found 5", without, QRELS, text=Losing())
    with pytest.raises(ValueError, match="expected 64 rows from the text loader"):
        scorer.apply_attributes(text=Losing())(without)


# ---- orders and labels


@row
@pytest.mark.parametrize("value", [NAN, None, "high"])
def test_scores_that_are_no_numbers(value, scorer):
    frame = RESULTS.astype({"score": object})
    frame.loc[3, "score"] = value
    refused("expected a number as every score, found 1", frame, QRELS)
    assert scorer(frame)["score"].tolist() == scorer(RESULTS)["score"].tolist()  # it is set anew
    teacher = frame[["qid", "docno", "score"]]
    refused("expected a number as every score, found 1", RESULTS, None, fitter=Distillation(teacher=teacher))


@row
def test_infinite_scores(scorer):
    frame = RESULTS.assign(score=RESULTS["score"].replace({8.0: np.inf, 1.0: -np.inf}))
    same_groups(frame, QRELS)
    same_groups(frame, None, Distillation())
    refused(
        "expected finite scores of a teacher, found 16 such as", RESULTS, None,
        fitter=Distillation(teacher=frame.assign(score=frame["score"] ** 3), loss=losses.margin_mse),
    )  # fmt: skip


@row
@pytest.mark.parametrize("first", [0, 1])
def test_ranks_from_0_or_1(first):
    ranked = RESULTS.drop(columns="score").assign(rank=RESULTS["rank"] + first)
    same_groups(ranked, QRELS)
    same_groups(ranked, None, Distillation())


@row
def test_no_order():
    refused("expected a score or a rank", RESULTS.drop(columns=["score", "rank"]), None, fitter=Distillation())
    same_groups(RESULTS.drop(columns=["score", "rank"]), QRELS)  # as they come


@row
def test_graded_negative_and_float_labels():
    rows = [("tr0", "tr0d0", 2.5), ("tr0", "tr0d1", -1), ("tr0", "tr0d2", 0.5), ("tr0", "tr0d3", 1)]
    groups, _, _ = fitted(RESULTS.head(8), pd.DataFrame(rows, columns=["qid", "docno", "label"]))
    assert groups.labels[0].tolist() == [2.5, 0, 0, 1, 0, 0, 0, 0]


@row
@pytest.mark.parametrize("value", [NAN, np.inf, "yes", None])
def test_labels_that_are_no_numbers(value):
    frame = QRELS.astype({"label": object})
    frame.loc[2, "label"] = value
    refused("expected a number as every label, found 1 such as", RESULTS, frame)


@row
def test_contradictory_qrels():
    both = pd.concat([QRELS, QRELS.head(2).assign(label=0), QRELS.tail(1)])
    groups, report, said = fitted(RESULTS, both)
    assert (groups.digest(), report.judged_twice) == (fitted(RESULTS, QRELS)[0].digest(), 2)
    assert said == ["Contrastive found 2 documents with two labels in the qrels: the higher counts"]


@row
def test_min_relevance_above_every_label():
    refused(
        "the highest label of these queries is 1, and min_relevance is 2", RESULTS, QRELS,
        fitter=Contrastive(min_relevance=2),
    )  # fmt: skip


@row
def test_docnos_that_do_not_match():
    other = QRELS.assign(docno="x" + QRELS["docno"])
    refused("the docnos don't match, such as 'tr0d0' in the results and 'xtr0d", RESULTS, other)


@row
def test_no_relevant_document_found():
    other = QRELS.assign(docno=QRELS["docno"].to_numpy()[::-1])
    refused("the first stage found no relevant document; add_missing_positives", RESULTS, other)


@row
def test_no_negatives():
    only = RESULTS.merge(QRELS[["qid", "docno"]])
    refused("the relevant documents are there, but no others", only, QRELS)


@row
def test_validation_labels_that_are_fractions():
    refused("expected whole numbers as labels of validation queries, .* found 0.5", RESULTS, QRELS, RESULTS,
            QRELS.assign(label=0.5))  # fmt: skip


@row
def test_validation_without_a_relevant_document():
    start = "expected judged queries with a relevant document among the validation results, found none"
    dev = make_part("va", n_queries=2, seed=2)
    refused(f"{start}: the qids don't match", RESULTS, QRELS, dev.results, QRELS)
    refused(f"{start}: the docnos don't match", RESULTS, QRELS, dev.results, dev.qrels.assign(docno="x"))
    refused(start, RESULTS, QRELS, dev.results.head(0), dev.qrels)
    refused(start, RESULTS, QRELS, dev.results, dev.qrels.assign(label=0))


@row
def test_validation_that_shares_queries(new):
    with pytest.warns(UserWarning, match="2 validation queries are training queries too") as caught:
        new.fit(RESULTS, QRELS, RESULTS.head(16), QRELS, fitter=SHORT)
    assert {w.filename for w in caught if "validation" in str(w.message)} == {__file__}


@row
def test_a_teacher_that_is_upside_down():
    teacher = RESULTS[["qid", "docno"]].assign(score=RESULTS["rank"])
    _, report, said = fitted(RESULTS, None, fitter=Distillation(teacher=teacher))
    assert report.agreement == pytest.approx(-1)
    assert "the teacher's ranking looks upside down: its rank correlation with the first stage is -1.00" in said[0]


@row
def test_a_teacher_without_overlap():
    for column in ("qid", "docno"):
        teacher = RESULTS.assign(**{column: "x" + RESULTS[column]})
        refused(
            f"found none in common: the {column}s don't match, such as 'tr0.* in the results and 'xtr0", RESULTS, None,
            fitter=Distillation(teacher=teacher),
        )  # fmt: skip
    crossed = RESULTS.assign(docno=RESULTS["docno"].to_numpy()[::-1])
    refused("qids and docnos match, but no document", RESULTS, None, fitter=Distillation(teacher=crossed))
    _, report, said = fitted(RESULTS, None, fitter=Distillation(teacher=RESULTS.head(20)))
    assert (report.without_teacher, report.unranked_by_teacher) == (5, 4)
    assert "5 queries without the teacher's ranking" in said[0]


@row
def test_a_teacher_that_says_nothing():
    tied = RESULTS.assign(score=1.0)
    refused("found none of 8 queries: each has one document alone, or all have the same score", tied, None,
            fitter=Distillation())  # fmt: skip
    half = RESULTS.assign(score=RESULTS["score"].clip(lower=4))
    report = fitted(half, None, fitter=Distillation())[1]
    assert report.tied_labels == pytest.approx(4 * 3 / (8 * 7))
    assert "21.4% of the teacher's pairs of documents are tied" in repr(report)


# ---- settings


@row
def test_a_class_for_a_fitter():
    with pytest.raises(ValueError, match=r"expected a fitter such as Contrastive\(\), found the class Contrastive"):
        MonoCE(fitter=Contrastive)
    refused("found the class Distillation", RESULTS, QRELS, fitter=Distillation)


@row
@pytest.mark.parametrize(
    "make",
    [
        lambda: Contrastive(learning_rate="1e-5"),
        lambda: Contrastive(learning_rate=NAN),
        lambda: Contrastive(epochs=np.inf),
        lambda: Contrastive(batch_size=True),
        lambda: Contrastive(batch_size=1.5),
        lambda: Contrastive(max_steps="10"),
        lambda: Contrastive(n_negatives=2.5),
        lambda: Contrastive(seed=-1),
        lambda: Distillation(depth="20"),
        lambda: Distillation(dropout="0.1"),
        lambda: MonoCE(batch_size=True),
        lambda: MonoCE(max_length="256"),
        lambda: MonoCE(seed="a"),
    ],
)
def test_settings_that_are_no_numbers(make):
    with pytest.raises(ValueError, match=r"expected .* (above|at least) 0, found "):
        make()


@row
@pytest.mark.parametrize("name", ["query", "docno", "score", 3])
def test_a_text_field_that_is_taken(name):
    with pytest.raises(ValueError, match="expected text_field as the name of a column of text, found"):
        MonoCE(text_field=name)


@row
def test_a_device_that_is_not_there(backbone):
    with pytest.raises(ValueError, match="expected a device that is there, found 'gpu'"):
        MonoCE(device="gpu")
    refused("expected a device that is there, found 'cuda:99'", RESULTS, QRELS, device="cuda:99")
    with pytest.raises(ValueError, match="expected a device that is there, found 'cuda:99'"):
        MonoCE(backbone, device="cuda:99")(RESULTS)


# ---- models


@pytest.fixture
def folder(backbone, tmp_path) -> Path:
    """A cross-encoder's folder, to be broken."""
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def unusable(model: Any, match: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        MonoCE(model, max_length=24, device="cpu", **settings)(RESULTS)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


def configure(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


@row
def test_a_path_that_is_not_there(tmp_path):
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/no/such/model"):
        with pytest.raises(ValueError, match="expected a model's folder or a name on the Hugging Face hub, found"):
            MonoCE(path)
    unusable("nobody/nothing", "found 'nobody/nothing'")
    refused(r"expected results as a data frame or the path of a run, found no file", "none.trec", QRELS, text=Losing())


@row
def test_missing_weights(folder, backbone):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    weights = {name: tensor for name, tensor in network.state_dict().items() if "layer.1" not in name}
    network.save_pretrained(folder, state_dict=weights)
    unusable(folder, "expected all of the backbone's weights in .*, found .* missing")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    unusable(folder, "expected a model in .* that AutoModelForSequenceClassification loads, found")
    (folder / "model.safetensors").unlink()
    unusable(folder, "expected the name of a model .* or a folder with its safetensors")


@row
def test_another_architecture(folder, backbone):
    ViTConfig().save_pretrained(folder)
    unusable(folder, "that AutoModelForSequenceClassification loads, found")
    configure(folder, model_type="from-the-future")
    unusable(folder, "that AutoModelForSequenceClassification loads, found")
    T5Config(num_layers=1, d_model=8, vocab_size=105).save_pretrained(folder)
    unusable(folder, "expected .* found")
    with pytest.raises(
        ValueError, match="expected a model loaded by AutoModelForSequenceClassification, found BertModel"
    ):
        MonoCE(AutoModel.from_pretrained(backbone))


@row
def test_other_shapes(folder):
    configure(folder, intermediate_size=48)
    unusable(folder, "that AutoModelForSequenceClassification loads, found")


@row
def test_several_labels(backbone, folder):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
    network.save_pretrained(folder)
    unusable(folder, r"expected a cross-encoder with one label \(a score\), found 3 labels")
    with pytest.raises(ValueError, match=r"expected a model with one label \(a score\), found 3"):
        MonoCE(network)


@row
def test_pickled_weights(folder):
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    unusable(folder, "or a folder with its safetensors, found")


@row
def test_code_that_comes_with_a_model(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('this code ran')")
    configure(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    unusable(folder, "expected trust_remote_code=True for .*, which brings code of its own, found False")


@row
def test_another_models_tokenizer(folder):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    unusable(folder, "expected a tokenizer of at most 50 tokens, as the model in .*, found 105")


def write_decoder(folder: Path, *, eos: str | None) -> str:
    """A tiny GPT-2: no token for padding, and none between query and text."""
    words = ["<|end|>", "<|unk|>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, padding_side="left", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@row
def test_a_backbone_without_a_padding_token(tmp_path):
    decoder = write_decoder(tmp_path / "gpt", eos="<|end|>")
    network = AutoModelForSequenceClassification.from_pretrained(decoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    frame = RESULTS.assign(text=[" ".join(text.split()[: 1 + i % 6]) for i, text in enumerate(RESULTS["text"])])
    with torch.inference_mode():  # alone, so that nothing is padded
        expected = [
            network(**tokenizer(query, text, return_tensors="pt")).logits.item()
            for query, text in zip(frame["query"], frame["text"], strict=True)
        ]
    ce = MonoCE(decoder, max_length=24, dtype="float32", device="cpu")
    np.testing.assert_allclose(ce(frame)["score"], expected, atol=1e-5)
    ce.fit(frame, QRELS, fitter=SHORT)
    ce.save(tmp_path / "saved")
    saved = MonoCE.load(tmp_path / "saved", dtype="float32", device="cpu")
    np.testing.assert_allclose(saved(frame)["score"], ce(frame)["score"], atol=1e-6)
    unusable(write_decoder(tmp_path / "none", eos=None), "expected a tokenizer with a token for padding")


@row
def test_more_tokens_than_positions(backbone, tmp_path):
    for model, limit in ((backbone, 64), (write_decoder(tmp_path, eos="<|end|>"), 32)):
        with pytest.raises(ValueError, match=f"expected max_length of at most {limit}, .*, found 65"):
            MonoCE(model, max_length=65, device="cpu")(RESULTS)


@row
def test_scores_that_are_not_finite(new):
    with torch.no_grad():
        new._network.classifier.bias.fill_(NAN)
    with pytest.raises(ValueError, match="expected finite scores, found 64 of 64 that are not"):
        new(RESULTS)


# ---- training

LONGER = {"n_negatives": 3, "batch_size": 2, "epochs": 8}


def said(ce: MonoCE, *data: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce.fit(*data, fitter=Contrastive(**{**LONGER, **settings}))
    own = [w for w in caught if w.category is UserWarning]
    assert {w.filename for w in own} <= {__file__}
    return [str(w.message) for w in own]


@row
def test_a_learning_rate_that_is_too_high(new):
    with pytest.raises(ValueError, match=r"expected a finite loss, found nan at step \d+ \(queries tr"):
        new.clone().fit(RESULTS, QRELS, fitter=Contrastive(learning_rate=1e30, clip_norm=None, batch_size=2, epochs=4))
    messages = said(new, RESULTS, QRELS, learning_rate=1.0)
    assert any("ranks no better than by chance" in message or "get the same score" in message for message in messages)


@row
def test_a_learning_rate_that_is_too_low(new):
    messages = said(new, RESULTS, QRELS, learning_rate=1e-9)
    assert any("hardly changed the scores" in message for message in messages)
    assert any("ranks no better than by chance" in message for message in messages)


@row
def test_one_that_suits(new):
    assert said(new, RESULTS, QRELS, learning_rate=1e-2) == []


@row
def test_labels_of_other_queries(new):
    many = make_part("tr", n_queries=64, seed=5)
    shuffled = many.results.assign(text=np.random.default_rng(0).permutation(many.results["text"]))
    messages = said(new, shuffled, many.qrels, learning_rate=1e-3, epochs=1)
    assert any("ranks no better than by chance" in message for message in messages)


@row
def test_scores_that_collapse(new):
    with torch.no_grad():
        new._network.classifier.weight.zero_()
    messages = said(new, RESULTS, QRELS, learning_rate=1e-9)
    assert any("all documents of a query get the same score" in message for message in messages)


@row
def test_a_new_head(backbone, tmp_path):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    cached = ce.cached(tmp_path)
    for transformer in (ce, cached, cached):
        with pytest.warns(UserWarning, match="scores at random: its head is new") as caught:
            transformer(RESULTS)
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        with pytest.warns(UserWarning, match="scores at random") as caught:
            (pt.Transformer.from_df(RESULTS) >> transformer)(RESULTS[["qid", "query"]].drop_duplicates())
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]


# ---- caches


@row
def test_a_scorer_cache_around_it(new, tmp_path):
    caching = pytest.importorskip("pyterrier_caching")
    topics = RESULTS[["qid", "query"]].drop_duplicates()
    trap = caching.ScorerCache(tmp_path / "trap", new)
    before, start = trap(RESULTS)["score"], new.fingerprint
    (pt.Transformer.from_df(RESULTS) >> trap).fit(topics, QRELS)
    assert new.fingerprint == start  # nothing was trained
    new.fit(RESULTS, QRELS, fitter=SHORT)
    assert trap(RESULTS)["score"].tolist() == before.tolist()  # the scores of before
    assert not np.allclose(new(RESULTS)["score"], before)
    cached = new.cached(tmp_path / "cached")
    for _ in range(2):
        new.fitter = SHORT
        (pt.Transformer.from_df(RESULTS) >> cached).fit(topics, QRELS)
        np.testing.assert_allclose(cached(RESULTS)["score"], new(RESULTS)["score"], atol=1e-6)
    assert new.fingerprint != start


@row
def test_an_experiment_that_reuses(new, tmp_path):
    topics, names = RESULTS[["qid", "query"]].drop_duplicates(), []

    def measured(name: str) -> float:
        names.append(name)
        table = pt.Experiment(
            {name: pt.Transformer.from_df(RESULTS) >> new}, topics, QRELS, [RR @ 10], save_dir=str(tmp_path),
            save_mode="reuse", validate="ignore",
        )  # fmt: skip
        return float(table["RR@10"].iloc[0])

    before, before_named = measured("CL"), measured(f"CL {new.fingerprint}")
    new.fit(RESULTS, QRELS, fitter=Contrastive(n_negatives=3, learning_rate=1e-2, batch_size=2, epochs=8))
    now = pt.Evaluate(new(RESULTS), QRELS, [RR @ 10])["RR@10"]
    assert measured("CL") == before == before_named != pytest.approx(now)  # the scores of before
    assert measured(f"CL {new.fingerprint}") == pytest.approx(now)
    assert len(set(names)) == 3


@row
def test_a_cache_that_others_write_to(scorer, tmp_path):
    pytest.importorskip("pyterrier_caching")
    expected, found = scorer(RESULTS), []
    start = threading.Barrier(3)

    def work() -> None:
        cached = scorer.cached(tmp_path)
        start.wait()
        found.append(cached(RESULTS))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for out in found:
        assert_frame_equal(out, expected, atol=1e-6)
    assert len([*tmp_path.iterdir()]) == 1


# ---- anything at all

ANY_QID = st.sampled_from(["q1", "q2", "q3", "q1 ", 1, 1.0, "1", 2])
ANY_DOCNO = st.sampled_from(["a", "b", "c", "d", "e%p0", " a", 7, 7.0])
ANY_TEXT = st.one_of(
    st.sampled_from(["w1 w2", "w3", "W4 w5 w6", "w7 " * 60, *STRANGE]),
    st.sampled_from([None, NAN, pd.NA, "", "  ", 5, 2.5]),
    st.text(max_size=8),
)
ANY_NUMBER = st.one_of(st.floats(-3, 3), st.sampled_from([1, 2, 2, "1.5", np.inf, -np.inf]))
WRONG = {
    "qid": [None, NAN], "docno": [pd.NA], "query": [["w1"], b"w1"], "text": [["w1"], {"a": 1}, pd.Timestamp(0)],
    "score": [NAN, "high", None], "rank": ["first", NAN], "label": [NAN, "yes", np.inf],
}  # fmt: skip
SAID = [
    r"of \d+ rows to score, \d+ without '\w+'.*: read as empty",
    r"(Contrastive|Distillation) leaves out: \d+ ",
    r"(Contrastive|Distillation) found \d+ ",
]  # what the page says that is warned of


@st.composite
def frames(draw, columns: dict[str, st.SearchStrategy], needed: int) -> pd.DataFrame:
    """A frame of these columns, now and then with a wrong value, without a column, of other dtypes, under any index."""
    n = draw(st.integers(0, 8))
    data = {name: draw(st.lists(values, min_size=n, max_size=n)) for name, values in columns.items()}
    names = [*columns]
    if n and draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(names))
        data[name][draw(st.integers(0, n - 1))] = draw(st.sampled_from(WRONG[name]))
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in data.items()}, columns=names)
    for name in names[needed:] if draw(st.integers(0, 7)) else names:
        if draw(st.booleans()):
            frame = frame.drop(columns=name)
    kind = draw(st.sampled_from([None, None, "category", "string", "infer"]))
    for name in frame.columns:
        try:
            if kind == "infer":
                frame[name] = frame[name].infer_objects()
            elif kind is not None and name in {"qid", "docno", "query", "text"}:
                frame[name] = frame[name].astype(kind)
        except (TypeError, ValueError):
            continue  # a dtype that can't hold what is in it
    index = draw(st.sampled_from(["plain", "zeros", "qid", "two"]))
    if index == "zeros":
        frame.index = [0] * n
    elif index == "qid":
        frame.index = pd.Index(range(n), name="qid")
    elif index == "two":
        frame.index = pd.MultiIndex.from_arrays([range(n), range(n)], names=["docno", "score"])
    return frame


RESULT_FRAMES = frames(
    {
        "qid": ANY_QID, "docno": ANY_DOCNO, "query": ANY_TEXT, "text": ANY_TEXT, "score": ANY_NUMBER,
        "rank": st.integers(0, 9),
    },
    needed=4,
)  # fmt: skip
QREL_FRAMES = frames(
    {"qid": ANY_QID, "docno": ANY_DOCNO, "label": st.sampled_from([0, 1, 2, -1, 1.5, "1"])}, needed=3
)  # fmt: skip
FUZZ = settings(
    deadline=None, max_examples=60, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def outcome(work: Any) -> Any:
    """What comes of it: a result, or None for an error in our words; anything else is raised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, refusal = work(), None
        except pt.validate.InputValidationError as error:
            result, refusal = None, error.__notes__[0]
        except ValueError as error:
            result, refusal = None, str(error)
    assert refusal is None or ("expected" in refusal and "found" in refusal), refusal
    for warning in caught:
        if warning.category is UserWarning:
            assert any(re.match(pattern, str(warning.message)) for pattern in SAID), warning.message
    return result


def read(text: Any) -> str:
    """A text as it should be read."""
    return "" if pd.isna(text) else str(text).encode("utf-8", "replace").decode()


@pytest.fixture(scope="module")
def plain(backbone, scorer, tmp_path_factory):
    """A pair's score by plain Hugging Face, one pair at a time."""
    folder = tmp_path_factory.mktemp("plain")
    scorer._network.save_pretrained(folder)
    network, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), scorer._tokenizer

    @cache
    def score(query: str, text: str) -> float:
        ids = tokenizer(query, add_special_tokens=False)["input_ids"][:12]
        short = tokenizer.decode(ids) if len(ids) == 12 else query
        with torch.inference_mode():
            # As lists: of one pair alone, Hugging Face drops a text that is empty.
            pair = tokenizer([short], [text], truncation="only_second", max_length=24, return_tensors="pt")
            return network(**pair).logits.item()

    return score


@FUZZ
@given(frame=RESULT_FRAMES)
def test_any_frame_is_scored_rightly_or_refused(frame, scorer, plain, tmp_path_factory):
    for transformer in (scorer, scorer.cached(tmp_path_factory.getbasetemp() / "fuzz")):
        before = frame.copy(deep=True)
        out = outcome(lambda transformer=transformer: transformer.transform(frame))
        assert_frame_equal(frame, before)
        if out is None:
            continue
        kept = [name for name in frame.columns if name not in {"score", "rank"}]
        assert_frame_equal(out[kept], frame[kept])
        if not len(frame):
            assert not len(out)
            continue
        expected = [plain(read(q), read(t)) for q, t in zip(frame["query"], frame["text"], strict=True)]
        np.testing.assert_allclose(out["score"], expected, atol=1e-5)
        ranks = pt.model.add_ranks(pd.DataFrame({"qid": frame["qid"].to_numpy(), "score": out["score"].to_numpy()}))
        assert out["rank"].tolist() == ranks["rank"].tolist()


def an_id(value: Any) -> str:
    return str(int(value) if isinstance(value, float) else value).strip()


def learnable(results: pd.DataFrame, qrels: pd.DataFrame) -> dict[str, tuple[str, list[float]]]:
    """By hand: each query's text, and its documents' labels from the best score down."""
    grades: dict[tuple[str, str], float] = {}
    for qid, docno, label in zip(qrels["qid"], qrels["docno"], qrels["label"], strict=True):
        pair = an_id(qid), an_id(docno)
        grades[pair] = max(float(label), grades.get(pair, -9))
    rows = results.to_dict("records")
    if "score" in results:
        rows.sort(key=lambda one: -float(one["score"]))
    elif "rank" in results:
        rows.sort(key=lambda one: one["rank"])
    found: dict[str, tuple[str, list[float]]] = {}
    seen = set()
    for one in rows:
        qid, docno = an_id(one["qid"]), an_id(one["docno"])
        if (qid, docno) in seen:
            continue
        seen.add((qid, docno))
        if read(one["query"]).strip() and read(one["text"]).strip():
            grade = grades.get((qid, docno.removesuffix("%p0")), 0)
            found.setdefault(qid, (read(one["query"]), []))[1].append(grade if grade >= 1 else 0)
    return {qid: pair for qid, pair in found.items() if any(pair[1]) and not all(pair[1])}


@FUZZ
@given(results=RESULT_FRAMES, qrels=QREL_FRAMES)
def test_anything_is_learnt_from_rightly_or_refused(results, qrels, scorer, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "pyterrier_msft.reranker.train", lambda network, encoder, groups, *args, **kwargs: trained.append(groups)
    )
    before = results.copy(deep=True), qrels.copy(deep=True)
    ce = outcome(lambda: scorer.clone().fit(results, qrels, fitter=SHORT))
    assert_frame_equal(results, before[0])
    assert_frame_equal(qrels, before[1])
    if ce is None:
        assert not trained
        return
    groups = trained[0]
    found = {qid: (q, y.tolist()) for qid, q, y in zip(groups.qids, groups.queries, groups.labels, strict=True)}
    assert found == learnable(results, qrels)
    assert ce.data_report.groups == len(found)
    taught = outcome(lambda: scorer.clone().fit(results, fitter=Distillation(teacher=results.iloc[::-1])))
    assert taught is None or all(len(set(labels.tolist())) > 1 for labels in trained[1].labels)


def test_a_folder_is_left_alone(tmp_path, scorer):
    """A cache that was broken off while it was made is no hindrance."""
    pytest.importorskip("pyterrier_caching")
    scorer.cached(tmp_path)(RESULTS.head(8))
    shutil.rmtree(next(tmp_path.iterdir()))
    (tmp_path / "tmp123").mkdir()
    assert len(scorer.cached(tmp_path)(RESULTS.head(8))) == 8
