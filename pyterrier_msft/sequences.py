"""Stages in every order that a study asks for: a stage that two sequences share is trained once."""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pandas as pd
from safetensors import SafetensorError

from pyterrier_msft.data.frames import frame_digest
from pyterrier_msft.fitters import Fitter, check_fitter
from pyterrier_msft.model.storage import recover
from pyterrier_msft.reranker import MonoCE
from pyterrier_msft.training import distributed as processes
from pyterrier_msft.training.trainer import writable

logger = logging.getLogger(__name__)

# The rooms whose code decides what weights come out.
CODE = ("losses.py", "teachers.py", "fitters.py", "data/*.py", "model/*.py", "training/*.py")


@dataclass(frozen=True)
class Stage:
    """A fitter with the data that it learns from.

    Args:
        fitter: Such as `Contrastive()`.
        results: The first stage's results: qid, query, docno, text, and score or rank; or a file, see `MonoCE.fit`.
        qrels: qid, docno, label; None where the fitter doesn't need them.
    """

    fitter: Fitter
    results: pd.DataFrame | str | Path
    qrels: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        check_fitter(self.fitter)

    def digest(self) -> str:
        """A digest of the fitter and the data."""
        if isinstance(self.results, pd.DataFrame):
            results = frame_digest(self.results)
        else:
            with Path(self.results).open("rb") as file:
                results = hashlib.file_digest(file, "sha256").hexdigest()
        frames = [results, "" if self.qrels is None else frame_digest(self.qrels)]
        return hashlib.sha256(json.dumps([self.fitter.digest(), *frames]).encode()).hexdigest()


@overload
def fit_sequences(
    reranker: MonoCE, stages: Mapping[str, Stage], sequences: Sequence[str], *,
    validation: tuple[pd.DataFrame, pd.DataFrame] | None = ..., save_dir: str | Path | None = ..., seeds: None = ...,
) -> dict[str, MonoCE]: ...  # fmt: skip
@overload
def fit_sequences(
    reranker: MonoCE, stages: Mapping[str, Stage], sequences: Sequence[str], *,
    validation: tuple[pd.DataFrame, pd.DataFrame] | None = ..., save_dir: str | Path | None = ..., seeds: Sequence[int],
) -> dict[int, dict[str, MonoCE]]: ...  # fmt: skip
def fit_sequences(
    reranker: MonoCE,
    stages: Mapping[str, Stage],
    sequences: Sequence[str],
    *,
    validation: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    save_dir: str | Path | None = None,
    seeds: Sequence[int] | None = None,
) -> Any:
    """Train copies of a re-ranker, each by a sequence of stages.

    Args:
        reranker: Where every sequence starts; it stays as it is.
        stages: The stages by name.
        sequences: Names of stages joined by `-`, such as `["CL", "KD", "CL-KD", "KD-CL"]`. A stage (with the stages
            before it) that two sequences share is trained once.
        validation: Results and qrels of other queries, for every stage.
        save_dir: Each stage's result is kept there, under a digest of everything that decides it (fitter, data,
            weights at the start, settings, code), and found again by a later call; a stage that was interrupted goes on
            from its last checkpoint.
        seeds: Train every sequence once a seed, which takes the place of the fitters' seeds and decides a new head.

    Returns:
        For each sequence its re-ranker; with `seeds`, that for each seed.

    Raises:
        ValueError: If a sequence names a stage that is not there.
    """
    paths = {name: _parse(name, stages) for name in sequences}
    if seeds is not None:
        return {
            seed: fit_sequences(
                reranker.reseeded(seed),
                {
                    name: dataclasses.replace(stage, fitter=_seed_fitter(stage.fitter, seed))
                    for name, stage in stages.items()
                },
                sequences,
                validation=validation,
                save_dir=save_dir,
            )
            for seed in seeds
        }
    if save_dir is not None:
        writable(save_dir, "save_dir")
    # Only a key needs them: without one, a teacher may be a transformer, whose content can't be told.
    digests = {
        name: [stages[name].digest(), reranker.source_digest(stages[name].results)]
        for path in paths.values()
        for name in path
        if save_dir is not None
    }
    context = None if save_dir is None else _context(reranker, validation)
    trained: dict[tuple[str, ...], MonoCE] = {(): reranker}
    for path in paths.values():
        for end in range(1, len(path) + 1):
            prefix = path[:end]
            if prefix not in trained:
                before, stage = trained[prefix[:-1]], stages[prefix[-1]]
                folder = None
                if save_dir is not None:
                    content = json.dumps([before.fingerprint, digests[prefix[-1]], context])
                    key = hashlib.sha256(content.encode()).hexdigest()
                    folder = Path(save_dir) / f"{'-'.join(prefix)}-{key[:16]}"
                trained[prefix] = _fit(before, stage, validation, folder, "-".join(prefix))
    # Objects of their own, even for two names of one sequence: PyTerrier tells transformers apart by identity.
    used: set[int] = set()
    result = {}
    for name, path in paths.items():
        result[name] = trained[path].clone() if id(trained[path]) in used else trained[path]
        used.add(id(trained[path]))
    return result


def _fit(
    before: MonoCE,
    stage: Stage,
    validation: tuple[pd.DataFrame, pd.DataFrame] | None,
    folder: Path | None,
    name: str,
) -> MonoCE:
    if folder is not None and (found := _find(before, folder)) is not None:
        logger.info("%s: found in %s", name, folder)
        found.fitter = stage.fitter
        return found
    logger.info("%s: training by %r", name, stage.fitter)
    checkpoints = None if folder is None else folder.with_name(f"{folder.name}.checkpoints")
    after = before.clone()
    after.fitter = stage.fitter
    after.fit(stage.results, stage.qrels, *(validation or (None, None)), checkpoint_dir=checkpoints)
    if folder is not None:
        # The next stage goes on with an adapter.
        processes.from_first(lambda: after.save(folder, merged=False))
        shutil.rmtree(checkpoints, ignore_errors=True)  # type: ignore[arg-type]
    return after


def _find(before: MonoCE, folder: Path) -> MonoCE | None:
    """What an earlier call saved, with the present settings; None if there is nothing whole."""
    recover(folder)
    if not folder.is_dir():
        return None
    try:
        saved = MonoCE.load(folder, trust_remote_code=before.trust_remote_code)
        whole = bool(saved._stages) and saved.fingerprint == saved._stages[-1].get("fingerprint")
    except (ValueError, OSError, SafetensorError):
        whole = False
    if not whole:
        logger.warning("%s is damaged: training again", folder)
        return None
    found = before.clone()
    found.take_weights(saved)
    return found


def _context(reranker: MonoCE, validation: tuple[pd.DataFrame, pd.DataFrame] | None) -> list[Any]:
    """What decides the weights besides start, fitter and data."""
    source = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            source.update(path.read_bytes())
    frames = [] if validation is None else [frame_digest(frame) for frame in validation]
    return [source.hexdigest(), frames, reranker.scoring_settings()]


def _parse(name: str, stages: Mapping[str, Stage]) -> tuple[str, ...]:
    path = tuple(name.split("-"))
    unknown = [part for part in path if part not in stages]
    if unknown:
        raise ValueError(
            f"expected a sequence of stages joined by '-' (stages: {', '.join(stages)}), found {name!r} with "
            f"{unknown[0]!r}"
        )
    return path


def _seed_fitter(fitter: Fitter, seed: int) -> Fitter:
    if isinstance(fitter, Fitter):
        return dataclasses.replace(fitter, seed=seed)
    return dataclasses.replace(fitter, stages=tuple(dataclasses.replace(stage, seed=seed) for stage in fitter.stages))
