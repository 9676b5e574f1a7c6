"""Losses over lists of documents: pure functions `(scores, labels, mask) -> scalar`, which know torch only.

**The contract.** `scores`, `labels` and `mask` have the shape [G, L]: a row is a group, the documents of one query.
Labels are higher for better documents, the mask is boolean and True for a document; what stands elsewhere has no
influence, NaN included. The result is a float32 scalar, whatever the precision of the scores. Where there is nothing to
learn from (no document, no usable pair, no usable group) it is 0, with a gradient of 0, and still part of the graph.

**Means.** A point-wise loss is the mean over the batch's documents, a pair-wise one over all its usable pairs, and a
list-wise one over its usable groups, so that there a query counts the same whatever the length of its list.

**Labels.** Each loss says by its attribute `labels` which ones it needs, see `Labels`. A function without it is
accepted everywhere; `needs` sets it. Losses with parameters are frozen dataclasses, callable like the functions, whose
lower-case namesake has the default values: `KLDivergence(temperature=2.0)` and `kl_divergence`.

In the formulas s is a score, y a label, d+ a document with y > 0 and d- one of the others; log is the natural one.
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
"""What a loss reads in labels. "order": which of two is higher, as in ranks; "binary": above 0 is relevant; "graded":
grades of relevance, 0 for none, whose size is a gain; "scores": real-valued scores of a teacher."""

# Which needs labels of a kind fulfil: grades can be read as binary, a teacher's scores can't; all have an order.
_FULFILS: dict[Labels, set[Labels]] = {
    "order": {"order"},
    "binary": {"order", "binary"},
    "graded": {"order", "binary", "graded"},
    "scores": {"order", "scores"},
}

_L = TypeVar("_L", bound=Loss)


def needs(labels: Labels) -> Callable[[_L], _L]:
    """Declares which labels a loss function needs, so that a fitter that can't supply them refuses it."""
    if labels not in get_args(Labels):
        raise ValueError(f"expected labels among {get_args(Labels)}, found {labels!r}")

    def declare(loss: _L) -> _L:
        vars(loss)["labels"] = labels
        return loss

    return declare


@needs("binary")
def localized_contrastive(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """LCE: a relevant document against the negatives of its own query.

    -log( exp s(d+) / (exp s(d+) + sum over d- of exp s(d-)) ), Gao, Dai and Callan, ECIR 2021. Of several relevant
    documents each makes a group of the paper's with all the negatives, and the list's loss is their mean: a relevant
    document is no negative of another one. A list without a relevant document, or without a negative, isn't usable.
    """
    scores, labels = _documents(scores, labels, mask)
    against = _above((labels > 0).float(), mask)  # (G, L, L)
    positive = against.any(-1)  # (G, L)
    return _mean(_mean(_surprise(scores, against), positive, -1), positive.any(-1))


@needs("binary")
def multi_positive(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Contrastive loss with all relevant documents in the numerator: one of them on top is enough.

    -log( sum over d+ of exp s(d+) / sum over all d of exp s(d) ), Miech et al., CVPR 2020 (MIL-NCE). With a single d+
    it's `localized_contrastive`. A list without a relevant document, or without a negative, isn't usable.
    """
    scores, labels = _documents(scores, labels, mask)
    positive, negative = mask & (labels > 0), mask & (labels <= 0)  # (G, L)
    loss = softplus(_logsumexp(scores, negative) - _logsumexp(scores, positive))  # (G,)
    return _mean(loss, positive.any(-1) & negative.any(-1))


@needs("binary")
def binary_cross_entropy(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Each document by itself: is it relevant?

    -log sigmoid(s(d+)) and -log(1 - sigmoid(s(d-))), Nogueira and Cho 2019 (monoBERT). Every document is usable.
    """
    scores, labels = _documents(scores, labels, mask)
    return _mean(binary_cross_entropy_with_logits(scores, (labels > 0).float(), reduction="none"), mask)


@needs("order")
def ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet: for each pair of documents in an order, the probability of that order.

    log(1 + exp(s_j - s_i)) for y_i > y_j, Burges et al., ICML 2005. A tie in the labels is no pair.
    """
    scores, labels = _documents(scores, labels, mask)
    return _mean(softplus(-_differences(scores)), _above(labels, mask))


@needs("order")
def weighted_ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet that cares for the top: a pair's weight falls with its documents' ranks.

    log(1 + exp(s_j - s_i)) / (r_i + r_j) for y_i > y_j, Reddy et al., EMNLP 2024 (FIRST), r being the ranks, from 1, by
    the model's present scores, constants to the gradient (FIRST's own code has the teacher's ranks there). As there,
    the mean is over the number of pairs, not the sum of weights: values are lower than `ranknet`'s, the more so the
    longer the lists.
    """
    scores, labels = _documents(scores, labels, mask)
    ranks = _ranks(scores, labels, mask)  # (G, L)
    weights = 1 / (ranks.unsqueeze(-1) + ranks.unsqueeze(-2))  # (G, L, L)
    return _mean(weights * softplus(-_differences(scores)), _above(labels, mask))


@dataclass(frozen=True)
class LambdaLoss:
    """LambdaRank: RankNet with each pair weighted by what swapping the two would change in nDCG@k.

    sum over y_i > y_j of abs(g_i - g_j) · abs(1/D(r_i) - 1/D(r_j)) / maxDCG@k · log(1 + exp(s_j - s_i)), Burges,
    Ragno and Le, NIPS 2006, as a loss after Wang et al., CIKM 2018: gain g = 2^y - 1, discount D(r) = log2(1 + r), and
    1/D = 0 beyond k (None: no cut); r are the ranks, from 1, by the present scores, constants to the gradient. Labels
    are grades, those below 0 count as 0; large ones don't overflow, but with ranks for labels all gains but the first
    few would vanish. A list of equal labels isn't usable.
    """

    k: int | None = None
    labels: ClassVar[Labels] = "graded"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"expected a k of at least 1, found {self.k!r}")

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        scores, labels = _documents(scores, labels, mask)
        grades = labels.clamp(min=0)
        ideal = grades.sort(-1, descending=True).values  # (G, L)
        best = ideal[:, :1]

        def gain(y: Tensor) -> Tensor:
            # Over 2^best, which cancels in the division by maxDCG: 2^y alone is infinite from y = 128.
            return (y - best).exp2() - (-best).exp2()

        def discount(r: Tensor) -> Tensor:
            return torch.where(r <= (self.k or math.inf), 1 / (1 + r).log2(), 0)

        places = torch.arange(1.0, scores.shape[-1] + 1, device=scores.device)
        max_dcg = (gain(ideal) * discount(places)).sum(-1)  # (G,)
        swaps = _differences(gain(grades)) * _differences(discount(_ranks(scores, grades, mask)))  # (G, L, L)
        pairs = _above(grades, mask)
        loss = torch.where(pairs, swaps.abs() * softplus(-_differences(scores)), 0).sum((-2, -1))  # (G,)
        return _mean(loss / torch.where(max_dcg > 0, max_dcg, 1), pairs.any(-1).any(-1))


lambda_loss = LambdaLoss()


@needs("order")
def list_mle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ListMLE: the likelihood of the labels' order, choosing the best document first, then the best of the rest.

    sum over i of -log( exp s_i / (exp s_i + sum over y_j < y_i of exp s_j) ), Xia et al., ICML 2008. Tied documents
    don't compete, so that it doesn't matter how they are arranged; without ties it's the paper's. A list of equal
    labels isn't usable.
    """
    scores, labels = _documents(scores, labels, mask)
    against = _above(labels, mask)  # (G, L, L)
    return _mean(_surprise(scores, against).sum(-1), against.any(-1).any(-1))


@needs("order")
def position_aware_list_mle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """p-ListMLE: ListMLE that cares for the top, each term weighted by its document's place in the labels' order.

    The weights are 2^(n - place) - 1 for a list of n documents, Lan et al., UAI 2014, here over their sum in the list:
    as they are, a list with one document more would count twice as much. Tied documents share the best of their places.
    A list of equal labels isn't usable.
    """
    scores, labels = _documents(scores, labels, mask)
    against = _above(labels, mask)  # (G, L, L)
    places, n = 1 + against.sum(-2), mask.sum(-1, keepdim=True)  # (G, L), (G, 1)
    # Over 2^n, which cancels in the division by the sum: else lists of more than 127 documents are infinite.
    weights = torch.where(mask, torch.exp2(-places.float()) - torch.exp2(-n.float()), 0)  # (G, L)
    total = weights.sum(-1)  # (G,)
    loss = (weights * _surprise(scores, against)).sum(-1) / torch.where(total > 0, total, 1)
    return _mean(loss, against.any(-1).any(-1))


@needs("graded")
def listnet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ListNet: the cross-entropy of the probabilities to be on top, by the labels and by the scores.

    -sum over d of softmax(y)_d log softmax(s)_d, Cao et al., ICML 2007. A teacher's scores in place of grades make it
    `kl_divergence`, but for a constant. A list of a single document isn't usable.
    """
    scores, labels = _documents(scores, labels, mask)
    loss = -(_log_softmax(labels, mask).exp() * _log_softmax(scores, mask)).sum(-1)  # (G,)
    return _mean(loss, mask.sum(-1) > 1)


@dataclass(frozen=True)
class KLDivergence:
    """The divergence of the model's probabilities to be on top from the teacher's.

    T² · sum over d of p_d (log p_d - log q_d), p = softmax(y / T), q = softmax(s / T), y being the teacher's scores and
    T the temperature; T² keeps the gradients' size (Hinton, Vinyals and Dean 2015). A list of a single document isn't
    usable.
    """

    temperature: float = 1.0
    labels: ClassVar[Labels] = "scores"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"expected a temperature above 0, found {self.temperature!r}")

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        scores, labels = _documents(scores, labels, mask)
        log_p, log_q = (_log_softmax(x / self.temperature, mask) for x in (labels, scores))  # (G, L)
        return self.temperature**2 * _mean((log_p.exp() * (log_p - log_q)).sum(-1), mask.sum(-1) > 1)


kl_divergence = KLDivergence()


@needs("scores")
def margin_mse(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Margin-MSE: the teacher's margins between documents, squared error.

    ((s_i - s_j) - (y_i - y_j))² over all pairs of documents of a list, ties too, y being the teacher's scores. In
    Hofstätter et al. 2020 a list is one relevant document and one negative, which is then the only pair.
    """
    scores, labels = _documents(scores, labels, mask)
    pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)  # (G, L, L), each pair once
    return _mean(_differences(scores - labels).square(), pairs)


@dataclass(frozen=True)
class ADRMSE:
    """ADR-MSE: squared error between the teacher's ranks and differentiable ones, errors at the top counting more.

    mean over d of (r_d - p_d)² / log2(1 + r_d), with p_i = 1 + sum over j ≠ i of sigmoid((s_j - s_i) / T), Schlatt et
    al., ECIR 2025 (Rank-DistiLLM); r are the ranks, from 1, by the labels, the mean rank for tied ones (as p is), and T
    the temperature. A list of equal labels isn't usable.
    """

    temperature: float = 1.0
    labels: ClassVar[Labels] = "order"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"expected a temperature above 0, found {self.temperature!r}")

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        scores, labels = _documents(scores, labels, mask)
        above = _above(labels, mask)  # (G, L, L)
        others = mask.sum(-1, keepdim=True) - 1  # (G, 1)
        ranks = 1 + (others + above.sum(-2) - above.sum(-1)) / 2  # (G, L): above it count 1, tied with it one half
        present = torch.where(mask.unsqueeze(-1), torch.sigmoid(_differences(scores) / self.temperature), 0)
        approximate = 0.5 + present.sum(-2)  # (G, L): the half is 1 less the document's own sigmoid(0)
        errors = (ranks - approximate).square() / (1 + ranks).log2()
        return _mean(_mean(errors, mask, -1), above.any(-1).any(-1))


adr_mse = ADRMSE()


@dataclass(frozen=True, repr=False)
class Combination:
    """A weighted sum of losses on the same labels, made by `combine`."""

    parts: tuple[tuple[Loss, float], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("expected at least one (loss, weight) to combine, found none")
        for part in self.parts:
            if not (
                isinstance(part, tuple) and len(part) == 2 and callable(part[0]) and -math.inf < part[1] < math.inf
            ):
                raise ValueError(f"expected (loss, weight) with a callable and a finite number, found {part!r}")
        if not self._kinds():
            raise ValueError(f"expected losses that can share their labels, found {self!r} of {sorted(self._needs())}")

    @property
    def labels(self) -> Labels | None:
        """The least kind of labels that fulfils the needs of all parts; None where none states a need."""
        return self._kinds()[0] if self._needs() else None

    def __call__(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The weighted sum."""
        return torch.stack([weight * loss(scores, labels, mask) for loss, weight in self.parts]).sum()

    def __repr__(self) -> str:
        parts = [f"({getattr(loss, '__name__', None) or repr(loss)}, {weight})" for loss, weight in self.parts]
        return f"combine({', '.join(parts)})"

    def _needs(self) -> set[Labels]:
        return {kind for loss, _ in self.parts if (kind := getattr(loss, "labels", None)) is not None}

    def _kinds(self) -> list[Labels]:
        return [kind for kind, fulfilled in _FULFILS.items() if self._needs() <= fulfilled]


def combine(*parts: tuple[Loss, float]) -> Combination:
    """The weighted sum of losses: `combine((ranknet, 0.5), (localized_contrastive, 1.0))`.

    It needs the labels that serve all of them, here "binary". Losses that no labels serve, such as one for relevance
    and one for a teacher's scores, are a ValueError.
    """
    return Combination(parts)


def _documents(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 with 0 where there's no document, before any arithmetic: 0 · NaN is NaN, in gradients too."""
    return torch.where(mask, scores.float(), 0), torch.where(mask, labels.float(), 0)  # (G, L) each


def _mean(values: Tensor, usable: Tensor, dim: int | None = None) -> Tensor:
    """Over the usable ones, 0 if there are none. The others must be finite, for the gradient's sake."""
    return torch.where(usable, values, 0).sum(dim) / usable.sum(dim).clamp(min=1)


def _differences(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) - x.unsqueeze(-2)  # (G, L, L), x_i - x_j at [i, j]


def _above(labels: Tensor, mask: Tensor) -> Tensor:
    """Pairs in an order, at [i, j] where i and j are documents with y_i > y_j."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & (labels.unsqueeze(-1) > labels.unsqueeze(-2))  # (G, L, L)


def _ranks(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 by the present scores (sorting has no gradient). Of equal scores the lower label comes first.

    So equal scores have ranks that don't depend on the arrangement, and a model that gives all the same can learn.
    """
    order = labels.argsort(dim=-1, stable=True)  # (G, L)
    ordered = torch.where(mask, scores, -math.inf).gather(-1, order)
    return order.gather(-1, ordered.argsort(dim=-1, descending=True, stable=True)).argsort(-1).float() + 1  # (G, L)


def _logsumexp(x: Tensor, chosen: Tensor) -> Tensor:
    """Over the chosen ones of the last dimension; 0 where none is, since the gradient of log 0 is NaN."""
    some = chosen.any(-1, keepdim=True)
    return torch.where(some.squeeze(-1), torch.where(chosen | ~some, x, -math.inf).logsumexp(-1), 0)


def _log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Over the documents; 0 elsewhere."""
    chosen = mask | ~mask.any(-1, keepdim=True)
    return torch.where(mask, torch.where(chosen, x, -math.inf).log_softmax(-1), 0)  # (G, L)


def _surprise(scores: Tensor, against: Tensor) -> Tensor:
    """-log of a document's probability among itself and those it stands against; 0 where these are none."""
    loss = softplus(_logsumexp(-_differences(scores), against))  # differences: exact however large the scores
    return torch.where(against.any(-1), loss, 0)  # (G, L)
