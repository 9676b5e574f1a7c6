import contextlib
import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_msft.model.encoding import PairEncoder, clean, length_batches, pad, shared_out
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import load_model, token_limit
from pyterrier_msft.model.precision import resolve_device, resolve_dtype
from pyterrier_msft.model.scoring import forward, memory_of_machine, score_pairs, tokens_that_fit


@pytest.fixture(scope="module")
def model(backbone):
    return load_model(backbone, seed=3)[0]


def pairs(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    queries = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(n)]
    return queries, [" ".join(rng.choice(WORDS, rng.integers(0, 40))) for _ in range(n)]


def plain_scores(model, tokenizer, queries, texts, max_length):
    """What a user of plain Hugging Face writes, a pair at a time."""
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
def test_the_last_layers_first_row_alone_gives_the_same_scores_and_gradients(
    backbone, encoder, attention, training, monkeypatch
):
    # A dropout without chance, so that its places are compared too.
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training, *_: x * 0.5 if training else x)
    models = [load_model(backbone, seed=1)[0].train(training) for _ in range(2)]
    batch = pad(encoder.tokenizer, encoder(*pairs(9)), range(9))
    scores = []
    for model, context in zip(models, (contextlib.nullcontext, first_token_only), strict=True):
        model.set_attn_implementation(attention)
        for number, (name, bias) in enumerate(model.named_parameters()):
            if name.endswith("bias"):  # a new model's are 0
                bias.data.normal_(generator=torch.Generator().manual_seed(number))
        with context(model) if context is first_token_only else context():
            values = forward(model, batch)
            (values * torch.arange(9)).sum().backward()
        scores.append(values.detach())
        assert "forward" not in vars(model.base_model.encoder.layer[-1])
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_layer_with_adapters_is_left_whole(backbone):
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


def test_windows_join(model, encoder, monkeypatch):
    queries, texts = pairs(50)
    whole = score_pairs(model, encoder, queries, texts, dtype=torch.float32)
    monkeypatch.setattr("pyterrier_msft.model.scoring.WINDOW", 16)
    steps: list[int] = []
    parts = score_pairs(model, encoder, queries, texts, dtype=torch.float32, progress=steps.append)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert sum(steps) == 50


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
    assert "out of memory with 100 pairs a pass: going on with half as many" in caplog.text


def test_tokens_that_fit_a_gpu(model, monkeypatch):
    # 16 hidden units, 2 layers: a token has 17 * 16 numbers a layer; without attention's matrices, which sdpa has not.
    gpu = copy.deepcopy(model).to("meta")
    device = torch.device("cuda:0")
    monkeypatch.setattr(type(gpu), "parameters", lambda self: iter([SimpleNamespace(device=device)]))
    monkeypatch.setattr(type(gpu), "num_parameters", lambda self: 1000)
    free = 12 * 1000 + 2 * (2 * 272 * 2) * 500
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (free, 2**40) if where == device else None)
    assert tokens_that_fit(gpu, torch.bfloat16, length=24, training=True) == 500
    assert tokens_that_fit(gpu, torch.float32, length=24, training=True) == 250
    assert tokens_that_fit(gpu, torch.float32, length=24) == int(free / 2 / 4 / 272)
    assert tokens_that_fit(gpu, torch.float32, length=400, training=True) == 400  # a pair at least


@pytest.mark.parametrize(("pairs", "workers"), [(48, 2), (400, 2), (100, 8), (3, 2), (1, 4), (5000, 2)])
def test_workers_share_the_batches(pairs, workers):
    lengths = np.random.default_rng(0).integers(60, 128, size=pairs)
    batches = length_batches(lengths, max_tokens=2048)
    shared = shared_out(batches, lengths, 2048, workers)
    assert sorted(np.concatenate(shared)) == list(range(pairs))
    before, after = (
        sorted((len(batch) * lengths[batch].max() for batch in part), reverse=True) for part in (batches, shared)
    )
    assert after[0] <= 2048
    if 1 < len(batches) <= 32 * workers:
        assert len(shared) % workers == 0
        assert sum(after[::workers]) <= sum(before[::workers])  # what the busiest has to do
    else:
        assert shared == batches


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/system.slice/job_7/step_0", "sys/fs/cgroup/system.slice/job_7/memory.max"),
        ("0::/", "sys/fs/cgroup/memory.max"),
        ("5:cpu:/\n4:memory:/slurm/job_7", "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes"),
    ],
)
def test_memory_of_a_container(tmp_path, groups, file):
    whole = memory_of_machine(tmp_path)
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path, content in {"proc/self/cgroup": groups, file: "max"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{content}\n")
    assert memory_of_machine(tmp_path) == whole
    (tmp_path / file).write_text("1000000\n")
    assert memory_of_machine(tmp_path) == 1_000_000


def test_tokens_that_fit_a_machine(model, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert tokens_that_fit(model, torch.float32, length=24) == int(1000 * 4096 / 2 / (4 * (17 * 16 + 2.5 * 2 * 24)))


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


def test_a_training_model_scores_without_dropout_and_stays_training(model, encoder):
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


# ---- pairs


def decode(encoder, query, text):
    return encoder.tokenizer.decode(encoder([query], [text])["input_ids"][0])


def test_token_types_and_order(encoder):
    encoded = encoder(["w1 w2"], ["w3"])
    assert encoder.tokenizer.convert_ids_to_tokens(encoded["input_ids"][0]) == [
        "[CLS]",
        "w1",
        "w2",
        "[SEP]",
        "w3",
        "[SEP]",
    ]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]


def test_the_text_is_cut_to_fit(encoder):
    assert decode(encoder, "w1", " ".join(["w2"] * 1000)) == "[CLS] w1 [SEP] " + "w2 " * 20 + "[SEP]"


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.sampled_from(["w1", "w2 ", "x" * 90, " ", "é!"]), st.integers(1, 300)), max_size=6))
def test_a_very_long_text_is_read_as_if_all_of_it_were_tokenised(encoder, parts):
    text = " ".join(" ".join([word] * n) for word, n in parts)
    assert encoder(["w1", "w2"], [text, "w3"]) == encoder._encode(["w1", "w2"], [text, "w3"])


def test_the_end_of_a_text_is_read_where_the_tokenizer_cuts_at_the_left(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone, truncation_side="left")
    assert decode(PairEncoder(tokenizer, 8), "w1", "w2 " * 5000 + "w3").endswith("w3 [SEP]")


def test_a_long_query_is_cut_first_and_leaves_room(encoder):
    assert decode(encoder, " ".join(["w1"] * 10_000), "w2 w3") == "[CLS] " + "w1 " * 12 + "[SEP] w2 w3 [SEP]"
    short = PairEncoder(encoder.tokenizer, 24, max_query_length=2)
    assert decode(short, "w1 w2 w3", "w4") == "[CLS] w1 w2 [SEP] w4 [SEP]"


def test_the_smallest_length(encoder):
    assert decode(PairEncoder(encoder.tokenizer, 5), "w1 w2 w3", "w4 w5") == "[CLS] w1 [SEP] w4 [SEP]"


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, "", " "])
def test_missing_text_is_empty(encoder, missing):
    assert decode(encoder, "w1", missing) == "[CLS] w1 [SEP] [SEP]"


def test_clean():
    assert clean("a\ud800b") == "a?b"
    assert clean("größe 🙂") == "größe 🙂"
    assert clean(12) == "12"


def test_truncated_shares(encoder):
    fits = " ".join(["w2"] * 20)  # with [CLS], a query of one token and two [SEP] exactly 24
    assert encoder.truncated(["w1"] * 2, [fits, "w2"]) == (0.0, 0.0)
    assert encoder.truncated(["w1"] * 2, [fits + " w2", "w2"]) == (0.0, 0.5)
    assert encoder.truncated([" ".join(["w1"] * 13), "w1"], ["w2", "w2"]) == (0.5, 0.0)
    assert encoder.truncated([], []) == (0.0, 0.0)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(max_size=80), min_size=1, max_size=5), st.text(max_size=200))
def test_any_text_is_encoded_within_the_limit(encoder, queries, text):
    for ids in encoder(queries, [text] * len(queries))["input_ids"]:
        assert 3 <= len(ids) <= encoder.max_length


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 500), st.one_of(st.none(), st.integers(1, 9)))
def test_batches_take_each_pair_once_within_the_budget(lengths, max_tokens, max_pairs):
    batches = length_batches(lengths, max_tokens=max_tokens, max_pairs=max_pairs)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
        assert max_pairs is None or len(batch) <= max_pairs


# ---- models


def test_a_new_head_is_decided_by_the_seed_alone(backbone):
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
    with pytest.raises(ValueError, match=r"expected a cross-encoder with one label .* found 3 labels"):
        load_model(str(tmp_path), seed=1)


def test_missing_weights_are_refused(backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer, _ = load_model(backbone, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"found 1 missing: bert\.encoder\.layer\.1"):
        load_model(str(tmp_path), seed=1)


def test_pickled_weights_are_refused(backbone, tmp_path):
    model, tokenizer, _ = load_model(backbone, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(tmp_path), seed=1)


def test_a_model_that_is_not_there_says_how_to_go_on():
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
    with pytest.raises(ValueError, match=r"expected dtype 'auto' or one of .* found 'int4'"):
        resolve_dtype("int4", cpu)
    with pytest.raises(ValueError, match="only emulates"):
        resolve_dtype("float16", cpu)
    assert resolve_dtype("int8", cpu) == torch.int8
    with pytest.raises(ValueError, match="expected dtype 'int8' on a CPU only"):
        resolve_dtype("int8", torch.device("cuda"))


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"expected a device that is there, found '{device}'"):
        resolve_device(device)
