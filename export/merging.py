"""The plain weights of a student's network, and low-rank products on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..zoo import AdapterView, Backbone


class Product(NamedTuple):
    """up @ down, all scales in up."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]

    def __call__(self) -> Tensor:
        return self.up.float() @ self.down.float()


def products(network: Backbone) -> dict[str, Product]:
    """An adapter's products, by the modules that they are added to; none for a network without an adapter."""
    if not isinstance(network, AdapterView) or network.adapter is None:
        return {}
    found: dict[str, Product] = {}
    for name, module in network.model.named_modules():
        if isinstance(module, BaseTunerLayer) and network.adapter in module.lora_A:
            up, down = module.lora_B[network.adapter].weight, module.lora_A[network.adapter].weight
            found[name] = Product(down.detach().float(), module.scaling[network.adapter] * up.detach().float())
    return found


def plain(network: Backbone) -> dict[str, Tensor]:
    """The network's own weights by the model's names, without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.model.state_dict().items()
        if ".lora_" not in name
    }


def added(state: Mapping[str, Tensor], factors: Mapping[str, Product]) -> dict[str, Tensor]:
    """Products added to the weights in float32."""
    absent = sorted(name for name in factors if f"{name}.weight" not in state)
    if absent:
        raise ValueError(f"merge: the network has no {absent[0]}, and {len(absent)} products are for such")
    return {
        name: tensor + factors[module]().to(tensor.dtype)
        if (module := name.removesuffix(".weight")) != name and module in factors
        else tensor
        for name, tensor in state.items()
    }


def with_weights(network: Backbone, state: Mapping[str, Tensor]) -> Backbone:
    """A new stock network of the same kind on these tensors, which it shares with whoever has them."""
    with torch.device("meta"):
        model = type(network.model).from_config(network.model.config)
    model.load_state_dict(state, assign=True)
    made = copy.copy(network.base if isinstance(network, AdapterView) else network)
    made._modules = {**made._modules, "model": model.eval().requires_grad_(False)}
    return made


def merged(network: Backbone) -> dict[str, Tensor]:
    """The network's weights by the model's own names; of an adapter the base's with its product added in float32."""
    return added(plain(network), products(network))
