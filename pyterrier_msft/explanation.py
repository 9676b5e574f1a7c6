"""`explain`: which words of a document its score depends on."""

import hashlib

import pandas as pd
import pyterrier as pt

from pyterrier_msft.checks import check_number
from pyterrier_msft.data.frames import as_texts, require_columns
from pyterrier_msft.pipelines import all_parts_of, parts_of


def explain(
    reranker: pt.Transformer, results: pd.DataFrame, *, max_words: int | None = None, text_field: str | None = None
) -> pd.DataFrame:
    """Measure how much the score of a document falls when one of its words is left out.

    This is erasure (Li, Monroe and Jurafsky, 2016, arXiv 1612.08220). It needs only scores, so it works with any
    re-ranker that scores each row on its own, and costs one score for each word. Use float32, because bfloat16 rounds
    scores to two or three digits.

    Args:
        reranker: The re-ranker, without a first stage, e.g. `MonoCE(..., dtype="float32")`.
        results: The documents to explain: qid, query, docno and the text, and what else the re-ranker needs.
        max_words: How many words of each document are measured, from its beginning. Set it for long documents, as a
            word that the model doesn't read has no importance. None: all.
        text_field: The column with the documents' text. None: the re-ranker's own, or "text" if it names none.

    Returns:
        A row for each word, in the order of the documents and of their texts: qid, docno, position (from 0), word, and
        importance: the score of the whole text minus the score without this word. It is negative if the word lowers
        the score, and 0 if the model doesn't read that far.

    Raises:
        ValueError: If an argument is invalid, or the re-ranker doesn't return every row with a score.

    Example:
        >>> words = explain(ce, results.head(1))
    """
    check_number("max_words", max_words, integer=True)
    text_field = text_field or _text_field(reranker)
    require_columns(results, ["qid", "query", "docno", text_field], "results")
    texts = [text.split() for text in as_texts(results[text_field])]
    variants = pd.DataFrame(
        [
            (row, i, words[i], " ".join(words[:i] + words[i + 1 :]))
            for row, words in enumerate(texts)
            for i in range(len(words[:max_words]))
        ],
        columns=["row", "position", "word", text_field],
    )
    whole = pd.DataFrame({"row": range(len(texts)), text_field: [" ".join(words) for words in texts]})
    to_score = pd.concat([whole, variants], ignore_index=True)
    # Ids of their own, because a re-ranker may change the order of rows, and a cache may know documents by their ids.
    digests = (hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16] for text in to_score[text_field])
    docnos = pd.Index([f"explain-{row}-{digest}" for row, digest in enumerate(digests)])
    frame = results.iloc[to_score["row"].to_numpy(dtype=int)].reset_index(drop=True)
    try:
        scored = reranker(frame.assign(docno=docnos, **{text_field: to_score[text_field]}))
    except pt.validate.InputValidationError as error:
        if parts_of(reranker):
            error.add_note("explain needs only the re-ranker, without a first stage or a cutoff")
        raise
    require_columns(scored, ["docno", "score"], "reranker: its results")
    if sorted(scored["docno"]) != sorted(docnos):
        raise ValueError(
            f"reranker must return every row; got {len(scored):,} rows for {len(docnos):,}. Pass only the re-ranker, "
            "without a first stage or a cutoff"
        )
    scores = scored.set_index("docno")["score"].reindex(docnos).to_numpy(dtype=float)
    rows = variants["row"].to_numpy(dtype=int)
    documents = results[["qid", "docno"]].iloc[rows].reset_index(drop=True)
    return documents.assign(
        position=variants["position"], word=variants["word"], importance=scores[rows] - scores[len(whole) :]
    )


def _text_field(reranker: pt.Transformer) -> str:
    found = {part.text_field: None for part in all_parts_of(reranker) if hasattr(part, "text_field")}
    if len(found) > 1:
        raise ValueError(f"text_field must be one of {[*found]}, since the re-rankers read different columns; got None")
    return next(iter(found), "text")
