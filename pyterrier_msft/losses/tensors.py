"""Operations on lists of documents: tensors of shape [G, L] with a mask."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def masked(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float32, with 0 where there is no document. Must come first: 0 · NaN is NaN, in gradients too."""
    return torch.where(mask, scores.float(), 0), torch.where(mask, labels.float(), 0)  # (G, L) each


def mean(values: Tensor, usable: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the usable values; 0 if there are none. The others must be finite too, or the gradient isn't."""
    return torch.where(usable, values, 0).sum(dim) / usable.sum(dim).clamp(min=1)


def differences(x: Tensor) -> Tensor:
    """Differences of all pairs: x_i - x_j at [i, j]."""
    return x.unsqueeze(-1) - x.unsqueeze(-2)  # (G, L, L)


def preference_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """Pairs with a preference: True at [i, j] where i and j are documents with y_i > y_j."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & (labels.unsqueeze(-1) > labels.unsqueeze(-2))  # (G, L, L)


def score_ranks(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 by the scores, without a gradient. Among equal scores, the lower label comes first.

    So the ranks of equal scores don't depend on the order of documents, and a model with all scores equal can learn.
    """
    order = labels.argsort(dim=-1, stable=True)  # (G, L)
    ordered = torch.where(mask, scores, -math.inf).gather(-1, order)
    return order.gather(-1, ordered.argsort(dim=-1, descending=True, stable=True)).argsort(-1).float() + 1  # (G, L)


def approximate_ranks(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Differentiable ranks: 1 + sum over the other documents j of sigmoid((s_j - s_i) / temperature)."""
    present = torch.where(mask.unsqueeze(-1), torch.sigmoid(differences(scores) / temperature), 0)  # (G, L, L)
    return 0.5 + present.sum(-2)  # (G, L): 1 less the document's own sigmoid(0)


def discounts(ranks: Tensor, k: int | None = None) -> Tensor:
    """Discounts of nDCG@k: 1 / log2(1 + rank), and 0 beyond rank k."""
    return torch.where(ranks <= (k or math.inf), 1 / (1 + ranks).log2(), 0)


def gains_and_max_dcg(grades: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Gains 2^grade - 1 of grades >= 0, and the best DCG@k of each list, both divided by 2^(the list's best grade).

    That cancels in nDCG: 2^grade alone is infinite from 128.
    """
    ideal = grades.sort(-1, descending=True).values  # (G, L)
    best = ideal[:, :1]

    def gain(y: Tensor) -> Tensor:
        return (y - best).exp2() - (-best).exp2()

    ranks = torch.arange(1.0, grades.shape[-1] + 1, device=grades.device)
    return gain(grades), (gain(ideal) * discounts(ranks, k)).sum(-1)  # (G, L), (G,)


def logsumexp(x: Tensor, chosen: Tensor) -> Tensor:
    """Logsumexp over the chosen items of the last dimension; 0 if there are none, as the gradient of log 0 is NaN."""
    some = chosen.any(-1, keepdim=True)
    return torch.where(some.squeeze(-1), torch.where(chosen | ~some, x, -math.inf).logsumexp(-1), 0)


def log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the documents; 0 elsewhere."""
    chosen = mask | ~mask.any(-1, keepdim=True)
    return torch.where(mask, torch.where(chosen, x, -math.inf).log_softmax(-1), 0)  # (G, L)


def nll_against(scores: Tensor, against: Tensor) -> Tensor:
    """-log of a document's probability among itself and the documents j with against[i, j]; 0 if there are none."""
    loss = softplus(logsumexp(-differences(scores), against))  # differences are exact for scores of any size
    return torch.where(against.any(-1), loss, 0)  # (G, L)
