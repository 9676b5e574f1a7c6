"""Shared fixtures: a tiny random BERT, and a collection that it can learn."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PT_TEST_TRANSFORMER_REPORTS", "0")

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast

from pyterrier_msft import MonoCE
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.loading import quiet_transformers

# For such tiny models, a second thread costs more than it saves.
torch.set_num_threads(1)

WORDS = [f"w{i}" for i in range(100)]


@pytest.fixture(autouse=True)
def _offline_schematics(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyterrier as pt

    monkeypatch.setattr(pt.documentation, "_cached_objects_inv", {}, raising=False)


def write_tiny_bert(folder: Path, *, words: Sequence[str] = WORDS, positions: int = 64) -> str:
    """A random BERT backbone of 2 layers and 16 dimensions, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=positions).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def fast_garbage_collection() -> Iterator[None]:
    """Exclude imported modules from garbage collection, which Trainer starts twice per training run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ce(backbone: str) -> MonoCE:
    return MonoCE(backbone, max_length=24, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def encoder(backbone: str) -> PairEncoder:
    return PairEncoder(AutoTokenizer.from_pretrained(backbone), max_length=24)


def run_together(*functions: Callable[[], object]) -> None:
    """Run functions at the same time and raise the first error."""
    errors: list[BaseException] = []

    def guarded(function) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record the calls of all fast tokenizers."""
    calls: list[object] = []
    prepare = PreTrainedTokenizerFast.set_truncation_and_padding  # in each call
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "set_truncation_and_padding",
        lambda self, **options: [calls.append(options), prepare(self, **options)],
    )  # fmt: skip
    return calls


@dataclass(frozen=True)
class Part:
    results: pd.DataFrame
    qrels: pd.DataFrame


def make_part(name: str, *, n_queries: int, n_docs: int = 8, seed: int) -> Part:
    """Make queries that are easy to learn: only the relevant document has words from the first ten of `WORDS`.

    The first stage's order is uninformative. A document's `quality` is how many of those words it has.
    """
    rng = np.random.default_rng(seed)
    rows, judged = [], []
    for q in range(n_queries):
        relevant = rng.integers(n_docs)
        query = " ".join(rng.choice(WORDS[10:], 3))
        for d in range(n_docs):
            words = rng.choice(WORDS[10:], 6)
            quality = 3 if d == relevant else 0
            words[:quality] = rng.choice(WORDS[:10], quality)
            rng.shuffle(words)
            rows.append((f"{name}{q}", query, f"{name}{q}d{d}", " ".join(words), float(n_docs - d), d, quality))
        judged.append((f"{name}{q}", f"{name}{q}d{relevant}", 1))
    columns = ["qid", "query", "docno", "text", "score", "rank", "quality"]
    return Part(pd.DataFrame(rows, columns=columns), pd.DataFrame(judged, columns=["qid", "docno", "label"]))


@pytest.fixture(scope="session")
def train_part() -> Part:
    return make_part("tr", n_queries=64, seed=1)


@pytest.fixture(scope="session")
def dev_part() -> Part:
    return make_part("va", n_queries=20, seed=2)


@pytest.fixture(scope="session")
def test_part() -> Part:
    return make_part("te", n_queries=40, seed=3)
