"""PyDocs: a test collection made from the docstrings of installed packages; it needs no download.

A docstring's summary is a query; the rest of the docstring is the document that answers it. See
`pyterrier_msft.pydocs_collection` for how the collection is made.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyterrier as pt

from pyterrier_msft.lexical import BM25
from pyterrier_msft.pydocs_collection import (
    PARTS,
    RULES_VERSION,
    Collection,
    Package,
    build_collection,
    installed_packages,
    sha256,
)

__all__ = ["PyDocs", "PyDocsProvider", "PyDocsTextLoader"]

INDEX_VARIANT = "pisa_porter2"  # what PisaIndex.from_dataset asks for
BM25_VARIANT = "bm25-1"  # changes with what BM25 does with texts


def _cache_dir() -> Path:
    return Path(pt.io.pyterrier_home(), "corpora", "pydocs")


def load_collection() -> Collection:
    """Return the collection of the installed packages; build it at the first use of their versions."""
    packages = installed_packages()
    key = sha256(json.dumps([RULES_VERSION, [(package.name, package.version) for package in packages]]))
    return _load_or_build(_cache_dir() / f"{key[:16]}.json.gz", packages)


@lru_cache(maxsize=1)
def _load_or_build(path: Path, packages: tuple[Package, ...]) -> Collection:
    if not path.exists():
        build_collection(packages).save(path)
    return Collection.load(path)


@lru_cache(maxsize=1)
def _load_or_build_bm25(path: Path) -> BM25:
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
            BM25(load_collection().documents[["docno", "text"]].to_dict("records")).save(f"{temporary}/index")
            _move(f"{temporary}/index", path)
    return BM25.load(path)


def _move(index: str, path: Path) -> None:
    """Move a complete index to its place, unless another process has built the same one."""
    try:
        os.rename(index, path)
    except OSError:
        if not path.exists():
            raise


@contextmanager
def silenced() -> Iterator[None]:
    """Discard the process's output, including what C++ writes past Python's streams."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # keep earlier output
    copies = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        with open(os.devnull, "wb") as devnull:
            for descriptor in copies:
                os.dup2(devnull.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in copies.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def build_index(collection: Collection, path: Path) -> None:
    """Build a PISA index quietly; it appears at `path` when it is complete."""
    try:
        from pyterrier_pisa import PisaIndex
    except ImportError as error:
        raise ImportError("get_index needs PISA, for Linux on x86-64: pip install pyterrier-pisa") from error
    # A list, as PISA silently ends an index where an iterator raises.
    documents = collection.documents[["docno", "text"]].to_dict("records")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
        with silenced():
            index = PisaIndex(f"{temporary}/index", text_field="text").index(documents)
            index.bm25().search("sort an array")  # the first retriever writes files too, and output
        if len(index) != len(documents):
            raise RuntimeError(f"PISA index must have {len(documents)} documents; got {len(index)}")
        _move(f"{temporary}/index", path)


def _check_variant(variant: str | None, *known: str) -> None:
    if variant not in (None, *known):
        raise ValueError(f"variant must be {' or '.join(map(repr, (None, *known)))}; got {variant!r}")


class PyDocs(pt.datasets.Dataset):
    """A dataset made from the docstrings of installed packages.

    Get it with `pt.get_dataset("pydocs:train")`, `"pydocs:dev"` or `"pydocs:test"`. The parts have different topics
    and share one corpus. The collection is built at its first use, and kept in PyTerrier's home.

    Args:
        part: "train", "dev" or "test".
    """

    def __init__(self, part: str) -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}; got {part!r}")
        self.part = part

    def get_corpus_iter(self, *, verbose: bool = True) -> Iterable[dict[str, str]]:
        """Iterate over the documents of the whole collection: docno and text."""
        texts = load_collection().texts
        items = pt.tqdm(texts.items(), desc=f"pydocs:{self.part} documents", disable=not verbose)
        documents = ({"docno": docno, "text": text} for docno, text in items)
        return pt.utils.GeneratorLen(documents, len(texts))

    def get_corpus_lang(self) -> str:
        """Return the language of the corpus, English."""
        return "en"

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        """Return the part's topics, qid and query, ordered by a hash: the first n are a fair sample."""
        _check_variant(variant)
        topics = load_collection().topics
        return topics.loc[topics["part"] == self.part, ["qid", "query"]].reset_index(drop=True)

    def get_topics_lang(self) -> str:
        """Return the language of the topics, English."""
        return "en"

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        """Return the part's qrels: qid, docno and label."""
        qids, documents = self.get_topics(variant)["qid"], load_collection().documents
        return documents.loc[documents["qid"].isin(qids), ["qid", "docno"]].assign(label=1).reset_index(drop=True)

    def bm25(self, *, num_results: int = 100) -> BM25:
        """Return a transformer that retrieves the top `num_results` of the corpus with BM25.

        It gives the same results on every platform. The index is built at its first use, which takes some seconds, and
        kept in PyTerrier's home.
        """
        index = _load_or_build_bm25(_cache_dir() / f"{BM25_VARIANT}-{load_collection().digest}")
        return index.with_num_results(num_results)

    def get_index(self, variant: str | None = None) -> str:
        """Return the path of a PISA index of the corpus, for `PisaIndex.from_dataset(dataset)`.

        The index is built at its first use, and kept in PyTerrier's home.
        """
        _check_variant(variant, INDEX_VARIANT)
        collection = load_collection()
        path = _cache_dir() / f"{INDEX_VARIANT}-{collection.digest}"
        if not path.exists():
            build_index(collection, path)
        return str(path)

    def text_loader(self, fields: str | list[str] = "*", *, verbose: bool = False) -> "PyDocsTextLoader":
        """Return a transformer that adds the documents' text. Texts are in memory: `verbose` has no effect."""
        if fields not in ("*", "text", ["text"]):
            raise ValueError(f"fields must be 'text', the only field of PyDocs; got {fields!r}")
        return PyDocsTextLoader()

    def info_url(self) -> str:
        """Return the page that describes PyDocs."""
        return "https://github.com/terrierteam/pyterrier_msft/blob/main/docs/pydocs.md"

    def describe(self) -> pd.DataFrame:
        """Describe the sources of the whole collection.

        Returns:
            A row for each package: its version, the number of docstrings, of documents, and of topics in each part
            (counted for the package of the topic's name).
        """
        collection = load_collection()
        packages = collection.documents.set_index("docno")["package"]
        topics = pd.crosstab(collection.topics["qid"].map(packages), collection.topics["part"])
        table = collection.sources.join(packages.value_counts().rename("documents"), on="package")
        table = table.join(topics.reindex(columns=list(PARTS)), on="package")
        return table.fillna(0).astype(dict.fromkeys(["documents", *PARTS], int))

    def _describe_component(self, component: str) -> bool | list[str] | None:
        return [INDEX_VARIANT] if component == "index" else component in {"topics", "qrels", "corpus"} or None

    def __reduce__(self) -> tuple[type["PyDocs"], tuple[str]]:
        return PyDocs, (self.part,)  # pt.get_dataset adds a wrapper to the object that can't be pickled

    def __repr__(self) -> str:
        return f"PyDocs({self.part!r})"


class PyDocsTextLoader(pt.Transformer):
    """A Transformer that adds the text of PyDocs' documents.

    Requires the column docno; adds the column text. All loaders are equal, so that PyTerrier detects the steps that
    pipelines share.
    """

    schematic = {"label": "TextLoader"}  # noqa: RUF012 - the form that PyTerrier reads

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Add the column text."""
        pt.validate.columns(inp, includes=["docno"])
        # PyTerrier inspects columns with an empty frame, which shouldn't build the collection.
        texts = load_collection().texts if len(inp) else {}
        if unknown := set(inp["docno"]) - texts.keys():
            raise ValueError(f"docnos must be from PyDocs; {len(unknown)} are not, e.g. {min(unknown, key=str)!r}")
        return inp.assign(text=pd.Series([texts[docno] for docno in inp["docno"]], dtype=str).array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyDocsTextLoader)

    def __hash__(self) -> int:
        return hash(PyDocsTextLoader)

    def __repr__(self) -> str:
        return "PyDocsTextLoader()"


class PyDocsProvider(pt.datasets.DatasetProvider):
    """Provides the datasets `pydocs:train`, `pydocs:dev` and `pydocs:test` to PyTerrier."""

    def get_dataset(self, name: str) -> PyDocs:
        """Return a dataset; a new object each time, as PyTerrier wraps one of its methods."""
        try:
            return PyDocs(name)
        except ValueError as error:
            raise KeyError(str(error)) from error

    def list_dataset_names(self) -> list[str]:
        """Return the names of the parts."""
        return list(PARTS)
