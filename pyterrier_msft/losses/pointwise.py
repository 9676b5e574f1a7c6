"""Losses of each document by itself."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pyterrier_msft.losses.base import Labels, needs
from pyterrier_msft.losses.tensors import masked, mean


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of each document's relevance, independently of the other documents.

    -w y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)). Nogueira and Cho, 2019 (monoBERT). A document with a label above
    0 has y = 1, any other y = 0. With `soft_labels`, y is the label itself, a teacher's probability of relevance;
    labels beyond 0 and 1 count as 0 and 1. The weight w of relevance, `pos_weight`, makes up for a majority of
    negatives. As in torch, the mean is over the number of documents, not the sum of weights. All documents are usable.
    """

    pos_weight: float = 1.0
    soft_labels: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.pos_weight < math.inf:
            raise ValueError(f"pos_weight must be a finite number > 0; got {self.pos_weight!r}")

    @property
    def labels(self) -> Labels:
        """The kind of labels: "probabilities" with soft labels, else "binary"."""
        return "probabilities" if self.soft_labels else "binary"

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = masked(scores, labels, mask)
        target = labels.clamp(0, 1) if self.soft_labels else (labels > 0).float()
        weight = scores.new_tensor(self.pos_weight)
        return mean(binary_cross_entropy_with_logits(scores, target, pos_weight=weight, reduction="none"), mask)


binary_cross_entropy = BinaryCrossEntropy()


@needs("scores")
def mse(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the teacher's scores.

    (s - y)². Labels are the teacher's scores, which the re-ranker learns to reproduce, with their size and offset:
    `Distillation(scale=...)` brings them to a scale that it can reach. `margin_mse` learns only their differences. All
    documents are usable.
    """
    scores, labels = masked(scores, labels, mask)
    return mean((scores - labels).square(), mask)
