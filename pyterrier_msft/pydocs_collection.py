"""The collection behind PyDocs: documents, topics and qrels made from the docstrings of installed packages.

A docstring's summary is a query; the qualified name and the rest of the docstring are the document that answers it.

Sources are numpy, scipy, pandas, scikit-learn, torch, statsmodels, networkx and sympy, as far as they are installed,
and the standard library. Files are parsed, but never imported or run; files that can't be parsed are left out.

A docstring becomes a document if

- it belongs to a module, or to a class, function or method whose name, like its class's, has no leading underscore;
- its file is outside tests, vendored copies and internal folders (`_SKIPPED_FOLDERS`, `_SKIPPED_FILES`);
- its summary is a phrase (`_PHRASE`) of 3 to 30 words, followed by at least 200 characters that don't repeat it;
- it isn't a duplicate: of several docstrings with the same rest, or with the same summary and the same first 200
  characters of the rest, the one with the shortest name is kept. Case, punctuation, articles and a word's final *s*
  are ignored.

All documents with the same summary are relevant to it. A topic has the name of its first document (by length, then
alphabetically), and the hash of that name alone assigns it to train, dev or test. So no query is in two parts, and a
topic that keeps its name stays in its part when packages change. All parts share the corpus.
"""

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyterrier as pt

_logger = logging.getLogger(__name__)

PARTS = {"train": 80, "dev": 7, "test": 13}  # percent of the topics
RULES_VERSION = 1  # part of the cache's key: increase it when the same sources would give another collection

_DISTRIBUTIONS = ("numpy", "scipy", "pandas", "scikit-learn", "torch", "statsmodels", "networkx", "sympy")
_MODULES = {"scikit-learn": "sklearn"}  # distributions that are imported by another name
# A folder with a leading underscore is internal or vendored, except `_core`, where numpy keeps its public functions.
_SKIPPED_FOLDERS = re.compile(r"_(?!core$).*|tests?|externals|idlelib|turtledemo|(site|dist)-packages|config-.*")
_SKIPPED_FILES = re.compile(r"(test_.*|.*_test|conftest|setup)\.py")
_PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last is for code that is nested too deeply
_MIN_WORDS, _MAX_WORDS = 3, 30  # of a summary
_MIN_REST, _PREFIX = 200, 200  # characters

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Branch = ast.If | ast.Try | ast.ExceptHandler | ast.With

_WRAPPED = re.compile(r"[a-z0-9(`*'\"]")  # start of a line that continues a sentence
_SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)(?<!vs)[.!?](?=\s+[A-Z])")
_PHRASE = re.compile(r"(?!Created on |\w+\()[^\W\d_].*[^:;,{(\[]")  # no signature, directive, prompt or broken sentence
_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]+?)(?:\s*<[^`]*>)?`")  # :func:`~numpy.sort`
_UNDERLINE = re.compile(r"([-=~^*#+_.])\1{3,}")  # of headings: each character would be a token
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")  # NULs and lone surrogates can't be indexed or written


class Package(NamedTuple):
    """A folder of sources."""

    name: str
    version: str
    module: str  # prefix of all names in it
    folder: Path


class Docstring(NamedTuple):
    """A docstring, split into summary and rest."""

    package: str
    name: str
    summary: str
    rest: str


@cache
def installed_packages() -> tuple[Package, ...]:
    """Find the sources of PyDocs without importing them."""
    packages = []
    for distribution in _DISTRIBUTIONS:
        module = _MODULES.get(distribution, distribution)
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # not installed, or a folder of that name
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        packages.append(Package(distribution, version, module, Path(spec.origin).parent))
    return (*packages, Package("python", platform.python_version(), "", Path(sysconfig.get_path("stdlib"))))


def source_files(package: Package) -> Iterator[tuple[str, Path]]:
    """Iterate over the dotted name and the path of each module of a package, in a fixed order."""
    for folder, subfolders, files in os.walk(package.folder):
        subfolders[:] = sorted(name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name))
        for file in sorted(files):
            if file.endswith(".py") and not _SKIPPED_FILES.fullmatch(file):
                path = Path(folder, file)
                parts = path.relative_to(package.folder).with_suffix("").parts
                yield ".".join(filter(None, (package.module, *parts))).removesuffix(".__init__"), path


def docstrings(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """Iterate over the qualified name and the docstring of a module and of everything public in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the sources
        tree = ast.parse(source)
    yield from _docstrings(tree, module)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | _Definition) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # definitions inside a function have no qualified name to import
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition) and not child.name.startswith("_"):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, _Branch):
            yield from _docstrings(child, name)


def split_summary(docstring: str) -> tuple[str, str]:
    """Split a docstring into its summary and the rest.

    The summary is the first sentence of the first line and the lines that it is wrapped onto.
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
    """Convert reStructuredText to plain text on one line."""
    return _BLANK.sub(" ", _UNDERLINE.sub(" ", _ROLE.sub(r"\1", text).replace("`", ""))).strip()


def normalise(text: str) -> str:
    """Remove what doesn't distinguish texts: case, punctuation, articles and a word's final *s*."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join([word.rstrip("s") or word for word in words if word not in {"a", "an", "the"}])


def read_docstring(package: str, name: str, docstring: str) -> Docstring | None:
    """Split and clean a docstring; None if it can't make a query and a document."""
    summary, rest = map(clean, split_summary(docstring))
    summary = summary.rstrip(". ")
    n_words = len(re.findall(r"[^\W\d_]{2,}", summary))
    is_usable = _MIN_WORDS <= n_words <= _MAX_WORDS and _PHRASE.fullmatch(summary) and len(rest) >= _MIN_REST
    return Docstring(package, name, summary, rest) if is_usable else None


def part_of(name: str) -> str:
    """Return the part that a topic of this name belongs to, by the hash of the name."""
    bucket = int(sha256(name)[:8], 16) % 100
    return "train" if bucket < PARTS["train"] else "dev" if bucket < PARTS["train"] + PARTS["dev"] else "test"


def sha256(text: str) -> str:
    """Return the hexadecimal SHA-256 digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Collection:
    """The whole collection, of which a dataset shows one part's topics."""

    sources: pd.DataFrame  # package, version, docstrings
    documents: pd.DataFrame  # docno, text, package, qid (of the one topic that it answers)
    topics: pd.DataFrame  # qid, query, part

    @cached_property
    def texts(self) -> dict[str, str]:
        """Each document's text by its docno."""
        return dict(zip(self.documents["docno"], self.documents["text"], strict=True))

    @cached_property
    def digest(self) -> str:
        """The hash of the corpus."""
        return sha256(json.dumps(self.texts))[:16]

    def save(self, path: Path) -> None:
        """Write the collection; the file appears when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with pt.io.finalized_autoopen(str(path), "t") as file:
            json.dump({field.name: getattr(self, field.name).to_dict("list") for field in fields(self)}, file)

    @classmethod
    def load(cls, path: Path) -> "Collection":
        """Read a saved collection."""
        with gzip.open(path, "rt") as file:
            return cls(**{name: pd.DataFrame(table) for name, table in json.load(file).items()})


def merge(found: Iterable[Docstring]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Merge duplicate docstrings into one document, and equal summaries into one topic.

    Returns:
        The documents and the topics of a `Collection`.
    """
    seen: set[str] = set()
    documents = []
    topics: dict[str, tuple[str, str, str]] = {}  # by summary: qid, query, part
    for package, name, summary, rest in sorted(found, key=lambda docstring: (len(docstring.name), docstring.name)):
        key, content = normalise(summary), normalise(rest)
        identifiers = {name, content, f"{key}: {content[:_PREFIX]}"}
        if key not in content and seen.isdisjoint(identifiers):
            seen |= identifiers
            qid, _, _ = topics.setdefault(key, (name, summary, part_of(name)))
            # The name as words: some tokenizers would join "stats.norm.pdf" as an acronym.
            documents.append((name, f"{name.replace('.', ' ')} {rest}", package, qid))
    shuffled = sorted(topics.values(), key=lambda topic: sha256(topic[0]))  # so that the first n are a fair sample
    return (
        pd.DataFrame(sorted(documents), columns=["docno", "text", "package", "qid"]),
        pd.DataFrame(shuffled, columns=["qid", "query", "part"]),
    )


def build_collection(packages: Iterable[Package]) -> Collection:
    """Build the collection from sources, with a progress bar, as it takes some seconds."""
    packages = list(packages)
    files = [(package.name, module, path) for package in packages for module, path in source_files(package)]
    counts: Counter[str] = Counter()
    found: list[Docstring] = []
    for package, module, path in pt.tqdm(files, desc="PyDocs", unit="file"):
        # Outside of `try`, as a collection without a file that can't be read must not be kept.
        source = path.read_bytes()
        try:
            contents = list(docstrings(source, module))
        except _PARSE_ERRORS as error:
            _logger.debug("skipped %s: %s", path, error)
            continue
        counts[package] += len(contents)
        found.extend(filter(None, (read_docstring(package, *content) for content in contents)))
    sources = [(package.name, package.version, counts[package.name]) for package in packages]
    return Collection(pd.DataFrame(sources, columns=["package", "version", "docstrings"]), *merge(found))
