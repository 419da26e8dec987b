"""Attention of the fused blocks: how its module is called, diffusers' dispatch, and one detour on the CPU.

On a CPU, PyTorch's fused attention has a slow backward in bfloat16, also where the processor multiplies bfloat16
matrices fast. Two matrix products and a softmax in float32 are then the better choice for short sequences, although
they store the probabilities; and they are nearer to the truth (gradients 1.7e-3 off, fused 2.6e-3 to 3.4e-3). Products
in bfloat16 are not: 6e-3, in a trained model several times that. Forward and backward in ms, torch 2.13.0, 2 threads
of a Xeon with AMX, fused / plain

    32 x  96 x 4 x 32    14.9 / 4.2        8 x 288 x 8 x 64    19.2 / 25.9
    16 x 160 x 4 x 64    13.9 / 8.4        4 x 576 x 8 x 64    39.1 / 94.8

Without AMX that has not been measured, and in float32 neither wins (EPYC: 6.7 / 6.7 and 43.8 / 48.8): what diffusers
chooses runs.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor
from torch.nn.modules import module as torch_module

PLAIN_UP_TO = 192  # tokens, between the second and the third measurement above
FAST_BFLOAT16 = torch.cpu._is_amx_tile_supported()
_OF_ALL_MODULES = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, processor: Any) -> Tensor:
    """Attention over [B, L, H, Dh], with the backend that is set on the processor; mask: [B, L] or [B, 1, 1, L]
    bool."""
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    if _plain_is_faster(query, key, processor):
        return _plain(query, key, value, mask)
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )


def call(attention: Any, *hidden: Any, **keywords: Any) -> Any:
    """An attention module's processor: its forward inspects the processor's signature on every call. The module itself
    where somebody has hooked it (diffusers' caches, accelerate, forward and backward hooks, its own or those of all
    modules), compiled it by itself, or given it another forward."""
    if _hooked(attention):
        return attention(*hidden, **keywords)
    return attention.processor(attention, *hidden, **keywords)


def _hooked(module: Any) -> bool:
    if hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook") or "forward" in module.__dict__:
        return True
    if module._compiled_call_impl is not None or any(len(hooks) > 0 for hooks in _OF_ALL_MODULES):
        return True
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(len(hooks) > 0 for hooks in own)


def _plain_is_faster(query: Tensor, key: Tensor, processor: Any) -> bool:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    if not (torch.is_grad_enabled() and query.requires_grad) or processor._parallel_config is not None:
        return False
    if not FAST_BFLOAT16 or key.shape[1] > PLAIN_UP_TO:  # asked last: an exported program would be made for such sizes
        return False
    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return AttentionBackendName(backend) == AttentionBackendName.NATIVE


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """In float32: the scores' gradients are differences, of which rounding to bfloat16 in between leaves little."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        scores = (query.float() * query.shape[-1] ** -0.5) @ key.float().transpose(-1, -2)  # [B, H, L, L]
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ value.float()).to(value.dtype).transpose(1, 2)
