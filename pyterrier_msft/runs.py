"""First-stage rankings on disk, of any size, as pieces that fit in memory.

What is read at a time is bounded, and so is what is kept: each query's top documents, as ids. polars reads the files
(extra `[runs]`).
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pyterrier_msft.groups import as_ids, require_columns

if TYPE_CHECKING:
    import polars as pl

ROWS = 1_000_000  # of the file, at a time
TREC = ["qid", "Q0", "docno", "rank", "score", "tag"]


def pieces(
    path: str | Path, *, depth: int | None, relevant: pd.DataFrame | None = None, topics: pd.DataFrame | None = None
) -> Iterator[pd.DataFrame]:
    """Read a run in pieces of whole queries.

    Args:
        path: A TREC run, plain or `.gz`, or Parquet with qid, docno, and score or rank (and query); a query's rows
            stand together.
        depth: Documents that are kept of each query, from the top. None: all.
        relevant: qid, docno: what is kept wherever it stands.
        topics: qid, query: the queries, for a file without their text; queries that it lacks are left out.

    Yields:
        qid, query, docno, and score or rank.

    Raises:
        ValueError: If the file isn't there or has another form, or a query's rows are scattered.
        ImportError: Without polars.
    """
    rows = _scan(Path(path))
    columns = rows.collect_schema().names()
    require_columns(pd.DataFrame(columns=columns), ["qid", "docno"], str(path))
    key = next((name for name in ("score", "rank") if name in columns), None)
    if key is None:
        raise ValueError(f"expected a score or a rank in {path}, found columns {columns}")
    if "query" not in columns and topics is None:
        raise ValueError(f"expected the queries' text in {path}, or topics in MonoCE(..., text=dataset), found neither")
    wanted = [name for name in ("qid", "query", "docno", key) if name in columns]
    return _pieces(path, rows.select(wanted), key, depth, relevant, None if "query" in columns else topics)


def _pieces(
    path: str | Path,
    rows: "pl.LazyFrame",
    key: str,
    depth: int | None,
    relevant: pd.DataFrame | None,
    topics: pd.DataFrame | None,
) -> Iterator[pd.DataFrame]:
    import polars as pl

    text = pl.col("qid", "docno").cast(pl.String)
    keep = None if relevant is None else pl.DataFrame({c: as_ids(relevant[c]).tolist() for c in ("qid", "docno")})
    queries = None
    if topics is not None:
        require_columns(topics, ["qid", "query"], "topics")
        queries = pl.DataFrame({"qid": as_ids(topics["qid"]).tolist(), "query": topics["query"].astype(str).tolist()})
    place = pl.col(key).rank("ordinal", descending=key == "score").over("qid")
    seen: set[str] = set()
    held: pl.DataFrame | None = None  # the last query's rows, which the next batch may go on with

    def finish(batch: pl.DataFrame) -> pd.DataFrame:
        qids = set(batch["qid"].unique().to_list())
        if scattered := qids & seen:
            raise ValueError(
                f"expected the rows of a query together in {path}, found some of {min(scattered)!r} far from others: "
                "sort the file by qid"
            )
        seen.update(qids)
        if depth is not None:
            top = batch.filter(place <= depth)
            if keep is not None:
                below = batch.filter(place > depth).join(keep, on=["qid", "docno"], how="semi")
                top = pl.concat([top, below])
            batch = top
        if queries is not None:
            batch = batch.join(queries, on="qid", how="inner", maintain_order="left")
        return pd.DataFrame({name: batch[name].to_list() for name in batch.columns})

    try:
        for part in rows.collect_batches(chunk_size=ROWS, maintain_order=True):
            batch = part.with_columns(text)
            if held is not None:
                batch = pl.concat([held, batch])
            last = batch["qid"][-1]
            held = batch.filter(pl.col("qid") == last)
            whole = batch.filter(pl.col("qid") != last)
            if len(whole):
                yield finish(whole)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"expected a TREC run or Parquet in {path}, found what can't be read: {error}") from error
    if held is not None and len(held):
        yield finish(held)


def _scan(path: Path) -> "pl.LazyFrame":
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError('results from a file need the extra [runs]: pip install "pyterrier-msft[runs]"') from error
    if not path.is_file():
        raise ValueError(f"expected results as a data frame or the path of a run, found no file {str(path)!r}")
    if path.suffix == ".parquet":
        return pl.scan_parquet(path)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        line = file.readline()
    separator = "\t" if "\t" in line else " "
    if len(line.rstrip("\n").split(separator)) != len(TREC):
        raise ValueError(f"expected the six columns of a TREC run in {path}, found the line {line[:80]!r}")
    types: dict[str, Any] = {"rank": pl.Int64, "score": pl.Float64}
    schema = {name: types.get(name, pl.String) for name in TREC}
    return pl.scan_csv(path, separator=separator, has_header=False, schema=schema, quote_char=None)
