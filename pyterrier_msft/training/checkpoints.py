"""Checkpoints of Hugging Face's Trainer: which one to resume from, and whether it belongs to this training run."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from pyterrier_msft.training import distributed

KEPT_WEIGHTS_NAME = "kept.safetensors"
MARKER_NAME = ".pyterrier_msft"  # the first file of each checkpoint: even an incomplete one is known to be ours

# Increase this when the same data, settings and initial weights would give other weights than before.
SEMANTICS_VERSION = 8


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of ours."""

    path: Path
    callbacks: Mapping[str, dict[str, Any]]  # what each of our callbacks exported, by the name of its class

    @property
    def identity(self) -> dict[str, str]:
        """What determined the result of the training run, by name."""
        identity: dict[str, str] = self.callbacks["CheckpointCallback"]["identity"]
        return identity

    @property
    def world_size(self) -> int:
        """The number of processes that wrote it."""
        return int(self.callbacks["CheckpointCallback"]["world_size"])

    def kept_weights(self) -> dict[str, torch.Tensor] | None:
        """Load the weights to keep so far; None without validation."""
        path = self.path / KEPT_WEIGHTS_NAME
        return load_file(path) if path.is_file() else None


def newest_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Find the newest complete checkpoint in a folder; None if there is none."""
    return next(_complete_checkpoints(Path(folder)), None)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None if writing it was interrupted, or if another program wrote it.

    Trainer writes its state last, so a checkpoint with a state is complete, except perhaps for the random states of
    other ranks.
    """
    try:
        state = json.loads((path / TRAINER_STATE_NAME).read_text())
        exported = state["stateful_callbacks"].items()
    except (OSError, ValueError, KeyError):
        return None
    callbacks = {name: content["attributes"] for name, content in exported if isinstance(content, dict)}
    if "CheckpointCallback" not in callbacks:
        return None
    checkpoint = Checkpoint(path, callbacks)
    ranks = [""] if checkpoint.world_size == 1 else [f"_{rank}" for rank in range(checkpoint.world_size)]
    random_states = [f"rng_state{rank}.pth" for rank in ranks]
    needed = (SAFE_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, *random_states)
    return checkpoint if all((path / name).is_file() for name in needed) else None


def checkpoint_identity(checkpoint_dir: str | Path | None) -> dict[str, str]:
    """Return the identity of the training run whose checkpoints are in a folder; empty if there are none."""
    newest = None if checkpoint_dir is None else newest_checkpoint(checkpoint_dir)
    return {} if newest is None else newest.identity


def checkpoint_to_resume(folder: Path, identity: Mapping[str, str], limit: int | None) -> Checkpoint | None:
    """Find the checkpoint to resume from, the same one on all ranks, and delete what a killed process left.

    That is an incomplete checkpoint, or, beyond Trainer's `limit`, an older one that it would have deleted next.

    Raises:
        ValueError: If a checkpoint in the folder belongs to another training run; the message names what differs. Or if
            another program wrote it. Training would delete both.
    """

    def find() -> Checkpoint | None:
        if foreign := sorted(path.name for path in _checkpoint_folders(folder) if _is_foreign(path)):
            raise ValueError(
                f"checkpoint_dir {folder} must not have checkpoints of another program; got {', '.join(foreign)}. Use "
                "another checkpoint_dir"
            )
        checkpoints = [*_complete_checkpoints(folder)]
        for found in (checkpoint.identity for checkpoint in checkpoints):
            differences = ", ".join(
                f"{name} is {found.get(name, 'unknown')} there and {value} here"
                for name, value in identity.items()
                if found.get(name) != value
            )
            if differences:
                raise ValueError(
                    f"checkpoint_dir {folder} holds a checkpoint of another training run: {differences}. Use another "
                    "checkpoint_dir, or delete this one"
                )
        limited = limit is not None and limit > 0  # as Trainer reads it
        kept = {checkpoint.path for checkpoint in (checkpoints[:limit] if limited else checkpoints)}
        for path in _checkpoint_folders(folder):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
        return checkpoints[0] if checkpoints else None

    return distributed.run_on_rank_zero(find)


def delete_checkpoints(folder: Path) -> None:
    """Delete all checkpoints in a folder, and the folder itself unless other files, e.g. TensorBoard's, are in it."""

    def delete() -> None:
        for path in [*folder.rglob("checkpoint-*")]:
            if _step(path) >= 0:
                shutil.rmtree(path, ignore_errors=True)
        for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
            with contextlib.suppress(OSError):  # not empty, or not a folder
                path.rmdir()

    distributed.run_on_rank_zero(delete)


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write weights as safetensors. Tensors are cloned, because the format refuses tensors that share memory."""
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


def _complete_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Yield the complete checkpoints in a folder, the newest first."""
    for path in sorted(_checkpoint_folders(folder), key=_step, reverse=True):
        if (checkpoint := read_checkpoint(path)) is not None:
            yield checkpoint


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Return what Trainer takes for checkpoints in a folder; "checkpoint-24-copy" is a copy that a user has made."""
    return [path for path in folder.glob("checkpoint-*") if _step(path) >= 0]


def _is_foreign(path: Path) -> bool:
    """Whether another program wrote a checkpoint. One without a state is ours, but incomplete, if it has our marker."""
    if not path.is_dir() or not any(path.iterdir()):
        return False  # nothing in it can be deleted
    try:
        state = json.loads((path / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return not (path / MARKER_NAME).is_file()
    return not isinstance(state, dict) or "CheckpointCallback" not in state.get("stateful_callbacks", {})


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
