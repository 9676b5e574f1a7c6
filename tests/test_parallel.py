"""Re-rankers in other processes: pickled without the weights where these can be loaded again."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from pyterrier_msft import Contrastive, MonoCE

SETTINGS = {"max_length": 24, "dtype": "float32", "device": "cpu"}
FIT = Contrastive(n_negatives=2, learning_rate=1e-2, max_steps=2, batch_size=4)
pytestmark = pytest.mark.filterwarnings("ignore:.*random scores")


@pytest.fixture
def trained(backbone, train_part) -> MonoCE:
    return MonoCE(backbone, **SETTINGS).fit(train_part.results, train_part.qrels, fitter=FIT)


def sent(ce):
    """The re-ranker as another process receives it, and the size of its pickle."""
    content = pickle.dumps(ce)
    return pickle.loads(content), len(content)


def assert_same_scores(a, b, results: pd.DataFrame) -> None:
    np.testing.assert_allclose(a(results)["score"], b(results)["score"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loaded", [False, True])
def test_untouched_weights_are_loaded_by_name(backbone, dev_part, loaded):
    ce = MonoCE(backbone, **SETTINGS, seed=7)
    if loaded:
        ce(dev_part.results.head(1))
    other, size = sent(ce)
    assert size < 2000
    assert other.fingerprint == ce.fingerprint  # the new head too, by its seed
    assert_same_scores(ce, other, dev_part.results)


def test_trained_weights_are_pickled_until_they_are_saved(trained, dev_part, tmp_path, monkeypatch):
    other, size = sent(trained)
    assert size > 20_000
    assert_same_scores(trained, other, dev_part.results)
    monkeypatch.chdir(tmp_path)
    trained.save("model")
    content = pickle.dumps(trained)
    monkeypatch.chdir("/")
    other = pickle.loads(content)
    assert len(content) < 8000
    assert other.fingerprint == trained.fingerprint
    assert not other.cross_encoder.head_is_new
    assert len(other.history) == len(trained.history)
    assert_same_scores(trained, other, dev_part.results)


def test_an_overwritten_folder(trained, train_part, tmp_path):
    trained.save(tmp_path / "model")
    named = pickle.dumps(trained)
    trained.clone().fit(train_part.results, train_part.qrels, fitter=FIT).save(tmp_path / "model")
    other, size = sent(trained)
    assert size > 20_000
    assert other.fingerprint == trained.fingerprint
    late = pickle.loads(named)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"must hold the weights and the tokenizer that were pickled, {trained.fingerprint}"
        ):
            late(train_part.results)


def test_training_continues_in_the_other_process(trained, train_part):
    other, _ = sent(trained)
    for ce in (trained, other):
        ce.fit(train_part.results, train_part.qrels, fitter=FIT)
    assert other.fingerprint == trained.fingerprint
    assert sent(other)[0].fingerprint == other.fingerprint


def test_a_reranker_saved_untrained_is_trained_later(backbone, train_part, tmp_path):
    MonoCE(backbone, **SETTINGS).save(tmp_path / "new")
    ce = MonoCE.load(tmp_path / "new")
    assert ce.cross_encoder.head_is_new
    ce.fit(train_part.results, train_part.qrels, fitter=FIT).save(tmp_path / "trained")
    other, _ = sent(ce)
    assert not other.cross_encoder.head_is_new


def test_a_model_in_memory_is_pickled_with_its_tokenizer(trained, dev_part, tmp_path):
    trained.save(tmp_path / "model")
    network = MonoCE(str(tmp_path / "model"), **SETTINGS).cross_encoder.network
    with torch.no_grad():
        network.classifier.weight.add_(1)
    ce = MonoCE(network, **SETTINGS)
    content = pickle.dumps(ce)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert_same_scores(ce, pickle.loads(content), dev_part.results)


def test_deep_copies_are_clones(trained, train_part):
    other = copy.deepcopy([trained])[0]
    before = trained.fingerprint
    assert other.fingerprint == before
    other.fit(train_part.results, train_part.qrels, fitter=FIT)
    assert trained.fingerprint == before != other.fingerprint


def test_cached_rerankers_are_pickled_too(trained, dev_part, tmp_path):
    pytest.importorskip("pyterrier_caching")
    cached = trained.cached(tmp_path / "cache")
    other, _ = sent(cached)
    assert_same_scores(cached, other, dev_part.results)


def test_parallel_with_joblib(trained, dev_part):
    pytest.importorskip("pyterrier_alpha")
    pytest.importorskip("joblib")
    check_parallel(trained, dev_part.results, "joblib")


def test_parallel_with_ray(trained, dev_part, tmp_path):
    pytest.importorskip("pyterrier_alpha")
    ray = pytest.importorskip("ray")
    trained.save(tmp_path / "model")
    try:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("the machine is too busy for Ray, which must start within half a minute")
    try:
        check_parallel(trained, dev_part.results, "ray")
    finally:
        ray.shutdown()


def check_parallel(ce: MonoCE, results: pd.DataFrame, backend: str) -> None:
    alone = ce(results)
    with pytest.warns(UserWarning, match="experimental"):
        parallel = ce.parallel(2, backend=backend)
    together = parallel(results)
    order = ["qid", "docno"]
    expected, found = (frame.sort_values(order, ignore_index=True) for frame in (alone, together))
    assert_frame_equal(found, expected, rtol=1e-5)
