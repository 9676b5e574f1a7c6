"""What the processes of one training agree on; without `torchrun` there is one, and nothing to agree on."""

import contextlib
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Which of them this one is; the first, 0, is the one that writes and speaks."""
    if _grouped():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def join() -> None:
    """Have torchrun's processes know each other already before a fit, which does it else; in one process nothing."""
    if _launched() and not _grouped():
        # What others wait for, such as an index, may take its time; that one has died, torchrun sees.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def each(function: Callable[[], T]) -> list[T]:
    """What a function gives in each process, in their order; what it raises in one is raised in all."""
    join()
    if count() == 1:
        return [function()]
    found: tuple[T | None, Exception | None]
    try:
        found = function(), None
    except Exception as error:
        found = None, _sendable(error)
    every: list[tuple[T, Exception | None]] = [found] * count()  # type: ignore[list-item]
    dist.all_gather_object(every, found)
    for _, raised in every:
        if raised is not None:
            raise raised
    return [value for value, _ in every]


def _sendable(error: Exception) -> Exception:
    """An error as it is, or in words where it can't be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def largest(number: int) -> int:
    """The largest of what the processes have."""
    if count() == 1:
        return number
    value = torch.tensor(number, device=PartialState().device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def from_first(function: Callable[[], T]) -> T:
    """What a function gives in the first process, in all of them; it runs in no other."""
    return each(lambda: function() if rank() == 0 else None)[0]  # type: ignore[return-value]


def wait() -> None:
    """Go on when all processes have come here."""
    each(lambda: None)


@contextlib.contextmanager
def one_voice() -> Iterator[bool]:
    """Silence this package's warnings and log in all processes but the first, which would say the same.

    Yields whether this process may speak.
    """
    if rank() == 0:
        yield True
        return
    logger = logging.getLogger(__package__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield False
    finally:
        logger.setLevel(before)


def _launched() -> bool:
    # torchrun sets all three; a RANK alone may be anybody's.
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
