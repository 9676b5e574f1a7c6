"""Compute the last layer for the first token only."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

# The attention implementation that training registers for CPUs, see training/cpu.py.
CPU_ATTENTION = "pyterrier_msft_cpu"

# Classes of transformers that score from the first token's state only, and whose layers have the same structure.
FIRST_TOKEN_CLASSES = {
    f"{family}ForSequenceClassification" for family in ("Bert", "Electra", "Roberta", "XLMRoberta", "Camembert")
}


def scores_first_token(model: PreTrainedModel) -> bool:
    """Whether a model's class is known to score from the first token only; its subclasses may read other tokens."""
    return type(model).__module__.startswith("transformers.") and type(model).__name__ in FIRST_TOKEN_CLASSES


def last_layer(model: PreTrainedModel) -> Any:
    """Return the last layer of a model that scores from its first token only; None for others, or with adapters."""
    if not scores_first_token(model):
        return None
    layer: Any = model.base_model.encoder.layer[-1]
    attention = layer.attention.self
    return layer if type(attention.key) is type(attention.value) is torch.nn.Linear else None


@contextlib.contextmanager
def first_token_only(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily patch a model so that its last layer computes the first token's row only, forward and backward.

    The scores are the same, since the head reads no other row. With a single query vector, keys and values of all
    tokens needn't be computed either: q · (K x) = (q K) · x, and the weighted mean of V x is V times the weighted mean
    of x. Hardly any of the layer's work remains. Other models, and layers with an adapter, stay as they are.
    """
    layer = last_layer(model)
    # Other attention implementations have masks of another shape.
    has_known_mask = model.config._attn_implementation in {"sdpa", "eager", CPU_ATTENTION}
    if layer is None or not has_known_mask or "forward" in vars(layer):  # in vars: patched already
        yield
        return

    def forward(states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
        attention, first = layer.attention.self, states[:, :1]  # (B, 1, H) of (B, T, H)
        by_head = (attention.num_attention_heads, attention.attention_head_size)
        key, value = (part.weight.unflatten(0, by_head) for part in (attention.key, attention.value))  # (h, d, H)
        query = attention.query(first).squeeze(1).unflatten(-1, by_head) * attention.scaling  # (B, h, d)
        weights = torch.einsum("bhd,hde->bhe", query, key) @ states.transpose(1, 2)  # (B, h, T)
        # Equal for all tokens, so without effect on the softmax; but DDP needs a gradient for every parameter.
        weights = weights + (query * attention.key.bias.unflatten(0, by_head)).sum(-1, keepdim=True)
        if attention_mask is not None:
            mask = attention_mask[:, 0, :1]  # (B, 1, T)
            weights = weights.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else weights + mask
        weights = attention.dropout(weights.softmax(-1))
        context = torch.einsum("bhe,hde->bhd", weights @ states, value)
        context = context + weights.sum(-1, keepdim=True) * attention.value.bias.unflatten(0, by_head)
        return layer.feed_forward_chunk(layer.attention.output(context.flatten(1).unsqueeze(1), first))

    layer.forward = forward
    try:
        yield
    finally:
        vars(layer).pop("forward", None)  # another thread may have patched and restored it at the same time
