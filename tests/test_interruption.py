"""Nothing is lost: kills, Ctrl-C, full disks, folders of another training, saves that fail half-way."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ir_measures import RR
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, losses
from pyterrier_msft.training import trainer as training
from pyterrier_msft.training.trainer import PARTIAL, _ListTrainer

HERE = Path(__file__).parent
CL = Contrastive(
    n_negatives=3, learning_rate=1e-2, epochs=3, batch_size=8, dropout=0.2, metric=RR @ 10, eval_every=2
)  # 24 updates
KD = Distillation(learning_rate=1e-2, max_steps=6, batch_size=8)


@pytest.fixture
def data(train_part, dev_part) -> tuple:
    return train_part.results, train_part.qrels, dev_part.results, dev_part.qrels


def interrupted_at(monkeypatch, step: int, *, folder: str = "", error: type[BaseException] = KeyboardInterrupt):
    original = _ListTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and folder in self.args.output_dir:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(_ListTrainer, "training_step", training_step)


# ---- kill -9


@pytest.fixture(scope="module")
def kills(backbone, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("kills")
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(HERE / "interruption_cases.py"), backbone, str(out)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((out / "report.json").read_text())


def test_killed_trainings_reach_the_uninterrupted_weights(kills):
    assert kills["kills"] == 20
    assert all(run["equal"] for run in kills["runs"])
    assert {run["case"] for run in kills["runs"] if run["kills"]} == {"one stage", "two stages", "sequences"}
    assert {kind for run in kills["runs"] for kind in run["kills"]} == {"time", "replace", "weights", "state"}


def by_process(run: dict) -> list[list[tuple[str, int]]]:
    """The steps, as (stage's folder, step), that each of the processes of a training took."""
    processes = dict.fromkeys(step[0] for step in run["steps"])
    return [[(stage, step) for pid, stage, step in run["steps"] if pid == process] for process in processes]


def test_a_killed_training_goes_on_from_its_checkpoint_and_not_from_its_start(kills):
    later = 0  # interruptions in an epoch after the first, of 5 updates
    for run in kills["runs"]:
        reached: dict[str, int] = {}
        for steps in by_process(run):
            stage, first = steps[0]
            assert stage not in [*reached][:-1]  # a stage that is through isn't trained again
            assert first >= reached.get(stage, 0) // 2 * 2  # a checkpoint every second step
            later += run["case"] == "one stage" and first >= 5
            reached |= dict(steps)
    assert later


def test_the_disk_holds_one_checkpoint_a_stage(kills):
    for run in kills["runs"]:
        last = {"one stage": ["checkpoint-12"], "sequences": []}  # of 15: patience runs out
        both = ["stage-1/checkpoint-8", "stage-2/checkpoint-8"]
        assert run["checkpoints"] == last.get(run["case"], both)


# ---- Ctrl-C


def test_ctrl_c_leaves_the_best_weights_and_the_same_call_goes_on(ce, data, dev_part, tmp_path, monkeypatch, caplog):
    undisturbed = ce.clone().fit(*data, fitter=CL)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 13)
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert "interrupted at step 13 of 24; the re-ranker holds the best weights so far; the same call" in caplog.text
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*scores at random")
        ce(dev_part.results)
    assert not ce._network.training
    history = ce.history
    assert history["step"].tolist() == list(range(1, 14))
    run = ce(dev_part.results).rename(columns={"qid": "query_id", "docno": "doc_id"})
    qrels = dev_part.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    assert (RR @ 10).calc_aggregate(qrels, run) == pytest.approx(history["RR@10"].max())
    assert ce._stages[-1]["interrupted"] == 13
    assert ce._stages[-1]["fingerprint"] == ce.fingerprint
    # The same cell again, in the same notebook
    ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert ce.fingerprint == undisturbed.fingerprint
    assert [stage.get("interrupted") for stage in ce._stages] == [None]
    assert ce.history["loss"].tolist() == undisturbed.history["loss"].tolist()


def test_ctrl_c_in_a_second_stage(ce, data, backbone, tmp_path, monkeypatch):
    both = dataclasses.replace(CL, max_steps=4) >> KD
    undisturbed = ce.clone().fit(*data, fitter=both)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 4, folder="stage-2")
        ce.fit(*data, fitter=both, checkpoint_dir=tmp_path)
    assert [stage.get("interrupted") for stage in ce._stages] == [None, 4]
    interrupted = ce.clone()
    ce.fit(*data, fitter=both, checkpoint_dir=tmp_path)
    assert ce.fingerprint == undisturbed.fingerprint
    assert len(ce._stages) == 2
    # Elsewhere, or with nothing to go on with, it is a training of its own.
    interrupted.fit(*data[:2], fitter=KD, checkpoint_dir=tmp_path / "other")
    assert len(interrupted._stages) == 3
    # And a fresh one is as if nothing had been.
    again = MonoCE(backbone, max_length=24, dtype="float32", device="cpu").fit(*data, fitter=both)
    assert again.fingerprint == undisturbed.fingerprint


def test_ctrl_c_before_anything_was_learnt(ce, data, dev_part, monkeypatch):
    before = ce.fingerprint
    interrupted_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        ce.fit(*data, fitter=CL)
    assert (ce.fingerprint, ce._stages, ce.data_report) == (before, [], None)
    with pytest.warns(UserWarning, match="scores at random"):
        ce(dev_part.results)


def test_an_error_in_the_midst_keeps_what_was_learnt(ce, data, monkeypatch):
    interrupted_at(monkeypatch, 5, error=ConnectionError)
    before = ce.fingerprint
    with pytest.raises(ConnectionError):
        ce.fit(*data, fitter=CL)
    assert ce._stages[-1]["interrupted"] == 5
    assert ce._stages[-1]["fingerprint"] == ce.fingerprint != before


# ---- disks


def full_disk(error: Exception, *, calls: range):
    """What stands for save_file, and fails at these calls after half of the content."""
    count = iter(range(1000))
    original = training.save_file

    def save_file(tensors, path, *args):
        original(tensors, path, *args)
        if next(count) in calls:
            os.truncate(path, path.stat().st_size // 2)
            raise error

    return save_file


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space"), RuntimeError("file write failed")],
)
def test_a_full_disk_ends_no_training(ce, data, tmp_path, monkeypatch, error):
    fitter = dataclasses.replace(CL, metric=None)  # one call of save_file a checkpoint, of steps 0, 2, 4, …
    expected = ce.clone().fit(*data[:2], fitter=fitter).fingerprint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_file", full_disk(error, calls=range(4, 7)))  # steps 8, 10 and 12
        interrupted_at(patch, 13)
        with pytest.warns(UserWarning, match="the checkpoint of step 8 could not be written") as caught:
            ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    assert sum("could not be written" in str(warning.message) for warning in caught) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert ce.fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path).fingerprint == expected


def test_a_full_disk_is_said_before_training(ce, data, tmp_path, monkeypatch):
    before = ce.fingerprint
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(training, "save_file", full_disk(error, calls=range(1000)))
        with pytest.raises(ValueError, match=r"expected a checkpoint_dir .* found .*No space left"):
            ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"expected room for two checkpoints, 0.00024 GB.* found 5e-05 GB"):
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert (ce.fingerprint, ce._stages) == (before, [])


def test_folders_that_cannot_be_written(ce, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder that can be written to as checkpoint_dir"):
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="expected a folder that can be written to as save_dir"):
        fit_sequences(ce, {"CL": Stage(CL, *data[:2])}, ["CL"], save_dir=tmp_path / "file" / "below")


def test_checkpoints_never_take_more_than_two_places(ce, data, tmp_path, monkeypatch):
    there = []
    original = training.durable

    def durable(folder):
        if folder.parent.name == PARTIAL:
            there.append(len([*tmp_path.glob("checkpoint-*"), *tmp_path.glob(f"{PARTIAL}/*")]))
        original(folder)

    monkeypatch.setattr(training, "durable", durable)
    ce.fit(*data, fitter=dataclasses.replace(CL, max_steps=8), checkpoint_dir=tmp_path)
    assert there == [1, 2, 2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    names = {path.name for path in tmp_path.glob("*/*")}
    assert names == {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
        training.STATE_FILE, training.BEST_FILE,
    }  # fmt: skip


# ---- a checkpoint of another training


def scaled(factor: float):
    def loss(scores, labels, mask):
        return factor * losses.localized_contrastive(scores, labels, mask)

    return loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, "found one of learning_rate 0.01 instead of 0.02;"),
        ({"epochs": 4, "seed": 1}, "found one of epochs 3 instead of 4, seed 42 instead of 1;"),
        ({"loss": scaled(3.0)}, r"found one of loss scaled\.<locals>\.loss \(\w+\) instead of scaled"),
        ({"qrels": True}, r"found one of data \w+ instead of \w+;"),
        ({"validation": True}, r"found one of validation none instead of \w+;"),
        ({"max_query_length": 5}, "found one of max_query_length None instead of 5;"),
        ({"weights": True}, r"found one of start weights \w+ instead of \w+;"),
    ],
)
def test_a_checkpoint_of_another_training_names_what_differs(ce, data, tmp_path, monkeypatch, change, message):
    fitter = dataclasses.replace(CL, loss=scaled(2.0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 1)
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    settings = {name: value for name, value in change.items() if name in vars(fitter)}
    results, qrels, results_va, qrels_va = data
    if "max_query_length" in change:
        ce.max_query_length = 5
    if "weights" in change:
        with torch.no_grad():
            next(ce._load()[0].parameters()).add_(1)
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ce.fit(
            results,
            qrels.head(60) if "qrels" in change else qrels,
            *((results_va, qrels_va) if "validation" in change else ()),
            fitter=dataclasses.replace(fitter, **settings),
            checkpoint_dir=tmp_path,
        )


def test_less_memory_may_be_taken_to_go_on(ce, data, tmp_path, monkeypatch):
    fitter = dataclasses.replace(CL, max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 3)
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    ce.fit(*data[:2], fitter=dataclasses.replace(fitter, pairs_per_pass=4), checkpoint_dir=tmp_path)
    assert ce.history["step"].tolist() == [1, 2, 3, 4]


# ---- save


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (PreTrainedModel, "save_pretrained", 1),
        (PreTrainedTokenizerBase, "save_pretrained", 1),
        (os, "fsync", 3),
        (os, "replace", 1),  # the old model is moved aside
        (os, "replace", 2),  # the new one takes its place
    ],
)
def test_a_save_that_fails_leaves_the_old_model(ce, data, tmp_path, monkeypatch, owner, name, call):
    ce.save(tmp_path / "model")
    before = ce.fingerprint
    ce.fit(*data[:2], fitter=dataclasses.replace(CL, max_steps=1))
    original, calls = getattr(owner, name), iter(range(1, 100))

    def fails(*args, **kwargs):
        if next(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(owner, name, fails)
        ce.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert MonoCE.load(tmp_path / "model").fingerprint == before
    ce.save(tmp_path / "model")
    assert MonoCE.load(tmp_path / "model").fingerprint == ce.fingerprint


@pytest.mark.parametrize("again", ["load", "save"])
def test_a_save_that_was_killed_between_two_names(ce, tmp_path, again):
    ce.save(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.old")
    (tmp_path / ".model.newabc").mkdir()  # the new model, wherever it had got to
    os.utime(tmp_path / ".model.newabc", (0, 0))
    if again == "load":
        assert MonoCE.load(tmp_path / "model").fingerprint == ce.fingerprint
    else:
        ce.save(tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_was_killed_before_it_tidied_up(ce, data, tmp_path):
    ce.save(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / ".model.old")
    ce.fit(*data[:2], fitter=dataclasses.replace(CL, max_steps=1))
    ce.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert MonoCE.load(tmp_path / "model").fingerprint == ce.fingerprint
