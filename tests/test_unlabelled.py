"""Queries made from a corpus, and a teacher that needs no LLM."""

import re
import unicodedata

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModel, AutoTokenizer

from pyterrier_msft import Distillation, MonoCE
from pyterrier_msft.unlabelled import BiEncoder, make_queries

CORPUS = [
    {"docno": "a", "title": "Sorting arrays, quickly", "text": "Quicksort sorts. It is fast on average."},
    {"docno": "b", "title": "", "text": "Yes. How to draw a random sample? Use a generator."},
    {"docno": "c", "text": "A file is read line by line"},
    {"docno": "d", "title": None, "text": "Too short."},
    {"docno": "e", "title": "Sorting arrays: quickly!", "text": "Again."},
    {"docno": "f", "title": "x", "text": "word " * 40},
]


def test_queries_are_titles_or_first_sentences():
    made = make_queries(CORPUS, n=10).set_index("qid")["query"].sort_index()
    assert made.to_dict() == {
        "made-a": "Sorting arrays quickly",
        "made-b": "How to draw a random sample",
        "made-c": "A file is read line by line",
    }
    without_titles = make_queries(CORPUS, n=10, title_field=None).set_index("qid")["query"]
    assert without_titles["made-a"] == "It is fast on average"


@pytest.mark.parametrize("title", ["St. Louis Cardinals win the World Series", "What is AI? A short guide"])
def test_a_title_is_used_as_a_whole(title):
    made = make_queries([{"docno": "a", "title": title, "text": "Some other text follows."}], n=10)
    assert made["query"].item().split() == re.findall(r"\w+", title)


def test_a_sample_of_queries_depends_on_the_seed():
    corpus = [{"docno": str(i), "text": f"this is document {i}"} for i in range(100)]
    first, again, other = (make_queries(corpus, n=10, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert len(first) == 10
    assert set(first["qid"]) != set(other["qid"])


def test_a_corpus_without_sentences_is_refused():
    with pytest.raises(ValueError, match="corpus must have sentences of 3 to 32 words in 'body'; got none"):
        make_queries(CORPUS, n=10, text_field="body", title_field=None)
    with pytest.raises(ValueError, match="n must be a positive integer; got 0"):
        make_queries(CORPUS, n=0)


def test_queries_keep_accents_and_vowel_signs():
    titles = {
        "hi": "हिन्दी भाषा का इतिहास",
        "bn": "বাংলা ভাষা আন্দোলন কী",
        "fr": unicodedata.normalize("NFD", "Résumé de théorie générale"),
        "fa": "می\u200cخواهم به خانه بروم",
    }
    made = make_queries([{"docno": docno, "title": title} for docno, title in titles.items()], n=10)
    assert made.set_index("qid")["query"].to_dict() == {f"made-{docno}": title for docno, title in titles.items()}


def test_sentences_without_spaces_or_latin_full_stops():
    texts = {
        "hi": "नहीं। यह दूसरा वाक्य है। और",
        "ja": "短い。これは二番目の文です。三番目。",
        "th": "ประวัติศาสตร์ของประเทศไทย",
        "zh": "检索。信息检索的历史和方法！完",
        "short": "信息检索",
        "long": "信" * 66,
    }
    made = make_queries([{"docno": docno, "text": text} for docno, text in texts.items()], n=10)
    assert made.set_index("qid")["query"].to_dict() == {
        "made-hi": "यह दूसरा वाक्य है",
        "made-ja": "これは二番目の文です",
        "made-th": texts["th"],
        "made-zh": "信息检索的历史和方法",
    }


def test_documents_with_the_same_docno_give_one_query():
    corpus = [{"docno": docno, "text": f"{docno} {i} is a text"} for i, docno in enumerate("aab")]
    assert sorted(make_queries(corpus, n=10)["qid"]) == ["made-a", "made-b"]


@pytest.fixture
def results(test_part) -> pd.DataFrame:
    return test_part.results.head(24)


def test_the_bi_encoder_adds_cosine_and_first_stage(backbone, results):
    tokenizer, model = AutoTokenizer.from_pretrained(backbone), AutoModel.from_pretrained(backbone).eval()

    def embed(text):
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach().numpy()
        mean = states.mean(0)
        return mean / np.linalg.norm(mean)

    cosine = pd.Series([embed(q) @ embed(t) for q, t in zip(results["query"], results["text"], strict=True)])
    parts = [cosine, results["score"].reset_index(drop=True)]
    z = [part.groupby(results["qid"].to_numpy()).transform(lambda x: (x - x.mean()) / x.std()) for part in parts]
    scored = BiEncoder(backbone, first_stage_weight=0.5, device="cpu")(results)
    np.testing.assert_allclose(scored["score"], z[0] + 0.5 * z[1], atol=0.05)  # bfloat16 where there is hardware for it
    assert (scored[scored["rank"] == 0].set_index("qid")["score"] == scored.groupby("qid")["score"].max()).all()
    assert not len(BiEncoder(backbone)(results.head(0)))


@pytest.mark.parametrize(
    ("verbose", "terminal", "shown"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_progress_of_the_bi_encoder(backbone, results, monkeypatch, capsys, verbose, terminal, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    BiEncoder(backbone, device="cpu", verbose=verbose)(results)
    assert ("BiEncoder" in capsys.readouterr().err) == shown


def test_a_re_ranker_is_trained_on_the_bi_encoders_ranking(backbone, train_part):
    teacher = BiEncoder(backbone, device="cpu")
    given, taught = (
        MonoCE(backbone, max_length=24, dtype="float32", device="cpu").fit(
            train_part.results, fitter=Distillation(teacher=form, depth=8, learning_rate=1e-2, max_steps=3)
        )
        for form in (teacher, teacher(train_part.results))
    )
    assert given.data_report.groups == 64
    assert given.fingerprint == taught.fingerprint
