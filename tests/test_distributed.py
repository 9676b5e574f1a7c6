"""Two processes, joined by gloo on a CPU, train what one trains. On GPUs nothing of this has been run."""

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
from pyterrier_msft.training import distributed as processes

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
    """What two processes found."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun(str(HERE / "distributed_cases.py"), backbone, str(out), cwd=out)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def one(backbone, tmp_path_factory) -> Path:
    """What one process found."""
    out = tmp_path_factory.mktemp("one")
    distributed_cases.main(backbone, out)
    return out


def found(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def centred(scores) -> np.ndarray:
    lists = np.array(scores).reshape(21, 8)
    return lists - lists.mean(1, keepdims=True)


@pytest.fixture(scope="module")
def untrained(backbone) -> np.ndarray:
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    with pytest.warns(UserWarning, match="scores at random"):
        return centred(ce(make_part("va", n_queries=21, seed=2).results)["score"])


@pytest.mark.parametrize("name", [*distributed_cases.CASES, "passes", "stopping", "sequence", "fsdp-bounded"])
def test_two_processes_learn_what_one_learns(one, two, untrained, name):
    alone, together = found(one, name.removeprefix("fsdp-")), found(two, name)
    expected, scores = centred(alone["scores"]), centred(together["scores"])
    moved = np.abs(expected - untrained).max()
    assert moved > 0.01
    assert np.abs(scores - expected).max() < 1e-4 * moved
    np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-4)
    assert together["metric"] == pytest.approx(alone["metric"])
    assert together["fingerprint"] == found(two, name, 1)["fingerprint"]
    assert not together["head_is_new"]


def test_patience_ends_all_processes_at_once(two):
    rows = [found(two, "stopping", rank)["metric"] for rank in (0, 1)]
    assert rows[0] == rows[1]
    assert 2 < len(rows[0]) < 9 * 8  # validations in 72 updates


@pytest.mark.parametrize("kind", ["", "fsdp-"])
def test_an_interrupted_training_of_two_goes_on(two, kind):
    for rank in (0, 1):
        whole, resumed = found(two, f"{kind}whole", rank), found(two, f"{kind}resumed", rank)
        assert resumed["fingerprint"] == whole["fingerprint"]
        assert resumed["loss"] == whole["loss"]
    assert found(two, "resumed")["rng_states"] == ["rng_state_0.pth", "rng_state_1.pth"]


def test_dropout_differs_between_processes(one, two):
    assert found(one, "whole")["loss"] != pytest.approx(found(two, "whole")["loss"])


def test_what_differs_between_processes_is_said_in_all(two):
    for rank in (0, 1):
        message = (two / f"differs.{rank}.txt").read_text()
        assert message.startswith("expected the same training in every process, found another data in process")


def test_one_process_writes_and_speaks(two):
    assert json.loads((two / "models.json").read_text()) == ["CL", "CL-KD"]
    assert found(two, "found")["fingerprint"] == found(two, "sequence")["fingerprint"]
    [warning] = found(two, "warnings", 0)
    assert warning.startswith("Contrastive leaves out: 7 queries without a relevant document")
    assert found(two, "warnings", 1) == []


CRASH = """
import sys
import torch
from conftest import make_part
from pyterrier_msft import Contrastive, MonoCE, losses, processes

def loss(scores, labels, mask):
    if processes.rank() == 1:
        raise KeyError("the disk with the texts is gone")
    return losses.localized_contrastive(scores, labels, mask)

part = make_part("tr", n_queries=16, seed=1)
MonoCE(sys.argv[1], max_length=24, device="cpu").fit(part.results, part.qrels, fitter=Contrastive(loss=loss))
"""


def test_a_crash_of_one_process_ends_all_with_its_message(backbone, tmp_path):
    (tmp_path / "crash.py").write_text(CRASH)
    started = time.monotonic()
    done = torchrun("crash.py", backbone, cwd=tmp_path)
    assert done.returncode != 0
    assert "the disk with the texts is gone" in done.stderr
    assert time.monotonic() - started < 300  # and not gloo's half an hour


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
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


def test_a_process_group_that_trainer_does_not_join(ce, train_part, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="expected processes that torchrun has started, or one, found a group of 2"):
        ce.fit(train_part.results, train_part.qrels)
