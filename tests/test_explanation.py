import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import make_part

from pyterrier_msft import Contrastive, MonoCE, explain
from pyterrier_msft.lexical import BM25

PART = make_part("ex", n_queries=2, n_docs=2, seed=7)


@pytest.fixture(scope="module")
def ce(backbone, train_part) -> MonoCE:
    fitter = Contrastive(n_negatives=3, learning_rate=2e-2, max_steps=8, batch_size=8, dropout=0.0, warmup=0)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    return ce.fit(train_part.results, train_part.qrels, fitter=fitter)


def test_importance_is_the_fall_of_the_score_without_the_word(ce):
    words = explain(ce, PART.results)
    assert [*words.columns] == ["qid", "docno", "position", "word", "importance"]
    assert len(words) == 4 * 6
    for row in words.itertuples():
        document = PART.results[PART.results["docno"] == row.docno]
        before = document["text"].item().split()
        assert before[row.position] == row.word
        after = document.assign(text=" ".join(before[: row.position] + before[row.position + 1 :]))
        expected = ce(document)["score"].item() - ce(after)["score"].item()
        assert row.importance == pytest.approx(expected, abs=1e-4)
    assert words["docno"].drop_duplicates().tolist() == PART.results["docno"].tolist()
    assert words.groupby("docno")["position"].agg(list).tolist() == [[*range(6)]] * 4


def test_a_word_that_decides_the_score(ce):
    """The score counts one word; the re-ranker returns the rows in another order."""
    count = pt.apply.doc_score(lambda row: 2.0 * row["text"].split().count("apple"))
    shuffled = count >> pt.apply.generic(lambda frame: frame.sample(frac=1, random_state=0))
    results = pd.DataFrame({"qid": "1", "query": "fruit", "docno": ["a", "b"], "text": ["an  apple\npie", "a pear"]})
    words = explain(shuffled, results)
    assert words["word"].tolist() == ["an", "apple", "pie", "a", "pear"]
    assert words["docno"].tolist() == ["a"] * 3 + ["b"] * 2
    assert words["importance"].tolist() == [0, 2, 0, 0, 0]


def test_words_that_the_model_does_not_read(ce):
    text = " ".join([PART.results["text"][0]] * 10)  # 60 words, and max_length is 24
    words = explain(ce, PART.results.head(1).assign(text=text))
    assert words["importance"].iloc[30:].abs().max() < 1e-6
    assert words["importance"].iloc[:10].abs().min() > 0
    pd.testing.assert_frame_equal(explain(ce, PART.results.head(1).assign(text=text), max_words=10), words.head(10))


def test_interpolation_does_not_change_the_importance(ce):
    with_first_stage = ce.apply_attributes(interpolate=0.5)
    expected = explain(ce, PART.results)["importance"]
    np.testing.assert_allclose(explain(with_first_stage, PART.results)["importance"], expected, atol=1e-5)


def test_another_text_field_and_index(ce):
    expected = explain(ce, PART.results)
    renamed = PART.results.rename(columns={"text": "body"}).set_index(pd.Index([5, 5, 5, 5]))
    found = explain(ce.apply_attributes(text_field="body"), renamed.assign(text="of something else"))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("results", [PART.results.head(0), PART.results.head(1).assign(text="")])
@pytest.mark.filterwarnings("ignore:.*text")
def test_no_words(ce, results):
    words = explain(ce, results)
    assert [*words.columns] == ["qid", "docno", "position", "word", "importance"]
    assert not len(words)


def test_a_cache_by_docno_keeps_the_documents_apart(ce):
    """Such a cache returns a document's score whatever its text is now."""
    scores = {}

    def score(frame):
        missing = frame[[key not in scores for key in zip(frame["query"], frame["docno"], strict=True)]]
        scores.update(zip(zip(missing["query"], missing["docno"], strict=True), ce(missing)["score"], strict=True))
        return frame.assign(score=[scores[key] for key in zip(frame["query"], frame["docno"], strict=True)])

    numbered = PART.results.head(2).assign(docno=["0", "1"])
    cached = pt.apply.generic(score)
    for i in (1, 0):
        row = numbered.iloc[[i]]
        pd.testing.assert_frame_equal(explain(cached, row), explain(ce, row), atol=1e-4)
    np.testing.assert_allclose(cached(numbered)["score"], ce(numbered)["score"], atol=1e-4)


def test_a_pipeline_is_refused(ce):
    pytest.importorskip("bm25s")
    first = BM25([{"docno": "d", "text": "some text"}]) >> pt.apply.text(lambda row: "some text")
    for reranker, results, is_pipeline in (
        (first >> ce, PART.results, True),
        (ce.apply_attributes(interpolate=0.5), PART.results.drop(columns="score"), False),
    ):
        with pytest.raises(pt.validate.InputValidationError) as caught:
            explain(reranker, results)
        note = "explain needs only the re-ranker, without a first stage or a cutoff"
        assert (note in caught.value.__notes__) == is_pipeline


def test_re_rankers_of_different_fields_need_a_choice(ce):
    two = ce >> ce.apply_attributes(text_field="body")
    with pytest.raises(ValueError, match=r"text_field must be one of \['text', 'body'\]"):
        explain(two, PART.results.assign(body="some text"))
