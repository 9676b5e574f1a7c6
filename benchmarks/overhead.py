"""Measure the time and memory of `transform` outside the model: pandas, tokenization, batching, ranking.

The model's forward pass is replaced by a function that returns zeros. The real pass is timed on a sample of the pairs,
to compute the share of the overhead.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/overhead.py
"""

import argparse
import tempfile
import time

import numpy as np
import pandas as pd
import psutil
import torch
from common import candidates, minilm
from inference import save_model

from pyterrier_msft import MonoCE
from pyterrier_msft.model import scoring


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--timed", type=int, default=500, help="pairs to time the model on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(minilm(), folder)
        ce = MonoCE(folder, max_length=args.max_length)
        ce.fingerprint  # noqa: B018  loads it
    results, _ = candidates(400, 20)
    sample = results.sample(args.timed, random_state=0)
    ce(sample.head(100))
    start = time.perf_counter()
    ce(sample)
    speed = args.timed / (time.perf_counter() - start)
    real, process, rows = scoring.forward, psutil.Process(), []
    scoring.forward = lambda model, batch: torch.zeros(len(batch["input_ids"]))
    try:
        for pairs in args.pairs:
            copies = -(-pairs // len(results))
            # New queries, so that no tokenization is shared between the copies.
            frames = [results.assign(qid=results["qid"] + f"-{i}", query=results["query"] + f" {i}")
                      for i in range(copies)]  # fmt: skip
            frame = pd.concat(frames, ignore_index=True).head(pairs)
            before, peak = process.memory_info().rss, [0]

            def watch(_: int, before: int = before, peak: list[int] = peak) -> None:
                peak[0] = max(peak[0], process.memory_info().rss - before)

            start = time.perf_counter()
            scoring.score_pairs(
                ce.cross_encoder.network, ce.pair_encoder(), frame["query"].tolist(), frame["text"].tolist(),
                dtype=torch.float32, progress=watch,
            )  # fmt: skip
            scored = time.perf_counter() - start
            start = time.perf_counter()
            ce(frame)
            whole = time.perf_counter() - start
            rows.append({
                "pairs": pairs, "seconds without the model": whole, "of which tokenization and batching": scored,
                "seconds of the model": pairs / speed, "% overhead": 100 * whole / (pairs / speed),
                "peak MiB above the frame": peak[0] / 2**20,
            })  # fmt: skip
    finally:
        scoring.forward = real
    print(f"{speed:.1f} pairs/s with the model, {np.mean(results['text'].str.len()):.0f} characters per text")
    print(pd.DataFrame(rows).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
