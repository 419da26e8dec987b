"""The lower layers of a Qwen3 language tower: as many as the wanted hidden states need, and no more.

`hidden_states[k]` of transformers is what layer k hands on (k = 0: the embeddings), and the last one has gone through
the final norm. A tower cut after layer k, its norm gone, ends in exactly hidden_states[k]. What is cut off costs
neither time nor memory: one layer of 36 for Z-Image, nine of 36 for klein.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def cut(model: nn.Module, depth: int) -> Any:
    """The tower up to hidden_states[depth], sharing weights with `model`, which is left as it was."""
    tower: Any = model.base_model if hasattr(model, "base_model") else model
    layers = len(tower.layers)
    if not 1 <= depth <= layers:
        raise ValueError(
            f"text encoder: hidden state {depth} is asked for, but {type(model).__name__} has {layers} layers; "
            f"choose layers from 1 to {layers}"
        )
    lower = copy.copy(tower)
    lower._modules = dict(tower._modules)  # the copy shares the dictionary, and must not write into the original's
    lower.layers = nn.ModuleList(list(tower.layers)[:depth])
    if depth < layers:
        lower.norm = nn.Identity()
    return lower


def hidden_states(tower: Any, layers: tuple[int, ...], **inputs: Tensor) -> list[Tensor]:
    """hidden_states[k] for every k in `layers`; the largest k is the depth that the tower was cut to."""
    depth = len(tower.layers)
    kept: dict[int, Tensor] = {}

    def keep(k: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[k] = output[0] if isinstance(output, tuple) else output

        return hook

    # Hooks of our own: transformers' output_hidden_states would install its hooks twice in layers that are shared.
    handles = [tower.layers[k - 1].register_forward_hook(keep(k)) for k in layers if k != depth]
    try:
        with torch.no_grad():
            kept[depth] = tower(use_cache=False, **inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [kept[k] for k in layers]
