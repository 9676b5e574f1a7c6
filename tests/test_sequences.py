import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from interruptions import interrupted_at, interruptible_lce, interruptible_ranknet, on_each_step
from transformers import AutoModelForSequenceClassification, TrainerCallback, trainer

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences

NAMES = ["CL", "KD", "CL-KD", "KD-CL"]
CL = Contrastive(n_negatives=3, learning_rate=1e-2, max_steps=4, batch_size=8, loss=interruptible_lce)
KD = Distillation(learning_rate=1e-2, max_steps=4, batch_size=8, loss=interruptible_ranknet)


@pytest.fixture
def stages(train_part) -> dict[str, Stage]:
    teacher = train_part.results.assign(score=train_part.results["quality"].astype(float))
    return {"CL": Stage(CL, train_part.results, train_part.qrels), "KD": Stage(KD, teacher)}


@pytest.fixture
def batches():
    """The batches trained so far, 4 per stage."""
    seen: list[str] = []
    with on_each_step(lambda stage, step: seen.append(stage)):
        yield seen


def test_each_stage_is_trained_once(ce, stages, batches):
    before = ce.fingerprint
    rerankers = fit_sequences(ce, stages, NAMES)
    assert list(rerankers) == NAMES
    assert len(batches) == 4 * 4  # CL, KD, and a second stage after each
    assert len({r.fingerprint for r in rerankers.values()} | {before}) == 5
    assert ce.fingerprint == before
    assert rerankers["CL-KD"].stages[1].start == rerankers["CL"].fingerprint
    assert rerankers["KD-CL"].history["fitter"].unique().tolist() == ["Distillation", "Contrastive"]


def test_a_sequence_equals_two_fits(ce, stages):
    rerankers = fit_sequences(ce, stages, ["CL-KD"])
    by_hand = ce.clone().fit(stages["CL"].results, stages["CL"].qrels, fitter=CL)
    by_hand.fit(stages["KD"].results, fitter=KD)
    assert rerankers["CL-KD"].fingerprint == by_hand.fingerprint


def test_saved_stages_are_reused_with_the_present_settings(backbone, ce, stages, batches, tmp_path, test_part, caplog):
    first = fit_sequences(ce, stages, NAMES, save_dir=tmp_path)
    other = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", batch_size=3)
    with caplog.at_level(logging.INFO):
        again = fit_sequences(other, stages, NAMES, save_dir=tmp_path)
    assert len(batches) == 4 * 4
    assert "CL-KD: reusing" in caplog.text
    for name in NAMES:
        assert again[name].fingerprint == first[name].fingerprint
        assert again[name].batch_size == 3
        pd.testing.assert_frame_equal(again[name].history, first[name].history)
        pd.testing.assert_frame_equal(again[name](test_part.results), first[name](test_part.results), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Contrastive dropped")
def test_a_changed_stage_is_trained_again(ce, stages, batches, tmp_path, dev_part):
    fit_sequences(ce, stages, NAMES, save_dir=tmp_path)
    changed = {**stages, "KD": dataclasses.replace(stages["KD"], fitter=dataclasses.replace(KD, seed=7))}
    fit_sequences(ce, changed, NAMES, save_dir=tmp_path)
    assert len(batches) == 4 * (4 + 3)  # KD, CL-KD and KD-CL
    fewer = {**stages, "CL": Stage(CL, stages["CL"].results, stages["CL"].qrels.head(32))}
    fit_sequences(ce, fewer, ["CL"], save_dir=tmp_path)
    assert len(batches) == 4 * 8
    fit_sequences(ce, stages, ["CL"], save_dir=tmp_path, validation=(dev_part.results, dev_part.qrels))
    assert len(batches) == 4 * 9
    longer = ce.clone()
    longer.max_length = 32
    fit_sequences(longer, stages, ["CL"], save_dir=tmp_path)
    assert len(batches) == 4 * 10


class Texts:
    """A source of one text for all documents; only docnos in `changed` have another one."""

    def __init__(self, changed: frozenset[str] = frozenset()) -> None:
        self.changed = changed

    def text_loader(self, fields):
        texts = {True: "w1 w2", False: "w3 w4"}
        return lambda frame: frame.assign(text=[texts[docno in self.changed] for docno in frame["docno"]])


@pytest.mark.parametrize("what", ["missing positives", "validation"])
def test_texts_that_are_looked_up_are_part_of_the_key(ce, stages, batches, tmp_path, dev_part, what):
    stage, validation = stages["CL"], None
    if what == "validation":
        validation = (dev_part.results.drop(columns="text"), dev_part.qrels)
        changed = frozenset(dev_part.results["docno"])
    else:
        added = dev_part.results.tail(1).assign(qid=stage.results["qid"].iloc[0], label=1)[["qid", "docno", "label"]]
        qrels = pd.concat([stage.qrels, added])
        stage = Stage(dataclasses.replace(CL, add_missing_positives=True), stage.results, qrels)
        changed = frozenset(qrels["docno"])
    for texts in (Texts(), Texts(), Texts(changed)):
        fit_sequences(ce.apply_attributes(text=texts), {"CL": stage}, ["CL"], validation=validation, save_dir=tmp_path)
    assert len(batches) == 2 * 4


def test_a_model_with_another_dropout_is_trained_again(backbone, stages, batches, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for probability in (0.1, 0.3, 0.3):
        (folder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": probability}))
        ce = MonoCE(folder, max_length=24, dtype="float32", device="cpu")
        fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path / "saved")
    assert len(batches) == 2 * 2 * 4


@pytest.mark.parametrize("change", ["frozen", "dropout", "head"])
def test_a_loaded_network_in_another_state_is_trained_again(backbone, stages, batches, tmp_path, change):
    """The weights are the same, what training does with them isn't."""
    torch.manual_seed(42)
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    first = MonoCE(network, max_length=24, dtype="float32", device="cpu")
    other = first.clone()
    if change == "frozen":
        other.cross_encoder.network.bert.embeddings.requires_grad_(False)
    elif change == "dropout":
        other.cross_encoder.network.dropout.p = 0.9
    else:
        other.cross_encoder.head_is_new = True
    assert other.fingerprint == first.fingerprint
    fits = [fit_sequences(ce, {"CL": stages["CL"]}, ["CL"], save_dir=tmp_path)["CL"] for ce in (first, other)]
    assert len(batches) == 2 * 4
    if change != "head":
        assert fits[0].fingerprint != fits[1].fingerprint


@pytest.mark.parametrize("seeds", [[1.2], [True], [1, 1], [-1]])
def test_invalid_seeds(ce, stages, seeds):
    with pytest.raises(ValueError, match="seeds must be"):
        fit_sequences(ce, stages, ["CL"], seeds=seeds)


def test_a_damaged_model_is_trained_again(ce, stages, batches, tmp_path, caplog):
    expected = fit_sequences(ce, stages, ["CL"], save_dir=tmp_path)["CL"].fingerprint
    weights = next(tmp_path.glob("CL-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert fit_sequences(ce, stages, ["CL"], save_dir=tmp_path)["CL"].fingerprint == expected
    assert "is incomplete or damaged" in caplog.text
    assert len(batches) == 2 * 4


def test_an_interrupted_stage_is_resumed(ce, stages, tmp_path, caplog):
    expected = fit_sequences(ce, stages, ["CL-KD"])["CL-KD"].fingerprint
    with interrupted_at(3, stage="KD"), pytest.raises(KeyboardInterrupt):
        fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        resumed = fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)["CL-KD"]
    assert "CL: reusing" in caplog.text
    assert "resuming from" in caplog.text
    assert resumed.fingerprint == expected
    assert not list(tmp_path.glob("*.checkpoints"))


def test_one_reranker_per_seed(backbone, stages):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    rerankers = fit_sequences(ce, stages, ["CL", "CL-KD"], seeds=[1, 2])
    assert {seed: list(r) for seed, r in rerankers.items()} == {1: ["CL", "CL-KD"], 2: ["CL", "CL-KD"]}
    assert len({r.fingerprint for by_name in rerankers.values() for r in by_name.values()}) == 4
    by_hand = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", seed=2)
    by_hand.fit(stages["CL"].results, stages["CL"].qrels, fitter=dataclasses.replace(CL, seed=2))
    assert rerankers[2]["CL"].fingerprint == by_hand.fingerprint


def test_a_head_that_was_saved_untrained_has_one_seed(ce, stages, tmp_path):
    ce.save(tmp_path / "new")
    loaded = MonoCE.load(tmp_path / "new")
    with pytest.raises(ValueError, match="seeds need a head that is drawn anew"):
        fit_sequences(loaded, stages, ["CL"], seeds=[1, 2])


def test_numpy_seeds(ce, stages, tmp_path):
    trained = fit_sequences(ce, stages, ["CL"], seeds=np.array([1, 2]), save_dir=tmp_path)
    assert [type(seed) for seed in trained] == [int, int]


def test_a_reused_stage_keeps_the_history_of_its_start(ce, stages, batches, tmp_path, train_part):
    """Equal weights with another history: MonoCE(folder) has none, and MonoCE.load(folder) the first stage."""
    ce.fit(train_part.results, train_part.qrels, fitter=CL).save(tmp_path / "model")
    with_history = MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")
    without = MonoCE(tmp_path / "model", max_length=24, dtype="float32", device="cpu")
    del batches[:]
    for start, n_stages in ((without, 1), (with_history, 2)):
        trained = fit_sequences(start, {"KD": stages["KD"]}, ["KD"], save_dir=tmp_path / "stages")["KD"]
        assert len(trained.stages) == n_stages
    assert len(batches) == 4  # trained once


def test_a_composed_fitter_is_a_stage(ce, stages):
    both = Stage(CL >> Distillation(learning_rate=1e-2, max_steps=2), stages["CL"].results, stages["CL"].qrels)
    rerankers = fit_sequences(ce, {"both": both}, ["both"], seeds=[3])
    assert rerankers[3]["both"].history["stage"].max() == 2


def test_two_names_of_one_sequence_give_two_objects(ce, stages):
    cl = {"CL": stages["CL"], "again": stages["CL"]}
    rerankers = fit_sequences(ce, cl, ["CL", "again"])
    assert rerankers["CL"] is not rerankers["again"]
    assert rerankers["CL"].fingerprint == rerankers["again"].fingerprint


def test_an_unknown_stage(ce, stages):
    with pytest.raises(ValueError, match=r"got 'CL-XX' with the unknown stage 'XX'. The stages are CL, KD"):
        fit_sequences(ce, stages, ["CL-XX"])


def test_names_of_stages_with_a_dash(ce, stages):
    fitter = CL.replace(max_steps=1, learning_rate=1e-05)
    named = {"CL": stages["CL"], "lr=1e-05": Stage(fitter, stages["CL"].results, stages["CL"].qrels)}
    assert fit_sequences(ce, named, ["lr=1e-05"])["lr=1e-05"].fitter == fitter
    with pytest.raises(ValueError, match=r"got 'CL-lr=1e-06' with the unknown stage 'lr=1e'"):
        fit_sequences(ce, named, ["CL-lr=1e-06"])


def test_a_sequence_with_two_readings(ce, stages):
    both = {"a": stages["CL"], "b-c": stages["KD"], "a-b": stages["CL"], "c": stages["KD"]}
    with pytest.raises(ValueError, match=r"got 'a-b-c', which may be 'a' then 'b-c', or 'a-b' then 'c'\. Rename"):
        fit_sequences(ce, both, ["a-b-c"])


def test_a_stage_needs_a_fitter(train_part):
    with pytest.raises(ValueError, match="fitter must be"):
        Stage("CL", train_part.results)


def test_warnings_say_what_they_are_about(ce, stages, train_part):
    results = train_part.results[train_part.results["qid"] != train_part.qrels["qid"][0]]
    extra = train_part.results.head(8).assign(qid="unjudged")
    wrong = Stage(CL, pd.concat([results, extra]), train_part.qrels)
    for _ in range(2):  # once in each call
        with pytest.warns(UserWarning, match="dropped") as caught:
            fit_sequences(ce, {**stages, "CL": wrong}, ["KD-CL", "CL"], seeds=[2, 3])
        dropped = [str(warning.message) for warning in caught if "dropped" in str(warning.message)]
        assert len(dropped) == 1
        assert dropped[0].startswith("seed 2, KD-CL: Contrastive dropped 1 of 64 queries")


def test_a_stage_that_is_being_trained_elsewhere_is_waited_for(ce, stages, batches, tmp_path):
    found = []

    def run(start):
        found.append(fit_sequences(start, stages, ["CL"], save_dir=tmp_path)["CL"].fingerprint)

    threads = [threading.Thread(target=run, args=(start,)) for start in (ce.clone(), ce.clone())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(batches) == 4
    assert len(found) == 2
    assert found[0] == found[1]
    assert len([*tmp_path.glob("CL*")]) == 1  # no checkpoints


def test_a_stage_is_trained_once_even_if_it_failed_elsewhere(ce, stages, tmp_path, monkeypatch):
    fit, running, most, calls = MonoCE.fit, [], [], itertools.count()

    def slow_fit(self, *args, **kwargs):
        number = next(calls)
        running.append(number)
        most.append(len(running))
        try:
            time.sleep(0.5)
            if number == 0:
                raise KeyboardInterrupt
            return fit(self, *args, **kwargs)
        finally:
            running.remove(number)

    def run(start):
        with contextlib.suppress(KeyboardInterrupt):
            fit_sequences(start, stages, ["CL"], save_dir=tmp_path)

    monkeypatch.setattr(MonoCE, "fit", slow_fit)
    threads = [threading.Thread(target=run, args=(ce.clone(),)) for _ in range(3)]
    for thread, pause in zip(threads, (0.2, 0.5, 0), strict=True):  # the last begins while the second trains
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    assert most == [1, 1]


def test_a_duplicated_column_has_no_effect(ce, stages, tmp_path):
    stage = stages["CL"]
    twice = dataclasses.replace(stage, results=pd.concat([stage.results, stage.results[["quality"]]], axis=1))
    assert fit_sequences(ce, {"CL": twice}, ["CL"], save_dir=tmp_path)["CL"].fingerprint


class Writer(TrainerCallback):
    """Writes a file beside the checkpoints, as TensorBoard does."""

    def on_train_end(self, args, state, control, **options):
        (Path(args.output_dir) / "runs").mkdir()
        (Path(args.output_dir) / "runs" / "events").write_text("mine")


def test_files_beside_the_checkpoints_are_kept(ce, stages, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Writer])
    for _ in range(2):  # trains, and reuses
        fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("events")) == ["events"] * 2
        assert not [*tmp_path.rglob("checkpoint-*")]
