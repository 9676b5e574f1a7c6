"""Which models are loaded, and what loading leaves as it was."""

import shutil
import threading

import pytest
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
