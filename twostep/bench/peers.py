"""The operators as other libraries offer them, where they are installed and where the tensors suit them.

Few of them have the whole operator. A peer's kernel is then combined with eager code for what it lacks, which is how
somebody who has that library would write it. Each entry is a function with the operator's own signature.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import expressions

Peer = Callable[..., Any]


def _modules(*names: str) -> list[Any] | None:
    try:
        return [importlib.import_module(name) for name in names]
    except Exception:  # a peer that is absent, or that breaks on import, is no peer here
        return None


def _liger() -> dict[str, Peer]:
    found = _modules("liger_kernel.ops.rms_norm", "liger_kernel.ops.swiglu")
    if found is None:
        return {}
    rms, swiglu = found

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor = rms.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
        return y

    return {
        **expressions.with_rms_norm(rms_norm),
        "swiglu": lambda gate, up: swiglu.LigerSiLUMulFunction.apply(gate, up),
    }


def _quack() -> dict[str, Peer]:
    found = _modules("quack")
    if found is None:
        return {}
    return expressions.with_rms_norm(lambda x, weight, eps: found[0].rmsnorm(x, weight, eps=eps))


def _flash_attn() -> dict[str, Peer]:
    norms = _modules("flash_attn.ops.triton.layer_norm")
    rotary = _modules("flash_attn.layers.rotary")
    peers: dict[str, Peer] = {}
    if norms is not None:
        peers.update(expressions.with_rms_norm(lambda x, weight, eps: norms[0].rms_norm_fn(x, weight, None, eps=eps)))
    if rotary is not None:

        def rope(x: Tensor, freqs: Tensor) -> Tensor:
            cos, sin = freqs[0].unbind(-1)
            y: Tensor = rotary[0].apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=True)
            return y

        peers["rope"] = rope
    return peers


def _xformers() -> dict[str, Peer]:
    found = _modules("xformers.ops")
    if found is None or not hasattr(found[0], "rms_norm"):
        return {}
    return expressions.with_rms_norm(lambda x, weight, eps: found[0].rms_norm(x, weight, eps))


def _failure(peer: Peer, inputs: Any) -> str | None:
    """Why the peer cannot run forward and backward on such inputs here, or None where it can."""
    try:
        outputs = peer(**inputs.arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, inputs.differentiable(), inputs.incoming)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def available(op: str, inputs: Any, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """The installed peers that have this operator and take these inputs, and why others do not. All need a GPU."""
    if device != "cuda":
        return {}, {}
    libraries = {"liger": _liger, "quack": _quack, "flash-attn": _flash_attn, "xformers": _xformers}
    peers: dict[str, Peer] = {}
    refused: dict[str, str] = {}
    for name, load in libraries.items():
        peer = load().get(op)
        if peer is None:
            continue
        failure = _failure(peer, inputs)
        if failure is None:
            peers[name] = peer
        else:
            refused[name] = failure
    return peers, refused
