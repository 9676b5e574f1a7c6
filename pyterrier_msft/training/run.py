"""A training run: from objectives and a cross-encoder to trained weights."""

import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from pyterrier_msft.model.cross_encoder import CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.threads import RANDOM_STATE
from pyterrier_msft.notices import warn
from pyterrier_msft.training import distributed
from pyterrier_msft.training.checkpoints import Checkpoint, check_writable, checkpoint_to_resume
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.isolation import preserve_global_state, training_mode
from pyterrier_msft.training.objectives import Objective
from pyterrier_msft.training.plan import Plan, round_up
from pyterrier_msft.training.trainer import ListwiseTrainer
from pyterrier_msft.training.validation import Validation

logger = logging.getLogger(__name__)


def train(
    model: CrossEncoder,
    encoder: PairEncoder,
    objectives: Sequence[Objective],
    hyperparameters: Hyperparameters,
    *,
    scorer: PairEncoder | None = None,
    validation: Validation | None = None,
    checkpoint_dir: str | Path | None = None,
    identity: Mapping[str, str] | None = None,
    history: list[dict[str, Any]] | None = None,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """Train a cross-encoder in place, on its device and in its precision; weights and loss are float32.

    The first objective's plan has the numbers of the run. With `validation`, `SelectionCallback` chooses the weights
    that are kept, which may be those of the start, and `patience` applies; `scorer` encodes its pairs, if it isn't the
    encoder of training. With `checkpoint_dir`, the run resumes from the newest checkpoint, whose `identity` (by name,
    what determines the result) must be equal. Rows are appended to `history` as they are logged, so that they survive
    an interruption.

    Returns:
        The history, a dictionary for each logged step.

    Raises:
        ValueError: If the loss isn't finite, or `checkpoint_dir` can't be written to or holds a checkpoint of another
            training run.
    """
    history, identity = [] if history is None else history, dict(identity or {})
    model.prepare_training()
    network, dtype = model.network, model.training_dtype
    with RANDOM_STATE, contextlib.ExitStack() as stack:
        stack.enter_context(preserve_global_state())
        stack.enter_context(quiet_transformers())
        if checkpoint_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyterrier_msft_")))
        else:
            folder = check_writable(checkpoint_dir, "checkpoint_dir")
        arguments = training_arguments(hyperparameters, objectives[0].plan, network.device, dtype, folder)
        distributed.check_same_on_all_ranks(identity)
        stack.enter_context(training_mode(network, hyperparameters, dtype))
        stack.enter_context(first_token_only(network))
        trainer = ListwiseTrainer(
            objectives, network, encoder, hyperparameters,
            dtype=dtype, scorer=scorer or encoder, validation=validation, history=history, progress=progress,
            identity=None if checkpoint_dir is None else identity, args=arguments,
        )  # fmt: skip
        stack.callback(trainer.rows.bar.close)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("training with FSDP or DeepSpeed isn't supported. Run the script with torchrun")
        if checkpoint_dir is None:
            _keep_tensorboard_events(trainer)
            _run(trainer)
        else:
            _run(trainer, folder, checkpoint_to_resume(folder, identity, trainer.args.save_total_limit))
    return history


def _run(trainer: ListwiseTrainer, folder: Path | None = None, checkpoint: Checkpoint | None = None) -> None:
    """Train, from a checkpoint if there is one; leave the weights to keep in the network."""
    selection = trainer.selection
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint.path)
        trainer.resume_callbacks(checkpoint)
    try:
        if selection is None or selection.kept_weights is None or not selection.out_of_patience:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
        trainer.rows.show_outcome()
    except KeyboardInterrupt:
        logger.warning(
            "training was interrupted at step %d of %d; the re-ranker keeps the %s weights so far; %s",
            trainer.state.global_step, trainer.plan.updates,
            "last" if selection is None or selection.kept_weights is None else "best",
            "pass checkpoint_dir=... to make training resumable" if folder is None
            else f"repeat the call to resume from the last checkpoint in {folder}",
        )  # fmt: skip
        raise
    finally:
        trainer.rows.add_last_step(trainer.state)
        # accelerate leaves its mixed-precision `forward` on the model, which would round later float32 scores.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if selection is not None and selection.kept_weights is not None:
            trainer.network.load_state_dict(selection.kept_weights)
        trainer.network.eval()
        if distributed.world_size() > 1:
            trainer.accelerator.free_memory()  # removes DDP's hooks from the parameters


def training_arguments(
    hyperparameters: Hyperparameters, plan: Plan, device: torch.device, dtype: torch.dtype, folder: Path
) -> TrainingArguments:
    """Convert the settings to Trainer's arguments. Under torchrun, this joins the process group.

    Raises:
        ValueError: If there is a process group that Trainer doesn't use.
    """
    warmup = hyperparameters.warmup if hyperparameters.warmup >= 1 else round_up(hyperparameters.warmup * plan.updates)
    if warmup > plan.updates:
        warn(
            f"warmup is {warmup:,} updates, but training has {plan.updates:,}: the learning rate rises up to the last "
            "one. A warmup below 1 is a fraction of the updates"
        )
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": plan.updates,
        "per_device_train_batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
        "weight_decay": hyperparameters.weight_decay,
        "max_grad_norm": hyperparameters.clip_norm or 0.0,
        "warmup_steps": min(warmup, plan.updates - 1),  # the first update of a warmup has a learning rate of 0
        "lr_scheduler_type": "linear",
        "seed": hyperparameters.seed,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "logging_strategy": "no",  # the callbacks decide when to log, validate and save
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 1,
        "ddp_find_unused_parameters": False,
        # Buffers never change, and broadcasting them in each pass requires equally many passes on all ranks.
        "ddp_broadcast_buffers": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    arguments = TrainingArguments(**{**own, **copy.deepcopy(hyperparameters.trainer_args)})
    if arguments.world_size != distributed.world_size():
        raise ValueError(
            f"the process group must be started by torchrun; got a group of {distributed.world_size()} processes "
            "that Trainer doesn't use"
        )
    # Several GPUs in one process would mean DataParallel, which splits lists.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def check_training_device(device: torch.device) -> None:
    """Raise a ValueError for a GPU other than the one that Trainer uses."""
    index = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
    if device.type == "cuda" and device.index not in {None, index}:
        raise ValueError(
            f"device must be 'cuda:{index}' for training; got {str(device)!r}. Choose a GPU with the environment "
            "variable CUDA_VISIBLE_DEVICES, and leave device out under torchrun"
        )


def _keep_tensorboard_events(trainer: Trainer) -> None:
    """Write TensorBoard's events to its default folder, ./runs, because the output folder is temporary."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = default_logdir()
