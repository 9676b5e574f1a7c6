import copy
import json
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
import transformers
from ir_measures import RR, nDCG
from pandas.testing import assert_frame_equal
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_grid, fit_sequences, losses
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.record import ModelRecord

BRIEF = Contrastive(n_negatives=2, max_steps=2, batch_size=4, learning_rate=1e-2, warmup=0)

FAST = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 8}
CL = Contrastive(n_negatives=3, **FAST)


@pytest.fixture
def trained(backbone, train_part) -> MonoCE:
    return MonoCE(backbone, max_length=24, dtype="float32", device="cpu").fit(
        train_part.results, train_part.qrels, fitter=CL
    )


@pytest.fixture
def silent(ce) -> MonoCE:
    """An untrained re-ranker that doesn't warn about its new head."""
    ce.fingerprint  # noqa: B018 loads the model
    ce.cross_encoder.head_is_new = False
    return ce


def metric(results: pd.DataFrame, part) -> float:
    return pt.Evaluate(results, part.qrels, [RR @ 10])["RR@10"]


def source(part) -> pt.Transformer:
    """A first stage with a text loader: the part's results for the topics."""
    return pt.Transformer.from_df(part.results)


def topics(part) -> pd.DataFrame:
    return part.results[["qid", "query"]].drop_duplicates()


# ---- transform


def test_equals_plain_hugging_face(trained, test_part, tmp_path):
    trained.save(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        expected = [
            model(**tokenizer(q, t, truncation=True, max_length=24, return_tensors="pt")).logits.item()
            for q, t in zip(test_part.results["query"], test_part.results["text"], strict=True)
        ]
    out = trained(test_part.results)
    np.testing.assert_allclose(out["score"], expected, atol=1e-5)
    wanted = test_part.results.assign(score=expected).drop(columns="rank")
    assert_frame_equal(out, pt.model.add_ranks(wanted)[out.columns], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_order_and_batches_do_not_matter(silent, test_part, batch_size):
    expected = silent(test_part.results)
    silent.batch_size = batch_size
    shuffled = test_part.results.sample(frac=1, random_state=0)
    assert_frame_equal(silent(shuffled).sort_index(), expected, atol=1e-5)


def test_a_loaded_model_in_half_precision_becomes_float32(backbone, test_part):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype=torch.bfloat16)
    ce = MonoCE(network, max_length=24, dtype="float32", device="cpu")
    assert {p.dtype for p in ce.cross_encoder.network.parameters()} == {torch.float32}


def test_scoring_in_threads_restores_the_settings_of_transformers(silent, test_part, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    before = transformers.logging.get_verbosity()
    silent.batch_size = 2
    for _ in range(3):
        silent(test_part.results)
    assert transformers.logging.get_verbosity() == before


def test_other_columns_and_the_input_are_not_changed(silent, test_part):
    frame = test_part.results.assign(extra=[{"x": i} for i in range(len(test_part.results))])
    before = copy.deepcopy(frame)
    out = silent(frame)
    assert_frame_equal(frame, before)
    assert_frame_equal(out.drop(columns=["score", "rank"]), frame.drop(columns=["score", "rank"]))


def test_the_empty_frame_does_not_load_the_model(test_part):
    out = MonoCE("nobody/nothing")(test_part.results.head(0))
    assert [*out.columns] == [c for c in test_part.results.columns if c != "rank"] + ["rank"]
    assert not len(out)


def test_a_frame_after_a_union(silent, test_part):
    frame = pd.concat([test_part.results.head(5), test_part.results.tail(5)]).drop(columns=["score", "rank"])
    frame.index = [0] * 10
    expected = silent(frame.reset_index(drop=True))["score"].tolist()
    assert silent(frame)["score"].tolist() == expected
    assert len(set(expected)) > 5


def test_text_field_and_missing_text(silent, test_part):
    frame = test_part.results.head(3).rename(columns={"text": "body"})
    silent.text_field = "body"
    assert len(silent(frame)) == 3
    frame["body"] = [None, float("nan"), ""]
    # The same pair three times; rows of a matrix product may differ in the last digit.
    assert np.ptp(silent(frame)["score"]) < 1e-6


def test_a_missing_column_is_named(ce, test_part):
    with pytest.raises(pt.validate.InputValidationError, match="text"):
        ce(test_part.results.drop(columns="text"))


class Docs:
    """A text source like a dataset or an index."""

    def __init__(self, part):
        self.texts = part.results.set_index("docno")[["text"]]

    def text_loader(self, fields):
        return pt.apply.generic(lambda frame: frame.merge(self.texts[fields], left_on="docno", right_index=True))


def test_texts_from_a_source(trained, test_part):
    expected = trained(test_part.results)
    trained.text = Docs(test_part)
    out = trained(test_part.results.drop(columns="text"))
    assert_frame_equal(out[expected.columns], expected)
    assert "text" in trained(test_part.results.head(0).drop(columns="text")).columns


def test_an_untrained_head_warns_and_a_trained_one_does_not(ce, trained, test_part):
    with pytest.warns(UserWarning, match="random scores"):
        ce(test_part.results)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(test_part.results)


class TestTransformer(pt.testing.TransformerTestCase):
    @staticmethod
    def get_transformer():
        return MonoCE("nobody/nothing")


def test_inspection_and_drawing(ce, test_part):
    assert pt.inspect.transformer_inputs(ce) == [["qid", "docno", "query", "text"]]
    pipeline = source(test_part) >> ce
    assert "MonoCE" in pt.schematic.draw(pipeline)
    assert not ce.cross_encoder.is_loaded  # drawing loads no model


def test_inspection_is_complete_with_a_text_source_and_with_a_cache(silent, test_part, tmp_path):
    pytest.importorskip("pyterrier_caching")
    with_text = silent.apply_attributes(text=Docs(test_part))
    columns = ["qid", "query", "docno", "text", "score", "rank"]
    needed = {"text": ["qid", "docno", "query"], "none": ["qid", "docno", "query", "text"]}
    found = {"text": with_text, "none": silent, "cached": silent.cached(tmp_path)}
    for name, ce in found.items():
        inputs = needed.get(name, needed["none"])
        assert pt.inspect.transformer_inputs(ce) == [inputs]
        assert sorted(pt.inspect.transformer_outputs(ce, inputs)) == sorted(columns)
        drawn = pt.schematic.transformer_schematic(ce, input_columns=inputs)
        assert drawn["label"] == ("MonoCE (cached)" if name == "cached" else "MonoCE")
        assert (drawn["input_columns"], sorted(drawn["output_columns"])) == (inputs, sorted(columns))
        assert "MonoCE" in pt.schematic.draw(source(test_part) >> ce)


def test_beside_other_plugins_in_one_pipeline(silent, backbone, test_part, tmp_path):
    pyterrier_dr = pytest.importorskip("pyterrier_dr")
    fusion = pytest.importorskip("pyterrier_alpha").fusion
    first = source(test_part)
    bi_encoder = first >> pyterrier_dr.HgfBiEncoder.from_pretrained(backbone, device="cpu")
    systems = {
        "bi-encoder": bi_encoder,
        "ce": first >> silent,
        "cached": first >> silent.cached(tmp_path),
        "chain": bi_encoder % 3 >> silent,
        "fused": fusion.RRFusion(bi_encoder, first >> silent),
        "rest below": (bi_encoder % 3 >> silent) ^ bi_encoder,
    }
    table = pt.Experiment(systems, topics(test_part), test_part.qrels, [RR @ 10]).set_index("name")["RR@10"]
    assert table["ce"] == pytest.approx(table["cached"])
    assert table.between(0, 1).all()
    chain = systems["chain"](topics(test_part))
    assert chain.groupby("qid").size().eq(3).all()
    kept = chain.merge(systems["ce"](topics(test_part)), on=["qid", "docno"], suffixes=("", " alone"))
    np.testing.assert_allclose(kept["score"], kept["score alone"], atol=1e-5)


# ---- fit


def test_fit_in_a_pipeline(ce, train_part, dev_part, test_part):
    before = metric(test_part.results, test_part)
    pipeline = source(train_part) >> ce
    ce.fitter = CL
    pipeline.fit(topics(train_part), train_part.qrels)
    assert metric(ce(test_part.results), test_part) > before + 0.2


def test_fit_in_a_pipeline_with_validation(ce, train_part, dev_part, test_part):
    both = pd.concat([train_part.results, dev_part.results])
    ce.fitter = CL
    (pt.Transformer.from_df(both) >> ce).fit(topics(train_part), train_part.qrels, topics(dev_part), dev_part.qrels)
    assert ce.history["nDCG@10"].max() > metric(dev_part.results, dev_part)
    assert metric(ce(test_part.results), test_part) > metric(test_part.results, test_part) + 0.2


def test_fit_by_distillation(ce, train_part, test_part):
    teacher = train_part.results.assign(score=train_part.results["quality"].astype(float))[["qid", "docno", "score"]]
    assert ce.fit(train_part.results, fitter=Distillation(teacher=teacher, **FAST)) is ce
    assert metric(ce(test_part.results), test_part) > metric(test_part.results, test_part) + 0.2


def test_validation_metric_is_that_of_an_experiment(ce, train_part, dev_part):
    ce.fit(train_part.results, train_part.qrels, dev_part.results, dev_part.qrels, fitter=CL)
    measured = pt.Evaluate(ce(dev_part.results), dev_part.qrels, [nDCG @ 10])["nDCG@10"]
    assert measured == pytest.approx(ce.history["nDCG@10"].max())


def test_fit_behind_sliding_windows_finds_its_positives(ce, train_part):
    sliding = pt.text.sliding(text_attr="text", length=4, stride=4, prepend_attr=None)
    passages = sliding(train_part.results)
    assert passages["docno"].str.contains("%p").all()
    ce.fit(passages, train_part.qrels, fitter=CL)
    assert ce.data_report.groups == 64


def test_an_untrained_head_is_recorded_in_the_folder(ce, train_part, tmp_path):
    ce.save(tmp_path / "untrained")
    folder = str(tmp_path / "untrained")
    for again in (MonoCE(folder, max_length=24, device="cpu"), MonoCE.load(folder, device="cpu")):
        with pytest.warns(UserWarning, match="random scores"):
            again(train_part.results.head(2))
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=2)).save(tmp_path / "trained")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random scores")
        MonoCE.load(tmp_path / "trained", device="cpu")(train_part.results.head(2))


def test_a_folder_in_the_home_directory(ce, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ce.save("~/models/new")
    assert (tmp_path / "models" / "new").is_dir()
    assert MonoCE.load("~/models/new").fingerprint == ce.fingerprint


def test_two_fits_are_two_stages(backbone, train_part):
    def fresh():
        return MonoCE(backbone, max_length=24, dtype="float32", device="cpu")

    kd = Distillation(learning_rate=1e-3, batch_size=8)
    data = train_part.results, train_part.qrels
    once = fresh().fit(*data, fitter=CL)
    start = once.fingerprint
    twice = fresh().fit(*data, fitter=CL).fit(*data, fitter=kd)
    composed = fresh().fit(*data, fitter=CL >> kd)
    assert twice.fingerprint == composed.fingerprint != start
    assert twice.stages[1].start == start
    assert twice.history["stage"].unique().tolist() == [1, 2]
    assert twice.history["fitter"].unique().tolist() == ["Contrastive", "Distillation"]


def test_the_seed_determines_the_weights(backbone, train_part):
    prints = [
        MonoCE(backbone, max_length=24, seed=seed, device="cpu")
        .fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=2, seed=seed))
        .fingerprint
        for seed in (1, 1, 2)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_data_report(ce, train_part):
    orphan = train_part.results.head(8).assign(qid="orphan")
    long = pd.concat([train_part.results, orphan]).assign(text=lambda f: f["text"] + " w1" * 50)
    with pytest.warns(UserWarning, match="Contrastive dropped 1 .*without a relevant document"):
        ce.fit(long, train_part.qrels, fitter=Contrastive(max_steps=1))
    report = ce.data_report
    assert (report.queries, report.groups, report.without_relevant) == (65, 64, 1)
    assert report.truncated_documents == 1.0
    assert report.truncated_queries == 0.0
    assert "100.0% of the documents are truncated" in repr(report)


@pytest.mark.parametrize("passages", [1, 2])
def test_the_rate_of_truncated_documents_is_of_an_even_sample(backbone, passages):
    """Of 600 lists with 8 documents each, the last 4 documents of the last 300 lists are long: a quarter of all."""
    length = np.where((np.arange(4800) // 8 >= 300) & (np.arange(4800) % 8 >= 4), 100, 2)
    results = pd.DataFrame({
        "qid": np.arange(4800) // 8, "query": "w1", "docno": np.arange(4800) % 8, "score": -np.arange(4800.0),
        "text": [" ".join(["w2"] * n) for n in length],
    })  # fmt: skip
    calls = []
    original = PairEncoder.truncation_rates

    def counted(encoder, queries, *args):
        calls.append(len(queries))
        return original(encoder, queries, *args)

    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", passages=passages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairEncoder, "truncation_rates", counted)
        ce.fit(results.astype({"qid": str, "docno": str}), fitter=Distillation(depth=8, max_steps=1, batch_size=1))
    assert ce.data_report.truncated_documents == 0.25
    assert ce.data_report.truncated_queries == 0
    assert "25.0% of the documents are truncated" in repr(ce.data_report)
    assert calls == [1200]  # a sample, rather than all 4800


def test_the_rate_of_truncated_documents_counts_documents_rather_than_queries(ce):
    """One list of 16 short documents, and one of 4 long ones, in one source or in two."""
    rows = [
        (qid, "w1", f"{qid}{i}", text, -i) for qid, text, n in (("a", "w2", 16), ("b", "w2 " * 30, 4)) for i in range(n)
    ]
    results = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score"])
    fitter = Distillation(depth=16, max_steps=1, batch_size=2)
    sources = [(results[results["qid"] == qid], None) for qid in ("a", "b")]
    for data in (results, sources):
        report = ce.clone().fit(data, fitter=fitter).data_report
        assert report.truncated_documents == pytest.approx(4 / 20)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r, q: (r.drop(columns="text"), q), r"Put dataset\.text_loader\(\) before MonoCE"),
        (lambda r, q: (r.drop(columns="docno"), q), "training results must have the columns"),
        (lambda r, q: (r, None), "Distillation"),
        (lambda r, q: (r.head(0), q), "the results are empty"),
        (lambda r, q: ({1: 2}, q), "training results must be a data frame or a run's path; got dict"),
        (lambda r, q: ([1, 2], q), "qrels must be None where results are a list"),
        (lambda r, q: ("run.trec", q), "text is required"),
        (lambda r, q: (r, q.drop(columns="label")), "qrels must have the columns"),
        (lambda r, q: (r, q, r, None), "validation qrels are required"),
        (lambda r, q: (r, q, r.head(0), q), "must contain a relevant document"),
    ],
)
def test_errors_are_raised_before_a_model_is_loaded(train_part, break_it, message):
    with pytest.raises(ValueError, match=message):
        MonoCE("nobody/nothing").fit(*break_it(train_part.results, train_part.qrels))


def test_validation_queries_that_are_training_queries(ce, train_part):
    with pytest.warns(UserWarning, match="64 validation queries are also training queries"):
        ce.fit(
            train_part.results, train_part.qrels, train_part.results, train_part.qrels, fitter=Contrastive(max_steps=1)
        )


def test_a_fit_that_changes_nothing_warns_and_leaves_the_head_new(ce, train_part):
    with pytest.warns(UserWarning, match="changed no weight in 1 updates"):
        ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=1, learning_rate=1e-60))
    with pytest.warns(UserWarning, match="random scores"):
        ce(train_part.results)


def test_a_failed_fit_leaves_the_head_new(ce, train_part, test_part):
    def broken(scores, labels, mask):
        return scores.sum() * float("nan")

    with pytest.raises(ValueError, match="loss must be finite"):
        ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(loss=broken))
    with pytest.warns(UserWarning, match="random scores"):
        ce(test_part.results)
    assert not len(ce.history)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": 3}, "got int"),
        ({"model": "/nowhere/at/all"}, "model must be a model's folder"),
        ({"max_length": 0}, "max_length must be"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"dtype": "int4"}, "dtype must be"),
        ({"text": 3}, "text_loader"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MonoCE(**settings)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        MonoCE(tmp_path)


def test_more_tokens_than_positions(backbone, test_part):
    with pytest.raises(ValueError, match="max_length must be at most 64"):
        MonoCE(backbone, max_length=65)(test_part.results)


def test_a_loaded_model(backbone, silent, test_part):
    network = copy.deepcopy(silent.cross_encoder.network)
    ce = MonoCE(network, max_length=24, dtype="float32", device="cpu")
    assert_frame_equal(ce(test_part.results), silent(test_part.results))


# ---- identity


def test_two_rerankers_are_never_the_same(backbone, ce, trained):
    assert ce != trained
    assert MonoCE(backbone) != MonoCE(backbone)
    assert len({MonoCE(backbone), MonoCE(backbone)}) == 2


def test_fit_does_not_change_the_hash(ce, train_part):
    before = hash(ce)
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=1))
    assert hash(ce) == before


@pytest.mark.parametrize("options", [{"precompute_prefix": True}, {"plan": "tree", "verbose": False}, {}])
@pytest.mark.filterwarnings("ignore:precompute_prefix")
def test_experiments_do_not_mix_up_rerankers(backbone, trained, silent, test_part, options):
    first_stage = source(test_part)
    table = pt.Experiment(
        [first_stage >> silent, first_stage >> trained],
        topics(test_part), test_part.qrels, [RR @ 10], names=["a", "b"], **options,
    )  # fmt: skip
    assert table["RR@10"].tolist() == pytest.approx(
        [metric(ce(test_part.results), test_part) for ce in (silent, trained)]
    )
    assert table["RR@10"].nunique() == 2


def test_fingerprints(ce, trained):
    assert ce.fingerprint != trained.fingerprint
    assert ce.fingerprint == ce.clone().fingerprint
    assert trained.fingerprint in repr(trained)
    before = trained.fingerprint
    with torch.no_grad():
        next(trained.cross_encoder.network.parameters())[0, 0] += 1
    assert trained.fingerprint != before


def test_clone_is_independent(trained, train_part):
    other = trained.clone()
    before = trained.fingerprint
    other.fit(train_part.results, train_part.qrels, fitter=CL)
    assert trained.fingerprint == before != other.fingerprint
    assert trained.history["stage"].max() == 1
    assert other.history["stage"].max() == 2


def test_apply_attributes_keeps_weights(trained):
    other = pt.inspect.transformer_apply_attributes(trained, max_length=12)
    assert (other.max_length, other.fingerprint) == (12, trained.fingerprint)


def test_pickle(trained, test_part):
    again = pickle.loads(pickle.dumps(trained))
    assert_frame_equal(again(test_part.results), trained(test_part.results))


# ---- cache


def test_cached_scores_are_those_of_the_reranker(trained, test_part, tmp_path, monkeypatch):
    cached = trained.cached(tmp_path)
    expected = trained(test_part.results)
    assert_frame_equal(cached(test_part.results), expected, atol=1e-6)
    # The second time nothing is computed.
    monkeypatch.setattr("pyterrier_msft.model.cross_encoder.score_pairs", lambda *a, **k: pytest.fail("scored again"))
    assert_frame_equal(cached(test_part.results), expected, atol=1e-6)


def test_cache_is_fresh_after_fit_through_a_pipeline(trained, train_part, test_part, tmp_path):
    cached = trained.cached(tmp_path)
    before = cached(test_part.results)
    trained.fitter = CL
    (source(train_part) >> cached).fit(topics(train_part), train_part.qrels)
    after = cached(test_part.results)
    assert not np.allclose(before["score"], after["score"])
    assert_frame_equal(after, trained(test_part.results), atol=1e-6)


def test_cache_is_right_for_repeated_queries_missing_and_edited_text(trained, test_part, tmp_path):
    cached = trained.cached(tmp_path)
    frame = test_part.results.head(8)
    twice = pd.concat([frame, frame.assign(qid="again"), frame.assign(qid="none", text=None)])
    assert_frame_equal(cached(twice), trained(twice), atol=1e-6)
    edited = frame.assign(text=frame["text"] + " w1 w2")
    assert_frame_equal(cached(edited), trained(edited), atol=1e-6)
    trained.max_length = 6
    assert_frame_equal(cached(frame), trained(frame), atol=1e-6)
    assert_frame_equal(cached(frame.head(0)), trained(frame.head(0)))


def test_a_cached_reranker_pickles(trained, test_part, tmp_path):
    cached = trained.cached(tmp_path)
    expected = cached(test_part.results)
    assert_frame_equal(pickle.loads(pickle.dumps(cached))(test_part.results), expected)


# ---- on disk


def test_save_and_load(trained, test_part, tmp_path):
    trained.save(tmp_path / "model")
    loaded = MonoCE.load(tmp_path / "model", device="cpu", dtype="float32")
    assert_frame_equal(loaded(test_part.results), trained(test_part.results))
    assert_frame_equal(loaded.history, trained.history)
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.data_report == trained.data_report
    record = json.loads((tmp_path / "model" / "msft.json").read_text())
    assert record["stages"][0]["fitter"] == repr(CL)
    assert record["stages"][0]["queries"] == 64
    assert "Contrastive" in (tmp_path / "model" / "README.md").read_text()


def test_as_an_artifact(trained, test_part, tmp_path):
    trained.save(tmp_path / "model")
    loaded = pt.Artifact.load(str(tmp_path / "model"))
    assert isinstance(loaded, MonoCE)
    assert loaded.fingerprint == trained.fingerprint


def test_saving_replaces_the_model_and_nothing_else(trained, ce, backbone, train_part, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    folder = tmp_path / "model"
    # Checkpoints inside the model's folder, before there is a model and after.
    fitter = Contrastive(max_steps=2)
    for model in (ce, MonoCE(backbone, adapter=LoraConfig(target_modules=["query"]), max_length=24, device="cpu")):
        model.fit(train_part.results, train_part.qrels, fitter=fitter, checkpoint_dir=folder / "checkpoints")
        model.save(folder, merged=False)
        shutil.rmtree(folder / "checkpoints")
    for name in (".git/HEAD", "results/run.txt", "notes.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    trained.save(folder)
    assert MonoCE.load(folder).fingerprint == trained.fingerprint
    assert {path.name for path in folder.iterdir()} == {
        ".git", "results", "notes.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "msft.json", "pt_meta.json",
    }  # fmt: skip
    assert (folder / ".git" / "HEAD").read_text() == "mine"


def test_a_folder_with_other_files_is_not_saved_to(trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match=r"path must be a new folder or a model's; got .*thesis\.tex"):
            trained.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "vocab.txt")
    (tmp_path / "config.json").write_text('{"my": "app"}')
    with pytest.raises(ValueError, match="path must be a new folder or a model's"):
        trained.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(ValueError, match="path must be a new folder or a model's"):
        trained.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.txt", "config.json"}


def test_a_failed_save_leaves_the_old_model(trained, ce, tmp_path, monkeypatch):
    trained.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(self, *args):
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelRecord, "write", full)
    for folder in ("model", "new"):
        with pytest.raises(OSError, match="No space"):
            ce.save(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_records_of_other_versions(trained, test_part, tmp_path):
    trained.save(tmp_path / "model")
    path = tmp_path / "model" / "msft.json"
    record = json.loads(path.read_text())
    extra = {"of_a_later_version": {"a": [1]}}
    for part in (record, record["stages"][0], record["stages"][0]["data_report"]):
        part.update(extra)
    path.write_text(json.dumps(record))
    loaded = MonoCE.load(tmp_path / "model")
    assert loaded.data_report == trained.data_report
    assert_frame_equal(loaded.history, trained.history)
    loaded.save(tmp_path / "again")
    path.write_text(json.dumps({"stages": [{"fitter": "Contrastive()"}]}))
    loaded = MonoCE.load(tmp_path / "model", max_length=24, dtype="float32", device="cpu")
    assert_frame_equal(loaded(test_part.results), trained(test_part.results))
    assert loaded.data_report.queries == len(loaded.history) == 0


def test_loading_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="must be a model's folder"):
        MonoCE.load(tmp_path / "nothing")


def test_a_folder_can_be_moved(trained, tmp_path):
    trained.save(tmp_path / "a")
    Path(tmp_path / "a").rename(tmp_path / "b")
    assert MonoCE.load(tmp_path / "b").fingerprint == trained.fingerprint


def test_the_working_directory_may_change(ce, test_part, tmp_path, monkeypatch):
    for name, model in (("here", ce), ("there", ce.reseeded(7))):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "model")
        (tmp_path / name / "model" / "msft.json").unlink()  # as of another library's model
    monkeypatch.chdir(tmp_path / "here")
    lazy = MonoCE("model", max_length=24, dtype="float32", device="cpu")
    loaded = MonoCE("model", max_length=24, dtype="float32", device="cpu")
    assert loaded.fingerprint == ce.fingerprint
    monkeypatch.chdir(tmp_path / "there")
    assert lazy.fingerprint == ce.fingerprint
    assert repr(lazy).startswith("MonoCE('model'")
    assert pickle.loads(pickle.dumps(loaded)).fingerprint == ce.fingerprint


def test_a_pickle_has_weights_that_are_nowhere_else(trained, tmp_path):
    ce = trained.clone()
    ce.save(tmp_path / "model")
    assert len(pickle.dumps(ce)) < 10_000  # the folder has them
    shutil.rmtree(tmp_path / "model")
    assert pickle.loads(pickle.dumps(ce)).fingerprint == trained.fingerprint


def test_rerankers_of_one_network_are_trained_apart(backbone, train_part):
    network = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    before = {name: weights.clone() for name, weights in network.state_dict().items()}
    trained = []
    for _ in range(2):
        ce = MonoCE(network, max_length=24, dtype="float32", device="cpu")
        trained.append(ce.fit(train_part.results, train_part.qrels, fitter=BRIEF).fingerprint)
    assert trained[0] == trained[1] != MonoCE(network, max_length=24, device="cpu").fingerprint
    assert all(torch.equal(weights, before[name]) for name, weights in network.state_dict().items())


def test_a_copy_is_trained_apart(trained, train_part, test_part):
    before, n_stages = trained(test_part.results), len(trained.stages)
    copy.copy(trained).fit(train_part.results, train_part.qrels, fitter=BRIEF)
    assert_frame_equal(trained(test_part.results), before)
    assert len(trained.stages) == n_stages


def test_numbers_of_numpy(backbone, train_part, tmp_path):
    numbers = {"max_steps": np.int64(2), "batch_size": np.int32(4), "eval_every": np.int8(1)}
    fitter = BRIEF.replace(**numbers, learning_rate=np.float32(1e-2))
    ce = MonoCE(backbone, max_length=np.int64(24), dtype="float32", device="cpu", seed=np.int64(7))
    ce.fit(train_part.results, train_part.qrels, fitter=fitter).save(tmp_path / "model")
    assert MonoCE.load(tmp_path / "model").max_length == 24


@pytest.mark.parametrize(
    ("verbose", "terminal", "shown"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_progress_in_a_terminal(backbone, train_part, monkeypatch, capsys, verbose, terminal, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", interpolate=True, verbose=verbose)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    written = capsys.readouterr().err
    assert all((bar in written) == shown for bar in ("training on half 1 of 2", "training on half 2 of 2", "training:"))


def test_progress_says_what_is_trained(backbone, train_part, dev_part, capsys):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", verbose=True)
    stages = {name: Stage(BRIEF, train_part.results, train_part.qrels) for name in ("A", "B")}
    fit_sequences(ce, stages, ["A-B"], seeds=[3])
    fit_grid(ce, stages["A"], {"batch_size": [4, 8]}, validation=(dev_part.results, dev_part.qrels))
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF >> BRIEF)
    written = capsys.readouterr().err
    names = ["seed 3, A: training", "seed 3, A-B: training", "combination 2 of 2, grid: training"]
    for name in [*names, "training, stage 2 of 2"]:
        assert f"{name}:" in written


class MeanPooling(BertForSequenceClassification):
    """A network with the weights of another class, and other scores."""

    def forward(self, input_ids, attention_mask=None, **inputs):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)
        return SequenceClassifierOutput(logits=self.classifier(states))


def test_a_class_of_the_callers_has_another_fingerprint(backbone, test_part, tmp_path):
    networks = [kind.from_pretrained(backbone, num_labels=1) for kind in (BertForSequenceClassification, MeanPooling)]
    networks[1].load_state_dict(networks[0].state_dict())
    plain, own = (MonoCE(network, max_length=24, dtype="float32", device="cpu") for network in networks)
    assert plain(test_part.results)["score"].tolist() != own(test_part.results)["score"].tolist()
    assert plain.fingerprint != own.fingerprint
    own.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="has other weights or another tokenizer than when its history was saved"):
        MonoCE.load(tmp_path / "model")(test_part.results)


# ---- validation that can't choose, and what it says


def test_a_metric_that_is_always_the_same(backbone, train_part, dev_part):
    parts = train_part.results, train_part.qrels, dev_part.results, dev_part.qrels
    constant = BRIEF.replace(metric="R@1000", max_steps=4, eval_every=1, seed=3)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    with pytest.warns(UserWarning, match=r"validation R@1000 was 1\.000 each time, so it can't choose weights"):
        ce.fit(*parts, fitter=constant)
    last = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    last.fit(*parts, fitter=constant.replace(metric=None))
    assert ce.fingerprint == last.fingerprint
    assert "kept step 4 of 4" in str(ce.data_report)
    stage = Stage(constant, *parts[:2])
    with pytest.warns(UserWarning, match=r"all 2 combinations have a validation R@1000 of 1\.000; the first one"):
        fit_grid(ce, stage, {"batch_size": [4, 8]}, validation=parts[2:])


def test_early_stopping_is_reported(backbone, train_part, dev_part, capsys):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", verbose=True)
    still = BRIEF.replace(learning_rate=1e-12, max_steps=9, eval_every=2, patience=2)
    with pytest.warns(UserWarning, match="didn't improve|can't choose|changed no weight"):
        ce.fit(train_part.results, train_part.qrels, dev_part.results, dev_part.qrels, fitter=still)
    text = "stopped at step 4: no improvement for 2 validations; kept step 4 of 9"
    assert text in str(ce.data_report)
    assert text in capsys.readouterr().err


# ---- folders and threads


def test_a_folder_that_is_saved_to_before_it_is_loaded(ce, backbone, train_part, test_part, tmp_path):
    MonoCE(backbone, max_length=24, dtype="float32", device="cpu").save(tmp_path / "model")
    lazy = MonoCE(tmp_path / "model", max_length=24, dtype="float32", device="cpu")
    tuned = MonoCE.load(tmp_path / "model", dtype="float32", device="cpu")
    tuned.fit(train_part.results, train_part.qrels, fitter=BRIEF).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"must hold the model that it held when this re-ranker was made"):
        lazy(test_part.results)
    assert_frame_equal(
        MonoCE(tmp_path / "model", max_length=24, dtype="float32", device="cpu")(test_part.results),
        tuned(test_part.results),
    )


def test_a_readme_of_the_users_is_kept(ce, backbone, tmp_path):
    shutil.copytree(backbone, tmp_path / "model")
    readme = tmp_path / "model/README.md"
    for notes in ("my notes", "more notes"):
        readme.write_text(notes)
        ce.save(tmp_path / "model")
    ce.save(tmp_path / "model")
    assert "pyterrier_msft" in readme.read_text()
    assert (tmp_path / "model/README.old.md").read_text() == "my notes"
    assert (tmp_path / "model/README.old-2.md").read_text() == "more notes"
    assert len([*(tmp_path / "model").glob("README*")]) == 3


def test_a_card_that_the_user_has_edited_is_kept(ce, tmp_path):
    ce.save(tmp_path / "model")
    readme = tmp_path / "model/README.md"
    readme.write_text(edited := readme.read_text() + "## Intended use\n")
    ce.save(tmp_path / "model")
    ce.save(tmp_path / "model")
    assert readme.read_text() + "## Intended use\n" == edited
    assert (tmp_path / "model/README.old.md").read_text() == edited
    assert len([*(tmp_path / "model").glob("README*")]) == 2


def test_two_threads_train_as_one(ce, train_part):
    alone = ce.clone().fit(train_part.results, train_part.qrels, fitter=CL)
    copies = [ce.clone(), ce.clone()]
    threads = [
        threading.Thread(target=copy_.fit, args=(train_part.results, train_part.qrels), kwargs={"fitter": CL})
        for copy_ in copies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [copy_.fingerprint for copy_ in copies] == [alone.fingerprint] * 2


def test_loading_in_another_thread_does_not_change_training(ce, backbone, train_part):
    """Both draw from torch's global random state."""
    fitter = Contrastive(n_negatives=2, epochs=6, batch_size=2, dropout=0.2)
    alone = ce.clone().fit(train_part.results, train_part.qrels, fitter=fitter).fingerprint
    untrained = MonoCE(backbone, seed=1, dtype="float32", device="cpu").fingerprint
    beside = ce.clone()
    thread = threading.Thread(target=beside.fit, args=(train_part.results, train_part.qrels), kwargs={"fitter": fitter})
    thread.start()
    loaded = []
    while thread.is_alive():
        loaded.append(MonoCE(backbone, seed=1, dtype="float32", device="cpu").fingerprint)
    assert beside.fingerprint == alone
    assert {*loaded} == {untrained}


def test_a_re_ranker_that_another_thread_trains_is_refused(ce, train_part, test_part, tmp_path):
    errors = []

    def attempt(use):
        try:
            use()
        except RuntimeError as error:
            errors.append(str(error))

    def loss(scores, labels, mask):
        uses = [
            lambda: trained(test_part.results), lambda: trained.fit(train_part.results, train_part.qrels),
            trained.clone, lambda: pickle.dumps(trained), lambda: trained.save(tmp_path / "model"),
        ]  # fmt: skip
        threads = [threading.Thread(target=attempt, args=(use,)) for use in uses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return losses.localized_contrastive(scores, labels, mask)

    trained = ce.clone()
    trained.fit(train_part.results, train_part.qrels, fitter=Contrastive(loss=loss, n_negatives=2, max_steps=1))
    assert len(errors) == 5
    assert all("must not be used while another thread trains it" in message for message in errors)
    assert len(trained(test_part.results)) == len(test_part.results)


def test_scores_of_weights_that_changed_meanwhile_are_refused(ce, train_part, test_part):
    scored = ce.clone()
    network = scored.cross_encoder.network
    forward = network.forward

    def train_and_forward(**inputs):
        network.forward = forward
        thread = threading.Thread(
            target=scored.fit, args=(train_part.results, train_part.qrels), kwargs={"fitter": BRIEF}
        )
        thread.start()
        thread.join()
        return forward(**inputs)

    network.forward = train_and_forward
    with pytest.raises(RuntimeError, match="must not be used while another thread trains it"):
        scored(test_part.results)
    assert len(scored(test_part.results)) == len(test_part.results)
