"""Scoring in int8."""

import importlib.util
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, run_together, write_tiny_bert
from test_models import family  # noqa: F401 a fixture
from tiny_models import write_modular
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_msft import Contrastive, MonoCE
from pyterrier_msft.model import quantized

if importlib.util.find_spec("openvino") is None:  # importing it here would turn on its telemetry
    pytest.skip("needs openvino", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*gives random scores")
BRIEF = Contrastive(max_steps=4, batch_size=8, learning_rate=1e-2)


def new(model: str, **settings) -> MonoCE:
    return MonoCE(model, **{"max_length": 64, "dtype": "int8", "device": "cpu", **settings})


def scores(ce: MonoCE, frame: pd.DataFrame) -> np.ndarray:
    return ce(frame)["score"].to_numpy()


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Pairs of 5 to 62 tokens."""
    random = np.random.default_rng(0)
    rows = [(f"q{i}", WORDS[i], f"d{i}", " ".join(random.choice(WORDS, 1 + i % 58))) for i in range(60)]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text"])


def check_close(ce: MonoCE, frame: pd.DataFrame) -> None:
    exact = scores(ce.apply_attributes(dtype="float32"), frame)
    error = scores(ce, frame) - exact
    assert 0 < error.std() < 0.2 * exact.std()


@pytest.mark.parametrize(
    ("architecture", "vnni", "warnings"), [("x86_64", False, 1), ("x86_64", True, 0), ("aarch64", False, 0)]
)
def test_processor_without_vnni(tmp_path, frame, monkeypatch, recwarn, architecture, vnni, warnings):
    processor = {"architecture": architecture, "avx512_vnni": vnni, "avx_vnni": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    quantized._warn_if_slow.cache_clear()
    for name in ("a", "b"):
        new(write_tiny_bert(tmp_path / name))(frame.head(2))
    assert sum("no faster than float32" in str(w.message) for w in recwarn) == warnings


def test_scores_do_not_depend_on_the_batch(family, frame):  # noqa: F811
    ce = new(family)
    check_close(ce, frame)
    expected = scores(ce, frame)
    for ce.batch_size in (1, 3):
        np.testing.assert_allclose(scores(ce, frame), expected, rtol=0, atol=1e-6)
    alone = np.concatenate([scores(ce, frame.iloc[[i]]) for i in range(0, 60, 7)])
    np.testing.assert_allclose(alone, expected[::7], rtol=0, atol=1e-6)


def test_scores_follow_the_weights(backbone, train_part, frame):
    ce = new(backbone)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    same = new(backbone, dtype="float32")
    same.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    assert ce.fingerprint == same.fingerprint  # both trained in float32
    assert ce.scoring_settings() != same.scoring_settings()
    before, copy = scores(ce, frame), ce.clone()
    np.testing.assert_array_equal(scores(pickle.loads(pickle.dumps(ce)), frame), before)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    check_close(ce, frame)
    assert np.abs(scores(ce, frame) - before).max() > 1e-3
    # The copy has the quantized network of the first weights, which mustn't share memory with the trained ones.
    np.testing.assert_array_equal(scores(copy, frame), before)


def test_an_adapter(backbone, train_part, frame):
    peft = pytest.importorskip("peft")
    ce = new(backbone, adapter=peft.LoraConfig(r=4, target_modules=["query", "value"]))
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    check_close(ce, frame)


def test_several_labels(backbone, train_part, frame, tmp_path):
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    check_close(new(str(tmp_path), relevant=2), frame)


def test_a_head_in_modules(backbone, frame, tmp_path):
    pytest.importorskip("sentence_transformers", minversion="5.4")
    write_modular(tmp_path / "modular", backbone)
    check_close(new(str(tmp_path / "modular")), frame)


def test_any_number_of_positions_and_tokens(frame, tmp_path):
    """Pairs are padded to a multiple of 16 tokens, but not beyond the model's positions."""
    ce = new(write_tiny_bert(tmp_path, positions=50), max_length=50)
    check_close(ce, frame)
    assert scores(ce, frame.head(0)).shape == (0,)


def test_threads(backbone, frame):
    expected = scores(new(backbone), frame)
    ce, found = new(backbone), []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_together(*[lambda: found.append(scores(ce, pd.concat([frame] * 4)))] * 2)
    finally:
        torch.set_num_threads(threads)
    for each in found:
        np.testing.assert_allclose(each, np.tile(expected, 4), rtol=0, atol=1e-6)


def test_nothing_is_reported_to_intel(backbone, frame):
    scores(new(backbone), frame.head(2))
    assert "openvino_telemetry" not in sys.modules
