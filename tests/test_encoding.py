"""Pairs as token ids: the template, and what is truncated."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import WORDS, record_calls, run_together
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from pyterrier_msft.model import encoding
from pyterrier_msft.model.encoding import PairEncoder, clean


def tokens(n: int, word: str = "w1") -> str:
    """A text of `n` tokens."""
    return " ".join([word] * n)


def byte_tokenizer(
    pair: str = "<s> $A </s> </s> $B </s>", kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as of RoBERTa or GPT-2 but without merges, in which an emoji is four tokens."""
    vocabulary = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return kind(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def decode(encoder, query, text):
    return encoder.tokenizer.decode(encoder([query], [text])["input_ids"][0])


def test_token_types_and_order(encoder):
    encoded = encoder(["w1 w2"], ["w3"])
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert tokens == ["[CLS]", "w1", "w2", "[SEP]", "w3", "[SEP]"]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]


def test_the_text_is_truncated(encoder):
    assert decode(encoder, "w1", " ".join(["w2"] * 1000)) == "[CLS] w1 [SEP] " + "w2 " * 20 + "[SEP]"


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.sampled_from(["w1", "w2 ", "x" * 90, " ", "é!"]), st.integers(1, 300)), max_size=6))
def test_a_very_long_text_is_read_as_if_all_of_it_were_tokenized(encoder, parts):
    text = " ".join(" ".join([word] * n) for word, n in parts)
    expected = encoder.tokenizer(["w1", "w2"], [text, "w3"], truncation="only_second", max_length=encoder.max_length)
    assert encoder(["w1", "w2"], [text, "w3"]) == dict(expected)


def test_the_end_of_a_text_is_read_if_the_tokenizer_truncates_on_the_left(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone, truncation_side="left")
    assert decode(PairEncoder(tokenizer, 8), "w1", "w2 " * 5000 + "w3").endswith("w3 [SEP]")


def test_the_smallest_length(encoder):
    assert decode(PairEncoder(encoder.tokenizer, 5), "w1 w2 w3", "w4 w5") == "[CLS] w1 [SEP] w4 [SEP]"


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, "", " "])
def test_missing_text_is_empty(encoder, missing):
    assert decode(encoder, "w1", missing) == "[CLS] w1 [SEP] [SEP]"


def test_clean():
    assert clean("a\ud800b") == "a?b"
    assert clean("größe 🙂") == "größe 🙂"
    assert clean(12) == "12"


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(max_size=80), min_size=1, max_size=5), st.text(max_size=200))
def test_any_text_is_encoded_within_the_limit(encoder, queries, text):
    for ids in encoder(queries, [text] * len(queries))["input_ids"]:
        assert 3 <= len(ids) <= encoder.max_length


# ---- truncated queries


def plain_ids(tokenizer, query, text, max_length):
    """Token ids with transformers only, truncated as it does by default."""
    return tokenizer([query], [text], truncation="longest_first", max_length=max_length)["input_ids"][0]


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=9),
    st.sampled_from([7, 23, 24]), st.sampled_from([1, 3]),
)  # fmt: skip
def test_pairs_are_those_of_plain_hugging_face(encoder, lengths, max_length, passages):
    queries, texts = zip(*[(" ".join(WORDS[:q]), " ".join(WORDS[50 : 50 + t])) for q, t in lengths], strict=True)
    encoded, pair = PairEncoder(encoder.tokenizer, max_length, passages=passages).windows(queries, texts)
    room = max_length - 3
    for i, (q, t) in enumerate(lengths):
        windows = [ids for ids, j in zip(encoded["input_ids"], pair, strict=True) if j == i]
        expected = plain_ids(encoder.tokenizer, queries[i], texts[i], max_length)
        if q + t > room and room % 2 and q > t > room // 2:  # both are cut, and the odd token is the text's
            assert len(windows[0]) == len(expected)
        else:
            assert windows[0] == expected
        assert len(windows) == 1 or t > room - min(q, room // 2)


@pytest.mark.parametrize("passages", [1, 3])
@pytest.mark.parametrize(
    ("query", "text", "kept"),
    [
        (15, 6, (15, 6)),  # fits whole
        (15, 7, (14, 7)),
        (10_000, 2, (19, 2)),
        (10_000, 0, (21, 0)),
        (15, 11, (10, 11)),
        (15, 100, (10, 11)),  # half of the 21 tokens beside [CLS] and two [SEP]
        (10, 100, (10, 11)),
        (3, 100, (3, 18)),
    ],
)
def test_the_text_is_truncated_before_the_query(encoder, query, text, kept, passages):
    encoded, _ = PairEncoder(encoder.tokenizer, 24, passages=passages).windows([tokens(query)], [tokens(text, "w2")])
    decoded = encoder.tokenizer.decode(encoded["input_ids"][0]).split()
    assert (decoded.count("w1"), decoded.count("w2")) == kept


def test_all_windows_of_a_text_have_the_same_query(encoder):
    encoded, pair = PairEncoder(encoder.tokenizer, 24, passages=9).windows([tokens(15)] * 2, [tokens(25, "w2"), "w2"])
    decoded = [encoder.tokenizer.decode(ids).split() for ids in encoded["input_ids"]]
    assert pair.tolist() == [0, 0, 0, 1]
    assert [ids.count("w1") for ids in decoded] == [10, 10, 10, 15]


def test_a_query_is_capped_also_where_the_pair_fits(encoder):
    short = PairEncoder(encoder.tokenizer, 24, max_query_length=2)
    assert decode(short, "w1 w2 w3", "w4") == "[CLS] w1 w2 [SEP] w4 [SEP]"
    long = PairEncoder(encoder.tokenizer, 24, max_query_length=16)
    assert decode(long, tokens(30), tokens(30, "w2")) == f"[CLS] {tokens(16)} [SEP] {tokens(5, 'w2')} [SEP]"


@pytest.mark.parametrize("side", ["right", "left"])
@settings(deadline=None)  # the machine may be busy
@given(st.text("a \U0001f600é", max_size=30), st.text("b \U0001f642", max_size=30))
def test_characters_of_several_tokens(side, query, text):
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = side
    expected = plain_ids(tokenizer, query, text, 16)
    found = PairEncoder(tokenizer, 16)([query], [text])["input_ids"][0]
    assert len(found) <= 16
    if len(tokenizer.tokenize(query)) <= 6 or len(tokenizer.tokenize(text)) <= 5:
        assert found == expected
    for passages in (1, 3):
        capped = PairEncoder(tokenizer, 9, max_query_length=4, passages=passages).windows([query], [text])[0]
        assert max(map(len, capped["input_ids"])) <= 9


@pytest.mark.parametrize(("query", "text"), [("abcdefghijklmno", "xyz"), ("abcd", "x" * 50), ("abcdefghi", "")])
def test_a_tokenizer_without_offsets(query, text):
    tokenizer = CanineTokenizer()  # written in Python, one token per character
    assert not tokenizer.is_fast
    assert PairEncoder(tokenizer, 12)([query], [text])["input_ids"] == [plain_ids(tokenizer, query, text, 12)]
    assert PairEncoder(tokenizer, 12, max_query_length=2)([query], [text])["input_ids"] == [
        tokenizer(query[:2], text, truncation="only_second", max_length=12)["input_ids"]
    ]


# ---- pairs joined from the ids of queries and texts


def tokenizer_of(family: str, encoder: PairEncoder) -> PreTrainedTokenizerFast:
    pairs = {"roberta": "<s> $A </s> </s> $B </s>", "decoder": "<s> $A $B:1", "text first": "<s> $B:1 </s>:1 $A </s>"}
    tokenizer = copy.deepcopy(encoder.tokenizer) if family == "bert" else byte_tokenizer(pairs[family])
    if family != "roberta":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


FAMILIES = ["bert", "roberta", "decoder", "text first"]
STRINGS = st.text("ab \U0001f600é", max_size=30) | st.sampled_from([tokens(12), "w1 w2", "x" * 400, "[SEP]", "</s> w1"])
LONG = st.sampled_from([None, tokens(99), "x" * 99 + tokens(999)])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None)  # the machine may be busy
@given(
    pairs=st.lists(st.tuples(STRINGS, STRINGS | LONG), min_size=1, max_size=4),
    max_length=st.integers(6, 24), max_query_length=st.sampled_from([None, 1, 5]), passages=st.sampled_from([1, 3]),
)  # fmt: skip
def test_joined_pairs_are_those_of_the_tokenizer(encoder, family, side, pairs, max_length, max_query_length, passages):
    tokenizer = tokenizer_of(family, encoder)
    tokenizer.truncation_side = side
    one = PairEncoder(tokenizer, max_length, max_query_length, passages)
    queries, texts = [query for query, _ in pairs], [text for _, text in pairs]
    assert encoding.find_template(tokenizer) is not None
    found = [one.windows(queries, texts, keep=keep) for keep in (False, True, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "find_template", lambda tokenizer: None)
        expected, expected_pair = one.windows(queries, texts)
    for encoded, pair in found:
        assert encoded == expected
        assert pair.tolist() == expected_pair.tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_that_of_the_tokenizer(encoder, family, side):
    tokenizer = tokenizer_of(family, encoder)
    tokenizer.padding_side, tokenizer._pad_token_type_id = side, 3
    one = PairEncoder(tokenizer, 20)
    encoded = one(["w1", "w2 w3", ""], ["w4", "w5 " * 9, None])
    for indices in ([0, 2], [1], [2, 1, 0]):
        chosen = {key: [values[i] for i in indices] for key, values in encoded.items()}
        length = max(map(len, chosen["input_ids"]))
        if len(indices) > 1:  # a single pair isn't padded
            length = min(20, -(-length // 8) * 8)
        expected = tokenizer.pad(chosen, padding="max_length", max_length=length, return_tensors="pt")
        found = one.pad(encoded, indices)
        assert found.keys() == expected.keys()
        for key, values in found.items():
            assert torch.equal(values, expected[key]), key


def test_no_pairs(encoder):
    encoded, pair = encoder.windows([], [])
    assert encoded["input_ids"] == []
    assert len(pair) == 0


class Marking(PreTrainedTokenizerFast):
    """A tokenizer that changes the text of a pair."""

    def __call__(self, text, text_pair=None, **options):
        marked = None if text_pair is None else [f"{each}!" for each in text_pair]
        return super().__call__(text, marked, **options)


def test_pairs_that_are_more_than_a_template_are_left_to_the_tokenizer():
    tokenizer = byte_tokenizer(kind=Marking)
    one = PairEncoder(tokenizer, 16)
    assert decode(one, "ab", "cd") == "<s> ab</s></s> cd!</s>"
    assert one(["ab", "a" * 9], ["cd", None]) == dict(tokenizer(["ab", "a" * 9], ["cd", ""]))


def test_ids_are_kept_only_within_the_limit(encoder, monkeypatch):
    calls = record_calls(monkeypatch)
    for limit, is_kept in ((2**28, True), (10, False)):
        monkeypatch.setattr(encoding, "MAX_KEPT_TOKENS", limit)
        one = PairEncoder(encoder.tokenizer, 24)
        first, _ = one.windows(["w4"] * 2, ["w1 w2", "w3"], keep=True)
        calls.clear()
        assert one.windows(["w4"] * 2, ["w1 w2", "w3"], keep=True)[0] == first
        assert is_kept == (not calls)
        one.windows(["w4"], ["w5"], keep=True)
        assert calls


@pytest.mark.parametrize("passages", [1, 3])
def test_truncation_rates(encoder, passages):
    fits, room = tokens(20, "w2"), PairEncoder(encoder.tokenizer, 24, passages=passages)
    assert room.truncation_rates(["w1"] * 2, [fits, "w2"]) == (0.0, 0.0)
    assert room.truncation_rates(["w1"] * 2, [tokens(61, "w2"), "w2"]) == (0.0, 0.5)
    assert room.truncation_rates([tokens(20), "w1"], ["w2", "w2"]) == (0.0, 0.0)
    assert room.truncation_rates([tokens(21), "w1"], ["w2", "w2"]) == (0.5, 0.0)
    assert room.truncation_rates([tokens(21), "w1"], [tokens(61, "w2"), "w2"]) == (0.5, 0.5)
    assert room.truncation_rates([], []) == (0.0, 0.0)
    capped = PairEncoder(encoder.tokenizer, 24, max_query_length=12, passages=passages)
    assert capped.truncation_rates([tokens(12), tokens(13)], ["w2", "w2"]) == (0.5, 0.0)
    assert encoder.truncation_rates(["w1"] * 2, [fits + " w2", "w2"]) == (0.0, 0.5)


def test_which_queries_are_truncated(encoder):
    queries, texts = [tokens(11), tokens(11), tokens(10), None], [tokens(10), tokens(11), tokens(50), tokens(50)]
    assert encoder.truncates_query(queries, texts).tolist() == [False, True, False, False]
    assert encoder.truncates_query([], []).tolist() == []


def test_threads_do_not_change_each_others_truncation(encoder):
    queries, texts = [tokens(3)] * 200, [tokens(40, "w2")] * 200
    encoders = [PairEncoder(encoder.tokenizer, length) for length in (10, 16, 24)]
    expected = [one(queries, texts) for one in encoders]
    wrong = []

    def work(one: PairEncoder, alone: dict) -> None:
        wrong.extend("different" for _ in range(20) if one(queries, texts) != alone)

    run_together(*[partial(work, *pair) for pair in zip(encoders, expected, strict=True)])
    assert not wrong
