"""Models with random weights in the shapes of published backbones, and texts of a given length: without downloads."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import Shape
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    ElectraConfig,
    ModernBertConfig,
    PretrainedConfig,
)

from pyterrier_msft.model.loading import quiet_transformers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WHOLE_WORDS, VOCABULARY = 20_000, 30_522  # the latter is BERT's
MAX_TOKENS = 512


def write_model(name: str, folder: Path, *, is_tiny: bool) -> None:
    """Write a random model with one score, and a tokenizer."""
    torch.manual_seed(0)
    options = {"model_input_names": ["input_ids", "attention_mask"]} if name == "ModernBERT-base" else {}
    with quiet_transformers():
        AutoModelForSequenceClassification.from_config(config_of(name, is_tiny=is_tiny)).save_pretrained(folder)
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words(), *(f"##{s}" for s in suffixes())])}
        BertTokenizer(vocab=vocabulary, model_max_length=MAX_TOKENS, **options).save_pretrained(folder)


def config_of(name: str, *, is_tiny: bool) -> PretrainedConfig:
    """Return a configuration: ELECTRA-base, MiniLM (6 layers) or ModernBERT-base."""
    layers, hidden, heads, feed_forward = {
        "ELECTRA-base": (12, 768, 12, 3072), "MiniLM": (6, 384, 12, 1536), "ModernBERT-base": (22, 768, 12, 1152),
    }[name] if not is_tiny else (2, 32, 2, 64)  # fmt: skip
    shape = {
        "vocab_size": VOCABULARY, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "intermediate_size": feed_forward, "num_labels": 1,
        "initializer_range": 1.1 / hidden**0.5,  # with smaller weights, all scores are nearly the same
    }  # fmt: skip
    if name == "ModernBERT-base":
        tokens = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
        return ModernBertConfig(**shape, **tokens)
    return ElectraConfig(**shape, embedding_size=hidden) if name == "ELECTRA-base" else BertConfig(**shape)


def operations(folder: str, tokens: int) -> float:
    """Return the floating-point operations of a pair's forward pass."""
    config, shape = AutoConfig.from_pretrained(folder), Shape.of(folder)
    if config.model_type != "modernbert":
        return shape.operations(tokens)
    weights = 4 * shape.hidden**2 + 3 * shape.hidden * shape.feed_forward  # its feed-forward layers are gated
    attended = sum(
        min(tokens, config.local_attention) if kind == "sliding_attention" else tokens for kind in config.layer_types
    )
    return tokens * (2 * weights * shape.layers + 4 * shape.hidden * attended)


@cache
def words() -> list[str]:
    """Make words of three to eight letters, each a token."""
    return _spellings(WHOLE_WORDS, 3, 9)


@cache
def suffixes() -> list[str]:
    """Make the rest of the vocabulary: pieces that continue a word, all single letters among them."""
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    return letters + _spellings(VOCABULARY - len(SPECIAL) - WHOLE_WORDS - len(letters), 2, 5)


def _spellings(number: int, shortest: int, end: int) -> list[str]:
    rng, found = np.random.default_rng(number), dict[str, None]()
    while len(found) < number:
        found["".join(map(chr, ord("a") + rng.integers(26, size=rng.integers(shortest, end))))] = None
    return [*found]


def make_results(queries: int, depth: int, tokens: int) -> pd.DataFrame:
    """Make ranked pairs that fill `tokens`, each with a text of its own."""
    rng, pairs = np.random.default_rng(0), queries * depth
    pool = np.array(words(), dtype=object)
    inflected = rng.random(len(pool)) < 0.3  # as in English, some words are split
    pool[inflected] += rng.choice(np.array(suffixes(), dtype=object), inflected.sum())
    texts = [" ".join(text) for text in pool[rng.integers(len(pool), size=(pairs, tokens))]]
    asked = [" ".join(query) for query in pool[rng.integers(len(pool), size=(queries, 6))]]
    rank = np.tile(np.arange(depth), queries)
    return pd.DataFrame(
        {
            "qid": np.repeat([f"q{i}" for i in range(queries)], depth), "query": np.repeat(asked, depth),
            "docno": [f"d{i}" for i in range(pairs)], "text": texts, "score": -rank.astype(float), "rank": rank,
        }
    )  # fmt: skip
