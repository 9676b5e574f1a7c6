"""What a loss is: which labels it needs, its temperature, and weighted sums of losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores [G, L], labels [G, L], mask [G, L]) -> scalar."""

Labels = Literal["order", "binary", "graded", "scores", "probabilities"]
"""How a loss interprets labels. "order": which of two is higher, as in ranks; "binary": above 0 is relevant; "graded":
grades of relevance, 0 for none, where a higher grade is a larger gain; "scores": real-valued scores of a teacher;
"probabilities": a teacher's probabilities of relevance, between 0 and 1."""

# The needs that each kind of labels satisfies: grades can be read as binary, a teacher's scores can't.
_SATISFIES: dict[Labels, set[Labels]] = {
    "order": {"order"},
    "binary": {"order", "binary"},
    "graded": {"order", "binary", "graded"},
    "scores": {"order", "scores"},
    "probabilities": {"order", "scores", "probabilities"},
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


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless it is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0; got {temperature!r}")


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
