"""Combine fitters: `first >> second` in sequence, `first + 0.5 * second` jointly."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import pyterrier as pt

from pyterrier_msft.checks import check_number
from pyterrier_msft.digests import format_value, is_default, sha256_of
from pyterrier_msft.training.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from pyterrier_msft.fitters import Fitter

# The settings that must be the same in the parts of a sum.
SHARED_SETTINGS = tuple(f.name for f in fields(Hyperparameters) if f.name != "batch_size")


class Combinable:
    """The operators of fitters, and of sums and sequences of them.

    Each has `stages`, the stages in order, and `terms`, the weighted fitters of a single stage.
    """

    def __rshift__(self, other: Any) -> "FitterSequence":
        return FitterSequence((*_operand(self, ">>").stages, *_operand(other, ">>").stages))

    def __add__(self, other: Any) -> "Fitter | FitterSum":
        return weighted_sum([*_operand(self, "+").terms, *_operand(other, "+").terms])

    def __mul__(self, weight: Any) -> "Fitter | FitterSum":
        check_number("weight", weight, required=True)
        return weighted_sum((weight * own, fitter) for own, fitter in _operand(self, "*").terms)

    __rmul__ = __mul__


@dataclass(frozen=True)
class FitterSequence(Combinable):
    """Fitters in sequence, on the same data: `Contrastive() >> Distillation(teacher=...)`."""

    stages: "tuple[Fitter | FitterSum, ...]"

    @property
    def terms(self) -> "tuple[tuple[float, Fitter], ...]":
        """Raise a ValueError: only single stages can be added."""
        raise ValueError(f"fitters must be single stages in a sum; got the sequence {self!r}")

    def __repr__(self) -> str:
        return " >> ".join(f"({stage!r})" if len(stage.terms) > 1 else repr(stage) for stage in self.stages)

    def replace(self, **settings: Any) -> Self:
        """Copy the sequence with other settings in each of its fitters, see `Fitter.replace`."""
        return replace(self, stages=tuple(stage.replace(**settings) for stage in self.stages))

    def digest(self) -> str:
        """Digest everything that determines the result, see `Fitter.digest`."""
        return sha256_of([stage.digest() for stage in self.stages])


@dataclass(frozen=True)
class FitterSum(Combinable):
    """Fitters that train one stage jointly: `Contrastive() + 0.5 * Distillation(teacher=...)`.

    Each step takes a batch for each part, and minimizes the sum of their losses, each times its weight. A part has its
    own labels, loss and `batch_size`. All other settings that fitters share belong to the whole stage: set each of them
    in one part. The first part's queries determine the number of steps; each other part goes through its own queries as
    often as that takes.

    Raises:
        ValueError: If a weight isn't positive, or two parts set different values of a shared setting.
    """

    terms: "tuple[tuple[float, Fitter], ...]"  # as written

    def __post_init__(self) -> None:
        _ = self.parts  # checks the settings

    @property
    def stages(self) -> "tuple[FitterSum]":
        """This stage alone, as a tuple like that of a `FitterSequence`."""
        return (self,)

    @property
    def parts(self) -> "tuple[Fitter, ...]":
        """The fitters with the settings of the whole stage."""
        fitters = [fitter for _, fitter in self.terms]
        settings = {name: _shared_setting(name, fitters) for name in SHARED_SETTINGS}
        return tuple(replace(fitter, **settings) for fitter in fitters)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each part: that of its class, with a number if it isn't the first one with this name."""
        names = [fitter.objective for _, fitter in self.terms]
        counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
        return tuple(name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True))

    @property
    def objective(self) -> str:
        """The sum without the fitters' settings."""
        return format_sum((weight, fitter.objective) for weight, fitter in self.terms)

    def __repr__(self) -> str:
        return format_sum((weight, repr(fitter)) for weight, fitter in self.terms)

    def replace(self, **settings: Any) -> Self:
        """Copy the sum with other settings in each of its fitters, see `Fitter.replace`."""
        return replace(self, terms=tuple((weight, fitter.replace(**settings)) for weight, fitter in self.terms))

    def digest(self) -> str:
        """Digest everything that determines the result, see `Fitter.digest`."""
        digests = [part.digest() for part in self.parts]
        return sha256_of([[float(weight), digest] for (weight, _), digest in zip(self.terms, digests, strict=True)])

    def readable_settings(self) -> dict[str, str]:
        """Return the settings by name, and those that a part has for itself with the part's name."""
        found = {}
        for name, part in zip(self.names, self.parts, strict=True):
            for setting, value in part.readable_settings().items():
                found[setting if setting in {"objective", *SHARED_SETTINGS} else f"{name}'s {setting}"] = value
        return {**found, "objective": self.objective}


def weighted_sum(terms: "Iterable[tuple[float, Fitter]]") -> "Fitter | FitterSum":
    """Return a sum of fitters, or the fitter if there is a single one with the weight 1."""
    terms = tuple(terms)
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else FitterSum(terms)


def format_sum(terms: Iterable[tuple[float, str]]) -> str:
    """Format a sum as a user would write it."""
    return " + ".join(text if weight == 1 else f"{weight} * {text}" for weight, text in terms)


def check_fitter(fitter: Any) -> "Fitter | FitterSum | FitterSequence":
    """Return the fitter, or the sum or sequence of fitters; raise a ValueError if it is something else."""
    if isinstance(fitter, Combinable):
        return fitter  # type: ignore[return-value]
    if isinstance(fitter, type) and issubclass(fitter, Combinable):
        raise ValueError(f"fitter must be an object; got the class {fitter.__name__}. Write {fitter.__name__}()")
    raise ValueError(f"fitter must be e.g. Contrastive() or Distillation(teacher=...); got {fitter!r}")


def _operand(other: Any, operator: str) -> "Fitter | FitterSum | FitterSequence":
    if isinstance(other, pt.Transformer):
        raise ValueError(
            f"fitter {operator} must be followed by a fitter; got {other!r}. Pass fitters to MonoCE(..., fitter=...)"
        )
    return check_fitter(other)


def _shared_setting(name: str, fitters: "list[Fitter]") -> Any:
    """Return the value of a setting in the fitters that set it, or else the first fitter's default."""
    own = [(fitter, {f.name: f for f in fields(fitter)}[name]) for fitter in fitters]
    values = [getattr(fitter, name) for fitter, f in own if not is_default(getattr(fitter, name), f)]
    if other := [value for value in values if value != values[0]]:
        raise ValueError(
            f"{name} must be the same in the parts of a sum; got {format_value(values[0])} and "
            f"{format_value(other[0])}. Set it in one part"
        )
    return values[0] if values else getattr(fitters[0], name)
