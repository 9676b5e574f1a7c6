"""`CrossEncoder`: network, tokenizer and adapter in one object."""

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyterrier_msft.model import adapters
from pyterrier_msft.model.card import Kind
from pyterrier_msft.model.decoders import prompt_of, words_of
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.files import IDENTITY, LOGIT_SCORE, missing_files
from pyterrier_msft.model.fingerprint import fingerprint_of
from pyterrier_msft.model.first_token import scores_first_token
from pyterrier_msft.model.loading import as_single_score, load_model, load_tokenizer, quiet_transformers, token_limit
from pyterrier_msft.model.modular import ModularNetwork
from pyterrier_msft.model.precision import parse_device, resolve_device, resolve_dtype
from pyterrier_msft.model.prompt_encoding import PromptEncoder
from pyterrier_msft.model.prompts import check_prompt
from pyterrier_msft.model.quantized import QuantizedNetwork
from pyterrier_msft.model.record import ModelRecord
from pyterrier_msft.model.scoring import score_pairs
from pyterrier_msft.model.storage import check_source
from pyterrier_msft.model.threads import RANDOM_STATE, TrainingGuard
from pyterrier_msft.notices import warn, warn_of_data

# Settings that determine what is loaded from a folder or the hub.
SOURCE_SETTINGS = ("seed", "relevant", "template", "true", "false")
_LOADING = threading.RLock()  # two threads may need the same cross-encoder


class CrossEncoder:
    """A cross-encoder with one score: network, tokenizer and adapter, on a device and in a precision.

    Nothing is loaded before it is needed. A pickled cross-encoder carries its weights only if they can't be loaded
    again from a folder or the hub. For the arguments see `MonoCE`.
    """

    def __init__(
        self, model: str | Path | PreTrainedModel, *, adapter: Any = None, dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None, seed: int = 42, revision: str | None = None,
        trust_remote_code: bool = False, relevant: int | str | None = None, template: str | None = None,
        true: str | None = None, false: str | None = None,
    ) -> None:  # fmt: skip
        self._network: PreTrainedModel | None = None
        self.hub_name: str | None = None  # of the backbone
        self._prompt = check_prompt(template, true, false)
        if isinstance(model, PreTrainedModel):
            self.name = model.name_or_path or type(model).__name__
            self._network = as_single_score(model, relevant, self._prompt)
        elif isinstance(model, str | Path):
            self.name = os.path.expanduser(model)
            check_source(self.name)
            self.hub_name = None if Path(self.name).is_dir() else self.name
        else:
            raise ValueError(f"model must be a name, a folder or a PreTrainedModel; got {type(model).__name__}")
        if adapter is not None:
            adapters.check(adapter)
        resolve_dtype(dtype, resolve_device(None) if device is None else parse_device(device))
        self.adapter = adapter
        self.adapter_folder: str | None = None  # of a saved adapter
        self.requested_dtype = dtype
        self.requested_device = device
        self.seed = seed
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.relevant = relevant
        self.template, self.true, self.false = template, true, false
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._peft_model: Any = None  # wraps the network if there is an adapter
        self._head_is_new = False
        self.adapter_is_new = False  # whether the adapter is untrained
        self._draws_head = False  # whether loading the model again draws a new head
        self._is_callers = self._network is model  # whether the caller has the network, too
        self.was_in_memory = isinstance(model, PreTrainedModel)  # rather than in a folder or on the hub
        self._location = _absolute(self.name)
        record = ModelRecord.read(self._location)  # an empty one if the folder has none
        self._saved_before = record.fingerprint
        self.needs_first_stage = bool(record.settings.get("interpolate"))  # to score as the saved re-ranker did
        self.was_saved_untrained = False  # according to the record of a saved re-ranker
        self.saved_record: ModelRecord | None = None  # to compare with what is still to be loaded
        self._source: str | None = None  # folder or name to load the present weights from
        self._expected_fingerprint: str | None = None  # of weights still to be loaded
        self._int8: tuple[str, QuantizedNetwork] | None = None  # the fingerprint, and the quantized copy of the weights
        self.guard = TrainingGuard(self.name)
        self._has_checked_padding = False
        self._warned_encoders: frozenset[tuple[int, int | None]] = frozenset()  # whose truncated queries were reported

    @property
    def is_loaded(self) -> bool:
        """Whether the network is in memory."""
        return self._network is not None

    @property
    def width(self) -> int:
        """The dimensions of the hidden states. Loads the model."""
        config = self.network.config.get_text_config()
        return int(getattr(config, "hidden_size", None) or 768)

    @property
    def kind(self) -> Kind:
        """The kind of the model, which decides what other libraries can load it. Loads the model."""
        if isinstance(self.network, ModularNetwork):
            return "modular"
        if words_of(self.network) is None and self.network.config.num_labels > 1:
            return "several labels"
        return "one label" if prompt_of(self.network) is None else "prompt"

    @property
    def module_folders(self) -> list[str]:
        """The folders that `write` makes for the modules of a sentence-transformers CrossEncoder. Loads the model."""
        if isinstance(self.network, ModularNetwork):
            return self.network.files.folders[1:]
        return [] if words_of(self.network) is None else [f"1_{LOGIT_SCORE}"]

    @property
    def network(self) -> PreTrainedModel:
        """The network on its device. Loads the model."""
        return self._ensure_loaded()

    def _ensure_loaded(self) -> PreTrainedModel:
        is_pending = self._network is None or (self._peft_model is None and self.adapter is not None)
        with RANDOM_STATE if is_pending else contextlib.nullcontext(), _LOADING:
            return self._load()

    def _load(self) -> PreTrainedModel:
        if self._network is None:
            self._network, self._peft_model = self._read_source()
            self._source = self._location
        if self._peft_model is None and self.adapter is not None:
            self._own_network()
            self.adapter_is_new = True
            self._peft_model = adapters.add(
                self._network, self.adapter, base=self._location, revision=self.revision, seed=self.seed
            )
        if self._expected_fingerprint is not None:
            found = fingerprint_of(self._network, self._peft_model, self._tokenizer)
            if found != self._expected_fingerprint:
                self._network = self._peft_model = None
                expected = f"the weights and the tokenizer that were pickled, {self._expected_fingerprint}"
                raise ValueError(f"{self.name} must hold {expected}; got {found}. Pickle the re-ranker again")
            self._expected_fingerprint = None
        if self._network.device != self.device:
            self._network.to(self.device)
        return self._network

    def _own_network(self) -> None:
        """Copy a network that the caller has, too, before it changes."""
        if self._is_callers:
            self._network, self._is_callers = copy.deepcopy(self._network), False

    def _read_source(self) -> tuple[PreTrainedModel, Any]:
        network, self._tokenizer, self._head_is_new = load_model(
            self._location, seed=self.seed, revision=self.revision, trust_remote_code=self.trust_remote_code,
            relevant=self.relevant, prompt=self._prompt,
        )  # fmt: skip
        self._draws_head = self._head_is_new and self.adapter_folder is None
        peft_model, record = None, ModelRecord.read(self._location)
        if self._expected_fingerprint is None and record.fingerprint != self._saved_before:
            raise ValueError(
                f"{self.name} must hold the model that it held when this re-ranker was made; got one that was saved "
                "there since. Make the re-ranker again"
            )
        if self._head_is_new and record.fingerprint is not None and not record.head_is_new:
            raise missing_files(self.name, ["the weights of its trained head"])
        self._head_is_new |= self.was_saved_untrained or record.head_is_new
        if self.adapter_folder is not None:
            peft_model, self._head_is_new = adapters.load(network, self.adapter_folder), self.was_saved_untrained
        if self.saved_record is not None:
            found = fingerprint_of(network, peft_model, self._tokenizer)
            self.saved_record.check_fingerprint(found, self.name, self.adapter_folder)
            self.saved_record = None
        return network, peft_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The network's tokenizer. Loads the model."""
        network = self._ensure_loaded()
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(network, trust_remote_code=self.trust_remote_code)
        return self._tokenizer

    @property
    def has_adapter(self) -> bool:
        """Whether the network has an adapter. Loads the model."""
        self._ensure_loaded()
        return self._peft_model is not None

    @property
    def backbone_folder(self) -> Path | None:
        """The folder of an adapter's backbone; None without an adapter or for a backbone on the hub."""
        name = self._peft_model.active_peft_config.base_model_name_or_path if self.has_adapter else None
        return Path(name) if name is not None and Path(name).is_dir() else None

    def require_saved_backbone(self) -> None:
        """Raise a ValueError if the model has an adapter on a backbone that was passed in memory."""
        if self.was_in_memory and self.has_adapter:
            raise ValueError(
                "model must be a folder or a name on the hub to save its adapter alone; got one in memory, which can't "
                "be loaded again. Save the model to a folder and pass that, or merge the adapter"
            )

    @property
    def head_is_new(self) -> bool:
        """Whether the head has random weights, so that scores mean nothing. Loads the model."""
        self._ensure_loaded()
        return self._head_is_new

    @head_is_new.setter
    def head_is_new(self, value: bool) -> None:
        self._head_is_new = value

    @property
    def device(self) -> torch.device:
        """The device to compute on."""
        return resolve_device(self.requested_device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision to score in."""
        return resolve_dtype(self.requested_dtype, self.device)

    @property
    def training_dtype(self) -> torch.dtype:
        """The precision to train in."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype

    @property
    def fingerprint(self) -> str:
        """A digest of weights and tokenizer, see `fingerprint_of`. Computed at each access, since both may change."""
        return fingerprint_of(self.network, self._peft_model, self.tokenizer)

    def pair_encoder(self, *, max_length: int, max_query_length: int | None = None, passages: int = 1) -> PairEncoder:
        """Return an encoder of pairs; a ValueError if the model has fewer positions than `max_length`."""
        limit = token_limit(self.network, self.tokenizer)
        if max_length > limit:
            raise ValueError(f"max_length must be at most {limit}, the positions of {self.name}; got {max_length}")
        prompt = prompt_of(self.network)
        if prompt is None:
            return PairEncoder(self.tokenizer, max_length, max_query_length, passages)
        return PromptEncoder(self.tokenizer, max_length, max_query_length, passages, prompt=prompt)

    def score(
        self, encoder: PairEncoder, queries: Sequence[Any], texts: Sequence[Any], *, batch_size: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Score pairs, see `score_pairs`. Truncated queries are reported once for each setting of the lengths.

        Raises:
            ValueError: If a score isn't finite.
            RuntimeError: If another thread trains this cross-encoder meanwhile.
        """
        with self.guard.scoring():
            self._warn_of_truncated_queries(encoder, queries, texts)
            if batch_size != 1:
                self.warn_of_read_padding(encoder)
            dtype = self.dtype
            network = self._quantized(encoder) if dtype == torch.int8 else self.network
            scores = score_pairs(
                network, encoder, queries, texts, dtype=dtype, batch_size=batch_size, progress=progress
            )
        if bad := int(np.sum(~np.isfinite(scores))):
            raise ValueError(f"scores must be finite; {bad:,} of {len(scores):,} aren't. Check the model's weights")
        return scores

    def _warn_of_truncated_queries(self, encoder: PairEncoder, queries: Sequence[Any], texts: Sequence[Any]) -> None:
        lengths = encoder.max_length, encoder.max_query_length
        if lengths in self._warned_encoders:
            return
        is_truncated = encoder.truncates_query(queries, texts)
        if not is_truncated.any():
            return
        self._warned_encoders |= {lengths}
        limit = f"max_length={lengths[0]}" if lengths[1] is None else f"max_query_length={lengths[1]}"
        # A query is truncated if it is beside any of its documents' texts.
        truncated = {str(query) for query, cut in zip(queries, is_truncated, strict=True) if cut}
        total = len({*map(str, queries)})
        warn_of_data(f"{len(truncated):,} of {total:,} distinct queries to score are truncated: they exceed {limit}")

    def warn_of_read_padding(self, encoder: PairEncoder) -> None:
        """Warn, once, if a pair has another score beside a longer one, to whose length it is padded."""
        if self._has_checked_padding or scores_first_token(self.network):  # whose classes are known not to read it
            return
        self._has_checked_padding = True
        texts = ["text", "text " * 16]
        alone, beside = (
            score_pairs(self.network, encoder, ["query"] * n, texts[:n], dtype=torch.float32, batch_size=n)[0]
            for n in (1, 2)
        )
        if not np.isclose(alone, beside, rtol=1e-4, atol=1e-5, equal_nan=True):
            warn(
                f"a pair's score depends on the other pairs in its batch: {type(self.network).__name__} reads padding. "
                "Score with batch_size=1, or choose another model"
            )

    def clone(self, *, with_weights: bool = True) -> Self:
        """Copy the cross-encoder; without weights, the copy loads them again."""
        self.guard.check()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)  # copy.copy would use __getstate__
        # In one call, since the two share modules.
        weights = (self._network, self._peft_model) if with_weights else (None, None)
        other._network, other._peft_model = copy.deepcopy(weights)
        other._is_callers, other.guard = False, TrainingGuard(self.name)
        return other

    def reseeded(self, seed: int) -> Self:
        """Copy the cross-encoder with another seed: new weights get other random values; trained weights stay.

        Raises:
            ValueError: If the new head was saved in a folder, which has its values.
        """
        if self.head_is_new and not self._draws_head:
            raise ValueError(
                f"seeds need a head that is drawn anew; got the one that was saved untrained in {self.name!r}. Start "
                "from the model that it was made of"
            )
        if self.adapter_is_new and (self._source is None or self.adapter_folder is not None):
            raise ValueError(
                "seeds need an adapter that is drawn anew; got one of a loaded model, or one that was saved untrained. "
                "Start from the name or the folder of its backbone"
            )
        if self.was_in_memory and not self.adapter_is_new:
            warn("a model in memory starts with the same head for each seed. Pass its folder or name to draw a new one")
        other = self.clone(with_weights=not (self.head_is_new or self.adapter_is_new))
        other.seed = seed
        return other

    def take_weights(self, other: "CrossEncoder") -> None:
        """Share the weights of another cross-encoder; keep this one's settings."""
        self._network, self._tokenizer, self._peft_model = other.network, other.tokenizer, other._peft_model
        self._is_callers = False
        # With other settings, loading the source again would give another model, e.g. other random weights.
        is_same = all(getattr(self, name) == getattr(other, name) for name in SOURCE_SETTINGS)
        self._source = other._source if is_same else None
        self.adapter_folder, self._head_is_new, self.saved_record = other.adapter_folder, other._head_is_new, None

    def prepare_training(self) -> None:
        """Record that the weights are no longer those on disk, and don't change a network that the caller has."""
        self._source, self.adapter_is_new = None, False
        self._own_network()

    def mark_saved(self, folder: Path) -> None:
        """Record that the weights can be loaded from a folder, so that a pickle needn't contain them."""
        if not self.has_adapter and self.relevant is None:
            self._source, self.was_saved_untrained = _absolute(str(folder)), False  # the folder has its own record

    def write(self, folder: Path, *, max_length: int, merged: bool) -> str:
        """Write weights and tokenizer into a folder and return the fingerprint of what was written.

        The format is that of transformers or, for an adapter that isn't merged, of peft.
        """
        self.guard.check()
        network, peft_model = self.network, self._peft_model
        if peft_model is not None and merged:
            network, peft_model = adapters.merge(peft_model), None
        # sentence-transformers applies a sigmoid to a single label unless it is told not to.
        activation = {"activation_fn": IDENTITY}
        network.config.sentence_transformers = {**getattr(network.config, "sentence_transformers", {}), **activation}
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = max_length  # where sentence-transformers truncates
        if peft_model is None:
            # sentence-transformers would also apply an ordinary chat template.
            prompt = prompt_of(network)
            tokenizer.chat_template = None if prompt is None else prompt.chat_template
            if prompt is not None:
                prompt.write(folder, words_of(network))
        with quiet_transformers():
            if peft_model is not None:
                peft_model.save_pretrained(folder, save_embedding_layers=False)
            else:
                network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return fingerprint_of(network, peft_model, tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        self.guard.check()
        state = {**self.__dict__, "_int8": None, "guard": TrainingGuard(self.name)}
        if self._network is None:
            return state
        fingerprint = self.fingerprint
        if self._source is not None and _holds(self._source, fingerprint):
            to_load = {"_network": None, "_peft_model": None, "_tokenizer": None, "_expected_fingerprint": fingerprint}
            return {**state, **to_load, "name": self._source, "_location": self._source}
        network, peft_model = self._network, self._peft_model
        if network.device.type != "cpu":  # the other process may have no such device
            network, peft_model = copy.deepcopy((network, peft_model))
            network.cpu()
        return {**state, "_tokenizer": self.tokenizer, "_network": network, "_peft_model": peft_model}

    def _quantized(self, encoder: PairEncoder) -> QuantizedNetwork:
        fingerprint = self.fingerprint
        with _LOADING:
            if self._int8 is None or self._int8[0] != fingerprint:
                network = adapters.merge(self._peft_model) if self.has_adapter else self.network
                self._int8 = fingerprint, QuantizedNetwork(network, encoder)
            return self._int8[1]


def _absolute(name: str) -> str:
    """Make a folder's path absolute, as the working directory may change; leave a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _holds(source: str, fingerprint: str) -> bool:
    """Whether a folder still has the weights with a fingerprint, as far as its record tells; the hub does."""
    is_there = Path(source).is_dir() or not Path(source).is_absolute()
    return is_there and ModelRecord.read(source).fingerprint in {None, fingerprint}
