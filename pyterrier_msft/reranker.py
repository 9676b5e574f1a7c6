"""`MonoCE`: a cross-encoder as a PyTerrier transformer."""

import contextlib
import copy
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from transformers import PreTrainedModel

from pyterrier_msft.algebra import FitterSequence, FitterSum, check_fitter
from pyterrier_msft.cached import CachedMonoCE
from pyterrier_msft.calibration import CalibrationMixin
from pyterrier_msft.checks import check_number
from pyterrier_msft.data.frames import FIRST_STAGE_SCORE, with_scores
from pyterrier_msft.data.mixture import TrainingResults
from pyterrier_msft.data.rankings import first_stage_scores
from pyterrier_msft.data.report import DataReport
from pyterrier_msft.data.texts import TextSource, check_text_source
from pyterrier_msft.data.validation import validation_frames, warn_of_mixed_scores, warn_of_shared_queries
from pyterrier_msft.fitters import Contrastive, Fitter
from pyterrier_msft.fitting import prepare_stage, warn_of_unfinished
from pyterrier_msft.interpolation import HeldOut, InterpolationMixin, candidates_of, fit_reranker
from pyterrier_msft.model.cross_encoder import SOURCE_SETTINGS, CrossEncoder
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.record import StageRecord, history_frame
from pyterrier_msft.notices import shows_progress, warn, with_prefix
from pyterrier_msft.saving import SavingMixin
from pyterrier_msft.training import distributed
from pyterrier_msft.training.run import check_training_device

RESULT_COLUMNS = {"qid", "query", "docno", "score", "rank"}
# Settings that determine the weights, and how a score follows from them.
WEIGHTS_SETTINGS = {"model", "adapter", "revision", "trust_remote_code", *SOURCE_SETTINGS}


def _argument(name: str) -> Any:
    """Return a property that reads an argument of the cross-encoder."""
    return property(attrgetter(f"cross_encoder.{name}"), doc="The argument of this name.")


class MonoCE(SavingMixin, CalibrationMixin, InterpolationMixin, pt.Estimator):
    """A Transformer that re-scores each query's documents with a point-wise cross-encoder.

    It needs the columns qid, query, docno and text, sets score and rank, and keeps all others. `fit` trains the model
    in place and returns the re-ranker; two fits in a row are two stages.

    The model reads `[CLS] query [SEP] document [SEP]` and outputs one number (monoBERT: Nogueira and Cho, 2019).

    Args:
        model: A name on the Hugging Face hub, or a folder. A backbone gets a new head; a cross-encoder keeps its own.
            docs/howto/models.md lists the kinds. Or a loaded `PreTrainedModel`: it is set to float32 and evaluation
            mode, its head counts as trained, and `fit` trains a copy.
        fitter: What `fit` does. None: `Contrastive()`.
        adapter: A `peft.LoraConfig` or another peft configuration (extra `[lora]`; docs/howto/lora.md lists the kinds).
            `fit` then trains the adapter and the head only; `save` can merge it.
        text_field: The column with the documents' text.
        text: Where to look up texts that the results don't have: a dataset or an index with `.text_loader()`, or a
            transformer that adds them.
        max_length: Tokens per pair; a longer document is truncated.
        max_query_length: Tokens per query; a longer query is truncated. None: the document is truncated first, and the
            query keeps at least half of the tokens.
        interpolate: Whether to add the first stage's score, the column `score` of the results, to the model's:
            `model's score + weight * first stage's score`. A number is the weight; True: `fit` chooses it, and
            `choose_weight` does so without training, see docs/howto/interpolate.md. The results then keep the first
            stage's score as `first_stage_score`.
        passages: Maximum number of windows of `max_length` tokens that a longer document is split into. Its score is
            the best window's, in scoring and in training (MaxP: Dai and Callan, SIGIR 2019).
        batch_size: Pairs per forward pass in scoring. None: as many as fit the token budget of the device.
        dtype: "auto" (bfloat16 where the hardware supports it, else float32), "float32", "bfloat16", "float16", or
            "int8" (CPUs only, extra `[int8]`: training in float32, scoring with a quantized copy).
        device: E.g. "cpu" or "cuda:1". None: a GPU if there is one.
        seed: Seed of the random weights of a new head.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Whether to run code that comes with a model.
        relevant: The label of a classifier with several labels whose log-odds are the score: its name or index. None:
            the second of two.
        template: How a model reads a pair: a text with `{query}` and `{text}`. None: as the model's configuration says,
            or `[CLS] query [SEP] document [SEP]`.
        true: With `template`, for a model that generates text: the word that means *relevant*. None: the two words of
            the model's configuration, or "yes" and "no".
        false: The word that means *not relevant*. The score is the logit of `true` minus that of `false`. None: only
            the logit of `true`.
        verbose: Whether to show progress bars. None: in `fit`, if it runs in a terminal or a notebook.

    Example:
        >>> pipeline = bm25 % 100 >> dataset.text_loader() >> MonoCE("FacebookAI/roberta-base")
        >>> pipeline.fit(train_topics, train_qrels)
    """

    # PyTerrier hashes the repr, so an experiment would mix up two re-rankers with the same repr.
    __hash__ = object.__hash__
    schematic = {"label": "MonoCE", "help_url": "https://github.com/terrierteam/pyterrier_msft"}  # noqa: RUF012
    # PyTerrier reads each argument of __init__ from an attribute `x` or `_x`.
    _model = property(attrgetter("cross_encoder.name"))
    _dtype = property(attrgetter("cross_encoder.requested_dtype"))
    _device = property(attrgetter("cross_encoder.requested_device"))
    adapter = _argument("adapter")
    seed = _argument("seed")
    revision = _argument("revision")
    trust_remote_code = _argument("trust_remote_code")
    relevant = _argument("relevant")
    template = _argument("template")
    true = _argument("true")
    false = _argument("false")

    def __init__(
        self, model: str | Path | PreTrainedModel = "google/electra-base-discriminator", *,
        fitter: Fitter | FitterSum | FitterSequence | None = None, adapter: Any = None, text_field: str = "text",
        text: Any = None, max_length: int = 256, max_query_length: int | None = None,
        interpolate: bool | float = False, passages: int = 1, batch_size: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None, seed: int = 42, revision: str | None = None,
        trust_remote_code: bool = False, relevant: int | str | None = None, template: str | None = None,
        true: str | None = None, false: str | None = None, verbose: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fitter = fitter
        self.text_field = text_field
        self.text = text
        self.max_length = max_length
        self.max_query_length = max_query_length
        self.interpolate = interpolate
        self.passages = passages
        self.batch_size = batch_size
        self.verbose = verbose
        check_number("seed", seed, integer=True, minimum_zero=True, required=True)
        self.cross_encoder = CrossEncoder(
            model, adapter=adapter, dtype=dtype, device=device, seed=int(seed), revision=revision,
            trust_remote_code=trust_remote_code, relevant=relevant, template=template, true=true, false=false,
        )  # fmt: skip
        self.stages: list[StageRecord] = []  # one per stage of training
        # The fitters before and after `set_parameter`, until `fit`.
        self._replaced_fitter: tuple[Any, Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _checked_setting(name, value))

    # ---- scoring

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score each (query, text) pair, and rank each query's documents by score.

        Args:
            inp: Results with qid, query, docno and the text (without the text if the re-ranker has `text=`).

        Returns:
            The same rows in the same order, with new values of `score` (the model's raw output, unless `interpolate`)
            and `rank` (from 0). After `calibrate`, also of `probability`; without, such a column is dropped.
        """
        inp = self.prepare(inp)
        return self.with_scores(inp, self.score(inp))

    def with_scores(self, prepared: pd.DataFrame, model_scores: np.ndarray) -> pd.DataFrame:
        """Set the scores and ranks that follow from the model's scores of the rows that `prepare` returned."""
        if self.interpolate is False:
            return self.add_probability(with_scores(prepared, model_scores))
        first, weight = first_stage_scores(prepared, "results"), self.first_stage_weight
        if weight is None and len(prepared):
            raise ValueError(f"interpolate must be a number until fit or choose_weight sets it; got True in {self!r}")
        prepared = prepared.assign(**{FIRST_STAGE_SCORE: first})
        return self.add_probability(with_scores(prepared, model_scores + (weight or 0.0) * first))

    @property
    def first_stage_weight(self) -> float | None:
        """The weight of the first stage's score, see `interpolate`: 0 without it, None before `fit` has chosen it."""
        if self.interpolate is True:
            return self.stages[-1].interpolation.get("weight") if self.stages else None
        return float(self.interpolate)

    def prepare(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Check results to score and add their texts; warn about empty texts and an untrained model."""
        extra_columns = [] if self.interpolate is False else ["score"]
        inp = self.text_source.check_and_add_to(inp, context=self, extra_columns=extra_columns)
        if len(inp) and self._replaced_fitter is not None and self.fitter is self._replaced_fitter[1]:
            raise ValueError(
                f"fit is required after set_parameter('fitter', ...); got {self!r} with the old weights. "
                "pt.GridScan and pt.GridSearch never call fit: compare fitters with pyterrier_msft.fit_grid"
            )
        if len(inp) and self.interpolate is False and not self.stages and self.cross_encoder.needs_first_stage:
            warn(
                f"{self!r} scores without the first stage's score, unlike the re-ranker that was saved there: use "
                "MonoCE.load, which restores its settings, or set interpolate"
            )
        if len(inp):
            self.check_calibration()
        if len(inp) and self.cross_encoder.head_is_new:
            warn(
                f"{self!r} gives random scores: its head is untrained. Call fit(); PyTerrier fits an estimator "
                "inside `>>`, but not inside a cache, `+` or `|`"
            )
        return inp

    def score(self, prepared: pd.DataFrame) -> np.ndarray:
        """Score the rows that `prepare` returned; the scores are float64 [rows]."""
        if not len(prepared):
            return np.empty(0)
        with pt.tqdm(total=len(prepared), desc="MonoCE", unit="pair", disable=not self.verbose) as bar:
            scores = self.cross_encoder.score(
                self.pair_encoder(), prepared["query"].tolist(), prepared[self.text_field].tolist(),
                batch_size=self.batch_size, progress=bar.update,
            )  # fmt: skip
        return scores.astype(np.float64)

    def pair_encoder(self, max_length: int | None = None) -> PairEncoder:
        """Return the encoder of pairs for the re-ranker's own `max_length` or another. Loads the model."""
        return self.cross_encoder.pair_encoder(
            max_length=max_length or self.max_length, max_query_length=self.max_query_length, passages=self.passages
        )

    @property
    def text_source(self) -> TextSource:
        """Adds the texts that results don't have."""
        return TextSource(self.text_field, self.text)

    # ---- training

    def fit(
        self, topics_or_res_tr: TrainingResults, qrels_tr: pd.DataFrame | None = None,
        topics_or_res_va: pd.DataFrame | None = None, qrels_va: pd.DataFrame | None = None, *,
        fitter: Fitter | FitterSum | FitterSequence | None = None, checkpoint_dir: str | Path | None = None,
    ) -> Self:  # fmt: skip
        """Train the model in place on a first stage's results.

        Args:
            topics_or_res_tr: The results: qid, query, docno, text, and score or rank. Or a file of them, of any size
                (extra `[runs]`): a TREC run, plain or `.gz`, or Parquet. `MonoCE(..., text=dataset)` then provides
                the queries and the texts, which are looked up batch by batch. Or a list of several sources, see
                `Stage`.
            qrels_tr: qid, docno, label. Not needed for distillation.
            topics_or_res_va: Validation results, of other queries. Kept are the last weights that aren't significantly
                worse than the best by the fitter's metric (paired t-test, p < .05), or those of the start if none is
                better. The metric is that of the re-ranker's scores, but with `interpolate=True` of the model's alone.
            qrels_va: Their qrels.
            fitter: Used instead of the re-ranker's own.
            checkpoint_dir: Folder for checkpoints, which makes training resumable: repeat the call, in a new process
                or on this re-ranker, and it continues from the last checkpoint.

        Returns:
            The re-ranker itself.

        Raises:
            ValueError: If something is missing or nothing is left to train on; raised before training starts.
            RuntimeError: If another thread trains this re-ranker.
        """
        fitters = check_fitter(self.fitter or Contrastive() if fitter is None else fitter).stages
        with distributed.silence_other_ranks(), self.cross_encoder.guard.training():
            check_training_device(self.cross_encoder.device)
            verbose = shows_progress(self.verbose)
            progress = with_prefix("training") if verbose and distributed.rank() == 0 else None
            validation = validation_frames(
                topics_or_res_va, qrels_va, self.text_source, with_scores=self.interpolate is not False
            )
            candidates = None
            if self.interpolate is True and validation is None:
                candidates = candidates_of(topics_or_res_tr, qrels_tr, self.text_source)
            prepared = [
                prepare_stage(stage, topics_or_res_tr, qrels_tr, self.text_source, verbose=verbose) for stage in fitters
            ]
            if validation is not None:
                warn_of_shared_queries(validation[0], {query for data in prepared for query in data.queries})
                if self.interpolate is not False and topics_or_res_va is not None:
                    warn_of_mixed_scores(topics_or_res_tr, topics_or_res_va)
            held_out = None if candidates is None else HeldOut.of(candidates, prepared)
            # Stages of the same length share an encoder, which keeps the token ids of texts.
            lengths = [data.settings.max_length for data in prepared]
            encoders = {length: self.pair_encoder(length) for length in {None, *lengths}}
            self._replaced_fitter = None
            folder = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
            warn_of_unfinished(self.stages, folder, len(prepared))
            try:
                fit_reranker(
                    self.cross_encoder, [encoders[length] for length in lengths], prepared, self.stages,
                    interpolate=self.interpolate, scorer=encoders[None], held_out=held_out, validation=validation,
                    checkpoint_dir=folder, progress=progress,
                )  # fmt: skip
            finally:
                self.remove_stale_calibration()
        return self

    def set_parameter(self, name: str, value: Any) -> None:
        """Set an attribute by name, as `pt.GridScan` does. After a change of the fitter, `transform` needs a `fit`."""
        before, replaced = self.fitter, self._replaced_fitter
        super().set_parameter(name, value)
        if name == "fitter":
            original = replaced[0] if replaced is not None and replaced[1] is before else before
            self._replaced_fitter = None if value is original else (original, value)

    @property
    def history(self) -> pd.DataFrame:
        """What training logged, one row per entry.

        The columns are:

        - stage (from 1), fitter, step (updates in the stage) and epoch,
        - loss (the mean since the previous row) and learning_rate,
        - of a sum of fitters, the loss of each part without its weight, e.g. loss_Contrastive,
        - with validation, the metric, under its own name, and kept, whether these weights are kept,
        - seconds (since the stage began) and pairs_per_second.
        """
        return history_frame(self.stages)

    @property
    def data_report(self) -> DataReport | None:
        """What the last stage found in its data; None before fit."""
        return DataReport.from_dict(self.stages[-1].data_report) if self.stages else None

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """A digest of the weights, the tokenizer, and the configuration that affects scores. Loads the model."""
        return self.cross_encoder.fingerprint

    def scoring_settings(self) -> dict[str, Any]:
        """The settings that, besides the weights, determine a pair's score."""
        settings = {name: getattr(self, name) for name in ("text_field", "max_length", "max_query_length", "passages")}
        return {**settings, "dtype": str(self.cross_encoder.dtype)}

    def __repr__(self) -> str:
        parts = [repr(self._model)]
        if self.fitter is not None:
            parts.append(f"fitter={self.fitter!r}")
        if self.interpolate is not False:
            weight = self.first_stage_weight
            parts.append(f"interpolate={self.interpolate if weight is None else weight!r}")
        if self.cross_encoder.is_loaded:
            with contextlib.suppress(ValueError):  # a model in memory, without a tokenizer
                parts.append(f"fingerprint={self.fingerprint!r}")
        return f"MonoCE({', '.join(parts)})"

    def cached(self, folder: str | Path) -> CachedMonoCE:
        """Cache scores on disk. Neither `fit` nor edited texts make the cache stale.

        The key of a score is the fingerprint, the settings that affect scores, and the texts of the pair.

        Args:
            folder: Where to keep the caches, one for each combination of weights and settings.

        Raises:
            ImportError: Without pyterrier-caching (extra `[cache]`).
        """
        return CachedMonoCE(self, Path(folder).expanduser())

    def clone(self, *, fitter: Fitter | FitterSum | FitterSequence | None = None) -> "MonoCE":
        """Copy the re-ranker with its settings, weights and history; `fitter` replaces its own."""
        other = self.with_model(self.cross_encoder.clone())
        if fitter is not None:
            other.fitter = check_fitter(fitter)
        return other

    def __copy__(self) -> "MonoCE":
        return self.clone()  # two re-rankers that share weights couldn't tell when the other one is trained

    def __deepcopy__(self, memo: dict[int, Any]) -> "MonoCE":
        return self.clone()

    def reseeded(self, seed: int) -> "MonoCE":
        """Copy the re-ranker with another seed: a new head or adapter gets other random weights; trained weights stay.

        Raises:
            ValueError: If the new head was saved in a folder, which has its values.
        """
        return self.with_model(self.cross_encoder.reseeded(seed))

    def apply_attributes(self, **settings: Any) -> "MonoCE":
        """Copy the re-ranker with other settings, for `pt.inspect`; those that determine the weights can't change."""
        if fixed := sorted(WEIGHTS_SETTINGS & settings.keys()):
            raise ValueError(f"{fixed[0]} must stay the same; got {settings[fixed[0]]!r}. Make a new MonoCE with it")
        MonoCE(**{"dtype": self._dtype, "device": self._device, **settings})  # checks their names, dtype and device
        other = self.clone()
        other.cross_encoder.requested_dtype = settings.pop("dtype", self._dtype)
        other.cross_encoder.requested_device = settings.pop("device", self._device)
        for name, value in settings.items():
            setattr(other, name, value)
        return other

    def with_model(self, cross_encoder: CrossEncoder) -> "MonoCE":
        """Copy the re-ranker with another cross-encoder, which isn't copied."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.cross_encoder, other.stages = cross_encoder, copy.deepcopy(self.stages)
        return other

    def take_weights(self, other: "MonoCE") -> None:
        """Share the weights of another re-ranker, and add the stages of its last fit; keep this one's settings."""
        self.cross_encoder.take_weights(other.cross_encoder)
        last_fit = other.stages[-other.stages[-1].place :] if other.stages else []
        self.stages, self.calibration = self.stages + last_fit, other.calibration


def _checked_setting(name: str, value: Any) -> Any:
    """Check the value of an attribute, when a re-ranker is made or later; return it in the form to keep.

    Raises:
        AttributeError: If assignment can't change the setting.
        ValueError: If the value is wrong.
    """
    if isinstance(value, np.number):
        value = value.item()  # JSON knows only Python's numbers
    if name in {"model", "dtype", "device"}:
        hint = "" if name == "model" else f", or a copy: ce.apply_attributes({name}={value!r})"
        raise AttributeError(f"{name} of a MonoCE can't be assigned; got {value!r}. Make a new one with it{hint}")
    if name in {"max_length", "passages"}:
        check_number(name, value, integer=True, required=True)
    elif name in {"max_query_length", "batch_size"}:
        check_number(name, value, integer=True)
    elif name == "interpolate" and not isinstance(value, bool):
        check_number(name, value, minimum_zero=True, required=True)
        return float(value)
    elif name == "fitter" and value is not None:
        return check_fitter(value)
    elif name == "text":
        check_text_source(value)
    elif name == "text_field" and (not isinstance(value, str) or value in RESULT_COLUMNS):
        raise ValueError(
            f"text_field must be the name of a column of text; got {value!r}. Join several columns first, "
            "e.g. with pt.apply.text(lambda row: row['title'] + ' ' + row['body'])"
        )
    return value
