"""A teacher in any of its forms to a ranking with an order: a frame of qid, docno and score or rank.

Files of rankings and of labelled passages are read here too.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_msft.groups import as_ids, order_key, ranked, require_columns, top_documents
from pyterrier_msft.notices import warn

logger = logging.getLogger(__name__)
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

BATCH = 8  # queries a call of a teacher: fixed, since a cross-encoder's last digits depend on what is padded together


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


# ---- a teacher's ranking


def check(teacher: Any) -> None:
    """Raise a ValueError for what can't be a teacher, before anything is read or run."""
    if teacher is None or isinstance(teacher, pd.DataFrame | pt.Transformer):
        return
    if isinstance(teacher, str | Path):
        if not Path(teacher).is_file():
            raise ValueError(
                f"expected the path of a TREC run or of permutations as teacher, found no file {str(teacher)!r}"
            )
        return
    if isinstance(teacher, Mapping) and teacher:
        for part in teacher.values():
            check(part)
        return
    raise ValueError(
        "expected a teacher that is a frame, the path of a TREC run or of permutations (.jsonl), a transformer, a "
        f"mapping of names to these, or None, found {teacher!r}"
    )


def check_unranked(unranked: str) -> None:
    """Raise a ValueError for anything but "drop" and "last"."""
    if unranked not in {"drop", "last"}:
        raise ValueError(f"expected unranked='drop' or 'last', found {unranked!r}")


def ranking(
    teacher: Any,
    results: pd.DataFrame,
    *,
    depth: int | None = None,
    text_field: str = "text",
    verbose: bool = False,
) -> pd.DataFrame | None:
    """The teacher's ranking of the results' queries; None where the results are the teacher's own.

    Args:
        teacher: See `Distillation`.
        results: qid, query, docno, text, and score or rank.
        depth: Documents a query, from the top of the results, that a transformer is run on. None: all.
        text_field: The results' column of text.
        verbose: Whether to show the progress of a transformer.

    Raises:
        ValueError: If a file has another form, or one of several teachers knows none of the queries.
    """
    if isinstance(teacher, pt.Transformer):
        return _run(teacher, top_documents(results, depth=depth, text_field=text_field), verbose=verbose)
    if isinstance(teacher, str | Path):
        return _read_ranking(Path(teacher))
    if isinstance(teacher, Mapping):
        rankings = {}
        for name, part in teacher.items():
            found = ranking(part, results, depth=depth, text_field=text_field, verbose=verbose)
            rankings[name] = results if found is None else found
            if not _in_common(rankings[name], results):
                raise ValueError(
                    f"expected the teacher {name!r} to share queries and documents with the results, found none in "
                    "common"
                )
        return fuse(rankings)
    frame: pd.DataFrame | None = teacher
    return frame


def fuse(rankings: Mapping[Any, pd.DataFrame], *, k: float = 60) -> pd.DataFrame:
    """Rankings fused by reciprocal rank (Cormack, Clarke and Büttcher, SIGIR 2009).

    A document's score is the sum of 1/(k + rank) over the rankings that have it, with ranks from 1 and equal ranks
    for equal scores.

    Args:
        rankings: Frames of qid, docno, and score or rank, by name.
        k: How little the first ranks count; 60 is theirs.

    Returns:
        qid, docno, score.

    Raises:
        ValueError: If a ranking has no order.
    """
    shares = []
    for name, frame in rankings.items():
        require_columns(frame, ["qid", "docno"], f"the ranking of teacher {name!r}")
        key = order_key(frame)
        if key is None:
            raise ValueError(
                f"expected a score or a rank in the ranking of teacher {name!r}, found columns "
                f"{list(map(str, frame.columns))}"
            )
        pairs = pd.MultiIndex.from_arrays([as_ids(frame["qid"]), as_ids(frame["docno"])], names=["qid", "docno"])
        best = pd.Series(key, index=pairs).groupby(level=[0, 1]).max()  # of a document ranked twice the better place
        shares.append(1 / (k + best.groupby(level=0).rank(ascending=False, method="min")))
    table = pd.concat(shares, axis=1).fillna(0.0)
    # Summed in order of size: the same ranks from other teachers must give the same score to the last bit.
    scores = np.sort(table.to_numpy(dtype=np.float64), axis=1).sum(axis=1)
    return table.index.to_frame(index=False).assign(score=scores)


def _in_common(frame: pd.DataFrame, results: pd.DataFrame) -> bool:
    require_columns(frame, ["qid", "docno"], "a teacher's ranking")
    known = pd.MultiIndex.from_arrays([as_ids(frame["qid"]), as_ids(frame["docno"])])
    return bool(pd.MultiIndex.from_arrays([as_ids(results["qid"]), as_ids(results["docno"])]).isin(known).any())


def _read_ranking(path: Path) -> pd.DataFrame:
    """A file's ranking: permutations if its name says so, else a TREC run."""
    if _suffix(path) in {".jsonl", ".json"}:
        return read_permutations(path)
    try:
        frame: pd.DataFrame = pt.io.read_results(str(path))
        if frame["score"].isna().any():
            raise ValueError(f"{int(frame['score'].isna().sum()):,} lines without a score")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"expected a TREC run (qid Q0 docno rank score name) as teacher, or permutations by the suffix .jsonl, "
            f"found {path}: {error}"
        ) from error
    return frame


def _run(teacher: pt.Transformer, candidates: pd.DataFrame, *, verbose: bool) -> pd.DataFrame:
    """What a transformer makes of candidates whose queries stand together."""
    starts = [*np.flatnonzero(~candidates["qid"].duplicated().to_numpy()), len(candidates)]
    parts = []
    with pt.tqdm(total=len(starts) - 1, desc="teacher", unit="query", disable=not verbose) as bar:
        if isinstance(teacher, Cached) and len(candidates):
            return teacher.rank(candidates, bar.update)
        for start in range(0, len(starts) - 1, BATCH):
            end = min(start + BATCH, len(starts) - 1)
            parts.append(teacher(candidates.iloc[starts[start] : starts[end]].reset_index(drop=True)))
            bar.update(end - start)
    return pd.concat([part for part in parts if len(part)] or parts[:1] or [candidates], ignore_index=True)


# ---- a teacher's work, kept


def cached(teacher: pt.Transformer, folder: str | Path, *, batch_size: int = 1, verbose: bool = False) -> "Cached":
    """A re-ranker whose rankings are kept on disk as soon as they are there: an interrupted run goes on.

    A ranking is found again for the same query with the same documents, in the same order and with the same texts
    and other columns (score and rank count by the order that they make). A `fingerprint` of the teacher's counts too,
    such as that of a `MonoCE`; nothing else of a teacher can be told, so give each model and prompt its own folder.

    Args:
        teacher: Any transformer or pipeline that re-ranks results, such as an LLM.
        folder: Where the rankings are kept, in `rankings.jsonl`, which `read_permutations` reads as well.
        batch_size: Queries a call of the teacher, and so what an interruption can lose.
        verbose: Whether to show progress.

    Example:
        >>> llm = teachers.cached(llm, "rankings-of-llm")
        >>> ce = ce.fit(results, fitter=Distillation(teacher=llm))
    """
    return Cached(teacher, folder, batch_size=batch_size, verbose=verbose)


class Cached(pt.Transformer):
    """A re-ranker with its rankings on disk, see `cached`.

    Gives the input's rows with score and rank set anew, without the documents that the teacher left out.
    """

    __hash__ = object.__hash__
    schematic = {"label": "cached teacher"}  # noqa: RUF012

    def __init__(
        self, teacher: pt.Transformer, folder: str | Path, *, batch_size: int = 1, verbose: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(teacher, pt.Transformer):
            raise ValueError(f"expected a transformer to keep the rankings of, found {teacher!r}")
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"expected batch_size as a whole number above 0, found {batch_size!r}")
        self.teacher = teacher
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.verbose = verbose
        self._known: dict[str, dict[str, float]] = {}
        self._read_to = 0  # bytes of the file that are in _known

    def __repr__(self) -> str:
        return f"teachers.cached({self.teacher!r}, {str(self.folder)!r})"

    @property
    def path(self) -> Path:
        """The file of rankings: a JSON line each, with the docnos best first as `permutation`."""
        return self.folder / "rankings.jsonl"

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Re-rank each query's documents, asking the teacher for what isn't known yet.

        Raises:
            ValueError: If the teacher gives documents that it wasn't given, or a score that is not a number.
        """
        pt.validate.result_frame(inp, extra_columns=["query"], context=self)
        if not len(inp):
            return pt.model.add_ranks(inp.assign(score=pd.Series(dtype="float64")))
        n_queries = inp["qid"].nunique()
        with pt.tqdm(total=n_queries, desc="teacher", unit="query", disable=not self.verbose) as bar:
            return self.rank(inp, bar.update)

    def rank(self, inp: pd.DataFrame, progress: Callable[[int], Any]) -> pd.DataFrame:
        """As `transform`, for checked results; `progress` is told how many queries were done."""
        frame = inp.reset_index(drop=True).assign(qid=as_ids(inp["qid"]), docno=as_ids(inp["docno"]))
        key = order_key(frame)
        if key is not None:
            frame = frame.iloc[np.argsort(-key, kind="stable")]
        by_query = {str(qid): rows for qid, rows in frame.groupby("qid", sort=False)}
        qids, docnos = as_ids(inp["qid"]), as_ids(inp["docno"])
        lists = {qid: by_query[qid] for qid in qids.unique()}  # asked in the order of the results
        fingerprint = str(getattr(self.teacher, "fingerprint", ""))
        keys = {qid: _key(rows, fingerprint) for qid, rows in lists.items()}
        self._refresh()
        missing = [qid for qid, key in keys.items() if key not in self._known]
        progress(len(lists) - len(missing))
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            self._ask({keys[qid]: lists[qid] for qid in chunk})
            progress(len(chunk))
        empty: dict[str, float] = {}
        scores = np.array(
            [self._known.get(keys[qid], empty).get(docno, np.nan) for qid, docno in zip(qids, docnos, strict=True)],
            dtype=np.float64,
        )
        known = ~np.isnan(scores)
        return ranked(inp[known], scores[known])

    def _ask(self, lists: dict[str, pd.DataFrame]) -> None:
        """Have the teacher rank some queries' documents, and keep what it says."""
        out = self.teacher(pd.concat(list(lists.values()), ignore_index=True))
        require_columns(out, ["qid", "docno"], "what the teacher gives")
        key = order_key(out)
        if key is None:
            raise ValueError(
                f"expected a score or a rank from the teacher, found columns {list(map(str, out.columns))}"
            )
        said = pd.DataFrame({"qid": as_ids(out["qid"]), "docno": as_ids(out["docno"]), "score": key})
        said = said.sort_values("score", ascending=False, kind="stable").drop_duplicates(["qid", "docno"])
        by_query = dict(tuple(said.groupby("qid", sort=False)))
        lines = []
        for name, rows in lists.items():
            qid = rows["qid"].iloc[0]
            if qid not in by_query:
                continue  # not kept: a failure of the moment may be why there is nothing
            docnos, scores = by_query[qid]["docno"].tolist(), by_query[qid]["score"].tolist()
            if strange := set(docnos) - set(rows["docno"]):
                raise ValueError(
                    f"expected the teacher to re-rank the documents that it is given, found {len(strange)} others for "
                    f"query {qid!r}, such as {sorted(strange)[0]!r}"
                )
            record = {"key": name, "qid": qid, "query": str(rows["query"].iloc[0]), "permutation": docnos}
            lines.append(json.dumps({**record, "scores": scores}) + "\n")
        if lines:
            self._append("".join(lines))

    def _append(self, lines: str) -> None:
        """Write whole lines at the end of the file, through to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refresh()
        torn = self.path.is_file() and self.path.stat().st_size > self._read_to
        with self.path.open("ab") as file:
            file.write((("\n" if torn else "") + lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._refresh()

    def _refresh(self) -> None:
        """Read what was written since the last time; a line that was torn off counts for nothing."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._read_to:  # removed or begun anew
            self._known, self._read_to = {}, 0
        if size == self._read_to:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.split(b"\n") if whole else []:
            try:
                record = json.loads(line)
                self._known[record["key"]] = dict(zip(record["permutation"], record["scores"], strict=True))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a damaged line is left out", self.path)
        self._read_to += len(whole) + bool(whole)


def _key(rows: pd.DataFrame, fingerprint: str) -> str:
    """A digest of a query with its documents in order: of all columns but score and rank."""
    columns = sorted((column for column in rows.columns if column not in {"score", "rank"}), key=str)
    content = [[str(column), rows[column].tolist()] for column in columns]
    return hashlib.sha256(json.dumps([fingerprint, content], default=_plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A cell that JSON doesn't know, as something that it does."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
