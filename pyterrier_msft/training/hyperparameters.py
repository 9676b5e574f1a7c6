"""What every fitter takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import ir_measures
from ir_measures import nDCG


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What every fitter takes.

    Args:
        learning_rate: AdamW's, at its highest; it falls linearly to 0.
        epochs: Times that each query is learnt from.
        max_steps: Updates of the weights; in place of `epochs` if given.
        batch_size: Queries a step (over all processes, so that their number changes no result, but for dropout's
            random numbers).
        gradient_accumulation: Steps that are summed for one update.
        pairs_per_pass: Bounds memory: query-document pairs whose activations are held at once. The gradient is the
            same, at the price of a second forward pass (Gao et al., RepL4NLP 2021). None: all of a step's pairs, or
            as many as fit the memory by an estimate.
        warmup: Updates in which the learning rate rises from 0; below 1, a share of all updates.
        weight_decay: AdamW's.
        clip_norm: The gradient's largest norm. None: any.
        dropout: In place of the backbone's own probabilities while training. None: the backbone's own.
        max_length: Tokens a pair while training. None: the re-ranker's.
        freeze_position_embeddings: Whether the position embeddings stay as they are.
        metric: The `ir_measures` measure that validation computes. None: no validation.
        eval_every: Updates between validations. None: a tenth of the training.
        patience: Validations without a new best after which training stops. None: never.
        seed: Decides the order of queries, the sampled documents and dropout.
        trainer_args: Any further argument of `transformers.TrainingArguments`, such as `{"report_to": "tensorboard"}`.
    """

    learning_rate: float = 1e-5
    epochs: float = 1
    max_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    pairs_per_pass: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float | None = 10.0
    dropout: float | None = None
    max_length: int | None = None
    freeze_position_embeddings: bool = False
    metric: Any = field(default=nDCG @ 10)
    eval_every: int | None = None
    patience: int | None = None
    seed: int = 42
    trainer_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation", "pairs_per_pass", "max_length", "eval_every",
                     "patience"):  # fmt: skip
            check_number(name, getattr(self, name), whole=True)
        for name in ("learning_rate", "epochs", "clip_norm"):
            check_number(name, getattr(self, name))
        for name in ("warmup", "weight_decay"):
            check_number(name, getattr(self, name), zero=True)
        check_number("dropout", self.dropout, zero=True)
        check_number("seed", self.seed, whole=True, zero=True)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"expected dropout from 0 to below 1, found {self.dropout!r}")
        if isinstance(self.metric, str):
            object.__setattr__(self, "metric", ir_measures.parse_measure(self.metric))


def check_number(name: str, value: Any, *, whole: bool = False, zero: bool = False) -> None:
    """Raise a ValueError if a setting is neither None nor a finite number above 0 (or of at least 0)."""
    least = "of at least 0" if zero else "above 0"
    if value is None:
        return
    if not isinstance(value, Integral if whole else Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"expected {name} as a {'whole ' * whole}number {least}, found {value!r}")
    if float(value) < 0 or (value == 0 and not zero):
        raise ValueError(f"expected {name} {least}, found {value!r}")
