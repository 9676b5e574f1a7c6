"""Score (query, text) pairs in batches, for `transform` and for validation alike."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.encoding import Encoded, PairEncoder, balance_batches, length_batches
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.precision import autocast
from pyterrier_msft.model.threads import SharedContext

logger = logging.getLogger(__name__)

# Pairs tokenized and sorted by length at a time: enough for little padding, few enough to bound memory.
PAIRS_PER_BLOCK = 8192
# Tokens per forward pass: a CPU's caches are small, and a GPU needs much work per launch.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 65536}
UNLIMITED = 2**62


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute one float32 score per pair, [pairs]."""
    return model(**batch).logits.float().squeeze(-1)


def score_pairs(
    model: PreTrainedModel, encoder: PairEncoder, queries: Sequence[Any], texts: Sequence[Any], *, dtype: torch.dtype,
    batch_size: int | None = None, progress: Callable[[int], Any] | None = None,
) -> np.ndarray:  # fmt: skip
    """Compute the model's raw score of each pair, float32 [pairs].

    A pair read in several windows gets the score of the best one (MaxP: Dai and Callan, SIGIR 2019). A batch that
    doesn't fit the device's memory is halved. `progress` is called with the number of pairs scored since the last call.
    """
    scorer = _Scorer(model, encoder, len(queries), dtype=dtype, batch_size=batch_size, progress=progress)
    was_training = model.training
    model.eval()
    try:
        # Entered once rather than in each thread, since both change state that threads share.
        with quiet_transformers(), first_token_only(model):
            for start in range(0, len(queries), PAIRS_PER_BLOCK):
                block = slice(start, start + PAIRS_PER_BLOCK)
                encoded, pair = encoder.windows(queries[block], texts[block])
                scorer.score(encoded, start + pair)
    finally:
        model.train(was_training)
    return scorer.scores


class _Scorer:
    """Scores blocks of encoded windows, on a CPU with a thread per core."""

    def __init__(
        self, model: PreTrainedModel, encoder: PairEncoder, n_pairs: int, *, dtype: torch.dtype,
        batch_size: int | None, progress: Callable[[int], Any] | None,
    ) -> None:  # fmt: skip
        self.scores = np.full(n_pairs, -np.inf, dtype=np.float32)
        self.model, self.encoder, self.dtype, self.batch_size = model, encoder, dtype, batch_size
        self.device = next(model.parameters()).device
        budget = TOKENS_PER_PASS.get(self.device.type, TOKENS_PER_PASS["cpu"])
        self.max_tokens = budget if batch_size is None else UNLIMITED
        self.progress = progress
        self.lock = threading.Lock()  # guards the scores, the queue and the progress bar

    def score(self, encoded: Encoded, pair: np.ndarray) -> None:
        """Score windows; `pair` has the index of each window's pair."""
        self.encoded, self.pair = encoded, pair
        self.lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        batches = length_batches(self.lengths, max_tokens=self.max_tokens, max_pairs=self.batch_size)
        if self.device.type == "cpu" and self.batch_size is None and len(batches) > 1:
            batches = balance_batches(batches, self.lengths, self.max_tokens, torch.get_num_threads())
        self.queue = deque(batches)
        # Small operations gain little from several threads: one batch per core is faster than all cores on a batch.
        workers = min(torch.get_num_threads(), len(self.queue)) if self.device.type == "cpu" else 1
        if workers == 1:
            self._work()
            return
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
        batch = {key: value.to(self.device) for key, value in self.encoder.pad(self.encoded, indices).items()}
        try:
            found = forward(self.model, batch).cpu().numpy()
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
            np.maximum.at(self.scores, self.pair[indices], found)
            if self.progress is not None:  # a pair counts when its first window is scored
                self.progress(int(np.sum((indices == 0) | (self.pair[indices] != self.pair[indices - 1]))))


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
