"""A first stage for every platform: BM25 with an index in memory, by bm25s."""

import copy
import json
import logging
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_msft.notices import warn

if TYPE_CHECKING:
    import bm25s

__all__ = ["BM25"]

K1, B = 0.9, 0.4  # the parameters of Anserini and of PISA
JOINERS = "\u200c\u200d"  # within words of Persian and of Indic scripts
DOCNOS = "docnos.json"


class BM25(pt.Transformer):
    """A Transformer that retrieves documents with BM25.

    Requires the columns qid and query; adds the columns docno, score and rank. Documents with equal scores are in the
    order in which they were indexed. Documents without a word of the query aren't retrieved.

    The scores are those of Lucene's BM25 with Anserini's parameters, k1 = 0.9 and b = 0.4. Words are sequences of
    letters and digits in lower case, without bm25s' 179 English stop words ("english_plus"), and stemmed by Snowball's
    English stemmer. It isn't for scripts without spaces between words, such as Chinese and Thai: use Terrier for these.

    The index is in memory, for up to some hundred thousand documents. For more, use PISA or Terrier.

    Args:
        documents: Dictionaries with docno and text, such as `dataset.get_corpus_iter()` or `frame.to_dict("records")`.
            Other fields, such as a title, aren't indexed.
        num_results: The number of documents to retrieve per query.

    Example:
        >>> bm25 = BM25([{"docno": "a", "text": "Sorts an array."}, {"docno": "b", "text": "Reads a file."}])
        >>> bm25.search("sorting arrays")["docno"].tolist()
        ['a']
    """

    schematic = {"label": "BM25"}  # noqa: RUF012 - the form that PyTerrier reads

    def __init__(self, documents: Iterable[Mapping[Any, Any]], *, num_results: int = 100) -> None:
        self.num_results = _check_num_results(num_results)
        engine, stem = _engine(), _stem()
        docnos: list[str] = []
        vocabulary: dict[str, int] = {}
        ids = []
        unread = 0  # titles that aren't in the text
        for document in documents:
            docno, text = _fields(document)
            docnos.append(docno)
            title = str(document.get("title") or "").strip()
            unread += bool(title) and title not in text
            ids.append([vocabulary.setdefault(stem(word), len(vocabulary)) for word in _words(text)])
        if len(set(docnos)) < len(docnos):
            repeated = pd.Series(docnos).loc[lambda found: found.duplicated()]
            raise ValueError(
                f"documents must have distinct docnos; got {len(docnos):,} documents with {len(set(docnos)):,} docnos, "
                f"e.g. {repeated.iloc[0]!r} repeatedly. Drop the duplicates"
            )
        if not vocabulary:
            raise ValueError(f"documents must have at least one word; got {len(docnos):,} documents without any")
        if unread > len(docnos) / 2:
            warn(
                f"documents have titles that aren't indexed, only their texts are ({unread:,} of {len(docnos):,}). "
                "Join both: BM25({**d, 'text': d['title'] + ' ' + d['text']} for d in documents)"
            )
        self._docnos = np.array(docnos, dtype=object)
        self._index: bm25s.BM25 = engine.BM25(k1=K1, b=B, method="lucene")
        self._index.index((ids, vocabulary), create_empty_token=False, show_progress=False)

    def save(self, folder: str | Path) -> None:
        """Save the index; it appears in the folder when it is complete, in place of an index that was saved there.

        Raises:
            FileExistsError: If the folder has other files.
        """
        folder = Path(folder).expanduser().resolve()  # of a link, the folder that it leads to
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
            complete = Path(temporary) / "index"
            self._index.save(complete)
            (complete / DOCNOS).write_text(json.dumps(self._docnos.tolist()), encoding="utf-8")
            own, replaced = {path.name for path in complete.iterdir()}, Path(temporary) / "replaced"
            others = sorted({path.name for path in folder.iterdir()} - own) if folder.is_dir() else []
            if others:
                raise FileExistsError(f"folder must be new or hold only a saved index; got {others[0]!r} in {folder}")
            try:
                if folder.is_dir():
                    os.rename(folder, replaced)
                os.rename(complete, folder)
            except BaseException:
                if replaced.is_dir():
                    os.rename(replaced, folder)
                raise

    @classmethod
    def load(cls, folder: str | Path, *, num_results: int = 100) -> "BM25":
        """Load a saved index."""
        loaded = cls.__new__(cls)
        loaded.num_results = _check_num_results(num_results)
        folder = Path(folder).expanduser()
        loaded._index = _engine().BM25.load(folder)
        loaded._docnos = np.array(json.loads((folder / DOCNOS).read_text(encoding="utf-8")), dtype=object)
        return loaded

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve documents for each query. Further columns of the queries are kept."""
        pt.validate.query_frame(inp, extra_columns=["query"])
        if wrong := [query for query in inp["query"] if not isinstance(query, str)]:
            raise ValueError(f"query must be a string; {len(wrong)} of {len(inp)} aren't, e.g. {wrong[0]!r}")
        found = [self._retrieve(query) for query in inp["query"]]
        counts = [len(documents) for documents, _ in found]
        documents, scores = (np.concatenate(column) for column in zip(_NO_RESULTS, *found, strict=True))
        results = inp.iloc[np.repeat(np.arange(len(inp)), counts)].reset_index(drop=True)
        return results.assign(
            docno=pd.Series(self._docnos[documents], dtype=str).array,
            score=scores,
            rank=np.concatenate([_NO_RESULTS[0], *map(np.arange, counts)]),
        )

    def _retrieve(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions and the scores of a query's best documents, best first."""
        stem = _stem()
        terms = self._index.get_tokens_ids([stem(word) for word in _words(query)])
        scores = self._index.get_scores_from_ids(terms)
        matches = np.flatnonzero(scores)
        if len(matches) > self.num_results:
            lowest = np.partition(scores[matches], -self.num_results)[-self.num_results]
            matches = matches[scores[matches] >= lowest]
        # Stable, so that ties have the same order on every machine.
        best = matches[np.argsort(-scores[matches], kind="stable")][: self.num_results]
        return best, scores[best].astype(np.float64)

    def with_num_results(self, num_results: int) -> "BM25":
        """Return a transformer with the same index and another number of results."""
        other = copy.copy(self)
        other.num_results = _check_num_results(num_results)
        return other

    def fuse_rank_cutoff(self, k: int) -> "BM25":
        """Return the transformer that PyTerrier uses for `self % k`."""
        return self if k >= self.num_results else self.with_num_results(k)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BM25) and (self._index is other._index) and self.num_results == other.num_results

    def __hash__(self) -> int:
        return hash((id(self._index), self.num_results))

    def __repr__(self) -> str:
        return f"BM25(<{len(self._docnos):,} documents>, num_results={self.num_results})"


_NO_RESULTS = np.zeros(0, dtype=np.int64), np.zeros(0)


def _check_num_results(num_results: int) -> int:
    if num_results < 1:
        raise ValueError(f"num_results must be at least 1; got {num_results}")
    return num_results


def _fields(document: Mapping[Any, Any]) -> tuple[str, str]:
    try:
        docno, text = document["docno"], document["text"]
    except (KeyError, TypeError) as error:
        found = list(document) if isinstance(document, Mapping) else document
        raise ValueError(
            f"documents must be dictionaries with docno and text; got {found!r}. Of a data frame, pass "
            "frame.to_dict('records')"
        ) from error
    if not isinstance(docno, str) or not isinstance(text, str):
        raise ValueError(f"docno and text must be strings; got {docno!r}, {text!r}. Fill in missing texts: fillna('')")
    return docno, text


def _words(text: str) -> list[str]:
    stop_words = _stop_words()
    text = unicodedata.normalize("NFC", text).lower()  # a letter and its accent may be one character or two
    return [word for word in _word().findall(text) if word not in stop_words]


def _engine() -> Any:
    try:
        import bm25s
        import Stemmer  # noqa: F401
    except ImportError as error:
        raise ImportError('BM25 needs the extra [demo]: pip install "pyterrier-msft[demo]"') from error
    logging.getLogger(bm25s.__name__).setLevel(logging.WARNING)  # bm25s sets DEBUG, which every handler would print
    return bm25s


@lru_cache(maxsize=1)
def combining_marks() -> str:
    """Return the characters that add accents and vowel signs to a letter; to Python, they aren't in `\\w`."""
    return "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in {"Mn", "Mc"})


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    return re.compile(rf"[^\W_]+(?:[{JOINERS}{combining_marks()}]+[^\W_]*)*")


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)


@lru_cache(maxsize=1)
def _stem() -> Callable[[str], str]:
    from Stemmer import Stemmer

    return lru_cache(maxsize=2**17)(Stemmer("english").stemWord)
