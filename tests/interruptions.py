"""Losses that stop a training run at a chosen step, as Ctrl-C or a crash would.

A run and its repetition have the same loss: what changes between them isn't part of the losses' digests.
"""

import contextlib
from collections.abc import Callable, Iterator

from pyterrier_msft import losses


class _State:
    """The number of steps of each stage, and what is called before each step."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.calls: list[Callable[[str, int], None]] = []

    def __getstate__(self) -> None:
        return None


_state = _State()


def interruptible_lce(scores, labels, mask):
    _count("CL")
    return losses.localized_contrastive(scores, labels, mask)


def interruptible_ranknet(scores, labels, mask):
    _count("KD")
    return losses.ranknet(scores, labels, mask)


interruptible_ranknet.labels = losses.ranknet.labels


def _count(stage: str) -> None:
    step = _state.steps.get(stage, 0)
    _state.steps[stage] = step + 1
    for call in _state.calls:
        call(stage, step)


@contextlib.contextmanager
def on_each_step(call: Callable[[str, int], None]) -> Iterator[None]:
    """Call a function with the stage and the number of its batch, from 0, before each batch's loss."""
    _state.steps.clear()
    _state.calls.append(call)
    try:
        yield
    finally:
        _state.calls.remove(call)


def interrupted_at(step: int, *, stage: str = "CL", error: type[BaseException] = KeyboardInterrupt):
    """Raise an error in a stage's step."""

    def interrupt(at_stage: str, at_step: int) -> None:
        if (at_stage, at_step) == (stage, step):
            raise error

    return on_each_step(interrupt)
