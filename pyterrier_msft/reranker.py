"""`MonoCE`: the cross-encoder as PyTerrier sees it."""

import contextlib
import copy
import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyterrier_msft import __version__
from pyterrier_msft.data.frames import (
    PASSAGE,
    as_ids,
    as_texts,
    frame_digest,
    ranked,
    require_columns,
    require_ids,
    without_text,
)
from pyterrier_msft.data.groups import SAMPLED, Groups
from pyterrier_msft.data.labels import grades_of, mismatch
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.runs import first_docnos
from pyterrier_msft.fitters import Contrastive, Fitter, FitterSequence, check_fitter
from pyterrier_msft.model import adapters, hub
from pyterrier_msft.model.encoding import PairEncoder, clean
from pyterrier_msft.model.loading import load_model, quiet_transformers, token_limit
from pyterrier_msft.model.precision import named_device, quantised, resolve_device, resolve_dtype
from pyterrier_msft.model.scoring import score_pairs
from pyterrier_msft.model.storage import (
    ARTIFACT,
    LEFTOVER_SECONDS,
    RECORD,
    _absolute,
    _beside,
    _check_folder,
    _fingerprint,
    _one_score,
    _record_in,
    _tokenizer_of,
    recover,
)
from pyterrier_msft.notices import warn
from pyterrier_msft.training import distributed as processes
from pyterrier_msft.training.hyperparameters import check_number
from pyterrier_msft.training.trainer import check_device, durable, interrupted_training, train
from pyterrier_msft.training.validation import Validation

SAVED = ("text_field", "max_length", "max_query_length", "passages", "seed")  # settings


RESULT_COLUMNS = {"qid", "query", "docno", "score", "rank"}


PROBED = 4  # queries, and documents of each, whose scores tell whether training changed any


HARDLY = 0.01  # of the scores' spread: what training changes at the least, if it does anything


TRUNCATION_SAMPLE = 1000  # pairs tokenised to tell what share is cut


class MonoCE(pt.Estimator):
    """A Transformer that re-scores each query's documents with a point-wise cross-encoder.

    Needs the columns qid, query, docno and text; sets score and rank; leaves all others alone. `fit` trains the
    model in place and returns the re-ranker; two fits in a row are two stages.

    The model reads `[CLS] query [SEP] document [SEP]` and gives one number (monoBERT: Nogueira and Cho, 2019).

    Args:
        model: A name on the Hugging Face hub, a folder, or a loaded `PreTrainedModel`: a backbone, which gets a new
            head, or any published cross-encoder with a single score.
        fitter: What `fit` does. None: `Contrastive()`.
        adapter: A `peft.LoraConfig`, or another adapter of peft's (extra `[lora]`): then `fit` trains it and the head
            alone, see `save` for what becomes of it.
        text_field: The column of the documents' text.
        text: Where a document's text comes from if the results don't have it: a dataset or an index with
            `.text_loader()`.
        max_length: Tokens of a pair; a longer document is cut.
        max_query_length: Tokens of a query; a longer query is cut. None: half of `max_length`.
        passages: Windows of `max_length` tokens that a longer document is read in, from its beginning. The best
            one's score is the document's, in scoring and in training (MaxP: Dai and Callan, SIGIR 2019).
        batch_size: Pairs a pass when scoring. None: by a budget of tokens that suits the device.
        dtype: "auto" (bfloat16 where the hardware has it, else float32), "float32", "bfloat16", "float16", or "int8":
            then training is in float32, and scoring by a copy that is quantised, on CPUs.
        device: Such as "cpu" or "cuda:1". None: a GPU if there is one.
        seed: Decides the weights of a new head.
        revision: The branch, tag or commit of a model on the hub.
        trust_remote_code: Whether code that comes with a model may run.
        verbose: Whether to show progress bars.

    Example:
        >>> pipeline = bm25 % 100 >> dataset.text_loader() >> MonoCE("FacebookAI/roberta-base")
        >>> pipeline.fit(train_topics, train_qrels)
    """

    # Kept from PyTerrier's own, which look at the repr: two re-rankers are the same only if they are one object,
    # or an experiment would compute a prefix of two systems once and give both the same scores.
    __hash__ = object.__hash__

    schematic = {"label": "MonoCE", "help_url": "https://github.com/terrierteam/pyterrier_msft"}  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | PreTrainedModel = "google/electra-base-discriminator",
        *,
        fitter: Fitter | FitterSequence | None = None,
        adapter: Any = None,
        text_field: str = "text",
        text: Any = None,
        max_length: int = 256,
        max_query_length: int | None = None,
        passages: int = 1,
        batch_size: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        seed: int = 42,
        revision: str | None = None,
        trust_remote_code: bool = False,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(model, Path):
            model = str(model)
        if isinstance(model, str) and model.startswith("~"):
            model = str(Path(model).expanduser())
        if isinstance(model, str):
            _check_folder(model)
        elif not isinstance(model, PreTrainedModel):
            raise ValueError(f"expected a model's name, its folder, or a PreTrainedModel, found {type(model).__name__}")
        check_number("max_length", max_length, whole=True)
        check_number("max_query_length", max_query_length, whole=True)
        check_number("passages", 0 if passages is None else passages, whole=True)
        check_number("batch_size", batch_size, whole=True)
        check_number("seed", seed, whole=True, zero=True)
        if not isinstance(text_field, str) or text_field in RESULT_COLUMNS:
            raise ValueError(f"expected text_field as the name of a column of text, found {text_field!r}")
        if text is not None and not callable(getattr(text, "text_loader", None)):
            raise ValueError(
                f"expected text as something with .text_loader(), such as a PyTerrier dataset, found "
                f"{type(text).__name__}; texts in a frame go into the pipeline by pt.apply.text(...)"
            )
        if adapter is not None:
            adapters.check(adapter)
        resolve_dtype(dtype, resolve_device(None) if device is None else named_device(device))
        self.fitter = None if fitter is None else check_fitter(fitter)
        self.adapter = adapter
        self.text_field = text_field
        self.text = text
        self.max_length = max_length
        self.max_query_length = max_query_length
        self.passages = passages
        self.batch_size = batch_size
        self.seed = seed
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.verbose = verbose
        self._model = model if isinstance(model, str) else model.name_or_path or type(model).__name__
        # Its name on the hub, which a card tells.
        self._base = None if Path(self._model).is_dir() or not isinstance(model, str) else self._model
        self._dtype = dtype
        self._device = device
        self._network: PreTrainedModel | None = None if isinstance(model, str) else _one_score(model)
        self._peft: Any = None  # the network as peft sees it, where there is an adapter
        self._adapter_folder: str | None = None  # of a saved one
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._on_disk: str | None = None  # the folder or name that the network's weights can be loaded from again
        self._expected: str | None = None  # the fingerprint of weights that are still to be loaded
        self._head_is_new = False
        self._quantised: tuple[str, PreTrainedModel] | None = None
        self._stages: list[dict[str, Any]] = []
        self._reports: list[DataReport] = []

    # ---- scoring

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score each row's (query, text) pair and rank each query's documents by it.

        Args:
            inp: Results with qid, query, docno and the text (without the text, where `text` was given).

        Returns:
            The same rows in the same order, with `score` (the model's raw output) and `rank` (from 0) set anew.
        """
        inp = self._checked(inp)
        if not len(inp):
            return pt.model.add_ranks(inp.assign(score=pd.Series(dtype="float64")))
        self._warn_if_new()
        return self._scored(inp)

    def _warn_if_new(self) -> None:
        self._load()
        if self._head_is_new:
            warn(
                f"{self!r} scores at random: its head is new until fit() reaches it. An estimator is fitted inside "
                "`>>`, but not inside a cache, a `+` or a `|`"
            )

    def _scored(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Checked results with their scores."""
        network, encoder = self._load()
        dtype = resolve_dtype(self._dtype, network.device)
        if dtype == torch.int8:
            network = self._quantised_network()
        with pt.tqdm(total=len(inp), desc="MonoCE", unit="pair", disable=not self.verbose) as bar:
            scores = score_pairs(
                network, encoder, inp["query"].tolist(), inp[self.text_field].tolist(),
                dtype=dtype, batch_size=self.batch_size, progress=bar.update,
            )  # fmt: skip
        if not np.isfinite(scores).all():
            raise ValueError(
                f"expected finite scores, found {np.sum(~np.isfinite(scores)):,} of {len(scores):,} that are not"
            )
        return ranked(inp, scores.astype(np.float64))

    def _checked(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Results with the columns that scoring needs, the text loaded if need be; what they lack is said."""
        wanted = ["query"] if self.text is not None else ["query", self.text_field]
        if not isinstance(inp, pd.DataFrame):
            raise ValueError(f"expected results as a data frame, found {type(inp).__name__}")
        try:
            pt.validate.result_frame(inp, extra_columns=wanted, context=self)
            require_columns(inp, ["qid", "docno", *wanted], "results")
        except pt.validate.InputValidationError as error:
            try:
                require_columns(inp, ["qid", "docno", *wanted], "results")
            except ValueError as in_words:
                error.add_note(str(in_words))
            raise
        if not len(inp):
            return inp if self.text_field in inp.columns else inp.assign(**{self.text_field: pd.Series(dtype="object")})
        require_ids(inp, ["qid", "docno"])
        inp = self._with_text(inp)
        lacking = {name: int(without_text(inp[name]).sum()) for name in ("query", self.text_field)}
        if any(lacking.values()):
            found = " and ".join(f"{count:,} without {name!r}" for name, count in lacking.items() if count)
            warn(f"of {len(inp):,} rows to score, {found}: read as empty, so that their scores mean little")
        return inp

    def _with_text(self, results: pd.DataFrame) -> pd.DataFrame:
        return results if self.text is None or self.text_field in results.columns else self._load_text(results)

    def _load_text(self, results: pd.DataFrame) -> pd.DataFrame:
        try:
            loaded: pd.DataFrame = self.text.text_loader(fields=[self.text_field])(results)
        except KeyError as error:  # which PyTerrier's loader of irds: datasets says it by
            raise ValueError(f"expected the texts of all documents in text=, found some missing: {error}") from error
        require_columns(loaded, [self.text_field], "what the text loader gives")
        if len(loaded) != len(results):
            raise ValueError(
                f"expected {len(results):,} rows from the text loader, as many as it got, found {len(loaded):,}"
            )
        return loaded

    def _topics(self) -> pd.DataFrame | None:
        with contextlib.suppress(AttributeError, NotImplementedError):  # a corpus alone has none
            return self.text.get_topics()
        return None

    def source_digest(self, results: pd.DataFrame | str | Path) -> str:
        """A digest of what `text` adds to training results: a file's queries, and some texts. Empty if nothing."""
        if self.text is None or (isinstance(results, pd.DataFrame) and self.text_field in results.columns):
            return ""
        topics = None
        if isinstance(results, pd.DataFrame):
            docnos = as_ids(results["docno"].iloc[:: max(1, len(results) // SAMPLED)]).tolist()
        else:
            docnos, topics = first_docnos(results, SAMPLED), self._topics()
        texts = self._load_text(pd.DataFrame({"docno": list(dict.fromkeys(docnos))}))
        frames = [texts[["docno", self.text_field]], *([] if topics is None else [topics[["qid", "query"]]])]
        return _digest([*map(frame_digest, frames)])

    # ---- training

    def fit(
        self,
        topics_or_res_tr: pd.DataFrame | str | Path,
        qrels_tr: pd.DataFrame | None = None,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
        *,
        fitter: Fitter | FitterSequence | None = None,
        checkpoint_dir: str | Path | None = None,
    ) -> Self:
        """Train the model in place on a first stage's results.

        Args:
            topics_or_res_tr: The results: qid, query, docno, text, and score or rank. Or a file of them, of any size:
                a TREC run, plain or `.gz`, or Parquet; then `MonoCE(..., text=dataset)` has the texts, which are
                looked up when a batch needs them, and the queries (extra `[runs]`).
            qrels_tr: qid, docno, label. Not needed for distillation.
            topics_or_res_va: Validation results, of other queries; then the best weights by the fitter's metric
                are kept.
            qrels_va: Their qrels.
            fitter: In place of the re-ranker's own.
            checkpoint_dir: Where checkpoints go. The same call again goes on from the last one: in a new process, or
                on this re-ranker after an interruption.

        Returns:
            The re-ranker itself.

        Raises:
            ValueError: If something is missing or nothing is left to learn from, before any training.
        """
        chosen = check_fitter(self.fitter or Contrastive() if fitter is None else fitter)
        with processes.one_voice():
            # Everything that can be known to be wrong is said before the first stage trains for hours.
            check_device(resolve_device(self._device))
            results_va = self._validation_frame(topics_or_res_va, qrels_va)
            prepared = [self._prepare(stage, topics_or_res_tr, qrels_tr) for stage in chosen.stages]
            if results_va is not None:
                learnt = {qid for groups, _, _ in prepared for qid in groups.qids}
                if common := int(results_va[0]["qid"].drop_duplicates().isin(learnt).sum()):
                    warn(f"{common} validation queries are training queries too: the metric will flatter")
            for place, (stage, (groups, report, data)) in enumerate(zip(chosen.stages, prepared, strict=True), 1):
                folder = checkpoint_dir
                if folder is not None and len(chosen.stages) > 1:
                    folder = Path(folder) / f"stage-{place}"
                self._train(stage, groups, report, data, results_va, folder, place)
        return self

    def _prepare(self, stage: Fitter, results: Any, qrels: pd.DataFrame | None) -> tuple[Groups, DataReport, str]:
        topics = None
        if isinstance(results, pd.DataFrame):
            require_columns(results, ["qid", "query", "docno"], "training results (the output of a first stage)")
            if self.text is None and self.text_field not in results.columns:
                raise ValueError(
                    f"expected a column {self.text_field!r} with the documents' text, found "
                    f"{list(map(str, results.columns))}: put dataset.text_loader() before MonoCE, or give "
                    "MonoCE(..., text=dataset)"
                )
            results = self._with_text(results.reset_index(drop=True))
        elif isinstance(results, str | Path):
            topics = self._topics()
        else:
            raise ValueError(
                f"expected a data frame of results to train on, or a run's path, found {type(results).__name__}"
            )
        groups, report = stage.groups(
            results,
            qrels,
            text_field=self.text_field,
            load_text=self._load_text if self.text is not None else None,
            topics=topics,
            verbose=self.verbose,
        )
        if report.dropped():
            warn(f"{type(stage).__name__} leaves out: {report.dropped()}")
        if report.contradictions():
            warn(f"{type(stage).__name__} found {report.contradictions()}")
        return groups, report, groups.digest()

    def _validation_frame(
        self, results: pd.DataFrame | None, qrels: pd.DataFrame | None
    ) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        if results is None:
            if qrels is not None:
                raise ValueError("expected validation results with the validation qrels, found None")
            return None
        if qrels is None:
            raise ValueError("expected qrels with the validation results, found None")
        require_columns(results, ["qid", "query", "docno"], "validation results")
        labels = grades_of(qrels).rename("label").reset_index()
        if (labels["label"] % 1).any():
            raise ValueError(
                "expected whole numbers as labels of validation queries, since measures are of grades, found "
                f"{labels.loc[labels['label'] % 1 != 0, 'label'].iloc[0]}"
            )
        results = self._with_text(results.reset_index(drop=True))
        require_columns(results, ["qid", "query", "docno", self.text_field], "validation results")
        frame = pd.DataFrame({"qid": as_ids(results["qid"]), "docno": as_ids(results["docno"])})
        frame["query"], frame["text"] = as_texts(results["query"]), as_texts(results[self.text_field])
        no_text = without_text(results["query"]) | without_text(results[self.text_field])
        # Passages are judged as their documents, as in training.
        frame["docno"] = frame["docno"].str.replace(PASSAGE, "", regex=True)
        labels = labels[labels["qid"].isin(frame["qid"].unique())]
        judged = frame["qid"].isin(labels["qid"].unique())
        relevant = pd.MultiIndex.from_frame(labels.loc[labels["label"] > 0, ["qid", "docno"]])
        if not pd.MultiIndex.from_frame(frame[["qid", "docno"]]).isin(relevant).any():
            why = "all of their labels are 0 or less" if judged.any() and not len(relevant) else ""
            if not why and len(frame):
                why = mismatch(frame, qrels, "the qrels")
            raise ValueError(
                "expected judged queries with a relevant document among the validation results, found none"
                f"{': ' * bool(why)}{why}"
            )
        if no_text[judged].any():
            warn(
                f"{int(no_text[judged].sum()):,} validation documents have no text, or no query: they are read as empty"
            )
        return frame[judged].reset_index(drop=True), labels.astype({"label": int})

    def _train(
        self,
        stage: Fitter,
        groups: Groups,
        report: DataReport,
        data: str,
        validation: tuple[pd.DataFrame, pd.DataFrame] | None,
        checkpoint_dir: str | Path | None,
        place: int,
    ) -> None:
        network, encoder = self._load()
        dtype = resolve_dtype(self._dtype, network.device)
        if stage.max_length is not None:
            encoder = dataclasses.replace(encoder, max_length=self._fitting(stage.max_length, network))
        cut_queries, cut_texts = encoder.truncated(*_sample(groups))
        report = dataclasses.replace(report, truncated_queries=cut_queries, truncated_documents=cut_texts)
        before = self.fingerprint
        probed = _probe(network, encoder, groups)
        start, given_up = self._take_up(checkpoint_dir) if place == 1 else (before, ([], []))
        history: list[dict[str, Any]] = []
        self._stages.append(
            {
                "fitter": repr(stage),
                "loss": getattr(stage.loss, "__name__", repr(stage.loss)),
                "digest": stage.settings_digest(),
                "data": data,
                "queries": len(groups),
                "documents": report.documents,
                "place": place,  # in its call of fit
                "start": start,
                "seed": stage.seed,
                "versions": _versions(),
                "history": history,
            }
        )
        self._reports.append(report)
        was_new, self._head_is_new = self._head_is_new, False
        self._on_disk = None
        check = None
        if validation is not None and stage.metric is not None:
            check = Validation(validation[0], validation[1], stage.metric)
        identity = {
            **stage.readable_settings(),
            **{f.name: str(getattr(encoder, f.name)) for f in dataclasses.fields(encoder) if f.name != "tokenizer"},
            "dtype": str(dtype),
            "data": data[:16],
            "validation": "none" if validation is None else _digest([*map(frame_digest, validation)]),
            "start weights": start,
        }
        try:
            train(
                network,
                encoder,
                groups,
                stage.loss,
                stage,
                dtype=torch.float32 if dtype == torch.int8 else dtype,
                validation=check,
                checkpoint_dir=checkpoint_dir,
                identity=identity,
                history=history,
                verbose=self.verbose and processes.rank() == 0,
            )
        except BaseException:
            # What was learnt so far stays, and is told; without anything learnt it is as if there had been no fit.
            if self.fingerprint == before:
                self._head_is_new = was_new
                self._stages[-1:], self._reports[-1:] = given_up
            else:
                self._stages[-1]["interrupted"] = history[-1]["step"] if history else 0
            raise
        finally:
            if self._stages and self._stages[-1]["history"] is history:
                self._stages[-1]["fingerprint"] = self.fingerprint
        spread = float(np.linalg.norm(probed))
        moved = float(np.linalg.norm(_probe(network, encoder, groups) - probed)) / max(spread, 1e-9)
        if history and history[-1]["step"] >= 10 and moved < HARDLY and not given_up[0]:
            warn(
                f"{type(stage).__name__} hardly changed the scores, by {moved:.1e} of their spread: is the learning "
                f"rate of {stage.learning_rate} too low?"
            )

    def _take_up(self, checkpoint_dir: str | Path | None) -> tuple[str, tuple[list[Any], list[Any]]]:
        """Where training starts from, and the stages and reports of an interrupted fit that the folder's checkpoints
        go on with: they are forgotten here, for the checkpoints have them.
        """  # noqa: D205
        if self._stages and "interrupted" in self._stages[-1]:
            first = len(self._stages) - self._stages[-1]["place"]
            start: str = self._stages[first]["start"]
            if interrupted_training(checkpoint_dir).get("start weights") == start:
                given_up = self._stages[first:], self._reports[first:]
                del self._stages[first:], self._reports[first:]
                return start, given_up
        return self.fingerprint, ([], [])

    @property
    def history(self) -> pd.DataFrame:
        """What training logged, a row an entry.

        Columns: stage (from 1), fitter, step (updates in the stage), epoch, loss (the mean since the row before),
        learning_rate, the metric's name where there was a validation, seconds (since the stage began) and
        pairs_per_second.
        """
        rows = [
            {"stage": number, "fitter": stage["fitter"].partition("(")[0], **row}
            for number, stage in enumerate(self._stages, 1)
            for row in stage["history"]
        ]
        first = ["stage", "fitter", "step", "epoch", "loss", "learning_rate"]
        last = ["seconds", "pairs_per_second"]
        frame = pd.DataFrame(rows, columns=None if rows else [*first, *last])
        return frame[[*first, *(c for c in frame.columns if c not in {*first, *last}), *last]]

    @property
    def data_report(self) -> DataReport | None:
        """What the last stage found in its data; None before fit."""
        return self._reports[-1] if self._reports else None

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """A digest of the weights: equal for equal weights, whatever the object. Loads the model.

        Computed anew each time (a third of a second for a BERT-base): tensors don't tell of every write to them.
        """
        network = self._load()[0]
        return _fingerprint(network, None if self._peft is None else adapters.settings(self._peft))

    def __repr__(self) -> str:
        parts = [repr(self._model)]
        if self.fitter is not None:
            parts.append(f"fitter={self.fitter!r}")
        if self._network is not None:
            parts.append(f"fingerprint={self.fingerprint!r}")
        return f"MonoCE({', '.join(parts)})"

    def cached(self, folder: str | Path) -> "CachedMonoCE":
        """This re-ranker with a cache of its scores on disk, which a later fit can't make stale.

        Scores are kept by the weights' fingerprint, the settings that decide a score, and the texts of query and
        document, so that an edited text, or a query under another qid, is answered rightly. `fit` reaches through.

        Args:
            folder: Where the caches are, one a fingerprint.

        Raises:
            ImportError: Without pyterrier-caching (extra `[cache]`).
        """
        return CachedMonoCE(self, Path(folder))

    def clone(self) -> "MonoCE":
        """A re-ranker of its own with the same settings, weights and history."""
        return self.apply_attributes()

    def apply_attributes(self, **settings: Any) -> "MonoCE":
        """A clone with some settings changed. PyTerrier calls this when it takes transformers apart."""
        other = copy.copy(self)
        other._network, other._peft = copy.deepcopy((self._network, self._peft))  # together: they share modules
        other._stages, other._reports = copy.deepcopy(self._stages), [*self._reports]
        for name, value in settings.items():
            setattr(other, f"_{name}" if name in {"model", "dtype", "device"} else name, value)
        return other

    def __copy__(self) -> "MonoCE":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "MonoCE":
        return self.clone()

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: no weights where they can be loaded there, else weights for a CPU.

        A device is looked for where the re-ranker arrives.
        """
        state = {**self.__dict__, "_quantised": None}
        if self._network is None:
            return {**state, "_model": _absolute(self._model)}
        fingerprint = self.fingerprint
        if self._on_disk is not None and _record_in(self._on_disk).get("fingerprint") in {None, fingerprint}:
            alone = {"_network": None, "_peft": None, "_tokenizer": None, "_expected": fingerprint}
            return {**state, **alone, "_model": _absolute(self._on_disk)}
        self._load()  # a tokenizer that is beside a model in memory
        state["_tokenizer"], network, adapted = self._tokenizer, self._network, self._peft
        if network.device.type != "cpu":
            network, adapted = copy.deepcopy((network, adapted))
            network.cpu()
        return {**state, "_network": network, "_peft": adapted}

    def reseeded(self, seed: int) -> "MonoCE":
        """A clone for a replicate: with another new head if it is untrained, with the same weights if not."""
        other = self.clone()
        other.seed = seed
        self._load()
        if self._head_is_new:
            other._network = other._peft = None  # loaded anew at first use
        return other

    def take_weights(self, other: "MonoCE") -> None:
        """Become what another re-ranker is, with one's own settings."""
        self._network, self._tokenizer, self._peft = other._load()[0], other._tokenizer, other._peft
        self._on_disk = other._on_disk if self.seed == other.seed else None
        self._adapter_folder = other._adapter_folder
        self._head_is_new, self._stages, self._reports = other._head_is_new, other._stages, other._reports

    def scoring_settings(self) -> dict[str, Any]:
        """What decides a pair's score besides the weights."""
        device = resolve_device(self._device)
        return {
            "text_field": self.text_field,
            "max_length": self.max_length,
            "max_query_length": self.max_query_length,
            "passages": self.passages,
            "dtype": str(resolve_dtype(self._dtype, device)),
        }

    # ---- on disk

    def save(
        self,
        path: str | Path,
        *,
        merged: bool = True,
        license: str | None = None,
        metrics: pd.DataFrame | None = None,
        **card: Any,
    ) -> None:
        """Write the model as an ordinary Hugging Face folder, with a model card and a record of how it was trained.

        `AutoModelForSequenceClassification`, sentence-transformers' `CrossEncoder` and `MonoCE.load` read it, with
        equal scores. What is in the folder is replaced once the new files are all there. Of several processes the
        first writes, and the others don't wait for it.

        Args:
            path: The folder.
            merged: Whether an adapter becomes part of the weights. False: the folder holds the adapter alone, which
                `MonoCE.load` and peft put into the backbone again. Without an adapter it makes no difference.
            license: For the card, as the hub names it, such as "apache-2.0".
            metrics: A table for the card, such as `pt.Experiment`'s.
            **card: What else `huggingface_hub.ModelCardData` takes, such as `language="en"`.

        Raises:
            ValueError: If `path` is a file, or a folder of something else.
        """
        path = Path(path).expanduser().absolute()
        recover(path)
        known = ("config.json", adapters.CONFIG)
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not any((path / f).is_file() for f in known)):
            raise ValueError(f"expected a new folder or a model's to save in, found {path}")
        self._load()
        if self._peft is not None and not merged:
            base = self._peft.active_peft_config.base_model_name_or_path
            if Path(base).is_dir() and Path(base).resolve() == path.resolve():
                raise ValueError(f"expected another folder than the backbone's for its adapter, found {path}")
        if processes.rank() == 0:
            self._replace(path, merged=merged, license=license, metrics=metrics, **card)
            if self._peft is None:
                self._on_disk = str(path)

    def _replace(self, path: Path, **options: Any) -> None:
        """Write beside the model that is there, and change the two for each other."""
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _beside(path, "old")
        for leftover in path.parent.glob(f"{glob.escape(_beside(path, 'new').name)}*"):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:  # of a save that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=_beside(path, "new").name))
        try:
            self._write(partial, name=path.name, **options)
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone
            durable(partial)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(partial, path)
            except BaseException:
                recover(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        merged: bool = True,
        license: str | None = None,
        metrics: pd.DataFrame | None = None,
        token: str | None = None,
        **card: Any,
    ) -> str:
        """Publish what `save` writes as a model on the Hugging Face hub.

        Args:
            repo: Its name, such as "user/model"; it is made if it isn't there, and an earlier model in it is replaced.
            private: Whether a new repository is private. None: as the hub has it.
            merged: See `save`, as for the three that follow.
            license: For the card.
            metrics: For the card.
            token: The hub's. None: that of `hf auth login`.
            **card: For the card.

        Returns:
            The commit's address. Of several processes the first publishes; the others don't wait, and get the
            model's address.
        """
        api = HfApi(token=token)
        if processes.rank() != 0:
            return f"{api.endpoint}/{repo}"
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory(prefix="pyterrier_msft_") as folder:
            self._write(Path(folder), name=repo, merged=merged, license=license, metrics=metrics, **card)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{len(self._stages)} stages, weights {self.fingerprint}",
                delete_patterns=["*.safetensors", "*.json"],  # those of an earlier model
            )
        return str(commit.commit_url)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "MonoCE":
        """The re-ranker that `save` or `push_to_hub` wrote: its weights, settings and history.

        `MonoCE(path)` takes the weights alone, as a backbone for something new. Of a cross-encoder that others
        published both take the weights.

        Args:
            path: A folder, or a name on the Hugging Face hub.
            **settings: In place of the saved ones, such as `device="cpu"`.

        Raises:
            ValueError: If there is no such model.
        """
        name = str(path)
        if name.startswith("~"):
            name = str(Path(name).expanduser())
        recover(Path(name))
        if Path(name).is_dir():
            folder = Path(name)
        else:
            _check_folder(name)
            folder = hub.fetch(name, revision=settings.get("revision"), files=[RECORD, "adapter*"])
        record = _record_in(folder)
        # No other than what `save` writes: a record from the hub may not allow its own code to run.
        saved = {name: value for name, value in record.get("settings", {}).items() if name in SAVED}
        settings = {**saved, **settings}
        if (folder / adapters.CONFIG).is_file():
            base, settings["revision"] = adapters.base_of(folder)  # which is not the adapter's
            loaded = cls(base, **settings)
            loaded._adapter_folder = str(folder.absolute())
        else:
            loaded = cls(name, **settings)
        loaded._base = record.get("base", loaded._base)
        loaded._stages = record.get("stages", [])
        loaded._reports = [DataReport(**report) for report in record.get("reports", [])]
        return loaded

    def _write(
        self,
        folder: Path,
        *,
        name: str,
        merged: bool,
        license: str | None,
        metrics: pd.DataFrame | None,
        **card: Any,
    ) -> None:
        network, encoder = self._load()
        apart = self._peft is not None and not merged
        if self._peft is not None and merged:
            network = adapters.merged(self._peft)
        # CrossEncoder puts a sigmoid on a single label unless it is told not to.
        activation = {"activation_fn": "torch.nn.modules.linear.Identity"}
        network.config.sentence_transformers = {**getattr(network.config, "sentence_transformers", {}), **activation}
        # And it cuts a pair to what the tokenizer says.
        tokenizer = copy.deepcopy(encoder.tokenizer)
        tokenizer.model_max_length = self.max_length
        with quiet_transformers():
            if apart:
                self._peft.save_pretrained(folder, save_embedding_layers=False)
            else:
                network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        record = self._record(self.fingerprint if network is self._network else _fingerprint(network))
        (folder / RECORD).write_text(json.dumps(record, indent=1))
        (folder / "pt_meta.json").write_text(json.dumps(ARTIFACT))
        text = hub.card(
            record, name=name, base=self._base, adapter=apart, license=license, metrics=metrics, **card
        )  # fmt: skip
        (folder / "README.md").write_text(text)

    def _record(self, fingerprint: str) -> dict[str, Any]:
        return {
            "settings": {name: getattr(self, name) for name in SAVED},
            "base": self._base,
            "head_is_new": self._head_is_new,
            "fingerprint": fingerprint,
            "stages": self._stages,
            "reports": [dataclasses.asdict(report) for report in self._reports],
            "versions": _versions(),
        }

    # ---- the network

    def _load(self) -> tuple[PreTrainedModel, PairEncoder]:
        """The network on its device and its encoder; loaded at first use."""
        device = resolve_device(self._device)
        if self._network is None:
            self._network, self._tokenizer, self._head_is_new = load_model(
                self._model, seed=self.seed, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
            self._head_is_new |= bool(_record_in(self._model).get("head_is_new"))
            self._on_disk = self._model
        if self._tokenizer is None:
            self._tokenizer = _tokenizer_of(self._network)
        if self._peft is None and self._adapter_folder is not None:
            self._peft, self._head_is_new = adapters.load(self._network, self._adapter_folder), False
        elif self._peft is None and self.adapter is not None:
            base = str(Path(self._model).absolute()) if Path(self._model).is_dir() else self._model
            self._peft = adapters.add(
                self._network, self.adapter, base=base, revision=self.revision, seed=self.seed
            )  # fmt: skip
        if self._expected is not None:
            expected, self._expected = self._expected, None
            if (found := self.fingerprint) != expected:
                self._network, self._peft, self._expected = None, None, expected
                raise ValueError(
                    f"expected the weights {expected} in {self._model}, from where they were sent, found {found}"
                )
        if self._network.device != device:
            self._network.to(device)
        length = self._fitting(self.max_length, self._network)
        return self._network, PairEncoder(self._tokenizer, length, self.max_query_length, self.passages)

    def _quantised_network(self) -> PreTrainedModel:
        """The network in int8, made anew when the weights have changed."""
        fingerprint = self.fingerprint
        if self._quantised is None or self._quantised[0] != fingerprint:
            network = self._load()[0] if self._peft is None else adapters.merged(self._peft)
            self._quantised = fingerprint, quantised(network)
        return self._quantised[1]

    def _fitting(self, max_length: int, network: PreTrainedModel) -> int:
        assert self._tokenizer is not None
        limit = token_limit(network, self._tokenizer)
        if max_length > limit:
            raise ValueError(
                f"expected max_length of at most {limit}, which {self._model} has positions for, found {max_length}"
            )
        return max_length


class CachedMonoCE(pt.Estimator):
    """A `MonoCE` with a cache of scores, see `MonoCE.cached`."""

    __hash__ = object.__hash__
    schematic = {"label": "MonoCE (cached)", "help_url": MonoCE.schematic["help_url"]}  # noqa: RUF012

    def __init__(self, reranker: MonoCE, folder: Path) -> None:
        super().__init__()
        try:
            import pyterrier_caching  # noqa: F401
        except ImportError as error:
            raise ImportError('MonoCE.cached needs the extra [cache]: pip install "pyterrier-msft[cache]"') from error
        self.reranker = reranker
        self.folder = folder

    def fit(self, *args: Any, **options: Any) -> Self:
        """Train the re-ranker, see `MonoCE.fit`; its scores from now on are kept apart from those before."""
        self.reranker.fit(*args, **options)
        return self

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """As `MonoCE.transform`, computing what isn't known yet."""
        inp = self.reranker._checked(inp)
        if not len(inp):
            return self.reranker.transform(inp)
        self.reranker._warn_if_new()
        # A cache's keys are texts, whatever they are called: a query's own text, and a digest of the document's.
        queries = [clean(query) for query in inp["query"]]
        texts = [clean(text) for text in inp[self.reranker.text_field]]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        pairs = pd.DataFrame({"qid": queries, "query": queries, "docno": keys, self.reranker.text_field: texts})
        pairs = pairs.drop_duplicates(["query", "docno"])
        settings = json.dumps(self.reranker.scoring_settings(), sort_keys=True)
        name = f"{self.reranker.fingerprint}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        while True:
            # Opened for each call: a connection works in its own thread alone, and can't be pickled.
            # An error: another process wrote some of these scores since we looked. They are found the next time.
            with (
                contextlib.suppress(sqlite3.IntegrityError),
                contextlib.closing(self._open(self.folder / name)) as cache,
            ):
                scored = cache(pairs).set_index(["query", "docno"])["score"]
                break
        return ranked(inp, scored.loc[pd.MultiIndex.from_arrays([queries, keys])].to_numpy())

    def _open(self, path: Path) -> Any:
        """The cache in a folder; a new one is put in place whole, since others may be waiting for it."""
        from pyterrier_caching import Sqlite3ScorerCache

        if not path.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as partial:
                Sqlite3ScorerCache(Path(partial) / "new").close()
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(partial) / "new").rename(path)
        return Sqlite3ScorerCache(path, pt.apply.generic(self.reranker._scored))


def _sample(groups: Groups) -> tuple[list[str], list[str]]:
    """Some pairs of the training data, evenly taken."""
    step = max(1, len(groups) * 4 // TRUNCATION_SAMPLE)
    chosen = [
        (groups.queries[i], document) for i in range(0, len(groups), step) for document in groups.documents[i][:4]
    ]
    return [query for query, _ in chosen], groups.text(document for _, document in chosen)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _probe(network: PreTrainedModel, encoder: PairEncoder, groups: Groups) -> np.ndarray:
    """Scores of a few documents of a few queries, less their query's mean: what training shall change."""
    scores = []
    for i in np.unique(np.linspace(0, len(groups) - 1, PROBED).astype(int)):
        texts = groups.text(groups.documents[i][:PROBED])
        found = score_pairs(network, encoder, [groups.queries[i]] * len(texts), texts, dtype=torch.float32)
        scores.append(found - found.mean())
    return np.concatenate(scores)


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "pyterrier")
    return {"pyterrier_msft": __version__, **{name: importlib.metadata.version(name) for name in names}}
