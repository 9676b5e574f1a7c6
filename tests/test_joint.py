"""Labels and a teacher in one stage: sums of fitters."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Part, make_part
from interruptions import interrupted_at, interruptible_lce, interruptible_ranknet
from ir_measures import RR
from transformers import AutoTokenizer

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, losses
from pyterrier_msft.algebra import FitterSequence, FitterSum
from pyterrier_msft.data.labels import from_qrels, from_teacher
from pyterrier_msft.training import Hyperparameters
from pyterrier_msft.training.batches import BatchSchedule, StepSchedule
from pyterrier_msft.training.plan import plan_training

QUERIES, RANKED = 32, 12  # the teacher ranks only some of the queries
# AdamW amplifies gradients that are 0 up to rounding, so tests that compare weights use SGD.
EXACT = {
    "learning_rate": 0.3, "dropout": 0.0, "clip_norm": None, "warmup": 0, "weight_decay": 0, "metric": None,
    "trainer_args": {"optim": "sgd"},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Distillation dropped")


@pytest.fixture(scope="module")
def train_part() -> Part:
    return make_part("tr", n_queries=QUERIES, seed=1)


@pytest.fixture(scope="module")
def teacher(train_part) -> pd.DataFrame:
    """A ranking of the results of some queries by quality."""
    ranked = train_part.results["qid"].isin(train_part.results["qid"].unique()[:RANKED])
    frame = train_part.results[ranked]
    return frame[["qid", "docno"]].assign(score=frame["quality"] + frame["score"] / 100)


@pytest.fixture
def fit(ce, train_part):
    """Train a copy of the same re-ranker."""
    ce.fingerprint  # noqa: B018 (loads the model, which the copies share)
    return lambda fitter, **options: ce.clone().fit(train_part.results, train_part.qrels, fitter=fitter, **options)


def weights(ce: MonoCE) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in ce.cross_encoder.network.parameters()])


def assert_same_weights(found: MonoCE, expected: MonoCE, start: MonoCE) -> None:
    torch.testing.assert_close(weights(found), weights(expected), atol=1e-6, rtol=0)
    assert (weights(expected) - weights(start)).abs().max() > 1e-3


# ---- declarations

CL, KD = Contrastive(n_negatives=3), Distillation(depth=10)


def test_a_sum_prints_as_it_is_written():
    for text in (
        "Contrastive(n_negatives=3) + 0.5 * Distillation(depth=10)",
        "0.5 * Contrastive(n_negatives=3)",
        "Contrastive() + 0.1 * Distillation() + 2 * Distillation(depth=10)",
        "(Contrastive() + 0.5 * Distillation()) >> Contrastive()",
        "Contrastive() >> (Contrastive() + 0.5 * Distillation())",
    ):
        fitter = eval(text)
        assert repr(fitter) == text
        assert eval(repr(fitter)) == fitter


def test_sums_and_sequences():
    assert (CL + 0.5 * KD).terms == (CL + KD * 0.5).terms == ((1, CL), (0.5, KD))
    assert (CL + KD) + CL == CL + (KD + CL)
    assert 0.5 * (CL + 4 * KD) == 0.5 * CL + 2 * KD
    assert 1 * CL == CL
    assert (CL + KD >> CL).stages == (CL + KD, CL)  # `+` binds more tightly
    assert (CL >> CL + KD).stages == (CL, CL + KD)
    assert isinstance(CL + KD, FitterSum)
    assert isinstance(CL + KD >> CL, FitterSequence)


def test_parts_share_the_settings_of_the_stage():
    first, second = (Contrastive(epochs=3, batch_size=8) + 0.5 * Distillation(metric=RR @ 10, batch_size=4)).parts
    assert (first.epochs, first.metric, first.batch_size) == (3, RR @ 10, 8)
    assert (second.epochs, second.metric, second.batch_size) == (3, RR @ 10, 4)
    assert [part.seed for part in (CL + KD).replace(seed=7).parts] == [7, 7]


def test_a_digest_includes_parts_weights_and_shared_settings():
    fitters = [
        CL, CL + KD, CL + 0.5 * KD, 0.5 * CL + 0.5 * KD, CL + CL, CL + 0.5 * Distillation(depth=9),
        CL + 0.5 * KD.replace(seed=1), CL + 0.5 * KD.replace(batch_size=3), (CL + KD) >> CL, CL >> CL + KD,
    ]  # fmt: skip
    digests = [fitter.digest() for fitter in fitters]
    assert len(set(digests)) == len(digests)
    # It doesn't matter which part sets a setting of the stage, or how a weight is written.
    assert (CL.replace(epochs=2) + KD).digest() == (CL + 1.0 * KD.replace(epochs=2)).digest()


# ---- training


def pair_scores(ce: MonoCE, backbone: str, frame: pd.DataFrame) -> torch.Tensor:
    """The network's scores in plain transformers, [queries, documents in the frame's order]."""
    encoded = AutoTokenizer.from_pretrained(backbone)(
        frame["query"].tolist(), frame["text"].tolist(), padding=True, return_tensors="pt"
    )
    return ce.cross_encoder.network(**encoded).logits.view(frame["qid"].nunique(), -1)


def test_a_step_minimizes_the_weighted_sum_of_the_mean_losses(ce, backbone, fit, train_part, teacher):
    """Against plain torch: contrastive loss of all queries, RankNet of those that the teacher ranks."""
    labels = Contrastive(n_negatives=7, batch_size=QUERIES, max_steps=1, **EXACT)
    found = fit(labels + 0.5 * Distillation(teacher=teacher, batch_size=QUERIES))

    expected = ce.clone()
    expected.cross_encoder.network.eval()
    relevant = train_part.results["docno"].isin(train_part.qrels["docno"])
    first = torch.nn.functional.cross_entropy(
        pair_scores(expected, backbone, train_part.results),
        torch.tensor(relevant.to_numpy()).view(QUERIES, 8).float().argmax(1),
    )
    ranked = train_part.results[train_part.results["qid"].isin(teacher["qid"])].merge(teacher, on=["qid", "docno"])
    ranked = ranked.sort_values(["qid", "score_y"], ascending=[True, False])
    scores = pair_scores(expected, backbone, ranked)  # the teacher's order
    better, worse = np.triu_indices(8, 1)
    second = torch.log1p(torch.exp(scores[:, worse] - scores[:, better])).mean()
    (first + 0.5 * second).backward()
    with torch.no_grad():
        for parameter in expected.cross_encoder.network.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.3 * parameter.grad)
    assert_same_weights(found, expected, ce)
    row = found.history.iloc[0]
    assert row["loss_Contrastive"] == pytest.approx(first.item(), rel=1e-5)
    assert row["loss_Distillation"] == pytest.approx(second.item(), rel=1e-5)
    assert row["loss"] == pytest.approx((first + 0.5 * second).item(), rel=1e-4)


def test_a_sum_reduces_to_its_part(ce, fit):
    part = Contrastive(n_negatives=3, batch_size=8, max_steps=3, **EXACT)
    alone = fit(part)
    assert_same_weights(fit(0.5 * part + 0.5 * part), alone, ce)  # the same data twice
    assert_same_weights(fit(part + 1e-9 * Distillation(batch_size=2)), alone, ce)


def test_limited_memory_gives_the_gradient_of_the_whole_step(ce, fit, teacher):
    fitter = Contrastive(n_negatives=3, max_steps=2, **EXACT) + 0.5 * Distillation(teacher=teacher)
    whole = fit(fitter.replace(batch_size=8))
    assert_same_weights(fit(fitter.replace(batch_size=8, pairs_per_pass=5)), whole, ce)
    assert_same_weights(fit(fitter.replace(batch_size=4, gradient_accumulation=2)), whole, ce)


def test_the_first_part_determines_the_steps_and_the_others_repeat_their_queries(train_part, teacher):
    parts = [
        from_qrels(train_part.results, train_part.qrels, depth=None, n_negatives=3, min_relevance=1)[0],
        from_teacher(train_part.results, teacher, depth=None)[0],
    ]
    plan = plan_training(Hyperparameters(batch_size=8, epochs=2), parts[0], width=16, head_is_new=True)
    plans = [plan, dataclasses.replace(plan, batch_size=5, updates_per_epoch=3)]
    steps = [*StepSchedule([BatchSchedule(*part, seed=1) for part in zip(parts, plans, strict=True)])]
    assert [len(first) for first, _ in steps] == [8] * 8  # two epochs of the first part
    for start in (0, 3):  # two epochs of the second part, and the beginning of a third one
        batches = [second for _, second in steps[start : start + 3]]
        assert sorted(map(len, batches)) == [2, 5, 5]
        assert sorted(query for batch in batches for query, _ in batch) == [*range(RANKED)]
    assert [second[0][1] for _, second in steps] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_fitter_plans_each_part_for_its_own_queries(fit, teacher):
    ce = fit(Contrastive(n_negatives=3, batch_size=8, epochs=2) + Distillation(teacher=teacher, batch_size=5))
    assert ce.stages[0].plan["updates"] == 8
    reports = ce.data_report.parts
    assert reports["Contrastive"].plan.startswith("2 epochs of 4 updates with 8 queries each")
    assert reports["Distillation"].plan.startswith("2.67 epochs of 3 updates with 5 queries each")


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(fit, teacher, tmp_path):
    fitter = Contrastive(
        n_negatives=3, batch_size=8, max_steps=6, learning_rate=1e-2, eval_every=2, loss=interruptible_lce
    ) + 0.5 * Distillation(teacher=teacher, batch_size=5, loss=interruptible_ranknet)
    whole = fit(fitter)
    with interrupted_at(3, stage="KD"), pytest.raises(KeyboardInterrupt):
        fit(fitter, checkpoint_dir=tmp_path)
    other = fitter.terms[0][1] + 0.7 * fitter.terms[1][1].replace(depth=7)
    message = (
        r"objective is Contrastive \+ 0\.5 \* Distillation there and .* 0\.7 \*.*Distillation's depth is 20 there and 7"
    )
    with pytest.raises(ValueError, match=message):
        fit(other, checkpoint_dir=tmp_path)
    resumed = fit(fitter, checkpoint_dir=tmp_path)
    assert resumed.fingerprint == whole.fingerprint
    columns = ["step", "loss", "loss_Contrastive", "loss_Distillation"]
    pd.testing.assert_frame_equal(resumed.history[columns], whole.history[columns])


def test_what_a_record_says_of_a_sum(ce, train_part, dev_part, teacher, tmp_path):
    fitter = Contrastive(n_negatives=3, max_steps=4, eval_every=2) + 0.5 * Distillation(teacher=teacher)
    ce.fit(train_part.results, train_part.qrels, dev_part.results, dev_part.qrels, fitter=fitter)
    ce.save(tmp_path)
    loaded = MonoCE.load(tmp_path)
    history = loaded.history
    assert [*history.columns[4:9]] == ["loss", "learning_rate", "loss_Contrastive", "loss_Distillation", "nDCG@10"]
    rows = history[history["step"] > 0]
    np.testing.assert_allclose(rows["loss"], rows["loss_Contrastive"] + 0.5 * rows["loss_Distillation"], rtol=1e-3)
    pd.testing.assert_frame_equal(history, ce.history)
    (stage,) = loaded.stages
    assert (stage.fitter, stage.objective) == (repr(fitter), "Contrastive + 0.5 * Distillation")
    assert (stage.queries, stage.documents) == (QUERIES, QUERIES * 8 + RANKED * 8)
    assert [*stage.metrics] == ["nDCG@10"]
    assert loaded.data_report == ce.data_report
    assert loaded.data_report.parts["Distillation"].without_teacher == QUERIES - RANKED
    assert "Distillation:\n    12 of 32 queries to train on, with 96 documents" in repr(loaded.data_report)
    card = (Path(tmp_path) / "README.md").read_text()
    assert "| 1 | Contrastive + 0.5 * Distillation | localized_contrastive + 0.5 * ranknet | 32 | 352 | 4 |" in card
    assert repr(fitter) in card


def test_equal_parts_have_distinct_names():
    fitter = Distillation() + Contrastive() + Distillation(loss=losses.weighted_ranknet)
    assert fitter.names == ("Distillation", "Contrastive", "Distillation_2")


def test_a_part_that_needs_qrels_says_so(ce, train_part):
    with pytest.raises(ValueError, match="qrels is required by Contrastive; got None"):
        ce.fit(train_part.results, fitter=Distillation() + Contrastive())


# ---- with the rest of the package


def test_sequences_with_a_joint_stage(ce, fit, train_part, teacher, tmp_path):
    cl = Contrastive(n_negatives=3, max_steps=2, batch_size=8)
    both = cl + 0.5 * Distillation(teacher=teacher, batch_size=8)
    frames = train_part.results, train_part.qrels
    stages = {"CL": Stage(cl, *frames), "CL+KD": Stage(both, *frames)}
    names = ["CL+KD", "CL+KD-CL"]
    rerankers = fit_sequences(ce, stages, names, save_dir=tmp_path)
    assert rerankers["CL+KD"].fingerprint == fit(both).fingerprint
    fitters = rerankers["CL+KD-CL"].history["fitter"].unique().tolist()
    assert fitters == ["Contrastive + 0.5 * Distillation", "Contrastive"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("CL*")}
    again = fit_sequences(ce, stages, names, save_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("CL*")} == times
    assert [again[name].fingerprint for name in names] == [rerankers[name].fingerprint for name in names]


@pytest.mark.filterwarnings("ignore:re-ranking isn't better")
@pytest.mark.parametrize("hold_out", [True, False])
def test_interpolation_holds_queries_out_of_every_part(backbone, train_part, monkeypatch, hold_out):
    """The choice of the weight sees labels that no part was trained on."""
    if hold_out:
        monkeypatch.setattr("pyterrier_msft.interpolation.MIN_QUERIES_FOR_HOLD_OUT", 25)
        monkeypatch.setattr("pyterrier_msft.interpolation.HELD_OUT_QUERIES", 10)
    fitter = Contrastive(n_negatives=3, max_steps=2, batch_size=8) + 0.5 * Distillation(batch_size=4)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", interpolate=True)
    ce.fit(train_part.results, train_part.qrels, fitter=fitter)
    choice = ce.stages[-1].interpolation
    assert choice["queries"] == (10 if hold_out else QUERIES)
    assert [part.groups for part in ce.data_report.parts.values()] == [22 if hold_out else QUERIES] * 2
    assert "first stage's weight" in repr(ce.data_report)
    if hold_out:
        with pytest.warns(UserWarning, match="may have learned the labels"):
            ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=1))


def test_each_part_reads_a_file_of_results(backbone, tmp_path):
    pytest.importorskip("polars")
    part = make_part("tr", n_queries=4, seed=1)
    documents = part.results.set_index("docno")["text"]

    class Dataset:
        def get_topics(self):
            return part.results[["qid", "query"]].drop_duplicates()

        def text_loader(self, fields):
            return lambda frame: frame.assign(text=documents[frame["docno"]].to_numpy())

    lines = part.results.assign(Q0="Q0", tag="t")[["qid", "Q0", "docno", "rank", "score", "tag"]]
    lines.to_csv(tmp_path / "run.trec", sep=" ", header=False, index=False)
    fitter = Contrastive(n_negatives=99, batch_size=4, max_steps=2, **EXACT) + 0.5 * Distillation(batch_size=4)

    def new(text=None) -> MonoCE:
        return MonoCE(backbone, max_length=24, dtype="float32", device="cpu", text=text)

    found = new(Dataset()).fit(tmp_path / "run.trec", part.qrels, fitter=fitter)
    assert_same_weights(found, new().fit(part.results, part.qrels, fitter=fitter), new())
