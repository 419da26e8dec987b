"""Runs a block, recomputing it in backward where the model says so (diffusers' enable_gradient_checkpointing)."""

from __future__ import annotations

from typing import Any

import torch


def run(model: Any, block: Any, *inputs: Any) -> Any:
    if not (torch.is_grad_enabled() and model.gradient_checkpointing):
        return block(*inputs)
    switch = getattr(model, "adapter_switch", None)  # zoo/adapters.py: the recomputation runs with the same adapter
    return model._gradient_checkpointing_func(block if switch is None else switch.bound(block), *inputs)
