"""JSON files of LLM permutations and of labelled passages."""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pyterrier_msft.checks import check_choice
from pyterrier_msft.data.answer_text import DOCNO
from pyterrier_msft.data.answers import Answer, resolve
from pyterrier_msft.notices import warn

# Field names in published files. If a record has several of them, the first here is used.
QUERY = ("query", "question", "query_text")
QID = ("qid", "query_id", "question_id", "id")
CANDIDATES = (
    "candidates", "hits", "ctxs", "docs", "documents", "passages", "retrieved_passages", "unsorted_docs",
)  # fmt: skip
PERMUTATION = ("permutation", "ranking", "re_rank_id", "response")
TEXT = ("text", "content", "contents", "passage", "segment", "body", "doc")
POSITIVES = ("positive_passages", "positives", "pos")
NEGATIVES = ("negative_passages", "negatives", "neg")
RERANKED = ("candidates", "hits")  # RankLLM and RankGPT write these in the teacher's order
UNRANKED = ("drop", "last")  # what to do with documents that a teacher didn't rank


@dataclass(frozen=True)
class Record:
    """A query of a file with its passages (docno, text)."""

    qid: str
    query: str | None
    passages: list[tuple[str | None, str | None]]  # docno (None: it has none), text
    order: Sequence[int | None] = ()  # the teacher's order of passages, as indices; None: not a passage
    answer: Answer | None = None  # the teacher's answer, if the order follows from it
    answer_docnos: Sequence[str] = ()  # the docnos of the answer's entries, if the file has them beside positions
    n_positives: int = 0  # the first passages are relevant


def read_permutations(path: str | Path, *, responses: str | Path | None = None, unranked: str = "drop") -> pd.DataFrame:
    """Read a teacher's rankings from a file of permutations, as RankGPT and similar tools write them.

    A line is a query with its candidates and a permutation of them:

    - the query: `query`, `question` or `query_text`, a string or an object of text and qid; with `qid`, `query_id`,
      `question_id` or `id`;
    - the candidates: `candidates`, `hits`, `ctxs`, `docs`, `documents`, `passages`, `retrieved_passages` or
      `unsorted_docs`; strings, or objects of `docno`, `docid`, `doc_id`, `pid`, `id` or `_id`, of `text`, `content`,
      `contents`, `passage`, `segment`, `body` or `doc` (or of these within `doc`), and `title`;
    - the permutation, best first: `permutation`, `ranking`, `re_rank_id` or `response`; positions, docnos, or an LLM's
      answer. Positions count from 1, or from 0 in the whole file; if the permutations don't tell, they are read as
      counted from 1, with a warning. A list of docnos needs no candidates. Objects in `candidates` or `hits`
      without a permutation are in the teacher's order, as RankLLM and RankGPT write them.

    Of an LLM's answers, these forms are read: a chain within any text ("[2] > [1]", "d2 > d1"); and, with nothing but a
    heading before them, a line of names ("2, 1"), one name per line, maybe with ranks ("1. Passage 2", "[1] d2", or the
    rows of a table), and JSON (`["d2", "d1"]`, `{"ranking": [2, 1]}`, `[{"rank": 1, "id": 2}]`). Thoughts in `<think>`
    aren't read. An answer of another form, or with two rankings, counts as a query without a ranking.

    A missing qid or docno is replaced with a digest of the text. An LLM's mistakes are counted in one warning: for a
    document that is named twice, the first position is used; an unknown document is ignored; a document that isn't
    named is unranked. For a query that occurs again, the first ranking is used.

    Args:
        path: JSON lines, or an array in a `.json` file; plain or `.gz`, in UTF-8.
        responses: A JSON array of permutations or answers, one per line of `path`, as RankGPT publishes them.
        unranked: "drop" drops unranked documents; "last" ranks them below all others, with equal scores.

    Returns:
        qid, query, docno, text, rank (from 0) and score (minus the rank), each query's best document first.

    Raises:
        ValueError: If a line has another format, or nothing is ranked.
    """
    check_choice("unranked", unranked, UNRANKED)
    answers = None if responses is None else ["" if answer is None else answer for _, answer in _read(responses)]
    lines = _read(path)
    if answers is not None and len(answers) != len(lines):
        raise ValueError(
            f"responses must have one permutation per query of {path}; got {len(answers):,} for {len(lines):,} queries"
        )
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    rows: list[tuple[str, str | None, str, str | None, int, float]] = []
    examples: dict[str, str] = {}  # the first query with a mistake, by mistake
    records = [*_parse(path, lines, lambda fields, i: _parse_ranking(fields, answers[i] if answers else None))]
    for record in _resolve(path, lines, records):
        before = counts.copy()
        if record.qid in seen:
            counts["repeated queries"] += 1
        else:
            ranked = list(_rank_passages(record, unranked, counts))
            seen |= {record.qid} if ranked else set()
            rows += [(record.qid, record.query, *passage) for passage in ranked]
        for what in counts - before:
            examples.setdefault(what, record.qid)
    if not rows:
        raise ValueError(f"{path} must have rankings; got none in {len(lines):,} lines")
    if mistakes := [f"{counts[what]:,} {what} (e.g. query {qid!r})" for what, qid in examples.items()]:
        warn(f"{path}: {len(lines):,} rankings with mistakes: {', '.join(mistakes)}")
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank", "score"])


def _rank_passages(record: Record, unranked: str, counts: Counter[str]) -> Iterator[tuple[str, str | None, int, float]]:
    """Yield the docno, text, rank and score of a query's passages, and count the teacher's mistakes."""
    ranked = list(dict.fromkeys(i for i in record.order if i is not None))
    missing = sorted(set(range(len(record.passages))) - set(ranked)) if ranked else []
    counts["queries without a ranking"] += not ranked
    counts["documents named twice"] += len(record.order) - record.order.count(None) - len(ranked)
    counts["unknown positions or docnos"] += record.order.count(None)
    counts[f"unranked documents, {'dropped' if unranked == 'drop' else 'ranked last'}"] += len(missing)
    seen: set[str] = set()
    for position, i in enumerate([*ranked, *(missing if unranked == "last" else [])]):
        docno, text = _with_id(*record.passages[i])
        if docno in seen:
            counts["repeated candidates"] += 1
        else:
            yield docno, text, len(seen), float(-min(position, len(ranked)))  # unranked ones have equal scores
            seen.add(docno)


def read_labelled_passages(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read queries with relevant and non-relevant passages in Tevatron's format, for `Contrastive`.

    A line has `query_id`, `query`, and lists `positive_passages` and `negative_passages` of docid, title and text
    (or `pos` and `neg`, or strings); title and text are joined with a space, as in Tevatron. Other names and ids are
    as in `read_permutations`. A passage in both lists is relevant; a warning counts such passages.

    Args:
        path: JSON lines, or an array in a `.json` file; plain or `.gz`, in UTF-8.

    Returns:
        Results (qid, query, docno, text; in the order of the file, without score or rank) and qrels (qid, docno,
        label 1).

    Raises:
        ValueError: If a line has another format.
    """
    rows = [
        (record.qid, record.query, *_with_id(*passage), int(i < record.n_positives))
        for record in _parse(path, _read(path), lambda fields, _: _parse_labelled(fields))
        for i, passage in enumerate(record.passages)
    ]
    if not rows:
        raise ValueError(f"{path} must have queries with passages; got none")
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "label"])
    labels = frame.groupby(["qid", "docno"], sort=False)["label"]
    if both := int((labels.min() < labels.max()).sum()):
        warn(f"{path}: {both:,} passages are both positive and negative; they are used as positives")
    frame = frame.assign(label=labels.transform("max")).drop_duplicates(["qid", "docno"], ignore_index=True)
    qrels = frame.loc[frame["label"] == 1, ["qid", "docno", "label"]].reset_index(drop=True)
    return frame.drop(columns="label"), qrels


def text_id(text: str) -> str:
    """Return a digest of a text, to replace a missing qid or docno."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def uncompressed_suffix(path: Path) -> str:
    """Return the suffix of a path without `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


# ---- files


def _read(path: str | Path) -> list[tuple[int, Any]]:
    """Return the JSON values of a file by line number; the items of an array are numbered from 1."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"path must be a file of JSON lines; there is no file {str(path)!r}")
    is_array, number, values = uncompressed_suffix(path) == ".json", 1, []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if is_array:
                array = json.loads(file.read().decode("utf-8-sig"))
                if isinstance(array, list):
                    return list(enumerate(array, 1))
                raise ValueError(f"{_shorten(array)}, which isn't an array")
            for number, line in enumerate(file, 1):
                if text := line.decode("utf-8-sig").strip():
                    values.append((number, json.loads(text)))
    except json.JSONDecodeError as error:
        number = error.lineno if is_array else number
        raise ValueError(
            f"{path}, line {number}: the line must be JSON; got an error at column {error.colno} ({error.msg})"
        ) from error
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, line {number}: the file must be JSON in UTF-8; got {error}") from error
    return values


def _parse(
    path: str | Path, lines: list[tuple[int, Any]], parse: Callable[[dict[str, Any], int], Record]
) -> Iterator[Record]:
    """Parse the JSON value of each line; errors name the line."""
    queries: dict[str, str | None] = {}
    for i, (number, fields) in enumerate(lines):
        try:
            if not isinstance(fields, dict):
                raise ValueError(f"the line must be an object; got {_shorten(fields)}")
            record = parse(fields, i)
            known = queries.setdefault(record.qid, record.query)
            if record.query != known:
                raise ValueError(f"qid {record.qid!r} must have one query; got {record.query!r} and {known!r}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield record


def _resolve(path: str | Path, lines: list[tuple[int, Any]], records: list[Record]) -> Iterator[Record]:
    """Find the order of the passages that the answers of a whole file name."""
    numbered = {number: record for (number, _), record in zip(lines, records, strict=True)}
    orders = resolve({number: record.answer for number, record in numbered.items() if record.answer}, path)
    for number, record in numbered.items():
        order, passages = orders.get(number, record.order), [*record.passages]
        for i, docno in zip(order, record.answer_docnos, strict=False):
            if i is not None and passages[i][0] is None:
                passages[i] = (docno, passages[i][1])
        yield replace(record, order=order, passages=passages)


# ---- records


def _parse_ranking(fields: dict[str, Any], answer: Any = None) -> Record:
    """Parse a line of `read_permutations`."""
    qid, query = _parse_query(fields)
    candidates = _get(fields, CANDIDATES)
    permutation = _get(fields, PERMUTATION) if answer is None else answer
    if candidates is None:
        if not (_is_list_of(permutation, str) and permutation):
            raise ValueError(f"candidates are required (one of {', '.join(CANDIDATES)}); got the fields {list(fields)}")
        index = {docno: i for i, docno in enumerate(dict.fromkeys(permutation))}
        return Record(qid, query, [(docno, None) for docno in index], [index[docno] for docno in permutation])
    if not isinstance(candidates, list):
        raise ValueError(f"candidates must be a list; got {_shorten(candidates)}")
    passages = [*map(_parse_passage, candidates)]
    if permutation is None:
        # A list with an unknown name may be the permutation; then the order of candidates isn't the ranking.
        others = [name for name, value in fields.items() if _is_list_of(value, str | int) and value]
        if others or not any(name in fields for name in RERANKED) or not _is_list_of(candidates, dict):
            names = ", ".join(PERMUTATION)
            raise ValueError(f"a permutation is required (one of {names}); got the fields {list(fields)}")
        return Record(qid, query, passages, range(len(candidates)))
    docnos = [docno for docno, _ in passages]
    if isinstance(permutation, str):
        answer = Answer.of_text(permutation, docnos)
    elif _is_list_of(permutation, str | int):
        answer = Answer.of_list(permutation, docnos)
    else:
        raise ValueError(f"permutation must have positions, docnos or text; got {_shorten(permutation)}")
    ranked, n = fields.get("sorted_docids"), len(answer.entries)  # Reason-to-Rank: docnos in the teacher's order
    if ranked is not None and (not _is_list_of(ranked, str | int) or len(ranked) != n):
        raise ValueError(f"sorted_docids must have {n} ids, as the permutation; got {_shorten(ranked)}")
    return Record(qid, query, passages, answer=answer, answer_docnos=[*map(str, ranked or ())])


def _parse_labelled(fields: dict[str, Any]) -> Record:
    """Parse a line of `read_labelled_passages`."""
    qid, query = _parse_query(fields)
    sides = []
    for names in (POSITIVES, NEGATIVES):
        passages = _get(fields, names)
        if not isinstance(passages, list):
            raise ValueError(f"one of {', '.join(names)} must be a list; got the fields {list(fields)}")
        sides.append([*map(_parse_passage, passages)])
    return Record(qid, query, [*sides[0], *sides[1]], n_positives=len(sides[0]))


def _parse_query(fields: dict[str, Any]) -> tuple[str, str | None]:
    query, qid = _get(fields, QUERY), _get(fields, QID)
    if isinstance(query, dict):  # RankLLM
        qid = _get(query, QID) if qid is None else qid
        query = _get(query, ("text", *QUERY))
    if qid is None and _is_list_of(fields.get("hits"), dict):  # RankGPT has the qid in each document
        qid = next((_get(hit, ("qid",)) for hit in fields["hits"]), None)
    if query is not None and not isinstance(query, str):
        raise ValueError(f"query must be text; got {_shorten(query)}")
    if qid is not None:
        return _parse_id(qid), query
    if query is None:
        raise ValueError(f"a query is required (one of {', '.join(QUERY + QID)}); got the fields {list(fields)}")
    return text_id(query), query


def _parse_passage(item: Any) -> tuple[str | None, str | None]:
    """Return a passage's docno and text, at least one of which isn't None."""
    if isinstance(item, str):
        return None, item
    if not isinstance(item, dict):
        raise ValueError(f"a passage must be text or an object; got {_shorten(item)}")
    docno = _get(item, DOCNO)
    body = item["doc"] if isinstance(item.get("doc"), dict) else item  # RankLLM
    text, title = _get(body, TEXT), body.get("title")
    for value in (text, title):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"a passage's text and title must be text; got {_shorten(value)}")
    if docno is None and text is None:
        raise ValueError(f"a passage must have one of {', '.join(TEXT)}; got the fields {list(item)}")
    if title and text is not None:
        text = f"{title.strip()} {text.strip()}".strip()
    return None if docno is None else _parse_id(docno), text


def _with_id(docno: str | None, text: str | None) -> tuple[str, str | None]:
    return text_id(text or "") if docno is None else docno, text


def _parse_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"an id must be text or an integer; got {_shorten(value)}")
    return str(value)


def _get(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
