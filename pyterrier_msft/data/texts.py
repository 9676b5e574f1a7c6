"""The texts of documents, in a column of the results or looked up elsewhere."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_msft.data.frames import as_texts, even_step, frame_digest, is_blank, parents, require_columns
from pyterrier_msft.data.groups import DIGEST_SAMPLE
from pyterrier_msft.data.runs import has_queries, sample_docnos
from pyterrier_msft.ids import as_ids, require_ids
from pyterrier_msft.notices import warn, warn_of_data

MIN_LOOKUPS_FOR_CHECK = 32  # if none of so many documents has a text, the source must be wrong
TITLE = "title"
TITLE_SAMPLE = 200  # rows that are searched for titles
TOPIC_SAMPLE = 1000  # rows to tell the texts of topics by
FORM_SAMPLE = 50  # rows whose texts are compared with the source's
HOW_TO_ADD_TEXTS = ". Put dataset.text_loader() before MonoCE, or pass MonoCE(..., text=dataset)"
NEEDED_TEXTS = "text source must have all documents of the results, and of the qrels with add_missing_positives=True"


def check_text_source(source: Any) -> None:
    """Raise a ValueError unless a source can load texts; None is no source."""
    if source is not None and not isinstance(source, pt.Transformer) and not _has_loader(source):
        raise ValueError(
            f"text must have a method text_loader(), as PyTerrier's datasets and indexes do, or be a transformer that "
            f"adds texts; got {type(source).__name__}. For texts in a dictionary by docno, pass "
            "pt.apply.text(lambda row: texts[row['docno']])"
        )


def _has_loader(source: Any) -> bool:
    return callable(getattr(source, "text_loader", None))


@dataclass(frozen=True)
class TextSource:
    """Looks up the texts of documents where results don't have them."""

    field: str  # the column of texts
    # With `.text_loader()`, e.g. a dataset or an index, or a transformer; None if all results have the column.
    source: Any = None

    def check_and_add_to(
        self, results: pd.DataFrame, *, context: pt.Transformer, extra_columns: Sequence[str] = ()
    ) -> pd.DataFrame:
        """Check results that a transformer is to score, add their texts, and warn about empty ones."""
        columns = ["query", *([] if self.source is not None else [self.field]), *extra_columns]
        if not isinstance(results, pd.DataFrame):
            raise ValueError(f"results must be a data frame; got {type(results).__name__}")
        try:
            pt.validate.result_frame(results, extra_columns=columns, context=context)
        except pt.validate.InputValidationError as error:
            try:
                require_columns(results, ["qid", "docno", *columns], "results")
            except ValueError as explanation:
                lacks_texts = self.field not in results.columns and "docno" in results.columns
                error.add_note(f"{explanation}{HOW_TO_ADD_TEXTS if lacks_texts and self.source is None else ''}")
            raise
        require_columns(results, ["qid", "docno", *columns], "results")
        if not len(results):
            has_texts = self.field in results.columns
            return results if has_texts else results.assign(**{self.field: pd.Series(dtype="object")})
        require_ids(results, ["qid", "docno"])
        results = self.add_to(results)
        for name in ("query", self.field):
            if blank := int(is_blank(results[name]).sum()):
                warn(f"{blank:,} of {len(results):,} rows to score have no {name!r}; it is read as empty")
        return results

    def add_to(self, results: pd.DataFrame) -> pd.DataFrame:
        """Add texts to results that lack them, if there is a source; warn about titles that aren't part of them."""
        if not self._lacks_texts(results):
            self._warn_of_unread_titles(results)
            return results
        results = results.drop(columns=self.field, errors="ignore")
        self._warn_of_source_with_titles(results)
        return self.load(results)

    def _lacks_texts(self, results: pd.DataFrame) -> bool:
        """Whether texts are to be looked up. A text that all documents of each query share is that of the topics."""
        if self.source is None or self.field not in results.columns:
            return self.source is not None
        sample = results[["qid", "docno", self.field]].head(TOPIC_SAMPLE).astype(str).groupby("qid", observed=True)
        distinct = sample.nunique()
        several = distinct[distinct["docno"] > 1]
        return bool(len(several) and (several[self.field] == 1).all())

    def _warn_of_unread_titles(self, results: pd.DataFrame) -> None:
        """Warn if results have the documents' titles, and the texts don't: those of BEIR, for example."""
        if self._has_unread_titles(_sampled(results, TITLE_SAMPLE)):
            warn_of_data(
                f"results have a column {TITLE!r} that isn't read, only {self.field!r} is. If these are the documents' "
                f"titles, join both: {self._join}"
            )

    def _warn_of_source_with_titles(self, results: pd.DataFrame) -> None:
        """Warn if the source has the documents' titles, and its texts don't."""
        if not _has_loader(self.source):
            return
        with contextlib.suppress(ValueError, KeyError):  # the source has no titles
            loader = self.source.text_loader(fields=[TITLE, self.field])
            if self._has_unread_titles(loader(_sampled(results, TITLE_SAMPLE))):
                warn_of_data(
                    f"the text source has a field {TITLE!r} that isn't read, only {self.field!r} is. To read both, "
                    f"pass text=dataset.text_loader(fields=['{TITLE}', '{self.field}']) >> {self._join}"
                )

    @property
    def _join(self) -> str:
        return f"pt.apply.{self.field}(lambda row: row['{TITLE}'] + ' ' + row['{self.field}'])"

    def _has_unread_titles(self, sample: pd.DataFrame) -> bool:
        if self.field == TITLE or [*sample.columns].count(TITLE) != 1:
            return False
        sample = sample[[TITLE, self.field, "query"]]
        rows = sample.astype(object).fillna("").astype(str).apply(lambda column: column.str.strip())
        # A title that is the query is that of a topic; an empty one is in every text.
        unread = sum(title not in text and title != query for title, text, query in rows.itertuples(index=False))
        return unread > len(sample) / 2

    def load(self, results: pd.DataFrame) -> pd.DataFrame:
        """Look up the texts of results."""
        loader = self.source.text_loader(fields=[self.field]) if _has_loader(self.source) else self.source
        try:
            loaded: pd.DataFrame = loader(results)
        except KeyError as error:  # from PyTerrier's loader for irds: datasets
            raise ValueError(f"{NEEDED_TEXTS}; not found: {error}") from error
        require_columns(loaded, [self.field], "text loader's results")
        if len(loaded) != len(results):
            rows = f"all {len(results):,} rows of the results; got {len(loaded):,}"
            raise ValueError(f"text loader must keep {rows}. The {NEEDED_TEXTS}")
        keys = [name for name in ("qid", "docno") if name in loaded.columns and name in results.columns]
        if "docno" in keys:
            found, wanted = (pd.MultiIndex.from_arrays([as_ids(f[name]) for name in keys]) for f in (loaded, results))
            if not found.equals(wanted):  # in another order
                text = pd.Series(loaded[self.field].to_numpy(), index=found)
                text = text[~text.index.duplicated()].reindex(wanted)
                return results.assign(**{self.field: text.to_numpy()})
        return loaded.set_axis(results.index)

    def topics(self, path: str | Path) -> pd.DataFrame | None:
        """Return the source's topics for a file of results; None if the file has queries, or the source no topics."""
        if self.source is None or has_queries(path):
            return None
        with contextlib.suppress(AttributeError, NotImplementedError):  # e.g. an index
            return self.source.get_topics()
        return None

    def digest(self, results: pd.DataFrame | str | Path, added: pd.DataFrame | None = None) -> str:
        """Digest a sample of what the source adds to results: texts and, for a file, queries; empty if nothing.

        `added` are qrels whose documents may be added to the results; those that the source lacks are skipped.
        """
        if self.source is None:
            return ""
        frames = []
        if not isinstance(results, pd.DataFrame):
            topics = self.topics(results)
            frames += [self._texts(sample_docnos(results, DIGEST_SAMPLE))]
            frames += [] if topics is None else [topics[["qid", "query"]]]
        elif self._lacks_texts(results):
            frames += [self._texts(_sample(results))]
        for docno in [] if added is None else _sample(added):
            with contextlib.suppress(ValueError):  # training may not need it
                frames += [self._texts([docno])]
        return hashlib.sha256(json.dumps([*map(frame_digest, frames)]).encode()).hexdigest()[:16] if frames else ""

    def _texts(self, docnos: list[str]) -> pd.DataFrame:
        return self.load(pd.DataFrame({"docno": list(dict.fromkeys(docnos))}))[["docno", self.field]]


def warn_of_other_form(results: pd.DataFrame, load: Callable[[pd.DataFrame], pd.DataFrame], field: str) -> None:
    """Warn if a source has other texts than the results, to which documents from the source are to be added."""
    sample = _sampled(results, FORM_SAMPLE).reset_index(drop=True)
    docno = parents(as_ids(sample["docno"]))
    with contextlib.suppress(ValueError):  # a source of other documents only
        loaded = load(sample[["qid", "query"]].assign(docno=docno))
        here, there = (as_texts(frame[field]).str.split().str.join(" ").to_numpy() for frame in (sample, loaded))
        differs = np.flatnonzero(here != there)
        if len(differs) > len(sample) / 2:
            warn_of_data(
                "add_missing_positives adds documents in another form than those of the results: of a sample of "
                f"{len(sample)} documents, {len(differs)} have other texts in MonoCE(text=...), e.g. "
                f"{docno[differs[0]]!r}. As text, pass the transformer that adds the texts to the results"
            )


def _sampled(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    """Return about `n` rows, spread evenly over a frame."""
    return frame.iloc[:: even_step(len(frame), n)]


def _sample(frame: pd.DataFrame) -> list[str]:
    """Return the docnos of at most `DIGEST_SAMPLE` rows, spread evenly over a frame."""
    return as_ids(_sampled(frame, DIGEST_SAMPLE)["docno"]).tolist()


class TextLookup:
    """Looks up texts by docno; missing texts are read as empty, with one warning."""

    def __init__(self, load: Callable[[pd.DataFrame], pd.DataFrame], field: str) -> None:
        self.load, self.field = load, field  # `load` adds the column of texts to a frame of docnos
        self.n_found = self.n_missing = 0

    def __call__(self, docnos: list[str]) -> list[str]:
        """Return the texts of documents; raise a ValueError if none of many documents so far has had a text."""
        loaded = self.load(pd.DataFrame({"docno": list(dict.fromkeys(docnos))}))
        by_docno = dict(zip(loaded["docno"], as_texts(loaded[self.field]), strict=True))
        texts = [by_docno.get(docno, "") for docno in docnos]
        missing = [docno for docno, text in zip(docnos, texts, strict=True) if not text.strip()]
        if missing and not self.n_missing:
            warn_of_data(f"some documents have no text, e.g. {missing[0]!r}; they are read as empty")
        self.n_found += len(docnos) - len(missing)
        self.n_missing += len(missing)
        if not self.n_found and self.n_missing >= MIN_LOOKUPS_FOR_CHECK:
            raise ValueError(
                f"text source: {self.n_missing} of {self.n_missing} documents have no text, e.g. {missing[0]!r}. Check "
                "that MonoCE(..., text=dataset) is the dataset of the results"
            )
        return texts
