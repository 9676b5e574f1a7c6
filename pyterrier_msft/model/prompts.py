"""Prompts: a pair in a text of its own, and the words that answer whether it is relevant."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from pyterrier_msft.model.files import (
    FORMAT_ARGUMENTS,
    LOGIT_SCORE,
    PACKAGE,
    CrossEncoderFiles,
    is_unknown,
    missing_files,
    read_json,
    write_json,
)
from pyterrier_msft.notices import first_line

QUERY, TEXT = "{query}", "{text}"
CHAT_TEMPLATE = "chat_template.jinja"
# Stand for query and text while a chat template is read.
MARKERS = {QUERY: "\ue000query\ue001", TEXT: "\ue000text\ue001"}
# A pair that a chat template must not change, e.g. strip, cut or escape.
PROBES = {QUERY: " \nA b <&'\"> " * 1000, TEXT: "\tC d <&'\"> \n" * 3000}


@dataclass(frozen=True)
class Prompt:
    """A template, and the words whose logits are compared after it.

    Attributes:
        template: A text with `{query}` and `{text}`, and special tokens where the model needs them.
        true: The word that means *relevant*, or its id. None: no words are given.
        false: The word that means the opposite, or its id. None: the score is the logit of `true` alone.
    """

    template: str
    true: str | int | None = None
    false: str | int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.template, str) or any(self.template.count(part) != 1 for part in (QUERY, TEXT)):
            raise ValueError(f"template must be a string with one {QUERY} and one {TEXT}; got {self.template!r}")

    @classmethod
    def read(
        cls, name: str, revision: str | None, files: CrossEncoderFiles, tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
    ) -> Self:  # fmt: skip
        """Read the prompt of a sentence-transformers CrossEncoder: its chat template, and the words of its LogitScore.

        With `template`, read the words only.

        Raises:
            ValueError: If the chat template can't be read as a text with a query and a document in it.
        """
        if template is None:
            if not tokenizer.chat_template and is_unknown(name, CHAT_TEMPLATE, revision):
                raise missing_files(name, [CHAT_TEMPLATE], revision)
            template = _read_template(files, tokenizer)
        if LOGIT_SCORE not in files.module_names:
            return cls(template)
        file = f"{files.modules[-1]['path']}/config.json"
        words = read_json(name, file, revision)
        if not words:
            raise missing_files(name, [file], revision)
        true, false = words.get("true_token_id"), words.get("false_token_id")
        for word in (true, *([] if false is None else [false])):
            if type(word) is not int or not 0 <= word < len(tokenizer):
                raise ValueError(f"its {file} must have token ids below {len(tokenizer)}, not {word!r}")
        return cls(template, true, false)

    def write(self, folder: Path, words: tuple[int, ...] | None) -> None:
        """Write the files of a CrossEncoder around a saved model: with a LogitScore if the score is that of words."""
        task = "sequence-classification" if words is None else "text-generation"
        output = {"method": "forward", "method_output_name": "logits"}
        modules = ["base.modules.transformer.Transformer"]
        if words is not None:
            modules.append(f"cross_encoder.modules.logit_score.{LOGIT_SCORE}")
        files = CrossEncoderFiles(
            [{"idx": i, "name": str(i), "type": f"{PACKAGE}{kind}"} for i, kind in enumerate(modules)],
            {
                "transformer_task": task,
                "modality_config": {"text": output, "message": {**output, "format": "flat"}},
                "module_output_name": "scores" if words is None else "causal_logits",
            },
            {"model_type": "CrossEncoder", "__version__": {}, "prompts": {}, "default_prompt_name": None},
        )
        files.write(folder)
        if words is not None:
            false = words[1] if len(words) > 1 else None
            config = {"true_token_id": words[0], "false_token_id": false, "module_input_name": "causal_logits"}
            write_json(folder / files.folders[1] / "config.json", config)

    @property
    def chat_template(self) -> str:
        """The template in Jinja, for messages of the roles "query" and "document"."""
        parts = {QUERY: _message("query"), TEXT: _message("document")}
        expressions = [parts.get(piece) or _literal(piece) for piece in self.pieces if piece]
        return "{{ " + " ~ ".join(expressions) + " }}"

    @property
    def pieces(self) -> tuple[str, str, str, str, str]:
        """The template's pieces: literal, `{query}` or `{text}`, literal, the other, literal."""
        first, second = sorted((QUERY, TEXT), key=self.template.index)
        start, _, rest = self.template.partition(first)
        middle, _, end = rest.partition(second)
        return start, first, middle, second, end


def check_prompt(template: Any, true: Any, false: Any) -> Prompt | None:
    """Return the prompt of MonoCE's arguments; None without a template. A ValueError says what is wrong."""
    if template is None:
        if (true, false) != (None, None):
            raise ValueError(f"template is required with true={true!r}, false={false!r}; got None")
        return None
    for name, word in (("true", true), ("false", false)):
        if word is not None and (not isinstance(word, str) or not word):
            raise ValueError(f"{name} must be a word or None; got {word!r}")
    if true is None and false is not None:
        raise ValueError(f"true is required with false={false!r}; got None")
    if true is not None and true == false:
        raise ValueError(f"true and false must be different words; got {true!r} twice")
    return Prompt(template, true, false)


def _read_template(files: CrossEncoderFiles, tokenizer: PreTrainedTokenizerBase) -> str:
    """Turn the chat template of a CrossEncoder into a text with `{query}` and `{text}`."""
    message = (files.transformer.get("modality_config") or {}).get("message")
    if message is None or not tokenizer.chat_template:
        raise ValueError("its configuration has no chat template for pairs. Pass template= to MonoCE")
    chat = (files.transformer.get("processing_kwargs") or {}).get("chat_template") or {}
    options = {key: value for key, value in chat.items() if key not in FORMAT_ARGUMENTS}
    formats = {"flat": [False], "structured": [True]}.get(message.get("format"), [False, True])
    problem = "doesn't have a query and a document once"
    for is_structured in formats:
        render = partial(_render, tokenizer, files.default_prompt, options=options, is_structured=is_structured)
        try:
            template, probe = render(MARKERS), render(PROBES)
        except Exception as error:  # of any kind: the template is a program, and may expect contents in the other form
            problem = f"fails: {first_line(error)}"
            continue
        if all(template.count(marker) == 1 for marker in MARKERS.values()):
            for part, marker in MARKERS.items():
                template = template.replace(marker, part)
            if template.replace(QUERY, PROBES[QUERY]).replace(TEXT, PROBES[TEXT]) == probe:
                return template
            problem = "changes the text"
            break
    raise ValueError(f"its chat template {problem}. Pass template= to MonoCE")


def _render(
    tokenizer: PreTrainedTokenizerBase, system: str | None, pair: Mapping[str, str], *, options: Mapping[str, Any],
    is_structured: bool,
) -> str:  # fmt: skip
    """Render a pair in a chat template."""
    contents = {"system": system, "query": pair[QUERY], "document": pair[TEXT]}
    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if is_structured else content}
        for role, content in contents.items()
        if content
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _message(role: str) -> str:
    return f'(messages | selectattr("role", "equalto", "{role}") | first).content'


def _literal(text: str) -> str:
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'
