"""Classifiers: the score of several labels is the log-odds of one of them, and no score is in half precision."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pyterrier_msft.model.precision import linear_in_float32


@dataclass(frozen=True)
class LogOdds:
    """A hook on a classifier's forward pass: replaces the logits with the log-odds of one label, [pairs, 1]."""

    label: int

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Compute log p / (1 - p) of the label, of the softmax of the logits."""
        logits = output.logits.float()
        others = torch.arange(logits.shape[-1], device=logits.device) != self.label
        output.logits = logits[:, [self.label]] - logits[:, others].logsumexp(-1, keepdim=True)
        return output


class ScoreLayer(nn.Linear):
    """A classifier's last layer, in float32 also in mixed precision: in bfloat16, a list would have tied scores."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Compute the logits, [..., labels]."""
        return linear_in_float32(states, self.weight, self.bias)


def use_float32_scores(model: PreTrainedModel) -> None:
    """Compute a model's scores in float32, in place, if they come from linear layers outside the backbone."""
    for module in _outside_backbone(model):
        if type(module) is nn.Linear and module.out_features in {1, model.config.num_labels}:
            module.__class__ = ScoreLayer


def _outside_backbone(model: PreTrainedModel) -> list[nn.Module]:
    backbone = {*model.base_model.modules()} if model.base_model is not model else set()
    return [module for module in model.modules() if module not in backbone]


def check_labels(config: PretrainedConfig | None, relevant: int | str | None, name: str) -> int | None:
    """Return the index of the label whose log-odds are the score; None for a model with a single score.

    `config` is that of a classifier; None for other models.

    Raises:
        ValueError: If there are more than two labels and `relevant` names none, or it names one that doesn't exist.
    """
    if config is None or config.num_labels == 1:
        if relevant is not None:
            raise ValueError(f"relevant is for a classifier with several labels; got {relevant!r} with {name!r}")
        return None
    labels = [config.id2label[i] for i in range(config.num_labels)]
    if relevant is None and len(labels) > 2:
        raise ValueError(
            f"model must have one label (a score), or two of which the second is relevant; got {len(labels)} labels in "
            f"{name!r}. Name the relevant one with relevant=, one of {', '.join(map(repr, labels))}"
        )
    index = 1 if relevant is None else labels.index(relevant) if relevant in labels else relevant
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(labels):
        raise ValueError(
            f"relevant must be an index below {len(labels)} or one of {', '.join(map(repr, labels))}, the labels of "
            f"{name!r}; got {relevant!r}"
        )
    return index


def score_label(model: PreTrainedModel, label: int) -> None:
    """Turn a classifier, in place, into a model with a single score: the log-odds of one label.

    The log-odds of one of two labels are a linear function, too, so such a model becomes one with one label, which any
    library can use. So does a model of independent labels, whose log-odds are their logits. Others keep their labels.
    """
    count, is_independent = model.config.num_labels, model.config.problem_type == "multi_label_classification"
    if count > 2 and not is_independent:
        model.register_forward_hook(LogOdds(label))
        return
    found = [
        module for module in _outside_backbone(model)
        if isinstance(module, nn.Linear) and module.out_features == count
    ]  # fmt: skip
    if len(found) != 1:
        raise ValueError(
            f"model must end in a linear layer with {count} rows; got {type(model).__name__} with {len(found)} of them"
        )
    layer = found[0]
    with torch.no_grad():
        for name, rows in [*layer.named_parameters()]:
            row = rows[[label]]
            setattr(layer, name, nn.Parameter(row if is_independent else row - rows[[1 - label]]))
    layer.out_features = model.config.num_labels = model.num_labels = 1
    model.config.problem_type = None
