import json
import pickle
import shutil
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import make_part
from scipy.optimize import isotonic_regression, minimize

from pyterrier_msft import Contrastive, MonoCE, plots
from pyterrier_msft.calibration import Calibration

pytest.importorskip("sklearn")
mpl.use("Agg")
import matplotlib.pyplot as plt

CL = Contrastive(n_negatives=3, learning_rate=2e-2, max_steps=8, batch_size=8, dropout=0.0, warmup=0)
pytestmark = pytest.mark.usefixtures("fast_garbage_collection")


@pytest.fixture(scope="module")
def held_out():
    part = make_part("ca", n_queries=40, seed=5)
    return part.results, part.qrels


@pytest.fixture(scope="module")
def trained(backbone, train_part) -> MonoCE:
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    return ce.fit(train_part.results, train_part.qrels, fitter=CL)


@pytest.fixture
def ce(trained) -> MonoCE:
    return trained.clone()


def labels_of(results, qrels):
    return pd.MultiIndex.from_frame(results[["qid", "docno"]]).isin(pd.MultiIndex.from_frame(qrels[["qid", "docno"]]))


def platt(scores, relevant):
    """Maximize the likelihood of Platt's targets, with a general-purpose optimizer."""
    n = relevant.sum()
    targets = np.where(relevant, (n + 1) / (n + 2), 1 / ((~relevant).sum() + 2))

    def loss(parameters):
        z = parameters[0] * scores + parameters[1]
        return np.sum(np.logaddexp(0, z) - targets * z)

    slope, intercept = minimize(loss, [0.0, 0.0], tol=1e-10).x
    return 1 / (1 + np.exp(-(slope * scores + intercept)))


def isotonic(scores, relevant):
    """Pool the labels of equal scores, and regress on the distinct scores in order."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, relevant) / counts
    return isotonic_regression(means, weights=counts).x[inverse]


@pytest.mark.parametrize(("method", "expected"), [("logistic", platt), ("isotonic", isotonic)])
def test_probabilities_are_those_of_an_independent_estimate(ce, held_out, method, expected):
    results, qrels = held_out
    before = ce(results)
    assert ce.calibrate(results, qrels, method=method) is ce
    out = ce(results)
    pd.testing.assert_frame_equal(out.drop(columns="probability"), before)
    relevant = labels_of(out, qrels)
    np.testing.assert_allclose(out["probability"], expected(out["score"].to_numpy(), relevant), atol=1e-4)
    # Calibrated on these queries: as many relevant documents as expected, up to Platt's targets.
    assert out["probability"].sum() == pytest.approx(relevant.sum(), abs=1.5)
    assert out["probability"].between(0, 1).all()
    in_order = out.sort_values("score")["probability"]
    assert in_order.is_monotonic_increasing
    assert in_order.iloc[-1] > 3 * in_order.iloc[0]
    counts = (ce.calibration.queries, ce.calibration.documents, ce.calibration.relevant)
    assert counts == (40, 320, 40)
    highest = f"probabilities of up to {out['probability'].max():.2f}"
    assert str(ce.calibration) == f"{method}, from 40 relevant among 320 documents of 40 queries; {highest}"


def test_extreme_scores():
    for calibration in (
        Calibration("logistic", 1, 2, 1, "", {}, slope=2.0, intercept=-1.0),
        Calibration("isotonic", 1, 2, 1, "", {}, scores=[-1.0, 0.0, 2.0], probabilities=[0.0, 0.5, 1.0]),
    ):
        with np.errstate(all="raise"):
            low, middle, high = calibration(np.array([-1e6, 0.5, 1e6]))
        assert (low, high) == (0.0, 1.0)
        assert middle == pytest.approx(0.5 if calibration.method == "logistic" else 0.625)


def test_saved_loaded_copied_and_cached(ce, held_out, tmp_path):
    results = held_out[0]
    ce.calibrate(*held_out, method="isotonic")
    expected = ce(results)
    ce.save(tmp_path / "model")
    loaded = MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")
    assert loaded.calibration == ce.calibration
    assert json.loads((tmp_path / "model" / "msft.json").read_text())["calibration"]["method"] == "isotonic"
    for other in (loaded, ce.clone(), pickle.loads(pickle.dumps(ce)), ce.reseeded(7)):
        pd.testing.assert_frame_equal(other(results), expected, atol=1e-6)
    pytest.importorskip("pyterrier_caching")
    cached = ce.cached(tmp_path / "scores")
    for _ in range(2):
        pd.testing.assert_frame_equal(cached(results), expected, atol=1e-6)
    empty = ce(results.head(0))
    assert list(empty) == list(expected)


def test_other_weights_in_the_folder_have_no_calibration(ce, held_out, tmp_path):
    ce.calibrate(*held_out).save(tmp_path / "model")
    record = json.loads((tmp_path / "model" / "msft.json").read_text())
    record["fingerprint"] = "of other weights"
    (tmp_path / "model" / "msft.json").write_text(json.dumps(record))
    assert MonoCE.load(tmp_path / "model").calibration is None


def test_fit_removes_the_calibration(ce, held_out, train_part):
    results = held_out[0]
    ce.calibrate(*held_out)
    copy, before = ce.clone(), ce.calibration
    with pytest.warns(UserWarning, match="the calibration is removed, as it is for other weights"):
        ce.fit(train_part.results, train_part.qrels, fitter=CL.replace(max_steps=1))
    assert ce.calibration is None
    assert "probability" not in ce(results)
    assert copy.calibration is before
    ce.calibrate(*held_out)
    assert ce.calibration.slope != before.slope


def test_other_settings_are_refused(ce, held_out):
    results = held_out[0]
    ce.calibrate(*held_out)
    ce.max_length = 16
    with pytest.raises(ValueError, match=r"max_length must be 24, as in calibrate; got 16\. Call calibrate again"):
        ce(results)
    ce.calibrate(*held_out)
    assert "probability" in ce(results)
    ce.interpolate = 0.5
    with pytest.raises(ValueError, match=r"interpolate must be 0\.0, as in calibrate; got 0\.5"):
        ce(results)
    ce.calibration = None
    assert "probability" not in ce(results)


def test_interpolated_scores_and_passages(ce, held_out):
    results, qrels = held_out
    ce.interpolate, ce.passages, ce.max_length = 0.3, 2, 12
    ce.calibrate(results, qrels)
    out = ce(results)
    np.testing.assert_allclose(out["probability"], platt(out["score"].to_numpy(), labels_of(out, qrels)), atol=1e-4)


def test_a_record_of_an_earlier_version(ce, held_out, tmp_path):
    """Its fingerprint was calculated in another way, so it says nothing about the weights."""
    expected = ce.calibrate(*held_out)(held_out[0])
    ce.save(tmp_path / "model")
    file = tmp_path / "model" / "msft.json"
    record = json.loads(file.read_text())
    assert record.pop("fingerprint_version") == 2
    record["fingerprint"] = record["calibration"]["fingerprint"] = "0123456789abcdef"
    del record["calibration"]["settings"]["text_field"]
    file.write_text(json.dumps(record))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")
            pd.testing.assert_frame_equal(loaded(held_out[0]), expected, atol=1e-6)
        loaded.save(tmp_path / "model")
    assert json.loads(file.read_text())["fingerprint"] == ce.fingerprint


def test_probabilities_of_another_re_ranker_are_dropped(ce, held_out):
    results, qrels = held_out
    other = ce.clone()
    other.max_length = 20
    expected = other(results)
    out = (ce.calibrate(results, qrels) >> other)(results)
    pd.testing.assert_frame_equal(out, expected)


def test_passages_count_as_their_document(ce, held_out):
    """After max_passage, the probabilities are those of documents."""
    results, qrels = held_out
    words = results["text"].str.split()
    halves = [
        results.assign(docno=results["docno"] + f"%p{k}", text=words.str[3 * k : 3 * k + 3].str.join(" "))
        for k in range(2)
    ]
    passages = pd.concat(halves, ignore_index=True)
    out = pt.text.max_passage()(ce.calibrate(passages, qrels)(passages))
    assert (ce.calibration.documents, ce.calibration.relevant) == (320, 40)
    assert len(out) == 320
    relevant = labels_of(out, qrels)
    np.testing.assert_allclose(out["probability"], platt(out["score"].to_numpy(), relevant), atol=1e-4)


@pytest.mark.filterwarnings("ignore:calibrate left out 10 of 40 queries")
def test_grades_and_unjudged_queries(ce, held_out):
    results, qrels = held_out
    expected = ce.calibrate(results, qrels).calibration
    graded = pd.concat([qrels.assign(label=2), results[["qid", "docno"]].assign(label=1).drop_duplicates()])
    assert ce.calibrate(results, graded, min_relevance=2).calibration.slope == pytest.approx(expected.slope)
    assert ce.calibrate(results, qrels.head(30)).calibration.queries == 30


def test_what_is_refused(ce, backbone, held_out):
    results, qrels = held_out
    new = MonoCE(backbone, max_length=24, device="cpu")
    everything = results[["qid", "docno"]].assign(label=1)
    for reranker, arguments, options, message in [
        (ce, (results, qrels), {"method": "sigmoid"}, "method must be 'logistic' or 'isotonic'; got 'sigmoid'"),
        (ce, (results, None), {}, "qrels are required by calibrate; got None"),
        (ce, (results, qrels), {"min_relevance": 2}, "must have relevant documents and others; got none that is"),
        (ce, (results, everything), {}, "must have relevant documents and others; got only relevant ones"),
        (ce, (results.drop(columns="text"), qrels), {}, "calibration results must have the columns"),
        (new, (results, qrels), {}, "calibrate needs a trained model; got .*, whose head is untrained"),
    ]:
        with pytest.raises(ValueError, match=message):
            reranker.calibrate(*arguments, **options)
        assert reranker.calibration is None


def test_reliability_diagram():
    results = pd.DataFrame({"qid": [1] * 8 + [2], "docno": [*"abcdefgh", "x"]})
    results["probability"] = [0.1, 0.1, 0.1, 0.3, 0.9, 0.9, 1.0, 1.0, 0.5]
    qrels = pd.DataFrame({"qid": ["1"] * 4, "docno": [*"aefg"], "label": [1, 1, 1, 2]})  # query 2 has no label
    ax = plots.reliability(results, qrels, n_bins=5)
    _, dots = ax.lines
    np.testing.assert_allclose(dots.get_xydata(), [[0.1, 1 / 3], [0.3, 0], [0.95, 0.75]])
    assert [text.get_text() for text in ax.texts] == ["3", "1", "4"]
    brier = (0.81 + 0.01 + 0.01 + 0.09 + 0.01 + 0.01 + 0 + 1) / 8
    error = (3 * (1 / 3 - 0.1) + 0.3 + 4 * 0.2) / 8
    assert ax.get_title(loc="left").splitlines() == [
        "8 documents of 1 queries", f"Brier score {brier:.4f}, expected calibration error {error:.4f}",
    ]  # fmt: skip
    (bars,) = ax.collections
    # Wilson's interval of 3 of 4, as in its Wikipedia article's formula.
    z = 1.959964
    expected = (0.75 + z**2 / 8 + np.array([-1, 1]) * z * np.sqrt(0.75 * 0.25 / 4 + z**2 / 64)) / (1 + z**2 / 4)
    np.testing.assert_allclose(bars.get_segments()[2][:, 1], expected, rtol=1e-6)
    spaced = plots.reliability(results, qrels.assign(docno=qrels["docno"] + " "), n_bins=5)  # ids as everywhere else
    assert spaced.get_title(loc="left") == ax.get_title(loc="left")
    with pytest.raises(ValueError, match="results must have each document once per query; got 8 duplicates"):
        plots.reliability(pd.concat([results, results]), qrels)
    with pytest.raises(ValueError, match="probability must be a number in every row; got NaN in 8 of 8"):
        plots.reliability(results.assign(probability=np.nan), qrels)
    with pytest.raises(ValueError, match="min_relevance must be a positive number; got 0"):
        plots.reliability(results, qrels, min_relevance=0)
    with pytest.raises(ValueError, match=r"results must have the columns .*probability"):
        plots.reliability(results.drop(columns="probability"), qrels)
    with pytest.raises(ValueError, match="results must have a relevant document in the qrels; got none"):
        plots.reliability(results, qrels.assign(docno="other"))
    plt.close("all")


def test_other_processes_need_no_sklearn(ce, held_out, monkeypatch, tmp_path):
    ce.calibrate(*held_out).save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    loaded = MonoCE.load(shutil.move(tmp_path / "model", tmp_path / "moved"), dtype="float32", device="cpu")
    assert "probability" in loaded(held_out[0])
    with pytest.raises(ImportError, match=r'needs the extra \[calibrate\]: pip install "pyterrier-msft\[calibrate\]"'):
        loaded.calibrate(*held_out)
