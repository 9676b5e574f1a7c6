"""Measure how fast, and in how much memory, runs of different sizes become groups to train on.

Writes runs with 500 random documents per query, as in the paper, and reads each in its own process with
`Contrastive(n_negatives=99, depth=200)`: from the file to the groups that an epoch draws from.

    pip install -c constraints.txt -e ".[bench,runs]" && python benchmarks/runs.py
"""

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl

from pyterrier_msft import Contrastive

CANDIDATES = 500  # per query
DOCUMENTS = 8_841_823  # MS MARCO's passages
QUERIES_PER_CHUNK = 2000


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000, 50_000_000])
    parser.add_argument("--formats", nargs="+", default=["parquet", "trec", "trec.gz"])
    parser.add_argument("--folder", type=Path, help="a folder to keep the runs in, in place of a temporary one")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read(args.read, args.rows[0] // CANDIDATES)))
        return
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for rows in args.rows:
            for kind in args.formats:
                path = (args.folder or Path(temporary)) / f"{rows}.{kind}"
                if not path.exists():
                    write(path, rows // CANDIDATES)
                command = [sys.executable, __file__, "--read", str(path), "--rows", str(rows)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                table.append({"rows": rows, "format": kind, **json.loads(output)})
                print(pd.DataFrame(table).to_string(index=False), flush=True)
                if args.folder is None:
                    path.unlink()


def read(path: Path, n_queries: int) -> dict[str, float]:
    """Read a run into groups, with one relevant document per query, and return the time and memory it took."""
    qids = [str(qid) for qid in query_ids(0, n_queries)]
    docnos = np.random.default_rng(0).integers(DOCUMENTS, size=n_queries).astype(str)
    qrels = pd.DataFrame({"qid": qids, "docno": docnos, "label": 1})
    topics = pd.DataFrame({"qid": qids, "query": [f"what is the answer to question {qid}" for qid in qids]})
    fitter = Contrastive(n_negatives=99, depth=200, add_missing_positives=True)
    before, start, cpu = peak_mib(), time.perf_counter(), time.process_time()
    groups, report = fitter.groups(path, qrels, topics=topics, load_text=lambda frame: frame.assign(text="text"))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak, start = peak_mib(), time.perf_counter()
    groups.digest()
    digest, start = time.perf_counter() - start, time.perf_counter()
    draws = min(1000, len(groups))
    for index in range(draws):
        groups.draw_all([(index, 0)], seed=0)
    return {
        "M rows/s": round(n_queries * CANDIDATES / seconds / 1e6, 2),
        "M rows/CPU s": round(n_queries * CANDIDATES / cpu / 1e6, 2),
        "peak MiB above imports": round(peak - before),
        "M pairs kept": round(report.documents / 1e6, 1),
        "M docnos": round(len(groups.texts) / 1e6, 2),
        "s per digest": round(digest, 1),
        "ms per draw": round(1000 * (time.perf_counter() - start) / draws, 2),
    }


def write(path: Path, n_queries: int) -> None:
    """Write a run with documents spread evenly over the collection."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        chunks = run_chunks(n_queries)
        first = next(chunks).select("qid", "docno", "rank", "score").to_arrow()
        with pyarrow.parquet.ParquetWriter(path, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for chunk in chunks:
                writer.write_table(chunk.select("qid", "docno", "rank", "score").to_arrow())
    elif path.suffix == ".gz":
        plain = path.with_suffix("")
        if not plain.exists():
            write(plain, n_queries)
        with plain.open("rb") as file, gzip.open(path, "wb", compresslevel=1) as out:
            shutil.copyfileobj(file, out, 2**20)
    else:
        with path.open("wb") as file:
            for chunk in run_chunks(n_queries):
                trec = chunk.select("qid", Q0=pl.lit("Q0"), docno="docno", rank="rank", score="score", tag=pl.lit("t"))
                trec.write_csv(file, include_header=False, separator=" ")


def run_chunks(n_queries: int) -> Iterator[pl.DataFrame]:
    """Generate the run in chunks of queries."""
    rng = np.random.default_rng(1)
    rank = np.arange(CANDIDATES)
    for start in range(0, n_queries, QUERIES_PER_CHUNK):
        n = min(QUERIES_PER_CHUNK, n_queries - start)
        first, step = rng.integers(DOCUMENTS, size=(n, 1)), rng.integers(1, DOCUMENTS // CANDIDATES, size=(n, 1))
        scores = -np.sort(-rng.random((n, CANDIDATES)) * 20, axis=1)
        yield pl.DataFrame(
            {
                "qid": np.repeat(query_ids(start, n), CANDIDATES),
                "docno": rng.permuted((first + step * rank) % DOCUMENTS, axis=1).ravel(),
                "rank": np.tile(rank, n),
                "score": scores.round(5).ravel(),
            }
        ).with_columns(pl.col("qid", "docno").cast(pl.String))


def query_ids(start: int, n: int) -> np.ndarray:
    """Generate numbers that are in another order as strings."""
    return np.arange(start, start + n) * 2 + 1000


def peak_mib() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
