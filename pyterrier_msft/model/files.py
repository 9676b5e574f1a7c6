"""Files of a model, in its folder or on the Hugging Face hub, and those of a sentence-transformers CrossEncoder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
CROSS_ENCODER_FILES = (MODULES, SETTINGS, TRANSFORMER)
PACKAGE = "sentence_transformers."
LOGIT_SCORE = "LogitScore"  # the module that scores with the probability of a word
OLD_MODULES = f"{PACKAGE}models."  # the package of all modules before version 5.4, which no CrossEncoder had
IDENTITY = "torch.nn.modules.linear.Identity"
# Arguments of a tokenizer that don't affect the tokens of a pair that isn't truncated.
FORMAT_ARGUMENTS = {"logits_to_keep", "max_length", "padding", "restore_suffix", "return_tensors", "truncation"}


class MissingFilesError(ValueError):
    """Files of a model are missing, in its folder or in the hub's cache."""


def missing_files(name: str, files: Sequence[str], revision: str | None = None, *, advice: str = "") -> ValueError:
    """Return the error for files that a model should have; its message says what to do, and ends with `advice`."""
    found = f"model must have all its files; got {name!r} without {', '.join(files)}"
    if not any(is_unknown(name, file, revision) for file in files):
        return MissingFilesError(f"{found}. Copy the model again from where it was saved{advice}")
    version = "" if revision is None else f" --revision {revision}"
    return MissingFilesError(
        f"{found} in the hub's cache, and no connection. Download all of it while connected: hf download {name}"
        f"{version}{advice}"
    )


def is_unknown(name: str, file: str, revision: str | None = None) -> bool:
    """Whether only the hub could tell if a model has a file: the cache knows neither the file nor that there is none.

    A snapshot with `.gitattributes`, which every repository has, was downloaded as a whole.
    """
    if Path(name).is_dir():
        return False
    found = [try_to_load_from_cache(name, each, revision=revision) for each in (file, ".gitattributes")]
    return found[0] is None and not isinstance(found[1], str)


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a model's file, downloaded if the model is on the hub; None if there is no such file.

    Offline, a file that isn't in the hub's cache counts as missing. Without a connection otherwise, it is an error.
    """
    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError:
        if is_unknown(name, file, revision) and not constants.HF_HUB_OFFLINE:
            raise
        return None
    except EntryNotFoundError:
        return None


def read_json(name: str, file: str, revision: str | None = None) -> Any:
    """Read a model's JSON file; an empty dictionary if there is none."""
    path = find_file(name, file, revision)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class CrossEncoderFiles:
    """What the files of a sentence-transformers CrossEncoder configure."""

    modules: Sequence[Mapping[str, Any]]  # each with its class ("type") and folder ("path"), in order
    transformer: Mapping[str, Any]  # how the first module computes its output
    settings: Mapping[str, Any]  # of the whole model

    @classmethod
    def read(cls, name: str, revision: str | None) -> Self | None:
        """Read the files of a model; None if it isn't a CrossEncoder with such files.

        Raises:
            MissingFilesError: If it may be one, but only a part of it is in the hub's cache, without a connection.
        """
        modules = read_json(name, MODULES, revision)
        if not modules:
            return None
        settings = read_json(name, SETTINGS, revision)
        is_old = all(str(module.get("type")).startswith(OLD_MODULES) for module in modules)
        if not settings and not is_old and is_unknown(name, SETTINGS, revision):
            raise missing_files(name, [SETTINGS], revision)
        # Bi-encoders have modules too. Without their head, they are backbones.
        if settings.get("model_type") != "CrossEncoder":
            return None
        transformer = read_json(name, TRANSFORMER, revision)
        if not transformer and is_unknown(name, TRANSFORMER, revision):
            raise missing_files(name, [TRANSFORMER], revision)
        return cls(modules, transformer, settings)

    @property
    def module_names(self) -> list[str]:
        """The modules' classes; without their package if that is sentence-transformers."""
        types = [str(module.get("type")) for module in self.modules]
        return [name.rpartition(".")[2] if name.startswith(PACKAGE) else name for name in types]

    @property
    def has_prompt(self) -> bool:
        """Whether pairs are read in a chat template, as in all decoders."""
        return LOGIT_SCORE in self.module_names or "message" in (self.transformer.get("modality_config") or {})

    @property
    def default_prompt(self) -> str | None:
        """The text before queries or, in a chat template, the message of the system."""
        return (self.settings.get("prompts") or {}).get(self.settings.get("default_prompt_name"))

    @property
    def folders(self) -> list[str]:
        """The modules' folders as they are written; the first module is in the model's own."""
        return ["", *(f"{number}_{name}" for number, name in enumerate(self.module_names[1:], 1))]

    def check(self, task: str, *, has_prompt: bool) -> None:
        """Raise a ValueError unless the first module computes what a task of transformers does, for a pair as it is.

        With `has_prompt`, the pair is in a prompt.
        """
        names, transformer = self.module_names, self.transformer
        if names[0] != "Transformer":
            raise ValueError(f"its first module must be Transformer, not {names[0]}")
        if LOGIT_SCORE in names and len(names) > 2:
            raise ValueError(f"its modules must be Transformer and {LOGIT_SCORE}, not {', '.join(names)}")
        modalities = transformer.get("modality_config") or {}
        modality = modalities.get("message" if has_prompt and "message" in modalities else "text") or {}
        output = "last_hidden_state" if task == "feature-extraction" else "logits"
        processing = transformer.get("processing_kwargs") or {}
        arguments = {key for part in ("common", "text") for key in processing.get(part) or {}}
        unsupported = {
            "transformer_task": transformer.get("transformer_task", task) != task,
            "modality_config": ("message" in modalities and not has_prompt)
            or modality.get("method_output_name", output) not in (output, [output]),
            "do_lower_case": transformer.get("do_lower_case", False),
            "processing_kwargs": arguments - FORMAT_ARGUMENTS,
            "tokenizer_name_or_path": transformer.get("tokenizer_name_or_path"),
        }
        others = {key: value for key, value in transformer.items() if key.endswith(("_args", "_kwargs"))}
        if found := [name for name, is_unsupported in {**others, **unsupported}.items() if is_unsupported]:
            raise ValueError(f"its {TRANSFORMER} sets {found[0]} to {transformer[found[0]]!r}")
        if self.default_prompt and not has_prompt:
            raise ValueError(f"it puts the prompt {self.default_prompt!r} before queries")

    def write(self, folder: Path) -> None:
        """Write the files, with scores that aren't passed through an activation function.

        The tokenizer alone limits the number of tokens.
        """
        write_json(
            folder / MODULES,
            [{**module, "path": path} for module, path in zip(self.modules, self.folders, strict=True)],
        )
        transformer = {key: value for key, value in self.transformer.items() if key != "max_seq_length"}
        if processing := transformer.get("processing_kwargs"):
            transformer["processing_kwargs"] = {
                part: {key: value for key, value in (arguments or {}).items() if key != "max_length"}
                for part, arguments in processing.items()
            }
        write_json(folder / TRANSFORMER, transformer)
        write_json(folder / SETTINGS, {**self.settings, "activation_fn": IDENTITY})
