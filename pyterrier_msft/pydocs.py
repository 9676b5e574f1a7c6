"""PyDocs: a test collection made from the docstrings of installed packages, so that it needs no download.

A docstring's summary is a query; the qualified name and the rest of the docstring are the document that answers it.

What is read: numpy, scipy, pandas, scikit-learn, torch, statsmodels, networkx and sympy where they are installed, and
the standard library. Files are parsed, never imported or run; a file that this Python can't parse is left out.

What becomes a document:

- the docstring of a module, or of a class, function or method whose name, like its class's, has no leading underscore;
- outside tests, vendored copies and internal folders (``_SKIPPED_FOLDERS``, ``_SKIPPED_FILES``);
- with a summary of 3 to 30 words that is a phrase (``_PHRASE``), and at least 200 characters after it that don't
  repeat it;
- once: of several docstrings with the same rest, or with the same summary and the same beginning of the rest, the one
  with the shortest name stays. Case, punctuation, articles and a word's final *s* make no difference.

All documents with the same summary answer it. The topic bears the name of the first of them (by length, then
alphabet), and that name's hash alone decides between train, dev and test: no query is in two parts, and another version
of a package moves no topic that keeps its name. Every part has the whole collection as its corpus.
"""

import ast
import gc
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyterrier as pt

__all__ = ["PyDocs", "PyDocsProvider", "PyDocsTextLoader"]

_logger = logging.getLogger(__name__)

PARTS = {"train": 80, "dev": 7, "test": 13}  # percent of the names
INDEX_VARIANT = "pisa_porter2"  # what PisaIndex.from_dataset asks for

_RULES = 1  # part of the cache's key: count up when the same sources would give another collection
_DISTRIBUTIONS = ("numpy", "scipy", "pandas", "scikit-learn", "torch", "statsmodels", "networkx", "sympy")
_MODULES = {"scikit-learn": "sklearn"}  # where the import has another name
# A folder with a leading underscore is internal or vendored, save `_core`, where numpy keeps its public functions.
_SKIPPED_FOLDERS = re.compile(r"_(?!core$).*|tests?|externals|idlelib|turtledemo|(site|dist)-packages|config-.*")
_SKIPPED_FILES = re.compile(r"(test_.*|.*_test|conftest|setup)\.py")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OSError)  # the parser raises four of them
_MIN_WORDS, _MAX_WORDS, _MIN_REST, _BEGINNING = 3, 30, 200, 200

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Branch = ast.If | ast.Try | ast.ExceptHandler | ast.With

_WRAPPED = re.compile(r"[a-z0-9(`*'\"]")  # how a line begins that goes on with a sentence
_SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)(?<!vs)[.!?](?=\s+[A-Z])")
_PHRASE = re.compile(r"(?!Created on |\w+\()[^\W\d_].*[^:;,{(\[]")  # no signature, directive, prompt; not broken off
_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]+?)(?:\s*<[^`]*>)?`")  # :func:`~numpy.sort`
_UNDERLINE = re.compile(r"([-=~^*#+_.])\1{3,}")  # of a heading: a token a character, and no meaning
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")  # NULs and lone surrogates can't be indexed or written


class Package(NamedTuple):
    """A folder of sources."""

    name: str
    version: str
    module: str  # what all names in it begin with
    folder: Path


class Docstring(NamedTuple):
    """A docstring taken apart."""

    package: str
    name: str
    summary: str
    rest: str


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def installed_packages() -> tuple[Package, ...]:
    """Finds the sources that PyDocs is made from, without importing them."""
    packages = []
    for distribution in _DISTRIBUTIONS:
        module = _MODULES.get(distribution, distribution)
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # not installed, or a mere folder of that name
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        packages.append(Package(distribution, version, module, Path(spec.origin).parent))
    return (*packages, Package("python", platform.python_version(), "", Path(sysconfig.get_path("stdlib"))))


def source_files(package: Package) -> Iterator[tuple[str, Path]]:
    """Yields the dotted name and the path of each module of a package, in a fixed order."""
    for folder, subfolders, files in os.walk(package.folder):
        subfolders[:] = sorted(name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name))
        for file in sorted(files):
            if file.endswith(".py") and not _SKIPPED_FILES.fullmatch(file):
                path = Path(folder, file)
                parts = path.relative_to(package.folder).with_suffix("").parts
                yield ".".join(filter(None, (package.module, *parts))).removesuffix(".__init__"), path


def docstrings(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """Yields the qualified name and the docstring of a module and of all that is public in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(source)
    yield from _docstrings(tree, module)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | _Definition) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # what is defined in a function can't be reached by a name
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition) and not child.name.startswith("_"):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, _Branch):
            yield from _docstrings(child, name)


def split_summary(docstring: str) -> tuple[str, str]:
    """Splits a docstring into summary and rest.

    The summary is the first line, with the lines onto which its sentence is wrapped, up to the sentence's end.
    """
    lines = docstring.strip().splitlines()
    end = 1
    while end < len(lines) and _WRAPPED.match(lines[end]) and not lines[end - 1].rstrip().endswith((".", ":")):
        end += 1
    head = " ".join(line.strip() for line in lines[:end])
    sentence = _SENTENCE.match(head)
    summary = sentence.group() if sentence else head
    return summary, "\n".join([head[len(summary) :], *lines[end:]])


def clean(text: str) -> str:
    """Turns reStructuredText into plain text on one line."""
    return _BLANK.sub(" ", _UNDERLINE.sub(" ", _ROLE.sub(r"\1", text).replace("`", ""))).strip()


def normalise(text: str) -> str:
    """Leaves of a text what tells it from others: no case, punctuation, articles or final *s*."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join([word.rstrip("s") or word for word in words if word not in {"a", "an", "the"}])


def read_docstring(package: str, name: str, docstring: str) -> Docstring | None:
    """Takes a docstring apart; None if it can't make a query and a document."""
    summary, rest = map(clean, split_summary(docstring))
    summary = summary.rstrip(". ")
    n_words = len(re.findall(r"[^\W\d_]{2,}", summary))
    usable = _MIN_WORDS <= n_words <= _MAX_WORDS and _PHRASE.fullmatch(summary) and len(rest) >= _MIN_REST
    return Docstring(package, name, summary, rest) if usable else None


def part_of(name: str) -> str:
    """Returns the part that a topic of this name belongs to: a matter of the name's hash alone."""
    bucket = int(_hash(name)[:8], 16) % 100
    return "train" if bucket < PARTS["train"] else "dev" if bucket < PARTS["train"] + PARTS["dev"] else "test"


@dataclass(frozen=True, eq=False)
class Collection:
    """The whole collection; a dataset shows one part of its topics."""

    sources: pd.DataFrame  # package, version, docstrings
    documents: pd.DataFrame  # docno, text, package, qid (of the one topic that it answers)
    topics: pd.DataFrame  # qid, query, part

    @cached_property
    def texts(self) -> dict[str, str]:
        """Each document's text by its docno."""
        return dict(zip(self.documents["docno"], self.documents["text"], strict=True))

    @cached_property
    def digest(self) -> str:
        """Identifies the corpus by its content."""
        return _hash(json.dumps(self.texts))[:16]

    def save(self, path: Path) -> None:
        """Writes the collection such that it is there as a whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with pt.io.finalized_autoopen(str(path), "t") as file:
            json.dump({field.name: getattr(self, field.name).to_dict("list") for field in fields(self)}, file)

    @classmethod
    def load(cls, path: Path) -> "Collection":
        """Reads what ``save`` has written."""
        with gzip.open(path, "rt") as file:
            return cls(**{name: pd.DataFrame(table) for name, table in json.load(file).items()})


def merge(found: Iterable[Docstring]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Merges docstrings that say the same into one document, and equal summaries into one topic.

    Returns:
        The documents and the topics of a ``Collection``.
    """
    seen: set[str] = set()
    documents = []
    topics: dict[str, tuple[str, str, str]] = {}  # by summary: qid, query, part
    for package, name, summary, rest in sorted(found, key=lambda docstring: (len(docstring.name), docstring.name)):
        key, content = normalise(summary), normalise(rest)
        marks = {name, content, f"{key}: {content[:_BEGINNING]}"}
        if key not in content and seen.isdisjoint(marks):
            seen |= marks
            qid, _, _ = topics.setdefault(key, (name, summary, part_of(name)))
            # The name as words: tokenisers that take "stats.norm.pdf" for an acronym would glue it together.
            documents.append((name, f"{name.replace('.', ' ')} {rest}", package, qid))
    shuffled = sorted(topics.values(), key=lambda topic: _hash(topic[0]))  # the first n are as good a sample as any
    return (
        pd.DataFrame(sorted(documents), columns=["docno", "text", "package", "qid"]),
        pd.DataFrame(shuffled, columns=["qid", "query", "part"]),
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    # Looking for cycles in syntax trees, which have none, would take a third of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_collection(packages: Iterable[Package]) -> Collection:
    """Makes the collection from sources, with a progress bar, since it takes some seconds."""
    packages = list(packages)
    files = [(package.name, module, path) for package in packages for module, path in source_files(package)]
    counts: Counter[str] = Counter()
    found: list[Docstring] = []
    with _uncollected():
        for package, module, path in pt.tqdm(files, desc="PyDocs", unit="file"):
            try:
                contents = list(docstrings(path.read_bytes(), module))
            except _UNREADABLE as error:
                _logger.debug("left out %s: %s", path, error)
                continue
            counts[package] += len(contents)
            found.extend(filter(None, (read_docstring(package, *content) for content in contents)))
    sources = [(package.name, package.version, counts[package.name]) for package in packages]
    return Collection(pd.DataFrame(sources, columns=["package", "version", "docstrings"]), *merge(found))


def _home() -> Path:
    return Path(pt.io.pyterrier_home(), "corpora", "pydocs")


def load_collection() -> Collection:
    """Returns the collection of the packages as installed; builds it if that hasn't been done before."""
    packages = installed_packages()
    key = _hash(json.dumps([_RULES, [(package.name, package.version) for package in packages]]))
    return _load_or_build(_home() / f"{key[:16]}.json.gz", packages)


@lru_cache(maxsize=1)
def _load_or_build(path: Path, packages: tuple[Package, ...]) -> Collection:
    if not path.exists():
        build_collection(packages).save(path)
    return Collection.load(path)


@contextmanager
def silenced() -> Iterator[None]:
    """Sends the process's output to nowhere, including what C++ writes past Python's streams."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what was printed before must not be lost
    copies = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        with open(os.devnull, "wb") as nowhere:
            for descriptor in copies:
                os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in copies.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def build_index(collection: Collection, path: Path) -> None:
    """Builds a PISA index, quietly; it appears at ``path`` when it is complete."""
    try:
        from pyterrier_pisa import PisaIndex
    except ImportError as error:
        raise ImportError("PyDocs' index needs PISA: pip install pyterrier-msft[demo]") from error
    # A list, since PISA ends an index without a word where an iterator raises.
    documents = collection.documents[["docno", "text"]].to_dict("records")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
        with silenced():
            index = PisaIndex(f"{temporary}/index", text_field="text").index(documents)
            index.bm25().search("sort an array")  # a first retriever writes files too, as noisily
        if len(index) != len(documents):
            raise RuntimeError(f"expected an index of {len(documents)} documents, found {len(index)}")
        try:
            os.rename(f"{temporary}/index", path)
        except OSError:
            if not path.exists():  # else another process was quicker, with the same content
                raise


def _check_variant(found: str | None, *known: str) -> None:
    if found not in (None, *known):
        raise ValueError(f"expected variant {' or '.join(map(repr, (None, *known)))}, found {found!r}")


class PyDocs(pt.datasets.Dataset):
    """A dataset made from the docstrings of installed packages; it needs no download.

    Usually had by ``pt.get_dataset("pydocs:train")``, ``"pydocs:dev"`` or ``"pydocs:test"``. The parts have different
    topics and one corpus. The collection is built when first used, and kept in PyTerrier's home.

    Args:
        part: "train", "dev" or "test".
    """

    def __init__(self, part: str) -> None:
        if part not in PARTS:
            raise ValueError(f"expected one of {', '.join(map(repr, PARTS))}, found {part!r}")
        self.part = part

    def get_corpus_iter(self, *, verbose: bool = True) -> Iterable[dict[str, str]]:
        """Iterates over the documents of the whole collection: docno and text."""
        texts = load_collection().texts
        items = pt.tqdm(texts.items(), desc=f"pydocs:{self.part} documents", disable=not verbose)
        documents = ({"docno": docno, "text": text} for docno, text in items)
        return pt.utils.GeneratorLen(documents, len(texts))

    def get_corpus_lang(self) -> str:
        """Returns the corpus' language, English."""
        return "en"

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        """Returns the part's topics: qid and query. Their order is by hash, so that the first n are a fair sample."""
        _check_variant(variant)
        topics = load_collection().topics
        return topics.loc[topics["part"] == self.part, ["qid", "query"]].reset_index(drop=True)

    def get_topics_lang(self) -> str:
        """Returns the topics' language, English."""
        return "en"

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        """Returns the part's qrels: qid, docno and label."""
        qids, documents = self.get_topics(variant)["qid"], load_collection().documents
        return documents.loc[documents["qid"].isin(qids), ["qid", "docno"]].assign(label=1).reset_index(drop=True)

    def get_index(self, variant: str | None = None) -> str:
        """Returns the path of a PISA index of the corpus, which is how ``PisaIndex.from_dataset(dataset)`` works.

        The index is built when first asked for, quietly, and kept in PyTerrier's home.
        """
        _check_variant(variant, INDEX_VARIANT)
        collection = load_collection()
        path = _home() / f"{INDEX_VARIANT}-{collection.digest}"
        if not path.exists():
            build_index(collection, path)
        return str(path)

    def text_loader(self, fields: str | list[str] = "*", *, verbose: bool = False) -> "PyDocsTextLoader":
        """Returns a transformer that adds the documents' text. It has no progress to show: texts are in memory."""
        if fields not in ("*", "text", ["text"]):
            raise ValueError(f"expected the field 'text', the only one of PyDocs, found {fields!r}")
        return PyDocsTextLoader()

    def info_url(self) -> str:
        """Returns where PyDocs is described."""
        return "https://github.com/terrierteam/pyterrier_msft#pydocs"

    def describe(self) -> pd.DataFrame:
        """Returns what the whole collection was made from.

        Returns:
            A row a package: its version, the docstrings read, the documents made of them, and the topics of each part
            (counted for the package that gave the topic its name).
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
        return PyDocs, (self.part,)  # pt.get_dataset puts a wrapper into the object that can't be pickled

    def __repr__(self) -> str:
        return f"PyDocs({self.part!r})"


class PyDocsTextLoader(pt.Transformer):
    """A Transformer that adds the text of PyDocs' documents.

    Requires the column docno; adds the column text. All loaders are equal, so that PyTerrier sees where pipelines
    share their candidates.
    """

    schematic = {"label": "TextLoader"}  # noqa: RUF012 - the form that PyTerrier reads

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Returns the frame with the column text."""
        pt.validate.columns(inp, includes=["docno"])
        # An empty frame is how PyTerrier asks for the columns: no reason to build a collection.
        texts = load_collection().texts if len(inp) else {}
        if unknown := set(inp["docno"]) - texts.keys():
            raise ValueError(f"expected docnos of PyDocs, found {len(unknown)} others, as {min(unknown, key=str)!r}")
        return inp.assign(text=pd.Series([texts[docno] for docno in inp["docno"]], dtype=str).array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyDocsTextLoader)

    def __hash__(self) -> int:
        return hash(PyDocsTextLoader)

    def __repr__(self) -> str:
        return "PyDocsTextLoader()"


class PyDocsProvider(pt.datasets.DatasetProvider):
    """Gives PyTerrier the datasets ``pydocs:train``, ``pydocs:dev`` and ``pydocs:test``."""

    def get_dataset(self, name: str) -> PyDocs:
        """Returns a dataset, a new object each time: PyTerrier wraps a method of what it gets."""
        try:
            return PyDocs(name)
        except ValueError as error:
            raise KeyError(str(error)) from error

    def list_dataset_names(self) -> list[str]:
        """Returns the names of the parts."""
        return list(PARTS)
