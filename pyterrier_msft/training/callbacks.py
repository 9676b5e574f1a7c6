"""Callbacks of training: history, progress bar, validation, early stopping, checkpoints, collapsed scores.

Callbacks save the state that resuming requires in Trainer's checkpoints.
"""

# ruff: noqa: D102 (TrainerCallback documents the hooks)

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyterrier as pt
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from pyterrier_msft.model.record import KEPT, PART_LOSS
from pyterrier_msft.notices import warn
from pyterrier_msft.significance import paired_t_test
from pyterrier_msft.training import distributed
from pyterrier_msft.training.checkpoints import Checkpoint
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.plan import Plan, describe_outcome

# A resumed run loses at most this much work.
SECONDS_BETWEEN_CHECKPOINTS = 300
# Scores of a query's documents that differ by less than this count as equal; logits are of order 1.
COLLAPSED_SPREAD = 1e-3
SIGNIFICANCE_LEVEL = 0.05  # at which a validation counts as worse than the best one
SELECTION_STATE = ("start", "best", "best_by_query", "kept_step", "evals_without_improvement")


class HistoryCallback(TrainerCallback, ExportableState):
    """Log about fifty times per training run, append each log to the history, and show a bar if `progress` names it."""

    def __init__(
        self, history: list[dict[str, Any]], plan: Plan, hyperparameters: Hyperparameters, *,
        part_names: Sequence[str] = (), progress: str | None, selection: "SelectionCallback | None",
    ) -> None:  # fmt: skip
        self.history, self.plan, self.part_names, self.selection = history, plan, part_names, selection
        self.metric, self.patience = str(hyperparameters.metric), hyperparameters.patience
        self.log_every = max(1, min(plan.eval_every, plan.updates // 50))
        self.first_row = len(history)
        # Since the last row:
        self.pairs: torch.Tensor | int = 0
        self.losses: torch.Tensor | int = 0  # (objectives,) the sum over steps
        self.steps = 0
        self.seconds_before = 0.0  # of the run that is resumed
        self.started = self.last_row_at = time.monotonic()
        self.bar = pt.tqdm(total=plan.updates, desc=progress, unit="step", disable=progress is None)

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"args": {}, "attributes": {"rows": self.history[self.first_row :], "seconds": self._seconds()}}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue the history of a checkpoint."""
        attributes = checkpoint.callbacks["HistoryCallback"]
        self.history.extend(attributes["rows"])
        self.seconds_before = attributes["seconds"]

    def count_step(self, pairs: torch.Tensor, losses: torch.Tensor) -> None:
        """Count a step's pairs, over all ranks, and add up the loss of each objective, (objectives,)."""
        self.pairs, self.losses, self.steps = self.pairs + pairs, self.losses + losses, self.steps + 1

    def part_losses(self) -> dict[str, float]:
        """Return the mean loss of each of several objectives since the last row, by column."""
        if not self.part_names or not isinstance(self.losses, torch.Tensor):
            return {}
        means = (self.losses / self.steps).tolist()
        return {f"{PART_LOSS}{name}": mean for name, mean in zip(self.part_names, means, strict=True)}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= is_due(state.global_step, self.log_every, self.plan)
        # A checkpoint's history must hold the loss up to its step.
        control.should_log |= control.should_evaluate or control.should_save
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return  # validation, or Trainer's summary
        now = time.monotonic()
        row = {
            "step": state.global_step,
            "epoch": state.global_step / self.plan.updates_per_epoch,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "seconds": self._seconds(),
            "pairs_per_second": int(self.pairs) / max(now - self.last_row_at, 1e-9),
            **self.part_losses(),
        }
        self.history.append(row)
        self.last_row_at, self.pairs, self.losses, self.steps = now, 0, 0, 0
        self.bar.set_postfix(loss=f"{row['loss']:.3g}")

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.history.append({"step": 0, "epoch": 0.0})
        self.history[-1] |= {self.metric: float(metrics[f"eval_{self.metric}"]), "seconds": self._seconds()}
        if self.selection is not None:
            for row in (row for row in self.history[self.first_row :] if self.metric in row):
                row[KEPT] = row["step"] == self.selection.kept_step
        self.last_row_at = time.monotonic()  # validation doesn't count as training time

    def add_last_step(self, state: TrainerState) -> None:
        """Add a row for the last update of an interrupted run, which may not have been logged."""
        if state.global_step > (self.history[-1]["step"] if len(self.history) > self.first_row else 0):
            epoch = state.global_step / self.plan.updates_per_epoch
            self.history.append({"step": state.global_step, "epoch": epoch, "seconds": self._seconds()})

    def show_outcome(self) -> None:
        """Say in the bar which step was kept, and why training ended early, if it did."""
        if text := describe_outcome(self.history[self.first_row :], self.metric, self.plan, self.patience):
            self.bar.set_postfix_str(text)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


class SelectionCallback(TrainerCallback, ExportableState):
    """Validate at the start and request validations, choose the weights to keep, in memory, and stop early.

    Kept are the last weights that aren't significantly worse than the best (paired t-test over the queries). The
    learning rate falls to 0, so later weights are better on average, by less than few queries can tell, and the best
    of many validations is the luckiest one. No weights are kept that are worse than those of the start, so that
    training that doesn't help ends where it began.
    """

    def __init__(
        self,
        plan: Plan,
        hyperparameters: Hyperparameters,
        *,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        evaluate: Callable[[], Any],
    ) -> None:
        self.metric, self.patience = str(hyperparameters.metric), hyperparameters.patience
        self.plan, self.weights, self.evaluate = plan, weights, evaluate
        self.by_query: list[float] = []  # the metric's values in the newest validation
        self.start = self.best = -math.inf
        self.best_by_query: list[float] = []
        self.kept_step = 0
        self.kept_weights: dict[str, torch.Tensor] | None = None
        self.evals_without_improvement = 0

    @property
    def out_of_patience(self) -> bool:
        """Whether the metric hasn't improved for as many validations as `patience` allows."""
        return self.patience is not None and self.evals_without_improvement >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the kept weights."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in SELECTION_STATE}}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint's best metric and kept weights."""
        attributes = checkpoint.callbacks["SelectionCallback"]
        for name in SELECTION_STATE:
            setattr(self, name, attributes[name])
        self.kept_weights = checkpoint.kept_weights()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0 and self.kept_weights is None:
            self.evaluate()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate |= is_due(state.global_step, self.plan.eval_every, self.plan)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        value = float(metrics[f"eval_{self.metric}"])
        self.evals_without_improvement = 0 if value > self.best else self.evals_without_improvement + 1
        if state.global_step == 0:
            self.start = value
        is_best = value >= self.best
        if is_best:
            self.best, self.best_by_query = value, self.by_query
        if is_best or (value >= self.start and not self._is_significantly_worse()):
            self.kept_step = state.global_step
            self.kept_weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.weights().items()}
        control.should_training_stop |= self.out_of_patience

    def _is_significantly_worse(self) -> bool:
        """Whether the newest validation is worse than the best one by more than chance."""
        is_tested = len(self.by_query) > 1  # with a single query, the better value is kept
        return not is_tested or paired_t_test(self.best_by_query, self.by_query) < SIGNIFICANCE_LEVEL


class CheckpointCallback(TrainerCallback, ExportableState):
    """Save a checkpoint at the start, at each validation's step, and at least every five minutes.

    The first checkpoint makes a run resumable even if it is interrupted before the second. `identity` is, by name,
    everything that determines the result of the run.
    """

    def __init__(self, identity: Mapping[str, str], plan: Plan, *, save: Callable[[], None]) -> None:
        self.identity, self.plan, self.save = dict(identity), plan, save
        self.saved_at = time.monotonic()
        self.is_resumed = False

    def state(self) -> dict[str, Any]:
        """Return what decides whether a run may resume from the checkpoint."""
        return {"args": {}, "attributes": {"identity": self.identity, "world_size": distributed.world_size()}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_resumed:
            self.save()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= is_due(state.global_step, self.plan.eval_every, self.plan)
        is_overdue = time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS
        control.should_save |= distributed.all_reduce_max(int(is_overdue)) > 0  # ranks save together

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= control.should_training_stop

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()


class CollapseCallback(TrainerCallback):
    """Warn once if all documents of a query get the same score: the model has collapsed, or never started to learn."""

    def __init__(self, plan: Plan) -> None:
        self.updates = plan.updates
        self.spread: torch.Tensor | None = None
        self.collapse_reported = False

    def observe(self, scores: torch.Tensor, mask: torch.Tensor) -> None:
        """Record how much the scores ([G, L]) within the median list differ, without synchronizing the device."""
        low = scores.masked_fill(~mask, math.inf).amin(-1)
        high = scores.masked_fill(~mask, -math.inf).amax(-1)
        # The median, so that a list of one document, or one that is already learned, isn't decisive.
        self.spread = (high - low).median()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        # A new head's scores differ little at the start.
        step, is_last = state.global_step, state.global_step >= self.updates
        has_settled = step >= max(10, self.updates // 5) or (is_last and step >= 4)
        if self.collapse_reported or not has_settled or self.spread is None:
            return
        if (spread := float(self.spread)) < COLLAPSED_SPREAD:
            self.collapse_reported = True
            warn(
                f"All documents of a query get nearly the same score: at step {step}, they differ by {spread:.1e}. "
                "Check that the qids of results and qrels match, that the labels of a query differ, and the learning "
                "rate: too high, it collapses a model; too low, the new head never leaves its start"
            )


def is_due(step: int, every: int, plan: Plan) -> bool:
    """Return whether an event that occurs every `every` updates, and at the end of the run, is due at a step."""
    return step % every == 0 or step >= plan.updates
