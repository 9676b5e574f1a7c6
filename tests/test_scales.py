"""`Distillation(scale=...)`: the teacher's scores become labels, scaled among the documents of a query."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from scipy.stats import zscore

from pyterrier_msft import Distillation, MonoCE, losses
from pyterrier_msft.losses import BinaryCrossEntropy

RESULTS = pd.DataFrame(
    {"qid": ["q1"] * 5 + ["q2"] * 3 + ["q3"] * 2, "query": "a", "docno": list("abcdeabcab"), "rank": range(10)}
).assign(text=lambda frame: "text of " + frame["docno"])
SCORES = [0.9, 0.1, 0.1, 0.4, 0.8, 0.7, 0.25, 0.5, 0.3, 0.3]
TEACHER = RESULTS[["qid", "docno"]].assign(score=SCORES)


def labels(scale, *, results=RESULTS, teacher=TEACHER, loss=losses.mse, **settings):
    """Return the labels of each query's documents."""
    fitter = Distillation(teacher=teacher, loss=loss, scale=scale, **settings)
    groups, _ = fitter.groups(results, None)
    return {
        qid: dict(zip((groups.texts[i].removeprefix("text of ") for i in documents), values.tolist(), strict=True))
        for qid, documents, values in zip(groups.qids, groups.documents, groups.labels, strict=True)
    }


def test_each_query_is_scaled_by_itself():
    # All scores of q3 are equal: there is nothing to learn from it, with or without a scale.
    expected = {"q1": dict(zip("abcde", SCORES[:5], strict=True)), "q2": dict(zip("abc", SCORES[5:8], strict=True))}
    found = labels(None)
    assert list(found) == ["q1", "q2"]
    for qid, scores in expected.items():
        assert found[qid] == pytest.approx(scores)
        values = np.array([*scores.values()])
        assert [*labels("zscore")[qid].values()] == pytest.approx(zscore(values), abs=1e-6)
        assert [*labels("logit")[qid].values()] == pytest.approx(logit(values), abs=1e-5)
        scaled = (values - values.min()) / (values.max() - values.min())
        assert [*labels("minmax")[qid].values()] == pytest.approx(scaled)


def test_only_scored_documents_within_the_depth_count():
    # Of the top 4, c has no score; e, with the second best score, is below.
    teacher = TEACHER.drop(index=2)
    assert labels("minmax", teacher=teacher, depth=4)["q1"] == pytest.approx({"a": 1, "b": 0, "d": 0.3 / 0.8})
    expected = dict(zip("abd", zscore([0.9, 0.1, 0.4]), strict=True))
    assert labels("zscore", teacher=teacher, depth=4)["q1"] == pytest.approx(expected, abs=1e-6)


def test_a_sample_has_the_labels_of_the_whole_list():
    fitter = Distillation(teacher=TEACHER, loss=losses.mse, scale="minmax", n_documents=2, sample="random")
    groups, _ = fitter.groups(RESULTS, None)
    drawn = [groups.draw_all([(0, epoch)], seed=1)[0] for epoch in range(20)]
    assert {len(group.labels) for group in drawn} == {2}
    whole = {f"text of {docno}": label for docno, label in labels("minmax")["q1"].items()}
    seen = {text: float(label) for group in drawn for text, label in zip(group.texts, group.labels, strict=True)}
    assert seen == pytest.approx(whole)


def test_certain_probabilities_have_finite_log_odds():
    teacher = TEACHER.assign(score=[0, 1, 1e-9, 0.5, 1 - 1e-9, *SCORES[5:]])
    found = [*labels("logit", teacher=teacher)["q1"].values()]
    limit = float(logit(1 - 1e-6))
    assert found == pytest.approx([-limit, limit, -limit, 0, limit], rel=1e-6)


@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_scores_of_any_size(factor):
    teacher = TEACHER.assign(score=[factor * score for score in SCORES])
    for scale in ("zscore", "minmax"):
        found = labels(scale, teacher=teacher)
        assert all(found[qid] == pytest.approx(expected, abs=1e-6) for qid, expected in labels(scale).items())


def test_the_results_can_be_the_teacher():
    results = RESULTS.drop(columns="rank").assign(score=SCORES)
    assert labels("minmax", results=results, teacher=None) == labels("minmax")


def test_soft_labels_are_probabilities():
    soft = BinaryCrossEntropy(soft_labels=True)
    assert labels(None, loss=soft) == labels(None)
    logits = TEACHER.assign(score=[10 * score - 5 for score in SCORES])
    with pytest.raises(ValueError, match="between 0 and 1, or scaled with scale='minmax', for this loss; 9 of 10"):
        labels(None, loss=soft, teacher=logits)
    found = labels("minmax", loss=soft, teacher=logits)
    assert all(found[qid] == pytest.approx(expected) for qid, expected in labels("minmax").items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "softmax"}, "scale must be 'zscore', 'minmax' or 'logit'; got 'softmax'"),
        ({"scale": "zscore", "loss": losses.ranknet}, r"scale must be None with losses.ranknet, .*; got 'zscore'. Use"),
        ({"scale": "minmax", "loss": lambda scores, labels, mask: scores.sum()}, r"@losses.needs\('scores'\)"),
        (
            {"scale": "logit", "loss": BinaryCrossEntropy(soft_labels=True)},
            "scale must be None or 'minmax' with losses.BinaryCrossEntropy.*, which needs probabilities; got 'logit'",
        ),
        ({"unranked": "last", "loss": BinaryCrossEntropy(soft_labels=True)}, "unranked must be 'drop' with"),
    ],
)
def test_settings_that_do_not_suit_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**{"loss": losses.mse, **settings})


def test_a_scale_is_part_of_the_settings():
    plain, scaled = (Distillation(loss=losses.mse, scale=scale) for scale in (None, "zscore"))
    assert plain.digest() != scaled.digest()
    assert (plain.readable_settings()["scale"], scaled.readable_settings()["scale"]) == ("None", "'zscore'")
    assert repr(scaled) == "Distillation(loss=losses.mse, scale='zscore')"
    assert eval(repr(scaled)) == scaled


def test_a_student_learns_the_scaled_scores(backbone, train_part):
    results = train_part.results
    teacher = results.assign(score=20 + 0.5 * results["quality"] - results["rank"] / 50)
    fitter = Distillation(
        teacher=teacher, loss=losses.mse, scale="zscore", learning_rate=1e-2, epochs=3, batch_size=8, dropout=0.0
    )
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", seed=1, fitter=fitter)
    ce.fit(results)
    # The variance of z-scores is 1, which is the loss of a student that always answers with their mean of 0.
    first, last = ce.history["loss"].iloc[0], ce.history["loss"].iloc[-4:].mean()
    assert first == pytest.approx(1, abs=0.1)
    assert last < 0.8
