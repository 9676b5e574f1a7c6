"""Measure a GPU: how busy it is, how much memory is used, and what happens under a limit; with stand-ins on a CPU."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.stats import kendalltau
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

# Dense bf16 peaks in TFLOP/s, from the vendor's data sheets; the first name that a card's contains.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
LIMIT_GIB = 8
LIMIT_PAIRS = 8  # per pass, in place of LIMIT_GIB on a CPU


def peak_of(card: str) -> float | None:
    """Return a card's peak in FLOP/s; None for an unknown card."""
    return next((1e12 * peak for name, peak in PEAKS.items() if name in card), None)


def busy_share(call: Callable[[], Any], device: torch.device) -> float:
    """Return the share of the time in which a kernel runs (on a CPU, an operator), from a call's first to its last."""
    kind = "CUDA" if device.type == "cuda" else "CPU"
    with profile(activities=[getattr(ProfilerActivity, kind)], acc_events=True) as profiler:
        call()
        wait_for(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == kind and not event.is_user_annotation and not event.name.startswith("Mem")
    ]
    busy, end = 0.0, -np.inf
    for first, last in sorted(spans):  # which may overlap
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy / (end - min(spans)[0])


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def limited_memory(network: PreTrainedModel) -> Iterator[str]:
    """Limit the memory of a network's GPU; on a CPU, raise an error for passes of many pairs. Yield the limit."""
    if network.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_GIB * 2**30 / torch.cuda.mem_get_info()[1]))
        try:
            yield f"{LIMIT_GIB} GiB"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    run = type(network).forward

    def forward(network: PreTrainedModel, **batch: torch.Tensor) -> Any:
        if len(batch["input_ids"]) > LIMIT_PAIRS:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return run(network, **batch)

    with mock.patch.object(type(network), "forward", forward):
        yield f"{LIMIT_PAIRS} pairs, simulated"


@contextlib.contextmanager
def peak_gib(device: torch.device) -> Iterator[list[float]]:
    """Measure the peak of a GPU's allocated memory, the weights included; 0 on a CPU."""
    peak = [0.0]
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated() / 2**30


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """Collect what the package logs."""
    logged: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("pyterrier_msft")
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield logged
    finally:
        logger.removeHandler(handler)


def difference(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Compare scores with those of a reference."""
    return {
        "largest difference": np.abs(scores - reference).max(),
        "standard deviation of scores": reference.std(),
        "Kendall's tau": kendalltau(scores, reference).statistic,
    }
