"""Estimates of what training and scoring a transformer encoder cost: operations, memory, and this machine's speed."""

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig


@dataclass(frozen=True)
class Shape:
    """The size of a transformer encoder."""

    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, backbone: str) -> "Shape":
        """Read the shape from a folder's or the hub's configuration; the paper's two backbones need no download."""
        if backbone in KNOWN_SHAPES:
            return KNOWN_SHAPES[backbone]
        config = AutoConfig.from_pretrained(backbone)
        return cls(config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)

    @property
    def layer_weights(self) -> int:
        """Number of weights in a layer."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.feed_forward

    def operations(self, tokens: int) -> float:
        """Floating-point operations of a pair's forward pass."""
        return self.layers * tokens * (2 * self.layer_weights + 4 * tokens * self.hidden)

    def memory(self, pairs: float, tokens: int) -> float:
        """Bytes in training: weights, gradients, AdamW's two moments, and activations.

        Activations take 34 bytes per token and hidden unit in each layer in 16 bits, without the attention matrices
        (Korthikanti et al., MLSys 2023).
        """
        weights = self.layers * self.layer_weights + self.vocabulary * self.hidden
        return 16 * weights + 34 * pairs * tokens * self.hidden * self.layers


KNOWN_SHAPES = {
    "google/electra-base-discriminator": Shape(12, 768, 3072, 30522),
    "FacebookAI/roberta-base": Shape(12, 768, 3072, 50265),
}


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of large matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        speeds.append(2 * size**3 / (time.perf_counter() - start))
    return max(speeds)
