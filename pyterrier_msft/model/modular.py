"""Cross-encoders in the modules of sentence-transformers: a network without a head, pooling, and a head of modules.

The modules are implemented here again, so that sentence-transformers isn't needed. A model is written with the
configuration that it was read with, so that sentence-transformers loads it too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pyterrier_msft.model.files import CrossEncoderFiles, find_file, missing_files, read_json, write_json

# Modes of pooling, in the order in which several are concatenated, and their names in older configurations.
POOLING_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


class HeadModule(nn.Module):
    """A module after the network. It reads the values called `input` and writes those called `output`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.input = str(config.get("module_input_name") or "sentence_embedding")
        self.output = str(config.get("module_output_name") or self.input)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the output from the input, [pairs, ...], and the attention mask, [pairs, tokens]."""
        raise NotImplementedError


class Pooling(HeadModule):
    """Reduce the vectors of a pair's tokens to one vector."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.input, self.output = "token_embeddings", "sentence_embedding"
        modes = config.get("pooling_mode") or [mode for mode, old in POOLING_MODES.items() if config.get(old)] or "mean"
        self.modes = [modes] if isinstance(modes, str) else [*modes]
        if unknown := [mode for mode in self.modes if mode not in POOLING_MODES]:
            raise ValueError(f"unknown pooling mode {unknown[0]!r}")

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool [pairs, tokens, width] to [pairs, width], or a multiple of the width with several modes."""
        return torch.cat([self._pool(mode, values, mask) for mode in self.modes], dim=-1)

    @staticmethod
    def _pool(mode: str, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, positions = torch.arange(values.shape[0], device=values.device), mask.long().cumsum(dim=1)
        if mode == "cls":
            return values[rows, mask.int().argmax(dim=1)]
        if mode == "lasttoken":
            return values[rows, positions.argmax(dim=1)]
        if mode == "max":
            return values.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
        weights = (positions * mask if mode == "weightedmean" else mask).unsqueeze(-1).float()
        total = weights.sum(dim=1)
        sums = (values.float() * weights).sum(dim=1)
        return (sums / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)).to(values.dtype)


class Dense(HeadModule):
    """A linear layer and an activation function."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        size = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(*size, bias=bool(config.get("bias", True)))
        self.activation_function = _activation(config.get("activation_function") or "torch.nn.Tanh")
        self.use_residual = bool(config.get("use_residual"))
        if self.use_residual and size[0] != size[1]:
            self.residual = nn.Linear(*size, bias=False)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute [..., out_features]."""
        outputs: torch.Tensor = self.activation_function(self.linear(values))
        if self.use_residual:
            outputs = outputs + (self.residual(values) if hasattr(self, "residual") else values)
        return outputs


class LayerNorm(HeadModule):
    """Layer normalization."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(int(config["dimension"]))

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        normalized: torch.Tensor = self.norm(values)
        return normalized


class Normalize(HeadModule):
    """Scale vectors to length 1."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        return nn.functional.normalize(values, dim=-1)


class Dropout(HeadModule):
    """Dropout during training."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.dropout_layer = nn.Dropout(float(config.get("dropout", 0.2)))

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Apply dropout."""
        dropped: torch.Tensor = self.dropout_layer(values)
        return dropped


HEAD_MODULES = {kind.__name__: kind for kind in (Pooling, Dense, LayerNorm, Normalize, Dropout)}


class Head(nn.Module):
    """The modules after the network, in order."""

    def __init__(self, parts: Sequence[HeadModule]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @classmethod
    def load(cls, name: str, revision: str | None, files: CrossEncoderFiles) -> Self:
        """Load the modules of a model. A ValueError says what isn't supported, or what is missing."""
        parts: list[HeadModule] = []
        missing: list[str] = []
        for kind, module in zip(files.module_names[1:], files.modules[1:], strict=True):
            if kind not in HEAD_MODULES:
                raise ValueError(f"its module {kind} isn't one of {', '.join(HEAD_MODULES)}")
            file = f"{module['path']}/config.json"
            config = read_json(name, file, revision)
            if not config and kind != Normalize.__name__:  # older versions write none for it
                missing.append(file)
                continue
            part, file = HEAD_MODULES[kind](config), f"{module['path']}/model.safetensors"
            weights = find_file(name, file, revision)
            if weights is not None:
                part.load_state_dict(load_file(weights))
            elif part.state_dict():
                missing.append(file)
            parts.append(part)
        if missing:
            raise missing_files(name, missing, revision)
        names = ["token_embeddings", *(part.output for part in parts)]
        if [part.input for part in parts] != names[:-1] or names[-1] != "scores" or "Pooling" not in files.module_names:
            raise ValueError("its modules must be a chain from token_embeddings through Pooling to scores")
        if (size := parts[-1].config.get("out_features")) != 1:
            raise ValueError(f"its last module must give one score, not {size}")
        return cls(parts)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the scores, [pairs, 1], from the hidden states, [pairs, tokens, width]."""
        for part in self.parts:
            states = part(states, mask)
        return states

    @property
    def configuration(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The modules' classes and configurations."""
        return [(type(part).__name__, part.config) for part in self.parts]  # type: ignore[misc]

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Write each module into a folder of its own."""
        for part, name in zip(self.parts, names, strict=True):
            write_json(folder / name / "config.json", part.config)
            if weights := {key: tensor.contiguous() for key, tensor in part.state_dict().items()}:
                save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})


class ModularNetwork(PreTrainedModel):
    """A network and the modules of its head, with the inputs and the output of a classifier with one label."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # What the network supports was checked when it was loaded.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, model: PreTrainedModel, head: Head, files: CrossEncoderFiles) -> None:
        model.config.num_labels = 1
        super().__init__(model.config)
        self.model, self.head, self.files = model, head, files
        self.name_or_path = model.name_or_path
        # The head reads the tokens' vectors. DDP expects a gradient for every other parameter.
        if isinstance(pooler := getattr(model, "pooler", None), nn.Module):
            pooler.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> SequenceClassifierOutput:
        """Compute the logits, [pairs, 1]."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.head(states, attention_mask))

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""
        return self.model.get_input_embeddings()

    def save_pretrained(self, folder: str | Path, *args: Any, **options: Any) -> None:
        """Write the folder of a CrossEncoder."""
        self.model.save_pretrained(folder, *args, **options)
        self.files.write(Path(folder))
        self.head.write(Path(folder), self.files.folders[1:])


def _activation(name: str) -> nn.Module:
    """Return an activation function of torch by the name of its class; any other class may run code."""
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"unknown activation function {name}")
    return kind()
