"""What only a GPU shows: run with `pytest -m gpu -n 0`. The benchmark's dry run needs none: `-m benchmark`."""

import gc
import json
import pickle
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS
from interruptions import interrupted_at, interruptible_ranknet
from ir_measures import RR

from pyterrier_msft import Contrastive, Distillation, MonoCE

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
DEVICE = "cuda"
# AdamW amplifies gradients that are 0 up to rounding; a GPU adds in no fixed order.
SGD = {"optim": "sgd"}
HEADROOM = 128 * 2**20  # bytes under a limit of memory, beside what is allocated before


def gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(skip(test))


@pytest.fixture
def new(backbone):
    """Make a re-ranker; all have the same weights."""
    return lambda **options: MonoCE(backbone, **{"max_length": 24, "dtype": "float32", "device": DEVICE, **options})


@contextmanager
def limited_memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + HEADROOM
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def many_pairs(queries: int, depth: int, words: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (f"q{q}", WORDS[q], f"d{q}-{d}", " ".join(rng.choice(WORDS, words)), float(-d), d)
        for q in range(queries) for d in range(depth)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "rank"])


def scores(ce: MonoCE, results: pd.DataFrame) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):  # that the head is new
        return ce(results)["score"].to_numpy()


def weights(ce: MonoCE) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in ce.cross_encoder.network.state_dict().items()}


def out_of_memory_sizes(caplog) -> list[int]:
    """Return the sizes of passes that didn't fit, by the log."""
    return [record.args[0] for record in caplog.records if "pairs per pass; continuing" in record.message]


# ---- device and precision


@gpu
def test_the_gpu_is_the_default_and_agrees_with_the_cpu(new, test_part):
    default = new(dtype="auto", device=None)
    expected = scores(new(device="cpu"), test_part.results)
    assert default.cross_encoder.device.type == DEVICE
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert default.cross_encoder.dtype == default.cross_encoder.training_dtype == torch.bfloat16
    np.testing.assert_allclose(scores(new(), test_part.results), expected, atol=1e-4)
    for dtype in ("bfloat16", "float16"):
        rounded = scores(new(dtype=dtype), test_part.results)
        np.testing.assert_allclose(rounded, expected, atol=0.2 * expected.std())
        assert np.corrcoef(rounded, expected)[0, 1] > 0.99


@gpu
def test_training_agrees_with_the_cpu(new, train_part):
    fitter = Distillation(learning_rate=0.1, max_steps=8, batch_size=8, dropout=0.0, trainer_args=SGD)
    on_cpu, on_gpu = (new(device=device, fitter=fitter).fit(train_part.results) for device in ("cpu", DEVICE))
    np.testing.assert_allclose(on_gpu.history["loss"], on_cpu.history["loss"], atol=1e-4)
    torch.testing.assert_close(weights(on_gpu), weights(on_cpu), atol=1e-3, rtol=0)


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_16_bits_learns(new, train_part, dev_part, test_part, dtype):
    fitter = Contrastive(learning_rate=1e-2, epochs=6, batch_size=8, metric=RR @ 10)
    ce = new(dtype=dtype, fitter=fitter)
    ce.fit(train_part.results, train_part.qrels, dev_part.results, dev_part.qrels)
    assert all(weight.dtype == torch.float32 for weight in weights(ce).values() if weight.is_floating_point())
    top = ce(test_part.results).query("rank == 0").merge(test_part.qrels, on=["qid", "docno"])
    assert len(top) > test_part.qrels["qid"].nunique() / 2  # by chance, an eighth of the queries


# ---- memory


@gpu
def test_scoring_halves_passes_that_do_not_fit(new, caplog):
    results = many_pairs(16, 1024, words=58)  # blocks grow to 8,192 pairs, each of which needs some 25 kB
    expected = scores(new(max_length=64), results)
    ce = new(max_length=64, batch_size=8192)
    scores(ce, results.head(64))  # allocates the libraries' workspaces
    with limited_memory():
        found = scores(ce, results)
    assert out_of_memory_sizes(caplog)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@gpu
def test_training_recovers_from_exhausted_memory(new, caplog):
    results = many_pairs(64, 64, words=58)
    fitter = Distillation(
        depth=None, learning_rate=0.1, max_steps=2, batch_size=64, dropout=0.0, metric=None, trainer_args=SGD
    )  # fmt: skip
    expected = new(max_length=64, fitter=fitter).fit(results)  # allocates the libraries' workspaces too
    ce = new(max_length=64, fitter=fitter)
    _ = ce.cross_encoder.network  # loads it
    with limited_memory():
        ce.fit(results)
    assert "out of memory" in caplog.text
    np.testing.assert_allclose(ce.history["loss"], expected.history["loss"], atol=1e-4)
    torch.testing.assert_close(weights(ce), weights(expected), atol=1e-3, rtol=0)


@gpu
def test_a_second_stage_needs_no_more_memory(new, train_part):
    ce, allocated, peaks = new(fitter=Distillation(max_steps=4, batch_size=8)), [], []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        ce.fit(train_part.results)
        allocated.append(torch.cuda.memory_allocated())
        peaks.append(torch.cuda.max_memory_allocated())
    # The first stage also allocates the libraries' workspaces. What AdamW keeps would be twice the weights.
    size = sum(weight.nbytes for weight in ce.cross_encoder.network.parameters())
    assert abs(allocated[2] - allocated[1]) < size
    assert abs(peaks[2] - peaks[1]) < size


# ---- save, load, resume


@gpu
def test_a_saved_model_scores_the_same_on_the_gpu_and_on_a_cpu(new, train_part, test_part, tmp_path):
    ce = new(fitter=Distillation(max_steps=4, batch_size=8)).fit(train_part.results)
    expected, fingerprint = scores(ce, test_part.results), ce.fingerprint
    unpickled = pickle.loads(pickle.dumps(ce))
    ce.save(tmp_path / "model")
    for device in (DEVICE, "cpu"):
        loaded = MonoCE.load(tmp_path / "model", dtype="float32", device=device)
        assert loaded.fingerprint == fingerprint
        assert loaded.cross_encoder.network.device.type == device
        np.testing.assert_allclose(scores(loaded, test_part.results), expected, atol=1e-4)
    np.testing.assert_allclose(scores(unpickled, test_part.results), expected, atol=1e-5)


@gpu
def test_a_resumed_run_reaches_the_uninterrupted_weights(new, train_part, tmp_path):
    fitter = Distillation(
        learning_rate=0.1, max_steps=16, batch_size=8, dropout=0.2, eval_every=4, loss=interruptible_ranknet,
        trainer_args=SGD,
    )  # fmt: skip
    expected = new(fitter=fitter).fit(train_part.results)
    with pytest.raises(KeyboardInterrupt), interrupted_at(10, stage="KD"):
        new(fitter=fitter).fit(train_part.results, checkpoint_dir=tmp_path)
    resumed = new(fitter=fitter).fit(train_part.results, checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")]
    # With other dropout masks, the weights would differ by more.
    torch.testing.assert_close(weights(resumed), weights(expected), atol=1e-3, rtol=0)
    np.testing.assert_allclose(resumed.history["loss"], expected.history["loss"], atol=1e-3)


# ---- the benchmark


@pytest.mark.benchmark
def test_the_benchmark_runs_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [str(BENCHMARK), "--dry-run", "--minutes", "60", "--out", str(tmp_path / "gpu.json")]
    )
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(BENCHMARK.parents[1] / folder))
    with warnings.catch_warnings(action="ignore"):
        main = runpy.run_path(str(BENCHMARK))["main"]
        main()
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert not figures["errors"]
    rows = {name: len(rows) for name, rows in figures.items() if isinstance(rows, list)}
    assert rows == {
        "agreement": 2, "limited scoring": 1, "memory": 3, "second stage": 2, "resume": 1, "training": 1,
        "scoring": 3, "cut short": 0,
    }  # fmt: skip
    limited = [*figures["limited scoring"], figures["memory"][-1]]
    assert all("out of memory" in row["messages"][0] for row in limited)
    assert figures["limited scoring"][0]["largest difference"] < 1e-2
    assert figures["memory"][-1]["largest difference of losses"] < 1e-3
    assert figures["resume"][0]["largest difference of weights"] < figures["resume"][0]["largest change in training"]
