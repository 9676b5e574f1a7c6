"""Train every sequence of stages that a study compares; a beginning that sequences share is trained once."""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pyterrier_msft.algebra import FitterSequence, FitterSum, check_fitter
from pyterrier_msft.checks import check_seeds
from pyterrier_msft.data.frames import frame_digest
from pyterrier_msft.data.mixture import Source, TrainingResults, as_sources
from pyterrier_msft.digests import sha256_of
from pyterrier_msft.fitters import Fitter
from pyterrier_msft.fitting import ValidationFrames
from pyterrier_msft.model.fingerprint import training_state
from pyterrier_msft.model.record import has_unfinished_head
from pyterrier_msft.notices import deduplicate_data_warnings, message_prefix
from pyterrier_msft.reranker import MonoCE
from pyterrier_msft.training import distributed
from pyterrier_msft.training.checkpoints import SEMANTICS_VERSION, check_writable, delete_checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A fitter with the data to fit on.

    Args:
        fitter: The fitter, for example `Contrastive()`.
        results: First-stage results with columns qid, query, docno, text, and score or rank; or the path of a file of
            results, see `MonoCE.fit`. Or several sources: a list of (results, qrels) or (results, qrels, weight), for
            example the candidates of two first stages, or two data sets. Sources stay separate, even if they share
            qids: each has its own lists and labels. The weight (default: 1) is how often an epoch draws each of the
            source's queries. With 2, each is drawn twice, with different documents; with 0.5, in every second epoch,
            and the seed decides in which. An epoch draws at least one query of each source.
        qrels: Columns qid, docno and label. None if the fitter doesn't need them, or the results are several sources.
    """

    fitter: Fitter | FitterSum | FitterSequence
    results: TrainingResults
    qrels: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        check_fitter(self.fitter)
        as_sources(self.results, self.qrels)  # checks them

    def lookups(self) -> list[tuple[pd.DataFrame | str | Path, pd.DataFrame | None]]:
        """Return each source's results, and its qrels if documents of them may be added, which then need a text."""
        fitters = [fitter for stage in self.fitter.stages for fitter in stage.parts]
        adds = any(getattr(fitter, "add_missing_positives", False) for fitter in fitters)
        return [(source.results, source.qrels if adds else None) for source in as_sources(self.results, self.qrels)]

    def digest(self) -> str:
        """Return a digest of the fitter and the data."""
        first, *others = map(_source_digest, as_sources(self.results, self.qrels))
        return sha256_of([self.fitter.digest(), *first, *others])


def _source_digest(source: Source) -> list[Any]:
    if isinstance(source.results, pd.DataFrame):
        results = frame_digest(source.results)
    else:
        with Path(source.results).expanduser().open("rb") as file:
            results = hashlib.file_digest(file, "sha256").hexdigest()
    qrels = "" if source.qrels is None else frame_digest(source.qrels)
    return [results, qrels, float(source.weight)]


@overload
def fit_sequences(
    reranker: MonoCE, stages: Mapping[str, Stage], sequences: Sequence[str], *,
    validation: ValidationFrames | None = ..., save_dir: str | Path | None = ..., seeds: None = ...,
) -> dict[str, MonoCE]: ...  # fmt: skip
@overload
def fit_sequences(
    reranker: MonoCE, stages: Mapping[str, Stage], sequences: Sequence[str], *,
    validation: ValidationFrames | None = ..., save_dir: str | Path | None = ..., seeds: Sequence[int],
) -> dict[int, dict[str, MonoCE]]: ...  # fmt: skip
@deduplicate_data_warnings()
def fit_sequences(
    reranker: MonoCE,
    stages: Mapping[str, Stage],
    sequences: Sequence[str],
    *,
    validation: ValidationFrames | None = None,
    save_dir: str | Path | None = None,
    seeds: Sequence[int] | None = None,
) -> Any:
    """Train copies of a re-ranker, each with a sequence of stages.

    Args:
        reranker: The re-ranker that every sequence starts from; it isn't changed.
        stages: The stages by name.
        sequences: Names of stages joined by `-`, for example `["CL", "KD", "CL-KD", "KD-CL"]`. A beginning
            that sequences share is trained once. A stage's name may have a `-` too, e.g. `"lr=1e-05"`.
        validation: Results and qrels of other queries, to validate every stage on.
        save_dir: Folder to keep each stage's result in, under a digest of everything that determines it (fitter, data,
            initial weights, settings), so that a later call reuses it. An interrupted stage is resumed from its
            last checkpoint.
        seeds: Train every sequence once per seed. The seed replaces the fitters' seeds and determines the weights of
            a new head.

    Returns:
        A dictionary from each sequence to its re-ranker; with `seeds`, a dictionary from each seed to such a
        dictionary.

    Raises:
        ValueError: If a sequence names an unknown stage or can be read in two ways, or `save_dir` can't be written to.
    """
    paths = {name: _parse_sequence(name, stages) for name in sequences}
    if seeds is not None:
        by_seed = {}
        for seed in check_seeds(seeds):
            own = {name: _with_seed(stage, seed) for name, stage in stages.items()}
            with message_prefix(f"seed {seed}"):
                by_seed[seed] = fit_sequences(
                    reranker.reseeded(seed), own, sequences, validation=validation, save_dir=save_dir
                )
        return by_seed
    folders = None if save_dir is None else _Folders(Path(save_dir).expanduser(), reranker, stages, paths, validation)
    trained: dict[tuple[str, ...], MonoCE] = {(): reranker}
    for path in paths.values():
        for length in range(1, len(path) + 1):
            prefix = path[:length]
            if prefix not in trained:
                start = trained[prefix[:-1]]
                folder = None if folders is None else folders.of(prefix, start)
                with _wait_for_others(folder):
                    trained[prefix] = _fit_stage(start, stages[prefix[-1]], validation, folder, "-".join(prefix))
    # Distinct objects even if two names stand for one sequence: PyTerrier tells transformers apart by identity.
    result: dict[str, MonoCE] = {}
    for name, path in paths.items():
        is_taken = any(trained[path] is other for other in result.values())
        result[name] = trained[path].clone() if is_taken else trained[path]
    return result


class _Folders:
    """The folder of each stage's result, under a digest of what determines it."""

    def __init__(
        self,
        save_dir: Path,
        reranker: MonoCE,
        stages: Mapping[str, Stage],
        paths: Mapping[str, tuple[str, ...]],
        validation: ValidationFrames | None,
    ) -> None:
        self.save_dir = check_writable(save_dir, "save_dir")
        reranker.cross_encoder.require_saved_backbone()
        frames = [frame_digest(frame) for frame in validation or ()]
        settings = [reranker.scoring_settings(), reranker.interpolate]
        looked_up = "" if validation is None else reranker.text_source.digest(validation[0])
        state = training_state(reranker.cross_encoder.network)
        unfinished = has_unfinished_head(reranker.stages)
        self.context = [SEMANTICS_VERSION, torch.__version__, frames, looked_up, settings, state, unfinished]
        self.stages = {
            name: [stages[name].digest(), *(reranker.text_source.digest(*lookup) for lookup in stages[name].lookups())]
            for path in paths.values()
            for name in path
        }

    def of(self, prefix: tuple[str, ...], start: MonoCE) -> Path:
        """Return the folder of the last stage of a sequence that is trained from `start`."""
        is_new = start.cross_encoder.head_is_new
        key = sha256_of([start.fingerprint, is_new, self.stages[prefix[-1]], self.context])
        return self.save_dir / f"{'-'.join(prefix)}-{key[:16]}"


@contextlib.contextmanager
def _wait_for_others(folder: Path | None) -> Iterator[None]:
    """Wait until no other process trains the stage of this folder, so that its result can be reused."""
    if folder is None or distributed.world_size() > 1:  # the ranks train together
        yield
        return
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # stays: a process may be waiting for this very file
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("waiting for another process that trains %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fit_stage(
    start: MonoCE, stage: Stage, validation: ValidationFrames | None, folder: Path | None, name: str
) -> MonoCE:
    checkpoint_dir = None if folder is None else folder.with_name(f"{folder.name}.checkpoints")
    if folder is not None and (saved := _load_result(start, folder)) is not None:
        logger.info("%s: reusing %s", name, folder)
        if checkpoint_dir is not None:  # the call that saved the result may have been killed before it deleted these
            delete_checkpoints(checkpoint_dir)
        saved.fitter = stage.fitter
        return saved
    logger.info("%s: training with %r", name, stage.fitter)
    trained = start.clone(fitter=stage.fitter)
    with message_prefix(name):
        trained.fit(stage.results, stage.qrels, *(validation or (None, None)), checkpoint_dir=checkpoint_dir)
    if folder is not None and checkpoint_dir is not None:
        # Adapters aren't merged, so that the next stage can train them.
        distributed.run_on_rank_zero(lambda: trained.save(folder, merged=False))
        delete_checkpoints(checkpoint_dir)
    return trained


def _load_result(start: MonoCE, folder: Path) -> MonoCE | None:
    """Load the result that an earlier call saved, with the settings of `start`; None if there is no complete one."""
    if not folder.is_dir():
        return None
    try:
        saved = MonoCE.load(folder, trust_remote_code=start.trust_remote_code)
        is_complete = bool(saved.stages) and saved.fingerprint == saved.stages[-1].fingerprint
    except (ValueError, OSError, SafetensorError):
        is_complete = False
    if not is_complete:
        logger.warning("%s is incomplete or damaged; training again", folder)
        return None
    result = start.clone()
    result.take_weights(saved)
    return result


def _parse_sequence(name: str, stages: Mapping[str, Stage]) -> tuple[str, ...]:
    if name in stages:  # which may have a '-'
        return (name,)
    paths = [*_paths(name, stages)]
    if not paths:
        unknown = next(part for part in name.split("-") if part not in stages)
        raise ValueError(
            f"sequences must be names of stages joined by '-'; got {name!r} with the unknown stage {unknown!r}. "
            f"The stages are {', '.join(stages)}"
        )
    if len(paths) > 1:
        first, second = (" then ".join(map(repr, path)) for path in paths[:2])
        raise ValueError(
            f"sequences must have one reading; got {name!r}, which may be {first}, or {second}. Rename a stage"
        )
    return paths[0]


def _paths(name: str, stages: Mapping[str, Stage]) -> Iterator[tuple[str, ...]]:
    """Yield each way to read a name as names of stages joined by `-`."""
    for stage in stages:
        if name == stage:
            yield (stage,)
        elif name.startswith(f"{stage}-"):
            yield from ((stage, *rest) for rest in _paths(name.removeprefix(f"{stage}-"), stages))


def _with_seed(stage: Stage, seed: int) -> Stage:
    return dataclasses.replace(stage, fitter=stage.fitter.replace(seed=seed))
