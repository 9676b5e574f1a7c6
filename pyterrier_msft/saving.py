"""Save a re-ranker to a folder or the Hugging Face hub, and load it again."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

import pandas as pd
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from pyterrier_msft.calibration import Calibration
from pyterrier_msft.model import adapters, hub, storage
from pyterrier_msft.model.card import model_card
from pyterrier_msft.model.cross_encoder import SOURCE_SETTINGS, CrossEncoder
from pyterrier_msft.model.files import MODULES
from pyterrier_msft.model.fingerprint import FINGERPRINT_VERSION
from pyterrier_msft.model.record import RECORD, ModelRecord, StageRecord, card_digest, library_versions
from pyterrier_msft.training import distributed

# `pt.Artifact` reads this to find `MonoCE.load`, through the entry point "cross_encoder.hf" in setup.py.
ARTIFACT = {"type": "cross_encoder", "format": "hf", "package_hint": "pyterrier-msft"}

# Arguments of the re-ranker that a model's record holds and `load` restores. The seed is one of them, as weights that
# neither the backbone nor an adapter's folder has, e.g. a pooler's, are drawn again.
SAVED_SETTINGS = ("text_field", "max_length", "max_query_length", "interpolate", "passages", *SOURCE_SETTINGS)


class SavingMixin:
    """The methods of a re-ranker that write and read models."""

    cross_encoder: CrossEncoder
    stages: list[StageRecord]
    calibration: Calibration | None

    def save(
        self, path: str | Path, *, merged: bool = True, license: str | None = None, metrics: pd.DataFrame | None = None,
        **card: Any,
    ) -> None:  # fmt: skip
        """Write the model as an ordinary Hugging Face folder, with a model card and a record of its training.

        An existing model is replaced; other files in the folder are kept.

        Args:
            path: The folder.
            merged: Whether to merge an adapter into the weights. False: the folder holds the adapter only, which
                `MonoCE.load` and peft add to the backbone. No effect without an adapter.
            license: For the card, the license's identifier on the hub, e.g. "apache-2.0".
            metrics: For the card, a table, e.g. the result of `pt.Experiment`.
            **card: Other fields of `huggingface_hub.ModelCardData`, e.g. `language="en"`.

        Raises:
            ValueError: If `path` is a file, or a folder with files but no model; with `merged=False`, if the adapter's
                backbone was passed in memory, because no folder has it.
        """
        folder = Path(path).expanduser().absolute()
        if not merged:
            self.cross_encoder.require_saved_backbone()
        backbone = None if merged else self.cross_encoder.backbone_folder
        if backbone is not None and backbone.resolve() == folder.resolve():
            raise ValueError(f"path must be another folder than that of the adapter's backbone; got {str(folder)!r}")
        if distributed.rank() == 0:
            storage.check_target(folder, self.cross_encoder.module_folders if merged else [])
            with storage.replace_model(folder) as partial:
                self._write(partial, name=folder.name, merged=merged, license=license, metrics=metrics, **card)
            self.cross_encoder.mark_saved(folder)

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, merged: bool = True, license: str | None = None,
        metrics: pd.DataFrame | None = None, token: str | None = None, **card: Any,
    ) -> str:  # fmt: skip
        """Publish what `save` writes as a model on the Hugging Face hub.

        Args:
            repo: The repository, e.g. "user/model". It is created if needed; an existing model is replaced, and other
                files are kept. A README.md that isn't a card as this package wrote it becomes README.old.md.
            private: Whether a new repository is private. None: the hub's default.
            merged: See `save`.
            license: See `save`.
            metrics: See `save`.
            token: A token for the hub. None: that of `hf auth login`.
            **card: See `save`.

        Returns:
            The commit's URL. With several processes, rank 0 publishes; the others return the model's URL at once.
        """
        api = HfApi(token=token)
        if not merged:
            self.cross_encoder.require_saved_backbone()
        if distributed.rank() != 0:
            return f"{api.endpoint}/{repo}"
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory(prefix="pyterrier_msft_") as folder:
            self._write(Path(folder), name=repo, merged=merged, license=license, metrics=metrics, **card)
            message = f"{len(self.stages)} stages, weights {self.cross_encoder.fingerprint}"
            old = [*storage.MODEL_FILES]
            with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):  # the old model has no modules
                old += storage.module_files(Path(api.hf_hub_download(repo, MODULES)).parent)
            with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):  # the hub has no card
                there = Path(api.hf_hub_download(repo, "README.md"))
                with contextlib.suppress(EntryNotFoundError):
                    api.hf_hub_download(repo, RECORD)  # into the same folder
                if not storage.is_unchanged(there):
                    shutil.copy(there, Path(folder) / "README.old.md")
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=old)
        return str(commit.commit_url)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """Load a re-ranker that `save` or `push_to_hub` wrote: its weights, settings and history.

        `MonoCE(path)`, in contrast, loads only the weights, with new settings and no history. For cross-encoders that
        others published, both load only the weights.

        The weights are loaded when they are first needed. A warning then says if they aren't those that were saved.

        Args:
            path: A folder, or a name on the Hugging Face hub.
            **settings: Arguments of `MonoCE` to use instead of the saved ones, e.g. `device="cpu"`.

        Raises:
            ValueError: If there is no such model or, when the weights are loaded, if the backbone of an adapter isn't
                the one that it was trained on.
        """
        name = os.path.expanduser(path)
        folder = Path(name)
        if not folder.is_dir():
            storage.check_source(name)
            folder = hub.fetch(name, revision=settings.get("revision"), files=[RECORD, "adapter*"])
        storage.finish_save(folder)
        record = ModelRecord.read(folder)
        # Only what `save` writes: a record from the hub must not enable trust_remote_code.
        saved = {key: value for key, value in record.settings.items() if key in SAVED_SETTINGS}
        if saved.get("template") is None:  # older records have the words' defaults
            saved |= {"true": None, "false": None}
        is_same_source = all(saved.get(key) == value for key, value in settings.items() if key in SOURCE_SETTINGS)
        settings = saved | settings
        adapter_folder = None
        if adapters.is_adapter(folder, name, settings.get("revision")):
            adapter_folder = str(folder.absolute())
            if settings.get("adapter") is not None:
                raise ValueError(
                    f"adapter must be None for {name!r}, which holds an adapter; got a new one. Merge it first"
                )
            name, settings["revision"] = adapters.backbone_of(folder)
        loaded = cls(name, **settings)  # type: ignore[call-arg]
        loaded.cross_encoder.adapter_folder = adapter_folder
        loaded.cross_encoder.was_saved_untrained = record.head_is_new
        loaded.cross_encoder.needs_first_stage = False  # the settings say how to score
        loaded.cross_encoder.adapter_is_new = adapter_folder is not None and not record.stages
        if (folder / RECORD).is_file():  # without a record, the model itself is the base of what is trained from it
            loaded.cross_encoder.hub_name = record.base
        loaded.stages = record.stages
        can_compare = record.fingerprint is not None and record.fingerprint_version == FINGERPRINT_VERSION
        if can_compare and is_same_source:
            loaded.cross_encoder.saved_record = dataclasses.replace(record, stages=[])
        if record.calibration is not None and record.calibration.get("fingerprint") == record.fingerprint:
            known = {} if can_compare else {"fingerprint": None}
            loaded.calibration = Calibration.from_dict({**record.calibration, **known})
        return loaded

    def _write(self, folder: Path, *, merged: bool, **card: Any) -> None:
        model, settings = self.cross_encoder, {name: getattr(self, name) for name in SAVED_SETTINGS}
        is_adapter = model.has_adapter and not merged
        if model.kind != "several labels" and not is_adapter:
            settings["relevant"] = None  # two labels have become one
        fingerprint = model.write(folder, max_length=settings["max_length"], merged=merged)
        record = ModelRecord(
            settings, model.hub_name, model.head_is_new, fingerprint, self.stages, library_versions(),
            fingerprint_version=FINGERPRINT_VERSION,
        )  # fmt: skip
        if self.calibration is not None and self.calibration.fingerprint in {None, model.fingerprint}:
            # A merged adapter has another fingerprint, but the same scores.
            record.calibration = {**dataclasses.asdict(self.calibration), "fingerprint": fingerprint}
        (folder / storage.FIRST).write_text(json.dumps(ARTIFACT))
        card_text = model_card(record, is_adapter=is_adapter, kind=model.kind, **card)
        (folder / "README.md").write_text(card_text, encoding="utf-8")
        record.card = card_digest(card_text)
        record.write(folder)  # last: it marks the save as complete, see finish_save
