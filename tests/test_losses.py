import math
import pickle
from math import exp, log, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from pyterrier_msft import losses
from pyterrier_msft.losses import ADRMSE, ApproxNDCG, BinaryCrossEntropy, Hinge, KLDivergence, LambdaLoss, combine

LN = [log(3), log(1), log(4)]  # scores with the exponentials 3, 1 and 4


def _tensors(scores, labels):
    """One list, or several of the same length, without padding."""
    scores, labels = torch.tensor(scores), torch.tensor(labels, dtype=torch.float32)
    scores, labels = (x if x.ndim == 2 else x.unsqueeze(0) for x in (scores, labels))
    return scores, labels, torch.ones(scores.shape, dtype=torch.bool)


# Values computed by hand: loss, scores, labels, value.
BY_HAND = [
    (losses.localized_contrastive, LN, [1, 0, 0], -log(3 / (3 + 1 + 4))),
    (losses.localized_contrastive, LN, [1, 0, 2], (-log(3 / (3 + 1)) - log(4 / (4 + 1))) / 2),
    (losses.localized_contrastive, [LN, LN, LN], [[1, 0, 0], [0, 0, 0], [0, 0, 1]], (log(8 / 3) + log(8 / 4)) / 2),
    (losses.multi_positive, LN, [1, 0, 0], -log(3 / 8)),
    (losses.multi_positive, LN, [1, 0, 0.5], -log((3 + 4) / 8)),
    (losses.binary_cross_entropy, LN, [0.5, 0, -1], (-log(3 / 4) - log(1 - 1 / 2) - log(1 - 4 / 5)) / 3),
    (BinaryCrossEntropy(pos_weight=2), LN, [1, 0, 0], (-2 * log(3 / 4) - log(1 / 2) - log(1 / 5)) / 3),
    (BinaryCrossEntropy(soft_labels=True), LN, [0.5, 0.2, 1.5],
     (-0.5 * log(3 / 4) - 0.5 * log(1 / 4) - log(1 / 2) - log(4 / 5)) / 3),
    (BinaryCrossEntropy(soft_labels=True, pos_weight=3), [log(3)], [0.5], -3 * 0.5 * log(3 / 4) - 0.5 * log(1 / 4)),
    (losses.mse, [3.0, 1.0, 4.0], [2, 2, 0], ((3 - 2) ** 2 + (1 - 2) ** 2 + (4 - 0) ** 2) / 3),
    (losses.ranknet, LN, [3, 1, 2], (log(1 + 1 / 3) + log(1 + 4 / 3) + log(1 + 1 / 4)) / 3),
    (losses.ranknet, LN, [2, 1, 2], (log(1 + 1 / 3) + log(1 + 1 / 4)) / 2),  # a tie is no pair
    # The mean is over the pairs of the batch (2, 0 and 0), not over lists.
    (losses.ranknet, [[0.0, 0.0, log(3)], [0.0, 5.0, 5.0], [1.0, 2.0, 3.0]], [[1, 0, 0], [0, 0, 0], [7, 7, 7]],
     (log(2) + log(1 + 3)) / 2),
    # Margins of the pairs in the labels' order: 3 - 1, 3 - 4 and 4 - 1.
    (losses.hinge, [3.0, 1.0, 4.0], [3, 1, 2], (0 + (1 + 1) + 0) / 3),
    (Hinge(margin=4), [3.0, 1.0, 4.0], [3, 1, 2], ((4 - 2) + (4 + 1) + (4 - 3)) / 3),
    (losses.hinge, [[0.0, 0.5], [2.0, 1.75], [1.0, 2.0]], [[1, 0], [1, 0], [0, 0]], ((1 + 0.5) + (1 - 0.25)) / 2),
    # Ranks by LN are 2, 3, 1.
    (losses.weighted_ranknet, LN, [3, 1, 2],
     (log(1 + 1 / 3) / (2 + 3) + log(1 + 4 / 3) / (2 + 1) + log(1 + 1 / 4) / (1 + 3)) / 3),
    # Gains 3, 0, 1; discounts 1/log2(3), 1/2, 1; the best order has 3/1 + 1/log2(3).
    (losses.lambda_loss, LN, [2, 0, 1],
     (3 * (1 / log2(3) - 1 / 2) * log(1 + 1 / 3) + 2 * (1 - 1 / log2(3)) * log(1 + 4 / 3)
      + 1 * (1 - 1 / 2) * log(1 + 1 / 4)) / (3 + 1 / log2(3))),
    # Only the first rank counts: discounts 0, 0, 1.
    (LambdaLoss(k=1), LN, [2, 0, 1], (2 * 1 * log(1 + 4 / 3) + 1 * 1 * log(1 + 1 / 4)) / 3),
    # Ranks 2, 3, 1: all pairs but the second are one rank apart, which is two: 1/1 - 1/log2(3) and 1/log2(3) - 1/2.
    (LambdaLoss(scheme="ndcg2++"), LN, [2, 0, 1],
     (3 * (1 / log2(3) - 1 / 2 + 10 * (1 - 1 / log2(3))) * log(1 + 1 / 3)
      + 2 * (1 - 1 / log2(3) + 10 * (1 - 1 / log2(3))) * log(1 + 4 / 3)
      + 1 * (1 - 1 / 2 + 10 * (1 / log2(3) - 1 / 2)) * log(1 + 1 / 4)) / (3 + 1 / log2(3))),
    # Only the pair of the documents at ranks 2 and 3 has none in the top 1.
    (LambdaLoss(k=1, scheme="ndcg2++"), LN, [2, 0, 1],
     (2 * (1 + 10 * (1 - 1 / log2(3))) * log(1 + 4 / 3) + 1 * (1 + 10 * (1 / log2(3) - 1 / 2)) * log(1 + 1 / 4)) / 3),
    (losses.list_mle, LN, [3, 1, 2], -log(3 / (3 + 4 + 1)) - log(4 / (4 + 1)) - log(1 / 1)),
    (losses.list_mle, LN, [2, 1, 2], -log(3 / (3 + 1)) - log(4 / (4 + 1))),  # tied documents don't compete
    # Weights 2^2 - 1, 2^1 - 1, 2^0 - 1, divided by their sum.
    (losses.position_aware_list_mle, LN, [3, 1, 2], (3 * -log(3 / 8) + 1 * -log(4 / 5) + 0) / 4),
    (losses.position_aware_list_mle, LN, [2, 1, 2], (3 * -log(3 / 4) + 3 * -log(4 / 5) + 0) / 6),
    # Probabilities 1/4, 1/2, 1/4 by the labels and 3/8, 1/8, 4/8 by the scores.
    (losses.listnet, LN, [0, log(2), 0], -(log(3 / 8) / 4 + log(1 / 8) / 2 + log(4 / 8) / 4)),
    (losses.kl_divergence, LN, [0, log(2), 0],
     1 / 4 * log((1 / 4) / (3 / 8)) + 1 / 2 * log((1 / 2) / (1 / 8)) + 1 / 4 * log((1 / 4) / (4 / 8))),
    (KLDivergence(temperature=2), [2 * s for s in LN], [0, 2 * log(2), 0],
     2**2 * (log((1 / 4) / (3 / 8)) / 4 + log((1 / 2) / (1 / 8)) / 2 + log((1 / 4) / (4 / 8)) / 4)),
    # Margins 2, -1, -3, the teacher's 0, 2, 2.
    (losses.margin_mse, [3.0, 1.0, 4.0], [2, 2, 0], ((2 - 0) ** 2 + (-1 - 2) ** 2 + (-3 - 2) ** 2) / 3),
    # Ranks 1, 3, 2, approximated by 1 plus the sigmoids of the other two.
    (losses.adr_mse, LN, [3, 1, 2],
     ((1 - (1 + 1 / 4 + 4 / 7)) ** 2 / 1 + (3 - (1 + 3 / 4 + 4 / 5)) ** 2 / 2
      + (2 - (1 + 3 / 7 + 1 / 5)) ** 2 / log2(3)) / 3),
    # Tied documents at ranks 1 and 2 both have rank 1.5.
    (ADRMSE(temperature=0.5), [s / 2 for s in LN], [2, 1, 2],
     ((1.5 - (1 + 1 / 4 + 4 / 7)) ** 2 / log2(2.5) + (3 - (1 + 3 / 4 + 4 / 5)) ** 2 / 2
      + (1.5 - (1 + 3 / 7 + 1 / 5)) ** 2 / log2(2.5)) / 3),
    # Gains 3, 0, 1 at the ranks 1 plus the sigmoids of the other two; the best order has 3/1 + 1/log2(3).
    (losses.approx_ndcg, LN, [2, 0, 1],
     1 - (3 / log2(2 + 1 / 4 + 4 / 7) + 1 / log2(2 + 3 / 7 + 1 / 5)) / (3 + 1 / log2(3))),
    (ApproxNDCG(temperature=0.5), [s / 2 for s in LN], [1, 0, 0], 1 - 1 / log2(2 + 1 / 4 + 4 / 7)),
    (combine((losses.ranknet, 0.5), (losses.multi_positive, 2)), [log(3), 0.0], [1, 0],
     0.5 * log(1 + 1 / 3) + 2 * -log(3 / 4)),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "scores", "labels", "value"), BY_HAND)
def test_value_by_hand(loss, scores, labels, value):
    assert loss(*_tensors(scores, labels)).item() == pytest.approx(value, rel=1e-6)


# Reference implementations as loops over documents. A batch is a list of lists of (score, label).


def _average(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _pairs(docs):
    """Index pairs (i, j) of documents with y_i > y_j."""
    return [(i, j) for i in range(len(docs)) for j in range(len(docs)) if docs[i][1] > docs[j][1]]


def _logistic(docs, i, j):
    margin = docs[i][0] - docs[j][0]
    return log(1 + exp(-margin)) if margin > 0 else -margin + log(1 + exp(margin))


def _log_softmax(values):
    top = max(values, default=0)
    total = log(sum(exp(v - top) for v in values)) if values else 0
    return [v - top - total for v in values]


def _softmax(values):
    return [exp(v) for v in _log_softmax(values)]


def _present_ranks(docs):
    order = sorted(range(len(docs)), key=lambda i: (-docs[i][0], docs[i][1], i))
    return {i: rank for rank, i in enumerate(order, start=1)}


def _lists(batch):
    return [docs for docs in batch if _pairs(docs)]


def _nll(docs, i, rest):
    """-log of the probability of i among itself and the rest."""
    return -_log_softmax([docs[i][0], *(docs[j][0] for j in rest)])[0]


def _localized_contrastive(batch):
    values = []
    for docs in batch:
        negatives = [j for j, (_, y) in enumerate(docs) if y <= 0]
        positives = [i for i, (_, y) in enumerate(docs) if y > 0]
        if negatives and positives:
            values.append(_average(_nll(docs, i, negatives) for i in positives))
    return _average(values)


def _multi_positive(batch):
    values = []
    for docs in batch:
        probability = sum(p for p, (_, y) in zip(_softmax([s for s, _ in docs]), docs, strict=True) if y > 0)
        if {y > 0 for _, y in docs} == {True, False}:
            values.append(-log(probability))
    return _average(values)


def _binary_cross_entropy(batch, weight=1.0, soft=False):
    values = []
    for docs in batch:
        for s, y in docs:
            target = min(max(y, 0), 1) if soft else float(y > 0)
            # Only the margin of a pair decides its logistic loss: here to a document with score 0.
            relevant, other = _logistic([(s, 0), (0, 0)], 0, 1), _logistic([(s, 0), (0, 0)], 1, 0)
            values.append(weight * target * relevant + (1 - target) * other)
    return _average(values)


def _mse(batch):
    return _average((s - y) ** 2 for docs in batch for s, y in docs)


def _ranknet(batch):
    return _average(_logistic(docs, i, j) for docs in batch for i, j in _pairs(docs))


def _hinge(batch, margin=1.0):
    return _average(max(0.0, margin - (docs[i][0] - docs[j][0])) for docs in batch for i, j in _pairs(docs))


def _weighted_ranknet(batch):
    values = []
    for docs in batch:
        ranks = _present_ranks(docs)
        values += [_logistic(docs, i, j) / (ranks[i] + ranks[j]) for i, j in _pairs(docs)]
    return _average(values)


def _lambda_loss(batch, k=None, mu=0.0):
    values = []
    for docs in _lists(batch):
        gains = [2.0**y - 1 for _, y in docs]
        ranks = _present_ranks(docs)
        discount = [0.0] + [1 / log2(1 + r) if k is None or r <= k else 0.0 for r in range(1, len(docs) + 1)]
        ideal = sum(g * d for g, d in zip(sorted(gains, reverse=True), discount[1:], strict=True))
        total = 0.0
        for i, j in _pairs(docs):
            weight = abs(discount[ranks[i]] - discount[ranks[j]])
            if k is None or min(ranks[i], ranks[j]) <= k:
                apart = abs(ranks[i] - ranks[j])
                weight += mu * (1 / log2(1 + apart) - 1 / log2(2 + apart))
            total += abs(gains[i] - gains[j]) / ideal * weight * _logistic(docs, i, j)
        values.append(total)
    return _average(values)


def _likelihood_terms(docs):
    return [_nll(docs, i, [j for j in range(len(docs)) if docs[j][1] < docs[i][1]]) for i in range(len(docs))]


def _list_mle(batch):
    return _average(sum(_likelihood_terms(docs)) for docs in _lists(batch))


def _position_aware_list_mle(batch):
    values = []
    for docs in _lists(batch):
        ranks = [1 + sum(other > y for _, other in docs) for _, y in docs]
        weights = [2 ** (len(docs) - rank) - 1 for rank in ranks]
        values.append(sum(w / sum(weights) * t for w, t in zip(weights, _likelihood_terms(docs), strict=True)))
    return _average(values)


def _listnet(batch):
    return _average(
        -sum(p * q for p, q in zip(_softmax([y for _, y in docs]), _log_softmax([s for s, _ in docs]), strict=True))
        for docs in batch
        if len(docs) > 1
    )


def _kl_divergence(batch, temperature=1.0):
    values = []
    for docs in batch:
        if len(docs) > 1:
            q = _log_softmax([s / temperature for s, _ in docs])
            p = _log_softmax([y / temperature for _, y in docs])
            values.append(temperature**2 * sum(exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return _average(values)


def _margin_mse(batch):
    return _average(
        ((docs[i][0] - docs[j][0]) - (docs[i][1] - docs[j][1])) ** 2
        for docs in batch
        for i in range(len(docs))
        for j in range(i)
    )


def _adr_mse(batch, temperature=1.0):
    values = []
    for docs in _lists(batch):
        errors = []
        for i, (s, y) in enumerate(docs):
            others = docs[:i] + docs[i + 1 :]
            rank = 1 + sum(1.0 if other > y else 0.5 if other == y else 0.0 for _, other in others)
            approximate = 1 + sum(1 / (1 + exp((s - other) / temperature)) for other, _ in others)
            errors.append((rank - approximate) ** 2 / log2(1 + rank))
        values.append(_average(errors))
    return _average(values)


def _sigmoid(x):
    return 1 / (1 + exp(-x)) if x > 0 else exp(x) / (1 + exp(x))


def _approx_ndcg(batch, temperature=1.0):
    """Equations 10, 11 and 14 of Qin, Liu and Li (2010), with alpha = 1 / temperature."""
    values = []
    for docs in _lists(batch):
        gains = [2.0**y - 1 for _, y in docs]
        best = sum(g / log2(1 + r) for r, g in enumerate(sorted(gains, reverse=True), start=1))
        found = 0.0
        for x, (s, _) in enumerate(docs):
            position = 1 + sum(_sigmoid((other - s) / temperature) for y, (other, _) in enumerate(docs) if y != x)
            found += gains[x] / log2(1 + position)
        values.append(1 - found / best)
    return _average(values)


LOSSES = {
    losses.localized_contrastive: _localized_contrastive,
    losses.multi_positive: _multi_positive,
    losses.binary_cross_entropy: _binary_cross_entropy,
    BinaryCrossEntropy(pos_weight=3.0): lambda batch: _binary_cross_entropy(batch, weight=3.0),
    BinaryCrossEntropy(soft_labels=True): lambda batch: _binary_cross_entropy(batch, soft=True),
    losses.mse: _mse,
    losses.ranknet: _ranknet,
    losses.hinge: _hinge,
    Hinge(margin=0.3): lambda batch: _hinge(batch, margin=0.3),
    losses.weighted_ranknet: _weighted_ranknet,
    losses.lambda_loss: _lambda_loss,
    LambdaLoss(k=2): lambda batch: _lambda_loss(batch, k=2),
    LambdaLoss(k=2, scheme="ndcg2++"): lambda batch: _lambda_loss(batch, k=2, mu=10),
    losses.list_mle: _list_mle,
    losses.position_aware_list_mle: _position_aware_list_mle,
    losses.listnet: _listnet,
    losses.kl_divergence: _kl_divergence,
    KLDivergence(temperature=3.0): lambda batch: _kl_divergence(batch, temperature=3.0),
    losses.margin_mse: _margin_mse,
    losses.adr_mse: _adr_mse,
    ADRMSE(temperature=0.5): lambda batch: _adr_mse(batch, temperature=0.5),
    losses.approx_ndcg: _approx_ndcg,
    combine((losses.ranknet, 0.5), (losses.lambda_loss, 2.0)): lambda batch: (
        0.5 * _ranknet(batch) + 2 * _lambda_loss(batch)
    ),
}
# Losses of each document by itself. They learn from a single document too, and depend on the scores themselves, not
# only on differences: a score is to be a teacher's score, or the log-odds of relevance.
POINTWISE = {loss for loss in LOSSES if isinstance(loss, BinaryCrossEntropy)} | {losses.mse}
# Losses that are positive even if all labels of a list are equal.
POSITIVE_FOR_TIES = POINTWISE | {losses.listnet, losses.margin_mse}


def _name(loss):
    return getattr(loss, "__name__", None) or repr(loss)


every_loss = pytest.mark.parametrize("loss", LOSSES, ids=_name)


def _batch(loss, *, groups=5, length=7, seed=0):
    """Lists of several lengths with ties in the labels, and NaN and infinity where there is no document."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups, length, generator=generator)
    labels = torch.randint(0, 4, (groups, length), generator=generator).float()
    if loss.labels == "scores":
        labels = torch.randn(groups, length, generator=generator)
    elif loss.labels == "probabilities":
        labels = torch.rand(groups, length, generator=generator)
    lengths = torch.arange(groups) * length // max(groups - 1, 1)  # from 0 to length
    mask = torch.arange(length) < lengths.flip(0).unsqueeze(-1)
    mask = mask[:, torch.randperm(length, generator=generator)]
    garbage = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(0, 3, scores.shape, generator=generator)]
    return torch.where(mask, scores, garbage), torch.where(mask, labels, garbage.flip(0)), mask


def _as_lists(scores, labels, mask):
    return [
        [(float(s), float(y)) for s, y, m in zip(*rows, strict=True) if m]
        for rows in zip(scores.tolist(), labels.tolist(), mask.tolist(), strict=True)
    ]


def _value_and_gradient(loss, scores, labels, mask):
    scores = scores.detach().clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # fails at any intermediate NaN, even if it is masked later
        value = loss(scores, labels, mask)
        value.backward()
    return value.detach(), scores.grad


def test_every_loss_of_the_module_is_tested():
    own = {
        name: thing
        for name, thing in vars(losses).items()
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", None) == losses.__name__
    }
    classes = {name: thing for name, thing in own.items() if isinstance(thing, type)}
    functions = {name: thing for name, thing in own.items() if name not in classes | {"needs": 0, "combine": 0}}
    assert set(functions.values()) <= set(LOSSES)
    assert set(classes.values()) == {type(loss) for loss in LOSSES} & set(classes.values())


@every_loss
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_reference(loss, seed):
    batch = _batch(loss, seed=seed)
    assert loss(*batch).item() == pytest.approx(LOSSES[loss](_as_lists(*batch)), rel=1e-6, abs=1e-6)


@every_loss
def test_gradient_agrees_with_finite_differences_of_the_reference(loss):
    scores, labels, mask = _batch(loss, groups=3, length=5)
    _, gradient = _value_and_gradient(loss, scores, labels, mask)

    def moved(row, column, step):
        changed = scores.double()
        changed[row, column] += step
        return LOSSES[loss](_as_lists(changed, labels, mask))

    for row, column in mask.nonzero().tolist():
        expected = (moved(row, column, 1e-5) - moved(row, column, -1e-5)) / 2e-5
        assert gradient[row, column].item() == pytest.approx(expected, abs=1e-5)
    assert not gradient[~mask].any()


@st.composite
def _batches(draw):
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 5)))
    number = shape[0] * shape[1]

    def fill(elements):
        return draw(st.lists(elements, min_size=number, max_size=number))

    scores = fill(st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-20, 20, width=32)))
    mask = torch.tensor(fill(st.booleans()), dtype=torch.bool).reshape(shape)
    labels = torch.tensor(fill(st.integers(0, 3)), dtype=torch.float32).reshape(shape)
    scores = torch.tensor(scores, dtype=torch.float32).reshape(shape)
    garbage = draw(st.sampled_from([0.0, 1e30, math.nan, math.inf, -math.inf]))
    return torch.where(mask, scores, garbage), torch.where(mask, labels, garbage), mask


@every_loss
@settings(max_examples=40, deadline=None)
@given(batch=_batches())
def test_any_shape_mask_and_tie(loss, batch):
    mask = batch[2]
    value, gradient = _value_and_gradient(loss, *batch)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(LOSSES[loss](_as_lists(*batch)), rel=1e-4, abs=1e-5)
    assert value >= -1e-6
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()


@every_loss
def test_masked_documents_are_as_if_dropped(loss):
    scores, labels, mask = (x[1:2] for x in _batch(loss, groups=4, length=9))
    assert 1 < mask.sum() < 9
    value, gradient = _value_and_gradient(loss, scores, labels, mask)
    dropped = [x[mask].unsqueeze(0) for x in (scores, labels, mask)]
    expected, expected_gradient = _value_and_gradient(loss, *dropped)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[mask], expected_gradient[0])


@every_loss
def test_empty_lists_have_no_influence(loss):
    scores, labels, mask = _batch(loss)
    more = [torch.cat([x, torch.zeros_like(x[:2])]) for x in (scores, labels, mask)]
    torch.testing.assert_close(loss(*more), loss(scores, labels, mask))


@every_loss
def test_masked_values_have_no_influence(loss):
    scores, labels, mask = _batch(loss)
    expected = _value_and_gradient(loss, *(torch.where(mask, x, 0) for x in (scores, labels)), mask)
    for garbage in (1e30, math.nan, math.inf, -math.inf):
        changed = (torch.where(mask, x, garbage) for x in (scores, labels))
        for found, value in zip(_value_and_gradient(loss, *changed, mask), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=0)


@every_loss
def test_the_order_of_documents_and_lists_has_no_influence(loss):
    scores, labels, mask = _batch(loss)
    scores = (2 * scores).round() / 2  # ties in the scores too
    value, gradient = _value_and_gradient(loss, scores, labels, mask)
    for seed in range(5):
        order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss(scores[:, order], labels[:, order], mask[:, order]), value)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    moved, moved_gradient = _value_and_gradient(loss, scores[order], labels[order], mask[order])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_gradient, gradient[order])


@every_loss
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (2, 4)])
def test_no_documents_at_all(loss, shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    value, gradient = _value_and_gradient(loss, torch.full(shape, math.nan), torch.full(shape, math.nan), nothing)
    assert value == 0
    assert gradient.shape == shape
    assert not gradient.any()


@every_loss
@pytest.mark.parametrize("label", [0.0, 1.0, 3.0])
def test_single_document(loss, label):
    value, gradient = _value_and_gradient(loss, *_tensors([[2.0], [-1.0]], [[label], [label]]))
    if loss in POINTWISE:
        assert value > 0
        assert gradient.all()
    else:
        assert value == 0
        assert not gradient.any()


@every_loss
@pytest.mark.parametrize("label", [0.0, 1.0, 100.0])
def test_all_labels_equal(loss, label):
    value, gradient = _value_and_gradient(loss, *_tensors([[0.5, -1.0, 2.0]], [[label] * 3]))
    assert value.isfinite()
    assert gradient.isfinite().all()
    is_positive = loss in POSITIVE_FOR_TIES or isinstance(loss, KLDivergence)
    assert bool(value > 0) == bool(gradient.any()) == is_positive


@every_loss
def test_equal_scores_have_a_gradient(loss):
    _, gradient = _value_and_gradient(loss, *_tensors([[0.0] * 4], [[0, 2, 0, 1]]))
    assert gradient[0, 1] < 0, "the best document's score must rise"
    assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_large_scores(loss, size):
    for signs in ([1, -1, 1, -1], [-1, 1, 1, 1], [1, 1, 1, 1]):
        value, gradient = _value_and_gradient(loss, *_tensors([[size * sign for sign in signs]], [[3, 0, 1, 2]]))
        assert value.isfinite()
        assert gradient.isfinite().all()


@every_loss
def test_long_lists_and_large_labels(loss):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(300, generator=generator).float().unsqueeze(0)
    batch = torch.randn(1, 300, generator=generator), ranks, torch.ones(1, 300, dtype=torch.bool)
    value, gradient = _value_and_gradient(loss, *batch)
    assert value.item() == pytest.approx(LOSSES[loss](_as_lists(*batch)), rel=1e-4)
    assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_float32(loss, dtype):
    scores, labels, mask = _batch(loss)
    low = scores.to(dtype)
    value, gradient = _value_and_gradient(loss, low, labels.to(dtype), mask)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, loss(low.float(), labels.to(dtype).float(), mask), rtol=0, atol=0)
    torch.testing.assert_close(value, loss(scores, labels, mask), rtol=0.02, atol=0.02)


@every_loss
def test_autocast_has_no_influence(loss):
    batch = _batch(loss)
    expected = loss(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(*batch), expected, rtol=0, atol=0)


@every_loss
def test_only_differences_of_scores_matter(loss):
    scores, labels, mask = _batch(loss)
    moved = loss(scores + torch.tensor([[-5.0], [-2.0], [0.0], [3.0], [7.0]]), labels, mask)
    if loss in POINTWISE:
        assert moved != pytest.approx(loss(scores, labels, mask).item(), rel=0.01)
    else:
        torch.testing.assert_close(moved, loss(scores, labels, mask), rtol=1e-5, atol=1e-5)


@every_loss
def test_a_step_along_the_gradient_decreases_the_loss(loss):
    scores, labels, mask = _batch(loss)
    value, gradient = _value_and_gradient(loss, scores, labels, mask)
    assert loss(scores - 1e-2 * gradient, labels, mask) < value


@every_loss
def test_descent_finds_the_order(loss):
    labels = torch.tensor([[0.0, 3, 1, 2]])
    if loss.labels == "probabilities":
        labels = labels / 3
    mask = torch.ones(1, 4, dtype=torch.bool)
    scores = torch.tensor([[0.3, -0.3, 0.2, 0.1]])
    for _ in range(100):
        scores.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(scores, labels, mask), scores)
        scores = scores.detach() - 0.4 * gradient
    if loss.labels == "binary":
        assert scores[0].argmin() == 0
    elif isinstance(loss, LambdaLoss) and loss.k == 2:
        assert scores[0].argsort(descending=True)[:2].tolist() == [1, 3]
    else:
        assert scores[0].argsort(descending=True).tolist() == [1, 3, 2, 0]


def test_contrastive_losses_equal_cross_entropy_for_a_single_relevant_document():
    scores = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels, mask = torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)
    labels[:, 2] = 1
    expected = cross_entropy(scores, torch.full((6,), 2))
    for loss in (losses.localized_contrastive, losses.multi_positive, losses.list_mle):
        torch.testing.assert_close(loss(scores, labels, mask), expected)


def test_listnet_equals_cross_entropy_and_kl_divergence_up_to_a_constant():
    scores, labels = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(scores, dtype=torch.bool)
    target = labels.softmax(-1)
    torch.testing.assert_close(losses.listnet(scores, labels, mask), cross_entropy(scores, target))
    entropy = -(target * target.log()).sum(-1).mean()
    divergence = losses.kl_divergence(scores, labels, mask)
    torch.testing.assert_close(divergence, losses.listnet(scores, labels, mask) - entropy)


@pytest.mark.parametrize("weight", [1.0, 0.3, 4.0])
def test_pointwise_losses_equal_those_of_torch(weight):
    scores, labels, mask = _batch(losses.mse)
    probabilities = labels.sigmoid()
    expected = mse_loss(scores[mask], labels[mask])
    torch.testing.assert_close(losses.mse(scores, labels, mask), expected)
    for targets, soft in [(probabilities, True), ((labels > 0).float(), False), ((labels > 0).float(), True)]:
        loss = BinaryCrossEntropy(pos_weight=weight, soft_labels=soft)
        expected = binary_cross_entropy_with_logits(scores[mask], targets[mask], pos_weight=torch.tensor(weight))
        torch.testing.assert_close(loss(scores, targets, mask), expected)


def test_approximate_ndcg_approaches_ndcg():
    scores, labels, mask = _batch(losses.approx_ndcg, seed=3)
    values = []
    for docs in _lists(_as_lists(scores, labels, mask)):
        found, best = (
            sum((2**y - 1) / log2(1 + r) for r, (_, y) in enumerate(sorted(docs, key=key), start=1))
            for key in (lambda doc: -doc[0], lambda doc: -doc[1])
        )
        values.append(1 - found / best)
    exact = ApproxNDCG(temperature=1e-4)(scores, labels, mask)
    assert exact.item() == pytest.approx(_average(values), abs=1e-5)
    assert losses.approx_ndcg(scores, labels, mask).item() != pytest.approx(exact.item(), abs=0.02)


def test_a_perfect_student_has_no_loss():
    labels, mask = torch.tensor([[0.0, 2.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    for loss in (losses.kl_divergence, KLDivergence(temperature=4.0), losses.margin_mse):
        assert loss(labels + 7, labels, mask).item() == pytest.approx(0, abs=1e-6)
    assert losses.mse(labels, labels, mask) == 0
    assert losses.mse(labels + 7, labels, mask) == 49
    order_losses = (losses.adr_mse, losses.approx_ndcg, losses.ranknet, losses.hinge, losses.lambda_loss)
    for loss in (*order_losses, losses.list_mle):
        assert loss(100 * labels, labels, mask).item() == pytest.approx(0, abs=1e-6)


def test_order_losses_depend_only_on_the_order():
    scores, ranks, mask = torch.tensor([[0.1, -0.4, 0.7]]), torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3).bool()
    for loss in LOSSES:
        if loss.labels == "order":
            torch.testing.assert_close(loss(scores, 1 - 1 / ranks, mask), loss(scores, ranks, mask))


def test_binary_losses_depend_only_on_the_sign():
    scores, labels, mask = torch.tensor([[0.1, -0.4, 0.7]]), torch.tensor([[3.0, 0.0, 1.0]]), torch.ones(1, 3).bool()
    for loss in LOSSES:
        if loss.labels == "binary":
            torch.testing.assert_close(loss(scores, (labels > 0).int(), mask), loss(scores, labels, mask))
            torch.testing.assert_close(loss(scores, labels.where(labels > 0, -2), mask), loss(scores, labels, mask))


def test_lambda_loss_counts_labels_below_0_as_0():
    scores, mask = torch.tensor([[0.1, -0.4, 0.7]]), torch.ones(1, 3).bool()
    expected = losses.lambda_loss(scores, torch.tensor([[2.0, 0.0, 0.0]]), mask)
    torch.testing.assert_close(losses.lambda_loss(scores, torch.tensor([[2.0, -2.0, 0.0]]), mask), expected)


@every_loss
def test_declares_the_labels_it_needs(loss):
    assert loss.labels in {"order", "binary", "graded", "scores", "probabilities"}


def test_labels_of_a_users_function():
    @losses.needs("scores")
    def mine(scores, labels, mask):
        return (scores - labels).square()[mask].mean()

    assert mine.labels == "scores"
    with pytest.raises(ValueError, match=r"labels must be one of .*got 'ranks'"):
        losses.needs("ranks")


@every_loss
def test_can_be_pickled_and_compared(loss):
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert loss.__module__ == "pyterrier_msft.losses"  # in whichever file it is: digests and pickles have this name
    assert hash(pickle.loads(pickle.dumps(loss))) == hash(loss)
    assert "0x" not in _name(loss)


def test_repr_can_be_evaluated():
    assert repr(KLDivergence(temperature=2.0)) == "KLDivergence(temperature=2.0)"
    assert repr(LambdaLoss(k=10)) == "LambdaLoss(k=10, scheme='lambdarank')"
    mixture = combine((losses.ranknet, 0.5), (losses.localized_contrastive, 1.0), (losses.adr_mse, 0.1))
    assert repr(mixture) == "combine((ranknet, 0.5), (localized_contrastive, 1.0), (ADRMSE(temperature=1.0), 0.1))"
    assert mixture == eval(repr(mixture), vars(losses))


@pytest.mark.parametrize(
    ("parts", "labels"),
    [
        ((losses.ranknet, losses.hinge), "order"),
        ((losses.ranknet, losses.localized_contrastive), "binary"),
        ((losses.lambda_loss, losses.localized_contrastive), "graded"),
        ((losses.margin_mse, losses.ranknet), "scores"),
        ((BinaryCrossEntropy(soft_labels=True), losses.mse, losses.ranknet), "probabilities"),
        ((lambda scores, labels, mask: scores.sum(), losses.ranknet), "order"),
        ((lambda scores, labels, mask: scores.sum(),), None),
        ((combine((losses.listnet, 1)), losses.binary_cross_entropy), "graded"),
    ],
)
def test_combined_labels_suit_all_parts(parts, labels):
    assert combine(*((part, 1) for part in parts)).labels == labels


def test_invalid_parameters_are_rejected():
    for parts in [(losses.margin_mse, losses.localized_contrastive), (losses.kl_divergence, losses.listnet)]:
        with pytest.raises(ValueError, match=r"losses must be able to share labels; got combine.*'scores'"):
            combine(*((part, 1) for part in parts))
    for wrong in [("ranknet", 1), (losses.ranknet, math.nan), losses.ranknet, (losses.ranknet,)]:
        with pytest.raises(ValueError, match=r"\(loss, weight\) must be a callable and a finite number; got"):
            combine(wrong)
    with pytest.raises(ValueError, match="combine needs at least one"):
        combine()
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        LambdaLoss(k=0)
    with pytest.raises(ValueError, match=r"scheme must be one of \('lambdarank', 'ndcg2\+\+'\); got 'ndcg1'"):
        LambdaLoss(scheme="ndcg1")
    for weight in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"pos_weight must be a finite number > 0; got {weight}"):
            BinaryCrossEntropy(pos_weight=weight)
    for margin in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"margin must be a finite number > 0; got {margin}"):
            Hinge(margin=margin)
    for loss in (KLDivergence, ADRMSE, ApproxNDCG):
        with pytest.raises(ValueError, match="temperature must be a finite number > 0; got 0"):
            loss(temperature=0)
