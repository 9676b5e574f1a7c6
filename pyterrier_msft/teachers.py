"""A teacher in any of its forms to a ranking with an order: a frame of qid, docno and score or rank.

Files of rankings and of labelled passages are read here too.
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

from pyterrier_msft.data.frames import as_ids, order_key, ranked, require_columns
from pyterrier_msft.data.permutations import _suffix, read_labelled_passages, read_permutations
from pyterrier_msft.data.rankings import top_documents

__all__ = ["Cached", "cached", "check", "fuse", "ranking", "read_labelled_passages", "read_permutations"]

logger = logging.getLogger(__name__)


BATCH = 8  # queries a call of a teacher: fixed, since a cross-encoder's last digits depend on what is padded together


# ---- a teacher's ranking


def check(teacher: Any) -> None:
    """Raise a ValueError for what can't be a teacher, before anything is read or run."""
    if teacher is None or isinstance(teacher, pd.DataFrame | pt.Transformer):
        return
    if isinstance(teacher, str | Path):
        if not Path(teacher).is_file():
            raise ValueError(
                f"expected the path of a TREC run or of permutations as teacher, found no file {str(teacher)!r}"
            )
        return
    if isinstance(teacher, Mapping) and teacher:
        for part in teacher.values():
            check(part)
        return
    raise ValueError(
        "expected a teacher that is a frame, the path of a TREC run or of permutations (.jsonl), a transformer, a "
        f"mapping of names to these, or None, found {teacher!r}"
    )


def ranking(
    teacher: Any,
    results: pd.DataFrame,
    *,
    depth: int | None = None,
    text_field: str = "text",
    verbose: bool = False,
) -> pd.DataFrame | None:
    """The teacher's ranking of the results' queries; None where the results are the teacher's own.

    Args:
        teacher: See `Distillation`.
        results: qid, query, docno, text, and score or rank.
        depth: Documents a query, from the top of the results, that a transformer is run on. None: all.
        text_field: The results' column of text.
        verbose: Whether to show the progress of a transformer.

    Raises:
        ValueError: If a file has another form, or one of several teachers knows none of the queries.
    """
    if isinstance(teacher, pt.Transformer):
        return _run(teacher, top_documents(results, depth=depth, text_field=text_field), verbose=verbose)
    if isinstance(teacher, str | Path):
        return _read_ranking(Path(teacher))
    if isinstance(teacher, Mapping):
        rankings = {}
        for name, part in teacher.items():
            found = ranking(part, results, depth=depth, text_field=text_field, verbose=verbose)
            rankings[name] = results if found is None else found
            if not _in_common(rankings[name], results):
                raise ValueError(
                    f"expected the teacher {name!r} to share queries and documents with the results, found none in "
                    "common"
                )
        return fuse(rankings)
    frame: pd.DataFrame | None = teacher
    return frame


def fuse(rankings: Mapping[Any, pd.DataFrame], *, k: float = 60) -> pd.DataFrame:
    """Rankings fused by reciprocal rank (Cormack, Clarke and Büttcher, SIGIR 2009).

    A document's score is the sum of 1/(k + rank) over the rankings that have it, with ranks from 1 and equal ranks
    for equal scores.

    Args:
        rankings: Frames of qid, docno, and score or rank, by name.
        k: How little the first ranks count; 60 is theirs.

    Returns:
        qid, docno, score.

    Raises:
        ValueError: If a ranking has no order.
    """
    shares = []
    for name, frame in rankings.items():
        require_columns(frame, ["qid", "docno"], f"the ranking of teacher {name!r}")
        key = order_key(frame)
        if key is None:
            raise ValueError(
                f"expected a score or a rank in the ranking of teacher {name!r}, found columns "
                f"{list(map(str, frame.columns))}"
            )
        pairs = pd.MultiIndex.from_arrays([as_ids(frame["qid"]), as_ids(frame["docno"])], names=["qid", "docno"])
        best = pd.Series(key, index=pairs).groupby(level=[0, 1]).max()  # of a document ranked twice the better place
        shares.append(1 / (k + best.groupby(level=0).rank(ascending=False, method="min")))
    table = pd.concat(shares, axis=1).fillna(0.0)
    # Summed in order of size: the same ranks from other teachers must give the same score to the last bit.
    scores = np.sort(table.to_numpy(dtype=np.float64), axis=1).sum(axis=1)
    return table.index.to_frame(index=False).assign(score=scores)


def _in_common(frame: pd.DataFrame, results: pd.DataFrame) -> bool:
    require_columns(frame, ["qid", "docno"], "a teacher's ranking")
    known = pd.MultiIndex.from_arrays([as_ids(frame["qid"]), as_ids(frame["docno"])])
    return bool(pd.MultiIndex.from_arrays([as_ids(results["qid"]), as_ids(results["docno"])]).isin(known).any())


def _read_ranking(path: Path) -> pd.DataFrame:
    """A file's ranking: permutations if its name says so, else a TREC run."""
    if _suffix(path) in {".jsonl", ".json"}:
        return read_permutations(path)
    try:
        frame: pd.DataFrame = pt.io.read_results(str(path))
        if frame["score"].isna().any():
            raise ValueError(f"{int(frame['score'].isna().sum()):,} lines without a score")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"expected a TREC run (qid Q0 docno rank score name) as teacher, or permutations by the suffix .jsonl, "
            f"found {path}: {error}"
        ) from error
    return frame


def _run(teacher: pt.Transformer, candidates: pd.DataFrame, *, verbose: bool) -> pd.DataFrame:
    """What a transformer makes of candidates whose queries stand together."""
    starts = [*np.flatnonzero(~candidates["qid"].duplicated().to_numpy()), len(candidates)]
    parts = []
    with pt.tqdm(total=len(starts) - 1, desc="teacher", unit="query", disable=not verbose) as bar:
        if isinstance(teacher, Cached) and len(candidates):
            return teacher.rank(candidates, bar.update)
        for start in range(0, len(starts) - 1, BATCH):
            end = min(start + BATCH, len(starts) - 1)
            parts.append(teacher(candidates.iloc[starts[start] : starts[end]].reset_index(drop=True)))
            bar.update(end - start)
    return pd.concat([part for part in parts if len(part)] or parts[:1] or [candidates], ignore_index=True)


# ---- a teacher's work, kept


def cached(teacher: pt.Transformer, folder: str | Path, *, batch_size: int = 1, verbose: bool = False) -> "Cached":
    """A re-ranker whose rankings are kept on disk as soon as they are there: an interrupted run goes on.

    A ranking is found again for the same query with the same documents, in the same order and with the same texts
    and other columns (score and rank count by the order that they make). A `fingerprint` of the teacher's counts too,
    such as that of a `MonoCE`; nothing else of a teacher can be told, so give each model and prompt its own folder.

    Args:
        teacher: Any transformer or pipeline that re-ranks results, such as an LLM.
        folder: Where the rankings are kept, in `rankings.jsonl`, which `read_permutations` reads as well.
        batch_size: Queries a call of the teacher, and so what an interruption can lose.
        verbose: Whether to show progress.

    Example:
        >>> llm = teachers.cached(llm, "rankings-of-llm")
        >>> ce = ce.fit(results, fitter=Distillation(teacher=llm))
    """
    return Cached(teacher, folder, batch_size=batch_size, verbose=verbose)


class Cached(pt.Transformer):
    """A re-ranker with its rankings on disk, see `cached`.

    Gives the input's rows with score and rank set anew, without the documents that the teacher left out.
    """

    __hash__ = object.__hash__
    schematic = {"label": "cached teacher"}  # noqa: RUF012

    def __init__(
        self, teacher: pt.Transformer, folder: str | Path, *, batch_size: int = 1, verbose: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(teacher, pt.Transformer):
            raise ValueError(f"expected a transformer to keep the rankings of, found {teacher!r}")
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"expected batch_size as a whole number above 0, found {batch_size!r}")
        self.teacher = teacher
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.verbose = verbose
        self._known: dict[str, dict[str, float]] = {}
        self._read_to = 0  # bytes of the file that are in _known

    def __repr__(self) -> str:
        return f"teachers.cached({self.teacher!r}, {str(self.folder)!r})"

    @property
    def path(self) -> Path:
        """The file of rankings: a JSON line each, with the docnos best first as `permutation`."""
        return self.folder / "rankings.jsonl"

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Re-rank each query's documents, asking the teacher for what isn't known yet.

        Raises:
            ValueError: If the teacher gives documents that it wasn't given, or a score that is not a number.
        """
        pt.validate.result_frame(inp, extra_columns=["query"], context=self)
        if not len(inp):
            return pt.model.add_ranks(inp.assign(score=pd.Series(dtype="float64")))
        n_queries = inp["qid"].nunique()
        with pt.tqdm(total=n_queries, desc="teacher", unit="query", disable=not self.verbose) as bar:
            return self.rank(inp, bar.update)

    def rank(self, inp: pd.DataFrame, progress: Callable[[int], Any]) -> pd.DataFrame:
        """As `transform`, for checked results; `progress` is told how many queries were done."""
        frame = inp.reset_index(drop=True).assign(qid=as_ids(inp["qid"]), docno=as_ids(inp["docno"]))
        key = order_key(frame)
        if key is not None:
            frame = frame.iloc[np.argsort(-key, kind="stable")]
        by_query = {str(qid): rows for qid, rows in frame.groupby("qid", sort=False)}
        qids, docnos = as_ids(inp["qid"]), as_ids(inp["docno"])
        lists = {qid: by_query[qid] for qid in qids.unique()}  # asked in the order of the results
        fingerprint = str(getattr(self.teacher, "fingerprint", ""))
        keys = {qid: _key(rows, fingerprint) for qid, rows in lists.items()}
        self._refresh()
        missing = [qid for qid, key in keys.items() if key not in self._known]
        progress(len(lists) - len(missing))
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            self._ask({keys[qid]: lists[qid] for qid in chunk})
            progress(len(chunk))
        empty: dict[str, float] = {}
        scores = np.array(
            [self._known.get(keys[qid], empty).get(docno, np.nan) for qid, docno in zip(qids, docnos, strict=True)],
            dtype=np.float64,
        )
        known = ~np.isnan(scores)
        return ranked(inp[known], scores[known])

    def _ask(self, lists: dict[str, pd.DataFrame]) -> None:
        """Have the teacher rank some queries' documents, and keep what it says."""
        out = self.teacher(pd.concat(list(lists.values()), ignore_index=True))
        require_columns(out, ["qid", "docno"], "what the teacher gives")
        key = order_key(out)
        if key is None:
            raise ValueError(
                f"expected a score or a rank from the teacher, found columns {list(map(str, out.columns))}"
            )
        said = pd.DataFrame({"qid": as_ids(out["qid"]), "docno": as_ids(out["docno"]), "score": key})
        said = said.sort_values("score", ascending=False, kind="stable").drop_duplicates(["qid", "docno"])
        by_query = dict(tuple(said.groupby("qid", sort=False)))
        lines = []
        for name, rows in lists.items():
            qid = rows["qid"].iloc[0]
            if qid not in by_query:
                continue  # not kept: a failure of the moment may be why there is nothing
            docnos, scores = by_query[qid]["docno"].tolist(), by_query[qid]["score"].tolist()
            if strange := set(docnos) - set(rows["docno"]):
                raise ValueError(
                    f"expected the teacher to re-rank the documents that it is given, found {len(strange)} others for "
                    f"query {qid!r}, such as {sorted(strange)[0]!r}"
                )
            record = {"key": name, "qid": qid, "query": str(rows["query"].iloc[0]), "permutation": docnos}
            lines.append(json.dumps({**record, "scores": scores}) + "\n")
        if lines:
            self._append("".join(lines))

    def _append(self, lines: str) -> None:
        """Write whole lines at the end of the file, through to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refresh()
        torn = self.path.is_file() and self.path.stat().st_size > self._read_to
        with self.path.open("ab") as file:
            file.write((("\n" if torn else "") + lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._refresh()

    def _refresh(self) -> None:
        """Read what was written since the last time; a line that was torn off counts for nothing."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._read_to:  # removed or begun anew
            self._known, self._read_to = {}, 0
        if size == self._read_to:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.split(b"\n") if whole else []:
            try:
                record = json.loads(line)
                self._known[record["key"]] = dict(zip(record["permutation"], record["scores"], strict=True))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a damaged line is left out", self.path)
        self._read_to += len(whole) + bool(whole)


def _key(rows: pd.DataFrame, fingerprint: str) -> str:
    """A digest of a query with its documents in order: of all columns but score and rank."""
    columns = sorted((column for column in rows.columns if column not in {"score", "rank"}), key=str)
    content = [[str(column), rows[column].tolist()] for column in columns]
    return hashlib.sha256(json.dumps([fingerprint, content], default=_plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A cell that JSON doesn't know, as something that it does."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
