"""Documents longer than `max_length`, read in windows."""

import dataclasses

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import WORDS, Part
from ir_measures import RR

from pyterrier_msft import Contrastive, MonoCE
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.loading import load_model
from pyterrier_msft.model.scoring import forward, score_pairs
from pyterrier_msft.training.batches import Collator

FAST = {"learning_rate": 1e-2, "epochs": 6, "batch_size": 8, "dropout": 0.0}


def words(start: int, stop: int) -> str:
    return " ".join(WORDS[start:stop])


@pytest.fixture
def windowed(encoder) -> PairEncoder:
    return PairEncoder(encoder.tokenizer, max_length=16, passages=3)


def lengthened(part: Part) -> Part:
    """The part's documents behind uninformative words: what is relevant is never in the first 24 tokens."""
    rng = np.random.default_rng(0)
    before = [" ".join(rng.choice(WORDS[10:], 24)) for _ in range(len(part.results))]
    texts = [f"{a} {b}" for a, b in zip(before, part.results["text"], strict=True)]
    return Part(part.results.assign(text=texts), part.qrels)


@pytest.fixture(scope="module")
def long_part(train_part) -> Part:
    return lengthened(train_part)


# ---- windows


def test_windows_overlap(windowed):
    # Beside [CLS] w1 w2 [SEP] and a last [SEP], 11 of the 16 tokens are left; an eighth of 16 is 2.
    encoded, pair = windowed.windows(["w1 w2", "w3"], [words(10, 30), "w5"])
    decoded = [windowed.tokenizer.decode(ids) for ids in encoded["input_ids"]]
    assert decoded == [
        f"[CLS] w1 w2 [SEP] {words(10, 21)} [SEP]",
        f"[CLS] w1 w2 [SEP] {words(19, 30)} [SEP]",
        "[CLS] w3 [SEP] w5 [SEP]",
    ]
    assert pair.tolist() == [0, 0, 1]
    assert set(map(len, (encoded[key] for key in encoded))) == {3}


def test_no_more_windows_than_passages(windowed):
    encoded, pair = windowed.windows(["w1 w2"], [words(0, 100)])
    assert pair.tolist() == [0, 0, 0]
    assert windowed.tokenizer.decode(encoded["input_ids"][-1]).endswith(f"{words(18, 29)} [SEP]")


def test_a_single_passage_is_the_pair_itself(encoder):
    texts = [words(10, 60), "w5"]
    encoded, pair = encoder.windows(["w1 w2", "w3"], texts)
    assert encoded == encoder(["w1 w2", "w3"], texts)
    assert pair.tolist() == [0, 1]


@pytest.mark.parametrize("max_length", [5, 6, 8, 12])
@pytest.mark.parametrize("query", ["w1", "w1 w2 w3 w4 w5 w6 w7 w8 w9"])
def test_windows_of_few_tokens(encoder, max_length, query):
    encoded, pair = PairEncoder(encoder.tokenizer, max_length, passages=4).windows([query], [words(10, 40)])
    assert len(pair) == 4
    assert {len(ids) for ids in encoded["input_ids"]} == {max_length}


def test_a_very_long_text_is_read_as_if_all_of_it_were_tokenized(windowed, monkeypatch):
    text = " ".join(WORDS[i % 100] for i in range(5000))
    blanks = "w1" + " " * 5000 + "w2 " + text  # few tokens in many characters
    found = [windowed.windows(["w9"], [long])[0] for long in (text, blanks)]
    monkeypatch.setattr("pyterrier_msft.model.encoding.CHARACTERS_PER_TOKEN", 10**6)
    assert found == [windowed.windows(["w9"], [long])[0] for long in (text, blanks)]


def test_a_slow_tokenizer_is_refused(windowed, monkeypatch):
    monkeypatch.setattr(type(windowed.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="passages=3 needs a fast tokenizer"):
        windowed.windows(["w1"], ["w2"])


def test_the_share_of_truncated_documents(windowed):
    texts = [words(0, 11), words(0, 29), words(0, 30)]  # one window, three windows, one token more
    assert windowed.truncation_rates(["w1 w2"] * 3, texts) == (0.0, pytest.approx(1 / 3))


# ---- scoring


def test_a_documents_score_is_its_best_windows(windowed, backbone):
    model = load_model(backbone, seed=1)[0]
    queries, texts = ["w1", "w2", "w3"], [words(10, 40), "w5", words(30, 50)]
    encoded, pair = windowed.windows(queries, texts)
    with torch.inference_mode():
        each = [forward(model, windowed.pad(encoded, [i])).item() for i in range(len(pair))]
    assert len(each) > 3
    expected = [max(score for score, p in zip(each, pair, strict=True) if p == i) for i in range(3)]
    done: list[int] = []
    for size in (None, 2):
        found = score_pairs(model, windowed, queries, texts, dtype=torch.float32, batch_size=size, progress=done.append)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sum(done) == 6  # pairs, not windows


def test_scores_equal_those_of_pyterriers_passages(ce, long_part):
    """MaxP with PyTerrier's transformers and with ours."""
    results = long_part.results.head(80)
    sliding = pt.text.sliding(text_attr="text", length=8, stride=8, prepend_attr=None)
    ce.cross_encoder.head_is_new, network = False, ce.cross_encoder.network
    theirs = (sliding >> ce >> pt.text.max_passage())(results)
    passages = sliding(results)
    scores = score_pairs(network, ce.pair_encoder(), [*passages["query"]], [*passages["text"]], dtype=torch.float32)
    best = passages.assign(score=scores, docno=passages["docno"].str.replace(r"%p\d+$", "", regex=True))
    expected = best.groupby(["qid", "docno"])["score"].max()
    found = theirs.set_index(["qid", "docno"])["score"]
    pd.testing.assert_series_equal(found.sort_index(), expected.sort_index(), atol=1e-5, check_dtype=False)


# ---- training


def test_batches_map_each_window_to_its_document(windowed, train_part):
    from pyterrier_msft.data.groups import Group

    labels = np.array([1, 0], dtype=np.float32)
    groups = [Group("a", "w1", [words(10, 40), "w5"], labels), Group("b", "w2", ["w6", words(10, 40)], labels)]
    batch = Collator(windowed, max_tokens=10_000, max_pairs=None)(groups)
    assert sorted(batch["slots"].tolist()) == [0, 0, 0, 1, 2, 3, 3, 3]
    assert batch["mask"].all()


def test_passages_do_not_change_training_if_documents_fit(backbone, train_part):
    prints = [
        MonoCE(backbone, max_length=24, device="cpu", passages=passages)
        .fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=4, learning_rate=1e-2))
        .fingerprint
        for passages in (1, 4)
    ]
    assert prints[0] == prints[1]


def test_training_finds_what_is_relevant_behind_the_first_window(backbone, long_part, test_part):
    unseen = lengthened(test_part)

    def trained(**settings) -> MonoCE:
        ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", **settings)
        return ce.fit(long_part.results, long_part.qrels, fitter=Contrastive(n_negatives=3, **FAST))

    rerankers = trained(passages=3), trained()
    assert [ce.data_report.truncated_documents for ce in rerankers] == [0, 1]
    with_passages, cut = (pt.Evaluate(ce(unseen.results), unseen.qrels, [RR @ 10])["RR@10"] for ce in rerankers)
    assert with_passages > cut + 0.2


def test_bounded_memory_gives_the_same_weights(backbone, long_part):
    def weights(pairs_per_pass: int | None) -> torch.Tensor:
        fitter = Contrastive(
            max_steps=3,
            batch_size=4,
            n_negatives=3,
            learning_rate=0.3,
            dropout=0.0,
            pairs_per_pass=pairs_per_pass,
            trainer_args={"optim": "sgd"},
        )
        ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", passages=3)
        ce.fit(long_part.results, long_part.qrels, fitter=fitter)
        return torch.cat([p.flatten() for p in ce.cross_encoder.network.state_dict().values()])

    torch.testing.assert_close(weights(None), weights(5), atol=1e-5, rtol=0)


# ---- settings


def test_passages_are_saved_and_part_of_the_cache_key(ce, backbone, train_part, long_part, tmp_path):
    long = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", passages=3)
    long.fit(long_part.results.head(80), long_part.qrels, fitter=Contrastive(max_steps=1))
    long.save(tmp_path / "model")
    loaded = MonoCE.load(tmp_path / "model", device="cpu", dtype="float32")
    assert loaded.passages == 3
    frame = long_part.results.head(16)
    pd.testing.assert_frame_equal(loaded(frame), long(frame))
    cached = long.cached(tmp_path / "cache")
    pd.testing.assert_frame_equal(cached(frame), long(frame), atol=1e-6)
    long.passages = 1
    pd.testing.assert_frame_equal(cached(frame), long(frame), atol=1e-6)
    assert not np.allclose(long(frame)["score"], loaded(frame)["score"])


@pytest.mark.parametrize("wrong", [0, 1.5, None])
def test_invalid_passages(wrong):
    with pytest.raises(ValueError, match="passages must be"):
        MonoCE(passages=wrong)


def test_a_fitters_own_length_keeps_the_passages(encoder):
    assert dataclasses.replace(PairEncoder(encoder.tokenizer, 24, passages=3), max_length=12).passages == 3
