import dataclasses
import logging

import pandas as pd
import pytest

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences
from pyterrier_msft.training.trainer import _ListTrainer

NAMES = ["CL", "KD", "CL-KD", "KD-CL"]
CL = Contrastive(n_negatives=3, learning_rate=1e-2, max_steps=4, batch_size=8)


@pytest.fixture
def stages(train_part) -> dict[str, Stage]:
    teacher = train_part.results.assign(score=train_part.results["quality"].astype(float))
    return {
        "CL": Stage(CL, train_part.results, train_part.qrels),
        "KD": Stage(Distillation(learning_rate=1e-2, max_steps=4, batch_size=8), teacher),
    }


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """Grows by one at each training."""
    count: list[int] = []
    original = _ListTrainer.train
    monkeypatch.setattr(_ListTrainer, "train", lambda self, **k: (count.append(1), original(self, **k))[1])
    return count


def test_every_sequence_and_each_stage_once(ce, stages, trainings):
    before = ce.fingerprint
    rerankers = fit_sequences(ce, stages, NAMES)
    assert list(rerankers) == NAMES
    assert len(trainings) == 4  # CL, KD, and a second stage after each
    assert len({r.fingerprint for r in rerankers.values()} | {before}) == 5
    assert ce.fingerprint == before
    assert rerankers["CL-KD"]._stages[1]["start"] == rerankers["CL"].fingerprint
    assert rerankers["KD-CL"].history["fitter"].unique().tolist() == ["Distillation", "Contrastive"]


def test_equals_two_fits(ce, stages):
    rerankers = fit_sequences(ce, stages, ["CL-KD"])
    by_hand = ce.clone().fit(stages["CL"].results, stages["CL"].qrels, fitter=CL)
    by_hand.fit(stages["KD"].results, fitter=stages["KD"].fitter)
    assert rerankers["CL-KD"].fingerprint == by_hand.fingerprint


def test_found_again_with_the_present_settings(backbone, ce, stages, trainings, tmp_path, test_part, caplog):
    first = fit_sequences(ce, stages, NAMES, save_dir=tmp_path)
    other = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", batch_size=3)
    with caplog.at_level(logging.INFO):
        again = fit_sequences(other, stages, NAMES, save_dir=tmp_path)
    assert len(trainings) == 4
    assert "CL-KD: found in" in caplog.text
    for name in NAMES:
        assert again[name].fingerprint == first[name].fingerprint
        assert again[name].batch_size == 3
        pd.testing.assert_frame_equal(again[name].history, first[name].history)
        pd.testing.assert_frame_equal(again[name](test_part.results), first[name](test_part.results), atol=1e-5)


def test_what_changed_is_trained_again(ce, stages, trainings, tmp_path, dev_part):
    fit_sequences(ce, stages, NAMES, save_dir=tmp_path)
    changed = {
        **stages,
        "KD": dataclasses.replace(stages["KD"], fitter=dataclasses.replace(stages["KD"].fitter, seed=7)),
    }
    fit_sequences(ce, changed, NAMES, save_dir=tmp_path)
    assert len(trainings) == 4 + 3  # KD, CL-KD and what follows KD
    fewer = {**stages, "CL": Stage(CL, stages["CL"].results, stages["CL"].qrels.head(32))}
    fit_sequences(ce, fewer, ["CL"], save_dir=tmp_path)
    assert len(trainings) == 8
    fit_sequences(ce, stages, ["CL"], save_dir=tmp_path, validation=(dev_part.results, dev_part.qrels))
    assert len(trainings) == 9
    longer = ce.clone()
    longer.max_length = 32
    fit_sequences(longer, stages, ["CL"], save_dir=tmp_path)
    assert len(trainings) == 10


def test_a_damaged_model_is_trained_again(ce, stages, trainings, tmp_path, caplog):
    expected = fit_sequences(ce, stages, ["CL"], save_dir=tmp_path)["CL"].fingerprint
    weights = next(tmp_path.glob("CL-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert fit_sequences(ce, stages, ["CL"], save_dir=tmp_path)["CL"].fingerprint == expected
    assert "is damaged" in caplog.text
    assert len(trainings) == 2


def test_an_interrupted_stage_goes_on(ce, stages, tmp_path, monkeypatch, caplog):
    expected = fit_sequences(ce, stages, ["CL-KD"])["CL-KD"].fingerprint
    original = _ListTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and "KD" in self.args.output_dir:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_ListTrainer, "training_step", training_step)
        fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        found = fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)["CL-KD"]
    assert "CL: found in" in caplog.text
    assert "resuming from" in caplog.text
    assert found.fingerprint == expected
    assert not list(tmp_path.glob("*.checkpoints"))


def test_seeds(backbone, stages):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    rerankers = fit_sequences(ce, stages, ["CL", "CL-KD"], seeds=[1, 2])
    assert {seed: list(r) for seed, r in rerankers.items()} == {1: ["CL", "CL-KD"], 2: ["CL", "CL-KD"]}
    assert len({r.fingerprint for by_name in rerankers.values() for r in by_name.values()}) == 4
    by_hand = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", seed=2)
    by_hand.fit(stages["CL"].results, stages["CL"].qrels, fitter=dataclasses.replace(CL, seed=2))
    assert rerankers[2]["CL"].fingerprint == by_hand.fingerprint


def test_a_composed_fitter_is_a_stage(ce, stages):
    both = Stage(CL >> Distillation(learning_rate=1e-2, max_steps=2), stages["CL"].results, stages["CL"].qrels)
    rerankers = fit_sequences(ce, {"both": both}, ["both"], seeds=[3])
    assert rerankers[3]["both"].history["stage"].max() == 2


def test_two_names_of_one_sequence_are_two_objects(ce, stages):
    cl = {"CL": stages["CL"], "again": stages["CL"]}
    rerankers = fit_sequences(ce, cl, ["CL", "again"])
    assert rerankers["CL"] is not rerankers["again"]
    assert rerankers["CL"].fingerprint == rerankers["again"].fingerprint


def test_an_unknown_stage(ce, stages):
    with pytest.raises(ValueError, match=r"stages: CL, KD\), found 'CL-XX' with 'XX'"):
        fit_sequences(ce, stages, ["CL-XX"])


def test_a_stage_needs_a_fitter(train_part):
    with pytest.raises(ValueError, match="expected a fitter"):
        Stage("CL", train_part.results)
