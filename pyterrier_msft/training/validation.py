"""An IR measure on re-ranked results."""

from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.scoring import score_pairs
from pyterrier_msft.training import distributed as processes


@dataclass(frozen=True)
class Validation:
    """Results to re-rank, judged: how good a model is on queries that it doesn't learn from."""

    results: pd.DataFrame  # qid, query, docno, text, ids as strings
    qrels: pd.DataFrame  # qid, docno, label, ids as strings
    metric: Any

    def measure(self, model: PreTrainedModel, encoder: PairEncoder, dtype: torch.dtype) -> float:
        """The metric's mean over the judged queries. Several processes score a part each."""
        own = self.results.iloc[processes.rank() :: processes.count()]
        parts = processes.each(
            lambda: score_pairs(model, encoder, own["query"].tolist(), own["text"].tolist(), dtype=dtype)
        )
        scores = np.empty(len(self.results), dtype=np.float32)
        for number, part in enumerate(parts):
            scores[number :: len(parts)] = part
        run = self.results[["qid", "docno"]].assign(score=scores.astype(np.float64))
        run.columns = pd.Index(["query_id", "doc_id", "score"])
        run = run.groupby(["query_id", "doc_id"])["score"].max().reset_index()  # of a document's passages
        qrels = self.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
        return float(ir_measures.calc_aggregate([self.metric], qrels, run)[self.metric])
