"""(query, text) pairs to scores: load, tokenise, batch, choose a precision.

Training and `transform` share what is here, so that a pair is read in the same way by both.
"""

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.encoding import Encoded, PairEncoder, length_batches, pad, shared_out
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.precision import autocast

logger = logging.getLogger(__name__)


# Pairs tokenised and sorted by length at a time: enough that a batch has hardly any padding, few enough that
# memory doesn't grow with the frame.
WINDOW = 8192


# Tokens a forward pass: caches on a CPU are small and its cores few; a GPU wants more work a launch.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 65536}


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
