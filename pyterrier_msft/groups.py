"""Result frames with qrels, or with a teacher's ranking, to groups that a listwise loss learns from.

A group is a query with some of its documents and a label for each, higher being better. Ranks become labels here
and nowhere else.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd

PASSAGE = r"%p\d+$"  # what pt.text.sliding appends to a docno


@dataclass(frozen=True)
class Group:
    """One query's documents as they go into a batch: `texts` and `labels` have the same length."""

    qid: str
    query: str
    texts: list[str]
    labels: np.ndarray  # (documents,) float32, higher is better


@dataclass(frozen=True)
class Groups:
    """All that a stage trains on, a list a query, from which each epoch draws its groups.

    Without `n_negatives` a draw takes the whole list. With it, a draw takes `n_positives` of the documents with a
    label above 0 (None: all) and `n_negatives` of the others (fewer where there are fewer), anew each epoch.
    """

    qids: list[str]
    queries: list[str]
    texts: list[str]  # each distinct text once
    documents: list[np.ndarray]  # for each query, indices into texts, the best-ranked first
    labels: list[np.ndarray]  # for each query, float32 labels of its documents
    n_negatives: int | None = None
    n_positives: int | None = 1
    load: Callable[[list[str]], list[str]] | None = None  # then `texts` are docnos, whose texts this looks up

    def __len__(self) -> int:
        return len(self.qids)

    def text(self, documents: Iterable[int]) -> list[str]:
        """The texts of documents given as indices."""
        found = [self.texts[i] for i in documents]
        return found if self.load is None else self.load(found)

    def draw(self, index: int, *, seed: int, epoch: int) -> Group:
        """The group of one query in one epoch: the same for the same arguments, whatever was drawn before."""
        documents, labels = self.documents[index], self.labels[index]
        if self.n_negatives is not None:
            rng = np.random.default_rng([seed, epoch, index])
            relevant = labels > 0
            chosen = np.concatenate(
                [
                    _choose(rng, np.flatnonzero(relevant), self.n_positives),
                    _choose(rng, np.flatnonzero(~relevant), self.n_negatives),
                ]
            )
            documents, labels = documents[chosen], labels[chosen]
        return Group(self.qids[index], self.queries[index], self.text(documents), labels)

    def lengths(self) -> np.ndarray:
        """Characters of each query's longest document with the query: what batches of like length are made by.

        Of the query alone where texts are looked up only when they are needed.
        """
        queries = np.array([len(query) for query in self.queries], dtype=np.int64)
        if self.load is not None:
            return queries
        characters = np.array([len(text) for text in self.texts], dtype=np.int64)
        longest = [characters[documents].max(initial=0) for documents in self.documents]
        return queries + np.array(longest, dtype=np.int64)

    def digest(self) -> str:
        """A digest of the content, for cache keys: whatever the labels come from, they are told here."""
        digest = hashlib.sha256(f"{self.n_negatives} {self.n_positives} {self.load is None}".encode())
        for strings in (self.qids, self.queries, self.texts):
            for string in strings:
                content = string.encode("utf-8", "surrogatepass")
                digest.update(b"%d " % len(content) + content)
        for documents, labels in zip(self.documents, self.labels, strict=True):
            digest.update(b"%d " % len(documents) + documents.astype("<i8").tobytes() + labels.astype("<f4").tobytes())
        return digest.hexdigest()


def joined(parts: Iterable[tuple[Groups, "DataReport"]]) -> tuple[Groups, "DataReport"]:
    """Groups that were made piece by piece, of different queries, as one, in the order of their qids."""
    codes: dict[str, int] = {}
    pieces, reports = [], []
    for groups, report in parts:
        of_piece = np.array([codes.setdefault(text, len(codes)) for text in groups.texts], dtype=np.int32)
        documents = [of_piece[indices] for indices in groups.documents]
        pieces.append(replace(groups, texts=[], documents=documents))
        reports.append(report)
    order = sorted(range(sum(map(len, pieces))), key=[qid for piece in pieces for qid in piece.qids].__getitem__)

    def ordered(name: str) -> list[Any]:
        values = [value for piece in pieces for value in getattr(piece, name)]
        return [values[i] for i in order]

    chosen = pieces[0] if pieces else Groups([], [], [], [], [])
    return (
        replace(
            chosen, qids=ordered("qids"), queries=ordered("queries"), texts=list(codes),
            documents=ordered("documents"), labels=ordered("labels"),
        ),
        DataReport.total(reports),
    )  # fmt: skip


def _choose(rng: np.random.Generator, items: np.ndarray, n: int | None) -> np.ndarray:
    return items if n is None or n >= len(items) else rng.choice(items, n, replace=False)


@dataclass(frozen=True)
class DataReport:
    """What a stage found in its training data, counted before training. Shares are between 0 and 1."""

    queries: int = 0
    groups: int = 0
    documents: int = 0  # query-document pairs that groups are drawn from
    duplicates: int = 0  # pairs given more than once
    without_text: int = 0  # pairs
    without_query: int = 0  # pairs whose query has no text
    without_relevant: int = 0  # queries
    unjudged: int = 0  # queries without a relevant document that the qrels don't have at all
    without_negatives: int = 0  # queries
    without_teacher: int = 0  # queries
    unranked_by_teacher: int = 0  # pairs, left out
    ranked_last: int = 0  # pairs that the teacher did not rank, placed below all others
    judged_twice: int = 0  # pairs with two labels in the qrels, of which the higher counts
    several_queries: int = 0  # qids with several texts, of which the best-ranked document's counts
    tied_labels: float = 0.0  # of the pairs of documents in a list, by a teacher
    agreement: float | None = None  # mean rank correlation of the teacher with the first stage, -1 to 1
    truncated_queries: float = 0.0
    truncated_documents: float = 0.0

    def __repr__(self) -> str:
        lines = [f"{self.groups:,} of {self.queries:,} queries to learn from, with {self.documents:,} documents"]
        unjudged = f" ({self.unjudged:,} of them not in the qrels)" if self.unjudged else ""
        counts = {
            f"queries without a relevant document{unjudged}": self.without_relevant,
            "queries without a document that is not relevant": self.without_negatives,
            "queries without the teacher's ranking": self.without_teacher,
            "documents that the teacher did not rank": self.unranked_by_teacher,
            "documents without text": self.without_text,
            "documents whose query has no text": self.without_query,
            "documents given twice for a query": self.duplicates,
        }
        lines += [f"{count:,} {what}: left out" for what, count in counts.items() if count]
        taken = {
            "documents that the teacher did not rank: placed below all others": self.ranked_last,
            "documents with two labels in the qrels: the higher counts": self.judged_twice,
            "qids with several queries: that of the best-ranked document counts": self.several_queries,
        }
        lines += [f"{count:,} {what}" for what, count in taken.items() if count]
        shares = {
            "of the teacher's pairs of documents are tied": self.tied_labels,
            "of the queries are cut to fit (max_query_length)": self.truncated_queries,
            "of the documents are cut to fit (max_length)": self.truncated_documents,
        }
        lines += [f"{share:.1%} {what}" for what, share in shares.items() if share]
        if self.agreement is not None:
            lines.append(f"teacher and first stage agree by a rank correlation of {self.agreement:.2f}")
        return "\n  ".join(["DataReport:", *lines])

    @classmethod
    def total(cls, reports: Sequence["DataReport"]) -> "DataReport":
        """The report on pieces of data: counts added up, shares averaged over the groups."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            found = [(getattr(report, f.name), report.groups) for report in reports]
            known = [(value, weight) for value, weight in found if value is not None]
            if f.type is int:
                values[f.name] = sum(value for value, _ in known)
            elif total := sum(weight for _, weight in known):
                values[f.name] = sum(value * weight for value, weight in known) / total
        return cls(**values)

    def dropped(self) -> str:
        """What was left out, in words, for a warning; empty if nothing was."""
        return "; ".join(self._lines(": left out"))

    def contradictions(self) -> str:
        """Where the data say two things, and which was taken, in words, for a warning; empty if nowhere."""
        return "; ".join(f"{line} counts" for line in self._lines(" counts"))

    def _lines(self, end: str) -> list[str]:
        return [line.strip().removesuffix(end) for line in repr(self).split("\n") if line.endswith(end)]

    def upside_down(self) -> bool:
        """Whether the teacher seems to rank the worst first: it contradicts the first stage on the whole."""
        return self.agreement is not None and self.agreement < -0.2


@dataclass(frozen=True)
class _Lists:
    """Result rows made clean: one row a (qid, docno), each query's best first, and what that cost."""

    rows: pd.DataFrame  # qid, query, docno, text, row (of the results), key (higher is better), order (0 for the best)
    ordered: bool  # whether the results said an order
    counts: dict[str, int] = field(default_factory=dict)


def clean_results(results: pd.DataFrame, *, text_field: str) -> _Lists:
    """Ids as strings, each query's documents in order of score (or rank), without duplicates and empty texts.

    Raises:
        ValueError: If a column is missing, an id is missing, a score is not a number, or a text is something else.
    """
    require_columns(results, ["qid", "query", "docno", text_field], "training results")
    no_query, no_text = (without_text(results[column]) for column in ("query", text_field))
    rows = pd.DataFrame({"qid": as_ids(results["qid"]), "docno": as_ids(results["docno"])})
    rows["query"], rows["text"] = as_texts(results["query"]), as_texts(results[text_field])
    rows["no_query"], rows["no_text"] = no_query, no_text
    rows["row"] = np.arange(len(rows))
    key = order_key(results)
    ordered = key is not None
    rows["key"] = key if key is not None else -np.arange(len(rows), dtype=np.float64)
    rows = rows.sort_values("key", ascending=False, kind="stable")
    n_queries = rows["qid"].nunique()
    unique = rows.drop_duplicates(["qid", "docno"])
    usable = unique[~unique["no_query"] & ~unique["no_text"]].drop(columns=["no_query", "no_text"])
    usable = usable.assign(order=usable.groupby("qid", sort=False).cumcount())
    counts = {
        "queries": n_queries,
        "duplicates": len(rows) - len(unique),
        "without_query": int(unique["no_query"].sum()),
        "without_text": int((unique["no_text"] & ~unique["no_query"]).sum()),
        "several_queries": _several(usable),
    }
    return _Lists(usable.reset_index(drop=True), ordered, counts)


def top_documents(results: pd.DataFrame, *, depth: int | None, text_field: str = "text") -> pd.DataFrame:
    """The documents that `from_teacher` takes of the results, for a teacher to rank.

    Returns:
        The results' columns, ids as strings and rank (from 0) set anew, a query's rows together and its best first.
    """
    rows = clean_results(results, text_field=text_field).rows
    rows = rows if depth is None else rows[rows["order"] < depth]
    # By the queries' first places in the results, and not by score across queries.
    first = pd.Series(pd.factorize(as_ids(results["qid"]))[0])
    rows = rows.iloc[np.lexsort((rows["order"].to_numpy(), first.to_numpy()[rows["row"].to_numpy()]))]
    return (
        results.iloc[rows["row"].to_numpy()]
        .assign(qid=rows["qid"].to_numpy(), docno=rows["docno"].to_numpy(), rank=rows["order"].to_numpy())
        .reset_index(drop=True)
    )


def from_qrels(
    results: pd.DataFrame,
    qrels: pd.DataFrame,
    *,
    depth: int | None,
    n_negatives: int,
    min_relevance: float,
    n_positives: int | None = 1,
    text_field: str = "text",
) -> tuple[Groups, DataReport]:
    """Groups of relevant documents and negatives, for a contrastive loss.

    A document of at least `min_relevance` is relevant, with its grade as label, wherever it stands in the results;
    the others, judged or not, are negatives if they stand in the top `depth`, with label 0. Passages (docno `d%p0`)
    have their document's grade. An epoch takes each query once, with a relevant document drawn anew.
    """
    lists = clean_results(results, text_field=text_field)
    grades = grades_of(qrels)
    rows = lists.rows
    known = set(grades.index.get_level_values("qid"))
    pairs = pd.MultiIndex.from_arrays([rows["qid"], rows["docno"].str.replace(PASSAGE, "", regex=True)])
    grade = grades.reindex(pairs).to_numpy(dtype=np.float64)
    rows = rows.assign(label=np.where(grade >= min_relevance, grade, 0.0))  # NaN >= x is False
    if (rows["label"] < 0).any() or min_relevance <= 0:
        raise ValueError(f"expected min_relevance above 0, found {min_relevance}")
    if depth is not None:
        rows = rows[(rows["label"] > 0) | (rows["order"] < depth)]
    relevant = rows["label"] > 0
    has_relevant = relevant.groupby(rows["qid"]).transform("any")
    has_negative = (~relevant).groupby(rows["qid"]).transform("any")
    groups = _groups(rows[has_relevant & has_negative], n_negatives=n_negatives, n_positives=n_positives)
    without_relevant = lists.counts["queries"] - rows.loc[has_relevant, "qid"].nunique()
    return groups, DataReport(
        groups=len(groups),
        documents=_count(groups),
        without_relevant=without_relevant,
        unjudged=sum(qid not in known for qid in as_ids(results["qid"]).unique()),
        judged_twice=_judged_twice(qrels),
        without_negatives=lists.counts["queries"] - without_relevant - len(groups),
        **lists.counts,
    )


def missing_positives(results: pd.DataFrame, qrels: pd.DataFrame, *, min_relevance: float) -> pd.DataFrame:
    """The relevant documents of the results' queries that the results lack: a frame of qid, query, docno."""
    grades = grades_of(qrels)
    relevant = grades[grades >= min_relevance].index.to_frame(index=False)
    queries = pd.DataFrame({"qid": as_ids(results["qid"]), "query": results["query"].to_numpy()}).drop_duplicates("qid")
    docnos = as_ids(results["docno"]).str.replace(PASSAGE, "", regex=True)
    present = pd.MultiIndex.from_arrays([as_ids(results["qid"]), docnos])
    wanted = relevant.merge(queries, on="qid")
    return wanted[~pd.MultiIndex.from_frame(wanted[["qid", "docno"]]).isin(present)].reset_index(drop=True)


def from_teacher(
    results: pd.DataFrame,
    ranking: pd.DataFrame | None,
    *,
    depth: int | None,
    keep_scores: bool = False,
    unranked: str = "drop",
    text_field: str = "text",
) -> tuple[Groups, DataReport]:
    """Groups of the first stage's top `depth` documents with the teacher's ranking as labels, for distillation.

    Args:
        results: The first stage's results; with `ranking=None` they are the teacher's.
        ranking: The teacher's: qid, docno and score, or rank where there is no score.
        depth: Documents a query, from the top of the results. None: all.
        keep_scores: Whether the teacher's scores are the labels; else its ranks are, a label being the number of
            the list's documents that the teacher places below (equal for equal scores).
        unranked: What becomes of documents that the teacher didn't rank, in a list that it knows: "drop" leaves them
            out, "last" places them below all others, tied among themselves.
        text_field: The results' column of text.

    Raises:
        ValueError: If neither the results nor the ranking say an order, or they have no query in common.
    """
    lists = clean_results(results, text_field=text_field)
    teacher = results if ranking is None else ranking
    require_columns(teacher, ["qid", "docno"], "a teacher's ranking")
    key = order_key(teacher)
    if key is None:
        raise ValueError(
            f"expected a score or a rank in the teacher's ranking, found columns {list(map(str, teacher.columns))}"
        )
    if keep_scores and "score" not in teacher.columns:
        raise ValueError("expected a column 'score' in the teacher's ranking, found ranks only")
    rows = lists.rows if depth is None else lists.rows[lists.rows["order"] < depth]
    if ranking is not None:
        scores = pd.Series(key, index=pd.MultiIndex.from_arrays([as_ids(teacher["qid"]), as_ids(teacher["docno"])]))
        scores = scores.groupby(level=[0, 1]).max()  # of a document ranked twice the better place
        rows = rows.assign(key=scores.reindex(pd.MultiIndex.from_frame(rows[["qid", "docno"]])).to_numpy())
    missing = rows["key"].isna()
    known = rows.loc[~missing, "qid"].nunique()
    if not known and len(rows):
        raise ValueError(
            "expected the teacher's ranking to share queries and documents with the results, found none in common: "
            + mismatch(rows, teacher, "the teacher's ranking")
        )
    if unranked == "last":
        if keep_scores:
            raise ValueError("expected unranked='drop' with the teacher's scores as labels, found 'last'")
        known_query = (~missing).groupby(rows["qid"]).transform("any")
        rows = rows.assign(key=rows["key"].mask(missing & known_query, -np.inf))
    ranked = rows[rows["key"].notna()]
    by_query = ranked.groupby("qid", sort=False)["key"]
    if keep_scores and not np.isfinite(ranked["key"]).all():
        raise ValueError(
            f"expected finite scores of a teacher, found {_some(ranked['key'].to_numpy()[~np.isfinite(ranked['key'])])}"
        )
    labels = ranked["key"] if keep_scores else by_query.rank(method="min") - 1
    ranked = ranked.assign(label=labels)
    # A list of one document, or whose documents are all tied, has nothing to say.
    ranked = ranked[by_query.transform("nunique") > 1]
    groups = _groups(ranked, n_negatives=None, n_positives=None)
    n_missing = int(missing[rows["qid"].isin(ranked["qid"].unique())].sum())
    return groups, DataReport(
        groups=len(groups),
        documents=_count(groups),
        without_teacher=lists.counts["queries"] - known,
        unranked_by_teacher=n_missing if unranked == "drop" else 0,
        ranked_last=n_missing if unranked == "last" else 0,
        tied_labels=_tied_share(groups),
        agreement=_agreement(ranked) if ranking is not None and lists.ordered else None,
        **lists.counts,
    )


def bare_ranks(ranking: pd.DataFrame) -> bool:
    """Whether a ranking's scores only restate its ranks, as 1/rank or depth - rank do, and are no model's scores.

    Such scores differ within a query, and depend on the place alone, counted from the top or from the bottom.
    """
    if "score" not in ranking.columns or not len(ranking):
        return True
    scores = pd.to_numeric(ranking["score"]).astype(float).reset_index(drop=True)
    by_query = scores.groupby(as_ids(ranking["qid"]))
    if (by_query.nunique() < by_query.size()).any():
        return False
    place = by_query.rank(ascending=False)
    if by_query.ngroups == 1:  # nothing to compare with: whole steps of one are the mark of ranks
        return bool(np.allclose(by_query.transform("max") - scores, place - 1))
    from_top = by_query.transform("max") - scores
    return any(bool((values.groupby(place).agg(np.ptp) < 1e-9).all()) for values in (from_top, scores))


def grades_of(qrels: pd.DataFrame) -> pd.Series:
    """Qrels as a series of labels over (qid, docno), ids as strings; of a pair judged twice the higher label.

    Raises:
        ValueError: If a column or an id is missing, or a label is not a finite number.
    """
    return _labels(qrels).groupby(level=[0, 1]).max()


def _labels(qrels: pd.DataFrame) -> pd.Series:
    require_columns(qrels, ["qid", "docno", "label"], "qrels")
    labels = _numbers(qrels["label"], "label")
    if not np.isfinite(labels).all():
        raise ValueError(f"expected a number as every label, found {_some(labels[~np.isfinite(labels)])}")
    index = pd.MultiIndex.from_arrays([as_ids(qrels["qid"]), as_ids(qrels["docno"])], names=["qid", "docno"])
    return pd.Series(labels, index=index)


def _judged_twice(qrels: pd.DataFrame) -> int:
    labels = _labels(qrels)
    if labels.index.is_unique:
        return 0
    return int((labels.groupby(level=[0, 1]).nunique() > 1).sum())


def _several(rows: pd.DataFrame) -> int:
    """How many qids have several queries."""
    distinct = rows[["qid", "query"]].drop_duplicates()["qid"]
    return int(distinct[distinct.duplicated()].nunique())


def mismatch(results: pd.DataFrame, other: pd.DataFrame, what: str) -> str:
    """Why results and `other` (qrels, or a teacher's ranking) have no document in common, in words."""
    if not len(other):
        return f"there are no rows in {what}"
    for column in ("qid", "docno"):
        here, there = as_ids(results[column]), as_ids(other[column])
        if column == "docno":
            here = here.str.replace(PASSAGE, "", regex=True)
        if not here.isin(there).any():
            return (
                f"the {column}s don't match, such as {results[column].iloc[0]!r} in the results and "
                f"{other[column].iloc[0]!r} in {what}"
            )
    return f"qids and docnos match, but no document of a query's results is in {what} for that query"


def as_ids(values: pd.Series) -> pd.Series:
    """Ids as strings, with a plain index: after `|` a result frame's index is not unique.

    Blanks at the ends are cut, and the whole numbers that pandas makes floats of, where one is missing, are read as
    what they were: 1.0 is "1".

    Raises:
        ValueError: If an id is missing, or no Unicode text.
    """
    values = values.reset_index(drop=True)
    require_ids(values.to_frame(), [values.name])
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    if pd.api.types.is_float_dtype(values):
        values = values.astype(object)
    if values.dtype == object and any(issubclass(kind, float | np.floating) for kind in set(map(type, values))):
        values = values.map(_whole)
    try:
        return values.astype(str).str.strip()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected every {values.name} in Unicode, found {error.object!r}") from error


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float | np.floating) and float(value).is_integer() else value


def without_text(values: pd.Series) -> np.ndarray:
    """Which of a column's values are no text: missing (None, NaN, NA) or blank.

    Raises:
        ValueError: If there is something else than text and numbers, such as a list of passages.
    """
    if _is_text(values):
        spaces = values.str.isspace().to_numpy(dtype=bool, na_value=False)
        empty = (values == "").to_numpy(dtype=bool, na_value=False)
        return values.isna().to_numpy(dtype=bool) | spaces | empty
    column = values.tolist()
    kinds = set(map(type, column))
    for kind in kinds:
        if not issubclass(kind, str | Number | np.bool_ | type(None) | type(pd.NA) | type(pd.NaT)):
            raise ValueError(f"expected text in the column {values.name!r}, found {kind.__name__} in it")
    blank = np.fromiter((isinstance(text, str) and not text.strip() for text in column), bool, len(column))
    return values.isna().to_numpy(dtype=bool) | blank


def as_texts(values: pd.Series) -> pd.Series:
    """A column's texts with a plain index: a number as it is written, what is missing as the empty text.

    Lone surrogates, which no tokenizer takes, become '?'.
    """
    plain = values.reset_index(drop=True)
    if _is_text(values):
        return plain.fillna("")
    missing = plain.isna().to_numpy(dtype=bool)
    column = ["" if gone else str(text) for text, gone in zip(plain.tolist(), missing, strict=True)]
    return pd.Series(
        [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in column], dtype=str
    )


def _is_text(values: pd.Series) -> bool:
    """Whether the dtype admits nothing but text, and of that only what is valid."""
    return isinstance(values.dtype, pd.StringDtype | pd.ArrowDtype) and pd.api.types.is_string_dtype(values.dtype)


def order_key(frame: pd.DataFrame) -> np.ndarray | None:
    """What orders a result frame, higher being better: the score, else the negative rank, else None."""
    if "score" in frame.columns:
        key = _numbers(frame["score"], "score")
    elif "rank" in frame.columns:
        key = -_numbers(frame["rank"], "rank")
    else:
        return None
    if np.isnan(key).any():
        raise ValueError(f"expected a number as every score, found {int(np.isnan(key).sum())} NaN")
    return key


def _numbers(values: pd.Series, what: str) -> np.ndarray:
    try:
        return pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        numbers = pd.to_numeric(values.astype(str), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        raise ValueError(
            f"expected a number as every {what}, found {_some(values.to_numpy()[np.isnan(numbers)])}"
        ) from error


def _some(values: np.ndarray) -> str:
    return f"{len(values):,} such as {values[0]!r}" if len(values) else "none"


# How other tools call PyTerrier's columns.
ELSEWHERE = {
    "qid": ("query_id", "queryid", "topic", "topic_id", "q_id"),
    "docno": ("doc_id", "docid", "document_id", "pid", "passage_id", "d_id"),
    "query": ("query_text", "question", "title"),
    "text": ("body", "contents", "content", "passage", "doc_text"),
    "label": ("relevance", "rel", "grade", "judgment"),
    "score": ("sim", "similarity"),
}


def require_columns(frame: Any, columns: list[str], what: str) -> None:
    """Raise a ValueError that names what is expected and what is there, and what may help."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"expected {what} as a data frame, found {type(frame).__name__}")
    names = list(map(str, frame.columns))
    if missing := [column for column in columns if column not in frame.columns]:
        others = {other: column for column in missing for other in ELSEWHERE.get(column, ()) if other in frame.columns}
        levels = [name for name in frame.index.names if name in missing]
        hint = ""
        if others:
            hint = f"; rename them by .rename(columns={others})"
        elif levels:
            hint = f"; {', '.join(map(repr, levels))} is in the index: give frame.reset_index()"
        elif "label" in missing and "score" in frame.columns:
            hint = "; these look like results: are the arguments swapped?"
        elif "query" in missing and "label" in frame.columns:
            hint = "; these look like qrels: are the arguments swapped?"
        elif "docno" in missing and "query" in frame.columns:
            hint = "; these look like topics: give what a first stage finds for them, first_stage(topics)"
        raise ValueError(f"expected columns {columns} in {what}, found {names}{hint}")
    if twice := [column for column in (*columns, "score", "rank") if names.count(column) > 1]:
        raise ValueError(f"expected one column {twice[0]!r} in {what}, found {names.count(twice[0])}")


def require_ids(frame: pd.DataFrame, columns: Iterable[Any]) -> None:
    """Raise a ValueError that counts the rows without an id."""
    for column in columns:
        if missing := int(frame[column].isna().sum()):
            raise ValueError(f"expected a {column} in every row, found {missing:,} of {len(frame):,} without")


def frame_digest(frame: pd.DataFrame) -> str:
    """A digest of a frame's content and column names, for cache keys: another order of rows is another digest."""
    digest = hashlib.sha256(repr(sorted(map(str, frame.columns))).encode())
    for column in sorted(frame.columns, key=str):
        values = frame[column]
        if not pd.api.types.is_numeric_dtype(values):
            values = values.astype(str)
        digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _groups(rows: pd.DataFrame, *, n_negatives: int | None, n_positives: int | None) -> Groups:
    """Rows of (qid, query, text, label, order) as groups."""
    # Sorted by qid, so that the order of the results doesn't decide what a seed draws.
    rows = rows.sort_values(["qid", "order"], kind="stable")
    codes, texts = pd.factorize(rows["text"])
    starts = np.flatnonzero(~rows["qid"].duplicated().to_numpy())
    first = rows.iloc[starts]
    return Groups(
        qids=first["qid"].tolist(),
        queries=first["query"].tolist(),
        texts=list(texts),
        documents=np.split(codes, starts[1:]) if len(rows) else [],
        labels=np.split(rows["label"].to_numpy(dtype=np.float32), starts[1:]) if len(rows) else [],
        n_negatives=n_negatives,
        n_positives=n_positives,
    )


def _count(groups: Groups) -> int:
    return sum(map(len, groups.documents))


def _tied_share(groups: Groups) -> float:
    tied = pairs = 0
    for labels in groups.labels:
        counts = np.unique(labels, return_counts=True)[1]
        tied += int((counts * (counts - 1)).sum())
        pairs += len(labels) * (len(labels) - 1)
    return tied / pairs if pairs else 0.0


def _agreement(rows: pd.DataFrame) -> float | None:
    """Spearman's correlation of the teacher's labels with the first stage's order, the mean over queries."""
    ranks = pd.DataFrame({"teacher": rows["label"], "first": -rows["order"]}).groupby(rows["qid"]).rank()
    centred = ranks - ranks.groupby(rows["qid"]).transform("mean")
    products = pd.DataFrame(
        {
            "both": centred["teacher"] * centred["first"],
            "teacher": centred["teacher"] ** 2,
            "first": centred["first"] ** 2,
        }
    )
    sums = products.groupby(rows["qid"]).sum()
    correlation: pd.Series[float] = sums["both"] / np.sqrt(sums["teacher"] * sums["first"])
    return float(correlation.mean()) if len(correlation) else None
