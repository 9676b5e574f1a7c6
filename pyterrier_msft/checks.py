"""Checks of arguments: numbers, seeds and choices."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str, value: Any, *, integer: bool = False, minimum_zero: bool = False, signed: bool = False,
    required: bool = False,
) -> None:  # fmt: skip
    """Raise a ValueError unless a setting is a finite number, or None if not required.

    It must be > 0, with `minimum_zero` >= 0, and with `signed` it can be negative.
    """
    if value is None and not required:
        return
    is_number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    is_in_range = is_number and math.isfinite(value) and (signed or value > 0 or (value == 0 and minimum_zero))
    if not is_in_range:
        kind = "integer" if integer else "number"
        wanted = f"a finite {kind}" if signed else f"a non-negative {kind}" if minimum_zero else f"a positive {kind}"
        raise ValueError(f"{name} must be {wanted}{'' if required else ' or None'}; got {value!r}")


def check_seeds(seeds: Iterable[Any]) -> list[int]:
    """Return seeds as integers; a ValueError unless they are different non-negative integers."""
    found = list(seeds)
    for seed in found:
        check_number("seeds", seed, integer=True, minimum_zero=True, required=True)
    if len({*found}) < len(found):
        raise ValueError(f"seeds must be different; got {found}")
    return [int(seed) for seed in found]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless a setting is one of some strings."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}; got {value!r}")
