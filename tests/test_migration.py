"""docs/migration.md: the page's settings train the same weights in both libraries, and losses differ as it says."""

import ast
import inspect
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_part
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax, mse_loss

pytest.importorskip("sentence_transformers", minversion="6.2")
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as theirs
from sentence_transformers.cross_encoder.losses import LambdaRankScheme

from pyterrier_msft import Distillation, MonoCE, losses

PAGE = (Path(__file__).parents[1] / "docs/migration.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[1:]  # without the set-up


def page_settings(name: str, *, block: int) -> dict[str, Any]:
    """Return the keyword arguments of a call in one of the page's blocks."""
    calls = [node for node in ast.walk(ast.parse(BLOCKS[block])) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == name)
    names = {"losses": losses, "math": math, "fitter": None, "dataset": None}
    return {argument.arg: eval(ast.unparse(argument.value), names) for argument in call.keywords if argument.arg}


# ---- training


@pytest.mark.parametrize("changed", [{}, {"weight_decay": 0.1}], ids=["settings of the page", "weight decay"])
def test_sentence_transformers_takes_the_same_steps(backbone, tmp_path, changed):
    n_queries, epochs = 8, 8  # one batch per epoch, so that both see the same order of data
    results = make_part("tr", n_queries=n_queries, n_docs=24, seed=1).results  # longer lists than the default depth
    results = results.assign(score=results["quality"] + results["score"] / 100).drop(columns="rank")

    torch.manual_seed(3)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    other = CrossEncoder(backbone, num_labels=1, max_length=24, device="cpu", config_kwargs=no_dropout)
    other.model.classifier.weight.data.mul_(200)  # large enough for gradients that are clipped
    other.save_pretrained(str(tmp_path / "start"))
    start = {name: weight.clone() for name, weight in other.model.state_dict().items()}
    lists = results.groupby("qid").agg(query=("query", "first"), docs=("text", list), labels=("score", list))
    settings = page_settings("CrossEncoderTrainingArguments", block=0) | {
        "learning_rate": 5e-3, "num_train_epochs": epochs, "per_device_train_batch_size": n_queries,
    }  # fmt: skip
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path), **settings, **changed, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    dataset = Dataset.from_pandas(lists, preserve_index=False)
    trainer = CrossEncoderTrainer(other, arguments, train_dataset=dataset, loss=theirs.RankNetLoss(other))
    trainer.train()

    settings = page_settings("Distillation", block=1) | {
        "learning_rate": 5e-3, "epochs": epochs, "batch_size": n_queries, "dropout": 0.0,
    }  # fmt: skip
    options = page_settings("MonoCE", block=1) | {"max_length": 24, "fitter": Distillation(**settings | changed)}
    ce = MonoCE(tmp_path / "start", **options, device="cpu")
    ce.fit(results)

    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == len(ce.history) == epochs
    assert ce.history["learning_rate"].to_list() == pytest.approx([row["learning_rate"] for row in logs])
    assert ce.history["loss"].to_list() == pytest.approx([row["loss"] for row in logs], rel=1e-3)
    assert max(row["grad_norm"] for row in logs) > settings["clip_norm"] > min(row["grad_norm"] for row in logs)
    ours, expected = ce.cross_encoder.network.state_dict(), other.model.state_dict()
    for name, weight in start.items():
        # A loss of differences has no gradient for these two, only rounding errors, which AdamW amplifies.
        if not name.endswith((".key.bias", "classifier.bias")):
            moved = (expected[name] - weight).abs().max()
            assert moved > 0
            assert (ours[name] - expected[name]).abs().max() < 0.05 * moved, name


def test_the_page_trains_as_long_in_both():
    other, settings = page_settings("CrossEncoderTrainingArguments", block=0), page_settings("Distillation", block=1)
    names = {
        "learning_rate": "learning_rate",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
    }
    assert [other[name] for name in names] == [settings[name] for name in names.values()]
    assert (
        page_settings("LightningIRTrainer", block=2)["max_epochs"] == page_settings("Distillation", block=3)["epochs"]
    )


def test_defaults_of_the_page():
    section = PAGE.partition("## From lightning-ir")[0]
    rows = re.findall(r"^\| [^|`]+ \| `(\w+)=([^`|]+)`[^|]* \| ([^|]+) \|$", section, re.MULTILINE)
    defaults = CrossEncoderTrainingArguments.__dataclass_fields__
    parameters = {**inspect.signature(MonoCE).parameters, **inspect.signature(Distillation).parameters}
    assert len(rows) >= 8
    for name, value, ours in rows:
        assert defaults[name].default == ast.literal_eval(value), name
        if setting := re.match(r"`(\w+)=([^`]+)`", ours):
            assert parameters[setting[1]].default == ast.literal_eval(setting[2]), setting[1]


# ---- losses of sentence-transformers


class FixedScores(CrossEncoder):
    """Stands for a model whose scores are parameters; a document's text is the index of its score."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.values = torch.nn.Parameter(scores.flatten())

    def preprocess(self, pairs, **_):
        return {"index": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, inputs, **_):
        return {"scores": self.values[inputs["index"]].unsqueeze(-1)}


def batch(lengths):
    """Return random scores, distinct grades and the mask of lists."""
    rng = torch.Generator().manual_seed(sum(lengths))
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    labels = torch.rand(shape, generator=rng).argsort(-1).float()
    return 2 * torch.randn(shape, generator=rng), labels, mask


def value_and_gradient(value, scores):
    value.backward()
    return value.item(), scores.grad.flatten()


def check_equal(loss, model, ours, scores, labels, mask):
    """Check that a loss of sentence-transformers and one of this package have the same value and gradient."""
    value, gradient = value_and_gradient(loss, model.values)
    scores = scores.clone().requires_grad_()
    expected, expected_gradient = value_and_gradient(ours(scores, labels, mask), scores)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def on_lists(make, scores, labels, mask):
    model = FixedScores(scores)
    index = torch.arange(mask.numel()).view(mask.shape)
    docs = [[str(i) for i in row[present].tolist()] for row, present in zip(index, mask, strict=True)]
    return make(model)([["query"] * len(docs), docs], [y[m] for y, m in zip(labels, mask, strict=True)]), model


def on_columns(make, scores, labels=None):
    """Call a loss on queries, positives and negatives: the first document of each list, and the others."""
    model = FixedScores(scores)
    columns = torch.arange(scores.numel()).view(scores.shape).T
    texts = [[str(i) for i in column.tolist()] for column in columns]
    return make(model)([["query"] * len(scores), *texts], labels), model


def entropy(labels, mask):
    p = labels.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.special.entr(p).sum(-1).mean()


def per_pair(scheme, scores, labels, mask):
    """`losses.LambdaLoss` as a mean over pairs with a logarithm of base 2."""
    lengths = mask.sum(-1)
    pairs = (lengths * (lengths - 1)).sum() / 2  # all labels differ
    return losses.LambdaLoss(scheme=scheme)(scores, labels, mask) * len(lengths) / pairs / math.log(2)


def per_document(scores, labels, mask):
    """`losses.adr_mse` as a mean over documents."""
    lists = [losses.adr_mse(*(x[i : i + 1] for x in (scores, labels, mask))) for i in range(len(mask))]
    lengths = mask.sum(-1)
    return (torch.stack(lists) * lengths).sum() / lengths.sum()


LAMBDA_RANK = partial(theirs.LambdaLoss, weighting_scheme=LambdaRankScheme())
ON_LISTS = {
    "ranknet": (theirs.RankNetLoss, losses.combine((losses.ranknet, 1 / math.log(2)))),
    "ranknet, natural": (partial(theirs.RankNetLoss, reduction_log="natural"), losses.ranknet),
    "listnet": (theirs.ListNetLoss, losses.listnet),
    "listnet, teacher": (theirs.ListNetLoss, lambda s, y, m: losses.kl_divergence(s, y, m) + entropy(y, m)),
    "list_mle": (partial(theirs.ListMLELoss, respect_input_order=False), losses.list_mle),
    "p_list_mle": (partial(theirs.PListMLELoss, respect_input_order=False), losses.position_aware_list_mle),
    "lambda": (LAMBDA_RANK, partial(per_pair, "lambdarank")),
    "ndcg2++": (theirs.LambdaLoss, partial(per_pair, "ndcg2++")),
    "adr_mse": (theirs.ADRMSELoss, per_document),
    "adr_mse, alpha": (
        partial(theirs.ADRMSELoss, alpha=2.0), lambda s, y, m: losses.ADRMSE(temperature=0.5)(s[:1], y[:1], m[:1])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_LISTS)
def test_list_losses(name):
    make, ours = ON_LISTS[name]
    data = batch([6]) if "alpha" in name else batch([5, 3, 4])
    check_equal(*on_lists(make, *data), ours, *data)


def test_losses_of_sorted_lists():
    """By default, ListMLELoss and PListMLELoss take the order of the list, not that of the labels."""
    scores, labels, mask = batch([4, 4])
    for make, ours in [
        (theirs.ListMLELoss, losses.list_mle),
        (theirs.PListMLELoss, losses.position_aware_list_mle),
    ]:
        ordered = torch.arange(4.0, 0, -1).expand(2, 4)
        check_equal(*on_lists(make, scores, ordered, mask), ours, scores, ordered, mask)
        unordered = on_lists(make, scores, labels, mask)[0]
        assert unordered.item() == on_lists(make, scores, ordered, mask)[0].item() != ours(scores, labels, mask).item()


@pytest.mark.parametrize("length", [2, 5, 10])
@pytest.mark.parametrize(("make", "scheme"), [(LAMBDA_RANK, "lambdarank"), (theirs.LambdaLoss, "ndcg2++")])
def test_factor_of_lambda_loss_for_lists_of_one_length(length, make, scheme):
    data = batch([length] * 3)
    factor = length * (length - 1) / 2 * math.log(2)
    check_equal(*on_lists(make, *data), losses.combine((losses.LambdaLoss(scheme=scheme), 1 / factor)), *data)
    if length == 10:
        assert f"{factor:.0f} times" in PAGE


def test_cutoff_of_lambda_loss():
    # Ranks by the scores are 2, 3, 1; gains 3, 0, 1. With k=1, two pairs have a document at rank 1. Theirs discounts
    # the other document at its rank, ours doesn't count it.
    scores, labels, mask = torch.tensor([[3.0, 1.0, 4.0]]).log(), torch.tensor([[2.0, 0.0, 1.0]]), torch.ones(1, 3) > 0
    pairs = 2 * math.log(1 + 4 / 3), 1 * math.log(1 + 1 / 4)
    discounted = pairs[0] * (1 - 1 / math.log2(3)) + pairs[1] * (1 - 1 / 2)
    other, _ = on_lists(partial(LAMBDA_RANK, k=1), scores, labels, mask)
    assert other.item() == pytest.approx(discounted / (3 * 2 * math.log(2)))
    assert losses.LambdaLoss(k=1)(scores, labels, mask).item() == pytest.approx(sum(pairs) / 3)


def test_ties_of_list_mle():
    scores, labels, mask = torch.tensor([[3.0, 1.0, 4.0]]).log(), torch.tensor([[2.0, 1.0, 2.0]]), torch.ones(1, 3) > 0
    other, _ = on_lists(partial(theirs.ListMLELoss, respect_input_order=False), scores, labels, mask)
    first = [-math.log(3 / 8 * 4 / 5), -math.log(4 / 8 * 3 / 4)]  # either of the tied documents
    assert other.item() in [pytest.approx(value) for value in first]
    assert losses.list_mle(scores, labels, mask).item() == pytest.approx(-math.log(3 / 4 * 4 / 5))


def test_lists_of_one_document():
    """They count in the mean over lists of sentence-transformers, and not here."""
    data = batch([4, 1])
    for make, ours in (ON_LISTS["listnet"], ON_LISTS["list_mle"]):
        assert on_lists(make, *data)[0].item() == pytest.approx(ours(*data).item() / 2)


def on_pairs(make, scores, labels, mask):
    """Call a loss on pairs of a query and a document."""
    model = FixedScores(scores)
    index = mask.flatten().nonzero().squeeze(-1)
    inputs = [["query"] * len(index), [str(i) for i in index.tolist()]]
    return make(model)(inputs, labels.flatten()[index]), model


def test_pointwise_losses():
    scores, labels, mask = batch([5, 3, 4])
    check_equal(*on_pairs(theirs.MSELoss, scores, labels, mask), losses.mse, scores, labels, mask)
    binary, soft = (labels == 0).float(), labels / 5
    weighted = partial(theirs.BinaryCrossEntropyLoss, pos_weight=torch.tensor(4.0))
    for make, ours, targets in [
        (theirs.BinaryCrossEntropyLoss, losses.binary_cross_entropy, binary),
        (weighted, losses.BinaryCrossEntropy(pos_weight=4.0), binary),
        (weighted, losses.BinaryCrossEntropy(pos_weight=4.0, soft_labels=True), soft),
    ]:
        check_equal(*on_pairs(make, scores, targets, mask), ours, scores, targets, mask)


def test_margin_mse_loss():
    scores, labels, mask = batch([2] * 5)
    check_equal(*on_columns(theirs.MarginMSELoss, scores, labels), losses.margin_mse, scores, labels, mask)
    # The positive with each of seven negatives: 7 pairs, where a list of 8 documents has 28.
    scores, labels, mask = batch([8] * 3)
    pairs = [torch.stack([x[:, :1].expand(3, 7), x[:, 1:]], dim=-1).view(-1, 2) for x in (scores, labels, mask)]
    other, _ = on_columns(theirs.MarginMSELoss, scores, labels)
    assert other.item() == pytest.approx(losses.margin_mse(*pairs).item())
    assert other.item() != pytest.approx(losses.margin_mse(scores, labels, mask).item(), rel=0.01)


def test_multiple_negatives_ranking_loss():
    plain = partial(theirs.MultipleNegativesRankingLoss, scale=1, activation_fn=torch.nn.Identity())
    scores, _, mask = batch([8])
    labels = torch.eye(8)[:1]
    check_equal(*on_columns(plain, scores), losses.localized_contrastive, scores, labels, mask)
    check_equal(
        *on_columns(theirs.MultipleNegativesRankingLoss, scores),
        lambda s, y, m: losses.localized_contrastive(10 * s.sigmoid(), y, m), scores, labels, mask,
    )  # fmt: skip
    # With several queries in a batch, a query has the documents of the others as negatives too: here all, else 4.
    scores, _, _ = batch([3, 3])
    shared, own = scores.flatten().expand(2, 6), torch.zeros(2, 6)
    own[0, 0] = own[1, 3] = 1
    other, _ = on_columns(partial(plain, num_negatives=None), scores)
    assert other.item() == pytest.approx(losses.localized_contrastive(shared, own, torch.ones(2, 6) > 0).item())


# ---- losses of other libraries, which aren't installed here: their formulas


def test_losses_of_lightning_ir():
    scores, labels, mask = batch([6, 6])
    better = labels.unsqueeze(-1) > labels.unsqueeze(-2)
    margins, targets = ((x.unsqueeze(-1) - x.unsqueeze(-2))[better] for x in (scores, labels))
    ranknet = binary_cross_entropy_with_logits(margins, torch.ones_like(margins))
    assert losses.ranknet(scores, labels, mask).item() == pytest.approx(ranknet.item())
    assert losses.margin_mse(scores, labels, mask).item() == pytest.approx(mse_loss(margins, targets).item())
    log_q, log_p = log_softmax(scores, -1), log_softmax(labels, -1)
    divergence = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert losses.kl_divergence(scores, labels, mask).item() == pytest.approx(divergence.item(), rel=1e-5)
    others = 1 - torch.eye(6)
    ranks = 1 + (torch.sigmoid(scores.unsqueeze(-2) - scores.unsqueeze(-1)) * others).sum(-1)
    best = ((2 ** labels.sort(descending=True).values - 1) / torch.log2(torch.arange(2, 8))).sum(-1)
    ndcg = ((2**labels - 1) / torch.log2(1 + ranks)).sum(-1) / best
    assert losses.approx_ndcg(scores, labels, mask).item() == pytest.approx(1 - ndcg.mean().item())
    relevant = (labels == labels.amax(-1, keepdim=True)).float()
    nce = cross_entropy(scores, labels.argmax(-1))
    assert losses.localized_contrastive(scores, relevant, mask).item() == pytest.approx(nce.item())


def test_loss_of_monot5():
    true, false = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))  # logits of the two tokens
    log_p = log_softmax(torch.stack([true, false], dim=-1), -1)
    summed = -(log_p[0, 0, 0] + log_p[0, 1:, 1].sum())  # of one relevant document and three others
    labels = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    ours = losses.binary_cross_entropy(true - false, labels, torch.ones(1, 4) > 0)
    assert summed.item() == pytest.approx(4 * ours.item())
