"""Decoders that score a pair with the logits of words after its prompt."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyterrier_msft.model.precision import linear_in_float32
from pyterrier_msft.model.prompts import Prompt

WORDS = "yes", "no"  # of a prompt without words


class WordLayer(nn.Linear):
    """A language model's last layer, for some words only: their logits, in float32 also in mixed precision.

    The difference of two logits in half precision would have few distinct values.
    """

    words: tuple[int, ...]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Compute the words' logits, [..., words]."""
        rows = [*self.words]
        return linear_in_float32(states, self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class WordScore:
    """A hook on a decoder's forward pass: replaces the logits with the score of each pair, [pairs, 1]."""

    words: tuple[int, ...]  # the one that means relevant, and maybe one that means the opposite

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Subtract the logits at the last token; pairs are padded on the left."""
        logits = output.logits[:, -1].float()
        output.logits = logits[:, :1] - logits[:, 1:] if len(self.words) > 1 else logits
        return output


def set_positions(module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count positions from the first token that isn't padding, so that a pair's score doesn't depend on its batch.

    Only the last token's logits are computed.
    """
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    known = inspect.signature(type(module).forward).parameters
    added = {"position_ids": positions, "use_cache": False, "logits_to_keep": 1}
    return args, {**{name: value for name, value in added.items() if name in known}, **inputs}


def set_prompt(model: PreTrainedModel, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Make a model read pairs in a prompt; one that generates text then has a single score, that of the prompt's words.

    Its weights stay as they are, so that it is saved as the language model that it was.
    """
    model.prompt = prompt
    layer = model.get_output_embeddings()
    if layer is None or tokenizer is None:  # a classifier
        if prompt.true is not None:
            raise ValueError(
                f"true and false are for a model that generates text; got {prompt.true!r} and {prompt.false!r} with "
                f"{type(model).__name__}"
            )
        return
    if type(layer) is not nn.Linear:
        raise ValueError(f"model must end in a linear layer with a row for each token; got {type(model).__name__}")
    words = word_ids(tokenizer, prompt)
    layer.__class__ = WordLayer
    layer.words = words  # type: ignore[assignment]
    model.register_forward_pre_hook(set_positions, with_kwargs=True)
    model.register_forward_hook(WordScore(words))
    tokenizer.padding_side = "left"


def word_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Return the ids of a prompt's words; a ValueError if a word isn't a single token."""
    ids = []
    words = WORDS if prompt.true is None else (prompt.true, prompt.false)
    for name, word in zip(("true", "false"), words, strict=True):
        if isinstance(word, str):
            found = tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                problem = "isn't in its vocabulary" if len(found) == 1 else f"has {len(found)}"
                raise ValueError(f"{name} must be a single token of the model; got {word!r}, which {problem}")
            ids.append(int(found[0]))
        elif word is not None:
            ids.append(word)
    return tuple(ids)


def words_of(model: PreTrainedModel) -> tuple[int, ...] | None:
    """Return the ids of the words that a model scores with; None for other models."""
    return next((hook.words for hook in model._forward_hooks.values() if isinstance(hook, WordScore)), None)


def prompt_of(model: PreTrainedModel) -> Prompt | None:
    """Return the prompt in which a model reads pairs; None for other models."""
    return getattr(model, "prompt", None)
