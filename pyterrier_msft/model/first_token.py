"""The last layer, for the first token alone."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

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
