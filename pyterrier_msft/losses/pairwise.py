"""Losses of pairs of documents."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from pyterrier_msft.losses.base import Labels, needs
from pyterrier_msft.losses.tensors import (
    differences,
    discounts,
    gains_and_max_dcg,
    masked,
    mean,
    preference_pairs,
    score_ranks,
)

Scheme = Literal["lambdarank", "ndcg2++"]
NDCG_LOSS2_WEIGHT = 10.0  # of NDCG-Loss2 in NDCG-Loss2++; the default of allRank and sentence-transformers


@needs("order")
def ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet: the logistic loss of each pair of documents in the labels' order.

    log(1 + exp(s_j - s_i)) for y_i > y_j. Burges et al., ICML 2005. Usable pairs have different labels.
    """
    scores, labels = masked(scores, labels, mask)
    return mean(softplus(-differences(scores)), preference_pairs(labels, mask))


@dataclass(frozen=True)
class Hinge:
    """The pair-wise hinge loss: a document's score must exceed that of a worse one by a margin.

    max(0, m - (s_i - s_j)) for y_i > y_j. Joachims, KDD 2002 (RankSVM), without its penalty on the weights. Pairs that
    are further apart than the margin m have no gradient. Usable pairs have different labels.
    """

    margin: float = 1.0
    labels: ClassVar[Labels] = "order"

    def __post_init__(self) -> None:
        if not 0 < self.margin < math.inf:
            raise ValueError(f"margin must be a finite number > 0; got {self.margin!r}")

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = masked(scores, labels, mask)
        return mean(relu(self.margin - differences(scores)), preference_pairs(labels, mask))


hinge = Hinge()


@needs("order")
def weighted_ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet with larger weights for pairs near the top.

    log(1 + exp(s_j - s_i)) / (r_i + r_j) for y_i > y_j. Reddy et al., EMNLP 2024 (FIRST). The ranks r, from 1, are
    those by the current scores, and have no gradient; FIRST's code uses the teacher's ranks. As in that code,
    the mean is over the number of pairs, not the sum of weights: values are lower than `ranknet`'s, and fall with the
    lists' length. Usable pairs have different labels.
    """
    scores, labels = masked(scores, labels, mask)
    ranks = score_ranks(scores, labels, mask)  # (G, L)
    weights = 1 / (ranks.unsqueeze(-1) + ranks.unsqueeze(-2))  # (G, L, L)
    return mean(weights * softplus(-differences(scores)), preference_pairs(labels, mask))


@dataclass(frozen=True)
class LambdaLoss:
    """RankNet with each pair weighted by how much its order matters to nDCG@k.

    sum over y_i > y_j of abs(g_i - g_j) / maxDCG@k · w_ij · log(1 + exp(s_j - s_i)), with the gain g = 2^y - 1 and the
    discount D(r) = log2(1 + r). The ranks r, from 1, are those by the current scores, and have no gradient.
    The `scheme` says what w is:

    - "lambdarank": abs(1/D(r_i) - 1/D(r_j)), so that the weight is the change of nDCG@k if the two are swapped.
      Burges, Ragno and Le, NIPS 2006. Beyond rank k, 1/D is 0 (None: no cutoff).
    - "ndcg2++": that, plus 10 · (1/D(d) - 1/D(d + 1)) for two documents d = abs(r_i - r_j) ranks apart, of which at
      least one is in the top k. NDCG-Loss2++ of Wang et al., CIKM 2018, whose second term belongs to a bound of nDCG.

    Labels are grades; negative ones count as 0. Large grades don't overflow, but with ranks as labels all gains but the
    first few vanish. Usable lists have different grades.
    """

    k: int | None = None
    scheme: Scheme = field(default="lambdarank", kw_only=True)
    labels: ClassVar[Labels] = "graded"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k!r}")
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {get_args(Scheme)}; got {self.scheme!r}")

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = masked(scores, labels, mask)
        grades = labels.clamp(min=0)
        gains, max_dcg = gains_and_max_dcg(grades, self.k)
        weights = differences(gains).abs() * self._rank_weights(score_ranks(scores, grades, mask))  # (G, L, L)
        pairs = preference_pairs(grades, mask)
        loss = torch.where(pairs, weights * softplus(-differences(scores)), 0).sum((-2, -1))  # (G,)
        return mean(loss / torch.where(max_dcg > 0, max_dcg, 1), pairs.any(-1).any(-1))

    def _rank_weights(self, ranks: Tensor) -> Tensor:
        swaps = differences(discounts(ranks, self.k)).abs()  # (G, L, L)
        if self.scheme == "lambdarank":
            return swaps
        distances = differences(ranks).abs().clamp(min=1)  # of a document to itself: not a pair
        is_top = ranks <= (self.k or math.inf)
        bounds = torch.where(
            is_top.unsqueeze(-1) | is_top.unsqueeze(-2), discounts(distances) - discounts(distances + 1), 0
        )
        return swaps + NDCG_LOSS2_WEIGHT * bounds


lambda_loss = LambdaLoss()


@needs("scores")
def margin_mse(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Margin-MSE: the squared error of the teacher's margins between documents.

    ((s_i - s_j) - (y_i - y_j))² for each pair of documents in a list. Hofstätter et al., 2020. Labels are the teacher's
    scores. In the paper a list is one relevant document and one negative. All pairs are usable, ties too.
    """
    scores, labels = masked(scores, labels, mask)
    pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)  # (G, L, L), each pair once
    return mean(differences(scores - labels).square(), pairs)
