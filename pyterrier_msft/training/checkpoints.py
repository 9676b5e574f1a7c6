"""Checkpoints of Hugging Face's Trainer: which one to resume from, and whether it is one of this training run."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from pyterrier_msft.training import distributed

BEST_WEIGHTS_NAME = "best.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        path: Its folder.
        callbacks: What each of our callbacks exported, by the name of its class.
    """

    path: Path
    callbacks: Mapping[str, dict[str, Any]]

    @property
    def identity(self) -> dict[str, str]:
        """What determined the result of the training run, by name."""
        identity: dict[str, str] = self.callbacks.get("CheckpointCallback", {}).get("identity", {})
        return identity

    @property
    def world_size(self) -> int:
        """The number of processes that wrote it."""
        return int(self.callbacks.get("CheckpointCallback", {}).get("world_size", 1))

    def best_weights(self) -> dict[str, torch.Tensor] | None:
        """Load the best weights so far; None without validation."""
        path = self.path / BEST_WEIGHTS_NAME
        return load_file(path) if path.is_file() else None


def newest_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Find the newest complete checkpoint in a folder; None if there is none.

    Trainer's state is written last, so a checkpoint whose state can be read has everything else, but for the random
    states of other ranks.
    """
    for path in sorted(Path(folder).glob("checkpoint-*"), key=_step, reverse=True):
        try:
            state = json.loads((path / TRAINER_STATE_NAME).read_text())
            callbacks = {
                name: content["attributes"]
                for name, content in state["stateful_callbacks"].items()
                if isinstance(content, dict)
            }
        except (OSError, ValueError, KeyError):
            continue  # writing it was interrupted
        checkpoint = Checkpoint(path, callbacks)
        random_states = _random_state_names(checkpoint.world_size)
        needed = (SAFE_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, *random_states)
        if all((path / name).is_file() for name in needed):
            return checkpoint
    return None


def checkpoint_identity(checkpoint_dir: str | Path | None) -> dict[str, str]:
    """Return the identity of the training run whose checkpoints are in a folder; empty if there are none."""
    newest = None if checkpoint_dir is None else newest_checkpoint(checkpoint_dir)
    return {} if newest is None else newest.identity


def checkpoint_to_resume(folder: Path, identity: Mapping[str, str]) -> Checkpoint | None:
    """Find the checkpoint to resume from, the same one on all ranks, and delete incomplete ones.

    Raises:
        ValueError: If it belongs to another training run; the message names what differs.
    """

    def find() -> Checkpoint | None:
        newest = newest_checkpoint(folder)
        if newest is None:
            return None
        found = newest.identity
        differences = [
            f"{name} is {found.get(name, 'unknown')} there and {value} here"
            for name, value in identity.items()
            if found.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"checkpoint_dir {folder} holds a checkpoint of another training run: {', '.join(differences)}. Use "
                "another checkpoint_dir, or delete this one"
            )
        for path in folder.glob("checkpoint-*"):
            if path != newest.path:
                shutil.rmtree(path, ignore_errors=True)
        return newest

    return distributed.run_on_rank_zero(find)


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write weights as safetensors, which refuses tensors that share memory."""
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path, {"format": "pt"})


def check_writable(folder: str | Path, name: str) -> Path:
    """Create a folder if needed and check that files can be written to it.

    Raises:
        ValueError: If not; the message names the argument.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written to; got {path}: {error}") from error
    return path


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _random_state_names(world_size: int) -> list[str]:
    return ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
