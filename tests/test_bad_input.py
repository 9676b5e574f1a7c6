"""A test for each row of docs/bad-input.md, and property tests of `fit` and `transform` on arbitrary frames."""

import importlib.util
import itertools
import json
import logging
import re
import shutil
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import WORDS, make_part, run_together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir_measures import RR, nDCG
from pandas.testing import assert_frame_equal
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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

from pyterrier_msft import (
    Contrastive,
    Distillation,
    MonoCE,
    Stage,
    explain,
    fit_grid,
    fit_sequences,
    losses,
    report,
    teachers,
)
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.data.validation import validation_frames
from pyterrier_msft.fitting import prepare_stage
from pyterrier_msft.sequences import _parse_sequence

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"
NAN = float("nan")
PART = make_part("tr", n_queries=8, seed=1)
RESULTS, QRELS = PART.results, PART.qrels
LENGTH = 23  # with room for 20 tokens: if it were odd, Hugging Face would round the other way
SHORT = Contrastive(n_negatives=3, max_steps=1, warmup=0, learning_rate=1e-2, batch_size=4)


def row(test: Any) -> Any:
    """Mark the test of a row of the page."""
    test.row = test.__name__.removeprefix("test_")
    return test


def test_page_and_tests_name_each_other():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == {test.row for test in globals().values() if hasattr(test, "row")}


@pytest.fixture(scope="module")
def scorer(backbone) -> MonoCE:
    """Return a re-ranker that isn't trained in the tests and doesn't warn about it."""
    ce = MonoCE(backbone, max_length=LENGTH, dtype="float32", device="cpu")
    assert ce.cross_encoder.head_is_new  # loads the model
    ce.cross_encoder.head_is_new = False
    return ce


@pytest.fixture
def new(scorer) -> MonoCE:
    """Return a re-ranker to train."""
    return scorer.clone()


def rejects(match: str, *data: Any, fitter: Any = SHORT, **settings: Any) -> None:
    """Check that `fit` raises this error before it loads the model, which doesn't exist."""
    with pytest.raises(ValueError, match=match):
        MonoCE("nobody/nothing", **settings).fit(*data, fitter=fitter)


def prepare(results: Any, qrels: Any, fitter: Any = SHORT) -> tuple[Groups, DataReport, list[str]]:
    """Return the groups that a fitter makes of the data, its report and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = prepare_stage(fitter, results, qrels, TextSource("text"), verbose=False)
    (part,) = data.parts
    return part.groups, part.report, [str(w.message) for w in caught if w.category is UserWarning]


def same_groups(results: pd.DataFrame, qrels: pd.DataFrame | None, fitter: Any = SHORT) -> None:
    """Check that these data give the same groups as RESULTS and QRELS, without a warning."""
    expected, _, _ = prepare(RESULTS, QRELS, fitter=fitter)
    groups, report, messages = prepare(results, qrels, fitter=fitter)
    assert len(groups) == len(expected) == report.queries
    assert groups.texts == expected.texts or sorted(groups.texts) == sorted(expected.texts)
    assert [x.tolist() for x in groups.labels] == [x.tolist() for x in expected.labels]
    assert not messages


def numbered(frame: pd.DataFrame, kind: Any) -> pd.DataFrame:
    """Return the frame with the qids tr0, tr1, … as numbers of a kind."""
    return frame.assign(qid=frame["qid"].str.removeprefix("tr").astype(int).astype(kind).array)


# ---- frames


@row
@pytest.mark.parametrize("column", ["qid", "docno", "query", "text"])
def test_missing_columns(column):
    rejects(f"must have .*{column}.*; got", RESULTS.drop(columns=column), QRELS)
    with pytest.raises(pt.validate.InputValidationError) as caught:
        MonoCE("nobody/nothing")(RESULTS.drop(columns=column))
    assert re.search(f"results must have the columns .*'{column}'.*; got", caught.value.__notes__[0])
    assert ("Put dataset.text_loader() before MonoCE" in caught.value.__notes__[0]) == (column == "text")
    if column in QRELS:
        rejects("qrels must have the columns", RESULTS, QRELS.drop(columns=column))


@row
def test_renamed_columns():
    other = QRELS.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    rejects("Rename them: .*'query_id': 'qid', 'doc_id': 'docno', 'relevance': 'label'", RESULTS, other)
    rejects("Rename them: .*'doc_id': 'docno'", RESULTS.rename(columns={"docno": "doc_id"}), QRELS)


@row
def test_ids_in_the_index():
    rejects(r"The index has 'qid', 'docno': call \.reset_index\(\)", RESULTS.set_index(["qid", "docno"]), QRELS)


@row
def test_duplicate_columns(scorer):
    twice = pd.concat([RESULTS, RESULTS[["text"]]], axis=1)
    rejects("training results must have one column 'text'; got 2", twice, QRELS)
    with pytest.raises(ValueError, match="results must have one column 'text'; got 2"):
        scorer(twice)


@row
def test_topics_as_results():
    topics = RESULTS[["qid", "query"]].drop_duplicates()
    rejects(r"got \['qid', 'query'\]. These look like topics", topics, QRELS)
    with pytest.raises(pt.validate.InputValidationError) as caught:
        MonoCE("nobody/nothing")(topics)
    assert "These look like topics" in caught.value.__notes__[0]


@row
def test_swapped_arguments():
    rejects("These look like qrels: check the order of the arguments", QRELS, RESULTS)
    rejects("These look like results: check the order of the arguments", RESULTS, RESULTS)
    rejects("These look like qrels: check the order of the arguments", RESULTS, QRELS, QRELS, RESULTS)


@row
def test_not_a_data_frame(scorer):
    rejects("training results must be a data frame or a run.s path; got dict", {"qid": ["q"]}, QRELS)
    rejects("qrels must be a data frame; got list", RESULTS, [("q", "d", 1)])
    rejects("qrels is required by Contrastive; got None", RESULTS)
    rejects("validation qrels are required with validation results; got None", RESULTS, QRELS, RESULTS)
    rejects("validation results are required with validation qrels; got None", RESULTS, QRELS, None, QRELS)
    with pytest.raises(ValueError, match="results must be a data frame; got NoneType"):
        scorer.transform(None)


@row
def test_empty_results():
    out = MonoCE("nobody/nothing")(RESULTS.head(0))
    assert {"score", "rank"} <= {*out.columns}
    assert not len(out)
    rejects("0 of 0 queries do: the results are empty", RESULTS.head(0), QRELS)
    rejects("0 of 0 queries do: the results are empty", RESULTS.head(0), None, fitter=Distillation())


@row
def test_no_matching_qids():
    other = QRELS.assign(qid="x" + QRELS["qid"])
    rejects("0 of 8 queries .*: the qids don't match, e.g. 'tr0' in the results and 'xtr0'", RESULTS, other)
    rejects("0 of 8 queries .*: there are no rows in the qrels", RESULTS, QRELS.head(0))
    report, messages = prepare(RESULTS, QRELS.head(3))[1:]
    assert (report.without_relevant, report.unjudged) == (5, 5)
    assert messages == ["Contrastive dropped 5 of 8 queries without a relevant document (5 of them not in the qrels)"]


@row
@pytest.mark.parametrize("kind", [int, float, str, "category", object, "Int64"])
def test_id_types(kind):
    for results, qrels in ((RESULTS, numbered(QRELS, kind)), (numbered(RESULTS, kind), QRELS)):
        text = results.assign(qid=results["qid"].astype(str).str.removeprefix("tr").str.removesuffix(".0"))
        same_groups(text if results is RESULTS else results, qrels if results is RESULTS else numbered(qrels, str))
    teacher = numbered(RESULTS, kind)[["qid", "docno", "score"]]
    assert len(prepare(numbered(RESULTS, str), None, fitter=Distillation(teacher=teacher))[0]) == 8
    frame, labels = validation_frames(numbered(RESULTS, str), numbered(QRELS, kind), TextSource("text"))
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
    rejects(f"{column} is required in every row; 1 of 64 rows have none", frame, QRELS)
    rejects(f"{column} is required in every row; 1 of 64 rows have none", RESULTS, QRELS, frame, QRELS)
    with pytest.raises(ValueError, match=f"{column} is required in every row; 1 of 64 rows have none"):
        scorer(frame)


@row
def test_duplicate_rows(scorer):
    twice = pd.concat([RESULTS, RESULTS.head(2)])
    once = scorer(RESULTS)["score"].tolist()
    np.testing.assert_allclose(scorer(twice)["score"], [*once, *once[:2]], atol=1e-6)
    groups, report, messages = prepare(twice, QRELS)
    assert (groups.digest(), report.duplicates) == (prepare(RESULTS, QRELS)[0].digest(), 2)
    assert messages == ["Contrastive dropped 2 duplicate results"]


@row
def test_several_queries_per_qid(scorer):
    frame = RESULTS.copy()
    frame.loc[3, "query"] = "w99"
    assert scorer(frame)["score"].tolist()[4:] == scorer(RESULTS)["score"].tolist()[4:]
    assert scorer(frame)["score"][3] != scorer(RESULTS)["score"][3]
    groups, report, messages = prepare(frame, QRELS)
    assert (groups.queries[0], report.several_queries) == (RESULTS["query"][0], 1)
    assert messages == ["Contrastive found 1 qid with several queries: the best-ranked document's is used"]


@row
def test_several_texts_per_docno(scorer):
    frame = RESULTS.head(16).assign(docno=["a", "b", "c", "d", "e", "f", "g", "h"] * 2)
    assert scorer(frame)["score"].tolist() == scorer(RESULTS.head(16))["score"].tolist()
    groups, _, _ = prepare(frame, pd.DataFrame([("tr0", "b", 1), ("tr1", "b", 1)], columns=["qid", "docno", "label"]))
    assert [groups.text(documents) for documents in groups.documents] == [
        frame["text"][:8].tolist(), frame["text"][8:].tolist(),
    ]  # fmt: skip


@row
@pytest.mark.parametrize("kind", ["category", object, "string", "string[pyarrow]"])
def test_column_dtypes(kind, scorer):
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


def test_any_index_with_a_text_source(scorer):
    ce = scorer.clone()
    ce.text = pt.apply.generic(lambda frame: frame.reset_index(drop=True).assign(text=RESULTS["text"].tolist()))
    found = RESULTS.drop(columns="text").set_axis(range(100, 100 + len(RESULTS)))
    assert_frame_equal(ce(found).reset_index(drop=True), scorer(RESULTS), atol=1e-6, check_like=True)
    assert ce(found).index.equals(found.index)


def test_texts_of_topics_are_not_those_of_documents(scorer):
    texts = RESULTS["text"].tolist()
    ce = scorer.clone()
    ce.text = pt.apply.generic(lambda frame: frame.assign(text=texts))
    found = RESULTS.assign(text="narrative of " + RESULTS["qid"].astype(str))
    assert_frame_equal(ce(found), scorer(RESULTS), atol=1e-6, check_like=True)


def test_texts_for_a_query_in_another_order(scorer):
    rows = [("a", "w1", "d", "w1 w2"), ("b", "w3", "d", "w3 w4"), ("b", "w3", "e", "w5 w6")]
    found = pd.DataFrame(rows, columns=["qid", "query", "docno", "text"])
    ce = scorer.clone()
    ce.text = pt.apply.generic(lambda frame: frame.merge(found[["qid", "docno", "text"]]).iloc[::-1])
    assert_frame_equal(ce(found.drop(columns="text")), scorer(found), atol=1e-6, check_like=True)


def test_ranks_order_equal_scores():
    same_groups(RESULTS.assign(score=1.0).sample(frac=1, random_state=0), QRELS)


# ---- texts


@row
@pytest.mark.parametrize("missing", [None, NAN, pd.NA, "", " \t"])
def test_missing_text(missing, scorer, tmp_path):
    frame = RESULTS.astype({"text": object})
    gone = RESULTS.index[RESULTS["quality"] == 0][[0, 9]]
    frame.loc[gone, "text"] = missing
    empty = RESULTS.assign(text=RESULTS["text"].where(~RESULTS.index.isin(gone), ""))
    for transformer in (scorer, scorer.cached(tmp_path)):
        with pytest.warns(UserWarning, match="2 of 64 rows to score have no 'text'") as caught:
            out = transformer(frame)
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        with pytest.warns(UserWarning, match="rows to score have no 'text'"):
            np.testing.assert_allclose(out["score"], scorer(empty)["score"], atol=1e-6)
    groups, report, messages = prepare(frame, QRELS)
    assert (report.without_text, len(groups.text(groups.documents[0]))) == (2, 7)
    assert messages == ["Contrastive dropped 2 documents without text"]
    rejects("0 of 8 queries .*: 64 documents have no text", RESULTS.assign(text=missing), QRELS)


@row
def test_unread_titles(scorer):
    titled = RESULTS.assign(title=[None if i % 4 == 0 else f"Title {i}" for i in range(len(RESULTS))])
    with pytest.warns(UserWarning, match=r"'title' that isn't read.*row\['title'\] \+ ' ' \+ row\['text'\]"):
        scorer(titled)
    assert "'title' that isn't read" in prepare(titled, QRELS)[2][0]
    joined = titled.assign(text=titled["title"].fillna("") + " " + titled["text"])
    of_topics = RESULTS.assign(title=RESULTS["query"])
    repeated = pd.concat([titled, titled[["title"]]], axis=1)
    for read in (joined, of_topics, titled.assign(title=""), repeated):
        with warnings.catch_warnings(action="error", category=UserWarning):
            scorer(read)


class TitledTexts:
    """A text source whose documents have titles."""

    def text_loader(self, fields):
        texts = RESULTS[["docno", "text"]].assign(title=[f"Title {i}" for i in range(len(RESULTS))])
        return pt.apply.generic(lambda frame: frame.merge(texts[["docno", *fields]], on="docno"))


title_and_text = TitledTexts().text_loader(["title", "text"])
with_titles = title_and_text >> pt.apply.text(lambda row: row["title"] + " " + row["text"])


@row
def test_unread_titles_of_a_source(scorer):
    without = RESULTS.drop(columns="text")
    with pytest.warns(UserWarning, match=r"text source has a field 'title' that isn't read.*text_loader\(fields="):
        found = scorer.apply_attributes(text=TitledTexts())(without)
    assert found["text"].tolist() == RESULTS["text"].tolist()
    with warnings.catch_warnings(action="error", category=UserWarning):
        found = scorer.apply_attributes(text=with_titles)(without)
    assert_frame_equal(found[["docno", "score"]], scorer(with_titles(without))[["docno", "score"]])


@row
def test_positives_in_another_form(backbone):
    fitter = Contrastive(n_negatives=3, add_missing_positives=True, max_steps=1)
    results = with_titles(RESULTS.drop(columns="text")).drop(columns="title").groupby("qid").head(4)
    passages = results.assign(docno=results["docno"] + "%p1")

    def messages(results, source):
        ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", text=source)
        with warnings.catch_warnings(record=True, action="always") as caught:
            ce.fit(results, QRELS, fitter=fitter)
        return [str(each.message) for each in caught if "another form" in str(each.message)]

    for others in (results, passages):
        (message,) = messages(others, TitledTexts())
        assert "of a sample of 32 documents, 32 have other texts" in message
    assert not messages(results, with_titles)
    of_others_only = pt.apply.generic(lambda frame: frame[~frame["docno"].isin(results["docno"])].assign(text="w1"))
    assert not messages(results, of_others_only)


@row
@pytest.mark.parametrize("missing", [None, NAN, pd.NA, ""])
def test_missing_query(missing, scorer):
    frame = RESULTS.astype({"query": object})
    frame.loc[frame["qid"] == "tr2", "query"] = missing
    with pytest.warns(UserWarning, match="8 of 64 rows to score have no 'query'; it is read as empty"):
        scorer(frame)
    groups, report, messages = prepare(frame, QRELS)
    assert (len(groups), report.without_query) == (7, 8)
    assert "tr2" not in groups.qids
    assert "8 documents with an empty query" in messages[0]
    rejects("0 of 8 queries .*: .* no query", frame.assign(query=missing), QRELS)


@row
def test_numbers_as_text(scorer):
    numbers, written = (
        RESULTS.assign(text=range(64), query=7),
        RESULTS.assign(text=[str(i) for i in range(64)], query="7"),
    )
    assert scorer(numbers)["score"].tolist() == scorer(written)["score"].tolist()
    assert prepare(numbers, QRELS)[0].digest() == prepare(written, QRELS)[0].digest()


@row
@pytest.mark.parametrize("value", [["w1", "w2"], {"text": "w1"}, b"w1", pd.Timestamp(0)])
def test_non_text_values(value, scorer):
    frame = RESULTS.assign(text=[value] * 64)
    kind = type(value).__name__
    rejects(f"column 'text' must contain text; got {kind}", frame, QRELS)
    with pytest.raises(ValueError, match=f"column 'text' must contain text; got {kind}"):
        scorer(frame)


@row
def test_very_long_text(scorer):
    long = RESULTS.head(8).assign(text=RESULTS["text"] + " w1" * 350_000)
    cut = RESULTS.head(8).assign(text=RESULTS["text"] + " w1" * 24)
    assert scorer(long)["score"].tolist() == scorer(cut)["score"].tolist()
    word = scorer(RESULTS.head(1).assign(text="x" * 1_000_000))
    assert np.isfinite(word["score"]).all()


@row
def test_very_long_query(scorer, new):
    long, cut = RESULTS.assign(query=" w9" * 10_000), RESULTS.assign(query=" w9" * 14)  # each text has 6 tokens
    with pytest.warns(UserWarning, match="^1 of 1 distinct queries to score are truncated: they exceed max_length=23"):
        found = scorer(long)["score"]
    assert found.tolist() == scorer(cut)["score"].tolist()
    assert scorer(long)["score"][:8].nunique() == 8  # the query doesn't displace the text
    new.fit(long, QRELS, fitter=SHORT)
    assert "100.0% of the queries are truncated (max_length, max_query_length)" in repr(new.data_report)


UNUSUAL = ["w1\x00w2", "w1 \ud800 w2", "\u202eמילה w1", "w1 🙂 w2", "e\u0301 \u200b", "\x07"]


@row
@pytest.mark.parametrize("text", UNUSUAL)
def test_unusual_characters(text, scorer, new, tmp_path):
    def with_text(text: str) -> pd.DataFrame:
        texts = [text if i == 2 else other for i, other in enumerate(RESULTS["text"].head(8))]
        return RESULTS.head(8).assign(query=pd.Series([text] * 8, dtype=object), text=pd.Series(texts, dtype=object))

    frame, expected = with_text(text), with_text(text.replace("\ud800", "?"))
    out = scorer(frame)
    assert out["score"].tolist() == scorer(expected)["score"].tolist()
    np.testing.assert_allclose(scorer.cached(tmp_path)(frame)["score"], out["score"], atol=1e-6)
    new.fit(frame, QRELS, fitter=SHORT)


class IncompleteTexts:
    """A text source without some of the documents."""

    def text_loader(self, fields):
        texts = RESULTS[["docno", *fields]].head(5)
        return pt.apply.generic(lambda frame: frame.merge(texts, on="docno"))


class ShuffledTexts:
    """A text source that returns the rows in another order."""

    def text_loader(self, fields):
        texts = RESULTS[["docno", *fields]]
        return pt.apply.generic(lambda frame: frame.merge(texts, on="docno").sample(frac=1, random_state=0))


@row
def test_text_loader_changes_the_order(scorer):
    without = RESULTS.drop(columns="text").set_axis([*range(100, 100 + len(RESULTS))])
    assert_frame_equal(
        scorer.apply_attributes(text=ShuffledTexts())(without)[["docno", "score"]],
        scorer(RESULTS.set_axis(without.index))[["docno", "score"]],
    )


class StringTexts:
    """A text source that converts ids to strings."""

    def text_loader(self, fields):
        texts = dict(zip(range(len(RESULTS)), RESULTS["text"], strict=True))
        return pt.apply.generic(
            lambda frame: frame.assign(text=[texts[i] for i in frame["docno"]], docno=frame["docno"].astype(str))
        )


def test_text_loader_converts_ids(scorer):
    numbered = RESULTS.assign(docno=range(len(RESULTS)))
    found = scorer.apply_attributes(text=StringTexts())(numbered.drop(columns="text"))
    assert found["score"].tolist() == scorer(numbered)["score"].tolist()


@row
def test_text_loader_drops_rows(scorer):
    without = RESULTS.drop(columns="text")
    rejects("text loader must keep all 64 rows of the results; got 5", without, QRELS, text=IncompleteTexts())
    with pytest.raises(ValueError, match="text loader must keep all 64 rows"):
        scorer.apply_attributes(text=IncompleteTexts())(without)
    with pytest.raises(ValueError, match="of the qrels with add_missing_positives=True"):
        adding = Contrastive(n_negatives=3, add_missing_positives=True)
        scorer.apply_attributes(text=IncompleteTexts()).fit(RESULTS, QRELS.assign(docno="nowhere"), fitter=adding)


# ---- orders and labels


@row
@pytest.mark.parametrize("value", [NAN, None, "high"])
def test_non_numeric_scores(value, scorer):
    frame = RESULTS.astype({"score": object})
    frame.loc[3, "score"] = value
    rejects("scores must be numeric; 1 of 64 isn't", frame, QRELS)
    assert scorer(frame)["score"].tolist() == scorer(RESULTS)["score"].tolist()  # the input's scores aren't read
    teacher = frame[["qid", "docno", "score"]]
    rejects("scores must be numeric; 1 of 64 isn't", RESULTS, None, fitter=Distillation(teacher=teacher))


@row
def test_infinite_scores(scorer):
    frame = RESULTS.assign(score=RESULTS["score"].replace({8.0: np.inf, 1.0: -np.inf}))
    same_groups(frame, QRELS)
    same_groups(frame, None, Distillation())
    rejects(
        "teacher scores must be finite numbers; 16 of 64 aren't", RESULTS, None,
        fitter=Distillation(teacher=frame.assign(score=frame["score"] ** 3), loss=losses.margin_mse),
    )  # fmt: skip


@row
def test_scores_that_are_not_probabilities():
    query = RESULTS["qid"].str.removeprefix("tr").astype(int)
    teacher = RESULTS.assign(score=(RESULTS["score"] / 8) ** (1 + query))  # the best has 1
    soft, message = losses.BinaryCrossEntropy(soft_labels=True), "teacher scores must be probabilities between 0 and 1"
    for options in ({"loss": losses.mse, "scale": "logit"}, {"loss": soft}):
        prepare(RESULTS, None, fitter=Distillation(teacher=teacher, **options))
        for wrong in (2.0, -0.1):
            other = teacher.assign(score=teacher["score"].replace({1.0: wrong}))
            fitter = Distillation(teacher=other, **options)
            rejects(f"{message}.*; 8 of 64 aren't, e.g. {wrong}", RESULTS, None, fitter=fitter)


@row
@pytest.mark.parametrize("first", [0, 1])
def test_ranks_from_0_or_1(first):
    ranked = RESULTS.drop(columns="score").assign(rank=RESULTS["rank"] + first)
    same_groups(ranked, QRELS)
    same_groups(ranked, None, Distillation())


@row
def test_no_score_or_rank():
    rejects("must have a score or a rank", RESULTS.drop(columns=["score", "rank"]), None, fitter=Distillation())
    same_groups(RESULTS.drop(columns=["score", "rank"]), QRELS)  # in the order of the rows


@row
def test_graded_negative_and_float_labels():
    rows = [("tr0", "tr0d0", 2.5), ("tr0", "tr0d1", -1), ("tr0", "tr0d2", 0.5), ("tr0", "tr0d3", 1)]
    groups, _, _ = prepare(RESULTS.head(8), pd.DataFrame(rows, columns=["qid", "docno", "label"]))
    assert groups.labels[0].tolist() == [2.5, 0, 0, 1, 0, 0, 0, 0]


def _subtopics_of_the_first(qrels, run):
    first = run.sort_values("score")["doc_id"].iloc[-1]
    return float(len(qrels.loc[qrels["doc_id"] == first]))


@row
def test_labels_of_subtopics(backbone, tmp_path):
    measure = ir_measures.define_byquery(_subtopics_of_the_first, name="Subtopics")
    measures = [measure, nDCG @ 5]
    part, topics = REPORT, REPORT_TOPICS
    labels = part.results[["qid", "docno"]].assign(label=0)
    parts = [part.results[["qid", "docno"]].sample(frac=0.4, random_state=k).assign(label=3 - k) for k in range(3)]
    qrels = pd.concat([each.assign(iteration=str(k)) for k, each in enumerate([*parts, labels])])
    highest = qrels.groupby(["qid", "docno"], as_index=False)["label"].max()
    systems = {"a": part.results, "b": REPORT_BETTER}

    def values(qrels, measure):
        return pt.Experiment([*systems.values()], topics, qrels, [measure])[str(measure)].tolist()

    expected = {str(measure): values(qrels, measure), "nDCG@5": values(highest, nDCG @ 5)}
    assert expected["Subtopics"] != values(highest, measure)
    with pytest.warns(UserWarning, match="with two labels"):
        page = report(systems, topics, qrels, measures, path=tmp_path / "page.html").read_text()
    for value in itertools.chain(*expected.values()):
        assert f"{value:.4f}" in page

    fitter = Contrastive(n_negatives=3, max_steps=2, metric=measure)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", fitter=fitter)
    ce.fit(RESULTS, QRELS, part.results, qrels)
    kept = ce.history.query("kept")["Subtopics"].item()
    assert kept == pytest.approx(pt.Experiment([ce(part.results)], topics, qrels, [measure])["Subtopics"].item())


@row
def test_scores_that_contradict_ranks(backbone):
    ranked = RESULTS.assign(rank=RESULTS.groupby("qid").cumcount())
    distances, scores = (ranked.assign(score=sign * ranked["rank"] * 2.0 + 1) for sign in (1, -1))
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu").fit(scores, QRELS, fitter=SHORT)
    calls = (
        lambda frame: prepare(frame, QRELS),
        lambda frame: ce.clone().fit(scores, QRELS, frame, QRELS, fitter=SHORT),
        lambda frame: ce.apply_attributes(interpolate=True).choose_weight(frame, QRELS),
        ce.apply_attributes(interpolate=1.0),
    )
    for call in calls:
        for frame in (distances, scores):
            with warnings.catch_warnings(record=True, action="always") as caught:
                result = call(frame)
            messages = [str(each.message) for each in caught] + (result[2] if call is calls[0] else [])
            assert any("the first stage's ranking has a rank and a score that" in m for m in messages) == (
                frame is distances
            )


@row
@pytest.mark.parametrize("value", [NAN, np.inf, "yes", None])
def test_non_numeric_labels(value):
    frame = QRELS.astype({"label": object})
    frame.loc[2, "label"] = value
    rejects("labels must be .*; 1 of 8 isn't", RESULTS, frame)


@row
def test_contradictory_qrels():
    both = pd.concat([QRELS, QRELS.head(2).assign(label=0), QRELS.tail(1)])
    groups, report, messages = prepare(RESULTS, both)
    assert (groups.digest(), report.judged_twice) == (prepare(RESULTS, QRELS)[0].digest(), 2)
    assert messages == ["Contrastive found 2 documents with two labels in the qrels: the higher one is used"]


@row
def test_min_relevance_above_every_label():
    rejects(
        "the highest label of these queries is 1; min_relevance is 2", RESULTS, QRELS,
        fitter=Contrastive(min_relevance=2),
    )  # fmt: skip


@row
def test_no_matching_docnos():
    other = QRELS.assign(docno="x" + QRELS["docno"])
    rejects("the docnos don't match, e.g. 'tr0d0' in the results and 'xtr0d", RESULTS, other)


@row
def test_no_relevant_document_found():
    other = QRELS.assign(docno=QRELS["docno"].to_numpy()[::-1])
    rejects("the first stage found no relevant document. Add them with add_missing_positives", RESULTS, other)


@row
def test_copies_of_positives():
    copy = RESULTS.merge(QRELS[["qid", "docno"]]).assign(docno=lambda frame: "copy of " + frame["docno"], score=0.0)
    groups, report, messages = prepare(pd.concat([RESULTS, copy.head(2)]), QRELS)
    assert groups.digest() == prepare(RESULTS, QRELS)[0].digest()
    assert report.copies_of_positives == 2
    assert messages == ["Contrastive dropped 2 documents with the text of a relevant document"]


@row
def test_no_negatives():
    only = RESULTS.merge(QRELS[["qid", "docno"]])
    rejects("there are relevant documents, but no others", only, QRELS)
    fitter = Contrastive(skip=99)
    rejects("to use as negatives, below the first 99 that skip=99 leaves out", RESULTS, QRELS, fitter=fitter)


@row
def test_fractional_validation_labels():
    rejects("validation labels must be whole numbers, .*; got 0.5", RESULTS, QRELS, RESULTS,
            QRELS.assign(label=0.5))  # fmt: skip


@row
def test_very_high_validation_labels():
    rejects("validation labels must be at most 10,000, which measures need; got 100,000,000", RESULTS, QRELS, RESULTS,
            QRELS.assign(label=10**8))  # fmt: skip


@row
def test_validation_without_a_relevant_document():
    start = "validation results must contain a relevant document; got none"
    dev = make_part("va", n_queries=2, seed=2)
    rejects(f"{start}: the qids don't match", RESULTS, QRELS, dev.results, QRELS)
    rejects(f"{start}: the docnos don't match", RESULTS, QRELS, dev.results, dev.qrels.assign(docno="x"))
    rejects(start, RESULTS, QRELS, dev.results.head(0), dev.qrels)
    rejects(start, RESULTS, QRELS, dev.results, dev.qrels.assign(label=0))


@row
def test_validation_shares_queries(new):
    with pytest.warns(UserWarning, match="2 validation queries are also training queries") as caught:
        new.fit(RESULTS, QRELS, RESULTS.head(16), QRELS, fitter=SHORT)
    assert {w.filename for w in caught if "validation" in str(w.message)} == {__file__}


@row
def test_shared_qids_of_other_queries(new):
    other = RESULTS.head(16).assign(query="something else")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new.fit(RESULTS, QRELS, other, QRELS, fitter=SHORT)
    assert not [w for w in caught if "also training queries" in str(w.message)]


@row
def test_unjudged_validation_queries(new):
    dev = make_part("va", n_queries=4, seed=2)
    with pytest.warns(UserWarning, match="validation leaves out 3 of 4 queries, which have no labels"):
        new.fit(RESULTS, QRELS, dev.results, dev.qrels.head(1), fitter=SHORT)


@row
def test_upside_down_teacher():
    teacher = RESULTS[["qid", "docno"]].assign(score=RESULTS["rank"])
    _, report, messages = prepare(RESULTS, None, fitter=Distillation(teacher=teacher))
    assert report.agreement == pytest.approx(-1)
    assert "the teacher's ranking looks upside down: its rank correlation with the first stage is -1.00" in messages[0]


@row
def test_teacher_without_overlap():
    for column in ("qid", "docno"):
        teacher = RESULTS.assign(**{column: "x" + RESULTS[column]})
        rejects(
            f"got none in common: the {column}s don't match, e.g. 'tr0.* in the results and 'xtr0", RESULTS, None,
            fitter=Distillation(teacher=teacher),
        )  # fmt: skip
    crossed = RESULTS.assign(docno=RESULTS["docno"].to_numpy()[::-1])
    rejects("qids and docnos match, but no document", RESULTS, None, fitter=Distillation(teacher=crossed))
    _, report, messages = prepare(RESULTS, None, fitter=Distillation(teacher=RESULTS.head(20)))
    assert (report.without_teacher, report.unranked_by_teacher) == (5, 4)
    assert "5 of 8 queries that the teacher didn't rank" in messages[0]


@row
def test_judge_without_scores(tmp_path):
    judge = RESULTS.assign(score=RESULTS["quality"] - RESULTS["score"] / 3)
    permutations = tmp_path / "permutations.jsonl"
    passages = [{"docno": f"d{i}", "text": "w1"} for i in range(3)]
    lines = [{"qid": f"tr{q}", "query": "w2", "passages": passages, "permutation": [2, 1, 3]} for q in range(8)]
    permutations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranks = RESULTS.drop(columns="score")
    for other, message in [
        (ranks, "judge must have scores; got scores that only restate its ranks"),
        (permutations, "judge must have scores; got scores that only restate its ranks"),
        (judge.assign(score=NAN), "scores must be numeric"),
        (judge.replace({"score": {judge["score"].max(): np.inf}}), "judge scores must be finite numbers; . of 64 "),
    ]:
        rejects(f"^{message}", RESULTS, QRELS, fitter=Contrastive(judge=other))


@row
def test_judge_without_overlap():
    judge = RESULTS.assign(score=RESULTS["quality"] - RESULTS["score"] / 3)
    for column in ("qid", "docno"):
        fitter = Contrastive(judge=judge.assign(**{column: "x" + judge[column]}))
        rejects(f"^judge must score documents of the results; got none in common: the {column}s don't match",
                RESULTS, QRELS, fitter=fitter)  # fmt: skip
    positives = judge["docno"].isin(QRELS["docno"])
    some = judge[~(positives & judge["qid"].isin(["tr0", "tr1"])) & (judge["qid"] != "tr2")]
    _, report, messages = prepare(RESULTS, QRELS, fitter=Contrastive(judge=some))
    assert (report.unjudged_positives, report.unjudged_negatives) == (3, 7)
    assert messages == [
        "Contrastive found 3 of 8 queries whose relevant documents the judge didn't score: margin has no effect there"
    ]


@row
def test_strict_judge():
    judge = RESULTS.assign(score=RESULTS["quality"] - RESULTS["score"] / 3)
    rejects("the judge scores all other documents .* like relevant ones, see margin",
            RESULTS, QRELS, fitter=Contrastive(judge=judge, margin=100))  # fmt: skip


@row
def test_uninformative_teacher():
    tied = RESULTS.assign(score=1.0)
    rejects("0 of 8 queries do: each has only one document, or all", tied, None,
            fitter=Distillation())  # fmt: skip
    half = RESULTS.assign(score=RESULTS["score"].clip(lower=4))
    report = prepare(half, None, fitter=Distillation())[1]
    assert report.tied_labels == pytest.approx(4 * 3 / (8 * 7))
    assert "21.4% of the teacher's pairs of documents are tied" in repr(report)


# ---- settings


@row
def test_class_as_fitter():
    with pytest.raises(ValueError, match=r"fitter must be an object; got the class Contrastive. Write Contrastive\(\)"):
        MonoCE(fitter=Contrastive)
    rejects("got the class Distillation", RESULTS, QRELS, fitter=Distillation)


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
        lambda: Contrastive(skip=-1),
        lambda: Contrastive(skip=None),
        lambda: Contrastive(n_random=True),
        lambda: Distillation(n_documents=0),
        lambda: Contrastive(seed=-1),
        lambda: Distillation(depth="20"),
        lambda: Distillation(dropout="0.1"),
        lambda: MonoCE(batch_size=True),
        lambda: MonoCE(max_length="256"),
        lambda: MonoCE(seed="a"),
        lambda: MonoCE().set_parameter("interpolate", -1),
        lambda: setattr(MonoCE(), "max_length", 0),
    ],
)
def test_invalid_settings(make):
    with pytest.raises(ValueError, match=r"must be a (positive|non-negative) (integer|number).*; got "):
        make()


@row
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SHORT + (SHORT >> Distillation()), "fitters must be single stages in a sum; got the sequence Contr"),
        (lambda: (SHORT >> Distillation()) + SHORT, "fitters must be single stages in a sum"),
        (lambda: 0.5 * (SHORT >> Distillation()), "fitters must be single stages in a sum"),
        (lambda: SHORT + 0 * Distillation(), "weight must be a positive number; got 0"),
        (lambda: -0.5 * SHORT, r"weight must be a positive number; got -0\.5"),
        (lambda: SHORT * NAN, "weight must be a positive number; got nan"),
        (lambda: "a" * SHORT, "weight must be a positive number; got 'a'"),
        (lambda: SHORT + 0.5, r"fitter must be e\.g\. Contrastive\(\) or .*; got 0\.5"),
        (lambda: SHORT + Distillation, r"got the class Distillation\. Write Distillation\(\)"),
        (lambda: SHORT + MonoCE("x/y"), r"fitter \+ must be followed by a fitter; got MonoCE\('x/y'\)"),
        (
            lambda: Contrastive(learning_rate=1e-4) + Distillation(learning_rate=2e-4),
            r"learning_rate must be the same in the parts of a sum; got 0\.0001 and 0\.0002\. Set it in one part",
        ),
        (lambda: SHORT.replace(metric=RR @ 10) + Distillation(metric=None), "metric must be the same in the parts"),
        (lambda: (SHORT + Distillation()).replace(skip=3), "settings must be those of Distillation; got 'skip'"),
    ],
)
def test_invalid_sums(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@row
@pytest.mark.parametrize("name", ["model", "dtype", "device", "seed", "template"])
def test_assigned_fixed_settings(scorer, name):
    with pytest.raises(AttributeError, match=name):
        setattr(scorer, name, "bfloat16")


@row
def test_invalid_sources():
    one = (RESULTS, QRELS)
    rejects("^qrels must be None where results are a list", [one], QRELS)
    rejects("^training results must have at least one source; got an empty list", [])
    rejects(r"^source 2 must be \(results, qrels\) or .*; got a tuple of 4", [one, (*one, 1, 2)])
    for weight in (0, -1, NAN, True, "2"):
        rejects("^source 1: weight must be a positive number; got", [(*one, weight), one])
    rejects("^source 2: qrels is required by Contrastive", [one, RESULTS])
    rejects(r"^source 2: training results must be a data frame or a run's path; got dict", [one, ({}, QRELS)])
    with pytest.raises(ValueError, match=r"^qrels must be None where results are a list"):
        Stage(SHORT, [one], QRELS)


@row
def test_impossible_sampling():
    for make, message in [
        (lambda: Contrastive(skip=100), "skip must be below depth=100; got 100"),
        (lambda: Contrastive(sample="hard"), "sample must be 'uniform', 'top' or 'log'; got 'hard'"),
        (lambda: Contrastive(sample="stratified"), "sample must be 'uniform', 'top' or 'log'; got 'stratified'"),
        (lambda: Contrastive(sample=["top"]), r"sample must be 'uniform', 'top' or 'log'; got \['top'\]"),
        (lambda: Distillation(n_documents=4, sample="log"), "sample must be .*'top_and_random'; got 'log'"),
        (lambda: Distillation(sample="top"), "n_documents is required by sample='top'; got None"),
        (lambda: Distillation(n_documents=1), "n_documents must be at least 2; got 1"),
        (lambda: Distillation(n_documents=32), "n_documents must be at most depth=20; got 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    Contrastive(skip=100, depth=None)
    Distillation(n_documents=32, depth=None)


@row
def test_invalid_grid():
    for grid, message in [
        ({"learningrate": [1e-4]}, r"must be those of Contrastive; got 'learningrate'\. Did you mean 'learning_rate'"),
        ({"lr": [1e-4]}, r"must be those of Contrastive; got 'lr'\. They are add_missing_positives, batch_size, "),
        ({"learning_rate": []}, r"grid must map 'learning_rate' to a non-empty list of values; got \[\]"),
        ({"learning_rate": 1e-4}, r"grid must map 'learning_rate' to a non-empty list of values; got 0\.0001"),
        ({}, "grid must map settings to lists of values; got {}"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_grid(MonoCE("nobody/nothing"), Stage(SHORT, RESULTS, QRELS), grid, validation=(RESULTS, QRELS))
    with pytest.raises(ValueError, match=r"got 'n_negative'\. Did you mean 'n_negatives'"):
        SHORT.replace(n_negative=3)


@row
def test_grid_scan_of_fitters(new):
    pipeline = pt.Transformer.from_df(RESULTS) >> new
    topics, fitters = RESULTS[["qid", "query"]].drop_duplicates(), [SHORT, SHORT.replace(n_negatives=2)]
    with pytest.raises(ValueError, match=r"fit is required after set_parameter\('fitter', .* pyterrier_msft\.fit_grid"):
        pt.GridScan(pipeline, {new: {"fitter": fitters}}, topics, QRELS, [RR @ 10])


@row
def test_ambiguous_sequences():
    stage = Stage(SHORT, RESULTS, QRELS)
    stages = dict.fromkeys(["a", "a-b", "b-c", "c", "lr=1e-05"], stage)
    assert _parse_sequence("lr=1e-05-a-b", stages) == ("lr=1e-05", "a-b")
    with pytest.raises(ValueError, match=r"got 'a-b-c', which may be 'a' then 'b-c', or 'a-b' then 'c'\. Rename"):
        fit_sequences(MonoCE("nobody/nothing"), stages, ["a-b-c"])


@row
def test_calibration_without_labels(new):
    pytest.importorskip("sklearn")
    for qrels, found in [(QRELS.assign(label=2), "only"), (QRELS, "none that is relevant")]:
        frame = RESULTS.merge(QRELS[["qid", "docno"]]) if found == "only" else RESULTS
        minimum = 1 if found == "only" else 2
        with pytest.raises(
            ValueError, match=f"calibration results must have relevant documents and others; got {found}"
        ):
            new.calibrate(frame, qrels, min_relevance=minimum)
    worst = new(RESULTS).sort_values("score").drop_duplicates("qid")[["qid", "docno"]].assign(label=1)
    for method in ("logistic", "isotonic"):
        with pytest.warns(UserWarning, match="relevant documents don't get higher scores than others: the means are"):
            new.calibrate(RESULTS, worst, method=method)
        np.testing.assert_allclose(new(RESULTS)["probability"], len(worst) / len(RESULTS))
    new.cross_encoder.head_is_new = True
    with pytest.raises(ValueError, match="calibrate needs a trained model; got MonoCE"):
        new.calibrate(RESULTS, QRELS)


@row
def test_weight_without_training(new):
    with pytest.raises(ValueError, match="results and qrels are required by choose_weight; got None"):
        new.choose_weight(None, None)
    with pytest.raises(ValueError, match="metric is required by choose_weight; got None"):
        new.choose_weight(RESULTS, QRELS, metric=None)
    with pytest.raises(ValueError, match="choose_weight results must contain a relevant document"):
        new.choose_weight(RESULTS, QRELS.assign(label=0))
    with pytest.raises(ValueError, match=r"choose_weight results must have the columns \['score'\]"):
        new.choose_weight(RESULTS.drop(columns="score"), QRELS)
    new.cross_encoder.head_is_new = True
    with pytest.raises(ValueError, match="choose_weight needs a trained model; got MonoCE"):
        new.choose_weight(RESULTS, QRELS)


@row
def test_diverged_weights(new):
    with pytest.raises(ValueError, match="loss must be finite"):
        new.fit(RESULTS, QRELS, fitter=SHORT.replace(learning_rate=1e30, max_steps=4))
    with pytest.raises(
        ValueError, match=r"at step 1 .* No weight has changed yet, so check the loss and the labels\. If an earlier"
    ):
        new.fit(RESULTS, QRELS, fitter=SHORT)


def best_documents(ce: MonoCE) -> pd.DataFrame:
    """Return qrels in which the document with the best score is relevant."""
    return ce(RESULTS).sort_values("score").drop_duplicates("qid", keep="last")[["qid", "docno"]].assign(label=1)


@row
def test_settings_after_calibrate(new, tmp_path):
    pytest.importorskip("sklearn")
    new.calibrate(RESULTS, best_documents(new)).save(tmp_path / "model")
    new.max_length = LENGTH - 1
    with pytest.raises(ValueError, match=r"max_length must be 23, as in calibrate; got 22\. Call calibrate again"):
        new(RESULTS)
    new.calibration = None
    assert "probability" not in new(RESULTS)
    load = {"device": "cpu", "dtype": "float32"}
    other = MonoCE.load(tmp_path / "model", text_field="title", **load)
    with pytest.raises(ValueError, match=r"text_field must be 'text', as in calibrate; got 'title'\. Call calibrate"):
        other(RESULTS.assign(title="w1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = MonoCE.load(tmp_path / "model", template="{query} w5 {text}", **load)
        with pytest.raises(ValueError, match="weights, tokenizer and template must be those of calibrate, with the"):
            other(RESULTS)
        other.calibration = None
        assert "probability" not in other(RESULTS)


@row
def test_calibration_rows(new):
    pytest.importorskip("sklearn")
    qrels = best_documents(new)
    expected = new.calibrate(RESULTS, qrels).calibration
    repeated = pd.concat([RESULTS.merge(qrels[["qid", "docno"]]), RESULTS])
    with pytest.warns(UserWarning, match="each document once, with its best score: 8 results are duplicates"):
        found = new.calibrate(repeated, qrels).calibration
    assert found.slope == pytest.approx(expected.slope)
    assert (found.documents, found.relevant) == (64, 8)
    with pytest.warns(UserWarning, match="calibrate left out 3 of 8 queries, which have no label. If they have no rel"):
        some = new.calibrate(RESULTS, qrels[3:]).calibration
    assert (some.queries, some.documents, some.relevant) == (5, 40, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        everything = new.calibrate(RESULTS, pd.concat([qrels[3:], qrels[:3].assign(label=0)])).calibration
    assert (everything.queries, everything.documents, everything.relevant) == (8, 64, 5)
    for minimum in (0, -1, NAN, "1"):
        with pytest.raises(ValueError, match=f"min_relevance must be a positive number; got {minimum!r}"):
            new.calibrate(RESULTS, qrels, min_relevance=minimum)


@row
@pytest.mark.parametrize("name", ["query", "docno", "score", 3])
def test_reserved_text_field(name):
    with pytest.raises(
        ValueError, match=r"text_field must be the name of a column of text; got .* Join several columns"
    ):
        MonoCE(text_field=name)


@row
def test_unavailable_device(backbone):
    with pytest.raises(ValueError, match="device must be a name like 'cpu' or 'cuda:0'; got 'gpu'"):
        MonoCE(device="gpu")
    rejects("device must be available; got 'cuda:99'", RESULTS, QRELS, device="cuda:99")
    with pytest.raises(ValueError, match="device must be available; got 'cuda:99'"):
        MonoCE(backbone, device="cuda:99")(RESULTS)


# ---- models


@pytest.fixture
def folder(backbone, tmp_path) -> Path:
    """Return the folder of a cross-encoder, for a test to damage."""
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def unusable(model: Any, match: str, **settings: Any) -> None:
    """Check that scoring with this model raises an error."""
    with pytest.raises(ValueError, match=match):
        MonoCE(model, max_length=24, device="cpu", **settings)(RESULTS)


def configure(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


@row
def test_missing_path(tmp_path):
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/no/such/model"):
        with pytest.raises(ValueError, match="model must be a model's folder or a name on the Hugging Face hub; got"):
            MonoCE(path)
    unusable("nobody/nothing", "got 'nobody/nothing'")
    rejects(
        "results must be a data frame or the path of a run",
        "none.trec",
        QRELS,
        text=IncompleteTexts(),
    )


@row
def test_missing_weights(folder, backbone):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    weights = {name: tensor for name, tensor in network.state_dict().items() if "layer.1" not in name}
    network.save_pretrained(folder, state_dict=weights)
    unusable(folder, "model must have all weights of its backbone; .* are missing")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    unusable(folder, "model must be loadable by AutoModelForSequenceClassification; got")
    (folder / "model.safetensors").unlink()
    unusable(folder, "model must be a folder with safetensors or the name of a model")


@row
def test_missing_files(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)
    unusable(folder, "model must have all its files; got .* without tokenizer.json. Copy the model again from where it")


@row
def test_replaced_weights(new, tmp_path):
    pytest.importorskip("sklearn")
    new.calibrate(RESULTS, best_documents(new)).save(tmp_path / "model")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    network.classifier.weight.data.mul_(-1)
    network.save_pretrained(tmp_path / "model")  # as another library does
    loaded = MonoCE.load(tmp_path / "model", device="cpu", dtype="float32")
    with (
        pytest.warns(UserWarning, match="model' has other weights or another tokenizer than when its history was save"),
        pytest.raises(ValueError, match="weights, tokenizer and template must be those of calibrate, with the finger"),
    ):
        loaded(RESULTS)
    loaded.calibration = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the warning comes once
        assert "probability" not in loaded(RESULTS)
        loaded.save(tmp_path / "model")
        assert len(MonoCE.load(tmp_path / "model")(RESULTS)) == len(RESULTS)


@row
def test_changed_backbone(new, folder, tmp_path):
    peft = pytest.importorskip("peft")
    new.save(tmp_path / "backbone")
    adapter = peft.LoraConfig(r=4, target_modules=["query", "value"])
    ce = MonoCE(tmp_path / "backbone", adapter=adapter, max_length=LENGTH, dtype="float32", device="cpu")
    ce.save(tmp_path / "adapter", merged=False)
    assert MonoCE.load(tmp_path / "adapter", seed=7).fingerprint  # another seed draws other weights, which aren't used
    shutil.copytree(folder, tmp_path / "backbone", dirs_exist_ok=True)
    loaded = MonoCE.load(tmp_path / "adapter", dtype="float32", device="cpu")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"backbone' must be the backbone as it was when the adapter .* got ano"):
            loaded(RESULTS)
    # Another version of transformers may read the same files in another way.
    record = json.loads((tmp_path / "adapter" / "msft.json").read_text())
    record["versions"]["transformers"] = "4.0.0"
    (tmp_path / "adapter" / "msft.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"has changed since the adapter was saved: .* than 4\.0\.0 did"):
        MonoCE.load(tmp_path / "adapter").fingerprint  # noqa: B018 loads the model


@row
def test_unsupported_adapters(backbone):
    peft = pytest.importorskip("peft")
    for adapter, match in (
        ({"r": 4}, r"adapter must be a peft configuration like LoraConfig\(r=16\); got dict"),
        (peft.PromptTuningConfig(num_virtual_tokens=2), "must be a peft configuration .* got PromptTuningConfig"),
        (
            peft.TrainableTokensConfig(token_indices=[5], target_modules=["word_embeddings"]),
            r"to train the head, too; got TrainableTokensConfig. Pass LoraConfig\(trainable_token_indices=\.\.\.\)",
        ),
        (peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1), "train the head, too; got AdaptionPromptConfig"),
        (
            peft.AdaLoraConfig(target_modules=["query"], total_step=20, tinit=2, tfinal=2),
            r"adapter must have fixed ranks, since fit .* got AdaLoraConfig. Pass LoraConfig\(r=\.\.\.\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            MonoCE(backbone, adapter=adapter)


@row
def test_loaded_adapter_configuration(backbone):
    peft = pytest.importorskip("peft")
    new, saved = (peft.LoraConfig(r=4, target_modules=["query"], inference_mode=mode) for mode in (False, True))
    fresh, loaded = (
        MonoCE(backbone, max_length=LENGTH, dtype="float32", device="cpu", adapter=adapter)
        .fit(RESULTS, QRELS, fitter=SHORT)
        for adapter in (new, saved)
    )  # fmt: skip
    assert loaded.fingerprint == fresh.fingerprint
    assert saved.inference_mode  # the caller's object stays as it was


@row
def test_unsupported_architecture(folder, backbone):
    ViTConfig().save_pretrained(folder)
    unusable(folder, "must be loadable by AutoModelForSequenceClassification; got")
    configure(folder, model_type="from-the-future")
    unusable(folder, "must be loadable by AutoModelForSequenceClassification; got")
    T5Config(num_layers=1, d_model=8, vocab_size=105).save_pretrained(folder)
    unusable(folder, "model must have all weights of its backbone")
    with pytest.raises(ValueError, match="model must be loaded by AutoModelForSequenceClassification; got BertModel"):
        MonoCE(AutoModel.from_pretrained(backbone))
    AutoModel.from_pretrained(backbone).save_pretrained(folder)
    modules = [{"type": f"sentence_transformers.base.modules.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    unusable(folder, "model must be loadable as a sentence-transformers CrossEncoder; got")


@row
def test_mismatched_shapes(folder):
    configure(folder, intermediate_size=48)
    unusable(folder, "must be loadable by AutoModelForSequenceClassification; got")


@row
def test_several_labels(backbone, folder):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
    network.save_pretrained(folder)
    match = (
        r"model must have one label \(a score\), or two .* got 3 labels in .* one of 'LABEL_0', 'LABEL_1', 'LABEL_2'"
    )
    unusable(folder, match)
    with pytest.raises(ValueError, match=match):
        MonoCE(network)
    for relevant in (3, -1, True, "LABEL_3", 1.5):
        unusable(folder, r"relevant must be an index below 3 or one of 'LABEL_0'.*; got", relevant=relevant)
    unusable(backbone, "relevant is for a classifier with several labels; got 1 with", relevant=1)


@row
def test_invalid_template(backbone):
    for template in ("{query}", "{query} {text} {text}", "", 1):
        with pytest.raises(ValueError, match=r"template must be a string with one \{query\} and one \{text\}; got"):
            MonoCE(backbone, template=template)
    with pytest.raises(ValueError, match="template is required with true='1', false='0'; got None"):
        MonoCE(backbone, true="1", false="0")
    with pytest.raises(ValueError, match="true must be a word or None; got 1"):
        MonoCE(backbone, template="{query} {text}", true=1, false=0)
    with pytest.raises(ValueError, match="true is required with false='no'; got None"):
        MonoCE(backbone, template="{query} {text}", false="no")
    unusable(
        backbone, "true and false are for a model that generates text; got 'a'", template="{query} {text}", true="a"
    )


@row
def test_pickled_weights(folder):
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    unusable(folder, "model must be a folder with safetensors or the name")


@row
def test_remote_code(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('this code ran')")
    configure(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    unusable(folder, "trust_remote_code must be True for .*, which brings code of its own; got False")


@row
def test_wrong_tokenizer(folder):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    unusable(folder, "tokenizer must have at most 50 tokens, .*; got 105")


def write_decoder(folder: Path, *, eos: str | None, appends_eos: bool = False, **tokens: str) -> str:
    """Write a tiny GPT-2, which has no padding token and, unless it appends one, no separator after a text."""
    words = ["<|end|>", "<|unk|>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|end|>", pair="$A <|end|> $B <|end|>", special_tokens=[("<|end|>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, padding_side="left", model_max_length=64, **tokens
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@row
@pytest.mark.parametrize("appends_eos", [False, True])
def test_no_padding_token(appends_eos, tmp_path):
    decoder = write_decoder(tmp_path / "gpt", eos="<|end|>", appends_eos=appends_eos, unk_token="<|unk|>")
    network = AutoModelForSequenceClassification.from_pretrained(decoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    frame = RESULTS.assign(text=[" ".join(text.split()[: 1 + i % 6]) for i, text in enumerate(RESULTS["text"])])
    with torch.inference_mode():  # one at a time, without padding
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
    unusable(write_decoder(tmp_path / "none", eos=None), "tokenizer must have a pad, eos or unk token")
    only_eos = write_decoder(tmp_path / "only", eos="<|end|>", appends_eos=True)
    unusable(only_eos, "tokenizer must have a pad, eos or unk token; got none that can be padding")


@row
def test_resized_model_in_memory(backbone):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    network.resize_token_embeddings(110)
    with pytest.raises(ValueError, match=r"as many embeddings as .*; got 110 in place of 105 in .*Save both"):
        MonoCE(network, max_length=24, dtype="float32", device="cpu")(RESULTS)


@row
def test_int8_of_a_decoder(tmp_path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("needs openvino")
    level = logging.getLogger().level
    with pytest.raises(ValueError, match=r"dtype must be 'float32' or .* GPT2ForSequenceClassification; got 'int8'"):
        MonoCE(write_decoder(tmp_path, eos="<|end|>"), max_length=24, dtype="int8", device="cpu")(RESULTS)
    assert logging.getLogger().level == level  # OpenVINO changes it, and leaves it so after an error


@row
def test_max_length_above_positions(backbone, tmp_path):
    for model, limit in ((backbone, 64), (write_decoder(tmp_path, eos="<|end|>"), 32)):
        with pytest.raises(ValueError, match=f"max_length must be at most {limit}, .*; got 65"):
            MonoCE(model, max_length=65, device="cpu")(RESULTS)


@row
def test_non_finite_scores(new):
    with torch.no_grad():
        new.cross_encoder.network.classifier.bias.fill_(NAN)
    with pytest.raises(ValueError, match="scores must be finite; 64 of 64 aren't"):
        new(RESULTS)


# ---- training

LONGER = {"n_negatives": 3, "batch_size": 2, "epochs": 8}


def warnings_of_fit(ce: MonoCE, *data: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce.fit(*data, fitter=Contrastive(**{**LONGER, **settings}))
    own = [w for w in caught if w.category is UserWarning]
    assert {w.filename for w in own} <= {__file__}
    return [str(w.message) for w in own]


@row
def test_learning_rate_too_high(new):
    with pytest.raises(ValueError, match=r"loss must be finite; got nan at step \d+ \(queries tr"):
        new.fit(RESULTS, QRELS, fitter=Contrastive(learning_rate=1e30, clip_norm=None, batch_size=2, epochs=4))


@row
def test_learning_rate_too_low(new):
    messages = warnings_of_fit(new, RESULTS, QRELS, learning_rate=1e-60)
    assert any("changed no weight" in message for message in messages)


@row
def test_suitable_learning_rate(new):
    assert warnings_of_fit(new, RESULTS, QRELS, learning_rate=1e-2) == []


@row
def test_collapsed_scores(new):
    with torch.no_grad():
        new.cross_encoder.network.classifier.weight.zero_()
    messages = warnings_of_fit(new, RESULTS, QRELS, learning_rate=1e-9)
    assert any("All documents of a query get nearly the same score" in message for message in messages)


@row
def test_new_head(backbone, tmp_path):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    cached = ce.cached(tmp_path)
    for transformer in (ce, cached, cached):
        with pytest.warns(UserWarning, match="gives random scores: its head is untrained") as caught:
            transformer(RESULTS)
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        with pytest.warns(UserWarning, match="gives random scores") as caught:
            (pt.Transformer.from_df(RESULTS) >> transformer)(RESULTS[["qid", "query"]].drop_duplicates())
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]


# ---- reports


@row
def test_report_arguments(tmp_path):
    topics = RESULTS[["qid", "query"]].drop_duplicates()
    never = pt.apply.generic(lambda topics: pytest.fail("a system was run"))
    data, rr = (topics, QRELS, [RR]), {"a": RESULTS, "b": never}
    for systems, match in (
        (RESULTS, r"systems must have the columns \['name', 'qid', 'measure', 'value'\]; got "),
        ([RESULTS, never], "systems must be a dictionary of at least two systems by name, or a data frame; got list"),
        ({"a": never}, r"systems must be .*; got \['a'\]"),
        ({"a": never, "b": {}}, "systems must have at least one seed each; got none for 'b'"),
        ({"a": never, "b": "bm25"}, "systems must be transformers or results frames; got str for 'b'"),
        ({"a": never, "b": topics}, "systems: the results of 'b' must have the columns"),
    ):
        with pytest.raises(ValueError, match=match):
            report(systems, *data, path=tmp_path / "page.html")
    for options, match in (
        ({"baseline": "c"}, r"baseline must be one of \['a', 'b'\]; got 'c'"),
        ({"margin": 0}, "margin must be a number > 0"),
        ({"alpha": 1}, "alpha must be between 0 and 0.5; got 1"),
        ({"rerankers": {"c": MonoCE()}}, r"rerankers must have the names of systems, \['a', 'b'\]; got 'c'"),
        ({"rerankers": {"b": 1}}, "rerankers must be MonoCE objects; got int for 'b'"),
        ({"path": tmp_path}, "path must be a file, e.g. .*; got the folder"),
    ):
        with pytest.raises(ValueError, match=match):
            report(rr, *data, **{"path": tmp_path / "page.html", **options})
    with pytest.raises(ValueError, match="qrels must have the columns"):
        report(rr, topics, topics, [RR], path=tmp_path / "page.html")
    assert not [*tmp_path.iterdir()]


REPORT, OTHERS = make_part("te", n_queries=12, seed=3), make_part("va", n_queries=8, seed=2)
REPORT_TOPICS = REPORT.results[["qid", "query"]].drop_duplicates()
REPORT_BETTER = REPORT.results.assign(score=REPORT.results["quality"] - REPORT.results["rank"] / 100)


@row
def test_report_of_other_queries(tmp_path):
    perquery = pt.Experiment(
        [REPORT.results, REPORT_BETTER], REPORT_TOPICS, REPORT.qrels, [RR], names=["a", "b"], perquery=True
    )
    others = OTHERS.results[["qid", "query"]].drop_duplicates()
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match=r"values for the 8 topics .*; got 12 other queries and 8 topics without"):
        report(perquery, others, OTHERS.qrels, [RR], baseline="a", path=path)
    fewer = perquery[~perquery["qid"].isin(REPORT_TOPICS["qid"].head(2))]
    with pytest.raises(ValueError, match=r"values for the 12 topics .*; got 0 other queries and 2 topics without"):
        report(fewer, REPORT_TOPICS, REPORT.qrels, [RR], baseline="a", path=path)
    with pytest.raises(ValueError, match=r"values for the 11 topics .*; got 1 other queries and 0 topics without"):
        report(perquery, REPORT_TOPICS.head(11), REPORT.qrels, [RR], baseline="a", path=path)
    with pytest.raises(ValueError, match=r"baseline is required with a frame of values, as pt\.Experiment sorts the"):
        report(perquery, REPORT_TOPICS, REPORT.qrels, [RR], path=path)
    assert not path.exists()
    assert report(perquery, REPORT_TOPICS, REPORT.qrels, [RR], baseline="a", path=path).is_file()


@row
def test_report_with_contradictory_qrels(tmp_path):
    clean = report(
        {"a": REPORT.results, "b": REPORT_BETTER},
        REPORT_TOPICS,
        REPORT.qrels,
        [nDCG @ 5],
        path=tmp_path / "clean.html",
        command="x",
    )
    both = pd.concat([REPORT.qrels, REPORT.qrels.head(5).assign(label=0), REPORT.qrels.tail(1)])
    with pytest.warns(UserWarning, match="qrels have 5 documents with two labels: the higher one is used"):
        page = report(
            {"a": REPORT.results, "b": REPORT_BETTER},
            REPORT_TOPICS,
            both,
            [nDCG @ 5],
            path=tmp_path / "both.html",
            command="x",
        )
    assert page.read_bytes() == clean.read_bytes()
    with pytest.raises(ValueError, match=r"labels must be whole numbers, which measures need; got 1\.5"):
        report(
            {"a": REPORT.results, "b": REPORT_BETTER},
            REPORT_TOPICS,
            REPORT.qrels.assign(label=1.5),
            [RR],
            path=tmp_path / "c.html",
        )


@row
def test_report_without_some_results(tmp_path):
    half = REPORT_BETTER[REPORT_BETTER["qid"].isin(REPORT_TOPICS["qid"].head(7))]
    match = "^systems: 'b', seed 3, has no results for 5 of 12 judged queries, e.g. 'te"
    systems = {"a": REPORT.results, "b": {3: half, 4: REPORT_BETTER}}
    with pytest.warns(UserWarning, match=match) as caught:
        report(systems, REPORT_TOPICS, REPORT.qrels, [RR], path=tmp_path / "page.html")
    assert sum("no results" in str(each.message) for each in caught) == 1


@row
def test_report_of_passages(tmp_path):
    passages = REPORT.results.assign(docno=REPORT.results["docno"] + "%p0")
    with pytest.warns(UserWarning, match="^systems: 'b' returns passages, .*pt.text.max_passage") as caught:
        report({"a": REPORT.results, "b": {3: passages, 4: passages}}, REPORT_TOPICS, REPORT.qrels, [RR],
               path=tmp_path / "page.html")  # fmt: skip
    assert sum("passages" in str(each.message) for each in caught) == 1


@row
def test_report_names_that_collide(tmp_path):
    systems = {1: REPORT.results, "1": REPORT_BETTER, "c": REPORT.results}
    with pytest.raises(ValueError, match="systems must have names that differ as text; got 1 and '1'"):
        report(systems, REPORT_TOPICS, REPORT.qrels, [RR], path=tmp_path / "page.html")
    perquery = pt.Experiment(
        [REPORT.results, REPORT_BETTER], REPORT_TOPICS, REPORT.qrels, [RR], names=["1", "0"], perquery=True
    )
    perquery["name"] = perquery["name"].astype(int)
    page = report(perquery, REPORT_TOPICS, REPORT.qrels, [RR], baseline=0, path=tmp_path / "page.html").read_text()
    assert "Differences from 0" in page


@row
@pytest.mark.parametrize("name", ["id", "query_id", "qid", "docno", "doc_ids", "passage-id", "queryId", "corpusid"])
def test_mined_ids(name):
    frame = pd.DataFrame({name: ["q1"], "query": ["what is x"], "positive": ["x is y"], "negative": ["no z"]})
    with pytest.raises(ValueError, match=f"dataset must have texts instead of ids; got the column '{name}'"):
        teachers.read_hard_negatives(frame)


@row
def test_mined_conflicts():
    texts = pd.DataFrame({"query": ["q"], "idea": ["x is y"], "grid": ["no z"]})
    assert len(teachers.read_hard_negatives(texts)[0]) == 2
    with pytest.warns(UserWarning, match="no passage of dataset has a space, e.g. 'd1'"):
        teachers.read_hard_negatives(pd.DataFrame({"query": ["q1"], "positive": ["d1"], "negative": ["d7"]}))
    scored = pd.DataFrame({"q": ["a b"] * 3, "passage": ["p q", "p q", "r s"], "score": [0.9, 0.1, 0.5]})
    with pytest.warns(UserWarning, match="dataset has 1 pair of a query and a passage with several scores: the first"):
        results, _ = teachers.read_hard_negatives(scored)
    assert results["score"].tolist() == [0.9, 0.5]
    labelled = scored.rename(columns={"score": "label"}).assign(label=[0, 1, 0])
    with pytest.warns(
        UserWarning, match="1 pair of a query and a passage with several labels: the highest one is used"
    ):
        _, qrels = teachers.read_hard_negatives(labelled)
    assert qrels["label"].tolist() == [1]


@row
def test_metric_without_a_value():
    nothing = ir_measures.define_byquery(lambda qrels, run: float("nan"), name="Nothing")
    with pytest.raises(ValueError, match="metric must have a value for the validation queries; got NaN of Nothing"):
        fit_grid(
            MonoCE("nobody/nothing"), Stage(SHORT, RESULTS, QRELS), {"n_negatives": [3]},
            validation=(OTHERS.results, OTHERS.qrels), metric=nothing,
        )  # fmt: skip


@row
def test_report_text(tmp_path):
    markup = "<script>alert('&amp;')</script>"
    marked = RESULTS.assign(query=markup, text=markup, score=-RESULTS["score"])
    topics = marked[["qid", "query"]].drop_duplicates()
    systems, path = {"a": RESULTS, markup: marked}, tmp_path / "page.html"
    page = report(systems, topics, QRELS, [RR], title=markup, description=markup, command=markup, path=path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;&amp;amp;&#39;)&lt;/script&gt;") > 10


# ---- explanations


@row
def test_explain_with_a_cutoff():
    scorer = pt.apply.doc_score(lambda row: 1.0)
    explain(scorer, RESULTS.head(1))
    with pytest.raises(ValueError, match=r"reranker must return every row; got 3 rows for 7\. Pass only the re-ranker"):
        explain(scorer % 3, RESULTS.head(1))
    with pytest.raises(ValueError, match="max_words must be"):
        explain(scorer, RESULTS, max_words=0)
    with pytest.raises(ValueError, match=r"reranker: its results must have the columns .*'score'.*; got"):
        explain(pt.Transformer.identity(), RESULTS.head(1).drop(columns="score"))
    with pytest.raises(ValueError, match=r"results must have the columns .*; got .*'body'"):
        explain(scorer, RESULTS.rename(columns={"text": "body"}))


# ---- caches


@row
def test_scorer_cache(new, tmp_path):
    caching = pytest.importorskip("pyterrier_caching")
    topics = RESULTS[["qid", "query"]].drop_duplicates()
    trap = caching.ScorerCache(tmp_path / "trap", new)
    before, start = trap(RESULTS)["score"], new.fingerprint
    (pt.Transformer.from_df(RESULTS) >> trap).fit(topics, QRELS)
    assert new.fingerprint == start  # not trained
    new.fit(RESULTS, QRELS, fitter=SHORT)
    assert trap(RESULTS)["score"].tolist() == before.tolist()  # the old scores
    assert not np.allclose(new(RESULTS)["score"], before)
    cached = new.cached(tmp_path / "cached")
    for _ in range(2):
        new.fitter = SHORT
        (pt.Transformer.from_df(RESULTS) >> cached).fit(topics, QRELS)
        np.testing.assert_allclose(cached(RESULTS)["score"], new(RESULTS)["score"], atol=1e-6)
    assert new.fingerprint != start


@row
def test_reused_experiment(new, tmp_path):
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
    assert measured("CL") == before == before_named != pytest.approx(now)  # the old scores
    name = f"CL {new.fingerprint}"
    assert measured(name) == pytest.approx(now)
    new.interpolate = 100.0  # not part of the fingerprint
    mixed = pt.Evaluate(new(RESULTS), QRELS, [RR @ 10])["RR@10"]
    assert measured(name) == pytest.approx(now) != pytest.approx(mixed)  # the old scores
    assert measured(f"{name} {new.interpolate}") == pytest.approx(mixed)
    assert len(set(names)) == 4


@row
def test_concurrent_cache(scorer, tmp_path):
    pytest.importorskip("pyterrier_caching")
    expected, found = scorer(RESULTS), []
    start = threading.Barrier(3)

    def work() -> None:
        cached = scorer.cached(tmp_path)
        start.wait()
        found.append(cached(RESULTS))

    run_together(*[work] * 3)
    assert len(found) == 3
    for out in found:
        assert_frame_equal(out, expected, atol=1e-6)
    assert len([*tmp_path.iterdir()]) == 1


# ---- arbitrary frames

ANY_QID = st.sampled_from(["q1", "q2", "q3", "q1 ", 1, 1.0, "1", 2])
ANY_DOCNO = st.sampled_from(["a", "b", "c", "d", "e%p0", " a", 7, 7.0])
ANY_TEXT = st.one_of(
    st.sampled_from(["w1 w2", "w3", "W4 w5 w6", "w7 " * 60, *UNUSUAL]),
    st.sampled_from([None, NAN, pd.NA, "", "  ", 5, 2.5]),
    st.text(max_size=8),
)
ANY_NUMBER = st.one_of(st.floats(-3, 3), st.sampled_from([1, 2, 2, "1.5", np.inf, -np.inf]))
INVALID = {
    "qid": [None, NAN], "docno": [pd.NA], "query": [["w1"], b"w1"], "text": [["w1"], {"a": 1}, pd.Timestamp(0)],
    "score": [NAN, "high", None], "rank": ["first", NAN], "label": [NAN, "yes", np.inf],
}  # fmt: skip
WARNINGS = [
    r"\d+ of \d+ rows to score have no ",
    r"\d+ of \d+ distinct queries to score are truncated",
    r"(Contrastive|Distillation) dropped \d+ ",
    r"(Contrastive|Distillation) found \d+ ",
    r"(Contrastive|Distillation) changed no weight",  # training is mocked
    r"the first stage's ranking has a rank and a score that contradict each other",
]  # all that may be raised


@st.composite
def frames(draw, columns: dict[str, st.SearchStrategy], needed: int) -> pd.DataFrame:
    """Draw a frame of these columns, sometimes with an invalid value, a missing column or other dtypes."""
    n = draw(st.integers(0, 8))
    data = {name: draw(st.lists(values, min_size=n, max_size=n)) for name, values in columns.items()}
    names = [*columns]
    if n and draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(names))
        data[name][draw(st.integers(0, n - 1))] = draw(st.sampled_from(INVALID[name]))
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
            continue  # a dtype that can't hold the values
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
    """Return the result, or None if an error explains what the input must be; let other errors pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, message = work(), None
        except pt.validate.InputValidationError as error:
            result, message = None, error.__notes__[0]
        except ValueError as error:
            result, message = None, str(error)
    assert message is None or re.search(r"\b(must|needs?|required)\b", message), message
    for warning in caught:
        if warning.category is UserWarning:
            assert any(re.match(pattern, str(warning.message)) for pattern in WARNINGS), warning.message
    return result


def read(text: Any) -> str:
    """Return a text as it should be read."""
    return "" if pd.isna(text) else str(text).encode("utf-8", "replace").decode()


@pytest.fixture(scope="module")
def plain(backbone, scorer, tmp_path_factory):
    """Return a function that scores a pair with plain transformers, one at a time."""
    folder = tmp_path_factory.mktemp("plain")
    scorer.cross_encoder.network.save_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = scorer.cross_encoder.tokenizer

    @cache
    def score(query: str, text: str) -> float:
        with torch.inference_mode():
            # As lists, because transformers drops an empty text of a single pair.
            pair = tokenizer([query], [text], truncation="longest_first", max_length=LENGTH, return_tensors="pt")
            return network(**pair).logits.item()

    return score


@FUZZ
@given(frame=RESULT_FRAMES)
def test_any_frame_is_scored_correctly_or_rejected(frame, scorer, plain, tmp_path_factory):
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


def expected_groups(results: pd.DataFrame, qrels: pd.DataFrame) -> dict[str, tuple[str, list[float]]]:
    """Compute by hand each query's text and the labels of its documents, sorted by score."""
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
def test_any_frame_is_trained_on_correctly_or_rejected(results, qrels, scorer, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "pyterrier_msft.fitting.train", lambda model, encoder, groups, *args, **kwargs: trained.append(groups)
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
    assert found == expected_groups(results, qrels)
    assert ce.data_report.groups == len(found)
    taught = outcome(lambda: scorer.clone().fit(results, fitter=Distillation(teacher=results.iloc[::-1])))
    assert taught is None or all(len(set(labels.tolist())) > 1 for labels in trained[1].labels)


def test_incomplete_cache_is_ignored(tmp_path, scorer):
    pytest.importorskip("pyterrier_caching")
    scorer.cached(tmp_path)(RESULTS.head(8))
    shutil.rmtree(next(tmp_path.iterdir()))
    (tmp_path / "tmp123").mkdir()
    assert len(scorer.cached(tmp_path)(RESULTS.head(8))) == 8
