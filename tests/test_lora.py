"""Adapters of peft: few weights are trained, the others are frozen."""

import json
import pickle
import sys

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from interruptions import interrupted_at, interruptible_lce
from ir_measures import RR
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences
from pyterrier_msft.model import adapters
from pyterrier_msft.model.first_token import CPU_ATTENTION, first_token_only
from pyterrier_msft.model.scoring import forward

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("fast_garbage_collection")

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
CL = Contrastive(n_negatives=3, learning_rate=2e-2, epochs=4, batch_size=8, dropout=0.0)
BRIEF = {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 2}
ONE_STEP = Contrastive(n_negatives=1, learning_rate=1e-2, batch_size=4, max_steps=1, warmup=0)
KINDS = {
    "LoraConfig": {"r": 4, "use_dora": True, "trainable_token_indices": {"word_embeddings": [5, 6]}},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 4},
    "FourierFTConfig": {"n_frequency": 8},
    "HRAConfig": {"r": 4},
    "IA3Config": {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
    "LNTuningConfig": {"target_modules": ["LayerNorm"]},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 2},
    "ShiraConfig": {"r": 1},
    "VBLoRAConfig": {"num_vectors": 8, "vector_length": 4, "r": 2},
    "VeraConfig": {"r": 4},
}


def new(backbone: str, **settings) -> MonoCE:
    return MonoCE(backbone, max_length=24, dtype="float32", device="cpu", **{"adapter": LORA, **settings})


def config_of(kind: str) -> peft.PeftConfig:
    return getattr(peft, kind)(**{"target_modules": ["query", "value"], **KINDS[kind]})


def state(ce: MonoCE) -> dict[str, torch.Tensor]:
    return {name: weights.clone() for name, weights in ce.cross_encoder.network.state_dict().items()}


def check_both_forms(model: str, kind: str, part, folder) -> None:
    """Train an adapter for a step, and check that it scores the same once it is saved, merged or not."""
    ce = new(model, adapter=config_of(kind))
    frame, before, plain = part.results.head(16), state(ce), state(new(model, adapter=None))
    ce.fit(frame, part.qrels, fitter=ONE_STEP)
    changed = {name for name, weights in state(ce).items() if not torch.equal(before[name], weights)}
    assert {"modules_to_save" in name for name in changed} == {True, False}  # the head's weights, and the adapter's
    for merged in (True, False):
        ce.save(folder / str(merged), merged=merged)
        loaded = MonoCE.load(folder / str(merged), dtype="float32", device="cpu")
        np.testing.assert_allclose(loaded(frame)["score"], ce(frame)["score"], atol=1e-5)
        assert (state(loaded).keys() == plain.keys()) == merged


@pytest.fixture(scope="module")
def fitted(backbone, train_part) -> MonoCE:
    return new(backbone).fit(train_part.results, train_part.qrels, fitter=CL)


@pytest.fixture
def trained(fitted) -> MonoCE:
    return fitted.clone()


def test_only_the_adapter_and_the_head_are_trained(backbone, trained, test_part):
    before, after = (ce.cross_encoder.network.state_dict() for ce in (new(backbone), trained))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name, p in trained.cross_encoder.network.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in changed if "lora" not in name} == {"bert", "classifier"}
    assert all("lora" in name or "modules_to_save" in name for name in changed)
    assert any("pooler" in name for name in changed)  # it may be new, as the classifier is
    ranked = pt.Evaluate(trained(test_part.results), test_part.qrels, [RR @ 10])["RR@10"]
    assert ranked > pt.Evaluate(test_part.results, test_part.qrels, [RR @ 10])["RR@10"] + 0.2


def test_equal_seeds_give_equal_adapters(backbone):
    assert new(backbone).fingerprint == new(backbone).fingerprint
    assert new(backbone).fingerprint != new(backbone, seed=1).fingerprint


def test_seeds_draw_the_adapter_of_a_trained_model(backbone, train_part, tmp_path):
    full = new(backbone, adapter=None).fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    full.save(tmp_path / "model")
    ce = new(str(tmp_path / "model"))
    assert not ce.cross_encoder.head_is_new
    fingerprints = {ce.reseeded(seed).fingerprint for seed in (1, 2)}
    assert len(fingerprints) == 2
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    assert ce.reseeded(1).fingerprint == ce.fingerprint  # trained weights stay


def test_seeds_of_an_adapter_on_a_loaded_model(backbone):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    with pytest.raises(ValueError, match="seeds need an adapter that is drawn anew"):
        new(network).reseeded(1)


def test_seeds_of_an_adapter_that_was_saved_untrained(backbone, train_part, tmp_path):
    full = new(backbone, adapter=None).fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    full.save(tmp_path / "model")
    new(str(tmp_path / "model")).save(tmp_path / "adapter", merged=False)
    loaded = MonoCE.load(tmp_path / "adapter")
    with pytest.raises(ValueError, match="seeds need an adapter that is drawn anew"):
        loaded.reseeded(1)
    loaded.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    assert loaded.reseeded(1).fingerprint == loaded.fingerprint


def test_the_fingerprint_depends_on_the_scale_of_an_adapter(backbone):
    strong = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"])
    assert new(backbone).fingerprint != new(backbone, adapter=strong).fingerprint


def test_the_fingerprint_ignores_settings_that_this_version_of_peft_adds(backbone, monkeypatch):
    before = new(backbone).fingerprint
    to_dict = peft.LoraConfig.to_dict
    monkeypatch.setattr(peft.LoraConfig, "to_dict", lambda self: {**to_dict(self), "of_the_future": None})
    assert new(backbone).fingerprint == before


def test_a_merged_model_is_an_ordinary_one(trained, test_part, tmp_path):
    trained.save(tmp_path / "model")
    assert not (tmp_path / "model" / adapters.CONFIG).exists()
    expected = trained(test_part.results)
    loaded = MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")
    pd.testing.assert_frame_equal(loaded(test_part.results), expected, atol=1e-5)
    record = json.loads((tmp_path / "model" / "msft.json").read_text())
    assert record["fingerprint"] == loaded.fingerprint
    assert not [name for name in loaded.cross_encoder.network.state_dict() if "lora" in name]
    assert all(p.requires_grad for p in loaded.cross_encoder.network.parameters())
    # Saving doesn't change the re-ranker.
    pd.testing.assert_frame_equal(trained(test_part.results), expected)
    assert any("lora" in name for name in trained.cross_encoder.network.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(backbone, train_part, tmp_path, kind):
    check_both_forms(backbone, kind, train_part, tmp_path)


@pytest.mark.parametrize("kind", ["IA3Config", "LNTuningConfig"])
def test_adapters_of_a_model_whose_head_has_several_layers(backbone, train_part, tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2, num_labels=1,
    )  # fmt: skip
    for part in (AutoModelForSequenceClassification.from_config(config), tokenizer):
        part.save_pretrained(tmp_path / "roberta")
    check_both_forms(str(tmp_path / "roberta"), kind, train_part, tmp_path)


def test_an_incomplete_merge_is_not_saved(backbone, train_part, tmp_path, monkeypatch):
    new(backbone, adapter=None).fit(train_part.results, train_part.qrels, fitter=ONE_STEP).save(tmp_path / "model")
    before = MonoCE.load(tmp_path / "model").fingerprint
    ce = new(backbone, adapter=config_of("LNTuningConfig"))
    monkeypatch.setattr(adapters, "_unwrap_saved_modules", lambda peft_model: None)
    match = r"peft can merge .* got LNTuningConfig: \d+ weights would be .*'bert\.pooler\..* Pass merged=False"
    with pytest.raises(ValueError, match=match):
        ce.save(tmp_path / "model")
    assert MonoCE.load(tmp_path / "model").fingerprint == before
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_adapter_that_peft_cannot_merge(trained, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("No merging.")

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", refuse)
    with pytest.raises(ValueError, match=r"got LoraConfig: No merging\. Pass merged=False"):
        trained.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    trained.save(tmp_path / "model", merged=False)
    assert MonoCE.load(tmp_path / "model").fingerprint == trained.fingerprint


def test_a_saved_adapter_can_be_trained_further(trained, train_part, test_part, tmp_path):
    trained.save(tmp_path / "adapter", merged=False)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = MonoCE.load(tmp_path / "adapter", dtype="float32", device="cpu")
    assert loaded.fingerprint == trained.fingerprint
    pd.testing.assert_frame_equal(loaded(test_part.results), trained(test_part.results))
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    for ce in (loaded, trained):
        ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    assert loaded.fingerprint == trained.fingerprint
    loaded.save(tmp_path / "adapter", merged=False)  # over itself
    assert MonoCE.load(tmp_path / "adapter").fingerprint == trained.fingerprint
    with pytest.raises(ValueError, match=r"got an adapter's. Load it with MonoCE\.load"):
        MonoCE(tmp_path / "adapter")


def test_peft_loads_a_saved_adapter(backbone, trained, test_part, tmp_path):
    trained.save(tmp_path / "adapter", merged=False)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"), num_labels=1).eval()
    frame = test_part.results.head(16)
    encoder = trained.pair_encoder()
    with torch.inference_mode():
        scores = [
            model(**encoder.pad(encoder([q], [t]), [0])).logits.item()
            for q, t in zip(frame["query"], frame["text"], strict=True)
        ]
    np.testing.assert_allclose(trained(frame)["score"], scores, atol=1e-5)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoPeftModelForSequenceClassification" in card
    assert "CrossEncoder" not in card


def test_clones_and_pickles(trained, train_part, test_part):
    expected = trained(test_part.results)
    other = trained.clone()
    other.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    assert other.fingerprint != trained.fingerprint
    pd.testing.assert_frame_equal(trained(test_part.results), expected)
    again = pickle.loads(pickle.dumps(trained))
    pd.testing.assert_frame_equal(again(test_part.results), expected)
    assert again.fingerprint == trained.fingerprint


def test_a_last_layer_with_an_adapter_is_not_patched(trained, test_part):
    model, encoder = trained.cross_encoder.network, trained.pair_encoder()
    frame = test_part.results.head(16)
    batch = encoder.pad(encoder([*frame["query"]], [*frame["text"]]), range(16))
    for attention in ("sdpa", "eager", CPU_ATTENTION):
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            whole = forward(model, batch)
            with first_token_only(model):
                torch.testing.assert_close(forward(model, batch), whole, atol=1e-5, rtol=0)


def test_the_best_weights_remain_and_training_is_resumed(backbone, train_part, dev_part, tmp_path):
    data = train_part.results, train_part.qrels, dev_part.results, dev_part.qrels
    fitter = Contrastive(
        n_negatives=3, learning_rate=2e-2, max_steps=8, batch_size=8, eval_every=2, loss=interruptible_lce
    )
    whole = new(backbone).fit(*data, fitter=fitter)
    best = pt.Evaluate(whole(dev_part.results), dev_part.qrels, ["ndcg_cut_10"])["ndcg_cut_10"]
    assert best == pytest.approx(whole.history["nDCG@10"].max())
    with interrupted_at(5), pytest.raises(KeyboardInterrupt):
        new(backbone).fit(*data, fitter=fitter, checkpoint_dir=tmp_path / "ck")
    resumed = new(backbone).fit(*data, fitter=fitter, checkpoint_dir=tmp_path / "ck")
    assert resumed.fingerprint == whole.fingerprint


def test_sequences_continue_with_the_adapter(backbone, train_part, tmp_path):
    teacher = train_part.results[["qid", "docno"]].assign(score=train_part.results["quality"].astype(float))
    stages = {
        "CL": Stage(Contrastive(**BRIEF), train_part.results, train_part.qrels),
        "KD": Stage(Distillation(teacher=teacher, **BRIEF), train_part.results),
    }
    first, again = (
        fit_sequences(new(backbone), stages, ["CL", "CL-KD"], save_dir=tmp_path, seeds=[1]) for _ in range(2)
    )
    assert first[1]["CL-KD"].fingerprint == again[1]["CL-KD"].fingerprint
    assert len(list(tmp_path.glob("CL*"))) == 2
    assert any("lora" in name for name in again[1]["CL-KD"].cross_encoder.network.state_dict())
    assert again[1]["CL-KD"].history["stage"].max() == 2
    sent = pickle.loads(pickle.dumps(again[1]["CL-KD"]))
    assert sent.fingerprint == first[1]["CL-KD"].fingerprint


def test_a_trained_cross_encoder_as_the_backbone(backbone, ce, train_part, tmp_path):
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    ce.save(tmp_path / "ce")
    with_adapter = new(str(tmp_path / "ce"))
    frame = train_part.results.head(16)
    pd.testing.assert_frame_equal(with_adapter(frame), ce(frame), atol=1e-6)  # a new adapter has no effect
    with_adapter.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    with_adapter.save(tmp_path / "adapter", merged=False)
    assert MonoCE.load(tmp_path / "adapter").fingerprint == with_adapter.fingerprint


def test_an_adapter_records_its_backbones_revision(backbone, train_part, tmp_path):
    ce = new(backbone, revision="v1").fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF))
    ce.save(tmp_path / "adapter", merged=False)
    assert MonoCE.load(tmp_path / "adapter").revision == "v1"


def test_an_adapter_is_not_saved_over_its_backbone(backbone, ce, train_part, tmp_path):
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(**BRIEF)).save(tmp_path / "ce")
    with pytest.raises(ValueError, match="another folder than that of the adapter's backbone"):
        new(str(tmp_path / "ce")).save(tmp_path / "ce", merged=False)
    assert MonoCE.load(tmp_path / "ce").fingerprint == ce.fingerprint


def test_an_adapter_for_a_model_in_memory(backbone, test_part):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    ce = MonoCE(network, adapter=LORA, max_length=24, device="cpu", dtype="float32")
    assert any("lora" in name for name in ce.cross_encoder.network.state_dict())


@pytest.mark.parametrize(
    "wrong", ["lora", {"r": 8}, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)]
)
def test_invalid_adapters(backbone, wrong):
    with pytest.raises(ValueError, match=r"adapter must be a peft configuration"):
        MonoCE(backbone, adapter=wrong)


def test_the_error_without_peft_names_the_extra(backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pyterrier-msft\[lora\]"):
        MonoCE(backbone, adapter=LORA)


def test_an_adapter_on_a_model_in_memory_is_saved_merged(backbone, train_part, test_part, tmp_path):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    ce = MonoCE(network, adapter=LORA, max_length=24, dtype="float32", device="cpu")
    stages = {"CL": Stage(CL.replace(**BRIEF), train_part.results, train_part.qrels)}
    for save in (
        lambda: ce.save(tmp_path / "adapter", merged=False),
        lambda: fit_sequences(ce, stages, ["CL"], save_dir=tmp_path / "sequences"),
    ):
        with pytest.raises(ValueError, match="model must be a folder or a name on the hub to save its adapter alone"):
            save()
    assert not (tmp_path / "adapter").exists()
    ce.fit(train_part.results, train_part.qrels, fitter=CL.replace(**BRIEF)).save(tmp_path / "merged")
    loaded = MonoCE.load(tmp_path / "merged", dtype="float32", device="cpu")
    np.testing.assert_allclose(loaded(test_part.results)["score"], ce(test_part.results)["score"], atol=1e-5)


def test_a_second_adapter_is_rejected(trained, tmp_path):
    trained.save(tmp_path / "adapter", merged=False)
    with pytest.raises(ValueError, match=r"adapter must be None for .*, which holds an adapter; got a new one"):
        MonoCE.load(tmp_path / "adapter", adapter=LORA)
