"""False negatives: candidates that a judge scores like relevant documents, and that may be relevant themselves."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_msft.data.diagnosis import explain_mismatch
from pyterrier_msft.data.frames import even_step, require
from pyterrier_msft.data.rankings import Rankings, RowsByQuery, clean_ranking
from pyterrier_msft.data.report import EXAMPLES, FalseNegative, beginning


@dataclass
class Judge:
    """Finds false negatives by the scores of another ranker, see `Contrastive`.

    A candidate is a false negative if its score is at least that of the query's lowest relevant document, minus
    `margin`; or at least `max_score`. A relevant document that is split into passages has the score of the best one.
    """

    ranking: pd.DataFrame  # qid, docno, score
    margin: float | None
    max_score: float | None
    relabels: bool = False  # whether false negatives become relevant; else they are dropped
    _judged: int = field(default=0, init=False)  # candidates with a score
    _sample: pd.DataFrame | None = field(default=None, init=False)  # candidates, for an error message

    def __post_init__(self) -> None:
        ranking = clean_ranking(self.ranking, "judge's ranking")
        require(np.isfinite(ranking["key"].to_numpy()), ranking["key"], "judge scores must be finite numbers")
        self._scores = RowsByQuery(ranking)

    def find(
        self, rankings: Rankings, is_positive: np.ndarray, is_candidate: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Find the false negatives among candidates; positives and candidates are given as masks of rows.

        Also return fields of a DataReport. A candidate without a score isn't a false negative. In a query whose
        relevant documents have no score, only `max_score` applies.
        """
        scores = rankings.lookup(self._scores.of(rankings.qids), "key", rankings.document, default=np.nan)
        has_positive = rankings.queries_with(is_positive)
        is_candidate = is_candidate & has_positive[rankings.query]
        lowest = self._lowest_relevant(rankings, scores, is_positive)
        limit = np.full(len(lowest), np.inf) if self.margin is None else np.nan_to_num(lowest - self.margin, nan=np.inf)
        if self.max_score is not None:
            limit = np.minimum(limit, self.max_score)
        is_false = is_candidate & (scores >= limit[rankings.query])  # NaN isn't
        is_unjudged = is_candidate & np.isnan(scores)
        self._judged += int((is_candidate & ~is_unjudged).sum())
        if self._sample is None and is_candidate.any():
            self._sample = rankings.frame(is_candidate)
        lacks_limit = np.isnan(lowest) & rankings.queries_with(is_candidate) & (self.margin is not None)
        return is_false, {
            "relabelled" if self.relabels else "false_negatives": int(is_false.sum()),
            "unjudged_negatives": int(is_unjudged.sum()),
            "unjudged_positives": int(lacks_limit.sum()),
            "false_negative_examples": self._examples(rankings, scores, lowest, np.flatnonzero(is_false)),
        }

    def check_overlap(self) -> None:
        """Raise a ValueError if no candidate of any rankings so far had a score."""
        if self._sample is not None and not self._judged:
            why = explain_mismatch(self._sample, self.ranking, "the judge's ranking", by_document=False)
            raise ValueError(f"judge must score documents of the results; got none in common: {why}")

    def _lowest_relevant(self, rankings: Rankings, scores: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
        """Return the lowest score of each query's relevant documents; NaN if none has one."""
        rows = is_positive & ~np.isnan(scores)
        by_document = pd.Series(scores[rows]).groupby([rankings.query[rows], rankings.parent[rows]]).max()
        lowest: np.ndarray = by_document.groupby(level=0).min().reindex(range(len(rankings.qids))).to_numpy(np.float64)
        return lowest

    def _examples(
        self, rankings: Rankings, scores: np.ndarray, lowest: np.ndarray, rows: np.ndarray
    ) -> tuple[FalseNegative, ...]:
        if not len(rows):
            return ()
        chosen = rows[:: even_step(len(rows), EXAMPLES)]
        texts = [*rankings.texts]
        return tuple(
            FalseNegative(
                beginning(rankings.query_texts[query]),
                beginning(texts[rankings.text[row]]),
                float(scores[row]),
                None if np.isnan(lowest[query]) else float(lowest[query]),
            )
            for row, query in zip(chosen, rankings.query[chosen], strict=True)
        )
