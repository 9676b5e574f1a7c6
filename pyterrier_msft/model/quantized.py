"""Score in int8 on a CPU, with OpenVINO."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import quiet_transformers, token_limit
from pyterrier_msft.model.scoring import evaluation_mode
from pyterrier_msft.notices import warn

GROUP_SIZE = 32  # consecutive numbers of a token's vector with a scale of their own: larger is faster and less precise
# With this multiple of tokens per pair, sums of numbers have the same order in every batch. In another order, they
# would differ in their last bits, which rounding to int8 can make whole steps.
TOKEN_MULTIPLE = 16


class QuantizedNetwork(nn.Module):
    """A copy of a network for scoring on a CPU, with the matrix multiplications of all tokens in int8.

    Weights are rounded once, with a scale for each row, and a token's vectors when they are computed, with a scale for
    each group of their numbers. So a pair's score doesn't depend on the other pairs of its batch.
    """

    device = torch.device("cpu")

    def __init__(self, network: PreTrainedModel, encoder: PairEncoder) -> None:
        super().__init__()
        _warn_if_slow()
        self.config = network.config
        tokenizer = encoder.tokenizer
        self._limit = token_limit(network, tokenizer)
        self._padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        short, long = (
            self._aligned(encoder.pad(encoder(["a"] * len(texts), texts), np.arange(len(texts))))
            for texts in (["b", "c d"], ["a", "b " * 20, "c " * 80])
        )
        self._names = [*short]
        self._thread = threading.local()  # each thread needs a request of its own
        try:
            with evaluation_mode(network), quiet_transformers(), first_token_only(network), torch.inference_mode():
                model = _convert(network, short, long)
            _quantize_weights(model)
            self._compiled = _compile(model, torch.get_num_threads())
            self(**long)
        except Exception as error:
            cause = str(error).strip().rpartition("\n")[2]  # OpenVINO names it in the last line
            raise ValueError(
                f"dtype must be 'float32' or 'bfloat16' for {type(network).__name__}; got 'int8', which OpenVINO can't "
                f"compute: {cause}"
            ) from error

    def forward(self, **batch: torch.Tensor) -> SequenceClassifierOutput:
        """Compute the logits, [pairs, 1]."""
        if not hasattr(self._thread, "request"):
            self._thread.request = self._compiled.create_infer_request()
        request, aligned = self._thread.request, self._aligned(batch)
        # Run in OpenVINO's threads: in the caller's own, it would wait for other callers.
        request.start_async([aligned[name].numpy() for name in self._names])
        request.wait()
        return SequenceClassifierOutput(logits=torch.from_numpy(request.get_output_tensor().data.copy()))

    def _aligned(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        length = batch["input_ids"].shape[1]
        missing = max(0, min(-length % TOKEN_MULTIPLE, self._limit - length))
        return {
            name: nn.functional.pad(values, (0, missing), value=self._padding.get(name, 0))
            for name, values in batch.items()
        }


@cache
def _warn_if_slow() -> None:
    """Warn once if the processor lacks the instructions that make int8 fast."""
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions lack it
    if processor.get("architecture") == "x86_64" and not (processor["avx512_vnni"] or processor["avx_vnni"]):
        warn("int8 is no faster than float32 on this processor, which has no VNNI instructions: use dtype='float32'")


class _Ordered(nn.Module):
    """A network with its inputs in a fixed order, and the logits as its output."""

    def __init__(self, network: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.network(**dict(zip(self.names, values, strict=True))).logits.float()


def _convert(network: PreTrainedModel, example: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Any:
    """Convert a network to a model of OpenVINO with copies of its weights.

    The network is traced with an example, so check that the result is right for another batch, too.
    """
    ordered = _Ordered(network, [*example])
    with warnings.catch_warnings(action="ignore"), _restored_logging():  # of tracing
        model = _openvino().convert_model(ordered, example_input=tuple(example.values()), share_weights=False)
    found = _compile(model, 1)([values.numpy() for values in other.values()])[0]
    if not np.allclose(found, ordered(*other.values()), rtol=1e-3, atol=1e-3):
        raise RuntimeError("its scores differ from PyTorch's")
    return model


@contextlib.contextmanager
def _restored_logging() -> Iterator[None]:
    """Restore the root logger's settings, which OpenVINO changes, and leaves changed if a conversion fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, [*root.filters], [*root.handlers]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _quantize_weights(model: Any) -> None:
    """Round the weights that multiply the vectors of all tokens to int8, in place.

    Those that multiply one vector per pair stay as they are, since they take hardly any time.
    """
    opset = _openvino().opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        shape, weight = node.input_value(0).get_partial_shape(), node.input_value(1).get_node()
        # [pairs, tokens, width]; -1 is any number
        is_of_tokens = shape.rank.is_static and len(shape) == 3 and shape[1].get_max_length() == -1
        if weight.get_type_name() != "Constant" or not is_of_tokens:
            continue
        values = np.asarray(weight.data, dtype=np.float32)
        scale = np.abs(values).max(axis=int(node.get_attributes()["transpose_b"]), keepdims=True) / 127
        rounded = np.rint(values / np.where(scale == 0, 1, scale)).astype(np.int8)
        product = opset.multiply(opset.convert(opset.constant(rounded), "f32"), opset.constant(scale))
        node.input(1).replace_source_output(product.output(0))


def _compile(model: Any, threads: int) -> Any:
    """Compile a model for threads that compute a batch each."""
    settings = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE,
        "ENABLE_CPU_PINNING": False,  # other processes may choose the same cores
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # between the matrix multiplications
        "NUM_STREAMS": threads,
    }
    return _openvino().Core().compile_model(model, "CPU", settings)


@cache
def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report the import to Intel."""
    telemetry = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules["openvino_telemetry"]
        if telemetry is not None:
            sys.modules["openvino_telemetry"] = telemetry
    return openvino
