"""Classifiers with several labels, such as monoBERT: the score is the log-odds of the relevant one."""

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_models import SMALL, VOCABULARY, write_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    RobertaConfig,
)

from pyterrier_msft import Contrastive, MonoCE, Stage, fit_sequences

COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 1, "initializer_range": 0.2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 2}
FAMILIES = {
    "bert": BertConfig(**SMALL, **COMMON, max_position_embeddings=64),
    "electra": ElectraConfig(**SMALL, **COMMON, embedding_size=8, max_position_embeddings=64),
    "roberta": RobertaConfig(**SMALL, **COMMON, max_position_embeddings=66, type_vocab_size=1),
    "modernbert": ModernBertConfig(
        **SMALL, **COMMON, **TOKENS, max_position_embeddings=64, cls_token_id=0, sep_token_id=2
    ),
    "deberta": DebertaV2Config(**SMALL, **COMMON, max_position_embeddings=64, type_vocab_size=0),
    "distilbert": DistilBertConfig(
        **COMMON, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=64
    ),
    "mpnet": MPNetConfig(**SMALL, **COMMON, **TOKENS, max_position_embeddings=66),
    "gpt2": GPT2Config(**COMMON, **TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "qwen2": Qwen2Config(**SMALL, **COMMON, **TOKENS, num_key_value_heads=1, max_position_embeddings=64),
}  # fmt: skip
BRIEF = Contrastive(max_steps=2, learning_rate=1e-2, batch_size=8)


def write(folder: Path, family: str = "bert", *, labels: int = 2, names: dict[int, str] | None = None) -> str:
    config = FAMILIES[family]
    config.num_labels = labels
    if names:
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for name, parameter in model.named_parameters():  # new biases are 0
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder, token_types=family in {"bert", "electra"})
    return str(folder)


def logits(folder: str | Path, frame: pd.DataFrame) -> np.ndarray:
    """The logits of plain transformers, one pair at a time, (pairs, labels)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        found = [
            model(**tokenizer(q, t, truncation=True, max_length=24, return_tensors="pt")).logits[0]
            for q, t in zip(frame["query"], frame["text"], strict=True)
        ]
    return torch.stack(found).numpy()


def log_odds(values: np.ndarray, label: int) -> np.ndarray:
    """The log-odds from probabilities, in double precision."""
    values = values.astype(np.float64)
    probability = (np.exp(values) / np.exp(values).sum(axis=1, keepdims=True))[:, label]
    return np.log(probability) - np.log(1 - probability)


def new(model, **settings) -> MonoCE:
    return MonoCE(model, **{"max_length": 24, "dtype": "float32", "device": "cpu", **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_two_labels(family, tmp_path, train_part):
    frame = train_part.results.head(24)
    folder = write(tmp_path / "model", family)
    expected = logits(folder, frame)
    ce = new(folder)
    np.testing.assert_allclose(ce(frame)["score"], expected[:, 1] - expected[:, 0], atol=1e-5)
    assert not ce.cross_encoder.head_is_new
    np.testing.assert_allclose(new(folder, relevant=0)(frame)["score"], expected[:, 0] - expected[:, 1], atol=1e-5)
    before = ce.fingerprint
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    assert ce.fingerprint != before
    # The saved model has one label, so that every library gives the same score.
    ce.save(tmp_path / "saved")
    np.testing.assert_allclose(logits(tmp_path / "saved", frame)[:, 0], ce(frame)["score"], atol=1e-5)


def test_names_of_labels(tmp_path, train_part):
    frame = train_part.results.head(8)
    folder = write(tmp_path / "model", names={0: "relevant", 1: "other"})
    by_name = new(folder, relevant="relevant")
    np.testing.assert_array_equal(by_name(frame)["score"], new(folder, relevant=0)(frame)["score"])
    assert new(folder)(frame)["score"].to_numpy() == pytest.approx(-by_name(frame)["score"].to_numpy())


def test_it_learns(tmp_path, train_part):
    ce = new(write(tmp_path / "model"))
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=30, learning_rate=1e-2, dropout=0.0))
    assert ce.history["loss"].iloc[-1] < 0.8 * ce.history["loss"].iloc[0]


@pytest.mark.parametrize("relevant", [None, 0])
def test_a_saved_model_keeps_its_meaning(relevant, tmp_path, train_part):
    frame = train_part.results.head(16)
    ce = new(write(tmp_path / "model"), relevant=relevant)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    expected = ce(frame)["score"]
    ce.save(tmp_path / "saved")
    for loaded in (MonoCE.load(tmp_path / "saved", dtype="float32", device="cpu"), new(tmp_path / "saved")):
        assert loaded.fingerprint == ce.fingerprint
        np.testing.assert_array_equal(loaded(frame)["score"], expected)
    for copy in (ce.clone(), pickle.loads(pickle.dumps(ce)), pickle.loads(pickle.dumps(ce.clone()))):
        np.testing.assert_array_equal(copy(frame)["score"], expected)
    assert pickle.loads(pickle.dumps(new(tmp_path / "model", relevant=relevant)))(frame)["score"].notna().all()
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder(str(tmp_path / "saved"), device="cpu")
    pairs = [*zip(frame["query"], frame["text"], strict=True)]
    np.testing.assert_allclose(cross_encoder.predict(pairs), expected, atol=1e-5)


def test_sequences_reuse_it(tmp_path, train_part):
    stages = {"CL": Stage(BRIEF, train_part.results, train_part.qrels)}
    ce = new(write(tmp_path / "model"), relevant=0)
    first, again = (fit_sequences(ce, stages, ["CL"], save_dir=tmp_path / "runs")["CL"] for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert pickle.loads(pickle.dumps(again)).fingerprint == first.fingerprint


def test_more_labels(tmp_path, train_part):
    frame = train_part.results.head(16)
    names = {0: "irrelevant", 1: "related", 2: "exact"}
    folder = write(tmp_path / "model", labels=3, names=names)
    scores = {name: new(folder, relevant=name) for name in names.values()}
    for label, ce in enumerate(scores.values()):
        np.testing.assert_allclose(ce(frame)["score"], log_odds(logits(folder, frame), label), atol=1e-5)
    assert len({ce.fingerprint for ce in scores.values()}) == 3
    ce = scores["exact"]
    before = ce.fingerprint
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    assert ce.fingerprint != before
    expected = ce(frame)["score"]
    for copy in (ce.clone(), pickle.loads(pickle.dumps(ce))):
        assert copy.fingerprint == ce.fingerprint
        np.testing.assert_array_equal(copy(frame)["score"], expected)
    # All labels are saved.
    ce.save(tmp_path / "saved")
    np.testing.assert_allclose(log_odds(logits(tmp_path / "saved", frame), 2), expected, atol=1e-5)
    assert json.loads((tmp_path / "saved/config.json").read_text())["id2label"]["2"] == "exact"
    loaded = MonoCE.load(tmp_path / "saved", dtype="float32", device="cpu")
    assert (loaded.relevant, loaded.fingerprint) == ("exact", ce.fingerprint)
    np.testing.assert_array_equal(loaded(frame)["score"], expected)
    card = (tmp_path / "saved/README.md").read_text()
    assert "log-odds of the label 'exact'" in card
    assert "from transformers" not in card


@pytest.mark.parametrize("labels", [2, 3])
def test_independent_labels(labels, tmp_path, train_part):
    """The log-odds of one of them are its logit, whatever the others are."""
    frame = train_part.results.head(16)
    folder = write(tmp_path / "model", labels=labels)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    ce = new(folder, relevant=1)
    np.testing.assert_allclose(ce(frame)["score"], logits(folder, frame)[:, 1], atol=1e-5)
    ce.save(tmp_path / "saved")
    np.testing.assert_allclose(logits(tmp_path / "saved", frame)[:, 0], ce(frame)["score"], atol=1e-5)


def test_an_adapter(tmp_path, train_part):
    peft = pytest.importorskip("peft")
    frame = train_part.results.head(8)
    for labels in (2, 3):
        folder = write(tmp_path / str(labels), labels=labels)
        ce = new(folder, relevant=0, adapter=peft.LoraConfig(r=4, target_modules=["query", "value"]))
        ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
        ce.save(tmp_path / "adapter", merged=False)
        loaded = MonoCE.load(tmp_path / "adapter", dtype="float32", device="cpu")
        assert loaded.fingerprint == ce.fingerprint
        np.testing.assert_array_equal(loaded(frame)["score"], ce(frame)["score"])
        ce.save(tmp_path / f"merged{labels}")
        loaded = MonoCE.load(tmp_path / f"merged{labels}", dtype="float32", device="cpu")
        np.testing.assert_allclose(loaded(frame)["score"], ce(frame)["score"], atol=1e-5)


def test_a_model_in_memory_is_not_changed(tmp_path, train_part):
    frame = train_part.results.head(8)
    folder = write(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ce = new(model)
    np.testing.assert_array_equal(ce(frame)["score"], new(folder)(frame)["score"])
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    assert model.config.num_labels == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    unnamed = AutoModelForSequenceClassification.from_config(FAMILIES["bert"])  # its configuration has no architecture
    assert new(unnamed).cross_encoder.network.config.num_labels == 1


def test_an_unknown_head_is_refused(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(write(tmp_path))
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 2), torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"must end in a linear layer with 2 rows; got BertForSequenceClassification with 2 of"
    ):
        new(model)
