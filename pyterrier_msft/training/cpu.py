"""Faster training on a CPU: replacements of dropout and attention, and one chunk per thread.

Training is 1.5 times as fast as with torch's own, on 2 cores with bfloat16 in hardware and MiniLM's dropout of 0.1
(see `benchmarks/training.py`). The weights are as good; only the dropout masks differ.
"""

import pickle
import random
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from pyterrier_msft.model.first_token import CPU_ATTENTION, scores_first_token
from pyterrier_msft.model.scoring import core_pool, forward
from pyterrier_msft.training.gradient_cache import Chunk, ScoreGrads

MAX_THREADS = 8
MAX_GRADIENT_BYTES = 2 * 2**30  # over all threads, each of which holds its own gradients


# ---- one chunk per thread


def max_threads(network: PreTrainedModel) -> int:
    """Return how many threads may compute chunks at the same time."""
    gradients = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    return max(1, min(MAX_THREADS, MAX_GRADIENT_BYTES // max(1, gradients), torch.get_num_threads()))


def supports_threads(model: torch.nn.Module, chunk: Chunk) -> bool:
    """Return whether threads can compute this model's chunks in parallel.

    They can't if the forward pass draws from a random state that threads share (e.g. dropout without torch's module),
    if layers are recomputed in the backward pass, or if hooks run the optimizer during the backward pass.
    """
    before = _global_random_states()
    with torch.no_grad():
        _forward_with_seed(model, {name: values[:1] for name, values in chunk.items()}, 0)
    draws = pickle.dumps(_global_random_states()) != pickle.dumps(before)
    has_hooks = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002
    torch.set_rng_state(torch.from_numpy(before[2]))
    return not (draws or has_hooks or recomputes)


def threaded_step(
    model: torch.nn.Module, chunks: Sequence[Chunk], loss_and_score_grads: ScoreGrads, threads: int
) -> torch.Tensor:
    """Add the gradient of a step to the parameters' `grad`, with one chunk per thread.

    Small operations gain little from several threads, so one chunk per core is faster than all cores on one chunk.
    Gradients are added in the order of the chunks, so that results are reproducible bit for bit.

    Returns:
        The loss, detached.
    """
    seeds = torch.randint(2**62, (len(chunks),)).tolist()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    threads = min(threads, len(chunks))

    def backward_chunk(scores: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(scores, parameters, grad, allow_unused=True)

    with core_pool(threads) as pool:
        scores = list(pool.map(partial(_forward_with_seed, model), chunks, seeds))
        loss, score_grads = loss_and_score_grads(scores)
        for start in range(0, len(chunks), threads):  # bounds the gradients held at once
            window = slice(start, start + threads)
            for grads in pool.map(backward_chunk, scores[window], score_grads[window]):
                _add_grads(parameters, grads)
            del grads
    return loss


def _add_grads(parameters: Sequence[torch.nn.Parameter], grads: Sequence[torch.Tensor | None]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad.clone()  # autograd may return one tensor for two parameters
        else:
            parameter.grad.add_(grad)


def _forward_with_seed(model: torch.nn.Module, chunk: Chunk, seed: int) -> torch.Tensor:
    _thread_bits.generator = np.random.SFC64(seed)
    try:
        return forward(model, chunk)
    finally:
        _thread_bits.generator = None


def _global_random_states() -> tuple[Any, Any, np.ndarray]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()  # noqa: NPY002


# ---- dropout and attention


def patch_for_cpu(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace dropout and attention with equivalent implementations that are faster on a CPU.

    On a CPU, torch is slow at drawing dropout's random numbers and in the backward pass of fused attention.
    """
    dropouts = [module for module in network.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    for module in dropouts:
        module.forward = partial(_dropout, module)  # type: ignore[method-assign]
    if network.config._attn_implementation != "sdpa":
        return
    if dropouts and scores_first_token(network):
        network.set_attn_implementation(CPU_ATTENTION)
    elif not dropouts and dtype == torch.bfloat16:
        network.set_attn_implementation("eager")


class _ThreadBits(threading.local):
    """A thread's generator of dropout's random bits. None: a new one for each call, seeded by torch's random state."""

    generator: np.random.SFC64 | None = None


_thread_bits = _ThreadBits()


class _Dropout(torch.autograd.Function):
    """Dropout with random bits from numpy, determined by torch's random state or the thread's seed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        generator = _thread_bits.generator or np.random.SFC64(int(torch.randint(2**62, ())))
        bits = generator.random_raw(-(-x.numel() // 4)).view(np.uint16)
        ctx.kept, ctx.scale = (bits[: x.numel()] >= round(p * 2**16)).reshape(x.shape), 1 / (1 - p)
        return _apply_mask(x, ctx.kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _apply_mask(grads[0], ctx.kept, ctx.scale), None


def _dropout(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return _Dropout.apply(x, module.p) if module.training and module.p > 0 else x


def _apply_mask(x: torch.Tensor, kept: np.ndarray, scale: float) -> torch.Tensor:
    if x.dtype == torch.float32:  # numpy is faster, but has no bfloat16
        return torch.from_numpy(np.multiply(x.detach().numpy(), kept)).mul_(scale)
    return (x * torch.from_numpy(kept)).mul_(scale)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute transformers' eager attention, (B, heads, T, d), with the dropout above."""
    weights = torch.matmul(query * scaling, key.mT)
    weights = (weights if attention_mask is None else weights.add_(attention_mask)).softmax(-1)
    weights = _Dropout.apply(weights, dropout) if dropout > 0 else weights
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(CPU_ATTENTION, _attention)
AttentionMaskInterface.register(CPU_ATTENTION, eager_mask)
