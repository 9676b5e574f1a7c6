import contextlib
import threading

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_msft import MonoCE
from pyterrier_msft.model.batching import balance_batches, length_batches
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import load_model, token_limit
from pyterrier_msft.model.precision import resolve_device, resolve_dtype
from pyterrier_msft.model.scoring import compute_ahead, forward, score_pairs, split_blocks


@pytest.fixture(scope="module")
def model(backbone):
    return load_model(backbone, seed=3)[0]


def pairs(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    queries = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(n)]
    return queries, [" ".join(rng.choice(WORDS, rng.integers(0, 40))) for _ in range(n)]


def plain_scores(model, tokenizer, queries, texts, max_length):
    """Scores with transformers only, one pair at a time."""
    with torch.inference_mode():
        return np.array([
            model(**tokenizer(q, t, truncation="only_second", max_length=max_length, return_tensors="pt")).logits.item()
            for q, t in zip(queries, texts, strict=True)
        ])  # fmt: skip


# ---- scores


@pytest.mark.parametrize("batch_size", [None, 1, 7, 64])
def test_equals_plain_hugging_face(model, encoder, batch_size):
    queries, texts = pairs(60)
    expected = plain_scores(model, encoder.tokenizer, queries, texts, encoder.max_length)
    found = score_pairs(model, encoder, queries, texts, dtype=torch.float32, batch_size=batch_size)
    assert np.ptp(expected) > 0.03
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("attention", "training"), [("sdpa", False), ("eager", False), ("eager", True)])
def test_the_last_layers_first_row_gives_the_same_scores_and_gradients(
    backbone, encoder, attention, training, monkeypatch
):
    # Dropout without randomness, to compare where it is applied.
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training, *_: x * 0.5 if training else x)
    models = [load_model(backbone, seed=1)[0].train(training) for _ in range(2)]
    batch = encoder.pad(encoder(*pairs(9)), range(9))
    scores = []
    for model, context in zip(models, (contextlib.nullcontext, first_token_only), strict=True):
        model.set_attn_implementation(attention)
        for number, (name, bias) in enumerate(model.named_parameters()):
            if name.endswith("bias"):  # those of a new model are 0
                bias.data.normal_(generator=torch.Generator().manual_seed(number))
        with context(model) if context is first_token_only else context():
            values = forward(model, batch)
            (values * torch.arange(9)).sum().backward()
        scores.append(values.detach())
        assert "forward" not in vars(model.base_model.encoder.layer[-1])
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_layer_with_adapters_is_not_patched(backbone):
    model = load_model(backbone, seed=1)[0]
    model.base_model.encoder.layer[-1].attention.self.key = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with first_token_only(model):
        assert "forward" not in vars(model.base_model.encoder.layer[-1])


def test_order_of_pairs_does_not_matter(model, encoder):
    queries, texts = pairs(60)
    order = np.random.default_rng(1).permutation(60)
    there = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    here = score_pairs(model, encoder, [queries[i] for i in order], [texts[i] for i in order], dtype=torch.float32)
    np.testing.assert_allclose(here, there[order], atol=1e-5)


def test_blocks_are_joined(model, encoder, monkeypatch):
    queries, texts = pairs(50)
    whole = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    monkeypatch.setattr("pyterrier_msft.model.scoring.PAIRS_PER_BLOCK", 16)
    steps: list[int] = []
    parts = score_pairs(model, encoder, queries, texts, dtype=torch.float32, progress=steps.append)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert sum(steps) == 50


def test_a_gpus_blocks_grow():
    blocks = split_blocks(30_000, torch.device("cuda"))
    assert [block.stop - block.start for block in blocks] == [1024, 2048, 4096, 8192, 8192, 8192]
    assert np.concatenate([range(30_000)[block] for block in blocks]).tolist() == list(range(30_000))
    assert split_blocks(9000, torch.device("cpu")) == [slice(0, 8192), slice(8192, 16384)]
    assert split_blocks(0, torch.device("cpu")) == []
    assert split_blocks(1000, torch.device("cpu"), passages=16) == [slice(0, 512), slice(512, 1024)]


def test_the_next_block_is_computed_while_the_last_is_used():
    started = [threading.Event() for _ in range(3)]
    for i in compute_ahead(lambda i: (started[i].set(), i)[1], range(3)):
        assert i == 2 or started[i + 1].wait(60)
        assert i > 0 or not started[2].is_set()


def test_scores_are_copied_once_per_block(model, encoder, monkeypatch):
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: [copies.append(len(self)), copy(self)][1])
    score_pairs(model, encoder, *pairs(60), dtype=torch.float32, batch_size=7)
    assert copies == [60]


def test_an_error_in_a_later_block_is_raised(model, encoder, monkeypatch):
    monkeypatch.setattr("pyterrier_msft.model.scoring.PAIRS_PER_BLOCK", 16)
    texts = [*pairs(40)[1]]
    texts[39] = type("Broken", (), {"__str__": lambda self: 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        score_pairs(model, encoder, pairs(40)[0], texts, dtype=torch.float32)


def test_out_of_memory_halves_the_pass(model, encoder, monkeypatch, caplog):
    queries, texts = pairs(100)
    expected = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    sizes = []

    def tight(model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    monkeypatch.setattr("pyterrier_msft.model.scoring.forward", tight)
    done = []
    scores = score_pairs(model, encoder, queries, texts, dtype=torch.float32, batch_size=100, progress=done.append)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert sum(done) == 100
    assert len(caplog.records) == sum(size > 30 for size in sizes) > 0
    assert "out of memory with 100 pairs per pass; continuing with 50" in caplog.text


@pytest.mark.parametrize(("pairs", "workers"), [(48, 2), (400, 2), (100, 8), (3, 2), (1, 4), (5000, 2)])
def test_batches_are_balanced_between_workers(pairs, workers):
    lengths = np.random.default_rng(0).integers(60, 128, size=pairs)
    batches = length_batches(lengths, max_tokens=2048)
    shared = balance_batches(batches, lengths, 2048, workers)
    assert sorted(np.concatenate(shared)) == list(range(pairs))
    before, after = (
        sorted((len(batch) * lengths[batch].max() for batch in part), reverse=True) for part in (batches, shared)
    )
    assert after[0] <= 2048
    if 1 < len(batches) <= 32 * workers:
        assert len(shared) % workers == 0
        assert sum(after[::workers]) <= sum(before[::workers])  # the busiest worker's share
    else:
        assert shared == batches


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_score(model, encoder, threads):
    queries, texts = pairs(60)
    expected = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = score_pairs(model, encoder, queries, texts, dtype=torch.float32, batch_size=7)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_an_error_in_a_thread_is_raised(model, encoder, monkeypatch):
    def broken(model, batch):
        raise RuntimeError("a bug")

    monkeypatch.setattr("pyterrier_msft.model.scoring.forward", broken)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(RuntimeError, match="a bug"):
        score_pairs(model, encoder, *pairs(60), dtype=torch.float32, batch_size=7)


def test_a_pair_that_does_not_fit_is_an_error(model, encoder, monkeypatch):
    def full(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("pyterrier_msft.model.scoring.forward", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        score_pairs(model, encoder, *pairs(8), dtype=torch.float32)


def test_a_model_in_training_mode_scores_without_dropout(model, encoder):
    queries, texts = pairs(10)
    expected = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    model.train()
    try:
        np.testing.assert_array_equal(score_pairs(model, encoder, queries, texts, dtype=torch.float32), expected)
        assert model.training
    finally:
        model.eval()


def test_bfloat16_is_close(model, encoder):
    queries, texts = pairs(40)
    exact = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    rounded = score_pairs(model, encoder, queries, texts, dtype=torch.bfloat16)
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.ptp(exact)
    assert len({*rounded}) == len({*exact})  # no ties by rounding


# ---- batches


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 500), st.one_of(st.none(), st.integers(1, 9)))
def test_batches_have_each_pair_once_within_the_budget(lengths, max_tokens, max_pairs):
    batches = length_batches(lengths, max_tokens=max_tokens, max_pairs=max_pairs)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
        assert max_pairs is None or len(batch) <= max_pairs


# ---- models


def test_only_the_seed_determines_a_new_head(backbone):
    before = torch.get_rng_state()
    heads = [load_model(backbone, seed=seed)[0].classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_trained_head_is_not_new(backbone, tmp_path):
    model, tokenizer, new = load_model(backbone, seed=1)
    assert new
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _, new = load_model(str(tmp_path), seed=2)
    assert not new
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_several_labels_are_refused(backbone, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must have one label .* got 3 labels"):
        load_model(str(tmp_path), seed=1)


def test_missing_weights_are_refused(backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer, _ = load_model(backbone, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing in .*'bert\.encoder\.layer\.1"):
        load_model(str(tmp_path), seed=1)


def test_pickled_weights_are_refused(backbone, tmp_path):
    model, tokenizer, _ = load_model(backbone, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(tmp_path), seed=1)


def test_a_missing_model_names_the_alternatives():
    with pytest.raises(ValueError, match="Without a connection to the hub, give MonoCE a folder"):
        load_model("nobody/nothing", seed=1)


def test_loading_is_quiet(backbone, capfd):
    load_model(backbone, seed=1)
    assert capfd.readouterr() == ("", "")


def test_token_limit(model, encoder):
    assert token_limit(model, encoder.tokenizer) == 64


# ---- precision


def test_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_dtype("bfloat16", cpu) == resolve_dtype(torch.bfloat16, cpu) == torch.bfloat16
    for found in (True, False):
        monkeypatch.setattr("pyterrier_msft.model.precision._has_bfloat16", lambda device, found=found: found)
        assert resolve_dtype("auto", cpu) == (torch.bfloat16 if found else torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be 'auto' or one of .* got 'int4'"):
        resolve_dtype("int4", cpu)
    with pytest.raises(ValueError, match="only emulates"):
        resolve_dtype("float16", cpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert resolve_dtype("int8", cpu) == torch.int8
    with pytest.raises(ValueError, match="dtype 'int8' needs a CPU"):
        resolve_dtype("int8", torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'int8.*pip install "pyterrier-msft\[int8\]"'):
        MonoCE("never-loaded", dtype="int8", device="cpu")


def test_the_default_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda n, device: None)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert resolve_device(None).type == "mps"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # Trainer follows it
    assert resolve_device(None).type == "cpu"
    assert resolve_device("mps").type == "mps"


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_missing_devices(device):
    with pytest.raises(ValueError, match=f"device must be .*; got '{device}'"):
        resolve_device(device)
