"""The compiled library: loading it, and deciding what runs where.

`backend(x)` says what a tensor's operators run on: "cuda" or "cpu" (the kernels of csrc), or "reference" (plain
PyTorch) where no kernel fits. A fallback warns once and says why.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import build
from .arguments import DTYPES, accumulation_dtype

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_MAX_WIDTH = 16384  # csrc/cuda/kernels.h
CUDA_MAX_HEAD_WIDTH = 1024

build.check()  # a stale or foreign binary is an error here; a missing one is not: the reference runs instead
_status = build.status()
if _status.usable:
    torch.ops.load_library(str(_status.path))
_stamp: dict[str, Any] = dict(_status.stamp or {})
_warned: set[str] = set()


def _fall_back(op: str, reason: str) -> str:
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{op}: {reason}; running the plain PyTorch reference instead", RuntimeWarning, stacklevel=4)
    return "reference"


@functools.cache
def _cuda_obstacle(device_index: int | None) -> str | None:
    """Why the CUDA kernels cannot run on this device, or None."""
    if not _stamp.get("cuda"):
        return build.no_cuda_kernels_message(_stamp, torch.version.cuda)
    if device_index is None or not torch.cuda.is_available():
        return None  # fake tensors of a device that is not here
    return build.check_arch(torch.cuda.get_device_capability(device_index), _stamp["archs"])


def _obstacle(x: Tensor) -> str | None:
    """Why x's operators fall back to the reference, or None where a kernel runs."""
    kind = x.device.type
    if not _status.usable:
        return _status.reason
    if kind == "cpu":
        return None if x.dtype in DTYPES else f"the CPU kernels do not take {x.dtype}"
    if kind != "cuda":
        return f"there are kernels for cpu and cuda tensors, and this one is on {kind}"
    if x.dtype not in CUDA_DTYPES:
        return f"the CUDA kernels do not take {x.dtype}"
    return _cuda_obstacle(x.device.index)


def backend(x: Tensor) -> str:
    """What the operators on this tensor run on: "cuda", "cpu" or "reference"."""
    return "reference" if _obstacle(x) is not None else x.device.type


def choose(op: str, x: Tensor, width: int, max_cuda_width: int = CUDA_MAX_WIDTH) -> str:
    """backend(x), with the fallback's warning, and with the widths that the CUDA kernels take."""
    kind = x.device.type  # asked once: it is what most of this function costs
    if kind == "cpu" and _status.usable and x.dtype in DTYPES:
        return kind
    if kind == "meta":
        return "reference"  # shapes are all that is asked for
    reason = _obstacle(x)
    if reason is None and kind == "cuda" and width > max_cuda_width:
        reason = f"the CUDA kernels take widths up to {max_cuda_width}, and this one is {width}"
    return kind if reason is None else _fall_back(op, reason)


def build_info() -> dict[str, Any]:
    """What was built and what runs: the build's stamp, the binary's path, the CPU instruction set in use."""
    info: dict[str, Any] = {"usable": _status.usable, "reason": _status.reason, "path": str(_status.path), **_stamp}
    info["cpu_isa"] = cpu_isa() if _status.usable else None
    return info


def _symbol(name: str, result: Any) -> Any:
    function = getattr(ctypes.CDLL(str(_status.path)), name)
    function.restype = result
    return function


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: "avx512", "avx2" or "portable"."""
    return str(_symbol("twostep_cpu_isa", ctypes.c_char_p)().decode())


def select_cpu_isa(isa: str) -> None:
    """Use another of this processor's instruction sets, for tests and benchmarks."""
    if not _symbol("twostep_select_cpu_isa", ctypes.c_bool)(isa.encode()):
        raise ValueError(f"select_cpu_isa: {isa!r} is not an instruction set of this build and processor")


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an operator returns for fake and meta tensors."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _status.usable:
            torch.library.register_fake(f"twostep::{name}", function)
        return function

    return register


def statistics(x: Any, wanted: bool) -> Any:
    """The fake of a [batch, length] statistic of x; empty where it is not wanted."""
    return x.new_empty(x.shape[:2] if wanted else 0, dtype=accumulation_dtype(x))


def gradient(x: Any, parameter: Any, dtype: torch.dtype, wanted: bool) -> Any:
    """The fake of a parameter's gradient; empty where it is not wanted."""
    return x.new_empty(parameter.shape if wanted and parameter is not None else 0, dtype=dtype)
