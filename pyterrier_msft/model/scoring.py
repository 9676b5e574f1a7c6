"""Score (query, text) pairs in batches, for `transform` and for validation alike."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.batching import balance_batches, length_batches
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.precision import autocast
from pyterrier_msft.model.template import Encoded
from pyterrier_msft.model.threads import SharedContext

logger = logging.getLogger(__name__)

# Pairs tokenized and sorted by length at a time: enough for little padding, few enough to bound memory.
PAIRS_PER_BLOCK = 8192
MIN_BLOCK = 256
FIRST_BLOCK = 1024  # pairs that a GPU waits for
# Tokens per forward pass: a CPU's caches are small, and a GPU needs much work per launch.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 65536}
UNLIMITED = 2**62

S = TypeVar("S")
T = TypeVar("T")


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute one float32 score per pair, [pairs]."""
    return model(**batch).logits.float().squeeze(-1)


def score_pairs(
    model: PreTrainedModel, encoder: PairEncoder, queries: Sequence[Any], texts: Sequence[Any], *, dtype: torch.dtype,
    batch_size: int | None = None, progress: Callable[[int], Any] | None = None, keep_ids: bool = False,
) -> np.ndarray:  # fmt: skip
    """Compute the model's raw score of each pair, float32 [pairs].

    A pair read in several windows gets the score of the best one (MaxP: Dai and Callan, SIGIR 2019). A batch that
    doesn't fit the device's memory is halved. `progress` is called with the number of pairs passed to the device since
    the last call. With `keep_ids`, the encoder keeps the token ids for later calls.
    """
    scorer = _Scorer(model, encoder, len(queries), dtype=dtype, batch_size=batch_size, progress=progress)
    # Entered once rather than in each thread, since they change state that threads share.
    with evaluation_mode(model), quiet_transformers(), first_token_only(model):
        blocks = split_blocks(len(queries), scorer.device, passages=encoder.passages)
        encode = lambda block: encoder.windows(queries[block], texts[block], keep=keep_ids)  # noqa: E731
        for block, (encoded, pair) in zip(blocks, compute_ahead(encode, blocks), strict=True):
            scorer.score(encoded, block.start + pair)
    return scorer.scores


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and then back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def split_blocks(n_pairs: int, device: torch.device, *, passages: int = 1) -> list[slice]:
    """Split pairs into blocks: fewer of those with several windows. A GPU's grow from a small one, to start early."""
    largest = max(MIN_BLOCK, PAIRS_PER_BLOCK // passages)
    blocks, start, size = [], 0, largest if device.type == "cpu" else min(FIRST_BLOCK, largest)
    while start < n_pairs:
        blocks.append(slice(start, start + size))
        start, size = start + size, min(2 * size, largest)
    return blocks


def compute_ahead(compute: Callable[[S], T], inputs: Sequence[S]) -> Iterator[T]:
    """Compute a value for each input, in order; a thread computes the next one while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = deque(thread.submit(compute, each) for each in inputs[:1])
        for i in range(len(inputs)):
            value = upcoming.popleft().result()
            upcoming.extend(thread.submit(compute, each) for each in inputs[i + 1 : i + 2])
            yield value


class _Scorer:
    """Scores blocks of encoded windows, on a CPU with a thread per core."""

    def __init__(
        self, model: PreTrainedModel, encoder: PairEncoder, n_pairs: int, *, dtype: torch.dtype,
        batch_size: int | None, progress: Callable[[int], Any] | None,
    ) -> None:  # fmt: skip
        self.scores = np.full(n_pairs, -np.inf, dtype=np.float32)
        self.model, self.encoder, self.dtype, self.batch_size = model, encoder, dtype, batch_size
        self.device = model.device
        budget = TOKENS_PER_PASS.get(self.device.type, TOKENS_PER_PASS["cpu"])
        self.max_tokens = budget if batch_size is None else UNLIMITED
        self.progress = progress
        self.lock = threading.Lock()  # guards the scores, the queue and the progress bar

    def score(self, encoded: Encoded, pair: np.ndarray) -> None:
        """Score windows; `pair` has the index of each window's pair."""
        self.encoded, self.pair, self.lengths = encoded, pair, encoded.lengths
        self.found: list[tuple[np.ndarray, torch.Tensor]] = []  # indices of windows, and their scores
        batches = length_batches(self.lengths, max_tokens=self.max_tokens, max_pairs=self.batch_size)
        if self.device.type == "cpu" and self.batch_size is None and len(batches) > 1:
            batches = balance_batches(batches, self.lengths, self.max_tokens, torch.get_num_threads())
        self.queue = deque(batches)
        # Small operations gain little from several threads: one batch per core is faster than all cores on a batch.
        workers = min(torch.get_num_threads(), len(self.queue)) if self.device.type == "cpu" else 1
        if workers == 1:
            self._work()
        else:
            self._work_in_threads(workers)
        # A GPU's scores are copied once per block, since the host waits for the device then.
        indices = np.concatenate([indices for indices, _ in self.found])
        np.maximum.at(self.scores, pair[indices], torch.cat([scores for _, scores in self.found]).cpu().numpy())

    def _work_in_threads(self, workers: int) -> None:
        with core_pool(workers) as pool:
            try:
                for done in as_completed([pool.submit(self._work) for _ in range(workers)]):
                    done.result()
            except BaseException:  # also a KeyboardInterrupt: stop the other threads
                self.queue.clear()
                raise

    def _work(self) -> None:
        """Score batches from the queue until it is empty."""
        with torch.inference_mode(), autocast(self.device, self.dtype):
            while True:
                with self.lock:
                    if not self.queue:
                        return
                    indices = self.queue.popleft()
                self._score_batch(indices)

    def _score_batch(self, indices: np.ndarray) -> None:
        batch = {key: self._to_device(value) for key, value in self.encoder.pad(self.encoded, indices).items()}
        try:
            scores = forward(self.model, batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(indices) == 1:
                raise
            logger.warning("out of memory with %d pairs per pass; continuing with %d", len(indices), len(indices) // 2)
            with self.lock:
                self.max_tokens = min(self.max_tokens, batch["input_ids"].numel() // 2)
                remaining = np.concatenate([indices, *self.queue])
                self.queue.clear()
                lengths = self.lengths[remaining]
                parts = length_batches(lengths, max_tokens=self.max_tokens, max_pairs=self.batch_size)
                self.queue.extend(remaining[part] for part in parts)
            return
        with self.lock:
            self.found.append((indices, scores))
            if self.progress is not None:  # a pair counts when its first window is scored
                self.progress(int(np.sum((indices == 0) | (self.pair[indices] != self.pair[indices - 1]))))

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)  # doesn't wait for the device's earlier work


# What `torch.get_num_threads` returns before the first of several pools changes it.
_TORCH_THREADS = SharedContext(lambda: contextlib.nullcontext(torch.get_num_threads()))


@contextlib.contextmanager
def core_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Create a pool of workers that share torch's threads evenly."""
    with _TORCH_THREADS as threads:
        share = max(1, threads // workers)
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)  # set per thread, and the default for new ones


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is exhausted; not every device has an error class for that."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "allocate memory" in message
