"""Run files of any size, read in chunks with polars (extra `[runs]`).

Memory is bounded by the size of a chunk and by what is kept of each query: its top documents, as integer ids.
"""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_msft.data.diagnosis import explain_mismatch
from pyterrier_msft.data.frames import PASSAGE_SUFFIX, as_texts, even_step, order_column, require, require_columns
from pyterrier_msft.data.rankings import (
    Rankings,
    RowsByQuery,
    assign_ids,
    best_first,
    parent_ids,
    query_offsets,
    rank_in_query,
    within_depth,
)
from pyterrier_msft.ids import as_ids

if TYPE_CHECKING:
    import polars as pl

CHUNK_ROWS = 1_000_000  # rows of a file read at once
TREC_COLUMNS = ["qid", "Q0", "docno", "rank", "score", "tag"]
# What pandas, and so `pt.io.write_results`, makes of an id with a quotation mark: "Heroes" becomes """Heroes""".
CSV_QUOTED = r'^"(?:[^"]|"")*""(?:[^"]|"")*"$'
FURTHER = "further"  # the column of a TREC run's seventh field, which no row should have
UNUSED = ["Q0", "rank", FURTHER]  # columns that are only read to see whether all columns are where they should be


def read_run(
    path: str | Path, *, depth: int | None, relevant: pd.DataFrame | None = None, topics: pd.DataFrame | None = None
) -> Iterator[Rankings]:
    """Read a run in chunks of whole queries.

    Args:
        path: A TREC run, plain or `.gz`, or Parquet with qid, docno, and score or rank (and query). The rows of a
            query must be contiguous.
        depth: Documents to keep per query, from the top. None: all.
        relevant: qid and docno (strings) of documents to keep at any rank.
        topics: qid and query, for a file without queries. Queries that aren't here are dropped and counted, as those
            with an empty text are.

    Yields:
        Rankings with docnos in place of texts; all share one numbering of documents.

    Raises:
        ValueError: If the file is missing or has another format, the rows of a query aren't contiguous, or none of its
            queries is in the topics.
        ImportError: If polars isn't installed.
    """
    rows = _scan(Path(path).expanduser())
    columns = rows.collect_schema().names()
    require_columns(pd.DataFrame(columns=columns), ["qid", "docno"], str(path))
    key = order_column(columns)
    if key is None:
        raise ValueError(f"{path} must have a score or a rank; got {columns}")
    queries = None
    if "query" not in columns:
        if topics is None:
            raise ValueError(f"{path} must have a column 'query'; got {columns}. Or pass MonoCE(..., text=dataset)")
        require_columns(topics, ["qid", "query"], "topics")
        cleaned = pd.DataFrame({"qid": as_ids(topics["qid"]), "query": as_texts(topics["query"])}).drop_duplicates()
        if repeated := cleaned["qid"][cleaned["qid"].duplicated()].tolist():
            raise ValueError(f"topics must have one query for each qid; got several for {repeated[0]!r}")
        queries = dict(zip(cleaned["qid"], cleaned["query"], strict=True))
    converter = _Converter(path, key, depth, None if relevant is None else RowsByQuery(relevant), queries)
    needed = [name for name in ("qid", "query", "docno", key) if name in columns]
    if FURTHER in columns:
        needed += UNUSED
    yield from map(converter.rankings, _whole_queries(rows.select(needed), path))
    if queries is not None and topics is not None and converter.seen and converter.seen.isdisjoint(queries):
        why = explain_mismatch(pd.DataFrame({"qid": sorted(converter.seen)}), topics, "the topics")
        raise ValueError(f"topics must have the queries of {path}: {why}")


def has_queries(path: str | Path) -> bool:
    """Whether a file of results has the text of its queries."""
    return "query" in _scan(Path(path).expanduser()).collect_schema().names()


def sample_docnos(path: str | Path, n: int) -> list[str]:
    """Return the docnos of at most `n` rows, spread evenly over a run."""
    import polars as pl

    docnos = _scan(Path(path).expanduser()).select("docno")
    rows = int(docnos.select(pl.len()).collect().item())
    return _as_ids(docnos.gather_every(even_step(rows, n)).collect()["docno"]).to_list()


@dataclass
class _Converter:
    """Converts chunks of a file to rankings, as `clean_results` does with a frame."""

    path: str | Path
    key: str  # score or rank
    depth: int | None
    relevant: RowsByQuery | None
    queries: dict[str, str] | None  # None: the file has them
    docnos: dict[str, int] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)  # the qids of earlier chunks

    def rankings(self, batch: "pl.DataFrame") -> Rankings:
        """Convert the rows of whole queries."""
        import polars as pl

        batch, qids = self._sort(batch)
        distinct = batch.filter(pl.col("docno").is_first_distinct().over("query_id"))
        with_query = distinct.filter(pl.col("query").str.contains(r"\S").fill_null(False))
        query = with_query["query_id"].to_numpy()
        first = query_offsets(query)
        query_texts = np.full(len(qids), "", dtype=object)
        query_texts[query[first]] = with_query["query"].gather(first).to_list()
        differs = with_query["query"] != with_query["query"].gather(np.arange(len(query)) - rank_in_query(query))
        has_passages = bool(with_query["docno"].str.contains("%p", literal=True).any())
        kept = self._keep(with_query, qids, has_passages)
        docnos = with_query["docno"].filter(pl.Series(kept)).to_list()
        document = assign_ids(docnos, self.docnos)
        return Rankings(
            qids=qids,
            query_texts=list(query_texts),
            docnos=self.docnos,
            texts=self.docnos,
            query=query[kept],
            document=document,
            parent=parent_ids(docnos, self.docnos) if has_passages else document,
            text=document,
            key=with_query["key"].to_numpy()[kept],
            ordered_by=self.key,
            counts={
                "queries": len(qids),
                "duplicates": len(batch) - len(distinct),
                "without_query": len(distinct) - len(with_query),
                "without_text": 0,
                "several_queries": len(np.unique(query[differs.to_numpy()])),
            },
        )

    def _sort(self, batch: "pl.DataFrame") -> tuple["pl.DataFrame", list[str]]:
        """Sort rows by query and descending key, and add the columns query, query_id and key."""
        import polars as pl

        runs = batch["qid"].rle().struct.unnest()
        in_file = runs["value"].to_list()
        if scattered := self.seen.intersection(in_file):
            raise ValueError(
                f"{self.path} must have the rows of a query together; got {min(scattered)!r} in several places. Sort "
                "the file by qid"
            )
        self.seen.update(in_file)
        qids = list(dict.fromkeys(in_file))
        query_ids = {qid: i for i, qid in enumerate(qids)}
        ids = np.array([query_ids[qid] for qid in in_file], dtype=np.int64)
        query, key = np.repeat(ids, runs["len"].to_numpy()), batch[self.key].to_numpy()
        require(~np.isnan(key), key, f"{self.key}s must be numeric")
        key = key if self.key == "score" else -key
        order = best_first(query, key)
        if (order[1:] < order[:-1]).any():
            batch, query, key = batch[order], query[order], key[order]
        batch = batch.with_columns(query_id=pl.Series(query), key=pl.Series(key))
        if self.queries is not None:
            texts = pl.Series([self.queries.get(qid, "") for qid in qids], dtype=pl.String)
            batch = batch.with_columns(query=texts.gather(batch["query_id"]))
        return batch, qids

    def _keep(self, batch: "pl.DataFrame", qids: list[str], has_passages: bool) -> np.ndarray:
        """Return a mask of the rows that are within the depth or relevant."""
        import polars as pl

        kept = within_depth(batch["query_id"].to_numpy(), self.depth)
        if self.relevant is not None:
            relevant = self.relevant.of(qids)
            query_ids = {qid: i for i, qid in enumerate(qids)}
            pairs = pl.DataFrame(
                {"query_id": [query_ids[qid] for qid in relevant["qid"]], "docno": relevant["docno"].tolist()},
                schema={"query_id": pl.Int64, "docno": pl.String},
            )
            docno = pl.col("docno").str.replace(PASSAGE_SUFFIX, "") if has_passages else pl.col("docno")
            below = batch.select("query_id", docno).with_row_index().filter(pl.Series(~kept))
            kept[below.join(pairs, on=["query_id", "docno"], how="semi")["index"].to_numpy()] = True
        return kept


def _whole_queries(rows: "pl.LazyFrame", path: str | Path) -> Iterator["pl.DataFrame"]:
    """Read rows in chunks, and hold back the last query of each, as the next chunk may continue it."""
    import polars as pl

    held: pl.DataFrame | None = None
    try:
        for chunk in rows.collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
            is_trec = FURTHER in chunk.columns
            if is_trec:
                _check_separators(chunk, path)
            batch = (chunk.drop(UNUSED) if is_trec else chunk).with_columns(
                *map(_as_ids, chunk.select("qid", "docno")),
                pl.col("^(score|rank)$").cast(pl.Float64),
                pl.col("^query$").cast(pl.String),
            )
            for name in ("qid", "docno"):
                if batch[name].null_count():
                    raise ValueError(f"{name} is required in every row of {path}; got a row without it")
            if held is not None:
                batch = pl.concat([held, batch])
            if len(batch):
                is_last = batch["qid"] == batch["qid"][-1]
                held = batch.filter(is_last)
                if not is_last.all():
                    yield batch.filter(~is_last)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} must be a TREC run or Parquet; got an error from polars: {error}") from error
    if held is not None and len(held):
        yield held


def read_trec_run(path: str | Path) -> pd.DataFrame:
    """Read a whole TREC run with pandas: qid, docno, rank and score.

    A quotation mark is an ordinary character, unless pandas has put a field that has a space into quotation marks.

    Raises:
        ValueError: If the file has another format.
    """
    columns = ["qid", "docno", "rank", "score"]
    try:
        frame = pd.read_csv(
            path, sep=r"\s+", names=TREC_COLUMNS, dtype={"qid": str, "docno": str, "rank": int, "score": float},
            quoting=csv.QUOTE_NONE, keep_default_na=False, na_values={"score": ["", "nan", "NaN", "null", "NA"]},
        )  # fmt: skip
        has_spaces = not isinstance(frame.index, pd.RangeIndex)  # more fields than columns
    except ValueError:
        has_spaces = True
    if has_spaces:
        quoted: pd.DataFrame = pt.io.read_results(str(path))[columns]
        return quoted
    ids = {name: _without_csv_quotes(frame[name]) for name in ("qid", "docno")}
    return frame[columns].assign(**ids)


def _without_csv_quotes(ids: pd.Series) -> pd.Series:
    return ids.mask(ids.str.contains(CSV_QUOTED), ids.str[1:-1].str.replace('""', '"', regex=False))


def _check_separators(rows: "pl.DataFrame", path: str | Path) -> None:
    """Raise a ValueError if the columns of a row of a TREC run are shifted, by padding or by an id with a space."""
    import polars as pl

    padded = rows.filter(pl.any_horizontal(pl.all().exclude(FURTHER).is_null()))  # an empty field between two spaces
    if len(padded):
        raise ValueError(
            f"{path} must have columns that are separated by one space or one tab; got several spaces in a row, e.g. "
            f"for the query {padded['qid'][0]!r}. Read the file with pt.io.read_results"
        )
    longer = rows.filter(pl.col(FURTHER).is_not_null())
    if len(longer):
        raise ValueError(
            f"{path} must have 6 columns in each line; got more, e.g. for the query {longer['qid'][0]!r}, as if a "
            "docno or the tag had a space. Pass a data frame, or write the results to Parquet"
        )


def _scan(path: Path) -> "pl.LazyFrame":
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError('results from a file need the extra [runs]: pip install "pyterrier-msft[runs]"') from error
    if not path.is_file():
        raise ValueError(f"results must be a data frame or the path of a run; there is no file {str(path)!r}")
    if path.suffix == ".parquet":
        return pl.scan_parquet(path)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        try:
            line = file.readline()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be in UTF-8; got another encoding: {error}") from error
    separator = "\t" if "\t" in line else " "
    if len(line.rstrip("\n").split(separator)) != len(TREC_COLUMNS):
        raise ValueError(f"{path} must have the columns of a TREC run {TREC_COLUMNS}; got the line {line[:80]!r}")
    schema = {name: pl.Float64 if name == "score" else pl.String for name in (*TREC_COLUMNS, FURTHER)}
    rows = pl.scan_csv(
        path, separator=separator, has_header=False, schema=schema, quote_char=None, missing_columns="insert"
    )
    for name in ("qid", "docno"):
        ids = pl.col(name)
        inner = ids.str.slice(1, ids.str.len_chars() - 2).str.replace_all('""', '"', literal=True)
        rows = rows.with_columns(pl.when(ids.str.contains(CSV_QUOTED)).then(inner).otherwise(ids).alias(name))
    return rows.filter(pl.any_horizontal(pl.col("qid", "docno").is_not_null()))  # blank lines, often the last one


def _as_ids(values: "pl.Series") -> "pl.Series":
    """Convert ids to strings, as `ids.as_ids` does."""
    import polars as pl

    if values.dtype.is_float():
        return pl.Series(values.name, as_ids(values.to_pandas()).to_numpy(dtype=object), dtype=pl.String)
    return values.cast(pl.String).str.strip_chars()
