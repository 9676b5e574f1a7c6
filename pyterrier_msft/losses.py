"""Losses over lists of documents: pure functions `(scores, labels, mask) -> scalar` of torch tensors.

**Arguments.** `scores`, `labels` and `mask` have the shape [G, L]: each row is a list, the documents of one query.
Labels are higher for better documents. The mask is boolean, and True where there is a document; values elsewhere have
no influence, not even NaN.

**Value.** A float32 scalar, whatever the precision of the scores. Lists with nothing to learn from aren't usable, and
are left out. If no document, pair or list is usable, the loss is 0 with a gradient of 0, and still part of the graph.

**Means.** A point-wise loss is the mean over the batch's documents, a pair-wise loss over all its usable pairs, and a
list-wise loss over its usable lists, so that each query counts the same whatever the length of its list.

**Labels.** The attribute `labels` of a loss says which labels it needs, see `Labels`. Set it with `needs`; a function
without it is accepted everywhere. Losses with parameters are frozen dataclasses, called like the functions. Their
lower-case namesakes have the default parameters: `KLDivergence(temperature=2.0)` and `kl_divergence`.

In the formulas, s is a score, y a label, d+ a document with y > 0 and d- any other document; log is the natural
logarithm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

Labels = Literal["order", "binary", "graded", "scores"]
"""How a loss interprets labels. "order": which of two is higher, as in ranks; "binary": above 0 is relevant; "graded":
grades of relevance, 0 for none, where a higher grade is a larger gain; "scores": real-valued scores of a teacher."""

# The needs that each kind of labels satisfies: grades can be read as binary, a teacher's scores can't.
_SATISFIES: dict[Labels, set[Labels]] = {
    "order": {"order"},
    "binary": {"order", "binary"},
    "graded": {"order", "binary", "graded"},
    "scores": {"order", "scores"},
}

_L = TypeVar("_L", bound=Loss)


def needs(labels: Labels) -> Callable[[_L], _L]:
    """Declare which labels a loss function needs, so that a fitter that can't supply them rejects it."""
    if labels not in get_args(Labels):
        raise ValueError(f"labels must be one of {get_args(Labels)}; got {labels!r}")

    def declare(loss: _L) -> _L:
        vars(loss)["labels"] = labels
        return loss

    return declare


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0; got {temperature!r}")


@needs("binary")
def localized_contrastive(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Localized contrastive estimation (LCE): each relevant document against the negatives of its query.

    -log( exp s(d+) / (exp s(d+) + sum over d- of exp s(d-)) ), the mean over d+. Gao, Dai and Callan, ECIR 2021.
    Relevant documents aren't negatives of each other. Usable lists have a relevant document and a negative.
    """
    scores, labels = _masked(scores, labels, mask)
    negatives = _preference_pairs((labels > 0).float(), mask)  # (G, L, L)
    positive = negatives.any(-1)  # (G, L)
    return _mean(_mean(_nll_against(scores, negatives), positive, -1), positive.any(-1))


@needs("binary")
def multi_positive(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Contrastive loss of all relevant documents together: one of them on top is enough.

    -log( sum over d+ of exp s(d+) / sum over all d of exp s(d) ). Miech et al., CVPR 2020 (MIL-NCE). With a single d+
    it equals `localized_contrastive`. Usable lists have a relevant document and a negative.
    """
    scores, labels = _masked(scores, labels, mask)
    positive, negative = mask & (labels > 0), mask & (labels <= 0)  # (G, L)
    loss = softplus(_logsumexp(scores, negative) - _logsumexp(scores, positive))  # (G,)
    return _mean(loss, positive.any(-1) & negative.any(-1))


@needs("binary")
def binary_cross_entropy(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of each document's relevance, independently of the other documents.

    -log sigmoid(s(d+)) and -log(1 - sigmoid(s(d-))). Nogueira and Cho, 2019 (monoBERT). All documents are usable.
    """
    scores, labels = _masked(scores, labels, mask)
    return _mean(binary_cross_entropy_with_logits(scores, (labels > 0).float(), reduction="none"), mask)


@needs("order")
def ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet: the logistic loss of each pair of documents in the labels' order.

    log(1 + exp(s_j - s_i)) for y_i > y_j. Burges et al., ICML 2005. Usable pairs have different labels.
    """
    scores, labels = _masked(scores, labels, mask)
    return _mean(softplus(-_differences(scores)), _preference_pairs(labels, mask))


@needs("order")
def weighted_ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet with larger weights for pairs near the top.

    log(1 + exp(s_j - s_i)) / (r_i + r_j) for y_i > y_j. Reddy et al., EMNLP 2024 (FIRST). The ranks r, from 1, are
    those by the current scores, and have no gradient; FIRST's code uses the teacher's ranks. As in that code,
    the mean is over the number of pairs, not the sum of weights: values are lower than `ranknet`'s, and fall with the
    lists' length. Usable pairs have different labels.
    """
    scores, labels = _masked(scores, labels, mask)
    ranks = _score_ranks(scores, labels, mask)  # (G, L)
    weights = 1 / (ranks.unsqueeze(-1) + ranks.unsqueeze(-2))  # (G, L, L)
    return _mean(weights * softplus(-_differences(scores)), _preference_pairs(labels, mask))


@dataclass(frozen=True)
class LambdaLoss:
    """LambdaRank as a loss: RankNet with each pair weighted by how much swapping it changes nDCG@k.

    sum over y_i > y_j of abs(g_i - g_j) · abs(1/D(r_i) - 1/D(r_j)) / maxDCG@k · log(1 + exp(s_j - s_i)), with the gain
    g = 2^y - 1 and the discount D(r) = log2(1 + r). Burges, Ragno and Le, NIPS 2006; Wang et al., CIKM 2018. The ranks
    r, from 1, are those by the current scores, and have no gradient. Beyond rank k, 1/D is 0 (None: no
    cutoff). Labels are grades; negative ones count as 0. Large grades don't overflow, but with ranks as labels all
    gains but the first few vanish. Usable lists have different grades.
    """

    k: int | None = None
    labels: ClassVar[Labels] = "graded"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k!r}")

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = _masked(scores, labels, mask)
        grades = labels.clamp(min=0)
        ideal = grades.sort(-1, descending=True).values  # (G, L)
        best = ideal[:, :1]

        def gain(y: Tensor) -> Tensor:
            # Divided by 2^best, which cancels in the division by maxDCG: 2^y alone is infinite from y = 128.
            return (y - best).exp2() - (-best).exp2()

        def discount(r: Tensor) -> Tensor:
            return torch.where(r <= (self.k or math.inf), 1 / (1 + r).log2(), 0)

        ideal_ranks = torch.arange(1.0, scores.shape[-1] + 1, device=scores.device)
        max_dcg = (gain(ideal) * discount(ideal_ranks)).sum(-1)  # (G,)
        swaps = _differences(gain(grades)) * _differences(discount(_score_ranks(scores, grades, mask)))  # (G, L, L)
        pairs = _preference_pairs(grades, mask)
        loss = torch.where(pairs, swaps.abs() * softplus(-_differences(scores)), 0).sum((-2, -1))  # (G,)
        return _mean(loss / torch.where(max_dcg > 0, max_dcg, 1), pairs.any(-1).any(-1))


lambda_loss = LambdaLoss()


@needs("order")
def list_mle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ListMLE: the likelihood of the labels' order, where documents are chosen one by one, the best first.

    sum over i of -log( exp s_i / (exp s_i + sum over y_j < y_i of exp s_j) ). Xia et al., ICML 2008. Tied documents
    don't compete, so that their arrangement has no influence. Usable lists have different labels.
    """
    scores, labels = _masked(scores, labels, mask)
    lower = _preference_pairs(labels, mask)  # (G, L, L)
    return _mean(_nll_against(scores, lower).sum(-1), lower.any(-1).any(-1))


@needs("order")
def position_aware_list_mle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Position-aware ListMLE (p-ListMLE): ListMLE with larger weights for the top of the labels' order.

    The terms of `list_mle`, weighted by 2^(n - rank) - 1 for a list of n documents. Lan et al., UAI 2014. Here the
    weights of a list are divided by their sum; otherwise one more document would double a list's influence. Tied
    documents share the best of their ranks. Usable lists have different labels.
    """
    scores, labels = _masked(scores, labels, mask)
    lower = _preference_pairs(labels, mask)  # (G, L, L)
    ranks, n = 1 + lower.sum(-2), mask.sum(-1, keepdim=True)  # (G, L), (G, 1)
    # Divided by 2^n, which cancels in the division by the sum: lists of more than 127 documents would be infinite.
    weights = torch.where(mask, torch.exp2(-ranks.float()) - torch.exp2(-n.float()), 0)  # (G, L)
    total = weights.sum(-1)  # (G,)
    loss = (weights * _nll_against(scores, lower)).sum(-1) / torch.where(total > 0, total, 1)
    return _mean(loss, lower.any(-1).any(-1))


@needs("graded")
def listnet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ListNet: the cross-entropy between the top-one probabilities of the labels and of the scores.

    -sum over d of softmax(y)_d log softmax(s)_d. Cao et al., ICML 2007. With a teacher's scores as labels it equals
    `kl_divergence` up to a constant. Usable lists have at least two documents.
    """
    scores, labels = _masked(scores, labels, mask)
    loss = -(_log_softmax(labels, mask).exp() * _log_softmax(scores, mask)).sum(-1)  # (G,)
    return _mean(loss, mask.sum(-1) > 1)


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
        _check_temperature(self.temperature)

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = _masked(scores, labels, mask)
        log_p, log_q = (_log_softmax(x / self.temperature, mask) for x in (labels, scores))  # (G, L)
        return self.temperature**2 * _mean((log_p.exp() * (log_p - log_q)).sum(-1), mask.sum(-1) > 1)


kl_divergence = KLDivergence()


@needs("scores")
def margin_mse(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Margin-MSE: the squared error of the teacher's margins between documents.

    ((s_i - s_j) - (y_i - y_j))² for each pair of documents in a list. Hofstätter et al., 2020. Labels are the teacher's
    scores. In the paper a list is one relevant document and one negative. All pairs are usable, ties too.
    """
    scores, labels = _masked(scores, labels, mask)
    pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)  # (G, L, L), each pair once
    return _mean(_differences(scores - labels).square(), pairs)


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
        _check_temperature(self.temperature)

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss."""
        scores, labels = _masked(scores, labels, mask)
        pairs = _preference_pairs(labels, mask)  # (G, L, L)
        others = mask.sum(-1, keepdim=True) - 1  # (G, 1)
        ranks = 1 + (others + pairs.sum(-2) - pairs.sum(-1)) / 2  # (G, L): a better document counts 1, a tied one 1/2
        present = torch.where(mask.unsqueeze(-1), torch.sigmoid(_differences(scores) / self.temperature), 0)
        approximate = 0.5 + present.sum(-2)  # (G, L): 1 less the document's own sigmoid(0)
        errors = (ranks - approximate).square() / (1 + ranks).log2()
        return _mean(_mean(errors, mask, -1), pairs.any(-1).any(-1))


adr_mse = ADRMSE()


@dataclass(frozen=True, repr=False)
class Combination:
    """A weighted sum of losses on the same labels, made by `combine`."""

    parts: tuple[tuple[Loss, float], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("combine needs at least one (loss, weight); got none")
        for part in self.parts:
            if not (
                isinstance(part, tuple) and len(part) == 2 and callable(part[0]) and -math.inf < part[1] < math.inf
            ):
                raise ValueError(f"(loss, weight) must be a callable and a finite number; got {part!r}")
        if not self._sufficient_labels():
            raise ValueError(f"losses must be able to share labels; got {self!r}, which need {sorted(self._needs())}")

    @property
    def labels(self) -> Labels | None:
        """The least specific kind of labels that all parts can use; None if no part declares any."""
        return self._sufficient_labels()[0] if self._needs() else None

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Compute the weighted sum."""
        return torch.stack([weight * loss(scores, labels, mask) for loss, weight in self.parts]).sum()

    def __repr__(self) -> str:
        parts = [f"({getattr(loss, '__name__', None) or repr(loss)}, {weight})" for loss, weight in self.parts]
        return f"combine({', '.join(parts)})"

    def _needs(self) -> set[Labels]:
        return {kind for loss, _ in self.parts if (kind := getattr(loss, "labels", None)) is not None}

    def _sufficient_labels(self) -> list[Labels]:
        return [kind for kind, satisfied in _SATISFIES.items() if self._needs() <= satisfied]


def combine(*parts: tuple[Loss, float]) -> Combination:
    """Combine losses into a weighted sum: `combine((ranknet, 0.5), (localized_contrastive, 1.0))`.

    The sum needs labels that all parts can read, here "binary".

    Raises:
        ValueError: If no labels suit all parts, e.g. a loss for relevance and one for a teacher's scores.
    """
    return Combination(parts)


def _masked(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float32, with 0 where there is no document. Must come first: 0 · NaN is NaN, in gradients too."""
    return torch.where(mask, scores.float(), 0), torch.where(mask, labels.float(), 0)  # (G, L) each


def _mean(values: Tensor, usable: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the usable values; 0 if there are none. The others must be finite too, or the gradient isn't."""
    return torch.where(usable, values, 0).sum(dim) / usable.sum(dim).clamp(min=1)


def _differences(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) - x.unsqueeze(-2)  # (G, L, L), x_i - x_j at [i, j]


def _preference_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """Pairs with a preference: True at [i, j] where i and j are documents with y_i > y_j."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & (labels.unsqueeze(-1) > labels.unsqueeze(-2))  # (G, L, L)


def _score_ranks(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 by the scores, without a gradient. Among equal scores, the lower label comes first.

    So the ranks of equal scores don't depend on the order of documents, and a model with all scores equal can learn.
    """
    order = labels.argsort(dim=-1, stable=True)  # (G, L)
    ordered = torch.where(mask, scores, -math.inf).gather(-1, order)
    return order.gather(-1, ordered.argsort(dim=-1, descending=True, stable=True)).argsort(-1).float() + 1  # (G, L)


def _logsumexp(x: Tensor, chosen: Tensor) -> Tensor:
    """Logsumexp over the chosen items of the last dimension; 0 if there are none, as the gradient of log 0 is NaN."""
    some = chosen.any(-1, keepdim=True)
    return torch.where(some.squeeze(-1), torch.where(chosen | ~some, x, -math.inf).logsumexp(-1), 0)


def _log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the documents; 0 elsewhere."""
    chosen = mask | ~mask.any(-1, keepdim=True)
    return torch.where(mask, torch.where(chosen, x, -math.inf).log_softmax(-1), 0)  # (G, L)


def _nll_against(scores: Tensor, against: Tensor) -> Tensor:
    """-log of a document's probability among itself and the documents j with against[i, j]; 0 if there are none."""
    loss = softplus(_logsumexp(-_differences(scores), against))  # differences are exact for scores of any size
    return torch.where(against.any(-1), loss, 0)  # (G, L)
