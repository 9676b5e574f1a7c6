"""Two processes on a CPU, joined with gloo, train what one process trains."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_cases
import numpy as np
import pytest
import torch
from conftest import make_part

from pyterrier_msft import MonoCE
from pyterrier_msft.model.precision import resolve_device
from pyterrier_msft.training import distributed

HERE = Path(__file__).parent


def torchrun(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *arguments],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(backbone, tmp_path_factory) -> Path:
    """Run the cases in two processes."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun(str(HERE / "distributed_cases.py"), backbone, str(out), cwd=out)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def one(backbone, tmp_path_factory) -> Path:
    """Run the cases in one process."""
    out = tmp_path_factory.mktemp("one")
    distributed_cases.main(backbone, out)
    return out


def result(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def centred(scores) -> np.ndarray:
    lists = np.array(scores).reshape(21, 8)
    return lists - lists.mean(1, keepdims=True)


@pytest.fixture(scope="module")
def untrained(backbone) -> np.ndarray:
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    with pytest.warns(UserWarning, match="random"):
        return centred(ce(make_part("va", n_queries=21, seed=2).results)["score"])


@pytest.mark.parametrize("name", [*distributed_cases.CASES, "passes", "stopping", "sequence"])
def test_two_processes_give_the_weights_of_one(one, two, untrained, name):
    alone, together = result(one, name), result(two, name)
    expected, scores = centred(alone["scores"]), centred(together["scores"])
    moved = np.abs(expected - untrained).max()
    assert moved > 0.01
    assert np.abs(scores - expected).max() < 1e-4 * moved
    np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-4)
    assert together["metric"] == pytest.approx(alone["metric"])
    assert together["fingerprint"] == result(two, name, 1)["fingerprint"]
    assert not together["head_is_new"]


@pytest.mark.parametrize("name", distributed_cases.NETWORKS)
def test_other_kinds_of_networks(one, two, name):
    alone, together = result(one, name), result(two, name)
    expected, scores = centred(alone["scores"]), centred(together["scores"])
    assert np.abs(scores - expected).max() < 1e-4 * np.ptp(expected)
    np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-4)
    assert together["fingerprint"] == result(two, name, 1)["fingerprint"]


def test_early_stopping_ends_all_processes_together(two):
    rows = [result(two, "stopping", rank)["metric"] for rank in (0, 1)]
    assert rows[0] == rows[1]
    assert 2 < len(rows[0]) < 9 * 8  # validations in 72 updates


def test_an_interrupted_run_of_two_processes_is_resumed(two):
    for rank in (0, 1):
        whole, resumed = result(two, "whole", rank), result(two, "resumed", rank)
        assert resumed["fingerprint"] == whole["fingerprint"]
        assert resumed["loss"] == whole["loss"]
    assert result(two, "resumed")["rng_states"] == ["rng_state_0.pth", "rng_state_1.pth"]


def test_ranks_have_different_dropout_masks(one, two):
    assert result(one, "whole")["loss"] != pytest.approx(result(two, "whole")["loss"])


def test_data_that_differ_between_ranks_are_refused_on_all(two):
    for rank in (0, 1):
        message = (two / f"differs.{rank}.txt").read_text()
        assert message.startswith("data must be the same on all ranks; rank")


def test_rank_0_writes_and_warns(two):
    assert json.loads((two / "models.json").read_text()) == ["CL", "CL-KD"]
    assert result(two, "reused")["fingerprint"] == result(two, "sequence")["fingerprint"]
    [warning] = result(two, "warnings", 0)
    assert warning.startswith("Contrastive dropped 7 of 37 queries without a relevant document")
    assert result(two, "warnings", 1) == []


CRASH = """
import sys

from conftest import make_part
from pyterrier_msft import Contrastive, MonoCE, losses
from pyterrier_msft.training import distributed

def loss(scores, labels, mask):
    if distributed.rank() == 1:
        raise KeyError("the disk with the texts is gone")
    return losses.localized_contrastive(scores, labels, mask)

part = make_part("tr", n_queries=16, seed=1)
MonoCE(sys.argv[1], max_length=24, device="cpu").fit(part.results, part.qrels, fitter=Contrastive(loss=loss))
"""


def test_a_crash_on_one_rank_ends_all_with_its_message(backbone, tmp_path):
    (tmp_path / "crash.py").write_text(CRASH)
    started = time.monotonic()
    done = torchrun("crash.py", backbone, cwd=tmp_path)
    assert done.returncode != 0
    assert "the disk with the texts is gone" in done.stderr
    assert time.monotonic() - started < 300  # and not gloo's half an hour


def test_each_rank_has_its_own_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda n, device: asked.append(str(device)))
    for environment, expected in {"": "cuda", "2": "cuda:2", "5": "cuda:1"}.items():
        monkeypatch.setenv("LOCAL_RANK", environment)
        if not environment:
            monkeypatch.delenv("LOCAL_RANK")
        assert str(resolve_device(None)) == str(resolve_device("cuda")) == expected
        assert str(resolve_device("cuda:3")) == "cuda:3"
    assert asked[:2] == ["cuda", "cuda"]


def test_a_process_group_of_another_launcher_is_refused(ce, train_part, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="the process group must be started by torchrun; got a group of 2 processes"):
        ce.fit(train_part.results, train_part.qrels)
