"""The training run: what is learned, batches, memory, threads, checkpoints."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import record_calls
from interruptions import interrupted_at, interruptible_lce
from ir_measures import RR
from scipy.stats import ttest_rel

from pyterrier_msft import Contrastive, losses
from pyterrier_msft.data.groups import Groups, Ragged
from pyterrier_msft.data.labels import from_qrels
from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.fingerprint import training_state
from pyterrier_msft.model.first_token import CPU_ATTENTION
from pyterrier_msft.model.scoring import forward
from pyterrier_msft.training import Hyperparameters, batches, cpu, gradient_cache
from pyterrier_msft.training.batches import BatchSchedule, Collator
from pyterrier_msft.training.gradient_cache import gradient_cache_step
from pyterrier_msft.training.isolation import training_mode
from pyterrier_msft.training.objectives import Objective
from pyterrier_msft.training.plan import plan_training
from pyterrier_msft.training.run import train
from pyterrier_msft.training.validation import Validation

# AdamW amplifies gradients that are 0 up to rounding, as some biases have, so tests that compare weights use SGD.
SGD = {"optim": "sgd"}
ALL_LOSSES = [
    losses.localized_contrastive, losses.multi_positive, losses.binary_cross_entropy, losses.ranknet,
    losses.weighted_ranknet, losses.lambda_loss, losses.margin_mse, losses.kl_divergence, losses.listnet,
    losses.list_mle, losses.position_aware_list_mle, losses.adr_mse,
    losses.combine((losses.ranknet, 0.5), (losses.localized_contrastive, 1.0)),
]  # fmt: skip
FAST = Hyperparameters(learning_rate=1e-2, epochs=3, batch_size=8, metric=RR @ 10)
every_loss = pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: getattr(loss, "__name__", None) or repr(loss))


@pytest.fixture
def new(backbone):
    """Make a cross-encoder; all have the same weights."""
    return lambda **options: CrossEncoder(backbone, **{"seed": 1, "dtype": "float32", "device": "cpu", **options})


@pytest.fixture
def model(new):
    return new()


@pytest.fixture(scope="module")
def groups(train_part):
    return from_qrels(train_part.results, train_part.qrels, depth=None, n_negatives=3, min_relevance=1)[0]


@pytest.fixture(scope="module")
def validation(dev_part):
    return Validation(dev_part.results, dev_part.qrels, RR @ 10)


def run(model, groups, settings=FAST, *, loss=losses.localized_contrastive, **options):
    plan = plan_training(
        settings, groups, width=model.width, head_is_new=model.head_is_new, is_adapter=model.has_adapter,
        validation=options.get("validation"),
    )  # fmt: skip
    return train(model, model.pair_encoder(max_length=24), [Objective(groups, loss, plan)], settings, **options)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


def metric(model, validation) -> float:
    return validation.measure(validation.score(model.network, model.pair_encoder(max_length=24), torch.float32))


class Killed(BaseException):
    """Stands for a killed process: the package doesn't catch it."""


# ---- learning


def test_training_raises_the_metric_on_other_queries(model, groups, validation):
    before = metric(model, validation)
    run(model, groups)
    assert metric(model, validation) > before + 0.2


def test_a_document_is_validated_by_its_best_passage(model):
    long = " ".join(f"w{i}" for i in range(40))
    results = pd.DataFrame({"qid": "q", "query": "w1", "docno": ["a", "b", "a"], "text": ["w2", "w3", long]})
    scores = model.score(model.pair_encoder(max_length=24), results["query"], results["text"])
    best_last = results.iloc[np.argsort(scores)].reset_index(drop=True).assign(docno=["a", "b", "a"])
    qrels = pd.DataFrame({"qid": ["q"], "docno": ["a"], "label": [1]})
    assert metric(model, Validation(best_last, qrels, RR @ 10)) == 1


def test_history(model, groups, validation):
    rows = pd.DataFrame(run(model, groups, validation=validation))
    assert rows["step"].tolist() == list(range(25))
    start, rows = rows.iloc[0], rows.iloc[1:]
    assert np.isnan(start["loss"])
    assert start["RR@10"] < rows["RR@10"].iloc[-1]
    assert rows["epoch"].tolist() == pytest.approx([step / 8 for step in rows["step"]])
    assert rows["loss"].iloc[-4:].mean() < rows["loss"].iloc[:4].mean()
    assert rows["learning_rate"].max() <= 1e-2
    assert rows["learning_rate"].iloc[-1] < rows["learning_rate"].max() / 10
    assert rows["step"][rows["RR@10"].notna()].tolist() == [8, 16, 24]  # as validation has so many documents
    assert rows["seconds"].is_monotonic_increasing
    assert (rows["pairs_per_second"] > 0).all()


def test_the_best_weights_remain(model, groups, validation, monkeypatch):
    seen = validate_with(monkeypatch, model, [0.0, 0.1, 0.9, 0.4, 0.8, 0.2])
    run(model, groups, dataclasses.replace(FAST, max_steps=5, eval_every=1), validation=validation)
    assert torch.equal(weights(model), seen[2])
    assert not torch.equal(weights(model), seen[4])


def test_the_start_remains_if_nothing_is_better(model, groups, validation, monkeypatch):
    before = weights(model).clone()
    validate_with(monkeypatch, model, [0.5, 0.1, 0.4, 0.2])
    run(model, groups, dataclasses.replace(FAST, max_steps=3, eval_every=1), validation=validation)
    assert torch.equal(weights(model), before)


def test_weights_that_were_trained_longer_win_a_tie(model, groups, validation, monkeypatch):
    seen = validate_with(monkeypatch, model, [0.5, 0.1, 0.5, 0.5, 0.4])
    run(model, groups, dataclasses.replace(FAST, max_steps=4, eval_every=1), validation=validation)
    assert torch.equal(weights(model), seen[3])


@pytest.mark.parametrize("seed", range(6))
def test_later_weights_are_kept_unless_they_are_significantly_worse(model, groups, validation, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    start = np.zeros(30)
    best = rng.random(30)
    noise = rng.normal(0, 0.2, (3, 30))
    others = best - rng.uniform(0.001, 0.15, (3, 1)) + noise - noise.mean(axis=1, keepdims=True)
    seen = validate_with(monkeypatch, model, [start, best, *others])
    rows = run(model, groups, dataclasses.replace(FAST, max_steps=4, eval_every=1), validation=validation)
    kept = max([1, *(step for step, other in enumerate(others, 2) if ttest_rel(best, other).pvalue >= 0.05)])
    assert torch.equal(weights(model), seen[kept])
    assert [row["step"] for row in rows if row.get("kept")] == [kept]


def test_weights_that_are_slightly_worse_than_the_start_are_not_kept(model, groups, validation, monkeypatch):
    before = weights(model).clone()
    validate_with(monkeypatch, model, [np.array([0.5, 0.4, 0.6]), np.array([0.6, 0.3, 0.5])])
    run(model, groups, dataclasses.replace(FAST, max_steps=1, eval_every=1), validation=validation)
    assert torch.equal(weights(model), before)


def validate_with(monkeypatch, model, found) -> list[torch.Tensor]:
    """Let validation give these values, of all queries or by query; return a list of the weights of each validation."""
    found, seen = iter(found), []

    def values(self, *_):
        seen.append(weights(model).clone())
        value = np.asarray(next(found))
        by_query = (value if value.ndim else np.full(30, value)).tolist()
        return float(np.mean(by_query)), by_query

    monkeypatch.setattr(Validation, "values", values)
    return seen


def test_validation_refuses_scores_that_are_not_finite(model, groups, validation):
    settings = dataclasses.replace(FAST, max_steps=1, learning_rate=1e38, warmup=0, eval_every=1)
    with pytest.raises(ValueError, match=r"scores of the validation data must be finite; .* Try a lower learning_rate"):
        run(model, groups, settings, validation=validation)


def test_patience_stops_training(model, groups, validation):
    still = dataclasses.replace(FAST, learning_rate=1e-12, eval_every=1, patience=3)
    assert len(run(model, groups, still, validation=validation)) == 4


def test_max_steps_may_exceed_an_epoch(model, groups):
    rows = run(model, groups, dataclasses.replace(FAST, max_steps=11))
    assert rows[-1]["step"] == 11
    assert rows[-1]["epoch"] == pytest.approx(11 / 8)


@pytest.mark.parametrize("warmup", [0.1, 1.0, 5])
def test_warmup_leaves_an_update_with_a_positive_learning_rate(model, groups, warmup):
    before = weights(model)
    settings = dataclasses.replace(FAST, max_steps=1, warmup=warmup)
    too_long = pytest.warns(UserWarning, match="warmup is 5 updates, but training has 1:")
    with too_long if warmup == 5 else contextlib.nullcontext():
        run(model, groups, settings)
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("dropout", [0.0, 0.2, None])
def test_training_restores_the_network(model, groups, dropout):
    network = model.network
    attention = network.config._attn_implementation
    probabilities = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    settings = dataclasses.replace(FAST, dropout=dropout, freeze_position_embeddings=True, max_steps=2)
    run(model, groups, settings)
    assert not network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == probabilities
    assert network.config._attn_implementation == attention
    assert not any("forward" in vars(module) for module in network.modules())


def test_frozen_position_embeddings_stay(model, groups):
    before = model.network.bert.embeddings.position_embeddings.weight.clone()
    run(model, groups, dataclasses.replace(FAST, freeze_position_embeddings=True, max_steps=3))
    assert torch.equal(model.network.bert.embeddings.position_embeddings.weight, before)


def test_a_network_without_position_embeddings_to_freeze(model, groups, monkeypatch):
    modules = [pair for pair in model.network.named_modules() if not pair[0].endswith("position_embeddings")]
    monkeypatch.setattr(model.network, "named_modules", lambda *args, **kwargs: iter(modules))
    with pytest.warns(UserWarning, match="freeze_position_embeddings has no effect"):
        run(model, groups, dataclasses.replace(FAST, freeze_position_embeddings=True, max_steps=1))


def test_training_prints_nothing(model, groups, validation, capfd):
    run(model, groups, validation=validation)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("checkpoints", [True, False])
def test_tensorboard_gets_loss_rate_and_metric(model, groups, validation, tmp_path, monkeypatch, capfd, checkpoints):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(FAST, max_steps=4, eval_every=2, trainer_args={"report_to": "tensorboard"})
    folder = {"checkpoint_dir": tmp_path / "ck"} if checkpoints else {}
    rows = run(model, groups, settings, validation=validation, **folder)
    assert capfd.readouterr() == ("", "")
    (file,) = tmp_path.rglob("*tfevents*")
    assert file.relative_to(tmp_path).parts[: 1 + checkpoints] == (("ck", "runs") if checkpoints else ("runs",))
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    for tag, column in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/RR@10", "RR@10")):
        expected = [(row["step"], row[column]) for row in rows if column in row]
        assert [event.step for event in events.Scalars(tag)] == [step for step, _ in expected]
        np.testing.assert_allclose([e.value for e in events.Scalars(tag)], [v for _, v in expected], rtol=1e-5)


@every_loss
def test_accumulation_gives_the_gradient_of_one_large_batch(new, train_part, loss):
    ranked = train_part.results[train_part.results["rank"] < 3 + train_part.results["qid"].str[-1].astype(int) % 5]
    groups = from_qrels(ranked, train_part.qrels, depth=None, n_negatives=9, min_relevance=1)[0]  # of unequal lengths
    plain = dataclasses.replace(
        FAST, max_steps=2, dropout=0.0, clip_norm=None, warmup=0, weight_decay=0, learning_rate=1.0, trainer_args=SGD
    )
    whole, parts = new(), new()
    run(whole, groups, dataclasses.replace(plain, batch_size=16), loss=loss)
    run(parts, groups, dataclasses.replace(plain, batch_size=4, gradient_accumulation=4), loss=loss)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-5, rtol=0)


def test_the_gradient_is_clipped(new, groups):
    plain = dataclasses.replace(
        FAST, max_steps=1, dropout=0.0, clip_norm=None, warmup=0, weight_decay=0, learning_rate=1.0, trainer_args=SGD
    )
    changes = {}
    for clip_norm in (None, 1e-2, 1e3):
        model = new()
        before = weights(model)
        run(model, groups, dataclasses.replace(plain, clip_norm=clip_norm))
        changes[clip_norm] = weights(model) - before
    norm = changes[None].norm().item()
    assert 1e-2 < norm < 1e3
    torch.testing.assert_close(changes[1e-2], changes[None] * 1e-2 / norm, atol=1e-6, rtol=1e-3)
    assert torch.equal(changes[1e3], changes[None])


# ---- global state


def test_equal_seeds_give_equal_weights_and_leave_the_global_random_states(new, groups):
    models = [new() for _ in range(3)]
    states = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(model, groups, dataclasses.replace(FAST, seed=seed))
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == numpy_state).all()


def test_training_leaves_the_state_of_accelerate(new, groups):
    AcceleratorState._reset_state()  # of earlier tests
    mine = Accelerator(cpu=True, gradient_accumulation_steps=4)
    run(new(dtype="bfloat16"), groups, dataclasses.replace(FAST, max_steps=1))
    assert mine.gradient_state.num_steps == 4
    assert Accelerator(cpu=True).mixed_precision == "no"


def test_training_leaves_the_choice_of_algorithms(new, groups, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fitter = dataclasses.replace(FAST, max_steps=1, trainer_args={"full_determinism": True})
    run(new(), groups, fitter)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


def test_dtype_decides_the_precision(new, groups, monkeypatch):
    brief = dataclasses.replace(FAST, max_steps=2)
    expected = new(dtype="float32")
    run(expected, groups, brief)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # e.g. by `accelerate launch`, or another Trainer
    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="bf16")
    found = new(dtype="float32")
    run(found, groups, brief)
    assert weights(found).equal(weights(expected))
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    AcceleratorState._reset_state()


def test_gradient_checkpointing_ends_with_the_run(model, groups):
    run(model, groups, dataclasses.replace(FAST, max_steps=1, trainer_args={"gradient_checkpointing": True}))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.network.modules())
    assert weights(pickle.loads(pickle.dumps(model))).equal(weights(model))


# ---- batches


def plan_of(settings, groups, *, width=16, head_is_new=True, **options):
    return plan_training(settings, groups, width=width, head_is_new=head_is_new, **options)


@pytest.mark.parametrize(("epochs", "updates"), [(1.1, 110), (0.07, 7), (0.145, 15), (1, 100)])
def test_a_part_of_an_epoch(epochs, updates):
    assert plan_of(Hyperparameters(batch_size=3, epochs=epochs), make_groups(300)).updates == updates


def schedule_of(groups, settings=FAST) -> BatchSchedule:
    return BatchSchedule(groups, plan_of(settings, groups), seed=1)


def test_each_epoch_has_each_query_once_in_a_new_order(groups):
    schedule = list(schedule_of(groups, dataclasses.replace(FAST, batch_size=10)))
    assert len(schedule) == 3 * 7
    epochs = [[pair for batch in schedule[i : i + 7] for pair in batch] for i in (0, 7, 14)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(query, number) for query in range(64)]
    assert [query for query, _ in epochs[0]] != [query for query, _ in epochs[1]]


def make_groups(n: int) -> Groups:
    """Make `n` queries with a positive and a negative of random lengths."""
    rng = np.random.default_rng(0)
    texts = ["x" * length for length in rng.integers(1, 500, 2 * n)]
    documents, labels = np.arange(2 * n, dtype=np.int32), np.tile(np.float32([1, 0]), n)
    return Groups([f"q{i:05}" for i in range(n)], ["y"] * n, texts, Ragged(documents, [2] * n), Ragged(labels, [2] * n))


@pytest.mark.parametrize(("n", "chance"), [(128, 7 / 127), (500, 7 / 499)])
def test_batches_are_random(n, chance):
    """The share of pairs of queries in a batch that meet again in the next epoch is small, see docs/limits.md."""
    schedule = list(schedule_of(make_groups(n), Hyperparameters(epochs=2, batch_size=8)))
    first, second = (
        {frozenset(pair) for batch in epoch for pair in itertools.combinations([query for query, _ in batch], 2)}
        for epoch in (schedule[: len(schedule) // 2], schedule[len(schedule) // 2 :])
    )
    assert len(first & second) / len(first) < chance + 0.1


SHORT = {"epochs": None, "batch_size": None, "learning_rate": None}


@pytest.mark.parametrize(
    ("n", "settings", "expected"),
    [
        (100, SHORT, {"batch_size": 4, "updates": 300, "epochs": 12, "learning_rate": 2e-4}),
        (300, SHORT, {"batch_size": 8, "updates": 304, "epochs": 8}),
        (1000, SHORT, {"batch_size": 16, "updates": 315, "epochs": 5}),
        (10_000, SHORT, {"batch_size": 16, "updates": 625, "epochs": 1}),
        (300, {"epochs": 2, "batch_size": 30, "learning_rate": 3e-5}, {"updates": 20, "learning_rate": 3e-5}),
        (300, {"max_steps": 7, "batch_size": 10}, {"updates": 7, "updates_per_epoch": 30}),
        (300, {"gradient_accumulation": 4, "epochs": 1}, {"batch_size": 32, "updates": 10}),
    ],
)
def test_what_is_left_open_suits_the_data(n, settings, expected):
    plan = plan_of(Hyperparameters(**settings), make_groups(n))
    assert {name: getattr(plan, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("width", "head_is_new", "rate"),
    [(384, True, 2e-4), (768, True, 2.5e-5), (1024, True, 1.1e-5), (384, False, 5e-5), (768, False, 6.3e-6)],
)
def test_a_wide_or_trained_model_learns_more_slowly(width, head_is_new, rate):
    plan = plan_of(Hyperparameters(), make_groups(300), width=width, head_is_new=head_is_new)
    assert plan.learning_rate == rate


@pytest.mark.parametrize(
    ("queries", "depth", "eval_every", "expected"),
    [
        (20, 10, None, (31, 20)),  # cheap: eleven validations on all queries
        (200, 20, None, (152, 80)),
        (2000, 100, None, (152, 50)),  # 200,000 pairs, while training has 4,864
        (2000, 100, 100, (100, 2000)),  # as the user says
    ],
)
def test_validation_is_bounded(queries, depth, eval_every, expected):
    results = pd.DataFrame({"qid": np.repeat(np.arange(queries), depth).astype(str), "docno": "d"})
    validation = Validation(results, pd.DataFrame(), RR @ 10)
    plan = plan_of(Hyperparameters(eval_every=eval_every), make_groups(300), validation=validation)
    assert (plan.eval_every, plan.validation_queries) == expected


def test_queries_of_a_batch_have_similar_lengths():
    schedule = schedule_of(make_groups(1000))
    ranges = [np.ptp([schedule.lengths[query] for query, _ in batch]) for batch in schedule]
    assert np.mean(ranges) < np.ptp(schedule.lengths) / 4


def test_the_collator_puts_each_pair_in_its_slot(groups, encoder):
    drawn = groups.draw_all([(i, 0) for i in range(5)], seed=0)
    drawn[2] = dataclasses.replace(drawn[2], texts=drawn[2].texts[:2], labels=drawn[2].labels[:2])
    batch = Collator(encoder, max_tokens=60, max_pairs=3)(drawn)
    assert batch["mask"].sum(1).tolist() == [4, 4, 2, 4, 4]
    assert batch["labels"].sum().item() == sum(group.labels.sum() for group in drawn)
    flat = [ids for chunk in batch["chunks"] for ids in chunk["input_ids"].tolist()]
    assert all(len(chunk["input_ids"]) <= 3 for chunk in batch["chunks"])
    pairs = [(group.query, text) for group in drawn for text in group.texts]
    slots = batch["mask"].flatten().nonzero().squeeze(-1).tolist()
    for slot, ids in zip(batch["slots"].tolist(), flat, strict=True):
        query, text = pairs[slots.index(slot)]
        expected = encoder([query], [text])["input_ids"][0]
        assert ids[: len(expected)] == expected
        assert not any(ids[len(expected) :])  # padding


def test_later_epochs_and_stages_tokenize_nothing(ce, train_part, dev_part, monkeypatch):
    monkeypatch.setattr(PairEncoder, "truncation_rates", lambda *args: (0.0, 0.0))  # of a sample, once per stage
    calls = record_calls(monkeypatch)
    once = Contrastive(n_negatives=99, batch_size=8, epochs=1, eval_every=4)
    found = []
    for fitter in (once, dataclasses.replace(once, epochs=3), once >> once):
        calls.clear()
        ce.clone().fit(train_part.results, train_part.qrels, dev_part.results, dev_part.qrels, fitter=fitter)
        found.append(len(calls))
    assert found[0] == found[1] == found[2] > 0


def test_texts_that_are_looked_up_are_not_kept(new, groups, monkeypatch):
    calls = record_calls(monkeypatch)
    found = []
    for epochs in (1, 2, 3):
        calls.clear()
        run(new(), dataclasses.replace(groups, load=list), dataclasses.replace(FAST, epochs=epochs))
        found.append(len(calls))
    assert found[2] - found[1] == found[1] - found[0] > 0


def test_workers_of_the_data_loader_give_the_same_weights(new, groups, capfd):
    models = [new() for _ in range(2)]
    run(models[0], groups)
    run(models[1], groups, dataclasses.replace(FAST, trainer_args={"dataloader_num_workers": 2}))
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert capfd.readouterr() == ("", "")


# ---- on a CPU: dropout and attention


PLAIN_DROPOUT = {  # families with probabilities in their modules or configuration rather than in torch.nn.Dropout
    "Bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 2},
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "Flaubert": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "OPT": {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "num_attention_heads": 2},
    "XLM": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", PLAIN_DROPOUT)
def test_dropout_is_set_in_every_family(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(vocab_size=20, pad_token_id=0, **PLAIN_DROPOUT[family])
        config.num_labels = 1
        network = getattr(transformers, f"{family}ForSequenceClassification")(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        before = training_state(network)
        for dropout, varies in ((0.0, False), (0.5, True)):
            with training_mode(network, Hyperparameters(dropout=dropout), torch.float32), torch.no_grad():
                network.train()
                first, second = (network(torch.tensor([[5, 6, 7, 8, 2]])).logits for _ in range(2))
            assert bool((first != second).any()) is varies
        assert training_state(network) == before


def test_dropout_keeps_the_right_share_and_its_gradient():
    linear = torch.nn.Dropout(0.1)
    network = type("Network", (torch.nn.Module,), {"config": type("Config", (), {"_attn_implementation": None})})()
    network.dropout = linear
    cpu.patch_for_cpu(network, torch.float32)
    x = torch.full((400, 500), 2.0, requires_grad=True)
    torch.manual_seed(3)
    y = linear(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 2 / 0.9])
    assert (y == 0).float().mean() == pytest.approx(0.1, abs=0.003)  # 4.5 standard errors
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)
    torch.manual_seed(3)
    torch.testing.assert_close(linear(x), y)
    assert not torch.equal(linear(x), y)
    assert linear.eval()(x) is x


def test_our_attention_equals_the_eager_one(model, encoder):
    batch = encoder.pad(encoder(["w1", "w2 w3"], ["w4 w5 w6", "w7"]), range(2))
    scores = []
    for name in ("eager", CPU_ATTENTION):
        model.network.set_attn_implementation(name)
        scores.append(forward(model.network, batch))
    torch.testing.assert_close(*scores)


# ---- on a CPU: threads


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads, and more chunks a step than that."""
    monkeypatch.setattr(batches, "MIN_TOKENS_PER_THREAD", 50)
    monkeypatch.setitem(batches.TOKENS_PER_PASS, "cpu", 120)
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def record_threads(model) -> set[int]:
    """Collect the threads that training's forward passes run in."""
    threads: set[int] = set()

    def hook(network, inputs, output):
        if output.logits.requires_grad:
            threads.add(threading.get_ident())

    model.network.register_forward_hook(hook)
    return threads


@every_loss
def test_threads_give_the_same_weights(new, groups, two_threads, loss):
    settings = dataclasses.replace(FAST, dropout=0.0, max_steps=4, learning_rate=0.3, trainer_args=SGD)
    models = [new() for _ in range(2)]
    threads = record_threads(models[0])
    history = [run(models[0], groups, settings, loss=loss)]
    assert threads
    assert threading.get_ident() not in threads
    torch.set_num_threads(1)
    history.append(run(models[1], groups, settings, loss=loss))
    torch.set_num_threads(2)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in history), rtol=1e-4)


@pytest.mark.filterwarnings("error")
def test_threads_are_reproducible_with_dropout(new, groups, two_threads, tmp_path):
    settings = dataclasses.replace(FAST, dropout=0.3)
    models = [new() for _ in range(2)]
    for model in models:
        run(model, groups, settings)
    assert torch.equal(weights(models[0]), weights(models[1]))
    options = {"settings": dataclasses.replace(settings, eval_every=2), "checkpoint_dir": tmp_path}
    with interrupted_at(3, error=Killed), pytest.raises(Killed):
        run(new(), groups, loss=interruptible_lce, **options)
    resumed = new()
    run(resumed, groups, **options)
    assert torch.equal(weights(resumed), weights(models[0]))


@pytest.mark.parametrize("reason", ["hooks", "random numbers", "numpy's random numbers", "memory"])
def test_models_that_do_not_support_threads_are_trained_in_one(new, groups, two_threads, monkeypatch, reason):
    models = [new() for _ in range(2)]
    calls, number = [], torch.randn if reason == "random numbers" else np.random.standard_normal
    if reason == "memory":
        monkeypatch.setattr(cpu, "MAX_GRADIENT_BYTES", 4 * weights(models[0]).numel())
    for model in models:
        threads = record_threads(model)
        if reason == "hooks":
            model.network.classifier.bias.register_post_accumulate_grad_hook(calls.append)
        elif reason != "memory":
            model.network.classifier.register_forward_hook(lambda module, x, output: output + float(number(())) / 10)
        run(model, groups, dataclasses.replace(FAST, max_steps=3))
        assert threads == {threading.get_ident()}
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert bool(calls) == (reason == "hooks")


def test_threads_in_bfloat16(new, groups, two_threads):
    models, cached = [new(dtype="bfloat16") for _ in range(2)], set()
    for model in models:
        threads = record_threads(model)
        model.network.classifier.register_forward_pre_hook(lambda *_: cached.add(torch.is_autocast_cache_enabled()))
        run(model, groups, dataclasses.replace(FAST, max_steps=4), loss=losses.ranknet)
        assert threading.get_ident() not in threads
    assert cached == {False}
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_gradient_checkpointing_repeats_the_dropout(new, groups, two_threads, monkeypatch):
    settings = dataclasses.replace(FAST, dropout=0.3, max_steps=4, learning_rate=0.3, trainer_args=SGD)
    models = [new() for _ in range(2)]
    run(models[0], groups, dataclasses.replace(settings, trainer_args={**SGD, "gradient_checkpointing": True}))
    monkeypatch.setattr(cpu, "supports_threads", lambda model, chunk: False)
    run(models[1], groups, settings)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-6, rtol=0)


def test_an_error_in_a_thread_is_raised_when_no_other_thread_is_at_work(model, groups, two_threads):
    failed, at_work = threading.Event(), []

    def hook(network, inputs, output):
        if threading.current_thread() is threading.main_thread():  # the check for random numbers
            return
        if not failed.is_set():
            failed.set()
            raise RuntimeError("nothing to do with memory")
        at_work.append(True)
        at_work.pop()

    model.network.register_forward_hook(hook)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="nothing to do"):
        run(model, groups)
    assert failed.is_set()
    assert not at_work
    assert threading.active_count() <= before


# ---- bounded memory


@pytest.mark.parametrize("loss", [losses.localized_contrastive, losses.ranknet])
def test_gradient_caching_gives_the_same_weights(new, groups, loss):
    settings = dataclasses.replace(FAST, dropout=0.0, max_steps=4, learning_rate=0.3, trainer_args=SGD)
    models = [new() for _ in range(2)]
    for model, pairs in zip(models, (None, 5), strict=True):
        run(model, groups, dataclasses.replace(settings, pairs_per_pass=pairs), loss=loss)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


@every_loss
def test_gradient_caching_repeats_the_dropout(new, groups, encoder, loss):
    batch = Collator(encoder, max_tokens=200, max_pairs=5)(groups.draw_all([(i, 0) for i in range(6)], seed=0))

    def loss_of(pair_scores):
        scores = torch.zeros(batch["mask"].numel()).index_put((batch["slots"],), pair_scores)
        return loss(scores.view(batch["mask"].shape), batch["labels"], batch["mask"])

    def loss_and_score_grads(parts):
        scores = torch.cat([part.detach() for part in parts]).requires_grad_()
        value = loss_of(scores)
        return value.detach(), torch.autograd.grad(value, scores)[0].split([len(part) for part in parts])

    networks = [new().network.train() for _ in range(2)]
    torch.manual_seed(0)
    loss_of(torch.cat([forward(networks[0], chunk) for chunk in batch["chunks"]])).backward()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    gradient_cache_step(networks[1], batch["chunks"], loss_and_score_grads, Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), after)
    for plain, cached in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(plain.grad, cached.grad, atol=1e-5, rtol=0)


@every_loss
def test_gradient_caching_of_long_lists(new, train_part, loss):
    groups = from_qrels(
        train_part.results, train_part.qrels, depth=None, n_negatives=99, n_positives=None, min_relevance=1
    )[0]
    settings = Hyperparameters(dropout=0.0, max_steps=1, batch_size=4, learning_rate=1.0, warmup=0, trainer_args=SGD)
    models = [new() for _ in range(2)]
    before = weights(models[0])
    for model, pairs in zip(models, (None, 8), strict=True):
        run(model, groups, dataclasses.replace(settings, pairs_per_pass=pairs), loss=loss)
    assert (weights(models[0]) - before).abs().max() > 1e-4
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


def test_gradient_caching_is_used_only_beyond_pairs_per_pass(new, groups, monkeypatch):
    monkeypatch.setitem(batches.TOKENS_PER_PASS, "cpu", 120)  # several chunks
    for pairs_per_pass, is_cached in ((64, False), (16, True)):
        model, has_graph = new(), []
        model.network.register_forward_hook(lambda *args, seen=has_graph: seen.append(args[-1].logits.requires_grad))
        run(model, groups, dataclasses.replace(FAST, max_steps=1, pairs_per_pass=pairs_per_pass))
        assert (False in has_graph) == is_cached


def test_a_step_with_too_many_tokens_for_the_memory_uses_gradient_caching(new, groups, monkeypatch):
    settings = dataclasses.replace(FAST, dropout=0.0, max_steps=2, learning_rate=0.3, trainer_args=SGD)
    models = [new() for _ in range(2)]
    run(models[0], groups, settings)
    tokens, has_graph = [], []

    def hook(network, inputs, kwargs, output):
        tokens.append(kwargs["input_ids"].numel())
        has_graph.append(output.logits.requires_grad)

    models[1].network.register_forward_hook(hook, with_kwargs=True)
    monkeypatch.setattr(gradient_cache, "MAX_ACTIVATION_BYTES", 1)
    run(models[1], groups, settings)
    assert max(tokens) <= 32  # as few as a pair may have, padded
    assert has_graph.count(False) == has_graph.count(True) > 2  # each chunk twice
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("threads", "limit", "halved"), [(1, 10, [32, 16]), (2, 5, [8])])
def test_running_out_of_memory_halves_the_pass_and_leaves_the_gradient(
    new, groups, caplog, request, threads, limit, halved
):
    if threads == 2:
        request.getfixturevalue("two_threads")
    settings = dataclasses.replace(FAST, dropout=0.0, max_steps=4, learning_rate=0.3, trainer_args=SGD)
    models, sizes = [new() for _ in range(2)], []
    run(models[0], groups, settings)

    def hook(network, inputs, output):
        sizes.append(len(output.logits))
        if len(output.logits) > limit and len(sizes) > 1:  # in a later step
            if not output.logits.requires_grad:
                run_out()
            output.logits.register_hook(lambda gradient: run_out())  # when some gradients have been added

    def run_out():
        raise torch.OutOfMemoryError

    models[1].network.register_forward_hook(hook)
    run(models[1], groups, settings)
    assert min(sizes) <= limit < max(sizes)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)
    messages = [record.message.split(";")[0] for record in caplog.records if "pairs per pass" in record.message]
    assert messages == [f"out of memory with {pairs} pairs per pass" for pairs in halved]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("too large")])
def test_another_error_and_a_single_pair_that_does_not_fit_are_raised(model, groups, error):
    def fail(network, inputs, output):
        raise error

    model.network.register_forward_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        run(model, groups)


# ---- what goes wrong


def test_a_non_finite_loss_is_reported_with_step_and_queries(model, groups):
    def broken(scores, labels, mask):
        return scores.sum() * float("nan")

    with pytest.raises(ValueError, match=r"loss must be finite; got nan at step 1 \(queries tr"):
        run(model, groups, loss=broken)
    assert not model.network.training


@pytest.mark.parametrize("steps", [4, 20])
def test_constant_scores_raise_a_warning(model, groups, steps):
    torch.nn.init.zeros_(model.network.classifier.weight)
    with pytest.warns(UserWarning, match="All documents of a query get nearly the same score") as caught:
        run(model, groups, dataclasses.replace(FAST, learning_rate=1e-9, max_steps=steps))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a positive number or None; got 0"),
        ({"epochs": -1}, "epochs must be a positive number or None; got -1"),
        ({"max_steps": 2.5}, "max_steps must be a positive integer or None; got 2.5"),
        ({"gradient_accumulation": None}, "gradient_accumulation must be a positive integer; got None"),
        ({"batch_size": True}, "batch_size must be a positive integer or None; got True"),
        ({"warmup": -0.1}, "warmup must be a non-negative number; got -0.1"),
        ({"seed": None}, "seed must be a non-negative integer; got None"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"patience": 0}, "patience must be a positive integer or None; got 0"),
        ({"metric": 10}, "metric must be an ir_measures measure such as nDCG @ 10; got 10"),
        ({"metric": "nonsense"}, "metric must be an ir_measures measure such as nDCG @ 10; got 'nonsense'"),
        ({"trainer_args": {"learning_rate": 1}}, "trainer_args must not set 'learning_rate'. Use learning_rate"),
        ({"trainer_args": {"num_train_epochs": 1}}, "trainer_args must not set 'num_train_epochs'. Use epochs"),
        ({"trainer_args": {"bf16": True}}, "trainer_args must not set 'bf16'. Use MonoCE's dtype instead"),
        ({"trainer_args": {"save_only_model": True}}, "trainer_args must not set 'save_only_model', which isn't"),
        ({"trainer_args": {"eval_steps": 5}}, "trainer_args must not set 'eval_steps'. Use eval_every"),
        ({"trainer_args": {"label_smoothing_factor": 0.1}}, "'label_smoothing_factor', which isn't supported"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32; got 4294967296"),
        ({"trainer_args": {"fsdp": True}}, "trainer_args must not set 'fsdp', which isn't supported; .* torchrun"),
        ({"trainer_args": {"lr": 1}}, "trainer_args must be arguments of transformers.TrainingArguments; got 'lr'"),
        ({"trainer_args": ["fsdp"]}, "trainer_args must be a dictionary; got list"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Hyperparameters(**settings)


def test_a_metric_may_be_given_by_name():
    assert Hyperparameters(metric="RR@10").metric == RR @ 10


# ---- interruption


@pytest.mark.parametrize("step", [3, 12, 19])  # in the first, the second and the last of three epochs
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_gives_the_uninterrupted_weights(new, groups, validation, tmp_path, step, accumulation):
    settings = dataclasses.replace(FAST, eval_every=2, gradient_accumulation=accumulation, epochs=3 * accumulation)
    options = {"checkpoint_dir": tmp_path / "ck", "identity": {"data": "x"}, "validation": validation}
    whole, resumed = new(), new()
    expected = run(whole, groups, settings, validation=validation)
    with interrupted_at(step, error=Killed), pytest.raises(Killed):
        run(new(), groups, settings, loss=interruptible_lce, **options)
    found = run(resumed, groups, settings, **options)
    assert torch.equal(weights(resumed), weights(whole))
    columns = ["step", "epoch", "loss", "learning_rate", "RR@10"]
    pd.testing.assert_frame_equal(pd.DataFrame(found)[columns], pd.DataFrame(expected)[columns])
    again = new()  # nothing is left to do
    run(again, groups, settings, **options)
    assert torch.equal(weights(again), weights(whole))


def test_a_run_that_stopped_early_stays_stopped(new, groups, validation, tmp_path):
    still = dataclasses.replace(FAST, learning_rate=1e-12, eval_every=1, patience=3)
    options = {"checkpoint_dir": tmp_path, "validation": validation}
    rows = [run(new(), groups, still, **options) for _ in range(2)]
    assert [len(r) for r in rows] == [4, 4]


@pytest.mark.parametrize("damage", ["no state", "half a state", "no optimizer", "no random state"])
def test_an_incomplete_checkpoint_is_never_used(new, groups, tmp_path, caplog, damage):
    settings = dataclasses.replace(FAST, eval_every=4)
    run(new(), groups, settings, checkpoint_dir=tmp_path)
    (newest,) = tmp_path.glob("checkpoint-*")
    incomplete = Path(shutil.copytree(newest, tmp_path / "checkpoint-99"))
    state = incomplete / "trainer_state.json"
    if damage == "half a state":
        state.write_text(state.read_text()[:-20])
    else:
        names = {"no state": state.name, "no optimizer": "optimizer.pt", "no random state": "rng_state.pth"}
        (incomplete / names[damage]).unlink()
    with caplog.at_level(logging.INFO):
        run(new(), groups, settings, checkpoint_dir=tmp_path)
    assert f"resuming from {newest}" in caplog.text
    assert not incomplete.exists()


def test_a_checkpoint_of_another_run_is_refused(model, groups, tmp_path):
    run(model, groups, checkpoint_dir=tmp_path, identity={"fitter": "a", "data": "b"})
    with pytest.raises(ValueError, match="holds a checkpoint of another training run: data is b there and c here"):
        run(model, groups, checkpoint_dir=tmp_path, identity={"fitter": "a", "data": "c"})
    (state,) = tmp_path.glob("*/trainer_state.json")
    content = json.loads(state.read_text())
    del content["stateful_callbacks"]["CheckpointCallback"]
    state.write_text(json.dumps(content))  # as if another program's Trainer had written it
    with pytest.raises(ValueError, match=r"must not have checkpoints of another program; got checkpoint-24. Use"):
        run(model, groups, checkpoint_dir=tmp_path, identity={"fitter": "a", "data": "b"})


def test_ctrl_c_leaves_the_best_weights(model, groups, validation, caplog):
    history: list[dict] = []
    with interrupted_at(20), pytest.raises(KeyboardInterrupt):
        run(model, groups, loss=interruptible_lce, validation=validation, history=history)
    assert metric(model, validation) == pytest.approx(max(row.get("RR@10", 0) for row in history))
    assert not model.network.training
    assert "interrupted at step 20 of 24; the re-ranker keeps the best weights so far" in caplog.text
