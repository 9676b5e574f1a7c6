"""How long a training run is, how fast it learns, and how often it is validated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.mixture import MixedGroups
from pyterrier_msft.model.record import KEPT
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.validation import Validation

# Queries per update, for fewer queries than the first number.
BATCH_SIZES = ((200, 4), (1000, 8), (math.inf, 16))
MIN_UPDATES = 300  # a new head learns little in fewer
MAX_EPOCHS = 12  # more of them overfit
# Learning rate of a new head on a backbone that is as narrow as MiniLM. A wider one needs a lower rate.
NEW_HEAD_RATE, NARROW = 2e-4, 384
TRAINED_HEAD_FACTOR = 0.25
# Validation takes at most this share of the time that training takes.
VALIDATION_SHARE = 1 / 3
TRAINING_COST = 3  # of a pair, in forward passes
MIN_VALIDATIONS, MAX_VALIDATIONS = 3, 11  # with that of the start
MIN_VALIDATION_QUERIES = 50


def round_up(number: float) -> int:
    """Round up, ignoring the rounding error of a product: 100 * 1.1 gives 110."""
    return math.ceil(number - 1e-9)


@dataclass(frozen=True)
class Plan:
    """The numbers of a training run: those that its hyperparameters set, and for the others, what suits the data.

    Attributes:
        batch_size: Queries per update.
        updates: Number of updates of the weights.
        updates_per_epoch: Number of updates in which each query is seen once.
        learning_rate: The peak learning rate.
        eval_every: Updates between validations, and between checkpoints.
        validation_queries: Number of queries to validate on; 0 without validation.
    """

    batch_size: int
    updates: int
    updates_per_epoch: int
    learning_rate: float
    eval_every: int
    validation_queries: int = 0

    @property
    def epochs(self) -> float:
        """The number of times that each query is seen."""
        return self.updates / self.updates_per_epoch

    def __str__(self) -> str:
        text = (
            f"{self.epochs:.3g} {'epoch' if self.epochs == 1 else 'epochs'} of {self.updates_per_epoch:,} updates with "
            f"{self.batch_size} queries each, learning rate {self.learning_rate:.3g}"
        )
        if self.validation_queries:
            often = (
                f"every {self.eval_every:,} updates" if self.eval_every < self.updates else "at the start and the end"
            )
            text += f"; validation on {self.validation_queries:,} queries {often}"
        return text


def describe_outcome(history: Sequence[Mapping[str, Any]], metric: str, plan: Plan, patience: int | None) -> str | None:
    """Say which step's weights a run has kept, and why it ended early, if it did; None without validation."""
    values = {row["step"]: row[metric] for row in history if metric in row}
    if not values:
        return None
    step = next(row["step"] for row in history if row.get(KEPT))
    kept, last = f"kept step {step} of {plan.updates}", history[-1]["step"]
    best = max(values, key=lambda each: (values[each], each))
    if best != step:
        kept += f", as step {best} isn't significantly better"
    if last >= plan.updates or patience is None:
        return kept
    validations = "one validation" if patience == 1 else f"{patience} validations"
    return f"stopped at step {last}: no improvement for {validations}; {kept}"


def plan_training(
    hyperparameters: Hyperparameters, groups: Groups | MixedGroups, *, width: int, head_is_new: bool,
    is_adapter: bool = False, validation: Validation | None = None,
) -> Plan:  # fmt: skip
    """Decide what the hyperparameters leave open.

    - Small data need small batches and several epochs: `batch_size` is 4 for fewer than 200 queries, 8 for fewer than
      1,000, else 16; `epochs` are as many as give 300 updates, and at most 12.
    - `learning_rate` is 2e-4 for a new head on a model of up to 384 dimensions, e.g. MiniLM, and falls with the cube of
      the width, e.g. to 2.5e-5 for BERT-base; an adapter has 2e-4 at any width. It is a quarter of that for a head that
      is already trained.
    - Validation happens at the start, and then up to ten times. It takes at most a third of the time of training: if
      need be, there are fewer validations, but at least two, and then fewer queries, but at least 50.

    docs/how-much-data.md has the measurements behind the numbers.

    Args:
        hyperparameters: The settings; what they set is what happens.
        groups: The queries to train on.
        width: Dimensions of the model's hidden states.
        head_is_new: Whether the model's head is untrained.
        is_adapter: Whether only an adapter and the head are trained.
        validation: The validation data.
    """
    queries = groups.groups_per_epoch()
    batch_size = hyperparameters.batch_size or next(size for limit, size in BATCH_SIZES if queries < limit)
    batch_size *= hyperparameters.gradient_accumulation
    updates_per_epoch = math.ceil(queries / batch_size)
    epochs = hyperparameters.epochs or min(MAX_EPOCHS, math.ceil(MIN_UPDATES / updates_per_epoch))
    updates = hyperparameters.max_steps or max(1, round_up(updates_per_epoch * epochs))
    rate = NEW_HEAD_RATE * (1 if is_adapter else min(1.0, (NARROW / width) ** 3))
    rate *= 1 if head_is_new else TRAINED_HEAD_FACTOR
    eval_every, validation_queries = max(1, updates // (MAX_VALIDATIONS - 1)), 0
    if validation is not None:
        validation_queries = validation.queries
        training_cost = TRAINING_COST * groups.drawn_documents() * updates / updates_per_epoch
        affordable = VALIDATION_SHARE * training_cost / len(validation.results)  # validations on all queries
        if hyperparameters.eval_every is None:
            validations = min(MAX_VALIDATIONS, max(MIN_VALIDATIONS, int(affordable)))
            eval_every = math.ceil(updates / (validations - 1))
            sample = max(MIN_VALIDATION_QUERIES, int(validation.queries * affordable / MIN_VALIDATIONS))
            validation_queries = min(validation.queries, sample)
    return Plan(
        batch_size=batch_size,
        updates=updates,
        updates_per_epoch=updates_per_epoch,
        learning_rate=hyperparameters.learning_rate or float(f"{rate:.1e}"),
        eval_every=hyperparameters.eval_every or eval_every,
        validation_queries=validation_queries,
    )
