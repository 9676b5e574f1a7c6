"""Compute the gradient of a step of any size with one chunk's activations in memory at a time.

Gradient caching (Gao et al., RepL4NLP 2021) costs one extra forward pass; the gradient is unchanged.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from pyterrier_msft.model.scoring import UNLIMITED, forward

Chunk = dict[str, torch.Tensor]  # the token ids (and masks) of some pairs, each [pairs, tokens]
ScoreGrads = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, Sequence[torch.Tensor]]]
"""Computes the loss from the scores of all chunks, and its gradient with respect to the scores of each chunk."""

# On a CPU, a process that needs too much memory is killed; a GPU raises an error that training recovers from.
# Together with BERT-base's weights, gradients and AdamW moments, this fits a machine with 8 GB.
MAX_ACTIVATION_BYTES = 4 * 2**30


def gradient_cache_step(
    model: torch.nn.Module, chunks: Sequence[Chunk], loss_and_score_grads: ScoreGrads, accelerator: Accelerator
) -> torch.Tensor:
    """Add the gradient of a step to the parameters' `grad`, chunk by chunk.

    Score all chunks without a graph, and differentiate the loss with respect to the scores. Then score each chunk
    again, with the same random state (and so the same dropout), and backpropagate its part of that gradient.

    Returns:
        The loss, detached.
    """
    device = accelerator.device
    states, scores = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(device))
            scores.append(forward(model, chunk))
    end = _random_state(device)
    loss, score_grads = loss_and_score_grads(scores)
    try:
        for number, (chunk, state, grad) in enumerate(zip(chunks, states, score_grads, strict=True), 1):
            _set_random_state(state, device)
            is_last = number == len(chunks)  # the only one after which DDP exchanges gradients
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                accelerator.backward((forward(model, chunk) * grad).sum())
    finally:
        _set_random_state(end, device)
    return loss


def split_chunks(chunks: Sequence[Chunk], max_pairs: int | None) -> list[Chunk]:
    """Split chunks so that none has more than `max_pairs` pairs."""
    if max_pairs is None:
        return list(chunks)
    return [
        dict(zip(chunk, part, strict=True))
        for chunk in chunks
        for part in zip(*(values.split(max_pairs) for values in chunk.values()), strict=True)
    ]


def max_graph_tokens(network: PreTrainedModel, dtype: torch.dtype, *, max_length: int, device: torch.device) -> int:
    """Estimate for how many tokens the activations of all layers fit in memory on a CPU; no limit elsewhere.

    A token takes 17 numbers per layer and hidden unit, and 2.5 per layer, head and attended token (Korthikanti et
    al., MLSys 2023).
    """
    config = network.config
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    if device.type != "cpu" or not all(hasattr(config, name) for name in names):
        return UNLIMITED
    numbers = 17 * config.hidden_size + 2.5 * config.num_attention_heads * max_length
    return max(max_length, int(MAX_ACTIVATION_BYTES / (config.num_hidden_layers * numbers * dtype.itemsize)))


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    if device.type == "mps":
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    cpu, accelerator = state
    torch.set_rng_state(cpu)
    if accelerator is not None and device.type == "mps":
        torch.mps.set_rng_state(accelerator)
    elif accelerator is not None:
        torch.cuda.set_rng_state(accelerator, device)
