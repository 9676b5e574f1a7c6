"""Prompts: a pair in a text of its own, and the words that answer whether it is relevant."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from pyterrier_msft.model.files import read_json, write_json
from pyterrier_msft.model.modular import CrossEncoderFiles

QUERY, TEXT = "{query}", "{text}"
LOGIT_SCORE = "LogitScore"  # the module of sentence-transformers that scores with the probability of a word
# Stand for query and text while a chat template is read.
MARKERS = {QUERY: "\ue000query\ue001", TEXT: "\ue000text\ue001"}
# Arguments of a tokenizer in the settings of a chat template, and one of sentence-transformers'.
OTHER_ARGUMENTS = {"max_length", "padding", "restore_suffix", "return_tensors", "truncation"}


@dataclass(frozen=True)
class Prompt:
    """A template, and the words whose logits are compared after it.

    Attributes:
        template: A text with `{query}` and `{text}`, and special tokens where the model needs them.
        true: The word that means *relevant*, or its id.
        false: The word that means the opposite. None: the score is the logit of `true` alone.
    """

    template: str
    true: str | int = "yes"
    false: str | int | None = "no"

    def __post_init__(self) -> None:
        if not isinstance(self.template, str) or any(self.template.count(part) != 1 for part in (QUERY, TEXT)):
            raise ValueError(f"template must be a string with one {QUERY} and one {TEXT}; got {self.template!r}")
        for name, word in (("true", self.true), ("false", self.false)):
            is_optional = name == "false" and word is None
            if not is_optional and (word == "" or not isinstance(word, str | int)):
                raise ValueError(f"{name} must be a word; got {word!r}")
        if self.true == self.false:
            raise ValueError(f"true and false must be different words; got {self.true!r} twice")

    @classmethod
    def read(
        cls, name: str, revision: str | None, files: CrossEncoderFiles, tokenizer: PreTrainedTokenizerBase
    ) -> Self:
        """Read the prompt of a sentence-transformers CrossEncoder, whose template is a chat template.

        Raises:
            ValueError: If the template can't be read as a text with a query and a document in it.
        """
        message = (files.transformer.get("modality_config") or {}).get("message")
        if message is None or not tokenizer.chat_template:
            raise ValueError("its configuration has no chat template for pairs. Pass template= to MonoCE")
        chat = (files.transformer.get("processing_kwargs") or {}).get("chat_template") or {}
        options = {key: value for key, value in chat.items() if key not in OTHER_ARGUMENTS}
        system = (files.settings.get("prompts") or {}).get(files.settings.get("default_prompt_name"))
        contents = [("query", MARKERS[QUERY]), ("document", MARKERS[TEXT])]
        if system:
            contents.insert(0, ("system", system))
        formats = {"flat": [False], "structured": [True]}.get(message.get("format"), [False, True])
        rendered = [_render(tokenizer, contents, options, is_structured=structured) for structured in formats]
        found = [text for text in rendered if text is not None and all(text.count(m) == 1 for m in MARKERS.values())]
        if not found:
            raise ValueError("its chat template doesn't have a query and a document once. Pass template= to MonoCE")
        template = found[0]
        for part, marker in MARKERS.items():
            template = template.replace(marker, part)
        if LOGIT_SCORE not in files.kinds:
            return cls(template)
        words = read_json(name, f"{files.modules[-1]['path']}/config.json", revision)
        return cls(template, words["true_token_id"], words.get("false_token_id"))

    def write(self, folder: Path, words: tuple[int, ...] | None) -> None:
        """Write the files of a CrossEncoder around a saved model: with a LogitScore if the score is that of words."""
        task = "sequence-classification" if words is None else "text-generation"
        output = {"method": "forward", "method_output_name": "logits"}
        modules = ["base.modules.transformer.Transformer"]
        if words is not None:
            modules.append(f"cross_encoder.modules.logit_score.{LOGIT_SCORE}")
        files = CrossEncoderFiles(
            [{"idx": i, "name": str(i), "type": f"sentence_transformers.{kind}"} for i, kind in enumerate(modules)],
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
        if (true, false) != (Prompt.true, Prompt.false):
            raise ValueError(f"template is required with true={true!r}, false={false!r}; got None")
        return None
    return Prompt(template, true, false)


def _render(
    tokenizer: PreTrainedTokenizerBase, contents: list[tuple[str, str]], options: Mapping[str, Any], *,
    is_structured: bool,
) -> str | None:  # fmt: skip
    """Render a chat; None if the template fails, e.g. because it expects contents in the other form."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if is_structured else content}
        for role, content in contents
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # of any kind: the template is a program
        return None


def _message(role: str) -> str:
    return f'(messages | selectattr("role", "equalto", "{role}") | first).content'


def _literal(text: str) -> str:
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'
