import dataclasses
import json
import logging
import random
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from ir_measures import RR

from pyterrier_msft import losses
from pyterrier_msft.data.labels import from_qrels
from pyterrier_msft.model.encoding import pad
from pyterrier_msft.model.first_token import CPU_ATTENTION
from pyterrier_msft.model.loading import load_model
from pyterrier_msft.model.scoring import forward
from pyterrier_msft.training.batches import _Batches, _Collator
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.trainer import STATE_FILE, _dropout_of, _ListTrainer, train
from pyterrier_msft.training.validation import Validation

# A listwise loss gives some biases no gradient, which AdamW turns into noise: where weights are compared, SGD.
SGD = {"optim": "sgd"}
ALL_LOSSES = [
    losses.localized_contrastive, losses.multi_positive, losses.binary_cross_entropy, losses.ranknet,
    losses.weighted_ranknet, losses.lambda_loss, losses.margin_mse, losses.kl_divergence, losses.listnet,
    losses.list_mle, losses.position_aware_list_mle, losses.adr_mse,
    losses.combine((losses.ranknet, 0.5), (losses.localized_contrastive, 1.0)),
]  # fmt: skip
FAST = Hyperparameters(learning_rate=1e-2, epochs=3, batch_size=8, metric=RR @ 10)


@pytest.fixture
def model(backbone):
    return load_model(backbone, seed=1)[0]


every_loss = pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: getattr(loss, "__name__", None) or repr(loss))


@pytest.fixture(scope="module")
def groups(train_part):
    return from_qrels(train_part.results, train_part.qrels, depth=None, n_negatives=3, min_relevance=1)[0]


@pytest.fixture(scope="module")
def validation(dev_part):
    return Validation(dev_part.results, dev_part.qrels, RR @ 10)


def run(model, encoder, groups, settings=FAST, *, loss=losses.localized_contrastive, **options):
    return train(model, encoder, groups, loss, settings, dtype=torch.float32, **options)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- learning


def test_training_raises_the_metric_on_other_queries(model, encoder, groups, validation):
    before = validation.measure(model, encoder, torch.float32)
    run(model, encoder, groups)
    assert validation.measure(model, encoder, torch.float32) > before + 0.2


def test_a_documents_best_passage_counts_in_validation(model, encoder, monkeypatch):
    results = pd.DataFrame({"qid": "q", "query": "w1", "docno": ["a", "a", "b"], "text": "w2"})
    qrels = pd.DataFrame({"qid": ["q"], "docno": ["a"], "label": [1]})
    monkeypatch.setattr("pyterrier_msft.training.trainer.score_pairs", lambda *_, **__: np.array([3.0, 0.0, 1.0]))
    assert Validation(results, qrels, RR @ 10).measure(model, encoder, torch.float32) == 1


def test_history(model, encoder, groups, validation):
    rows = pd.DataFrame(run(model, encoder, groups, validation=validation))
    assert rows["step"].tolist() == list(range(1, 25))
    assert rows["epoch"].tolist() == pytest.approx([step / 8 for step in rows["step"]])
    assert rows["loss"].iloc[-4:].mean() < rows["loss"].iloc[:4].mean()
    assert rows["learning_rate"].max() <= 1e-2
    assert rows["learning_rate"].iloc[-1] < rows["learning_rate"].max() / 10
    assert rows["RR@10"].notna().sum() == 12  # every second of 24 updates
    assert rows["seconds"].is_monotonic_increasing
    assert (rows["pairs_per_second"] > 0).all()


def test_the_best_weights_remain(model, encoder, groups, validation, monkeypatch):
    values, seen = iter([0.1, 0.9, 0.4, 0.9, 0.2]), []

    def measure(self, model, encoder, dtype):
        seen.append(weights(model).clone())
        return next(values)

    monkeypatch.setattr(Validation, "measure", measure)
    run(model, encoder, groups, dataclasses.replace(FAST, max_steps=5, eval_every=1), validation=validation)
    assert torch.equal(weights(model), seen[1])
    assert not torch.equal(weights(model), seen[3])


def test_patience(model, encoder, groups, validation):
    still = dataclasses.replace(FAST, learning_rate=1e-12, eval_every=1, patience=3)
    assert len(run(model, encoder, groups, still, validation=validation)) == 4


def test_max_steps_goes_on_over_epochs(model, encoder, groups):
    rows = run(model, encoder, groups, dataclasses.replace(FAST, max_steps=11))
    assert rows[-1]["step"] == 11
    assert rows[-1]["epoch"] == pytest.approx(11 / 8)


def test_the_model_is_left_in_order(model, encoder, groups):
    attention, dropout = (
        model.config._attn_implementation,
        [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)],
    )
    run(model, encoder, groups, dataclasses.replace(FAST, dropout=0.0, freeze_position_embeddings=True, max_steps=2))
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == dropout
    assert model.config._attn_implementation == attention
    assert "forward" not in vars(model)


def test_frozen_position_embeddings_stay(model, encoder, groups):
    before = model.bert.embeddings.position_embeddings.weight.clone()
    run(model, encoder, groups, dataclasses.replace(FAST, freeze_position_embeddings=True, max_steps=3))
    assert torch.equal(model.bert.embeddings.position_embeddings.weight, before)


def test_no_position_embeddings_to_freeze_is_said(model, encoder, groups, monkeypatch):
    modules = [pair for pair in model.named_modules() if not pair[0].endswith("position_embeddings")]
    monkeypatch.setattr(model, "named_modules", lambda *args, **kwargs: iter(modules))
    with pytest.warns(UserWarning, match="no position embeddings"):
        run(model, encoder, groups, dataclasses.replace(FAST, freeze_position_embeddings=True, max_steps=1))


def test_silence(model, encoder, groups, validation, capfd):
    run(model, encoder, groups, validation=validation)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("checkpoints", [True, False])
def test_tensorboard_gets_loss_rate_and_metric(
    model, encoder, groups, validation, tmp_path, monkeypatch, capfd, checkpoints
):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(FAST, max_steps=4, eval_every=2, trainer_args={"report_to": "tensorboard"})
    folder = {"checkpoint_dir": tmp_path / "ck"} if checkpoints else {}
    rows = run(model, encoder, groups, settings, validation=validation, **folder)
    assert capfd.readouterr() == ("", "")
    (file,) = tmp_path.rglob("*tfevents*")
    assert file.relative_to(tmp_path).parts[: 1 + checkpoints] == (("ck", "runs") if checkpoints else ("runs",))
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    for tag, column in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/RR@10", "RR@10")):
        expected = [(row["step"], row[column]) for row in rows if column in row]
        assert [event.step for event in events.Scalars(tag)] == [step for step, _ in expected]
        np.testing.assert_allclose([e.value for e in events.Scalars(tag)], [v for _, v in expected], rtol=1e-5)


def test_accumulated_steps_are_averaged(model, encoder, groups, backbone):
    plain = dataclasses.replace(
        FAST, max_steps=1, dropout=0.0, clip_norm=None, warmup=0, weight_decay=0, learning_rate=1.0,
        trainer_args=SGD,
    )  # fmt: skip
    whole_epoch = dataclasses.replace(plain, batch_size=64)
    in_parts = dataclasses.replace(plain, batch_size=32, gradient_accumulation=2)
    other = load_model(backbone, seed=1)[0]
    run(model, encoder, groups, whole_epoch)
    run(other, encoder, groups, in_parts)
    torch.testing.assert_close(weights(model), weights(other), atol=1e-6, rtol=0)


# ---- seeds


def test_equal_seeds_give_equal_weights_and_leave_the_global_state(encoder, groups, backbone):
    models = [load_model(backbone, seed=1)[0] for _ in range(3)]
    states = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(model, encoder, groups, dataclasses.replace(FAST, seed=seed))
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == numpy_state).all()


# ---- batches


def test_an_epoch_takes_each_query_once_in_another_order(groups):
    batches = list(_Batches(groups, dataclasses.replace(FAST, batch_size=10)))
    assert len(batches) == 3 * 7
    epochs = [[pair for batch in batches[i : i + 7] for pair in batch] for i in (0, 7, 14)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(query, number) for query in range(64)]
    assert [query for query, _ in epochs[0]] != [query for query, _ in epochs[1]]


def test_batches_are_of_like_length(groups):
    rng = np.random.default_rng(0)
    batches = _Batches(
        dataclasses.replace(groups, texts=["x" * n for n in rng.integers(1, 500, len(groups.texts))]), FAST
    )
    in_batch = [np.ptp([batches.lengths[query] for query, _ in batch]) for batch in batches]
    assert np.mean(in_batch) < np.ptp(batches.lengths) / 4


def test_collator_puts_each_pair_in_its_place(groups, encoder):
    drawn = [groups.draw(i, seed=0, epoch=0) for i in range(5)]
    drawn[2] = dataclasses.replace(drawn[2], texts=drawn[2].texts[:2], labels=drawn[2].labels[:2])
    batch = _Collator(encoder, max_tokens=60, max_pairs=3)(drawn)
    assert batch["mask"].sum(1).tolist() == [4, 4, 2, 4, 4]
    assert batch["labels"].sum().item() == sum(group.labels.sum() for group in drawn)
    flat = [ids for chunk in batch["chunks"] for ids in chunk["input_ids"].tolist()]
    assert all(len(chunk["input_ids"]) <= 3 for chunk in batch["chunks"])
    texts = [(group.query, text) for group in drawn for text in group.texts]
    slots = batch["mask"].flatten().nonzero().squeeze(-1).tolist()
    for place, ids in zip(batch["places"].tolist(), flat, strict=True):
        query, text = texts[slots.index(place)]
        expected = encoder([query], [text])["input_ids"][0]
        assert ids[: len(expected)] == expected
        assert not any(ids[len(expected) :])  # padding


# ---- dropout on a CPU


def test_dropout_keeps_the_right_share_and_its_gradient():
    module = torch.nn.Dropout(0.1)
    x = torch.full((400, 500), 2.0, requires_grad=True)
    torch.manual_seed(3)
    y = _dropout_of(module, x)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 2 / 0.9])
    assert (y == 0).float().mean() == pytest.approx(0.1, abs=0.003)  # 4.5 standard errors
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)
    torch.manual_seed(3)
    torch.testing.assert_close(_dropout_of(module, x), y)
    assert not torch.equal(_dropout_of(module, x), y)
    assert _dropout_of(module.eval(), x) is x


def test_dropout_of_the_backbone_is_ours_too(model, encoder, groups, monkeypatch):
    calls = []
    monkeypatch.setattr("pyterrier_msft.training.trainer._dropout_of", lambda module, x: calls.append(module) or x)
    run(model, encoder, groups, dataclasses.replace(FAST, max_steps=1))
    assert calls


def test_our_attention_is_the_eager_one(backbone, encoder):
    batch = pad(encoder.tokenizer, encoder(["w1", "w2 w3"], ["w4 w5 w6", "w7"]), range(2))
    model = load_model(backbone, seed=1)[0]
    scores = []
    for name in ("eager", CPU_ATTENTION):
        model.set_attn_implementation(name)
        scores.append(forward(model, batch))
    torch.testing.assert_close(*scores)


def test_training_leaves_the_model_as_it_was(model, encoder, groups):
    before = model.config._attn_implementation
    run(model, encoder, groups, dataclasses.replace(FAST, dropout=0.2, max_steps=1))
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


# ---- a CPU's cores


@pytest.fixture
def steps_by_core(monkeypatch):
    """Two cores, and more chunks a step; the number of steps that were computed so."""
    steps = []
    original = _ListTrainer._step_by_core

    def counted(self, model, inputs):
        assert len(inputs["chunks"]) > self.cores
        steps.append(len(inputs["chunks"]))
        return original(self, model, inputs)

    monkeypatch.setattr(_ListTrainer, "_step_by_core", counted)
    monkeypatch.setattr("pyterrier_msft.training.batches.FEWEST_TOKENS", 50)
    monkeypatch.setattr("pyterrier_msft.training.trainer.TOKENS_PER_PASS", {"cpu": 120})
    torch.set_num_threads(2)
    yield steps
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@every_loss
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_chunk_a_core_gives_the_same_weights(encoder, groups, backbone, steps_by_core, loss, accumulation):
    settings = dataclasses.replace(
        FAST, dropout=0.0, gradient_accumulation=accumulation, max_steps=4, learning_rate=0.3, trainer_args=SGD
    )
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    rows = [run(models[0], encoder, groups, settings, loss=loss)]
    assert len(steps_by_core) == 4 * accumulation
    torch.set_num_threads(1)
    rows.append(run(models[1], encoder, groups, settings, loss=loss))
    torch.set_num_threads(2)
    assert len(steps_by_core) == 4 * accumulation
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)
    np.testing.assert_allclose(*([row["loss"] for row in history] for history in rows), rtol=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_chunk_a_core_is_reproducible_with_dropout(encoder, groups, backbone, steps_by_core, tmp_path, monkeypatch):
    models = [load_model(backbone, seed=1)[0] for _ in range(3)]
    for model in models[:2]:
        run(model, encoder, groups, dataclasses.replace(FAST, dropout=0.3))
    assert torch.equal(weights(models[0]), weights(models[1]))
    settings = dataclasses.replace(FAST, dropout=0.3, eval_every=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 3)
        run(models[2], encoder, groups, settings, checkpoint_dir=tmp_path)
    resumed = load_model(backbone, seed=1)[0]
    run(resumed, encoder, groups, settings, checkpoint_dir=tmp_path)
    assert torch.equal(weights(resumed), weights(models[0]))
    assert len(steps_by_core) > 15


@pytest.mark.parametrize("how", ["hooks", "random numbers", "numpy's random numbers", "memory"])
def test_not_every_model_learns_by_core(encoder, groups, backbone, steps_by_core, monkeypatch, how):
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    calls, number = [], torch.randn if how == "random numbers" else np.random.standard_normal
    if how == "memory":
        size = 4 * weights(models[0]).numel()
        monkeypatch.setattr("pyterrier_msft.training.trainer.memory_of_machine", lambda: 8 * size)
    for model in models:
        if how == "hooks":
            model.classifier.bias.register_post_accumulate_grad_hook(calls.append)
        elif how != "memory":
            model.classifier.register_forward_hook(lambda module, inputs, output: output + float(number(())) / 10)
        run(model, encoder, groups, FAST)
    assert not steps_by_core
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert bool(calls) == (how == "hooks")


def test_a_chunk_a_core_in_bfloat16(encoder, groups, backbone, steps_by_core):
    models, cached = [load_model(backbone, seed=1)[0] for _ in range(2)], set()
    for model in models:
        model.classifier.register_forward_pre_hook(lambda *_: cached.add(torch.is_autocast_cache_enabled()))
        settings = dataclasses.replace(FAST, max_steps=4)
        train(model, encoder, groups, losses.ranknet, settings, dtype=torch.bfloat16)
    assert len(steps_by_core) == 8
    assert cached == {False}
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_checkpointed_layers_take_the_same_dropout_again(encoder, groups, backbone, steps_by_core, monkeypatch):
    settings = dataclasses.replace(FAST, dropout=0.3, max_steps=4, learning_rate=0.3)
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    run(models[0], encoder, groups, dataclasses.replace(settings, trainer_args={**SGD, "gradient_checkpointing": True}))
    assert not steps_by_core
    monkeypatch.setattr(_ListTrainer, "_apart", lambda self, model, chunk: False)
    run(models[1], encoder, groups, dataclasses.replace(settings, trainer_args=SGD))
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-6, rtol=0)


def test_an_error_on_one_core_comes_up_when_no_other_is_at_work(model, encoder, groups, steps_by_core, monkeypatch):
    failed, at_work = threading.Event(), []

    def fails(model, chunk):
        if threading.current_thread() is threading.main_thread():  # the question whether it draws random numbers
            return forward(model, chunk)
        if not failed.is_set():
            failed.set()
            raise RuntimeError("nothing to do with memory")
        at_work.append(True)
        scores = forward(model, chunk)
        at_work.pop()
        return scores

    monkeypatch.setattr("pyterrier_msft.training.trainer.forward", fails)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="nothing to do"):
        run(model, encoder, groups)
    assert len(steps_by_core) == 1
    assert not at_work
    assert threading.active_count() == before


# ---- bounded memory


@pytest.mark.parametrize("loss", [losses.localized_contrastive, losses.ranknet])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_bounded_memory_gives_the_same_weights(encoder, groups, backbone, loss, accumulation):
    settings = dataclasses.replace(
        FAST, dropout=0.0, gradient_accumulation=accumulation, max_steps=4, learning_rate=0.3, trainer_args=SGD
    )
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    for model, pairs in zip(models, (None, 5), strict=True):
        run(model, encoder, groups, dataclasses.replace(settings, pairs_per_pass=pairs), loss=loss)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


@every_loss
def test_bounded_memory_replays_dropout(encoder, groups, backbone, monkeypatch, loss):
    settings = dataclasses.replace(
        FAST, dropout=0.3, pairs_per_pass=5, max_steps=1, learning_rate=0.3, warmup=0, trainer_args=SGD
    )
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    run(models[0], encoder, groups, settings, loss=loss)
    # The same chunks with their graphs kept.
    monkeypatch.setattr("pyterrier_msft.training._ListTrainer._bounded", lambda self, inputs: False)
    run(models[1], encoder, groups, settings, loss=loss)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


@every_loss
def test_long_lists_in_bounded_memory_whatever_the_loss(encoder, train_part, backbone, loss):
    groups = from_qrels(
        train_part.results, train_part.qrels, depth=None, n_negatives=99, n_positives=None, min_relevance=1
    )[0]
    settings = Hyperparameters(dropout=0.0, max_steps=1, batch_size=4, learning_rate=1.0, warmup=0, trainer_args=SGD)
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    before = weights(models[0])
    for model, pairs in zip(models, (None, 8), strict=True):
        run(model, encoder, groups, dataclasses.replace(settings, pairs_per_pass=pairs), loss=loss)
    assert (weights(models[0]) - before).abs().max() > 1e-4
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


def test_a_step_too_large_for_the_memory_is_bounded_by_itself(encoder, groups, backbone, monkeypatch):
    settings = dataclasses.replace(FAST, dropout=0.0, max_steps=2, learning_rate=0.3, trainer_args=SGD)
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    run(models[0], encoder, groups, settings)
    tokens, grad = [], []

    def watched(model, chunk):
        tokens.append(chunk["input_ids"].numel())
        grad.append(torch.is_grad_enabled())
        return forward(model, chunk)

    monkeypatch.setattr("pyterrier_msft.training.trainer.forward", watched)
    monkeypatch.setattr("pyterrier_msft.training.trainer.tokens_that_fit", lambda *args, **options: 100)
    run(models[1], encoder, groups, settings)
    assert max(tokens) < 200  # parts are cut before they are padded to a multiple of 8; a step has 32 pairs
    assert grad.count(False) == grad.count(True) > 2  # each part twice
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("cores", "limit", "halved"), [(1, 10, [32, 16]), (2, 5, [8])])
def test_out_of_memory_halves_the_pass_at_the_same_gradient(
    encoder, groups, backbone, monkeypatch, caplog, request, accumulation, cores, limit, halved
):
    if cores == 2:
        request.getfixturevalue("steps_by_core")
    settings = dataclasses.replace(
        FAST, dropout=0.0, gradient_accumulation=accumulation, max_steps=4, learning_rate=0.3, trainer_args=SGD
    )
    models = [load_model(backbone, seed=1)[0] for _ in range(2)]
    run(models[0], encoder, groups, settings)

    def tight(model, chunk):
        scores = forward(model, chunk)
        sizes.append(len(scores))
        if len(scores) > limit and len(sizes) > accumulation:  # in the midst of an update
            if not scores.requires_grad:
                too_much()
            scores.register_hook(lambda gradient: too_much())  # when some gradients are summed already
        return scores

    def too_much():
        raise torch.OutOfMemoryError

    sizes: list[int] = []
    monkeypatch.setattr("pyterrier_msft.training.trainer.forward", tight)
    run(models[1], encoder, groups, settings)
    assert min(sizes) <= limit < max(sizes)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=0)
    said = [r.message.split(":")[0] for r in caplog.records if "memory" in r.message]
    assert said == [f"out of memory with {pairs} pairs a pass" for pairs in halved]


def test_another_error_or_a_single_pair_is_not_tried_again(model, encoder, groups, monkeypatch):
    def fails(error):
        def forward(model, chunk):
            raise error

        monkeypatch.setattr("pyterrier_msft.training.trainer.forward", forward)

    fails(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(model, encoder, groups)
    fails(torch.OutOfMemoryError("too large"))
    with pytest.raises(torch.OutOfMemoryError):
        run(model, encoder, groups)


# ---- what goes wrong


def test_a_loss_that_is_not_finite_stops_with_step_and_queries(model, encoder, groups):
    def broken(scores, labels, mask):
        return scores.sum() * float("nan")

    with pytest.raises(ValueError, match=r"expected a finite loss, found nan at step 1 \(queries tr"):
        run(model, encoder, groups, loss=broken)
    assert not model.training


@pytest.mark.parametrize("steps", [4, 20])
def test_constant_scores_raise_the_alarm(model, encoder, groups, steps):
    torch.nn.init.zeros_(model.classifier.weight)
    with pytest.warns(UserWarning, match="get the same score"):
        run(model, encoder, groups, dataclasses.replace(FAST, learning_rate=1e-9, max_steps=steps))


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0}, {"epochs": -1}, {"batch_size": 0}, {"warmup": -0.1}, {"dropout": 1.0}, {"patience": 0}],
)
def test_hyperparameters_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"expected {next(iter(wrong))} .* found {next(iter(wrong.values()))}"):
        Hyperparameters(**wrong)


# ---- interruption


class Killed(BaseException):
    """As if the process had been killed: nothing of ours catches it."""


def killed_at(monkeypatch, step: int):
    original = _ListTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(_ListTrainer, "training_step", training_step)


@pytest.mark.parametrize("step", [3, 12, 19])  # in the first, the second and the last of three epochs
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_gives_the_uninterrupted_weights(
    encoder, groups, validation, backbone, tmp_path, monkeypatch, step, accumulation
):
    settings = dataclasses.replace(FAST, eval_every=2, gradient_accumulation=accumulation, epochs=3 * accumulation)
    options = {"checkpoint_dir": tmp_path / "ck", "identity": {"data": "x"}, "validation": validation}
    whole, parts = load_model(backbone, seed=1)[0], load_model(backbone, seed=1)[0]
    expected = run(whole, encoder, groups, settings, validation=validation)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step)
        run(parts, encoder, groups, settings, **options)
    resumed = load_model(backbone, seed=1)[0]
    found = run(resumed, encoder, groups, settings, **options)
    assert torch.equal(weights(resumed), weights(whole))
    columns = ["step", "epoch", "loss", "learning_rate", "RR@10"]
    pd.testing.assert_frame_equal(pd.DataFrame(found)[columns], pd.DataFrame(expected)[columns])
    # And once more: finished trainings have nothing left to do.
    again = load_model(backbone, seed=1)[0]
    run(again, encoder, groups, settings, **options)
    assert torch.equal(weights(again), weights(whole))


def test_a_stopped_training_stays_stopped(encoder, groups, validation, backbone, tmp_path):
    still = dataclasses.replace(FAST, learning_rate=1e-12, eval_every=1, patience=3)
    options = {"checkpoint_dir": tmp_path, "validation": validation}
    rows = [run(load_model(backbone, seed=1)[0], encoder, groups, still, **options) for _ in range(2)]
    assert [len(r) for r in rows] == [4, 4]


def test_a_half_written_checkpoint_is_not_taken(encoder, groups, backbone, tmp_path, caplog):
    settings = dataclasses.replace(FAST, eval_every=4)
    run(load_model(backbone, seed=1)[0], encoder, groups, settings, checkpoint_dir=tmp_path)
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    shutil.copytree(newest, tmp_path / "checkpoint-99")
    (tmp_path / "checkpoint-99" / STATE_FILE).unlink()
    with caplog.at_level(logging.INFO):
        run(load_model(backbone, seed=1)[0], encoder, groups, settings, checkpoint_dir=tmp_path)
    assert f"resuming from {newest}" in caplog.text
    assert not (tmp_path / "checkpoint-99").exists()


def test_a_checkpoint_of_something_else_is_refused(model, encoder, groups, tmp_path):
    run(model, encoder, groups, checkpoint_dir=tmp_path, identity={"fitter": "a", "data": "b"})
    with pytest.raises(ValueError, match="found one of data b instead of c; give"):
        run(model, encoder, groups, checkpoint_dir=tmp_path, identity={"fitter": "a", "data": "c"})
    state = json.loads(next(tmp_path.glob(f"*/{STATE_FILE}")).read_text())
    assert state["identity"] == {"fitter": "a", "data": "b"}


def test_ctrl_c_leaves_the_best_weights(model, encoder, groups, validation, caplog, monkeypatch):
    original = _ListTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 20:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(_ListTrainer, "training_step", training_step)
    history: list[dict] = []
    with pytest.raises(KeyboardInterrupt):
        run(model, encoder, groups, validation=validation, history=history)
    best = max(row.get("RR@10", 0) for row in history)
    assert validation.measure(model, encoder, torch.float32) == pytest.approx(best)
    assert not model.training
    assert "interrupted at step 20 of 24; the re-ranker holds the best weights" in caplog.text
