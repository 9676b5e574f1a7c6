"""Devices and dtypes."""

import contextlib
import os
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from pyterrier_msft.model.first_token import last_layer
from pyterrier_msft.model.loading import _first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


# ---- precision


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device named, or the best there is; a ValueError if the one named isn't there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    found = named_device(device)
    if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:
        # torchrun's processes have a GPU each: the one that accelerate takes too.
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"expected a device that is there, found {str(device)!r}: {_first_line(error)}") from error
    return found


def named_device(device: str | torch.device) -> torch.device:
    """The device of that name, whether it is there or not; a ValueError for what is no name of a device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected a device that is there, found {device!r}, which is no name such as 'cuda:0'"
        ) from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision to compute in; "auto" takes bfloat16 where the hardware has it and float32 elsewhere.

    Asked of the processor and not of a stopwatch: two runs on a machine must take the same one.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in {"auto", *DTYPES}:
        raise ValueError(f"expected dtype 'auto' or one of {sorted(DTYPES)}, found {dtype!r}")
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("expected dtype 'float32' or 'bfloat16' on a CPU, found 'float16', which it only emulates")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"expected dtype 'int8' on a CPU only, found it for the device {str(device)!r}")
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return DTYPES[dtype]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # `torch.cpu.is_bf16_supported` is true of every processor; without these instructions it is emulated, and slow.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for CPUs whose linear layers multiply in int8: weights by channel, inputs by their range at hand.

    Faster where the processor has VNNI or AMX, at the price of scores that are rounded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would have a package of its own for this
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        layer = last_layer(model)  # `first_token_only` reads weights there
        kept = {layer.attention.self.key, layer.attention.self.value} if layer is not None else set()
        settings = {
            name: torch.ao.quantization.per_channel_dynamic_qconfig
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module not in kept
        }
        copy: PreTrainedModel = torch.ao.quantization.quantize_dynamic(model, settings)
    return copy.eval()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for `dtype`; nothing for float32 and int8. The weights themselves stay in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype not in {torch.float32, torch.int8})
