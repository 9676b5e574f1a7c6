import gc
import os
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_msft import pydocs
from pyterrier_msft import pydocs_collection as collection
from pyterrier_msft.pydocs import PyDocs
from pyterrier_msft.pydocs_collection import PARTS, Docstring, Package

INSTALLED = pydocs.installed_packages()
needs_pisa = pytest.mark.skipif(find_spec("pyterrier_pisa") is None, reason="needs pyterrier_pisa")


def rest(topic):
    """Text that is long enough, and different for each topic."""
    return " ".join(f"Details on {topic} in chapter {number}." for number in range(12))


def function(name, summary, body=None):
    return f'def {name}():\n    """{summary}\n\n    {body or rest(name)}\n    """\n'


class Library:
    """Replaces the installed packages: a package `toy` in a temporary folder."""

    def __init__(self, folder):
        self.package = Package("toy-dist", "1.0", "toy", folder)

    def write(self, path, source):
        path = self.package.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())

    def build(self):
        return collection.build_collection([self.package])


@pytest.fixture
def library(tmp_path, monkeypatch):
    library = Library(tmp_path / "toy")
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pydocs, "installed_packages", lambda: (library.package,))
    return library


@pytest.fixture
def large(library):
    library.write("__init__.py", "\n".join(function(f"measure_{i}", f"Measure river number {i}.") for i in range(300)))
    return library


@pytest.fixture
def builds(monkeypatch):
    """The packages of each build of a collection."""
    builds, build = [], pydocs.build_collection
    monkeypatch.setattr(pydocs, "build_collection", lambda packages: builds.append(packages) or build(packages))
    return builds


# ---- reading sources


def test_docstrings_of_public_importable_names_are_read():
    source = b'''"""module"""
class Public:
    """class"""
    def method(self):
        """method"""
        def inner():
            """unreachable"""
    def __init__(self):
        """Initialize self."""
    def _private(self): "private"
class _Private:
    """private"""
    def method(self):
        """in a private class"""
try:
    async def coroutine(): "coroutine"
except ImportError:
    def fallback(): "fallback"
if True:
    def branch(): "branch"
def without(): pass
'''
    assert dict(collection.docstrings(source, "toy.mod")) == {
        "toy.mod": "module",
        "toy.mod.Public": "class",
        "toy.mod.Public.method": "method",
        "toy.mod.coroutine": "coroutine",
        "toy.mod.fallback": "fallback",
        "toy.mod.branch": "branch",
    }


def test_files_are_named_as_modules_and_tests_are_skipped(library):
    kept = ["__init__.py", "_private_file.py", "_core/sorting.py", "sub/__init__.py", "sub/latest.py"]
    skipped = ["tests/a.py", "test/a.py", "sub/test_a.py", "sub/a_test.py", "conftest.py", "_vendor/a.py", "a.txt"]
    for path in kept + skipped:
        library.write(path, "")
    names = [name for name, _ in collection.source_files(library.package)]
    assert sorted(names) == ["toy", "toy._core.sorting", "toy._private_file", "toy.sub", "toy.sub.latest"]
    without_prefix = [name for name, _ in collection.source_files(library.package._replace(module=""))]
    assert "sub.latest" in without_prefix
    assert "_private_file" in without_prefix


@pytest.mark.parametrize(
    ("docstring", "summary", "remainder"),
    [
        ("Sort an array.\n\nMore.", "Sort an array.", "More."),
        ("Sort an\narray in place.\nMore.", "Sort an array in place.", "More."),
        ("Sort an array\nParameters", "Sort an array", "Parameters"),
        ("Sort an array. It is stable.\nMore.", "Sort an array.", "It is stable. More."),
        ("Sort, e.g. Arrays, of\nnumbers. More\nof it.", "Sort, e.g. Arrays, of numbers.", "More of it."),
        ("Sort an array\n    by its values", "Sort an array", "by its values"),
        ("Sort.", "Sort.", ""),
    ],
)
def test_a_summary_is_the_first_sentence_even_if_wrapped(docstring, summary, remainder):
    assert tuple(" ".join(part.split()) for part in collection.split_summary(docstring)) == (summary, remainder)


def test_text_is_plain_and_on_one_line():
    marked = (
        "See :func:`~numpy.sort`, :py:meth:`sorts <x.sort>` and ``b``\n-------\n\x00\tC++ \u2028 n\u00e4her \ud800."
    )
    assert collection.clean(marked) == "See numpy.sort, sorts and b C++ näher ."


def test_normalising_ignores_case_punctuation_articles_and_final_s():
    assert collection.normalise("Returns the Sum, of an array!") == collection.normalise("return sums of arrays")
    assert collection.normalise("sum of x") != collection.normalise("sum of y")


@pytest.mark.parametrize(
    "summary",
    [
        "...",
        "Initialize self.",
        "sort(array, axis=-1, kind=None) -> Sorted copy",
        ".. deprecated:: use another function",
        ">>> sort the array now",
        "Created on Mon Dec 14 by the author",
        "The arguments of this function are:",
        " ".join(["word"] * 31),
    ],
)
def test_summaries_that_make_no_query_are_left_out(summary):
    assert collection.read_docstring("toy", "toy.sort", f"{summary}\n\n{rest('it')}") is None
    assert collection.read_docstring("toy", "toy.sort", f"Sort the array.\n\n{rest('it')}") is not None


def test_short_docstrings_are_left_out():
    assert collection.read_docstring("toy", "toy.sort", "Sort the whole array.\n\nIn place.") is None


def test_files_that_cannot_be_parsed_are_left_out(library):
    library.write("good.py", function("sort", "Sort the whole array."))
    library.write("syntax.py", "def sort(:")
    library.write("null.py", b'"""\x00"""')
    library.write("encoding.py", b"# coding: nonsense\n")
    library.write("bytes.py", b'"""\xff\xfe"""')
    library.write("deep.py", "x = " + "-" * 100_000 + "1")
    assert library.build().documents["docno"].tolist() == ["toy.good.sort"]
    assert gc.isenabled()


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_a_file_that_cannot_be_read_ends_the_build(library, monkeypatch, error):
    library.write("good.py", function("sort", "Sort the whole array."))

    def fail(path):
        raise error

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(error):
        library.build()


def test_sources_are_neither_imported_nor_run(library, tmp_path):
    mark = tmp_path / "executed"
    library.write("__init__.py", f"open({str(mark)!r}, 'w')\n" + function("sort", "Sort the whole array."))
    assert len(library.build().documents) == 1
    assert not mark.exists()
    assert "toy" not in sys.modules


def test_installed_packages_are_found_with_their_versions():
    packages = {package.name: package for package in pydocs.installed_packages()}
    assert packages["numpy"].version == pytest.importorskip("numpy").__version__
    assert packages["numpy"].folder.joinpath("__init__.py").exists()
    assert packages["python"].folder.joinpath("json").exists()


def test_the_standard_library_is_enough(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    packages = pydocs.installed_packages.__wrapped__()
    assert [(package.name, package.module) for package in packages] == [("python", "")]


# ---- from docstrings to a collection


def test_the_same_text_under_several_names_is_one_document():
    documents, topics = collection.merge(
        [
            Docstring("toy", "toy.long.name.sort", "Sort the array", rest("order")),
            Docstring("toy", "toy.sort", "Sorts an array", rest("order")),
            Docstring("toy", "toy.long.order", "Bring an array into order", rest("ORDER")),
            Docstring("toy", "toy.sort", "Sort this twice", rest("another")),
        ]
    )
    assert documents["docno"].tolist() == ["toy.sort"]
    assert documents["text"].tolist() == ["toy sort " + rest("order")]
    assert topics[["qid", "query"]].to_numpy().tolist() == [["toy.sort", "Sorts an array"]]


def test_the_same_beginning_makes_a_duplicate_only_with_the_same_summary():
    tail = " And a last word."
    same, _ = collection.merge(
        [Docstring("toy", "a", "Sort the array", rest("x")), Docstring("toy", "b", "Sort the array", rest("x") + tail)]
    )
    other, _ = collection.merge(
        [Docstring("toy", "a", "Sort the array", rest("x")), Docstring("toy", "b", "Sort the list", rest("x") + tail)]
    )
    assert same["docno"].tolist() == ["a"]
    assert other["docno"].tolist() == ["a", "b"]


def test_documents_that_share_a_summary_answer_one_topic():
    documents, topics = collection.merge(
        [
            Docstring("toy", "toy.frame.sort", "Sort the values.", rest("frames")),
            Docstring("toy", "toy.sort", "Sort values", rest("arrays")),
            Docstring("toy", "toy.find", "Find values", rest("finding")),
        ]
    )
    assert dict(zip(documents["docno"], documents["qid"], strict=True)) == {
        "toy.sort": "toy.sort",
        "toy.frame.sort": "toy.sort",
        "toy.find": "toy.find",
    }
    assert sorted(topics["qid"]) == ["toy.find", "toy.sort"]


def test_a_document_that_repeats_its_summary_is_left_out():
    documents, topics = collection.merge([Docstring("toy", "a", "Sort the array", rest("x") + " Sorts the ARRAY.")])
    assert len(documents) == len(topics) == 0


def test_the_order_of_reading_has_no_influence():
    found = [Docstring("toy", f"toy.f{i}", f"Sort {i % 7} arrays", rest(i % 11)) for i in range(30)]
    for one, other in zip(collection.merge(found), collection.merge(found[::-1]), strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_parts_depend_only_on_the_name():
    parts = {"numpy.sort": "train", "torch.nn.Linear": "train", "re": "dev", "math": "test"}
    assert {name: collection.part_of(name) for name in parts} == parts
    shares = pd.Series([collection.part_of(f"name{i}") for i in range(5000)]).value_counts(normalize=True)
    assert {part: round(100 * share) for part, share in shares.items()} == pytest.approx(PARTS, abs=2)


# ---- the dataset


def test_parts_share_a_corpus_and_divide_the_topics(large):
    parts = {part: PyDocs(part) for part in PARTS}
    corpus = {document["docno"]: document["text"] for document in parts["train"].get_corpus_iter(verbose=False)}
    assert [*parts["test"].get_corpus_iter(verbose=False)] == [*parts["train"].get_corpus_iter(verbose=False)]
    topics = pd.concat([dataset.get_topics().assign(part=part) for part, dataset in parts.items()])
    assert len(topics) == 300
    assert set(topics["part"]) == set(parts)
    assert topics["qid"].is_unique
    assert topics["query"].map(collection.normalise).is_unique
    for part, dataset in parts.items():
        frame, qrels = dataset.get_topicsqrels()
        assert frame["qid"].map(collection.part_of).eq(part).all()
        assert set(qrels["qid"]) == set(frame["qid"])
        assert qrels.columns.tolist() == ["qid", "docno", "label"]
        for row in qrels.merge(frame, on="qid").itertuples():
            assert row.query.lower() not in corpus[row.docno].lower()
    assert set(corpus) == {docno for dataset in parts.values() for docno in dataset.get_qrels()["docno"]}


def test_topics_stay_in_their_part_when_packages_change(large):
    before = large.build().topics.set_index("qid")["part"]
    large.write("added.py", "\n".join(function(f"area_{i}", f"Measure the area of lake {i}.") for i in range(50)))
    large.write("__init__.py", "\n".join(function(f"measure_{i}", f"Measure stream {i} again.") for i in range(200)))
    after = large.build().topics.set_index("qid")["part"]
    both = before.index.intersection(after.index)
    assert len(both) == 200
    assert len(after) == 250
    assert (before[both] == after[both]).all()


def test_the_collection_is_cached_until_a_version_changes(large, builds):
    first = PyDocs("train").get_topics()
    large.write("__init__.py", "")
    pydocs._load_or_build.cache_clear()
    pd.testing.assert_frame_equal(PyDocs("train").get_topics(), first)
    assert len(builds) == 1
    large.write("__init__.py", function("sort", "Sort the whole array."))
    large.package = large.package._replace(version="1.1")
    assert [document["docno"] for document in PyDocs("train").get_corpus_iter(verbose=False)] == ["toy.sort"]
    assert len(builds) == 2


def test_a_failed_build_leaves_no_file(large, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("json.dump", fail)
        with pytest.raises(OSError, match="disk full"):
            PyDocs("train").get_topics()
    assert not [*(tmp_path / "home" / "corpora" / "pydocs").iterdir()]
    assert len(PyDocs("train").get_topics())


def test_building_shows_progress_and_reading_doesnt(large, capfd):
    PyDocs("train").get_topics()
    assert "PyDocs: 100%" in capfd.readouterr().err
    pydocs._load_or_build.cache_clear()
    PyDocs("dev").get_topicsqrels()
    [*PyDocs("dev").get_corpus_iter(verbose=False)]
    assert capfd.readouterr() == ("", "")
    [*PyDocs("dev").get_corpus_iter()]
    assert "pydocs:dev documents: 100%" in capfd.readouterr().err


def test_callers_may_change_their_frames(large):
    topics = PyDocs("train").get_topics()
    topics.loc[:, "query"] = "changed"
    assert "changed" not in set(PyDocs("train").get_topics()["query"])


def test_describe_counts_the_sources(large, tmp_path, monkeypatch):
    large.write("more.py", function("sort", "Sort the whole array.") + function("short", "Too short a docstring.", "x"))
    other = Library(tmp_path / "other")  # its document has a topic named after another one
    other.write("module.py", function("long_name_for_sorting", "Sort the whole array."))
    packages = (large.package, Package("other-dist", "0.1", "other", other.package.folder))
    monkeypatch.setattr(pydocs, "installed_packages", lambda: packages)
    table = PyDocs("dev").describe()
    assert table.columns.tolist() == ["package", "version", "docstrings", "documents", "train", "dev", "test"]
    topics = [len(PyDocs(part).get_topics()) for part in PARTS]
    assert sum(topics) == 301
    assert table.iloc[0].tolist() == ["toy-dist", "1.0", 302, 301, *topics]
    assert table.iloc[1].tolist() == ["other-dist", "0.1", 1, 1, 0, 0, 0]


def test_text_is_loaded_for_any_frame(large):
    loader = PyDocs("dev").text_loader()
    texts = {document["docno"]: document["text"] for document in PyDocs("dev").get_corpus_iter(verbose=False)}
    docnos = ["toy.measure_7", "toy.measure_1", "toy.measure_7"]
    frame = pd.DataFrame({"docno": docnos, "score": [3.0, 2.0, 1.0]}, index=[5, 5, 0])
    loaded = loader(frame)
    assert loaded["text"].tolist() == [texts[docno] for docno in docnos]
    pd.testing.assert_frame_equal(loaded.drop(columns="text"), frame)
    with pytest.raises(ValueError, match=r"docnos must be from PyDocs; 1 are not, e.g. 'toy.other'"):
        loader(pd.DataFrame({"docno": ["toy.other"]}))


def test_inspecting_the_loader_builds_nothing(library, builds):
    loader = pt.text.get_text(PyDocs("train"), verbose=True)
    assert pt.inspect.transformer_inputs(loader) == [["docno"]]
    assert pt.inspect.transformer_outputs(loader, ["qid", "docno"]) == ["qid", "docno", "text"]
    assert not builds


def test_all_loaders_are_equal():
    one, other = PyDocs("train").text_loader(), PyDocs("test").text_loader("text")
    assert one == other == pickle.loads(pickle.dumps(one))
    assert len({one, other}) == 1
    assert one != PyDocs("train")


def test_pyterrier_finds_the_datasets(large):
    assert [*pydocs.PyDocsProvider().list_dataset_names()] == ["train", "dev", "test"]
    dataset = pt.get_dataset("pydocs:dev")
    assert repr(dataset) == "PyDocs('dev')"
    pd.testing.assert_frame_equal(dataset.get_topics(), PyDocs("dev").get_topics())
    assert pt.get_dataset("pydocs:dev") is not dataset
    assert dataset.info_url().startswith("https://")
    assert dataset.get_topics_lang() == dataset.get_corpus_lang() == "en"
    components = ["topics", "qrels", "corpus", "index", "results"]
    assert [dataset._describe_component(name) for name in components] == [True, True, True, ["pisa_porter2"], None]
    with pytest.raises(KeyError, match="pydocs:all"):
        pt.get_dataset("pydocs:all")


def test_datasets_of_pyterrier_can_be_pickled(large):
    dataset = pickle.loads(pickle.dumps(pt.get_dataset("pydocs:test")))
    assert len(dataset.get_topics()) == len(PyDocs("test").get_topics())


def test_making_a_dataset_builds_nothing(library, builds):
    for part in PARTS:
        repr(pt.get_dataset(f"pydocs:{part}"))
    assert not builds


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: PyDocs("valid"), "part must be one of 'train', 'dev', 'test'; got 'valid'"),
        (lambda: PyDocs("dev").get_topics("title"), "variant must be None; got 'title'"),
        (lambda: PyDocs("dev").get_qrels("title"), "variant must be None; got 'title'"),
        (lambda: PyDocs("dev").get_index("terrier"), "variant must be None or 'pisa_porter2'; got 'terrier'"),
        (lambda: PyDocs("dev").text_loader(["title"]), r"fields must be 'text'.*got \['title'\]"),
    ],
)
def test_invalid_arguments_are_rejected(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


# ---- the index


def test_bm25_is_indexed_once_and_quietly(large, tmp_path, capfd, monkeypatch):
    dev = PyDocs("dev")
    dev.get_topics()
    capfd.readouterr()
    bm25 = dev.bm25()
    assert capfd.readouterr() == ("", "")
    results = bm25.search("toy measure_7")
    assert results["docno"].iloc[0] == "toy.measure_7"
    assert len(results) == 100
    assert len(dev.bm25(num_results=1000).search("toy")) == 300
    pydocs._load_or_build_bm25.cache_clear()  # as in another process
    monkeypatch.setattr(pydocs.BM25, "__init__", None)  # fails if it is called again
    pd.testing.assert_frame_equal(PyDocs("train").bm25().search("toy measure_7"), results)
    assert PyDocs("train").bm25() == dev.bm25()  # so that PyTerrier detects the steps that pipelines share
    assert not [*(tmp_path / "home" / "corpora" / "pydocs").glob(".*")]


def test_another_process_may_build_the_index_of_bm25_first(large, monkeypatch):
    save = pydocs.BM25.save

    def save_second(bm25, path):
        save(bm25, path)
        save(bm25, path)

    monkeypatch.setattr(pydocs.BM25, "save", save_second)
    assert PyDocs("dev").bm25().search("toy measure_7")["docno"].iloc[0] == "toy.measure_7"


def test_the_index_without_pisa_raises_an_error_with_the_remedy(large, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyterrier_pisa", None)
    with pytest.raises(ImportError, match="pip install pyterrier-pisa"):
        PyDocs("dev").get_index()


@needs_pisa
def test_the_index_is_built_once_and_quietly(large, tmp_path, capfd, monkeypatch):
    from pyterrier_pisa import PisaIndex

    dev = PyDocs("dev")
    dev.get_topics()
    capfd.readouterr()
    os.write(1, b"before ")
    index = PisaIndex.from_dataset(dev)
    results = index.bm25().search("toy measure_7")
    os.write(1, b"after")
    assert capfd.readouterr() == ("before after", "")
    assert len(index) == 300
    assert results["docno"].iloc[0] == "toy.measure_7"
    monkeypatch.setattr(pydocs, "build_index", None)  # fails if it is called again
    assert PyDocs("train").get_index() == dev.get_index("pisa_porter2") == str(index.path)
    assert {path.suffix for path in (tmp_path / "home" / "corpora" / "pydocs").iterdir()} == {".gz", ""}
    assert not [*(tmp_path / "home" / "corpora" / "pydocs").glob(".*")]


@needs_pisa
def test_another_process_may_build_the_index_first(large):
    path = PyDocs("dev").get_index()
    before = sorted(os.listdir(path))
    pydocs.build_index(pydocs.load_collection(), Path(path))
    assert sorted(os.listdir(path)) == before
    assert len(os.listdir(Path(path).parent)) == 2


def test_output_is_restored_after_a_failure(capfd):
    def fail():
        with pydocs.silenced():
            os.write(2, b"lost")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    os.write(2, b"kept")
    assert capfd.readouterr() == ("", "kept")


def test_the_standard_library_makes_a_useful_collection(library):
    from ir_measures import RR, R

    library.package = INSTALLED[-1]
    train = pt.get_dataset("pydocs:train")
    topics, qrels = train.get_topicsqrels()
    assert len(topics) > 500
    results = train.bm25()(topics)
    assert set(results["qid"]) == set(topics["qid"])  # also for queries with punctuation
    figures = pt.Evaluate(results, qrels, [RR @ 10, R @ 100])
    assert figures["RR@10"] > 0.5
    assert figures["R@100"] > 0.85


@needs_pisa
def test_bm25_is_as_good_as_that_of_pisa(library):
    from ir_measures import nDCG
    from pyterrier_pisa import PisaIndex

    library.package = INSTALLED[-1]
    train = pt.get_dataset("pydocs:train")
    systems = [train.bm25(), PisaIndex.from_dataset(train).bm25(num_results=100)]
    ours, pisas = pt.Experiment(systems, *train.get_topicsqrels(), [nDCG @ 10])["nDCG@10"]
    assert ours == pytest.approx(pisas, abs=0.01)
