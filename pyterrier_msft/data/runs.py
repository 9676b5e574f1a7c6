"""First-stage rankings on disk, of any size, as pieces that fit in memory.

What is read at a time is bounded, and so is what is kept: each query's top documents, as numbers. polars reads the
files (extra `[runs]`).
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import PASSAGE, as_ids, as_texts, check_numbers, require_columns
from pyterrier_msft.data.rankings import ByQuery, Rankings, best_first, number, parent_numbers, places, starts

if TYPE_CHECKING:
    import polars as pl

ROWS = 1_000_000  # of the file, at a time


TREC = ["qid", "Q0", "docno", "rank", "score", "tag"]


def pieces(
    path: str | Path,
    *,
    depth: int | None,
    relevant: pd.DataFrame | None = None,
    topics: pd.DataFrame | None = None,
) -> Iterator[Rankings]:
    """Read a run in pieces of whole queries.

    Args:
        path: A TREC run, plain or `.gz`, or Parquet with qid, docno, and score or rank (and query); a query's rows
            stand together.
        depth: Documents that are kept of each query, from the top. None: all.
        relevant: qid, docno, as strings: what is kept wherever it stands.
        topics: qid, query: the queries, for a file without their text; queries that it lacks are left out.

    Yields:
        The rankings, docnos in place of texts. They share one numbering.

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
    queries = None
    if "query" not in columns:
        if topics is None:
            raise ValueError(
                f"expected the queries' text in {path}, or topics in MonoCE(..., text=dataset), found neither"
            )
        require_columns(topics, ["qid", "query"], "topics")
        queries = dict(zip(as_ids(topics["qid"]), as_texts(topics["query"]), strict=True))
    reader = _Reader(path, key, depth, None if relevant is None else ByQuery(relevant), queries)
    return reader.read(rows.select([name for name in ("qid", "query", "docno", key) if name in columns]))


class _Reader:
    """What becomes of a file's rows."""

    def __init__(
        self,
        path: str | Path,
        key: str,
        depth: int | None,
        relevant: ByQuery | None,
        queries: dict[str, str] | None,
    ) -> None:
        self.path, self.key, self.depth = path, key, depth
        self.relevant, self.queries = relevant, queries
        self.docnos: dict[str, int] = {}
        self.seen: set[str] = set()

    def read(self, rows: "pl.LazyFrame") -> Iterator[Rankings]:
        import polars as pl

        held: pl.DataFrame | None = None  # the last query's rows, which the next batch may go on with
        try:
            for part in rows.collect_batches(chunk_size=ROWS, maintain_order=True):
                batch = part.with_columns(
                    *map(_ids, part.select("qid", "docno")),
                    pl.col(self.key).cast(pl.Float64),
                    pl.col("^query$").cast(pl.String),
                )
                if batch["qid"].null_count() or batch["docno"].null_count():
                    raise ValueError(f"expected a qid and a docno in each row of {self.path}, found one without")
                if held is not None:
                    batch = pl.concat([held, batch])
                if not len(batch):
                    continue
                last = batch["qid"][-1]
                held = batch.filter(pl.col("qid") == last)
                if len(held) < len(batch):
                    yield self.rankings(batch.filter(pl.col("qid") != last))
        except pl.exceptions.PolarsError as error:
            raise ValueError(
                f"expected a TREC run or Parquet in {self.path}, found what can't be read: {error}"
            ) from error
        if held is not None and len(held):
            yield self.rankings(held)

    def rankings(self, batch: "pl.DataFrame") -> Rankings:
        """Whole queries' rows as `groups.clean_results` has them, without what lies below the depth."""
        import polars as pl

        runs = batch["qid"].rle().struct.unnest()
        found = runs["value"].to_list()
        if scattered := self.seen.intersection(found):
            raise ValueError(
                f"expected the rows of a query together in {self.path}, found some of {min(scattered)!r} far from "
                "others: sort the file by qid"
            )
        self.seen.update(found)
        qids = [qid for qid in dict.fromkeys(found) if self.queries is None or qid in self.queries]
        numbers = {qid: number for number, qid in enumerate(qids)}
        query = np.repeat(np.array([numbers.get(qid, -1) for qid in found], dtype=np.int64), runs["len"].to_numpy())
        key = check_numbers(batch[self.key].to_numpy() * (1.0 if self.key == "score" else -1.0))
        row = best_first(query, key)
        if (row[1:] < row[:-1]).any():
            batch, query, key = batch[row], query[row], key[row]
        batch = batch.with_columns(query_number=pl.Series(query), key=pl.Series(key)).filter(pl.Series(query >= 0))
        counts = {"queries": len(qids), "duplicates": len(batch), "without_text": 0}
        batch = _distinct(batch)
        counts["duplicates"] -= len(batch)
        if self.queries is None:
            asked = batch["query"].str.contains(r"\S").fill_null(False)
        else:
            asked = pl.Series(np.array([bool(self.queries[qid].strip()) for qid in qids], bool)[batch["query_number"]])
        counts["without_query"] = len(batch) - int(asked.sum())
        batch = batch.filter(asked)
        query = batch["query_number"].to_numpy()
        queries, counts["several_queries"] = self._queries(batch, query, qids)
        passages = bool(batch["docno"].str.contains("%p", literal=True).any())
        kept = self._kept(batch, query, numbers, passages)
        docnos = batch["docno"].filter(pl.Series(kept)).to_list()
        document = number(docnos, self.docnos)
        return Rankings(
            qids=qids,
            queries=queries,
            docnos=self.docnos,
            texts=self.docnos,
            query=query[kept],
            document=document,
            judged=parent_numbers(docnos, self.docnos) if passages else document,
            text=document,
            key=batch["key"].to_numpy()[kept],
            ordered_by=self.key,
            counts=counts,
        )

    def _queries(self, batch: "pl.DataFrame", query: np.ndarray, qids: list[str]) -> tuple[list[str], int]:
        """Each qid's query, that of its best document, and of how many qids there are others."""
        if self.queries is not None:
            return [self.queries[qid] for qid in qids], 0
        begins = starts(query)
        best = np.full(len(qids), "", dtype=object)
        best[query[begins]] = batch["query"].gather(begins).to_list()
        differs = batch["query"] != batch["query"].gather(np.arange(len(query)) - places(query))
        return list(best), len(np.unique(query[differs.to_numpy()]))

    def _kept(self, batch: "pl.DataFrame", query: np.ndarray, numbers: dict[str, int], passages: bool) -> np.ndarray:
        """(rows,) whether the groups can have a use for a row."""
        import polars as pl

        kept = np.ones(len(query), dtype=bool) if self.depth is None else places(query) < self.depth
        if self.relevant is not None:
            relevant = self.relevant.of(numbers)
            pairs = pl.DataFrame(
                {"query_number": [numbers[qid] for qid in relevant["qid"]], "docno": relevant["docno"].tolist()},
                schema={"query_number": pl.Int64, "docno": pl.String},
            )
            docno = pl.col("docno").str.replace(PASSAGE, "") if passages else pl.col("docno")
            below = batch.select("query_number", docno).with_row_index().filter(pl.Series(~kept))
            kept[below.join(pairs, on=["query_number", "docno"], how="semi")["index"].to_numpy()] = True
        return kept


def first_docnos(path: str | Path, n: int) -> list[str]:
    """The docnos of a run's first rows."""
    return _ids(_scan(Path(path)).head(n).collect()["docno"]).to_list()


def _ids(values: "pl.Series") -> "pl.Series":
    """Ids as `groups.as_ids` has them."""
    import polars as pl

    text = values.cast(pl.String).str.strip_chars()
    return text.str.strip_suffix(".0") if values.dtype.is_float() else text


def _distinct(batch: "pl.DataFrame") -> "pl.DataFrame":
    """The batch with the first row alone of each query and docno."""
    import polars as pl

    pair = ["query_number", "docno"]
    # Equal rows have equal hashes, which leave hardly a row to compare.
    hashes = batch.select(pair).hash_rows().to_numpy()
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return batch
    suspects = batch.select(pair).with_row_index().filter(pl.Series(np.isin(hashes, repeated)))
    again = suspects.filter(~suspects.select(pl.struct(pair).is_first_distinct()).to_series())["index"]
    return batch.filter(pl.Series(~np.isin(np.arange(len(batch)), again.to_numpy())))


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
