"""Devices and floating-point types."""

import contextlib
import importlib.util
import os
from typing import Any

import torch
from transformers.utils import strtobool

from pyterrier_msft.notices import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the named device, or the best available one (None); a ValueError if the named one isn't available."""
    if device is None:
        device = _best_device()
    found = parse_device(device)
    if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:
        # Each of torchrun's processes has a GPU of its own: the one that accelerate chooses too.
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be available; got {str(device)!r}: {first_line(error)}") from error
    return found


def _best_device() -> str:
    if strtobool(os.environ.get("ACCELERATE_USE_CPU", "false")):  # Trainer and accelerate read it too
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def parse_device(device: str | torch.device) -> torch.device:
    """Return the device with a name, available or not; a ValueError for a name that torch doesn't know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a name like 'cpu' or 'cuda:0'; got {device!r}") from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the precision to compute in; "auto" is bfloat16 where the hardware supports it, else float32."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in {"auto", *DTYPES}:
        raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}; got {dtype!r}")
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("dtype must be 'float32' or 'bfloat16' on a CPU, which only emulates 'float16'; got 'float16'")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"dtype 'int8' needs a CPU; got the device {str(device)!r}")
    if dtype == "int8" and importlib.util.find_spec("openvino") is None:
        raise ImportError('dtype "int8" needs the extra [int8]: pip install "pyterrier-msft[int8]"')
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return DTYPES[dtype]


def _has_bfloat16(device: torch.device) -> bool:
    # Decided by the hardware and not by timing, so that two runs on one machine choose the same.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # `torch.cpu.is_bf16_supported` is true for every processor; without these instructions it is emulated, and slow.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def linear_in_float32(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute a linear layer in float32 also in mixed precision, [..., rows of weight]."""
    with torch.autocast(states.device.type, enabled=False):
        return torch.nn.functional.linear(states.float(), weight.float(), None if bias is None else bias.float())


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision in `dtype`, with weights in float32; no effect for float32 and int8."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype not in {torch.float32, torch.int8})
