"""Tiny random models in the forms of published re-rankers."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pyterrier_msft.model.loading import quiet_transformers


def write_modular(folder: Path, backbone: str) -> None:
    """Write a CrossEncoder in modules, like the Ettin re-rankers."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling, Transformer

    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        network = Transformer(backbone)
        width = network.get_embedding_dimension()
        modules = [
            network, Pooling(width, "cls"), Dense(width, width, activation_function=torch.nn.GELU()), LayerNorm(width),
            Dense(width, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ]  # fmt: skip
        CrossEncoder(modules=modules, device="cpu").save_pretrained(str(folder))


def write_two_labels(folder: Path, backbone: str) -> None:
    """Write a classifier with two labels, like monoBERT."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2).save_pretrained(folder)
        AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"]
QWEN_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
    "search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {text}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
MXBAI_TEMPLATE = (
    "<|endoftext|><|im_start|>user\nquery: {query}\ndocument: {text}\nYou are a search relevance expert. (0 for not "
    "relevant, 1 for relevant)\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
)
GEMMA_TEMPLATE = "<bos>A: {query}\nB: {text}\nPredict whether passage B contains an answer to query A.\nYes or No?\n"


def write_bpe(folder: Path, words: Sequence[str]) -> int:
    """Write a byte-level BPE tokenizer as Qwen's, whose tokens include the space before a word; return its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    corpus = [" ".join(words), *words, "yes no Yes No 0 1", "yes", "no", "Yes", "No", QWEN_TEMPLATE, MXBAI_TEMPLATE]
    tokenizer.train_from_iterator(corpus, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def decoder_config(family: str, size: int) -> PretrainedConfig:
    """Return the configuration of a tiny decoder."""
    llama_like = {
        "vocab_size": size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2,
    }  # fmt: skip
    configs = {
        "qwen3": lambda: Qwen3Config(**llama_like, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**llama_like, tie_word_embeddings=False),
        "llama": lambda: LlamaConfig(**llama_like),
        "gemma": lambda: GemmaConfig(**llama_like),
        "gemma2": lambda: Gemma2Config(**llama_like, final_logit_softcapping=2.0, sliding_window=16),
        "gpt2": lambda: GPT2Config(
            vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=512, initializer_range=0.2, bos_token_id=2,
            eos_token_id=2,
        ),
    }  # fmt: skip
    return configs[family]()


def write_decoder(folder: Path, words: Sequence[str], family: str = "qwen3") -> None:
    """Write a language model, like Qwen3-Reranker's but without the files of sentence-transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_bpe(folder, words)
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(decoder_config(family, size)).save_pretrained(folder)


CHAT_TEMPLATE = """\
{%- set instruction = messages | selectattr("role", "eq", "system") | map(attribute="content") | first \
| default("Find answers") -%}
<|im_start|>system
Answer "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ instruction }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_integration(
    folder: Path, chat_template: str, *, true: int = 9, false: int | None = 5, prompt: str | None = None
) -> None:
    """Add the files of a decoder's integration with sentence-transformers, e.g. of zeroentropy/zerank-2."""
    (folder / "chat_template.jinja").write_text(chat_template)
    output = {"method": "forward", "method_output_name": "logits"}
    message = {**output, "format": "structured" if "part.text" in chat_template else "flat"}
    contents = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {
                "idx": 1, "name": "1", "path": "1_LogitScore",
                "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
            },
        ],
        "1_LogitScore/config.json": {"true_token_id": true, "false_token_id": false},
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder", "__version__": {"sentence_transformers": "5.4.0"},
            "prompts": {} if prompt is None else {"search": prompt, "code": "Find code"},
            "default_prompt_name": None if prompt is None else "search",
            "activation_fn": "torch.nn.modules.linear.Identity",
        },
        "sentence_bert_config.json": {
            "transformer_task": "text-generation", "modality_config": {"text": output, "message": message},
            "module_output_name": "causal_logits",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def write_qwen_reranker(folder: Path, backbone: str) -> None:
    """Write a decoder with its prompt in the files of sentence-transformers."""
    write_decoder(folder, sorted(AutoTokenizer.from_pretrained(backbone).get_vocab()))
    true, false = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["yes", "no"])
    write_integration(folder, CHAT_TEMPLATE, true=true, false=false)


def write_gemma(folder: Path, backbone: str) -> None:
    """Write a decoder without a prompt."""
    write_decoder(folder, sorted(AutoTokenizer.from_pretrained(backbone).get_vocab()), "gemma")
