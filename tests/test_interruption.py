"""Nothing is lost: kills, Ctrl-C, folders that can't be written to, checkpoints of another run, failing saves."""

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
from interruptions import interrupted_at, interruptible_lce, interruptible_ranknet
from ir_measures import RR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, fitting
from pyterrier_msft.model.encoding import PairEncoder

HERE = Path(__file__).parent
CL = Contrastive(
    n_negatives=3, learning_rate=1e-2, epochs=3, batch_size=8, dropout=0.2, metric=RR @ 10, eval_every=2,
    loss=interruptible_lce,
)  # 24 updates  # fmt: skip
KD = Distillation(learning_rate=1e-2, max_steps=6, batch_size=8, loss=interruptible_ranknet)


@pytest.fixture
def data(train_part, dev_part) -> tuple:
    return train_part.results, train_part.qrels, dev_part.results, dev_part.qrels


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


def test_killed_runs_reach_the_uninterrupted_weights(kills):
    assert kills["kills"] == 20
    assert all(run["equal"] for run in kills["runs"])
    assert {run["case"] for run in kills["runs"] if run["kills"]} == {"one stage", "two stages", "sequences"}
    assert {kind for run in kills["runs"] for kind in run["kills"]} == {"time", "weights", "random state", "state"}


def test_a_killed_run_is_resumed_and_not_repeated(kills):
    whole = {"one stage": 15, "two stages": 16, "sequences": 16}  # updates of an undisturbed run
    for run in kills["runs"]:
        # A kill loses at most the updates since the last checkpoint but one, where the last was being written.
        lost = sum(run["batches"]) - whole[run["case"]]
        assert lost <= 2 * 2 * len(run["kills"])
    assert any(count < whole[run["case"]] / 2 for run in kills["runs"] for count in run["batches"][1:])


def test_the_disk_holds_one_checkpoint_per_stage(kills):
    for run in kills["runs"]:
        last = {"one stage": ["checkpoint-15"], "sequences": []}
        both = ["stage-1/checkpoint-8", "stage-2/checkpoint-8"]
        assert run["checkpoints"] == last.get(run["case"], both)


# ---- Ctrl-C


def test_ctrl_c_leaves_the_best_weights_and_the_repeated_call_resumes(ce, data, dev_part, tmp_path, caplog):
    undisturbed = ce.clone().fit(*data, fitter=CL)
    with interrupted_at(13), pytest.raises(KeyboardInterrupt):
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert "interrupted at step 13 of 24; the re-ranker keeps the best weights so far; repeat the call" in caplog.text
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random")
        run = ce(dev_part.results).rename(columns={"qid": "query_id", "docno": "doc_id"})
    history = ce.history
    assert history["step"].tolist() == list(range(14))
    qrels = dev_part.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    assert (RR @ 10).calc_aggregate(qrels, run) == pytest.approx(history["RR@10"].max())
    assert (ce.stages[-1].interrupted, ce.stages[-1].fingerprint) == (13, ce.fingerprint)
    # The same cell once more, in the same notebook
    ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert ce.fingerprint == undisturbed.fingerprint
    assert [stage.interrupted for stage in ce.stages] == [None]
    assert ce.history["loss"].tolist()[1:] == undisturbed.history["loss"].tolist()[1:]  # the start has none


def test_ctrl_c_in_a_second_stage(ce, data, backbone, tmp_path):
    both = dataclasses.replace(CL, max_steps=4) >> KD
    undisturbed = ce.clone().fit(*data, fitter=both)
    with interrupted_at(4, stage="KD"), pytest.raises(KeyboardInterrupt):
        ce.fit(*data, fitter=both, checkpoint_dir=tmp_path)
    assert [stage.interrupted for stage in ce.stages] == [None, 4]
    interrupted = ce.clone()
    ce.fit(*data, fitter=both, checkpoint_dir=tmp_path)
    assert ce.fingerprint == undisturbed.fingerprint
    assert len(ce.stages) == 2
    # With another folder there is nothing to resume: it is a further stage.
    interrupted.fit(*data[:2], fitter=KD, checkpoint_dir=tmp_path / "other")
    assert len(interrupted.stages) == 3
    again = MonoCE(backbone, max_length=24, dtype="float32", device="cpu").fit(*data, fitter=both)
    assert again.fingerprint == undisturbed.fingerprint


def test_ctrl_c_before_the_first_update_leaves_no_stage(ce, data, dev_part):
    before = ce.fingerprint
    with interrupted_at(0), pytest.raises(KeyboardInterrupt):
        ce.fit(*data, fitter=CL)
    assert (ce.fingerprint, ce.stages, ce.data_report) == (before, [], None)
    with pytest.warns(UserWarning, match="random"):
        ce(dev_part.results)


def test_an_error_during_training_keeps_what_was_learned(ce, data):
    before = ce.fingerprint
    with interrupted_at(5, error=ConnectionError), pytest.raises(ConnectionError):
        ce.fit(*data, fitter=CL)
    assert ce.stages[-1].interrupted == 5
    assert ce.stages[-1].fingerprint == ce.fingerprint != before


def test_after_an_interruption_the_head_is_still_new(ce, data):
    """So that the repeated fit plans as the first one did, and not with the small learning rate of a trained head."""
    fitter = dataclasses.replace(CL, learning_rate=None, epochs=None, eval_every=None, metric=None)
    undisturbed = ce.clone().fit(*data[:2], fitter=fitter)
    with interrupted_at(59), pytest.raises(KeyboardInterrupt):
        ce.fit(*data[:2], fitter=fitter)
    assert ce.stages[-1].interrupted == ce.stages[-1].updates == 59  # between two rows of the history
    assert ce.history["loss"].notna().any()
    message = "training starts from the weights of a fit that was interrupted at step 59: to resume it, pass its check"
    with pytest.warns(UserWarning, match=message):
        ce.fit(*data[:2], fitter=fitter)
    assert ce.stages[-1].plan == undisturbed.stages[-1].plan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training starts")
        ce.fit(*data[:2], fitter=fitter)
    assert ce.stages[-1].plan["learning_rate"] == undisturbed.stages[-1].plan["learning_rate"] / 4


@pytest.mark.filterwarnings("ignore:training starts")
def test_two_interruptions_and_a_stage_that_changes_nothing(ce, data):
    fitter = dataclasses.replace(CL, learning_rate=None, metric=None)
    rate = ce.clone().fit(*data[:2], fitter=fitter).stages[-1].plan["learning_rate"]
    for _ in range(2):
        with interrupted_at(5), pytest.raises(KeyboardInterrupt):
            ce.fit(*data[:2], fitter=fitter)
        assert ce.stages[-1].plan["learning_rate"] == rate
    before = ce.fingerprint
    with pytest.warns(UserWarning, match="changed no weight|didn't improve"):
        ce.fit(*data[:2], fitter=dataclasses.replace(CL, learning_rate=1e-30, metric=None))
    assert ce.fingerprint == before
    assert not ce.cross_encoder.head_is_new  # it has been trained


def test_what_was_kept_of_an_interrupted_stage_is_recorded(ce, data, tmp_path):
    with interrupted_at(13), pytest.raises(KeyboardInterrupt):
        ce.fit(*data, fitter=dataclasses.replace(CL, patience=20))
    kept = ce.history.loc[ce.history["kept"], "step"].item()
    assert ce.data_report.outcome.startswith(f"kept step {kept} of 24")
    ce.save(tmp_path / "model")
    assert "| 13 (interrupted) |" in (tmp_path / "model" / "README.md").read_text()


# ---- folders


def test_a_folder_that_cannot_be_written_to(ce, data, tmp_path):
    (tmp_path / "file").write_text("")
    before = ce.fingerprint
    with pytest.raises(ValueError, match="checkpoint_dir must be a folder that can be written to; got"):
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="save_dir must be a folder that can be written to; got"):
        fit_sequences(ce, {"CL": Stage(CL, *data[:2])}, ["CL"], save_dir=tmp_path / "file" / "below")
    assert (ce.fingerprint, ce.stages) == (before, [])


def test_a_failed_write_ends_training_and_the_repeated_call_resumes(ce, data, tmp_path, monkeypatch):
    expected = ce.clone().fit(*data, fitter=CL).fingerprint
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        calls, original = iter(range(100)), torch.save

        def save(*args, **kwargs):
            if next(calls) >= 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(*args, **kwargs)

        patch.setattr(torch, "save", save)
        ce.clone().fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path).fingerprint == expected


def test_the_checkpoint_folder_may_be_in_the_models_folder(ce, data, tmp_path):
    ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path / "model" / "checkpoints")
    ce.save(tmp_path / "model")
    assert MonoCE.load(tmp_path / "model").fingerprint == ce.fingerprint
    assert (tmp_path / "model" / "checkpoints" / "checkpoint-24").is_dir()


# ---- a checkpoint of another run


def scaled(factor: float):
    def loss(scores, labels, mask):
        return factor * interruptible_lce(scores, labels, mask)

    return loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate is 0.01 there and 0.02 here. Use"),
        ({"epochs": 4, "seed": 1}, "epochs is 3 there and 4 here, seed is 42 there and 1 here. Use"),
        ({"loss": scaled(3.0)}, r"loss is scaled\.<locals>\.loss \(\w+\) there and scaled"),
        ({"qrels": True}, r"data is \w+ there and \w+ here. Use"),
        ({"validation": True}, r"validation is none there and \w+ here. Use"),
        ({"max_query_length": 5}, "max_query_length is None there and 5 here. Use"),
        ({"weights": True}, r"start weights is \w+ there and \w+ here. Use"),
    ],
)
def test_a_checkpoint_of_another_run_names_what_differs(ce, data, tmp_path, change, message):
    fitter = dataclasses.replace(CL, loss=scaled(2.0))
    with interrupted_at(1), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    settings = {name: value for name, value in change.items() if name in vars(fitter)}
    results, qrels, results_va, qrels_va = data
    if "max_query_length" in change:
        ce.max_query_length = 5
    if "weights" in change:
        ce.fit(*data[:2], fitter=dataclasses.replace(KD, max_steps=1, warmup=0))
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ce.fit(
            results,
            qrels.head(60) if "qrels" in change else qrels,
            *((results_va, qrels_va) if "validation" in change else ()),
            fitter=dataclasses.replace(fitter, **settings),
            checkpoint_dir=tmp_path,
        )


def test_a_model_with_another_dropout_is_another_run(ce, data, tmp_path, backbone):
    with interrupted_at(1), pytest.raises(KeyboardInterrupt):
        ce.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path / "checkpoints")
    folder = shutil.copytree(backbone, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.3}))
    other = MonoCE(folder, max_length=24, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"model's dropout is .*hidden_dropout_prob=0\.1 there and .*=0\.3 here"):
        other.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path / "checkpoints")


def test_a_run_may_be_resumed_with_less_memory(ce, data, tmp_path):
    fitter = dataclasses.replace(CL, max_steps=4)
    with interrupted_at(3), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    ce.fit(*data[:2], fitter=dataclasses.replace(fitter, pairs_per_pass=4), checkpoint_dir=tmp_path)
    assert ce.history["step"].tolist() == [1, 2, 3, 4]


# ---- save


@pytest.mark.parametrize("owner", [PreTrainedModel, PreTrainedTokenizerBase])
def test_a_save_that_fails_leaves_the_old_model_and_all_other_files(ce, data, tmp_path, monkeypatch, owner):
    folder = tmp_path / "model"
    ce.save(folder)
    (folder / "results").mkdir()
    (folder / "notes.txt").write_text("mine")
    before, files = ce.fingerprint, sorted(folder.rglob("*"))
    ce.fit(*data[:2], fitter=dataclasses.replace(CL, max_steps=1, warmup=0))

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(owner, "save_pretrained", fail)
        ce.save(folder)
    assert sorted(folder.rglob("*")) == files
    assert MonoCE.load(folder).fingerprint == before
    ce.save(folder)
    assert sorted(folder.rglob("*")) == files
    assert MonoCE.load(folder).fingerprint == ce.fingerprint != before
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_what_others_put_into_its_new_folder(ce, tmp_path, monkeypatch):
    folder, other = tmp_path / "model", ce.clone()

    def fail(*args, **kwargs):
        monkeypatch.undo()
        other.save(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        ce.save(folder)
    assert MonoCE.load(folder).fingerprint == other.fingerprint


@pytest.mark.parametrize("moved", [0, 1, 3])
@pytest.mark.parametrize("again", ["load", "save"])
def test_a_save_that_was_killed_while_it_moved_files_is_finished(ce, data, tmp_path, monkeypatch, moved, again):
    folder = tmp_path / "model"
    ce.save(folder)
    (folder / "vocab.json").write_text("{}")  # of an older model
    ce.fit(*data[:2], fitter=dataclasses.replace(CL, max_steps=1))
    calls, original = iter(range(100)), os.replace

    def replace(*args):
        if next(calls) == moved:
            raise KeyboardInterrupt  # stands for the end of the process
        original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        ce.save(folder)
    if again == "save":
        ce.save(folder)
    assert MonoCE.load(folder).fingerprint == ce.fingerprint
    assert not (folder / ".saving").exists()
    assert not (folder / "vocab.json").exists()


def test_a_repeated_fit_that_fails_early_can_still_be_resumed(ce, data, tmp_path, monkeypatch):
    expected = ce.clone().fit(*data, fitter=CL).fingerprint
    with interrupted_at(7), pytest.raises(KeyboardInterrupt):
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(PairEncoder, "truncation_rates", lambda *args: (_ for _ in ()).throw(ConnectionError))
        ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path)
    assert ce.stages[-1].interrupted == 7
    assert ce.fit(*data, fitter=CL, checkpoint_dir=tmp_path).fingerprint == expected


def test_an_older_checkpoint_that_a_kill_left_behind_is_deleted(ce, data, tmp_path):
    fitter = dataclasses.replace(CL, max_steps=4)
    with interrupted_at(2), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    (older,) = tmp_path.glob("checkpoint-*")
    saved = shutil.copytree(older, tmp_path / "saved")
    ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    # Killed between the last checkpoint and the deletion of the one before: nothing is left to train.
    saved.rename(older)
    ce.fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_all_complete_checkpoints_are_kept_if_asked_for(ce, data, tmp_path):
    fitter = dataclasses.replace(CL, max_steps=8, trainer_args={"save_total_limit": 3})
    with interrupted_at(7), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    with interrupted_at(0), pytest.raises(KeyboardInterrupt):
        ce.fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


FOREIGN_STATE = '{"global_step": 900, "stateful_callbacks": {}}'


@pytest.mark.parametrize("is_used", [False, True], ids=["in a new folder", "beside ours"])
@pytest.mark.parametrize(("name", "state"), [("900", FOREIGN_STATE), ("1", None), ("1", "{}")])
def test_another_programs_checkpoints_are_refused_and_kept(ce, data, tmp_path, name, state, is_used):
    if is_used:
        with interrupted_at(1), pytest.raises(KeyboardInterrupt):
            ce.clone().fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path)
    foreign = tmp_path / f"checkpoint-{name}"
    foreign.mkdir()
    (foreign / "weights.bin").write_text("mine")
    if state is not None:
        (foreign / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=f"must not have checkpoints of another program; got checkpoint-{name}. Use"):
        ce.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path)
    assert (foreign / "weights.bin").read_text() == "mine"
    if is_used and state == FOREIGN_STATE:  # without it, training continues
        foreign.rename(tmp_path / "elsewhere")
        assert ce.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path).stages[-1].updates == 24


def test_copies_of_checkpoints_are_kept(ce, data, tmp_path):
    ce.clone().fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path)
    for name in ("checkpoint-24-copy", "checkpoint-best"):
        shutil.copytree(tmp_path / "checkpoint-24", tmp_path / name)
    assert ce.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path).stages[-1].updates == 24
    assert {"checkpoint-24-copy", "checkpoint-best"} < {path.name for path in tmp_path.iterdir()}


def test_the_home_folder(ce, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with interrupted_at(5), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(*data[:2], fitter=CL, checkpoint_dir="~/checkpoints")
    assert [*(tmp_path / "home" / "checkpoints").glob("checkpoint-*")]
    ce.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path / "home" / "checkpoints")
    fit_sequences(ce, {"CL": Stage(CL, *data[:2])}, ["CL"], save_dir="~/models")
    assert not (tmp_path / "~").exists()
    assert not [*(tmp_path / "home" / "models").rglob("checkpoint-*")]


def test_a_checkpoint_of_an_earlier_version_is_refused(ce, data, tmp_path, monkeypatch):
    ce.clone().fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path)
    monkeypatch.setattr(fitting, "SEMANTICS_VERSION", 99)
    with pytest.raises(ValueError, match=r"another training run: version of training is \d+ with torch .* and 99 with"):
        ce.fit(*data[:2], fitter=CL, checkpoint_dir=tmp_path)


def test_an_older_checkpoint_of_another_run_is_refused_and_kept(ce, data, tmp_path):
    for seed, step, name in ((1, 1, "other"), (42, 3, "own")):
        with interrupted_at(step), pytest.raises(KeyboardInterrupt):
            fitter = dataclasses.replace(CL, seed=seed, trainer_args={"save_total_limit": None})
            ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path / name)
    older = tmp_path / "own" / "checkpoint-1"
    (tmp_path / "other" / "checkpoint-0").rename(older)
    with pytest.raises(ValueError, match=r"holds a checkpoint of another training run: .*seed is 1 there and 42 here"):
        ce.fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path / "own")
    assert (older / "model.safetensors").is_file()


def test_a_first_checkpoint_that_was_killed_is_ours(ce, data, tmp_path):
    fitter = dataclasses.replace(CL, max_steps=2)
    with interrupted_at(0), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint-0" / "trainer_state.json").unlink()
    ce.fit(*data[:2], fitter=fitter, checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
