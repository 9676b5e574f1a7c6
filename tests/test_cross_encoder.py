"""The identity of a cross-encoder, and its warnings."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import transformers
from conftest import WORDS, run_together
from test_models import FAMILIES, PUBLISHED, write_published, write_tokenizer
from tiny_models import decoder_config
from transformers import AutoModelForSequenceClassification, BertConfig

from pyterrier_msft import Contrastive, MonoCE

# ---- the fingerprint


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def published(tmp_path) -> Path:
    write_published(tmp_path / "model", PUBLISHED[0])
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore:.*random scores")
@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 4}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}], ids=str
)
def test_the_fingerprint_follows_what_affects_scores(backbone, test_part, tmp_path, values):
    pytest.importorskip("pyterrier_caching")
    folder, settings = tmp_path / "model", {"max_length": 24, "device": "cpu", "dtype": "float32"}
    MonoCE(backbone).save(folder)
    frame = test_part.results.head(24)
    before = MonoCE(folder, **settings)
    scores = before.cached(tmp_path / "cache")(frame)["score"]
    edit_config(folder, **values)
    after = MonoCE(folder, **settings)
    assert after.fingerprint != before.fingerprint
    assert not np.allclose(after(frame)["score"], scores)
    np.testing.assert_allclose(after.cached(tmp_path / "cache")(frame)["score"], after(frame)["score"], atol=1e-6)


def test_the_fingerprint_ignores_names_and_training(published):
    before = MonoCE(published).fingerprint
    edit_config(
        published, id2label={"0": "relevance"}, label2id={"relevance": 0}, problem_type="regression", use_cache=False,
        transformers_version="4.1.0", torch_dtype="float16", hidden_dropout_prob=0.3, classifier_dropout=0.2,
        _name_or_path="elsewhere/model", sentence_transformers={"version": "4.0.0"}, sep_token_id=2,
    )  # fmt: skip
    assert MonoCE(published).fingerprint == before


@pytest.mark.parametrize("name", [*FAMILIES, *PUBLISHED])
def test_a_saved_model_has_the_same_fingerprint(name, tmp_path, train_part):
    source = tmp_path / "source"
    if name in FAMILIES:
        config = copy.deepcopy(FAMILIES[name])
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(source)
        write_tokenizer(source, token_types=isinstance(config, BertConfig))
    else:
        write_published(source, name)
    ce = MonoCE(source, max_length=24, device="cpu")
    start = ce.fingerprint
    network = AutoModelForSequenceClassification.from_pretrained(source)
    assert MonoCE(network, max_length=24, device="cpu").fingerprint == start
    ce.save(tmp_path / "start")
    assert MonoCE.load(tmp_path / "start").fingerprint == start
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=1, learning_rate=1e-2, dropout=0.2))
    ce.save(tmp_path / "trained")
    assert MonoCE.load(tmp_path / "trained").fingerprint == ce.fingerprint != start
    assert ce.clone().fingerprint == ce.fingerprint


# ---- the tokenizer's part of the fingerprint


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def swap_words(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]


def shuffle_words(content: dict) -> None:
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))


def keep_case(content: dict) -> None:
    content["normalizer"]["lowercase"] = False


def set_call_options(content: dict) -> None:
    """Set what a call of the tokenizer leaves behind, which the next call replaces."""
    content["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}


@pytest.mark.filterwarnings("ignore:.*random scores")
@pytest.mark.parametrize(
    ("file", "edit", "is_other"),
    [
        ("tokenizer.json", swap_words, True),
        ("tokenizer.json", keep_case, True),
        ("tokenizer_config.json", lambda content: content.update(truncation_side="left"), True),
        ("tokenizer.json", shuffle_words, False),
        ("tokenizer.json", set_call_options, False),
        ("tokenizer_config.json", lambda content: content.update(model_max_length=9, chat_template="{{ a }}"), False),
    ],
)
def test_the_fingerprint_follows_the_tokenizer(backbone, tmp_path, file, edit, is_other):
    pytest.importorskip("pyterrier_caching")
    folder, settings = tmp_path / "model", {"max_length": 24, "device": "cpu", "dtype": "float32"}
    MonoCE(backbone, max_length=24).save(folder)
    texts = ["w1 w2 w1 W7", "w5 " + "w6 " * 40 + "w1"]
    frame = pd.DataFrame({"qid": "q", "query": "w1 w3", "docno": ["a", "b"], "text": texts})
    before = MonoCE(folder, **settings)
    scores = before.cached(tmp_path / "cache")(frame)["score"].to_numpy()
    edit_json(folder / file, edit)
    if edit is keep_case:  # in both files
        edit_json(folder / "tokenizer_config.json", lambda content: content.update(do_lower_case=False))
    after = MonoCE(folder, **settings)
    assert (after.fingerprint != before.fingerprint) == is_other
    assert np.allclose(after(frame)["score"], scores) != is_other
    np.testing.assert_allclose(after.cached(tmp_path / "cache")(frame)["score"], after(frame)["score"], atol=1e-6)
    assert after.clone().fingerprint == after.fingerprint  # not changed by use


def test_a_changed_tokenizer_changes_the_fingerprint_at_once(ce):
    before, tokenizer = ce.fingerprint, ce.cross_encoder.tokenizer
    tokenizer.truncation_side = "left"
    changed = ce.fingerprint
    tokenizer.truncation_side = "right"
    assert ce.fingerprint == before != changed


def test_the_fingerprint_of_a_tokenizer_in_python(tmp_path):
    """PhoBERT's, which has a vocabulary and merges."""
    words = [f"w{i}@@" for i in range(9)] + [*"0123456789w", "w1", "w2"]
    (tmp_path / "vocab.txt").write_text("\n".join(f"{word} 1" for word in words))
    (tmp_path / "bpe.codes").write_text("w 1</w> 9\nw 2</w> 8\n")
    tokenizer = transformers.PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
    config = copy.deepcopy(FAMILIES["roberta"])
    config.num_labels = 1
    network = AutoModelForSequenceClassification.from_config(config)
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ce = MonoCE(tmp_path / "model", max_length=24, device="cpu")
    assert not ce.cross_encoder.tokenizer.is_fast
    ce.save(tmp_path / "saved")
    assert MonoCE.load(tmp_path / "saved").fingerprint == ce.fingerprint
    for file, old, new in (("bpe.codes", "w 1</w>", "w 3</w>"), ("vocab.txt", "w1 1\nw2 1", "w2 1\nw1 1")):
        content = (tmp_path / "saved" / file).read_text()
        assert old in content
        (tmp_path / "saved" / file).write_text(content.replace(old, new))
        assert MonoCE.load(tmp_path / "saved").fingerprint != ce.fingerprint
        (tmp_path / "saved" / file).write_text(content)


def test_a_new_padding_token_keeps_its_side(tmp_path):
    """Llama's tokenizer has none, and its class pads on the left."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"w0123456789"])}
    transformers.LlamaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path / "llama")
    config = decoder_config("llama", len(vocabulary))
    config.num_labels, config.pad_token_id = 1, None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "llama")
    ce = MonoCE(tmp_path / "llama", max_length=24, device="cpu")
    ce.save(tmp_path / "saved")
    loaded = MonoCE.load(tmp_path / "saved")
    assert ce.cross_encoder.tokenizer.padding_side == loaded.cross_encoder.tokenizer.padding_side == "right"
    assert loaded.fingerprint == ce.fingerprint


def test_a_model_in_memory_without_a_tokenizer_can_be_printed(tmp_path):
    BertConfig(num_labels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    ce = MonoCE(AutoModelForSequenceClassification.from_config(config), device="cpu")
    assert "fingerprint" not in repr(ce)
    with pytest.raises(ValueError, match="model must have a tokenizer beside it"):
        ce.fingerprint  # noqa: B018 is computed


# ---- truncated queries


def frame_with_query(n: int) -> pd.DataFrame:
    rows = [("a", "w1", "d1", "w2"), ("b", " ".join(WORDS[:n]), "d2", "w2"), ("b", " ".join(WORDS[:n]), "d3", "w3")]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text"])


def test_truncated_queries_are_reported_once(ce):
    assert ce.cross_encoder.head_is_new  # loads the model
    ce.cross_encoder.head_is_new = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ce(frame_with_query(20))  # with [CLS], "w2" and two [SEP] exactly 24
    with pytest.warns(
        UserWarning, match=r"^1 of 2 distinct queries to score are truncated: they exceed max_length=24"
    ) as caught:
        ce(frame_with_query(21))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ce(frame_with_query(21))
        ce.clone()(frame_with_query(21))
    ce.max_query_length = 20
    with pytest.warns(UserWarning, match=r"^1 of 2 distinct .* exceed max_query_length=20"):
        ce(frame_with_query(21))


def test_scores_of_long_queries_are_those_of_sentence_transformers(published, test_part):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    frame = test_part.results.head(24)
    frame = frame.assign(query=frame["query"] + " w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")
    ce = MonoCE(published, max_length=24, dtype="float32", device="cpu")
    other = sentence_transformers.CrossEncoder(str(published), max_length=24, device="cpu")
    expected = other.predict([*zip(frame["query"], frame["text"], strict=True)])
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(ce(frame)["score"], expected, atol=1e-5)


# ---- threads


def test_concurrent_calls_give_the_same_scores(ce, test_part):
    log = transformers.utils.logging
    assert ce.cross_encoder.head_is_new  # loads the model
    ce.cross_encoder.head_is_new = False
    frame, verbosity = test_part.results, log.get_verbosity()
    expected, differences = ce(frame)["score"], []

    def work() -> None:
        differences.extend(np.abs(ce(frame)["score"] - expected).max() for _ in range(5))

    run_together(*[work] * 4)
    assert len(differences) == 20
    assert max(differences) < 1e-5
    assert log.get_verbosity() == verbosity
