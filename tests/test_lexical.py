"""BM25 on an index in memory."""

import math
import os
import pickle
import re
import sys
import warnings

import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_msft.lexical import BM25

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")

TEXTS = {
    "d1": "Sort an array, then sort another array.",
    "d2": "Sorts the rows of a table.",
    "d3": "Reads arrays from a file_name, and other things that have little to do with it.",
    "d4": "An unrelated text.",
    "d5": "An unrelated text.",
    "d6": "...",
}
DOCUMENTS = [{"docno": docno, "text": text} for docno, text in TEXTS.items()]
STEMS = {"sorts": "sort", "sorting": "sort", "arrays": "array", "rows": "row", "reads": "read", "things": "thing"}
STOP_WORDS = {"an", "a", "and", "then", "the", "of", "that", "to", "with", "it", "from", "other", "have", "do"}


@pytest.fixture
def bm25():
    return BM25(DOCUMENTS)


def terms(text):
    words = [word for word in re.findall("[a-z0-9]+", text.lower()) if word not in STOP_WORDS]
    return [STEMS.get(word, word) for word in words]


def score(query, docno, k1=0.9, b=0.4):
    """Compute Lucene's BM25 from its formula."""
    collection = {docno: terms(text) for docno, text in TEXTS.items()}
    mean_length = sum(map(len, collection.values())) / len(collection)
    document, total = collection[docno], 0.0
    for term in terms(query):
        df = sum(term in other for other in collection.values())
        idf = math.log(1 + (len(collection) - df + 0.5) / (df + 0.5))
        tf = document.count(term)
        total += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean_length))
    return total


@pytest.mark.parametrize(
    "query", ["sorting an array", "array", "Sort the FILE name", "unrelated text", "sort sort rows"]
)
def test_scores_are_those_of_the_formula(bm25, query):
    found = bm25.search(query)
    scores = {docno: score(query, docno) for docno in TEXTS}
    expected = sorted((docno for docno in TEXTS if scores[docno] > 0), key=lambda docno: -scores[docno])
    assert found["docno"].tolist() == expected
    assert found["score"].tolist() == pytest.approx([scores[docno] for docno in expected], rel=1e-5)
    assert found["rank"].tolist() == [*range(len(expected))]


def test_ties_are_in_the_order_of_the_documents(bm25):
    assert bm25.search("unrelated text")["docno"].tolist() == ["d4", "d5"]
    assert bm25.with_num_results(1).search("unrelated text")["docno"].tolist() == ["d4"]


def test_columns_and_rows_of_several_queries(bm25):
    topics = pd.DataFrame(
        {"qid": ["7", "8", "9"], "query": ["sort", "the?", "arrays"], "turn": [1, 2, 3]}, index=[4, 4, 2]
    )
    found = bm25(topics)
    assert found.columns.tolist() == ["qid", "query", "turn", "docno", "score", "rank"]
    assert found.index.tolist() == [*range(len(found))]
    assert found[["qid", "turn", "docno", "rank"]].to_numpy().tolist() == [
        ["7", 1, "d1", 0], ["7", 1, "d2", 1], ["9", 3, "d1", 0], ["9", 3, "d3", 1],
    ]  # fmt: skip
    alone = pd.concat([bm25(topics.iloc[[row]]) for row in range(3)], ignore_index=True)
    pd.testing.assert_frame_equal(found, alone)


@pytest.mark.parametrize("query", ["the", "", "?!", "zebra"])
def test_a_query_without_a_known_word_has_no_results(bm25, query):
    found = bm25(pd.DataFrame({"qid": ["1"], "query": [query]}))
    assert found.columns.tolist() == ["qid", "query", "docno", "score", "rank"]
    assert found.empty


def test_no_queries(bm25):
    some, none = bm25.search("sort"), bm25(pd.DataFrame({"qid": [], "query": []}, dtype=str))
    assert none.empty
    assert none.dtypes.to_dict() == some.dtypes.to_dict()


def test_a_cutoff_is_fused(bm25):
    cut = (bm25 % 1).compile()
    assert cut == bm25.with_num_results(1)
    assert cut != bm25
    topics = pd.DataFrame({"qid": ["1", "2"], "query": ["sort", "arrays"]})
    pd.testing.assert_frame_equal(cut(topics), (bm25 % 1)(topics))
    assert (bm25 % 500).compile() == bm25
    assert len({bm25, bm25.with_num_results(100), bm25.with_num_results(5)}) == 2
    assert bm25 != BM25(DOCUMENTS)


def test_pyterrier_knows_its_columns(bm25):
    pipeline = bm25 % 2 >> pt.apply.text(lambda row: TEXTS[row["docno"]])
    assert pt.inspect.transformer_inputs(bm25) == [["qid", "query"]]
    assert pt.inspect.transformer_outputs(pipeline, ["qid", "query"]) == [
        "qid", "query", "docno", "score", "rank", "text",
    ]  # fmt: skip
    with pytest.raises(KeyError, match="query"):
        bm25(pd.DataFrame({"qid": ["1"]}))
    with pytest.raises(KeyError, match="docno"):
        bm25(bm25.search("sort"))


def test_an_interrupted_save_leaves_the_old_index(bm25, tmp_path, monkeypatch):
    bm25.save(tmp_path / "index")
    rename, calls = os.rename, iter(range(9))

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        rename(*args)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        BM25(DOCUMENTS[:2]).save(tmp_path / "index")
    assert repr(BM25.load(tmp_path / "index")) == repr(bm25)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_is_saved_where_a_link_leads(bm25, tmp_path):
    bm25.save(tmp_path / "index")
    (tmp_path / "link").symlink_to("index")
    BM25(DOCUMENTS[:2]).save(tmp_path / "link")
    assert repr(BM25.load(tmp_path / "index")) == "BM25(<2 documents>, num_results=100)"
    assert (tmp_path / "link").is_symlink()


def test_saved_and_pickled_indexes_give_the_same_results(bm25, tmp_path):
    bm25.save(tmp_path / "new" / "index")
    topics = pd.DataFrame({"qid": ["1", "2"], "query": ["sorting", "arrays of files"]})
    for copy in (BM25.load(tmp_path / "new" / "index"), pickle.loads(pickle.dumps(bm25))):
        pd.testing.assert_frame_equal(copy(topics), bm25(topics))
        assert repr(copy) == repr(bm25) == "BM25(<6 documents>, num_results=100)"
    assert BM25.load(tmp_path / "new" / "index", num_results=1).search("sort")["docno"].tolist() == ["d1"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["index"]


def test_an_index_replaces_one_that_was_saved_and_nothing_else(bm25, tmp_path):
    bm25.save(tmp_path / "index")
    BM25(DOCUMENTS[:2]).save(tmp_path / "index")
    assert repr(BM25.load(tmp_path / "index")) == "BM25(<2 documents>, num_results=100)"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    (tmp_path / "index" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"folder must be new or hold only a saved index; got 'notes\.txt' in"):
        bm25.save(tmp_path / "index")
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine"
    assert repr(BM25.load(tmp_path / "index")) == "BM25(<2 documents>, num_results=100)"


def test_docnos_and_texts_of_any_language(tmp_path):
    documents = [{"docno": "ü,#\t1", "text": "Größe und Straße"}, {"docno": "文档", "text": "naïve café"}]
    BM25(iter(documents)).save(tmp_path / "index")
    bm25 = BM25.load(tmp_path / "index")
    assert bm25.search("GRÖSSE größe")["docno"].tolist() == ["ü,#\t1"]
    assert bm25.search("café")["docno"].tolist() == ["文档"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: BM25([{"docno": "1", "body": "a text"}]),
            r"documents must be dictionaries with docno and text; got \['docno'",
        ),
        (lambda: BM25(pd.DataFrame(DOCUMENTS)), "got 'docno'. Of a data frame, pass frame.to_dict"),
        (lambda: BM25([{"docno": 1, "text": "a text"}]), "docno and text must be strings; got 1, 'a text'"),
        (lambda: BM25([{"docno": "1", "text": None}]), "docno and text must be strings; got '1', None"),
        (lambda: BM25([]), "documents must have at least one word; got 0 documents"),
        (lambda: BM25([{"docno": "1", "text": "The?"}]), "documents must have at least one word; got 1 documents"),
        (lambda: BM25(DOCUMENTS, num_results=0), "num_results must be at least 1; got 0"),
        (
            lambda: BM25(DOCUMENTS)(pd.DataFrame({"qid": ["1", "2"], "query": ["sort", None]})),
            "query must be a string; 1 of 2 aren't",
        ),
    ],
)
def test_invalid_input_is_rejected(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_building_and_searching_print_and_log_nothing(tmp_path, capfd, caplog):
    bm25 = BM25(DOCUMENTS)
    bm25.save(tmp_path / "index")
    BM25.load(tmp_path / "index").search("sort")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_titles_that_are_not_indexed_are_reported():
    titled = [{**document, "title": f"Title of {document['docno']}"} for document in DOCUMENTS]
    with pytest.warns(UserWarning, match=f"titles that aren't indexed.*{len(titled)} of {len(titled)}"):
        BM25(titled)
    with warnings.catch_warnings(action="error"):
        BM25([{**document, "text": document["title"] + " " + document["text"]} for document in titled])


@pytest.mark.parametrize("name", ["bm25s", "Stemmer"])
def test_without_the_engine_an_error_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "pyterrier-msft\[demo\]"'):
        BM25(DOCUMENTS)


def test_a_repeated_docno_is_refused():
    documents = [{"docno": "a", "text": "one"}, {"docno": "b", "text": "two"}, {"docno": "a", "text": "three"}]
    with pytest.raises(ValueError, match=r"distinct docnos; got 3 documents with 2 docnos, e.g. 'a'"):
        BM25(documents)


@pytest.mark.parametrize(
    ("text", "query", "part"),
    [
        ("यह हिन्दी की किताब है", "किताब", "क"),  # vowel signs
        ("cafe\u0301 noir", "caf\u00e9", "e"),  # an accent in one character or two
        ("می\u200cخواهم بروم", "می\u200cخواهم", "می"),  # a joiner
    ],
)
def test_letters_keep_their_marks(text, query, part):
    bm25 = BM25([{"docno": "a", "text": text}, {"docno": "b", "text": "other words"}])
    assert bm25.search(query)["docno"].tolist() == ["a"]
    assert not len(bm25.search(part))
