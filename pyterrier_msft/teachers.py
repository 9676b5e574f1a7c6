"""Teachers for `Distillation`: convert any kind of teacher to a ranking (qid, docno, and score or rank).

The readers of permutations and of labelled passages can be imported from here too.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_msft.checks import check_number
from pyterrier_msft.data.frames import order_key, require_columns, with_scores
from pyterrier_msft.data.hard_negatives import read_hard_negatives
from pyterrier_msft.data.permutations import read_labelled_passages, read_permutations, uncompressed_suffix
from pyterrier_msft.data.rankings import clean_ranking, top_documents, warn_of_contradictions
from pyterrier_msft.data.runs import read_trec_run
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.ids import as_ids
from pyterrier_msft.pipelines import all_parts_of

__all__ = [
    "Cached", "cached", "check_teacher", "fuse", "get_ranking", "read_hard_negatives", "read_labelled_passages",
    "read_permutations",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Queries per call of a teacher. Fixed, because it affects padding, and thus the last digits of a model's scores.
QUERIES_PER_CALL = 8


def check_teacher(teacher: Any, name: str = "teacher") -> None:
    """Raise a ValueError for what can't be a teacher, without reading or running it; `name` is the argument's."""
    if teacher is None or isinstance(teacher, pd.DataFrame | pt.Transformer):
        return
    if isinstance(teacher, str | Path):
        if not Path(teacher).expanduser().is_file():
            raise ValueError(f"{name} must be a TREC run or permutations; there is no file {str(teacher)!r}")
    elif isinstance(teacher, Mapping) and teacher:
        for part in teacher.values():
            check_teacher(part, name)
    else:
        raise ValueError(
            f"{name} must be a frame, the path of a TREC run or of permutations (.jsonl), a transformer, a mapping of "
            f"names to these, or None; got {teacher!r}"
        )


def get_ranking(
    teacher: Any, results: pd.DataFrame, *, depth: int | None = None, relevant: pd.DataFrame | None = None,
    text_field: str = "text", verbose: bool = False, name: str = "teacher",
) -> pd.DataFrame | None:  # fmt: skip
    """Return a teacher's ranking, see `Distillation`; None if the teacher is None, as the results are the ranking then.

    A transformer is applied to the top `depth` of the results, and to the documents of `relevant` (qid, docno) at any
    rank. Only transformers and mappings need the results. `name` is the argument's, for messages.
    """
    if isinstance(teacher, pt.Transformer):
        candidates = top_documents(results, depth=depth, text_field=text_field, relevant=relevant)
        ranked = _apply(teacher, candidates, verbose=verbose, name=name)
        _warn_of_old_scores(ranked, candidates)
        return ranked
    if isinstance(teacher, str | Path):
        return _read_ranking(Path(teacher).expanduser(), name)
    if isinstance(teacher, Mapping):
        rankings = {}
        for key, part in teacher.items():
            found = get_ranking(part, results, depth=depth, text_field=text_field, verbose=verbose)
            rankings[key] = results if found is None else found
            require_columns(rankings[key], ["qid", "docno"], f"teacher {key!r}")
            if not _pairs(results).isin(_pairs(rankings[key])).any():
                raise ValueError(f"teacher {key!r} must rank documents of the results; got none in common")
        return fuse(rankings)
    frame: pd.DataFrame | None = teacher
    if name == "teacher":
        warn_of_contradictions(results if frame is None else frame, "teacher's")
    return frame


def fuse(rankings: Mapping[Any, pd.DataFrame], *, k: float = 60) -> pd.DataFrame:
    """Fuse rankings by reciprocal rank (Cormack, Clarke and Büttcher, SIGIR 2009).

    A document's score is the sum of 1/(k + rank) over the rankings that contain it; ranks start at 1 and are equal for
    equal scores.

    Args:
        rankings: Frames of qid, docno, and score or rank, by name.
        k: Constant that reduces the weight of the first ranks; 60 in the paper.

    Returns:
        qid, docno, score.

    Raises:
        ValueError: If a ranking has neither score nor rank.
    """
    shares = []
    for name, frame in rankings.items():
        key = clean_ranking(frame, f"teacher {name!r}").set_index(["qid", "docno"])["key"].sort_index()
        shares.append(1 / (k + key.groupby(level=0).rank(ascending=False, method="min")))
    table = pd.concat(shares, axis=1).fillna(0.0)
    # Summed in sorted order, so that the same ranks from different teachers give exactly the same score.
    scores = np.sort(table.to_numpy(dtype=np.float64), axis=1).sum(axis=1)
    return table.index.to_frame(index=False).assign(score=scores)


def _pairs(frame: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([as_ids(frame["qid"]), as_ids(frame["docno"])])


def _read_ranking(path: Path, name: str) -> pd.DataFrame:
    """Read permutations (.jsonl or .json) or a TREC run."""
    if uncompressed_suffix(path) in {".jsonl", ".json"}:
        return read_permutations(path)
    try:
        frame = read_trec_run(path)
        if frame["score"].isna().any():
            raise ValueError(f"{int(frame['score'].isna().sum()):,} lines have no score")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{name} must be a TREC run (qid Q0 docno rank score name), or permutations with the suffix .jsonl; got "
            f"{path}: {error}"
        ) from error
    return frame


def _apply(teacher: pt.Transformer, candidates: pd.DataFrame, *, verbose: bool, name: str) -> pd.DataFrame:
    """Apply a transformer to candidates, grouped by query, a few queries at a time."""
    query, qids = pd.factorize(candidates["qid"])
    parts = []
    with pt.tqdm(total=len(qids), desc=name, unit="query", disable=not verbose) as bar:
        if isinstance(teacher, Cached) and len(candidates):
            return teacher.rank(candidates, bar.update)
        for _, batch in candidates.groupby(query // QUERIES_PER_CALL):
            parts.append(teacher(batch.reset_index(drop=True)))
            bar.update(batch["qid"].nunique())
    return pd.concat([part for part in parts if len(part)] or parts[:1] or [candidates], ignore_index=True)


def _warn_of_old_scores(ranked: pd.DataFrame, candidates: pd.DataFrame) -> None:
    """Warn if a transformer has changed the ranks and left the scores as they were."""
    columns = ["qid", "docno", "score"]
    if {*columns, "rank"} <= {*ranked} and {*columns} <= {*candidates}:
        both = ranked[columns].merge(candidates[columns], on=["qid", "docno"], suffixes=("", "_before"))
        if both["score"].equals(both["score_before"]):
            warn_of_contradictions(ranked, "teacher's")


# ---- caching


def cached(teacher: pt.Transformer, folder: str | Path, *, batch_size: int = 1, verbose: bool = False) -> "Cached":
    """Cache a re-ranker's rankings on disk, so that an interrupted run can be resumed.

    The key of a ranking is the query and its documents in order, with their texts and other columns; scores and ranks
    affect only that order. For each `MonoCE` in the teacher, also within a pipeline, the key includes its fingerprint
    and settings, and the scores if it adds them. Other properties of a teacher can't be detected, so use one folder per
    model and prompt.

    Args:
        teacher: A transformer or pipeline that re-ranks results, e.g. an LLM.
        folder: The folder to write the rankings to, as `rankings.jsonl`, which `read_permutations` reads if
            each qid has a single query.
        batch_size: Queries per call of the teacher; an interruption loses at most one call.
        verbose: Whether to show progress.

    Example:
        >>> llm = teachers.cached(llm, "rankings-of-llm")
        >>> ce = ce.fit(results, fitter=Distillation(teacher=llm))
    """
    return Cached(teacher, folder, batch_size=batch_size, verbose=verbose)


class Cached(pt.Transformer):
    """A re-ranker with its rankings on disk, see `cached`.

    Sets score and rank, and removes the documents that the teacher dropped.
    """

    __hash__ = object.__hash__
    schematic = {"label": "cached teacher"}  # noqa: RUF012

    def __init__(
        self, teacher: pt.Transformer, folder: str | Path, *, batch_size: int = 1, verbose: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(teacher, pt.Transformer):
            raise ValueError(f"teacher must be a transformer; got {teacher!r}")
        check_number("batch_size", batch_size, integer=True, required=True)
        self.teacher = teacher
        self.folder = Path(folder).expanduser()
        self.batch_size = batch_size
        self.verbose = verbose
        self._scores: dict[str, dict[str, float]] = {}  # by key: docno -> score
        self._position = 0  # bytes of the file that are in _scores

    def __repr__(self) -> str:
        return f"teachers.cached({self.teacher!r}, {str(self.folder)!r})"

    @property
    def path(self) -> Path:
        """The file of rankings: one JSON line per query, with docnos best first as `permutation`."""
        return self.folder / "rankings.jsonl"

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Re-rank each query's documents; call the teacher only for queries without a cached ranking.

        Raises:
            ValueError: If the teacher returns documents that weren't in its input, or an invalid score.
        """
        pt.validate.result_frame(inp, extra_columns=["query"], context=self)
        if not len(inp):
            return pt.model.add_ranks(inp.assign(score=pd.Series(dtype="float64")))
        with pt.tqdm(total=inp["qid"].nunique(), desc="teacher", unit="query", disable=not self.verbose) as bar:
            return self.rank(inp, bar.update)

    def rank(self, inp: pd.DataFrame, progress: Callable[[int], Any]) -> pd.DataFrame:
        """Re-rank valid results; `progress` is called with the number of queries done since the last call."""
        qids, docnos = as_ids(inp["qid"]), as_ids(inp["docno"])
        frame = inp.reset_index(drop=True)
        for part in all_parts_of(self.teacher):
            if getattr(part, "text", None) is not None and hasattr(part, "text_field"):
                frame = TextSource(part.text_field, part.text).add_to(frame)  # so that the key has the texts
        frame = frame.assign(qid=qids, docno=docnos)
        if (key := order_key(frame)) is not None:
            frame = frame.iloc[np.argsort(-key, kind="stable")]
        by_query = dict(tuple(frame.groupby("qid", sort=False)))
        identity, ignored = self._key_parts()
        columns = sorted((column for column in frame.columns if column not in ignored), key=str)
        _check_distinct(frame[columns])
        # in the order of the results
        keys = {qid: _cache_key(by_query[qid][columns], identity) for qid in qids.unique()}
        self._refresh()
        missing = [qid for qid, key in keys.items() if key not in self._scores]
        progress(len(keys) - len(missing))
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            self._rank_and_store({keys[qid]: by_query[qid] for qid in batch})
            progress(len(batch))
        pairs = zip(qids, docnos, strict=True)
        scores = np.array([self._scores.get(keys[qid], {}).get(docno, np.nan) for qid, docno in pairs], np.float64)
        ranked = ~np.isnan(scores)
        return with_scores(inp[ranked], scores[ranked])

    def _key_parts(self) -> tuple[list[Any], set[str]]:
        """Return the weights and settings of each `MonoCE` of the teacher, and the columns it ignores."""
        identity, ignored = [], {"score", "rank"}
        for part in all_parts_of(self.teacher):
            if hasattr(part, "fingerprint") or hasattr(part, "scoring_settings"):
                settings = part.scoring_settings() if hasattr(part, "scoring_settings") else {}
                weight = getattr(part, "first_stage_weight", 0)
                identity.append([str(getattr(part, "fingerprint", "")), settings, weight])
                ignored -= {"score"} if weight else set()
            if getattr(part, "reads_score", False):
                ignored -= {"score"}
        return identity, ignored

    def _rank_and_store(self, candidates: dict[str, pd.DataFrame]) -> None:
        """Apply the teacher to the documents of some queries, given by cache key, and store its rankings."""
        results = pd.concat(list(candidates.values()), ignore_index=True)
        out = self.teacher(results)
        _warn_of_old_scores(out, results)
        by_query = dict(tuple(clean_ranking(out, "teacher's output").groupby("qid", sort=False)))
        lines = []
        for name, rows in candidates.items():
            qid = rows["qid"].iloc[0]
            if qid not in by_query:
                continue  # not stored, because the cause may be temporary
            docnos, scores = by_query[qid]["docno"].tolist(), by_query[qid]["key"].tolist()
            if unknown := sorted(set(docnos) - set(rows["docno"])):
                raise ValueError(
                    f"teacher must only re-rank its input; got {len(unknown)} other documents for query {qid!r}, e.g. "
                    f"{unknown[0]!r}"
                )
            record = {"key": name, "qid": qid, "query": str(rows["query"].iloc[0]), "permutation": docnos}
            lines.append(json.dumps({**record, "scores": scores}) + "\n")
        if lines:
            self._append("".join(lines))

    def _append(self, lines: str) -> None:
        """Append whole lines to the file, and flush them to disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refresh()
        ends_in_partial_line = self.path.is_file() and self.path.stat().st_size > self._position
        with self.path.open("ab") as file:
            file.write((("\n" if ends_in_partial_line else "") + lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._refresh()

    def _refresh(self) -> None:
        """Read the lines that were added since the last call; a partial last line is ignored."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._position:  # the file was deleted or replaced
            self._scores, self._position = {}, 0
        if size == self._position:
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.split(b"\n") if whole else []:
            try:
                record = json.loads(line)
                self._scores[record["key"]] = dict(zip(record["permutation"], record["scores"], strict=True))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: ignored a damaged line", self.path)
        self._position += len(whole) + bool(whole)


def _check_distinct(rows: pd.DataFrame) -> None:
    """Raise a ValueError if rows of a query and document differ, as a ranking is kept by docno."""
    repeated = rows[rows.duplicated(["qid", "docno"], keep=False)]
    if len(repeated.astype(str).drop_duplicates()) > len(repeated[["qid", "docno"]].drop_duplicates()):
        first = repeated.iloc[0]
        raise ValueError(
            f"results must have one row for each qid and docno; got several that differ for {first['qid']!r} and "
            f"{first['docno']!r}, e.g. in their text. Make docnos that differ, as pt.text.sliding does"
        )


def _cache_key(rows: pd.DataFrame, identity: list[Any]) -> str:
    """Digest a query with its documents in order, and the teacher's identity."""
    content = [[str(column), rows[column].tolist()] for column in rows.columns]
    return hashlib.sha256(json.dumps([identity, content], default=_to_json, sort_keys=True).encode()).hexdigest()


def _to_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
