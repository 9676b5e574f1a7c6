"""An IR measure on re-ranked validation results."""

from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.scoring import score_pairs
from pyterrier_msft.training import distributed


@dataclass(frozen=True)
class Validation:
    """Results to re-rank, their qrels, and the measure to compute."""

    results: pd.DataFrame  # qid, query, docno, text; ids as strings
    qrels: pd.DataFrame  # qid, docno, label; ids as strings
    metric: Any  # of ir_measures

    def evaluate(self, network: PreTrainedModel, encoder: PairEncoder, dtype: torch.dtype) -> float:
        """Return the metric's mean over the judged queries. Each rank scores its share of the pairs."""
        own = self.results.iloc[distributed.rank() :: distributed.world_size()]
        shares = distributed.gather_objects(
            score_pairs(network, encoder, own["query"].tolist(), own["text"].tolist(), dtype=dtype)
        )
        scores = np.empty(len(self.results))
        for rank, share in enumerate(shares):
            scores[rank :: len(shares)] = share
        run = self.results[["qid", "docno"]].rename(columns={"qid": "query_id", "docno": "doc_id"})
        # A document's score is that of its best passage.
        run = run.assign(score=scores).groupby(["query_id", "doc_id"])["score"].max().reset_index()
        qrels = self.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
        return float(ir_measures.calc_aggregate([self.metric], qrels, run)[self.metric])
