"""Models on the Hugging Face hub, with its local cache and a stand-in for uploads."""

import contextlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_msft import Contrastive, Distillation, MonoCE
from pyterrier_msft.model import hub

FAST = {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 4}


class Hub:
    """Uploads that go straight to the local cache, from where the hub's client loads them."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.created: list[tuple[str, bool | None]] = []

    def create_repo(self, api, repo_id: str, *, private=None, exist_ok=False, **_):
        assert exist_ok
        self.created.append((repo_id, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, api, *, repo_id: str, folder_path, commit_message: str, delete_patterns, **_):
        commit = f"{len(self.created):040x}"
        repo = self.cache / f"models--{repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        shutil.copytree(folder_path, repo / "snapshots" / commit)
        self.message, self.deletes = commit_message, delete_patterns
        url = f"https://huggingface.co/{repo_id}/commit/{commit}"
        return huggingface_hub.CommitInfo(
            commit_url=url, commit_message=commit_message, commit_description="", oid=commit
        )

    def folder(self, repo_id: str) -> Path:
        return next((self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots").iterdir())


@pytest.fixture
def online(tmp_path, monkeypatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        method = getattr(stand_in, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, *a, _m=method, **k: _m(api, *a, **k))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(stand_in.cache))
    return stand_in


@pytest.fixture(scope="module")
def trained(backbone, train_part, dev_part) -> MonoCE:
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    cl = Contrastive(n_negatives=3, **FAST)
    ce.fit(train_part.results, train_part.qrels, dev_part.results, dev_part.qrels, fitter=cl)
    teacher = train_part.results.assign(score=train_part.results["quality"].astype(float))
    kd = Distillation(teacher=teacher, depth=8, **FAST)
    return ce.fit(train_part.results, None, dev_part.results, dev_part.qrels, fitter=kd)


def plain_scores(folder: Path | str, results: pd.DataFrame, **options) -> list[float]:
    """Scores from a folder with transformers only."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            model(**tokenizer(q, t, truncation=True, return_tensors="pt", **options)).logits.item()
            for q, t in zip(results["query"], results["text"], strict=True)
        ]


# ---- uploads, and back


def test_pushed_and_loaded_by_name(trained, online, test_part):
    address = trained.push_to_hub("user/model", private=True, license="mit")
    assert address == f"https://huggingface.co/user/model/commit/{1:040x}"
    assert online.created == [("user/model", True)]
    assert trained.fingerprint in online.message
    assert {path.name for path in online.folder("user/model").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "msft.json", "pt_meta.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    files = ["model-00001-of-00002.safetensors", "adapter_config.json", "vocab.txt", "results.json", "data.safetensors"]
    assert [*filter_repo_objects(files, allow_patterns=online.deletes)] == files[:3]  # of an earlier model

    loaded = MonoCE.load("user/model", dtype="float32", device="cpu")
    assert loaded.max_length == 24
    assert loaded.fingerprint == trained.fingerprint
    pd.testing.assert_frame_equal(loaded(test_part.results), trained(test_part.results), atol=1e-6)
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    assert "'user/model'" in repr(loaded)

    # As a backbone for something new: the weights alone.
    start = MonoCE("user/model", max_length=12, device="cpu")
    assert start.fingerprint == trained.fingerprint
    assert not len(start.history)


def test_a_card_that_was_edited_on_the_hub_is_kept(trained, online):
    def old_card():
        path = (online.cache / "models--user--model" / "snapshots" / f"{len(online.created):040x}") / "README.old.md"
        return path.read_text() if path.exists() else None

    trained.push_to_hub("user/model")
    trained.push_to_hub("user/model")
    assert old_card() is None
    snapshot = online.cache / "models--user--model" / "snapshots" / f"{2:040x}"
    (snapshot / "README.md").write_text("mine")
    trained.push_to_hub("user/model")
    assert old_card() == "mine"


def test_only_modules_of_the_old_model_are_deleted(backbone, trained, online, tmp_path):
    tiny_models.write_qwen_reranker(tmp_path / "decoder", backbone)
    files = ["1_LogitScore/config.json", "1_LogitScore/notes.txt", "2_Dense/config.json"]
    for model, deleted in ((MonoCE(tmp_path / "decoder", device="cpu"), []), (trained, files[:1]), (trained, [])):
        model.push_to_hub("user/model")
        assert [*filter_repo_objects(files, allow_patterns=online.deletes)] == deleted


def test_a_record_cannot_allow_remote_code(trained, online):
    trained.push_to_hub("user/model")
    path = online.folder("user/model") / "msft.json"
    record = json.loads(path.read_text())
    record["settings"] |= {"trust_remote_code": True, "of_a_later_version": 1}
    path.write_text(json.dumps(record))
    loaded = MonoCE.load("user/model")
    assert not loaded.trust_remote_code
    assert loaded.max_length == 24


def test_a_card_accepts_all_fields_of_the_hub(trained, tmp_path):
    trained.save(tmp_path / "model", base_model="google/electra-base-discriminator", library_name="pyterrier")
    data = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (data.base_model, data.library_name) == ("google/electra-base-discriminator", "pyterrier")


def test_only_rank_0_publishes(trained, online, monkeypatch):
    monkeypatch.setattr("pyterrier_msft.training.distributed.rank", lambda: 1)
    assert trained.push_to_hub("user/model") == "https://huggingface.co/user/model"
    assert online.created == []


def test_a_revision(trained, online, ce):
    trained.push_to_hub("user/model")
    first = f"{1:040x}"
    ce.push_to_hub("user/model")
    assert MonoCE.load("user/model").fingerprint == ce.fingerprint
    for old in (MonoCE.load("user/model", revision=first), MonoCE("user/model", max_length=24, revision=first)):
        assert old.fingerprint == trained.fingerprint


def test_the_card_names_the_published_backbone(trained, online, tmp_path, train_part):
    trained.push_to_hub("user/first")
    second = MonoCE("user/first", max_length=24, device="cpu")
    second.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=1))
    second.save(tmp_path / "second")
    assert ModelCard.load(tmp_path / "second" / "README.md").data.base_model == "user/first"
    again = MonoCE.load(tmp_path / "second")
    again.save(tmp_path / "third")
    assert ModelCard.load(tmp_path / "third" / "README.md").data.base_model == "user/first"


@pytest.mark.parametrize("load", [MonoCE.load, lambda name: MonoCE(name).fingerprint])
def test_a_missing_name(online, load):
    with pytest.raises(ValueError, match=r"on the Hugging Face hub; got 'user/nothing'"):
        load("user/nothing")


# ---- the card


def test_the_card_shows_the_record(trained, tmp_path):
    table = pd.DataFrame({"name": ["BM25", "a|b"], "nDCG@10": [0.25, 0.5], "p": [np.nan, 0.01]})
    trained.save(tmp_path / "my-model", license="apache-2.0", metrics=table, language="en", tags=["code"])
    loaded = ModelCard.load(tmp_path / "my-model" / "README.md")
    data = loaded.data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "text-ranking"
    assert {"cross-encoder", "code"} <= set(data.tags)
    assert data.base_model is None  # a local folder means nothing to others
    (result,) = data.eval_results
    assert (result.metric_name, result.dataset_name) == ("nDCG@10", "validation queries")
    second = trained.history[trained.history["stage"] == 2]
    assert result.metric_value == pytest.approx(second["nDCG@10"].max(), abs=1e-4)

    text = loaded.text
    assert "| 1 | Contrastive | localized_contrastive | 64 | 512 | 4 | 42 |" in text
    assert "| 2 | Distillation | ranknet | 64 | 512 | 4 | 42 |" in text
    assert repr(Contrastive(n_negatives=3, **FAST)) in text
    assert "| BM25 | 0.2500 |  |\n| a\\|b | 0.5000 | 0.0100 |" in text
    assert f"| nDCG@10 | {result.metric_value:.4f} |" in text
    assert f"torch {torch.__version__}" in text
    assert trained.fingerprint in text
    assert 'MonoCE.load("my-model")' in text
    assert "max_length=24" in text


def test_the_code_in_the_card_runs(trained, tmp_path, monkeypatch, test_part):
    pytest.importorskip("sentence_transformers")
    trained.save(tmp_path / "model")
    blocks = (tmp_path / "model" / "README.md").read_text().split("```python\n")[1:4]
    row = test_part.results.iloc[0]
    given = {
        "query": row["query"],
        "document": row["text"],
        "first_stage": pt.Transformer.from_df(test_part.results.head(1)),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyterrier_msft.model.precision._has_bfloat16", lambda device: False)  # for equal scores
    found = []
    for block in blocks:
        names = dict(given)
        exec(block.partition("```")[0], names)
        if "pipeline" in names:
            found.append(names["pipeline"](test_part.results.head(1)[["qid", "query"]])["score"].item())
        else:
            found.append(float(np.ravel(names["scores" if "scores" in names else "score"])[0]))
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)


def test_a_card_of_an_untrained_model(ce, tmp_path):
    ce.save(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "None with pyterrier_msft" in card.text
    assert "Evaluation" not in card.text


# ---- other libraries


def test_sentence_transformers_gives_equal_scores(trained, test_part, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    trained.save(tmp_path / "model")
    frame = test_part.results.head(40)
    long = frame.assign(text=frame["text"] + " w1 w2 w3" * 20)  # cut at the same token
    other = sentence_transformers.CrossEncoder(str(tmp_path / "model"), device="cpu")
    for results in (frame, long):
        expected = other.predict([*zip(results["query"], results["text"], strict=True)])
        np.testing.assert_allclose(trained(results)["score"], expected, atol=1e-5)
    np.testing.assert_allclose(trained(long)["score"], plain_scores(tmp_path / "model", long), atol=1e-5)


def test_a_saved_model_can_be_loaded_with_a_larger_length(trained, tmp_path):
    trained.save(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 24
    assert MonoCE.load(tmp_path / "model", max_length=64).pair_encoder().max_length == 64


def test_models_of_sentence_transformers_keep_their_scores(backbone, test_part, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.CrossEncoder(backbone, num_labels=1, max_length=24, device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))  # modules.json, a sigmoid, and 24 as the tokenizer's length
    frame = test_part.results.head(20)
    ours = MonoCE(tmp_path / "theirs", max_length=48, dtype="float32", device="cpu")
    raw = theirs.predict([*zip(frame["query"], frame["text"], strict=True)], activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(ours(frame)["score"], raw, atol=1e-5)
    ours.save(tmp_path / "ours")
    again = sentence_transformers.CrossEncoder(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(again.predict([*zip(frame["query"], frame["text"], strict=True)]), raw, atol=1e-5)


def test_pyterriers_artifacts(trained, online, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    trained.push_to_hub("user/model")
    found = pt.Artifact.from_url("hf-model:user/model")
    assert isinstance(found, MonoCE)
    assert found.fingerprint == trained.fingerprint
    assert pt.Artifact.from_url(f"hf-model:user/model@{1:040x}").fingerprint == trained.fingerprint


def test_artifacts_in_dataset_repositories(trained, tmp_path, monkeypatch, capfd):
    """`pt.Artifact(folder).to_hf(name)`, and `pt.Artifact.from_hf(name)` elsewhere."""
    monkeypatch.setattr(pt.io, "pyterrier_home", lambda: str(tmp_path / "home"))
    uploaded = tmp_path / "uploaded"
    for name in ("create_repo", "create_branch"):
        monkeypatch.setattr(huggingface_hub, name, lambda *a, **k: None)
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda folder_path, **_: shutil.copytree(folder_path, uploaded)
    )
    trained.save(tmp_path / "model")
    pt.Artifact(tmp_path / "model").to_hf("user/model")
    shutil.rmtree(tmp_path / "model")

    @contextlib.contextmanager
    def download(url, **_):
        assert url.startswith("https://huggingface.co/datasets/user/model/resolve/main/artifact.tar.lz4")
        with (uploaded / url.rpartition("/")[2]).open("rb") as file:
            yield file

    monkeypatch.setattr(pt.io, "download_stream", download)
    found = pt.Artifact.from_hf("user/model")
    assert isinstance(found, MonoCE)
    assert found.fingerprint == trained.fingerprint


def test_fetch_downloads_all_files_of_a_model(online, trained):
    trained.push_to_hub("user/model")
    assert json.loads((hub.fetch("user/model") / "pt_meta.json").read_text())["type"] == "cross_encoder"
