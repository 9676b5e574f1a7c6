"""Which models are loaded, and what loading leaves as it was."""

import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models
import torch
import transformers
from conftest import run_together
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_msft import MonoCE
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import load_model, quiet_transformers
from pyterrier_msft.model.scoring import core_pool

# ---- models of sentence-transformers


def test_a_bi_encoder_is_a_backbone(backbone, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentence_transformers.SentenceTransformer(backbone, device="cpu").save_pretrained(str(tmp_path / "new"))
    # Older versions didn't save the kind of model.
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "config_sentence_transformers.json").write_text('{"__version__": {}}')
    for name in ("new", "old"):
        assert (tmp_path / name / "modules.json").is_file()
        assert MonoCE(tmp_path / name).cross_encoder.head_is_new


# ---- missing weights


def test_a_classifier_without_its_pooler_has_a_new_head(backbone, tmp_path, train_part):
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    assert not MonoCE(tmp_path).cross_encoder.head_is_new
    weights = load_file(tmp_path / "model.safetensors")
    removed = [weights.pop(name) for name in [*weights] if "pooler" in name]
    assert removed
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="gives random scores"):
        MonoCE(tmp_path, max_length=24, device="cpu")(train_part.results.head(8))


# ---- models that are only half there


@pytest.fixture
def put(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Put a model into the hub's cache, except for some files, as if an earlier download had left them out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def copy(folder: Path, *, without: Collection[str] = (), complete: bool = False, name: str = "user/model") -> Path:
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.rmtree(repo, ignore_errors=True)
        snapshot = repo / "snapshots" / "commit"
        shutil.copytree(folder, snapshot)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("commit")
        if complete:  # by `hf download`
            (snapshot / ".gitattributes").touch()
        for file in without:
            os.remove(snapshot / file)
        return snapshot

    return copy


@pytest.fixture(scope="module")
def modular(backbone, tmp_path_factory) -> Path:
    pytest.importorskip("sentence_transformers", minversion="5.4")
    folder = tmp_path_factory.mktemp("modular")
    tiny_models.write_modular(folder, backbone)
    return folder


IN_MODULES = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]


@pytest.mark.parametrize(
    "left_out",
    [
        ["4_Dense/model.safetensors"],
        ["2_Dense/config.json", "4_Dense/model.safetensors"],
        ["modules.json"],
        ["config_sentence_transformers.json"],
        ["sentence_bert_config.json"],
        IN_MODULES,
        ["tokenizer.json"],
    ],
    ids=", ".join,
)
def test_a_head_in_modules_that_is_half_in_the_cache(modular, put, left_out):
    put(modular, without=left_out)
    missing = ", ".join(left_out[:1] if left_out is IN_MODULES else left_out)
    message = f"model must have all its files; got 'user/model' without {missing} in the hub's cache, and no connection"
    with pytest.raises(ValueError, match=f"{message}. Download all of it while connected: hf download user/model"):
        MonoCE("user/model", device="cpu").cross_encoder.network  # noqa: B018 loads the model


def test_a_head_in_modules_that_was_damaged_in_the_cache(modular, put):
    put(modular, complete=True)
    assert not MonoCE("user/model", device="cpu").cross_encoder.head_is_new
    put(modular, without=["4_Dense/model.safetensors"], complete=True)
    with pytest.raises(ValueError, match=r"got 'user/model' without 4_Dense/model.safetensors. Copy the model again"):
        MonoCE("user/model", device="cpu").cross_encoder.network  # noqa: B018 loads the model


def test_a_backbone_that_is_half_in_the_cache(backbone, put, tmp_path):
    """Only the hub knows whether a model without a head has one in modules."""
    snapshot = put(backbone)
    with pytest.raises(ValueError, match=r"without modules.json in the hub's .*, or give MonoCE the folder of a back"):
        MonoCE("user/model", device="cpu").cross_encoder.network  # noqa: B018 loads the model
    assert MonoCE(snapshot, device="cpu").cross_encoder.head_is_new
    for known in (lambda: put(backbone, complete=True), lambda: no_modules(put(backbone))):
        known()
        assert MonoCE("user/model", device="cpu").cross_encoder.head_is_new
    # The files of a backbone with a head for another task, or of a cross-encoder, say what they are.
    for head, is_new in (("ForMaskedLM", True), ("ForSequenceClassification", False)):
        folder = tmp_path / head
        options = {} if is_new else {"num_labels": 1}
        getattr(transformers, f"Bert{head}").from_pretrained(backbone, **options).save_pretrained(folder)
        AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
        put(folder)
        assert MonoCE("user/model", device="cpu").cross_encoder.head_is_new == is_new


def no_modules(snapshot: Path) -> None:
    """Note in the cache that a model has no modules.json, as a look-up while connected does."""
    known = snapshot.parent.parent / ".no_exist" / snapshot.name / "modules.json"
    known.parent.mkdir(parents=True)
    known.touch()


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (["modules.json"], "modules.json .*, or pass template="),
        (["config_sentence_transformers.json"], "config_sentence_transformers.json"),
        (["sentence_bert_config.json"], "sentence_bert_config.json"),
        (["1_LogitScore/config.json"], "1_LogitScore/config.json"),
        (["chat_template.jinja"], "chat_template.jinja"),
    ],
)
def test_a_decoder_that_is_half_in_the_cache(backbone, tmp_path, put, left_out, named):
    tiny_models.write_qwen_reranker(tmp_path / "model", backbone)
    put(tmp_path / "model")
    assert not MonoCE("user/model", device="cpu").cross_encoder.head_is_new
    if left_out == ["modules.json"]:
        left_out = [*left_out, "config_sentence_transformers.json", "sentence_bert_config.json"]
    put(tmp_path / "model", without=left_out)
    with pytest.raises(ValueError, match=f"all its files; got 'user/model' without {named}"):
        MonoCE("user/model", device="cpu").cross_encoder.network  # noqa: B018 loads the model


def test_a_classifier_with_a_chat_template_that_is_half_in_the_cache(backbone, tmp_path, put):
    """Without modules.json, its pairs would be read without the template."""
    tiny_models.write_two_labels(tmp_path, backbone)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    snapshot = put(tmp_path)
    with pytest.raises(ValueError, match=r"without modules.json in the hub's cache.*, or pass template="):
        MonoCE("user/model", relevant=1, device="cpu").cross_encoder.network  # noqa: B018 loads the model
    no_modules(snapshot)
    assert not MonoCE("user/model", relevant=1, device="cpu").cross_encoder.head_is_new


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_half_in_the_cache(backbone, tmp_path, put, missing):
    peft = pytest.importorskip("peft")
    ce = MonoCE(backbone, adapter=peft.LoraConfig(r=2, target_modules=["query"]), max_length=24, device="cpu")
    ce.save(tmp_path / "adapter", merged=False)
    put(tmp_path / "adapter")
    assert MonoCE.load("user/model", device="cpu").fingerprint == ce.fingerprint
    put(tmp_path / "adapter", without=[missing])
    with pytest.raises(ValueError, match=f"all its files; got 'user/model' without {missing} in the hub's cache"):
        MonoCE.load("user/model", device="cpu")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without adapter_model.safetensors. Copy the model again from where it was"):
        MonoCE.load(tmp_path / "adapter", device="cpu")


def test_a_folder_that_is_half_there(modular, tmp_path, ce):
    """A head that was saved trained can't be new, whatever is missing."""
    shutil.copytree(modular, tmp_path / "theirs")
    MonoCE(tmp_path / "theirs", max_length=24, device="cpu").save(tmp_path / "ours")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        (folder / "modules.json").unlink()
        with pytest.raises(ValueError, match=r"without modules.json. Copy the model again from where it was saved"):
            MonoCE(folder, device="cpu").cross_encoder.network  # noqa: B018 loads the model
    (tmp_path / "ours" / "config_sentence_transformers.json").unlink()
    with pytest.raises(ValueError, match="without the weights of its trained head"):
        MonoCE(tmp_path / "ours", device="cpu").cross_encoder.network  # noqa: B018 loads the model
    ce.save(tmp_path / "new")  # untrained, so its head may be new
    (tmp_path / "new" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"all its files; got .*new' without tokenizer.json"):
        MonoCE(tmp_path / "new", device="cpu").cross_encoder.network  # noqa: B018 loads the model
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="model must have a tokenizer beside it; got a loaded model without one at"):
        MonoCE(network, max_length=24, device="cpu").pair_encoder()


# ---- threads


def overlapping(make_context) -> None:
    """Enter a context in two threads: the second enters before the first exits, and exits last."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with make_context():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(10)
        with make_context():
            second_is_in.set()
            first_is_out.wait(10)

    run_together(first, second)


def test_threads_restore_the_settings_of_transformers():
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()

    def look() -> None:
        with quiet_transformers():
            assert log.get_verbosity() == log.ERROR
            assert not log.is_progress_bar_enabled()

    overlapping(quiet_transformers)
    run_together(look, look)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    log.set_verbosity_info()
    try:
        overlapping(quiet_transformers)
        assert log.get_verbosity() == log.INFO
    finally:
        log.set_verbosity(before[0])


def test_threads_restore_the_number_of_torchs_threads():
    before, found = torch.get_num_threads(), []

    class Pool:
        def __enter__(self) -> None:
            self.pool = core_pool(3)
            self.pool.__enter__().submit(torch.get_num_threads).result()

        def __exit__(self, *_) -> None:
            self.pool.__exit__(None, None, None)

    torch.set_num_threads(6)
    try:
        overlapping(Pool)
        run_together(lambda: found.append(torch.get_num_threads()))
        assert found == [6]
    finally:
        torch.set_num_threads(before)


def test_threads_restore_the_last_layer(backbone):
    model = load_model(backbone, seed=1)[0]
    overlapping(lambda: first_token_only(model))
    assert "forward" not in vars(model.base_model.encoder.layer[-1])


def test_threads_load_the_same_model(backbone, train_part):
    """Neither takes the random numbers of the other, and one re-ranker loads once."""
    expected = [MonoCE(backbone, seed=seed, device="cpu").fingerprint for seed in (1, 2, 3)]
    state = torch.get_rng_state()
    for _ in range(5):
        rerankers = [MonoCE(backbone, seed=seed, device="cpu") for seed in (1, 2, 3)]
        networks: list[object] = []
        run_together(*[lambda ce=ce, found=networks: found.append(ce.cross_encoder.network) for ce in rerankers * 2])
        assert [ce.fingerprint for ce in rerankers] == expected
        assert len({id(network) for network in networks}) == 3
    assert torch.equal(torch.get_rng_state(), state)
