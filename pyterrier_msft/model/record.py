"""What a model's folder records about its training."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd

from pyterrier_msft import __version__
from pyterrier_msft.notices import warn

RECORD = "msft.json"
CARD_MARK = "[pyterrier_msft](https://github.com/terrierteam/pyterrier_msft)"  # in each card

# Columns of every history row; a validation metric adds a column under its own name, and a sum the loss of each part.
HISTORY_START = ("stage", "fitter", "step", "epoch", "loss", "learning_rate")
HISTORY_END = ("seconds", "pairs_per_second")
PART_LOSS = "loss_"  # the beginning of the columns with the losses of several objectives
KEPT = "kept"  # in the rows of validations: whether these weights are kept


class Record:
    """A dataclass that is stored as a dictionary."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a record of any version: missing fields get their defaults, unknown ones are ignored."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})  # type: ignore[arg-type]


@dataclass
class StageRecord(Record):
    """What one stage of training did, and on what data."""

    fitter: str = ""  # its repr
    objective: str = ""  # the fitter without its settings
    loss: str = ""
    digest: str = ""  # of the fitter's settings
    data: str = ""  # digest of the groups
    queries: int = 0
    documents: int = 0
    place: int = 1  # in its call of fit, from 1
    start: str = ""  # fingerprint of the weights before the stage
    head_was_new: bool = False
    plan: dict[str, Any] = field(default_factory=dict)  # batch size, updates, learning rate
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    data_report: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # of the weights after the stage
    interrupted: int | None = None  # the last step, if its call of fit was interrupted
    interpolation: dict[str, Any] = field(default_factory=dict)  # the choice of the first stage's weight

    def __post_init__(self) -> None:
        self.objective = self.objective or self.fitter.partition("(")[0]  # of a record without it

    @property
    def updates(self) -> int:
        """The last step of the history."""
        return self.history[-1]["step"] if self.history else 0

    @property
    def updates_text(self) -> str:
        """The number of updates, for tables."""
        return f"{self.updates:,}" + " (interrupted)" * (self.interrupted is not None)

    @property
    def is_unfinished(self) -> bool:
        """Whether training was interrupted before its last update."""
        return self.interrupted is not None and self.interrupted < self.plan.get("updates", math.inf)

    def validations(self, metric: str) -> list[float]:
        """Return the values of a validation metric, in order."""
        return [row[metric] for row in self.history if metric in row]

    @property
    def metrics(self) -> dict[str, float]:
        """The value of each validation metric with the weights that were kept."""
        columns = sorted(metric_columns(_added_columns(self.history)))
        kept = [row for row in self.history if row.get(KEPT, True)]  # all, of a record that doesn't say
        return {name: max(row[name] for row in kept if name in row) for name in columns}


@dataclass
class ModelRecord(Record):
    """What `msft.json` in a model's folder holds."""

    settings: dict[str, Any] = field(default_factory=dict)  # arguments of MonoCE that belong to the model
    base: str | None = None  # name of the backbone on the hub
    head_is_new: bool = False
    fingerprint: str | None = None
    stages: list[StageRecord] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None  # from scores to probabilities
    fingerprint_version: int = 1  # see `fingerprint.FINGERPRINT_VERSION`
    card: str = ""  # digest of the model card

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a record and those of its stages."""
        record = super().from_dict(values)
        record.stages = [StageRecord.from_dict(stage) for stage in values.get("stages") or ()]
        return record

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the record in a folder; an empty one if there is none."""
        path = Path(folder) / RECORD
        return cls.from_dict(json.loads(path.read_text())) if path.is_file() else cls()

    def has_written(self, card: str) -> bool:
        """Whether a card in the record's folder is the one that was saved with it."""
        return card_digest(card) == self.card if self.card else CARD_MARK in card

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        (folder / RECORD).write_text(json.dumps(dataclasses.asdict(self), indent=1))

    def check_fingerprint(self, found: str, name: str, adapter_folder: str | None) -> None:
        """Warn if the model of a folder or on the hub isn't the one that was saved.

        Raises:
            ValueError: If it is an adapter's backbone. With another version of transformers, which may read the same
                files in another way, there is only the warning.
        """
        if found == self.fingerprint:
            return
        then, now = self.versions.get("transformers"), importlib.metadata.version("transformers")
        reason = "" if then == now else f". Or transformers {now} reads it in another way than {then} did"
        digests = f"its fingerprint is {found}, and {self.fingerprint} in {RECORD}{reason}"
        if adapter_folder is None:
            warn(f"{name!r} has other weights or another tokenizer than when its history was saved: {digests}")
        elif reason:
            warn(f"{name!r} or the adapter in {adapter_folder!r} has changed since the adapter was saved: {digests}")
        else:
            raise ValueError(
                f"{name!r} must be the backbone as it was when the adapter in {adapter_folder!r} was saved; got "
                f"another: {digests}. Restore the backbone, or train the adapter again"
            )


def card_digest(card: str) -> str:
    """Return the digest of a model card."""
    return hashlib.sha256(card.encode()).hexdigest()[:16]


def has_unfinished_head(stages: Sequence[StageRecord]) -> bool:
    """Whether training of a new head was interrupted, so that it still needs the learning rate of a new one."""
    unfinished = itertools.takewhile(lambda stage: stage.is_unfinished, reversed(stages))
    return any(stage.head_was_new for stage in unfinished)


def history_frame(stages: Sequence[StageRecord]) -> pd.DataFrame:
    """Put the histories of all stages into one frame, with the stage's number and fitter in each row."""
    rows = [{"stage": number, "fitter": s.objective, **row} for number, s in enumerate(stages, 1) for row in s.history]
    added = sorted(_added_columns(rows), key=lambda name: not name.startswith(PART_LOSS))  # losses before metrics
    frame = pd.DataFrame(rows, columns=[*HISTORY_START, *added, *HISTORY_END])
    return frame.assign(**{KEPT: frame[KEPT].eq(True)}) if KEPT in frame else frame


def metric_columns(names: Iterable[str]) -> list[str]:
    """Return the columns of a history that have a validation metric."""
    others = {"system", KEPT, *HISTORY_START, *HISTORY_END}
    return [name for name in names if name not in others and not name.startswith(PART_LOSS)]


def _added_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the losses and metrics that not every row of a history has, by first occurrence."""
    return [*dict.fromkeys(name for row in rows for name in row if name not in {*HISTORY_START, *HISTORY_END})]


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that affect training."""
    names = ("torch", "transformers", "accelerate", "pyterrier")
    return {"pyterrier_msft": __version__, **{name: importlib.metadata.version(name) for name in names}}
