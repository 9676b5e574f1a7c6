"""CrossEncoders in the modules of sentence-transformers, such as the Ettin re-rankers."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from test_models import FAMILIES, write_tokenizer
from transformers import AutoModel

from pyterrier_msft import Contrastive, MonoCE

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
    assert (tmp_path / "5_Dense").is_dir()
    scores = new(modular)(train_part.results.head(8))["score"]
    new(modular).save(tmp_path)
    np.testing.assert_allclose(raw_scores(tmp_path, train_part.results.head(8)), scores, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "1_Pooling", "2_Dense", "3_LayerNorm", "4_Dense", "2_notes",
    }  # fmt: skip
    ce.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"2_notes"}
    assert not (tmp_path / "modules.json").exists()
    assert MonoCE.load(tmp_path).fingerprint == ce.fingerprint


def test_copies_pickles_and_int8(modular, train_part):
    frame = train_part.results.head(16)
    ce = new(modular)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    expected = ce(frame)["score"]
    np.testing.assert_array_equal(ce.clone()(frame)["score"], expected)
    sent = pickle.loads(pickle.dumps(ce))
    assert sent.fingerprint == ce.fingerprint
    np.testing.assert_array_equal(sent(frame)["score"], expected)
    assert pickle.loads(pickle.dumps(new(modular))).fingerprint == new(modular).fingerprint
    rounded = ce.apply_attributes(dtype="int8")(frame)["score"]
    assert 0 < np.abs(rounded - expected).max() < 0.05


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
    with pytest.raises(ValueError, match="as a sentence-transformers CrossEncoder; got 'user/modular'"):
        new("user/modular").fingerprint  # noqa: B018 loads the model


def configure(folder: Path, file: str, **values) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("4_Dense/config.json", {"out_features": 2}, "Error.* in loading state_dict for Dense"),
        ("4_Dense/config.json", {"module_output_name": "logits"}, "a chain from token_embeddings through Pooling to"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "unknown activation function os.system"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.init.zeros_"}, "unknown activation function torch"),
        ("1_Pooling/config.json", {"pooling_mode": "first"}, "unknown pooling mode 'first'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "sets transformer_task to 'fill-mask'"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "sets do_lower_case to True"),
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
    with pytest.raises(
        ValueError, match=r"template is for a network with its head in itself; got .* in Transformer, Po"
    ):
        new(modular, template="{query} {text}").fingerprint  # noqa: B018 loads the model
    shutil.copytree(modular, tmp_path / "model")
    (tmp_path / "model/2_Dense/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"as a sentence-transformers CrossEncoder; got .*Dense"):
        new(tmp_path / "model").fingerprint  # noqa: B018 loads the model
