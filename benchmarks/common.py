"""What the benchmarks share: input, interleaved timing, and how much of the machine was used."""

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyterrier as pt
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from ecir2025 import Shape, matmul_speed
from quickstart import minilm

__all__ = ["Shape", "arguments", "candidates", "interleaved", "minilm", "report"]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backbone", help="a folder or a name; default: all-MiniLM-L6-v2; or electra-base-random")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the table and the machine")
    return parser


def candidates(queries: int, depth: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """PyDocs' test queries with BM25's top documents, lengths as they come; and the qrels."""
    from pyterrier_pisa import PisaIndex

    test = pt.get_dataset("pydocs:test")
    first_stage = PisaIndex.from_dataset(test).bm25(num_results=depth) >> test.text_loader()
    return first_stage(test.get_topics().head(queries)), test.get_qrels()


def interleaved(
    systems: Mapping[str, Callable[[], Callable[[], Any]]], *, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Any]]:
    """Run each system `repeats` times, in turns, after a warming-up.

    Args:
        systems: By name, what makes a system ready and returns the call to measure.
        repeats: Runs that count.

    Returns:
        By system: seconds of each repeat, the most memory taken above what was held before (bytes), and the last value.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    peaks: dict[str, float] = dict.fromkeys(systems, 0.0)
    values: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, system in systems.items():
            call = system()
            with _peak_memory() as peak:
                start = time.perf_counter()
                values[name] = call()
                elapsed = time.perf_counter() - start
            peaks[name] = max(peaks[name], peak[0])
            if turn:  # the first is the warming-up
                seconds[name].append(elapsed)
    return seconds, peaks, values


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """The process's resident memory at its highest, above that at the start; a GPU's where there is one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what earlier runs have freed must not be there to be used
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
    seconds: Mapping[str, list[float]],
    peaks: Mapping[str, float],
    *,
    ours: str,
    pairs: int,
    operations: float,
    dtypes: Mapping[str, torch.dtype],
    agreement: pd.DataFrame,
    args: argparse.Namespace,
) -> None:
    """Print the table and write it to --out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = {dtype: matmul_speed(device, dtype) for dtype in set(dtypes.values())}
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    table = pd.DataFrame(
        {
            "pairs/s": {name: pairs / median for name, median in medians.items()},
            f"{ours} is faster by": {name: median / medians[ours] for name, median in medians.items()},
            "spread": {name: (max(times) - min(times)) / medians[name] for name, times in seconds.items()},
            "% of GEMM": {
                name: 100 * operations / median / speeds[dtypes[name]] for name, median in medians.items()
            },
            "peak MiB": {name: peak / 2**20 for name, peak in peaks.items()},
        }
    ).join(agreement)  # fmt: skip
    print(table.round(3).to_string())
    machine = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "GEMM TFLOP/s": {str(dtype): speed / 1e12 for dtype, speed in speeds.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "pairs": pairs,
    }
    print(json.dumps(machine, indent=1))
    if args.out:
        args.out.write_text(json.dumps({"table": table.reset_index().to_dict("records"), **machine}, indent=1))


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
