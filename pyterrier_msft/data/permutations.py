"""Files of LLM permutations and of labelled passages."""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from pyterrier_msft.notices import warn

T = TypeVar("T")


# How files in the wild call things. Of two names in a record the first here counts.
QUERY = ("query", "question", "query_text")


QID = ("qid", "query_id", "question_id", "id")


CANDIDATES = (
    "candidates", "hits", "ctxs", "docs", "documents", "passages", "retrieved_passages", "unsorted_docs",
)  # fmt: skip


PERMUTATION = ("permutation", "ranking", "re_rank_id", "response")


DOCNO = ("docno", "docid", "doc_id", "pid", "id", "_id")


TEXT = ("text", "content", "contents", "passage", "segment", "body", "doc")


POSITIVES = ("positive_passages", "positives", "pos")


NEGATIVES = ("negative_passages", "negatives", "neg")


RANKED = ("candidates", "hits")  # what RankLLM and RankGPT write after re-ranking: the order is the ranking


# ---- files


def read_permutations(path: str | Path, *, responses: str | Path | None = None, unranked: str = "drop") -> pd.DataFrame:
    """A teacher's rankings, as RankGPT-like tools write them: candidates and teacher in one frame.

    A line is a query with its candidates and a permutation of them:

    - the query: `query`, `question` or `query_text`, a text or an object of text and qid; with `qid`, `query_id`,
      `question_id` or `id`;
    - the candidates: `candidates`, `hits`, `ctxs`, `docs`, `documents`, `passages`, `retrieved_passages` or
      `unsorted_docs`; texts, or objects of `docno`, `docid`, `doc_id`, `pid`, `id` or `_id`, of `text`, `content`,
      `contents`, `passage`, `segment`, `body` or `doc` (or of these within `doc`), and `title`;
    - the permutation, best first: `permutation`, `ranking`, `re_rank_id` or `response`; positions from 1, docnos, or
      an answer such as "[2] > [1]". Docnos alone need no candidates. Objects in `candidates` or `hits` without a
      permutation, as RankLLM and RankGPT write them, are in the teacher's order.

    Without a qid or docno there is a digest of the text, equal for equal texts. What an LLM gets wrong is counted in
    one warning: of a document named twice the first place counts, a document that is not there is left out, and one
    that isn't named is unranked. Of a query that is given again the first ranking is kept.

    Args:
        path: JSON lines, or an array in a `.json` file; plain or `.gz`, in UTF-8.
        responses: A JSON array of permutations or answers, one a line of `path`, as RankGPT publishes them.
        unranked: "drop" leaves unranked documents out; "last" puts them below all others, with equal scores.

    Returns:
        qid, query, docno, text, rank (from 0) and score (minus the rank: higher is better), each query's best first.

    Raises:
        ValueError: If a line has another form, or nothing is ranked.
    """
    check_unranked(unranked)
    answers = None if responses is None else ["" if answer is None else answer for _, answer in _read(responses)]
    lists = _read(path)
    if answers is not None and len(answers) != len(lists):
        raise ValueError(
            f"expected a permutation in {responses} for each query in {path}, found {len(answers):,} for {len(lists):,}"
        )
    parsed = _parse(path, lists, lambda record, number: _ranking(record, answers[number] if answers else None))
    counts: Counter[str] = Counter()
    queries: dict[str, str | None] = {}
    rows: list[tuple[str, str | None, str, str | None, int, float]] = []
    example: str | None = None  # the first query with anything wrong
    fate = "documents unranked (left out)" if unranked == "drop" else "documents unranked (placed last)"
    for number, given in parsed:
        if example is None and counts.total():
            example = [*queries][-1]
        if given.qid in queries:
            _same_query(path, number, given, queries)
            counts["queries given again"] += 1
            continue
        queries[given.qid] = given.query
        ranked = list(dict.fromkeys(place for place in given.order if place is not None))
        missing = sorted(set(range(len(given.passages))) - set(ranked))
        counts["queries without a ranking"] += not ranked
        counts["documents named twice"] += len(given.order) - given.order.count(None) - len(ranked)
        counts["positions or docnos that are not there"] += given.order.count(None)
        counts[fate] += len(missing) if ranked else 0
        seen: set[str] = set()
        for below, place in enumerate([*ranked, *(missing if ranked and unranked == "last" else [])]):
            docno, text = given.passages[place]
            if docno in seen:
                counts["candidates given twice"] += 1
                continue
            score = float(-min(below, len(ranked)))  # the same for all that are unranked
            rows.append((given.qid, given.query, docno, text, len(seen), score))
            seen.add(docno)
    if not rows:
        raise ValueError(f"expected rankings in {path}, found none on {len(lists):,} lines")
    found = [f"{count:,} {what}" for what, count in counts.items() if count]
    if found:
        example = [*queries][-1] if example is None else example
        warn(f"{path}: of {len(lists):,} rankings, {', '.join(found)}; first in query {example!r}")
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank", "score"])


def read_labelled_passages(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Queries with relevant and other passages, in Tevatron's form, for `Contrastive`.

    A line has `query_id`, `query`, and lists `positive_passages` and `negative_passages` of docid, title and text
    (or `pos` and `neg`, or texts alone); the text is title and text with a blank between, as in Tevatron. Names and
    ids otherwise as in `read_permutations`. A passage on both sides is relevant, counted in a warning.

    Args:
        path: JSON lines, or an array in a `.json` file; plain or `.gz`, in UTF-8.

    Returns:
        Results (qid, query, docno, text; the order of the file, so neither score nor rank) and qrels (qid, docno,
        label 1).

    Raises:
        ValueError: If a line has another form.
    """
    queries: dict[str, str | None] = {}
    passages: dict[tuple[str, str], str | None] = {}
    relevant: set[tuple[str, str]] = set()
    negative: set[tuple[str, str]] = set()
    for number, labelled in _parse(path, _read(path), lambda record, _: _labelled(record)):
        if labelled.qid in queries:
            _same_query(path, number, labelled, queries)
        queries[labelled.qid] = labelled.query
        for place, (docno, text) in enumerate(labelled.passages):
            pair = (labelled.qid, docno)
            passages.setdefault(pair, text)
            (relevant if place < labelled.n_positives else negative).add(pair)
    if not passages:
        raise ValueError(f"expected queries with passages in {path}, found none")
    if both := len(relevant & negative):
        warn(f"{path}: {both:,} passages are both positive and negative: taken as positive")
    results = [(qid, queries[qid], docno, text) for (qid, docno), text in passages.items()]
    qrels = [(qid, docno, 1) for qid, docno in passages if (qid, docno) in relevant]
    return (
        pd.DataFrame(results, columns=["qid", "query", "docno", "text"]),
        pd.DataFrame(qrels, columns=["qid", "docno", "label"]),
    )


@dataclass(frozen=True)
class _Query:
    """A record of a file: a query with passages (docno, text)."""

    qid: str
    query: str | None
    passages: list[tuple[str, str | None]]
    order: Sequence[int | None] = ()  # the passages' indices as the teacher gave them; None: no such passage
    n_positives: int = 0  # how many of the passages, from the first, are relevant


def _read(path: str | Path) -> list[tuple[int, Any]]:
    """A file's JSON values by line number; of an array its members, counted from 1."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file of JSON lines, found no file {str(path)!r}")
    number, values = 1, []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if _suffix(path) == ".json":
                array = json.loads(file.read().decode("utf-8-sig"))
                if isinstance(array, list):
                    return list(enumerate(array, 1))
                raise ValueError(f"{_short(array)} in place of an array")
            for number, line in enumerate(file, 1):
                if text := line.decode("utf-8-sig").strip():
                    values.append((number, json.loads(text)))
    except json.JSONDecodeError as error:
        number = error.lineno if _suffix(path) == ".json" else number
        raise ValueError(
            f"{path}, line {number}: expected JSON, found an error at column {error.colno} ({error.msg})"
        ) from error
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, line {number}: expected JSON in UTF-8, found {error}") from error
    return values


def _parse(
    path: str | Path, records: list[tuple[int, Any]], parse: Callable[[dict[str, Any], int], T]
) -> Iterator[tuple[int, T]]:
    """Each record parsed, with the line in the error of what can't be."""
    for place, (number, record) in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {_short(record)}")
            yield number, parse(record, place)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _ranking(record: dict[str, Any], answer: Any = None) -> _Query:
    """A line of `read_permutations`."""
    qid, query = _query(record)
    found = _field(record, CANDIDATES)
    permutation = _field(record, PERMUTATION) if answer is None else answer
    if found is None:
        if not (_is_list_of(permutation, str) and permutation):
            raise ValueError(f"expected candidates (one of {_names(CANDIDATES)}), found fields {list(record)}")
        docnos = list(dict.fromkeys(permutation))
        return _Query(qid, query, [(docno, None) for docno in docnos], [docnos.index(docno) for docno in permutation])
    if not isinstance(found, list):
        raise ValueError(f"expected a list of candidates, found {_short(found)}")
    ids, texts = map(list, zip(*map(_passage, found), strict=True)) if found else ([], [])
    if permutation is None:
        # A list of another name may be a permutation that we don't know to be one.
        others = [name for name, value in record.items() if _is_list_of(value, str | int) and value]
        if others or not any(name in record for name in RANKED) or not _is_list_of(found, dict):
            raise ValueError(f"expected a permutation (one of {_names(PERMUTATION)}), found fields {list(record)}")
        order: list[int | None] = list(range(len(found)))
    else:
        order = _order(permutation, ids)
    if (names := record.get("sorted_docids")) is not None:  # of Reason-to-Rank: the docnos in the teacher's order
        if not _is_list_of(names, str | int) or len(names) != len(order):
            raise ValueError(f"expected {len(order)} sorted_docids, one a place of the ranking, found {_short(names)}")
        for place, name in zip(order, names, strict=True):
            if place is not None and ids[place] is None:
                ids[place] = str(name)
    return _Query(qid, query, [_named(docno, text) for docno, text in zip(ids, texts, strict=True)], order)


def _order(permutation: Any, docnos: list[str | None]) -> list[int | None]:
    """The candidates' indices in the order of a permutation; None for what isn't there."""
    n = len(docnos)
    by_position = {str(place): place - 1 for place in range(1, n + 1)}
    if isinstance(permutation, str):  # an LLM's answer
        digits = re.findall(r"\[(\d+)\]", permutation) or re.findall(r"\d+", permutation)
        return [by_position.get(position.lstrip("0")) for position in digits]
    if not _is_list_of(permutation, str | int):
        raise ValueError(f"expected a permutation as positions, docnos or text, found {_short(permutation)}")
    entries = [str(entry) for entry in permutation]
    by_docno: dict[str, int] = {}
    for place, docno in enumerate(docnos):
        if docno is not None:
            by_docno.setdefault(docno, place)
    # "7" may be a position or a docno: what fits more of the entries; for a tie numbers are positions, texts docnos.
    fit_docno, fit_position = (sum(entry in known for entry in entries) for known in (by_docno, by_position))
    if fit_docno > fit_position or (fit_docno == fit_position and _is_list_of(permutation, str)):
        return [by_docno.get(entry) for entry in entries]
    if n > 1 and sorted(entries) == sorted(map(str, range(n))):
        raise ValueError(f"expected positions counted from 1, found 0 to {n - 1}")
    return [by_position.get(entry) for entry in entries]


def _labelled(record: dict[str, Any]) -> _Query:
    """A line of `read_labelled_passages`."""
    qid, query = _query(record)
    sides = []
    for names in (POSITIVES, NEGATIVES):
        found = _field(record, names)
        if not isinstance(found, list):
            raise ValueError(f"expected a list of passages in one of {_names(names)}, found fields {list(record)}")
        sides.append([_named(*_passage(item)) for item in found])
    return _Query(qid, query, [*sides[0], *sides[1]], n_positives=len(sides[0]))


def _query(record: dict[str, Any]) -> tuple[str, str | None]:
    """A record's qid and query."""
    query, qid = _field(record, QUERY), _field(record, QID)
    if isinstance(query, dict):  # RankLLM
        qid = _field(query, QID) if qid is None else qid
        query = _field(query, ("text", *QUERY))
    if qid is None and _is_list_of(record.get("hits"), dict):  # RankGPT has it with each document
        qid = next((_field(hit, ("qid",)) for hit in record["hits"]), None)
    if query is not None and not isinstance(query, str):
        raise ValueError(f"expected a query's text, found {_short(query)}")
    if qid is not None:
        return _id(qid), query
    if query is None:
        raise ValueError(f"expected a query (one of {_names(QUERY + QID)}), found fields {list(record)}")
    return text_id(query), query


def _passage(item: Any) -> tuple[str | None, str | None]:
    """A passage's docno and text, one of which it must have."""
    if isinstance(item, str):
        return None, item
    if not isinstance(item, dict):
        raise ValueError(f"expected a passage as a text or an object, found {_short(item)}")
    docno = _field(item, DOCNO)
    body = item["doc"] if isinstance(item.get("doc"), dict) else item  # RankLLM
    text, title = _field(body, TEXT), body.get("title")
    for value in (text, title):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"expected a passage's text, found {_short(value)}")
    if docno is None and text is None:
        raise ValueError(f"expected a passage with one of {_names(TEXT)}, found fields {list(item)}")
    if title and text is not None:
        text = f"{title.strip()} {text.strip()}".strip()
    return None if docno is None else _id(docno), text


def _named(docno: str | None, text: str | None) -> tuple[str, str | None]:
    return text_id(text or "") if docno is None else docno, text


def text_id(text: str) -> str:
    """The qid or docno of a text that has none: a digest, equal for equal texts."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"expected an id as a text or a whole number, found {_short(value)}")
    return str(value)


def _field(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _same_query(path: str | Path, number: int, again: _Query, queries: dict[str, str | None]) -> None:
    if again.query != queries[again.qid]:
        raise ValueError(
            f"{path}, line {number}: expected one query a qid, found {again.query!r} and {queries[again.qid]!r} "
            f"for {again.qid!r}"
        )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suffix(path: Path) -> str:
    """What a path ends in, before `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def check_unranked(unranked: str) -> None:
    """Raise a ValueError for anything but "drop" and "last"."""
    if unranked not in {"drop", "last"}:
        raise ValueError(f"expected unranked='drop' or 'last', found {unranked!r}")
