"""Measure how fast `transform` feeds a model: with one that costs next to nothing, against its tokenizer alone.

Both read the same pairs of about 92 tokens, in turns. Every pair has a text of its own, as if queries shared no
document; with `--shared`, documents that several queries retrieve are tokenized once. The time in Python is the
processor time of the threads that prepare batches, without the threads that tokenize in Rust.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/feed.py
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import System, candidates, interleaved, minilm
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from pyterrier_msft import MonoCE
from pyterrier_msft.model import scoring
from pyterrier_msft.model.encoding import PairEncoder


def main() -> None:
    """Measure and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--words", type=int, default=45, help="words per text")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", action="store_true", help="let queries share documents")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    frame = pairs(args)
    with tempfile.TemporaryDirectory() as folder:
        ce = tiny_model(folder, args.max_length)
        tokenizer = ce.cross_encoder.tokenizer

        def tokenize(results: pd.DataFrame) -> Callable[[], int]:
            queries, texts = results["query"].tolist(), results["text"].tolist()

            def call() -> int:
                encoded = tokenizer(queries, texts, truncation="only_second", max_length=args.max_length)
                return sum(map(len, encoded["input_ids"]))

            return call

        systems: dict[str, System] = {"tokenizer": tokenize, "transform": lambda results: lambda: ce(results)}
        runs, values = interleaved(systems, frame, frame.head(500), repeats=args.repeats)
        seconds = {name: runs.loc[runs["system"] == name, "seconds"].to_numpy() for name in systems}
        ratios = seconds["tokenizer"] / seconds["transform"]
        figures = {
            "pairs": len(frame),
            "tokens per pair": values["tokenizer"] / len(frame),
            "distinct queries": frame["query"].nunique(),
            "distinct texts": frame["text"].nunique(),
            "threads": args.threads,
            **{f"{name}, pairs/s": len(frame) / np.median(each) for name, each in seconds.items()},
            "ratio": float(np.median(ratios)),
            "ratio, lowest and highest": [float(ratios.min()), float(ratios.max())],
            "microseconds of Python per pair": min(python_seconds(ce, frame) for _ in range(3)) / len(frame) * 1e6,
        }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}, indent=1))


def pairs(args: argparse.Namespace) -> pd.DataFrame:
    """Retrieve BM25's top documents, cut to some words."""
    frame, _ = candidates(args.queries, args.depth)
    texts = [" ".join(text.split()[: args.words]) for text in frame["text"]]
    if not args.shared:
        texts = [f"{number} {text}" for number, text in enumerate(texts)]
    return frame.assign(text=texts)


def tiny_model(folder: str, max_length: int) -> MonoCE:
    """Load a BERT of one layer and 8 dimensions, with MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return MonoCE(folder, max_length=max_length, device="cpu", dtype="float32")


def python_seconds(ce: MonoCE, frame: pd.DataFrame) -> float:
    """Return the seconds that scoring spends in Python, without a model."""
    queries, texts = frame["query"].tolist(), frame["text"].tolist()
    with one_thread(), encoding_seconds() as elsewhere:
        start = time.thread_time()
        scoring.score_pairs(ce.cross_encoder.network, ce.pair_encoder(), queries, texts, dtype=torch.float32)
        return time.thread_time() - start + sum(elsewhere)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Score in the main thread, with zeros for the model's scores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(scoring, "forward", lambda model, batch: torch.zeros(len(batch["input_ids"]))):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def encoding_seconds() -> Iterator[list[float]]:
    """Collect the processor time of encoding pairs in other threads."""
    seconds: list[float] = []
    main_thread, windows = threading.get_ident(), PairEncoder.windows

    def timed(*args: object, **options: object) -> object:
        start = time.thread_time()
        try:
            return windows(*args, **options)
        finally:
            if threading.get_ident() != main_thread:
                seconds.append(time.thread_time() - start)

    with mock.patch.object(PairEncoder, "windows", timed):
        yield seconds


if __name__ == "__main__":
    main()
