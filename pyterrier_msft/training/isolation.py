"""Restore what training changes besides the weights."""

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import PreTrainedModel

from pyterrier_msft.notices import warn
from pyterrier_msft.training import cpu
from pyterrier_msft.training.hyperparameters import Hyperparameters

# Environment variables that transformers' `enable_full_determinism` sets.
DETERMINISM_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "ASCEND_LAUNCH_BLOCKING",
    "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
}

FP32_PRECISIONS: tuple[Any, ...] = (
    torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
)  # fmt: skip


@contextlib.contextmanager
def preserve_global_state() -> Iterator[None]:
    """Restore the global random states, torch's choice of algorithms, accelerate's state, and environment variables.

    Trainer seeds all three random states when it is constructed. accelerate keeps the precision of the last
    `Accelerator`, which the next one would inherit.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    shared_states = [(owner, dict(owner._shared_state)) for owner in (AcceleratorState, GradientState)]
    environment = {name: value for name, value in os.environ.items() if _is_changed_by_training(name)}
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    precisions = [(owner, owner.fp32_precision) for owner in FP32_PRECISIONS]
    with torch.random.fork_rng():
        try:
            os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # Trainer would follow it; the re-ranker's dtype decides
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for owner, shared_state in shared_states:
                owner._shared_state.clear()
                owner._shared_state.update(shared_state)
            for name in [*filter(_is_changed_by_training, os.environ)]:
                del os.environ[name]
            os.environ.update(environment)
            # trainer_args={"full_determinism": True} changes it
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            for owner, precision in precisions:  # trainer_args={"tf32": True} changes it
                owner.fp32_precision = precision


def _is_changed_by_training(variable: str) -> bool:
    return variable.startswith("ACCELERATE_") or variable in DETERMINISM_VARIABLES


@contextlib.contextmanager
def training_mode(network: PreTrainedModel, hyperparameters: Hyperparameters, dtype: torch.dtype) -> Iterator[None]:
    """Temporarily set the network's dropout, frozen parameters and attention for training."""
    dropouts: list[tuple[Any, str, float]] = [
        (module, "p", module.p) for module in network.modules() if isinstance(module, torch.nn.Dropout)
    ]
    # Some families keep probabilities as plain numbers, in their modules or in the configuration.
    dropouts += [
        (owner, name, value)
        for owner in (*network.modules(), network.config)
        for name, value in vars(owner).items()
        if "dropout" in name and isinstance(value, float)
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    attention = network.config._attn_implementation
    try:
        if hyperparameters.dropout is not None:
            for module, name, _ in dropouts:
                setattr(module, name, hyperparameters.dropout)
        if network.device.type == "cpu":
            cpu.patch_for_cpu(network, dtype)
        if hyperparameters.freeze_position_embeddings:
            _freeze_position_embeddings(network)
        yield
    finally:
        for module, name, probability in dropouts:
            setattr(module, name, probability)
            vars(module).pop("forward", None)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        if network.config._attn_implementation != attention:
            network.set_attn_implementation(attention)
        if any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
            network.gradient_checkpointing_disable()
            network.disable_input_require_grads()


def _freeze_position_embeddings(network: PreTrainedModel) -> None:
    embeddings = [module for name, module in network.named_modules() if name.endswith("position_embeddings")]
    for module in embeddings:
        module.requires_grad_(False)
    if not embeddings:
        warn(f"freeze_position_embeddings has no effect: {type(network).__name__} has no position embeddings")
