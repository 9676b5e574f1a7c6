"""An IR measure on re-ranked validation results."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import ir_measures
import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from transformers import PreTrainedModel

from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.scoring import score_pairs
from pyterrier_msft.training import distributed


@dataclass(frozen=True)
class Validation:
    """Results to re-rank, their qrels, and the measure to compute."""

    results: pd.DataFrame  # qid, query, docno, text, and maybe the first stage's score; ids as strings
    qrels: pd.DataFrame  # see `labels.whole_grades`
    metric: Any  # of ir_measures
    first_stage_weight: float = 0.0  # of the results' score, in `values`

    @property
    def queries(self) -> int:
        """The number of queries."""
        return int(self.results["qid"].nunique())

    def sample(self, queries: int) -> Self:
        """Return the validation data of a random sample of the queries, always the same one."""
        if queries >= self.queries:
            return self
        qids = np.random.default_rng(0).choice(sorted(self.results["qid"].unique()), queries, replace=False)
        results, qrels = (frame[frame["qid"].isin(qids)] for frame in (self.results, self.qrels))
        return replace(self, results=results.reset_index(drop=True), qrels=qrels)

    def score(self, network: PreTrainedModel, encoder: PairEncoder, dtype: torch.dtype) -> np.ndarray:
        """Return the model's score of each row of the results. Each rank scores its share of the pairs."""
        own = self.results.iloc[distributed.rank() :: distributed.world_size()]
        shares = distributed.gather_objects(
            score_pairs(network, encoder, own["query"].tolist(), own["text"].tolist(), dtype=dtype, keep_ids=True)
        )
        scores = np.empty(len(self.results))
        for rank, share in enumerate(shares):
            scores[rank :: len(shares)] = share
        if bad := int(np.sum(~np.isfinite(scores))):
            raise ValueError(
                f"scores of the validation data must be finite; {bad:,} of {len(scores):,} aren't. Try a lower "
                "learning_rate"
            )
        return scores

    def values(self, network: PreTrainedModel, encoder: PairEncoder, dtype: torch.dtype) -> tuple[float, list[float]]:
        """Score the results as the re-ranker does; return the metric's mean, and its value for each query."""
        scores = self.score(network, encoder, dtype)
        if self.first_stage_weight:
            scores = scores + self.first_stage_weight * self.results["score"].to_numpy()
        found = self._evaluator.calc(self._run(scores))
        by_query = {metric.query_id: metric.value for metric in found.per_query}
        return float(found.aggregated[self.metric]), [by_query[qid] for qid in sorted(by_query)]

    def measure(self, scores: np.ndarray) -> float:
        """Return the metric's mean over the queries, for a score of each row of the results."""
        return float(self._evaluator.calc_aggregate(self._run(scores))[self.metric])

    def _run(self, scores: np.ndarray) -> pd.DataFrame:
        run = self.results[["qid", "docno"]].rename(columns={"qid": "query_id", "docno": "doc_id"})
        scores = rankdata(scores, method="dense")  # because ir_measures rounds scores to float32
        # A document's score is that of its best passage.
        return run.assign(score=scores).groupby(["query_id", "doc_id"])["score"].max().reset_index()

    def check_metric(self) -> None:
        """Raise a ValueError if the metric is 0 for the best order of the results."""
        highest = self.qrels.drop_duplicates(["qid", "docno"], keep="last")
        labels = self.results[["qid", "docno"]].merge(highest, "left")["label"]
        if self.measure(labels.fillna(0).to_numpy(dtype=float)) == 0:
            raise ValueError(
                f"metric must be able to tell good orders of the validation results from bad ones; {self.metric} is 0 "
                f"for each of them. Their labels are at most {self.qrels['label'].max()}"
            )

    @property
    def first_stage(self) -> float:
        """The metric's mean for the order of the first stage."""
        return self.measure(self.results["score"].to_numpy())

    @cached_property
    def _evaluator(self) -> Any:
        qrels = self.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
        return ir_measures.evaluator([self.metric], qrels)
