"""Measure the peak memory of a training step against the length of its lists, with and without pairs_per_pass.

Each configuration runs in its own process. The paper's step has 4 lists of 100 documents of 256 tokens. Without
pairs_per_pass, training holds the whole step in memory if it estimates that it fits.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/memory.py
"""

import argparse
import resource
import subprocess
import sys

import pandas as pd
import torch
from common import minilm

from pyterrier_msft import Distillation, MonoCE

WORDS = [f"word{number}" for number in range(500)]


def main() -> None:
    """Measure all configurations, or a single one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 100], help="documents per list")
    parser.add_argument("--pairs-per-pass", type=int, nargs="+", default=[8])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--one", type=int, nargs=2, metavar=("LENGTH", "PAIRS"), help="measure one; 0: no limit")
    args = parser.parse_args()
    if args.one:
        print(peak(args.one[0], args.one[1] or None, args.max_length))
        return
    rows = []
    for length in args.lengths:
        row: dict[str, object] = {"documents per list": length}
        for pairs in (*args.pairs_per_pass, 0):
            command = [sys.executable, __file__, "--one", str(length), str(pairs), "--max-length", str(args.max_length)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            failed = "out of memory" if done.returncode else None
            row[f"{pairs} pairs per pass" if pairs else "no limit"] = failed or round(float(done.stdout.split()[-1]))
        rows.append(row)
        print(pd.DataFrame([row]).to_string(index=False, header=len(rows) == 1), flush=True)


def peak(length: int, pairs: int | None, max_length: int) -> float:
    """Return the MiB of a step with 4 lists, above those of the libraries and the loaded model."""
    text = " ".join(WORDS)
    results = pd.DataFrame(
        [(str(q), WORDS[q], f"d{d}", f"{d} {text}", d) for q in range(4) for d in range(length)],
        columns=["qid", "query", "docno", "text", "rank"],
    )
    fitter = Distillation(depth=None, batch_size=4, max_steps=1, pairs_per_pass=pairs, dropout=0.0)
    ce = MonoCE(minilm(), max_length=max_length, fitter=fitter)
    if torch.cuda.is_available():
        ce.fit(results)
        return torch.cuda.max_memory_allocated() / 2**20
    warm_up = Distillation(depth=2, batch_size=1, max_steps=2, dropout=0.0)
    ce.fit(results, fitter=warm_up)  # to exclude imports and what a first step keeps
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ce.fit(results)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
