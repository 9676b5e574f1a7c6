"""Communication between the processes of a training run. Without torchrun there is a single process."""

import contextlib
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, pad_across_processes

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process; rank 0 writes files and shows messages."""
    if _has_process_group():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched_by_torchrun() else 0


def world_size() -> int:
    """Return the number of processes in the process group."""
    return dist.get_world_size() if _has_process_group() else 1


def init_process_group() -> None:
    """Join torchrun's process group if that hasn't happened yet; do nothing in a single process."""
    if _launched_by_torchrun() and not _has_process_group():
        # Rank 0 may take long, for example to build an index; torchrun detects dead ranks.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def wait_for_everyone() -> None:
    """Block until all ranks have called this."""
    gather_objects(None)


def gather_objects(value: T) -> list[T]:
    """Collect a picklable value of each rank, in the order of ranks."""
    init_process_group()
    return [value] if world_size() == 1 else gather_object([value])


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """Run a function on rank 0 and broadcast its result; an error that it raises is raised on every rank."""
    init_process_group()
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = _picklable(error)
    result, raised = broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    return result


def all_reduce_max(number: int) -> int:
    """Return the maximum of a number over all ranks."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=PartialState().device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def check_same_on_all_ranks(settings: Mapping[str, str]) -> None:
    """Raise a ValueError on all ranks if a setting differs between them."""
    for other_rank, other in enumerate(gather_objects(settings)):
        names = [name for name, value in settings.items() if other.get(name) != value]
        if names:
            raise ValueError(
                f"{', '.join(names)} must be the same on all ranks; rank {other_rank} has another value than rank "
                f"{rank()}. Does the script sample without a seed?"
            )


def gather_lists(
    scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the lists of all ranks, so that each computes the loss of the whole batch.

    A mean over pairs isn't the mean of the ranks' means, so a loss per rank would depend on the number of ranks.
    Gradients flow only to this rank's scores. All tensors are [G, L]; rows without a document are padding, and removed.

    Returns:
        The tensors of all ranks in the order of the batch: its (n * world_size + r)-th list is the n-th of rank r.
    """
    own = torch.stack([values.float() for values in (scores, labels, mask)], dim=-1)  # (G, L, 3)
    own = pad_across_processes(pad_across_processes(own, dim=0), dim=1)
    lists = list(gather(own.detach()).split(len(own)))  # one (G, L, 3) for each rank
    lists[rank()] = own
    merged = torch.stack(lists, dim=1).flatten(0, 1)  # (G * ranks, L, 3)
    has_document = merged[..., 2].bool().any(-1)
    scores, labels, mask = merged[has_document].unbind(-1)
    return scores, labels, mask.bool()


@contextlib.contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Silence warnings and this package's log on all ranks but 0, so that each message appears once."""
    if rank() == 0:
        yield
        return
    logger = logging.getLogger("pyterrier_msft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _launched_by_torchrun() -> bool:
    # torchrun sets all three; other launchers set RANK alone.
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()
