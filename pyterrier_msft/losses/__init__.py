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

from pyterrier_msft.losses.base import Combination, Labels, Loss, combine, needs
from pyterrier_msft.losses.listwise import (
    ADRMSE,
    ApproxNDCG,
    KLDivergence,
    adr_mse,
    approx_ndcg,
    kl_divergence,
    list_mle,
    listnet,
    localized_contrastive,
    multi_positive,
    position_aware_list_mle,
)
from pyterrier_msft.losses.pairwise import Hinge, LambdaLoss, hinge, lambda_loss, margin_mse, ranknet, weighted_ranknet
from pyterrier_msft.losses.pointwise import BinaryCrossEntropy, binary_cross_entropy, mse

__all__ = [
    "ADRMSE", "ApproxNDCG", "BinaryCrossEntropy", "Combination", "Hinge", "KLDivergence", "Labels", "LambdaLoss",
    "Loss", "adr_mse", "approx_ndcg", "binary_cross_entropy", "combine", "hinge", "kl_divergence", "lambda_loss",
    "list_mle", "listnet", "localized_contrastive", "margin_mse", "mse", "multi_positive", "needs",
    "position_aware_list_mle", "ranknet", "weighted_ranknet",
]  # fmt: skip

# Digests, pickles and printed settings name a loss where users find it, whichever file it is in.
for _public in [
    ADRMSE, ApproxNDCG, BinaryCrossEntropy, Combination, Hinge, KLDivergence, LambdaLoss, combine, list_mle, listnet,
    localized_contrastive, margin_mse, mse, multi_positive, needs, position_aware_list_mle, ranknet, weighted_ranknet,
]:  # fmt: skip
    _public.__module__ = __name__
