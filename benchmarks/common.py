"""Shared by the benchmarks: input, interleaved timing, and reports of time and memory."""

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyterrier as pt
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cost import Shape, matmul_speed
from quickstart import minilm

__all__ = ["Shape", "System", "arguments", "candidates", "interleaved", "minilm", "report"]


def arguments(description: str) -> argparse.ArgumentParser:
    """Create a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backbone", help="a folder or a name; default: all-MiniLM-L6-v2; or electra-base-random")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the table and the machine")
    return parser


def candidates(queries: int, depth: int, part: str = "test") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Retrieve BM25's top documents, of any length, for queries of a part of PyDocs; return them and the qrels."""
    from pyterrier_pisa import PisaIndex

    dataset = pt.get_dataset(f"pydocs:{part}")
    first_stage = PisaIndex.from_dataset(dataset).bm25(num_results=depth) >> dataset.text_loader()
    return first_stage(dataset.get_topics().head(queries)), dataset.get_qrels()


System = Callable[[pd.DataFrame], Callable[[], Any]]
"""Prepares to process results, and returns the call to measure."""


def interleaved(
    systems: Mapping[str, System], results: pd.DataFrame, warm_up: pd.DataFrame, *, repeats: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Run each system `repeats` times, in turn, after a warm-up on other results.

    Returns:
        A row for each run: system, seconds, CPU seconds, and the peak memory above that before the run (bytes); and
        each system's last value.
    """
    for system in systems.values():
        system(warm_up)()
    rows, values = [], {}
    for _ in range(repeats):
        for name, system in systems.items():
            call = system(results)
            with _peak_memory() as peak:
                start, start_cpu = time.perf_counter(), time.process_time()
                values[name] = call()
                seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            rows.append({"system": name, "seconds": seconds, "CPU s": cpu, "peak": peak[0]})
    return pd.DataFrame(rows), values


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Measure the peak of the process's resident memory above that at the start; on a GPU, of its memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # return memory freed by earlier runs, so that it counts again
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, peak, done = psutil.Process(), [0.0], threading.Event()
    before = process.memory_info().rss
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        if torch.cuda.is_available():
            peak[0] = torch.cuda.max_memory_allocated()


def report(
    runs: pd.DataFrame,
    *,
    ours: str,
    pairs: int,
    operations: float,
    dtypes: Mapping[str, torch.dtype],
    agreement: pd.DataFrame,
    args: argparse.Namespace,
) -> None:
    """Print the table, and write it to --out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = {dtype: matmul_speed(device, dtype) for dtype in set(dtypes.values())}
    by_system = runs.groupby("system", sort=False)
    median, cpu = by_system["seconds"].median(), by_system["CPU s"].median()
    table = pd.DataFrame(
        {
            "pairs/s": pairs / median,
            f"{ours} is faster by": median / median[ours],
            "by CPU time": cpu / cpu[ours],  # less sensitive to other processes
            "spread": by_system["seconds"].agg(np.ptp) / median,
            "% of GEMM": 100 * operations / median / median.index.map({name: speeds[dtypes[name]] for name in dtypes}),
            "peak MiB": by_system["peak"].max() / 2**20,
        }
    ).join(agreement)
    print(table.round(3).to_string())
    machine = {
        "date": f"{date.today()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "GEMM TFLOP/s": {str(dtype): speed / 1e12 for dtype, speed in speeds.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "pairs": pairs,
    }
    print(json.dumps(machine, indent=1))
    if args.out:
        args.out.write_text(
            json.dumps({"table": table.reset_index(names="system").to_dict("records"), **machine}, indent=1)
        )


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
