"""Training data without labels: queries made from a corpus, and a teacher that needs no LLM and no training."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from transformers import AutoModel, AutoTokenizer

from pyterrier_msft.checks import check_number
from pyterrier_msft.data.frames import as_texts
from pyterrier_msft.lexical import JOINERS, combining_marks
from pyterrier_msft.model.loading import isolated_rng, quiet_transformers
from pyterrier_msft.model.precision import autocast, resolve_device, resolve_dtype
from pyterrier_msft.notices import shows_progress

MIN_WORDS, MAX_WORDS = 3, 32  # of a query
# A full stop of a script without capitals needs no space after it.
SENTENCE_END = re.compile(
    r"(?<=[.!?])\s+|(?<=[\u0964\u0965\u06d4\u061f\u1362\u104b\u17d4\u3002\uff01\uff0e\uff1f\uff61])\s*"
)
# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Japanese and Chinese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
CHARACTERS_PER_WORD = 2  # of these scripts, roughly


def make_queries(
    corpus: Iterable[Mapping[str, Any]], *, n: int, text_field: str = "text", title_field: str | None = "title",
    seed: int = 42,
) -> pd.DataFrame:  # fmt: skip
    """Make queries from documents: the title, or else the first sentence of 3 to 32 words.

    A teacher's rankings of what a first stage finds for such queries train a re-ranker without any labels.

    In scripts without spaces between words, such as Chinese and Thai, two characters count as a word.

    Args:
        corpus: Documents with docno, text and maybe title, e.g. `dataset.get_corpus_iter()`. Of several with the same
            docno, such as the passages of a document, one gives a query.
        n: Number of queries at most; the documents are sampled.
        text_field: The field with the text.
        title_field: The field with the title. None: titles aren't used.
        seed: Seed of the sample.

    Returns:
        Topics: qid, which ends in the document's docno, and query. Both are distinct. Queries have only letters, with
        their accents and vowel signs, digits, `_` and spaces, so that no retrieval engine reads operators in them.

    Raises:
        ValueError: If no document gives a query.
    """
    check_number("n", n, integer=True, required=True)
    queries: dict[str, str] = {}  # by docno
    seen: set[str] = set()
    for document in corpus:
        fields = [str(document.get(field) or "") for field in (title_field, text_field) if field is not None]
        *titles, body = fields
        candidates = (*titles, *SENTENCE_END.split(body.strip()))
        found = (" ".join(_word().findall(sentence)) for sentence in candidates)
        query = next((text for text in found if MIN_WORDS <= _count_words(text) <= MAX_WORDS), None)
        if query is not None and query not in seen and (docno := str(document["docno"])) not in queries:
            seen.add(query)
            queries[docno] = query
    if not queries:
        raise ValueError(f"corpus must have sentences of {MIN_WORDS} to {MAX_WORDS} words in {text_field!r}; got none")
    rows = [(f"made-{docno}", query) for docno, query in queries.items()]
    sample = np.random.default_rng(seed).permutation(len(rows))[:n]
    return pd.DataFrame([rows[i] for i in sample], columns=["qid", "query"])


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    return re.compile(rf"\w[\w{JOINERS}{combining_marks()}]*")


def _count_words(text: str) -> int:
    return len(UNSPACED.sub(" ", text).split()) + len(UNSPACED.findall(text)) // CHARACTERS_PER_WORD


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
        verbose: Whether to show a progress bar. None: if it runs in a terminal or a notebook.
    """

    def __init__(
        self, model: str | Path = "sentence-transformers/all-MiniLM-L6-v2", *, first_stage_weight: float = 0.7,
        text_field: str = "text", max_length: int = 128, device: str | None = None, verbose: bool | None = None,
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

    def scoring_settings(self) -> dict[str, Any]:
        """The settings that determine a score, for `teachers.cached`."""
        return {name: getattr(self, name) for name in ("model", "text_field", "max_length")}

    @torch.inference_mode()
    def _embed(self, texts: set[str]) -> dict[str, np.ndarray]:
        """Embed texts, in batches of similar length."""
        device = resolve_device(self.device)
        if self._network is None:
            with quiet_transformers(), isolated_rng(0):  # a pooler that the folder lacks is drawn
                self._tokenizer = AutoTokenizer.from_pretrained(self.model)
                self._network = AutoModel.from_pretrained(self.model).eval().to(device)
        ordered = sorted(texts, key=lambda text: (len(text), text))
        embeddings: dict[str, np.ndarray] = {}
        for start in pt.tqdm(
            range(0, len(ordered), 32), desc="BiEncoder", unit="batch", disable=not shows_progress(self.verbose)
        ):
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
