"""Losses that stop a training run at a chosen step, as Ctrl-C or a crash would.

They are plain functions, so that a run and its repetition have the same loss.
"""

import contextlib
from collections.abc import Callable, Iterator

from pyterrier_msft import losses

_steps: dict[str, int] = {}
_on_step: list[Callable[[str, int], None]] = []


def interruptible_lce(scores, labels, mask):
    _count("CL")
    return losses.localized_contrastive(scores, labels, mask)


def interruptible_ranknet(scores, labels, mask):
    _count("KD")
    return losses.ranknet(scores, labels, mask)


interruptible_ranknet.labels = losses.ranknet.labels


def _count(stage: str) -> None:
    step = _steps.get(stage, 0)
    _steps[stage] = step + 1
    for call in _on_step:
        call(stage, step)


@contextlib.contextmanager
def on_each_step(call: Callable[[str, int], None]) -> Iterator[None]:
    """Call a function with the stage and the number of its batch, from 0, before each batch's loss."""
    _steps.clear()
    _on_step.append(call)
    try:
        yield
    finally:
        _on_step.remove(call)


def interrupted_at(step: int, *, stage: str = "CL", error: type[BaseException] = KeyboardInterrupt):
    """Raise an error in a stage's step."""

    def interrupt(at_stage: str, at_step: int) -> None:
        if (at_stage, at_step) == (stage, step):
            raise error

    return on_each_step(interrupt)
