"""Training data without labels: queries made from a corpus, and a teacher that needs no LLM and no training."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from transformers import AutoModel, AutoTokenizer

from pyterrier_msft.data.frames import as_texts
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.precision import autocast, resolve_device, resolve_dtype
from pyterrier_msft.training.hyperparameters import check_number

MIN_WORDS, MAX_WORDS = 3, 32  # of a query
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORD = re.compile(r"\w+")


def make_queries(
    corpus: Iterable[Mapping[str, Any]], *, n: int, text_field: str = "text", title_field: str | None = "title",
    seed: int = 42,
) -> pd.DataFrame:  # fmt: skip
    """Make queries from documents: the title, or else the first sentence of 3 to 32 words.

    A teacher's rankings of what a first stage finds for such queries train a re-ranker without any labels.

    Args:
        corpus: Documents with docno, text and maybe title, e.g. `dataset.get_corpus_iter()`.
        n: Number of queries at most; the documents are sampled.
        text_field: The field with the text.
        title_field: The field with the title. None: titles aren't used.
        seed: Seed of the sample.

    Returns:
        Topics: qid, which ends in the document's docno, and query. Queries are distinct, and have only letters, digits
        and spaces, so that no retrieval engine reads operators in them.

    Raises:
        ValueError: If no document gives a query.
    """
    check_number("n", n, integer=True, required=True)
    rows, seen = [], set()
    for document in corpus:
        fields = [str(document.get(field) or "") for field in (title_field, text_field) if field is not None]
        candidates = (sentence for text in fields for sentence in SENTENCE_END.split(text.strip()))
        words = next((w for w in map(WORD.findall, candidates) if MIN_WORDS <= len(w) <= MAX_WORDS), None)
        if words is not None and (query := " ".join(words)) not in seen:
            seen.add(query)
            rows.append((str(document["docno"]), query))
    if not rows:
        raise ValueError(f"corpus must have sentences of {MIN_WORDS} to {MAX_WORDS} words in {text_field!r}; got none")
    sample = np.random.default_rng(seed).permutation(len(rows))[:n]
    return pd.DataFrame([(f"made-{rows[i][0]}", rows[i][1]) for i in sample], columns=["qid", "query"])


class BiEncoder(pt.Transformer):
    """A teacher that needs no LLM: the cosine of two embeddings, plus the first stage's score.

    Both are standardised within each query's documents before they are added, as in the combination of dense and
    sparse retrieval; the sum is better than either. It needs the columns qid, query, score and the text.

    Args:
        model: A sentence embedding model with mean pooling: a name on the Hugging Face hub, or a folder.
        first_stage_weight: The weight of the first stage's score.
        text_field: The column with the documents' text.
        max_length: Tokens per text.
        device: E.g. "cpu". None: a GPU if there is one.
        verbose: Whether to show a progress bar.
    """

    def __init__(
        self, model: str | Path = "sentence-transformers/all-MiniLM-L6-v2", *, first_stage_weight: float = 0.7,
        text_field: str = "text", max_length: int = 128, device: str | None = None, verbose: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_number("first_stage_weight", first_stage_weight, minimum_zero=True, required=True)
        check_number("max_length", max_length, integer=True, required=True)
        self.model, self.first_stage_weight, self.text_field = str(model), first_stage_weight, text_field
        self.max_length, self.device, self.verbose = max_length, device, verbose
        self._network: Any = None

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Re-score results."""
        pt.validate.result_frame(inp, extra_columns=["query", "score", self.text_field])
        if not len(inp):
            return pt.model.add_ranks(inp)
        queries, texts = as_texts(inp["query"]), as_texts(inp[self.text_field])
        embeddings = self._embed({*queries, *texts})
        pairs = zip(queries, texts, strict=True)
        cosine = pd.Series([float(embeddings[query] @ embeddings[text]) for query, text in pairs], index=inp.index)
        score = _standardise(cosine, inp["qid"]) + self.first_stage_weight * _standardise(inp["score"], inp["qid"])
        return pt.model.add_ranks(inp.assign(score=score))

    @torch.inference_mode()
    def _embed(self, texts: set[str]) -> dict[str, np.ndarray]:
        """Embed texts, in batches of similar length."""
        device = resolve_device(self.device)
        if self._network is None:
            with quiet_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(self.model)
                self._network = AutoModel.from_pretrained(self.model).eval().to(device)
        ordered = sorted(texts, key=lambda text: (len(text), text))
        embeddings: dict[str, np.ndarray] = {}
        for start in pt.tqdm(range(0, len(ordered), 32), desc="BiEncoder", unit="batch", disable=not self.verbose):
            batch = ordered[start : start + 32]
            tokens = self._tokenizer(
                batch, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(device)
            mask = tokens["attention_mask"].unsqueeze(-1)
            with autocast(device, resolve_dtype("auto", device)):
                states = self._network(**tokens).last_hidden_state.float()
            mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            embeddings.update(zip(batch, mean.cpu().numpy(), strict=True))
        return embeddings


def _standardise(values: pd.Series, qids: pd.Series) -> pd.Series:
    by_query = values.groupby(qids)
    return (values - by_query.transform("mean")) / (by_query.transform("std").fillna(1.0) + 1e-9)
