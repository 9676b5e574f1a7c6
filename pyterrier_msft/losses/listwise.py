"""Losses of whole lists."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyterrier_msft.losses.base import Labels, check_temperature, needs
from pyterrier_msft.losses.tensors import (
    approximate_ranks,
    discounts,
    gains_and_max_dcg,
    log_softmax,
    logsumexp,
    masked,
    mean,
    nll_against,
    preference_pairs,
)


@needs("binary")
def localized_contrastive(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Localized contrastive estimation (LCE): each relevant document against the negatives of its query.

    -log( exp s(d+) / (exp s(d+) + sum over d- of exp s(d-)) ), the mean over d+. Gao, Dai and Callan, ECIR 2021.
    Relevant documents aren't negatives of each other. Usable lists have a relevant document and a negative.
    """
    scores, labels = masked(scores, labels, mask)
    negatives = preference_pairs((labels > 0).float(), mask)  # (G, L, L)
    positive = negatives.any(-1)  # (G, L)
    return mean(mean(nll_against(scores, negatives), positive, -1), positive.any(-1))


@needs("binary")
def multi_positive(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Contrastive loss of all relevant documents together: one of them on top is enough.

    -log( sum over d+ of exp s(d+) / sum over all d of exp s(d) ). Miech et al., CVPR 2020 (MIL-NCE). With a single d+
    it equals `localized_contrastive`. Usable lists have a relevant document and a negative.
    """
    scores, labels = masked(scores, labels, mask)
    positive, negative = mask & (labels > 0), mask & (labels <= 0)  # (G, L)
    loss = softplus(logsumexp(scores, negative) - logsumexp(scores, positive))  # (G,)
    return mean(loss, positive.any(-1) & negative.any(-1))


@needs("order")
def list_mle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ListMLE: the likelihood of the labels' order, where documents are chosen one by one, the best first.

    sum over i of -log( exp s_i / (exp s_i + sum over y_j < y_i of exp s_j) ). Xia et al., ICML 2008. Tied documents
    don't compete, so that their arrangement has no influence. Usable lists have different labels.
    """
    scores, labels = masked(scores, labels, mask)
    lower = preference_pairs(labels, mask)  # (G, L, L)
    return mean(nll_against(scores, lower).sum(-1), lower.any(-1).any(-1))


@needs("order")
def position_aware_list_mle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Position-aware ListMLE (p-ListMLE): ListMLE with larger weights for the top of the labels' order.

    The terms of `list_mle`, weighted by 2^(n - rank) - 1 for a list of n documents. Lan et al., UAI 2014. Here the
    weights of a list are divided by their sum; otherwise one more document would double a list's influence. Tied
    documents share the best of their ranks. Usable lists have different labels.
    """
    scores, labels = masked(scores, labels, mask)
    lower = preference_pairs(labels, mask)  # (G, L, L)
    ranks, n = 1 + lower.sum(-2), mask.sum(-1, keepdim=True)  # (G, L), (G, 1)
    # Divided by 2^n, which cancels in the division by the sum: lists of more than 127 documents would be infinite.
    weights = torch.where(mask, torch.exp2(-ranks.float()) - torch.exp2(-n.float()), 0)  # (G, L)
    total = weights.sum(-1)  # (G,)
    loss = (weights * nll_against(scores, lower)).sum(-1) / torch.where(total > 0, total, 1)
    return mean(loss, lower.any(-1).any(-1))


@needs("graded")
def listnet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ListNet: the cross-entropy between the top-one probabilities of the labels and of the scores.

    -sum over d of softmax(y)_d log softmax(s)_d. Cao et al., ICML 2007. With a teacher's scores as labels it equals
    `kl_divergence` up to a constant. Usable lists have at least two documents.
    """
    scores, labels = masked(scores, labels, mask)
    loss = -(log_softmax(labels, mask).exp() * log_softmax(scores, mask)).sum(-1)  # (G,)
    return mean(loss, mask.sum(-1) > 1)


@dataclass(frozen=True)
class KLDivergence:
    """Kullback-Leibler divergence of the model's top-one probabilities from the teacher's.

    T² · sum over d of p_d (log p_d - log q_d), with p = softmax(y / T) and q = softmax(s / T). Hinton, Vinyals and
    Dean, 2015. Labels are the teacher's scores; a higher temperature T gives lower ranks more weight, and T² keeps the
    size of the gradient. Usable lists have at least two documents.
    """

    temperature: float = 1.0
    labels: ClassVar[Labels] = "scores"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = masked(scores, labels, mask)
        log_p, log_q = (log_softmax(x / self.temperature, mask) for x in (labels, scores))  # (G, L)
        return self.temperature**2 * mean((log_p.exp() * (log_p - log_q)).sum(-1), mask.sum(-1) > 1)


kl_divergence = KLDivergence()


@dataclass(frozen=True)
class ADRMSE:
    """ADR-MSE: the squared error of approximate, differentiable ranks, with larger weights at the top.

    mean over d of (r_d - p_d)² / log2(1 + r_d), with p_i = 1 + sum over j ≠ i of sigmoid((s_j - s_i) / T). Schlatt et
    al., ECIR 2025 (Rank-DistiLLM). The ranks r, from 1, are those by the labels; tied documents have the mean of their
    ranks. A lower temperature T makes p closer to true ranks. Usable lists have different labels.
    """

    temperature: float = 1.0
    labels: ClassVar[Labels] = "order"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = masked(scores, labels, mask)
        pairs = preference_pairs(labels, mask)  # (G, L, L)
        others = mask.sum(-1, keepdim=True) - 1  # (G, 1)
        ranks = 1 + (others + pairs.sum(-2) - pairs.sum(-1)) / 2  # (G, L): a better document counts 1, a tied one 1/2
        errors = (ranks - approximate_ranks(scores, mask, self.temperature)).square() / (1 + ranks).log2()
        return mean(mean(errors, mask, -1), pairs.any(-1).any(-1))


adr_mse = ADRMSE()


@dataclass(frozen=True)
class ApproxNDCG:
    """Approximate nDCG: 1 - nDCG with approximate, differentiable ranks.

    1 - sum over d of g_d / log2(1 + p_d) / maxDCG, with the gain g = 2^y - 1 and p_i = 1 + sum over j ≠ i of
    sigmoid((s_j - s_i) / T). Qin, Liu and Li, Information Retrieval 2010; Bruch et al., SIGIR 2019. A lower temperature
    T makes the loss closer to 1 - nDCG, but its gradient vanishes for documents that are far apart. Labels are grades;
    negative ones count as 0. Usable lists have different grades.
    """

    temperature: float = 1.0
    labels: ClassVar[Labels] = "graded"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = masked(scores, labels, mask)
        grades = labels.clamp(min=0)
        gains, max_dcg = gains_and_max_dcg(grades)  # a masked document has no gain
        dcg = (gains * discounts(approximate_ranks(scores, mask, self.temperature))).sum(-1)  # (G,)
        is_usable = preference_pairs(grades, mask).any(-1).any(-1)
        return mean(1 - dcg / torch.where(max_dcg > 0, max_dcg, 1), is_usable)


approx_ndcg = ApproxNDCG()
