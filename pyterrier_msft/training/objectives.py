"""What a training run learns from."""

from dataclasses import dataclass

from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.mixture import MixedGroups
from pyterrier_msft.losses import Loss
from pyterrier_msft.training.plan import Plan


@dataclass(frozen=True)
class Objective:
    """The groups that a training run learns from, or one part of them, and the loss of their scores.

    A step takes a batch for each objective of its run, and minimizes the sum of the losses, each times its weight. The
    plans of all objectives have the same number of updates, but their own batch size and epochs.
    """

    groups: Groups | MixedGroups
    loss: Loss
    plan: Plan
    weight: float = 1
    name: str = ""
