"""The settings that all fitters share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import ir_measures
import numpy as np
from ir_measures import nDCG

from pyterrier_msft.checks import check_number

# Arguments of `transformers.TrainingArguments` that have another setting in this package, by argument.
SET_ELSEWHERE = {
    "bf16": "MonoCE's dtype",
    "eval_steps": "eval_every",
    "fp16": "MonoCE's dtype",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "max_grad_norm": "clip_norm",
    "max_steps": "max_steps",
    "num_train_epochs": "epochs",
    "output_dir": "checkpoint_dir of fit",
    "per_device_train_batch_size": "batch_size",
    "seed": "seed",
    "use_cpu": "MonoCE's device",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
}
# Arguments of `transformers.TrainingArguments` that this package doesn't support.
UNSUPPORTED = (
    "accelerator_config",
    "auto_find_batch_size", "bf16_full_eval", "data_seed", "dataloader_drop_last", "deepspeed", "disable_tqdm",
    "do_eval", "do_predict", "do_train", "eval_accumulation_steps", "eval_delay", "eval_on_start", "eval_strategy",
    "fp16_full_eval", "fsdp", "fsdp_config", "greater_is_better", "label_names", "label_smoothing_factor",
    "load_best_model_at_end", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy",
    "metric_for_best_model", "per_device_eval_batch_size", "prediction_loss_only", "remove_unused_columns",
    "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "save_only_model", "save_steps",
    "save_strategy", "train_sampling_strategy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The settings that all fitters share.

    Args:
        learning_rate: Peak learning rate of AdamW; it decays linearly to 0. None: by the width of the model, and by
            whether its head is new, see `plan_training`.
        epochs: Number of times that each query is seen. None: by the number of queries, see `plan_training`.
        max_steps: Number of updates; overrides `epochs`.
        batch_size: Queries per update, over all processes, so that the number of GPUs doesn't change the result (except
            for the random numbers of dropout). None: by the number of queries, see `plan_training`.
        gradient_accumulation: Number of batches per update. An update uses `batch_size * gradient_accumulation`
            queries, in the memory of one batch; the gradient is that of one large batch (gradient caching).
        pairs_per_pass: Largest number of query-document pairs (or windows, with `passages`) whose activations are held
            in memory. A batch with more costs one extra forward pass; the gradient is unchanged, except for the random
            numbers of dropout (gradient caching: Gao et al., RepL4NLP 2021). None: on a CPU, as many as take an
            estimated 4 GiB; on a GPU, as many as fit.
        warmup: Updates during which the learning rate rises from 0; below 1, a fraction of all updates.
        weight_decay: Weight decay of AdamW.
        clip_norm: Maximum norm of the gradient. None: no clipping.
        dropout: Dropout probability during training. None: the backbone's own.
        max_length: Maximum number of tokens per pair during training. None: the re-ranker's.
        freeze_position_embeddings: Whether to freeze the position embeddings.
        metric: `ir_measures` measure for validation. None: no validation.
        eval_every: Updates between validations, each on all validation queries. None: a tenth of the training run; less
            often, and on a sample of the queries, if that would take more than a third of the time of training.
        patience: Stop after this many validations without improvement. None: never stop early.
        seed: Seed for the order of queries, the sampled documents and dropout.
        trainer_args: Further arguments of `transformers.TrainingArguments`, for example
            `{"report_to": "tensorboard"}`.

    Raises:
        ValueError: If a setting is out of range, or `trainer_args` has an argument that another field sets.
    """

    learning_rate: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
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
        for own in fields(self):
            if isinstance(value := getattr(self, own.name), np.number):
                object.__setattr__(self, own.name, value.item())  # JSON knows only Python's numbers
        check_number("gradient_accumulation", self.gradient_accumulation, integer=True, required=True)
        for name in ("max_steps", "batch_size", "pairs_per_pass", "max_length", "eval_every", "patience"):
            check_number(name, getattr(self, name), integer=True)
        for name in ("learning_rate", "epochs", "clip_norm"):
            check_number(name, getattr(self, name))
        for name in ("warmup", "weight_decay"):
            check_number(name, getattr(self, name), minimum_zero=True, required=True)
        check_number("dropout", self.dropout, minimum_zero=True)
        check_number("seed", self.seed, integer=True, minimum_zero=True, required=True)
        if self.seed >= 2**32:  # numpy's limit
            raise ValueError(f"seed must be below 2**32; got {self.seed!r}")
        if self.dropout is not None and self.dropout >= 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {self.dropout!r}")
        object.__setattr__(self, "metric", parse_metric(self.metric))
        _check_trainer_args(self.trainer_args)


def parse_metric(metric: Any) -> Any:
    """Return the measure that a setting names; None stays None."""
    if metric is None or isinstance(metric, ir_measures.Measure):
        return metric
    try:
        return ir_measures.parse_measure(metric)
    except (NameError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise ValueError(f"metric must be an ir_measures measure such as nDCG @ 10; got {metric!r}") from error


def _check_trainer_args(trainer_args: Any) -> None:
    if not isinstance(trainer_args, Mapping):
        raise ValueError(f"trainer_args must be a dictionary; got {type(trainer_args).__name__}")
    for name in trainer_args:
        if name in SET_ELSEWHERE:
            raise ValueError(f"trainer_args must not set {name!r}. Use {SET_ELSEWHERE[name]} instead")
        if name in UNSUPPORTED:
            sharding = "; the weights of an encoder fit one GPU. Run the script with torchrun to train on several GPUs"
            hint = sharding if name in {"deepspeed", "fsdp", "fsdp_config"} else ""
            raise ValueError(f"trainer_args must not set {name!r}, which isn't supported{hint}")
    if trainer_args:
        from transformers import TrainingArguments  # takes seconds

        if unknown := trainer_args.keys() - {f.name for f in fields(TrainingArguments)}:
            raise ValueError(f"trainer_args must be arguments of transformers.TrainingArguments; got {min(unknown)!r}")
