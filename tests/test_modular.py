"""CrossEncoders in the modules of sentence-transformers, such as the Ettin re-rankers."""

import json
import pickle
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from test_models import FAMILIES, write_tokenizer
from transformers import AutoModel, T5Config

from pyterrier_msft import Contrastive, MonoCE
from pyterrier_msft.model import files

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="5.4")

from sentence_transformers import CrossEncoder  # noqa: E402
from sentence_transformers.base.modules import Normalize  # noqa: E402
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    CNN,
    Dense,
    Dropout,
    LayerNorm,
    Pooling,
    Transformer,
)

BRIEF = Contrastive(max_steps=2, learning_rate=1e-2, batch_size=8)


def scores_layer(width: int = 16) -> Dense:
    return Dense(width, 1, activation_function=torch.nn.Identity(), module_output_name="scores")


HEADS = {
    "cls": lambda: [Pooling(16, "cls"), Dense(16, 16, activation_function=torch.nn.GELU()), LayerNorm(16)],
    "mean": lambda: [Pooling(16, "mean"), Dense(16, 16, bias=False, use_residual=True), Normalize()],
    "lasttoken": lambda: [Pooling(16, "lasttoken"), Dropout(0.5)],
    "several": lambda: [
        Pooling(16, ("max", "mean_sqrt_len_tokens", "weightedmean")), Dense(48, 16, use_residual=True), LayerNorm(16)
    ],
}  # fmt: skip


def write(folder: Path, backbone: str, modules: list) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CrossEncoder(modules=[Transformer(backbone), *modules], device="cpu")
    model.save_pretrained(str(folder))
    return str(folder)


def raw_scores(folder: str | Path, frame, **options) -> np.ndarray:
    model = CrossEncoder(str(folder), device="cpu", **options)
    return model.predict([*zip(frame["query"], frame["text"], strict=True)], activation_fn=torch.nn.Identity())


def new(model: str | Path, **settings) -> MonoCE:
    return MonoCE(model, **{"max_length": 24, "dtype": "float32", "device": "cpu", **settings})


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("modernbert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(FAMILIES["modernbert"]).save_pretrained(folder)
    write_tokenizer(folder, token_types=False)
    return str(folder)


@pytest.fixture(scope="module")
def modular(backbone, tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("modular"), backbone, [*HEADS["cls"](), scores_layer()])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["backbone", "modernbert"])
def test_scores_equal_those_of_sentence_transformers(family, head, tmp_path, train_part, request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = write(tmp_path, request.getfixturevalue(family), [*HEADS[head](), scores_layer()])
    frame = train_part.results.head(40)
    frame = frame.assign(text=[" ".join(text.split()[: 1 + i % 6]) for i, text in enumerate(frame["text"])])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no head is new
        scores = new(folder)(frame)["score"]
    np.testing.assert_allclose(scores, raw_scores(folder, frame, max_length=24), atol=1e-5)
    assert np.ptp(scores) > 1e-3


def test_legacy_pooling(backbone, modular, tmp_path, train_part):
    """Before version 5.4, each mode of pooling had a switch, and the network had no configuration."""
    shutil.copytree(modular, tmp_path / "old")
    old = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
    (tmp_path / "old/1_Pooling/config.json").write_text(json.dumps(old))
    (tmp_path / "old/sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    frame = train_part.results.head(8)
    np.testing.assert_allclose(new(tmp_path / "old")(frame)["score"], raw_scores(tmp_path / "old", frame), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_saving(modular, dtype, train_part, test_part, tmp_path):
    ce = new(modular, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in ce.cross_encoder.network.state_dict().items()}
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=30, learning_rate=1e-2, dropout=0.0))
    changed = {name for name, tensor in ce.cross_encoder.network.state_dict().items() if (tensor != before[name]).any()}
    assert {"head.parts.3.linear.weight", "model.embeddings.word_embeddings.weight"} <= changed
    assert not [name for name in changed if "pooler" in name]  # the head doesn't read it
    assert ce.history["loss"].iloc[-1] < ce.history["loss"].iloc[0]
    ce.save(tmp_path / "model")
    exact = ce.apply_attributes(dtype="float32")
    expected = exact(test_part.results)["score"]
    np.testing.assert_allclose(raw_scores(tmp_path / "model", test_part.results), expected, atol=1e-5)
    # Raw scores without an argument too.
    pairs = [*zip(test_part.results["query"], test_part.results["text"], strict=True)]
    np.testing.assert_allclose(CrossEncoder(str(tmp_path / "model"), device="cpu").predict(pairs), expected, atol=1e-5)
    for loaded in (new(tmp_path / "model"), MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")):
        assert loaded.fingerprint == ce.fingerprint
        np.testing.assert_array_equal(loaded(test_part.results)["score"], expected)
    card = (tmp_path / "model/README.md").read_text()
    assert "CrossEncoder" in card
    assert "AutoModelForSequenceClassification" not in card
    loaded.fit(train_part.results, train_part.qrels, fitter=BRIEF)  # in a second stage
    assert len(loaded.stages) == 2


def test_saving_over_another_model(backbone, modular, ce, tmp_path, train_part):
    """No folder of the old model stays, and none that isn't a model's is touched."""
    write(tmp_path, backbone, [*HEADS["several"](), Dropout(), scores_layer()])
    (tmp_path / "2_notes").mkdir()
    (tmp_path / "7_Dense").mkdir()
    (tmp_path / "7_Dense/config.json").write_text("of the user")
    assert (tmp_path / "5_Dense").is_dir()
    scores = new(modular)(train_part.results.head(8))["score"]
    new(modular).save(tmp_path)
    np.testing.assert_allclose(raw_scores(tmp_path, train_part.results.head(8)), scores, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "1_Pooling", "2_Dense", "3_LayerNorm", "4_Dense", "2_notes", "7_Dense",
    }  # fmt: skip
    (tmp_path / "4_Dense/notes.txt").touch()
    with pytest.raises(ValueError, match="path must have no files of your own in '4_Dense'; got"):
        new(modular).save(tmp_path)
    ce.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"2_notes", "4_Dense", "7_Dense"}
    assert [path.name for path in (tmp_path / "4_Dense").iterdir()] == ["notes.txt"]
    assert (tmp_path / "7_Dense/config.json").read_text() == "of the user"
    assert not (tmp_path / "modules.json").exists()
    assert MonoCE.load(tmp_path).fingerprint == ce.fingerprint


def test_copies_and_pickles(modular, train_part):
    frame = train_part.results.head(16)
    ce = new(modular)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    expected = ce(frame)["score"]
    np.testing.assert_array_equal(ce.clone()(frame)["score"], expected)
    sent = pickle.loads(pickle.dumps(ce))
    assert sent.fingerprint == ce.fingerprint
    np.testing.assert_array_equal(sent(frame)["score"], expected)
    assert pickle.loads(pickle.dumps(new(modular))).fingerprint == new(modular).fingerprint


def test_checkpoints(modular, train_part, tmp_path):
    from interruptions import interrupted_at, interruptible_lce

    fitter = Contrastive(max_steps=6, batch_size=8, eval_every=2, loss=interruptible_lce)
    data = train_part.results, train_part.qrels
    whole = new(modular).fit(*data, fitter=fitter)
    with interrupted_at(5), pytest.raises(KeyboardInterrupt):
        new(modular).fit(*data, fitter=fitter, checkpoint_dir=tmp_path)
    assert new(modular).fit(*data, fitter=fitter, checkpoint_dir=tmp_path).fingerprint == whole.fingerprint


def test_lora(modular, train_part, tmp_path):
    peft = pytest.importorskip("peft")
    ce = new(modular, adapter=peft.LoraConfig(r=4, target_modules=["query", "value"]))
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    trained = {name for name, p in ce.cross_encoder.network.named_parameters() if p.requires_grad}
    assert all("lora" in name or name.startswith("head.modules_to_save") for name in trained)
    frame = train_part.results.head(16)
    ce.save(tmp_path / "adapter", merged=False)
    loaded = MonoCE.load(tmp_path / "adapter", dtype="float32", device="cpu")
    assert loaded.fingerprint == ce.fingerprint
    assert "AutoPeftModel" not in (tmp_path / "adapter/README.md").read_text()
    ce.save(tmp_path / "merged")
    np.testing.assert_allclose(raw_scores(tmp_path / "merged", frame), ce(frame)["score"], atol=1e-5)


def test_the_hub(modular, train_part, tmp_path, monkeypatch):
    """Files are read from the hub's cache, in the revision that is asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--user--modular"
    for revision in ("main", "other"):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(revision * 10)
        shutil.copytree(modular, repo / "snapshots" / (revision * 10))
    shutil.rmtree(repo / "snapshots" / ("main" * 10) / "4_Dense")
    frame = train_part.results.head(8)
    found = new("user/modular", revision="other")(frame)["score"]
    np.testing.assert_array_equal(found, new(modular)(frame)["score"])
    message = "got 'user/modular' without 4_Dense/config.json in the hub's cache, and no connection. Download all of it"
    with pytest.raises(ValueError, match=message):
        new("user/modular").fingerprint  # noqa: B018 loads the model
    # Without a connection, a file that isn't in the cache may exist.
    monkeypatch.setattr(files, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
    (repo / "snapshots" / ("main" * 10) / "modules.json").unlink()
    with pytest.raises(ValueError, match="Without a connection to the hub, give MonoCE a folder"):
        new("user/modular").fingerprint  # noqa: B018 loads the model
    known = repo / ".no_exist" / ("main" * 10) / "modules.json"
    known.parent.mkdir(parents=True)
    known.touch()
    with pytest.raises(ValueError, match=r"got 'user/modular' without modules.json. Copy"):  # its other files need it
        new("user/modular").fingerprint  # noqa: B018 loads the model
    (repo / "snapshots" / ("main" * 10) / "config_sentence_transformers.json").unlink()
    assert new("user/modular").cross_encoder.head_is_new


def configure(folder: Path, file: str, **values) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


def test_the_head_is_part_of_the_fingerprint(modular, tmp_path):
    fingerprints = {new(modular).fingerprint}
    for file, values in (
        ("1_Pooling/config.json", {"pooling_mode": "mean"}),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.ReLU"}),
    ):
        shutil.copytree(modular, tmp_path / file[0])
        configure(tmp_path / file[0], file, **values)
        fingerprints.add(new(tmp_path / file[0]).fingerprint)
    assert len(fingerprints) == 3


def test_a_saved_model_has_one_limit(modular, tmp_path, train_part):
    """sentence-transformers would prefer those of the original to that of the tokenizer."""
    shutil.copytree(modular, tmp_path / "model")
    limits = {name: {"max_length": 8} for name in ("text", "common", "chat_template")}
    configure(tmp_path / "model", "sentence_bert_config.json", max_seq_length=8, processing_kwargs=limits)
    ce = new(tmp_path / "model")
    ce.save(tmp_path / "saved")
    frame = train_part.results.head(8)
    np.testing.assert_allclose(raw_scores(tmp_path / "saved", frame), ce(frame)["score"], atol=1e-5)


def test_a_single_module(backbone, tmp_path, train_part):
    """Its files may change the texts, too."""
    CrossEncoder(backbone, num_labels=1, device="cpu").save_pretrained(str(tmp_path))
    frame = train_part.results.head(8)
    np.testing.assert_allclose(new(tmp_path)(frame)["score"], raw_scores(tmp_path, frame), atol=1e-5)
    for file, values, message in (
        ("sentence_bert_config.json", {"do_lower_case": True}, "sets do_lower_case to True"),
        (
            "config_sentence_transformers.json", {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
            "puts the prompt 'query: ' before queries",
        ),
    ):  # fmt: skip
        before = (tmp_path / file).read_text()
        configure(tmp_path, file, **values)
        with pytest.raises(ValueError, match=message):
            new(tmp_path).fingerprint  # noqa: B018 loads the model
        (tmp_path / file).write_text(before)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("4_Dense/config.json", {"out_features": 2}, "Error.* in loading state_dict for Dense"),
        ("4_Dense/config.json", {"module_output_name": "logits"}, "a chain from token_embeddings through Pooling to"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "unknown activation function os.system"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.init.zeros_"}, "unknown activation function torch"),
        ("1_Pooling/config.json", {"pooling_mode": "first"}, "unknown pooling mode 'first'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "sets transformer_task to 'fill-mask'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Bilinear"}, "missing 3 required positional argum"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "sets do_lower_case to True"),
        ("sentence_bert_config.json", {"tokenizer_args": {"use_fast": False}}, "sets tokenizer_args to {'use_fast'"),
        (
            "sentence_bert_config.json", {"processing_kwargs": {"text": {"add_special_tokens": False}}},
            "sets processing_kwargs to {'text'",
        ),
        (
            "config_sentence_transformers.json", {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
            "puts the prompt 'query: ' before queries",
        ),
    ],
)  # fmt: skip
def test_unsupported_configurations(modular, tmp_path, file, values, message):
    shutil.copytree(modular, tmp_path / "model")
    configure(tmp_path / "model", file, **values)
    with pytest.raises(
        ValueError, match=f"must be loadable as a sentence-transformers CrossEncoder; got .*({message})"
    ):
        new(tmp_path / "model").fingerprint  # noqa: B018 loads the model


def test_unsupported_modules(backbone, modular, tmp_path):
    write(tmp_path / "cnn", backbone, [CNN(16, 8, kernel_sizes=[1]), Pooling(8), scores_layer(8)])
    with pytest.raises(ValueError, match="its module CNN isn't one of Pooling, Dense"):
        new(tmp_path / "cnn").fingerprint  # noqa: B018 loads the model
    write(tmp_path / "two", backbone, [Pooling(16), Dense(16, 2, module_output_name="scores")])
    with pytest.raises(ValueError, match="its last module must give one score, not 2"):
        new(tmp_path / "two").fingerprint  # noqa: B018 loads the model
    match = "template isn't supported for a CrossEncoder in modules"
    with pytest.raises(ValueError, match=match + "; got .*: Transformer, Pooling, Dense"):
        new(modular, template="{query} {text}").fingerprint  # noqa: B018 loads the model
    with pytest.raises(ValueError, match=match):
        new(new(modular).cross_encoder.network, template="{query} {text}")
    for i, message in ((0, "its first module must be Transformer, not code.Dense"), (2, "module code.Dense isn't one")):
        shutil.copytree(modular, tmp_path / f"foreign{i}")
        modules = json.loads((tmp_path / f"foreign{i}/modules.json").read_text())
        modules[i]["type"] = "code.Dense"
        (tmp_path / f"foreign{i}/modules.json").write_text(json.dumps(modules))
        with pytest.raises(ValueError, match=message):
            new(tmp_path / f"foreign{i}").fingerprint  # noqa: B018 loads the model
    shutil.copytree(modular, tmp_path / "t5")
    T5Config(num_layers=1, d_model=16, vocab_size=105, architectures=["T5Model"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"model must be an encoder or a decoder; got .*, which is both"):
        new(tmp_path / "t5").fingerprint  # noqa: B018 loads the model
    shutil.copytree(modular, tmp_path / "model")
    (tmp_path / "model/2_Dense/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"all its files; got .* without 2_Dense/model.safetensors. Copy the model"):
        new(tmp_path / "model").fingerprint  # noqa: B018 loads the model
