"""Tensors that wait on the host while a step's activations fill the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(t: Tensor) -> Tensor:
    """A copy in pinned memory; on the CPU, the tensor itself.

    The copy runs on the current stream, as does whatever reuses the device memory later, so nobody need wait for it.
    """
    if t.device.type == "cpu":
        return t
    host = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
    return host.copy_(t, non_blocking=True)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device, non_blocking=True)


class Held:
    """Named tensors, out of the way of the device's memory if `offload` is set, and back on the device when taken."""

    def __init__(self, device: torch.device, offload: bool) -> None:
        self._device = device
        self._offload = offload
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, t: Tensor) -> None:
        self._tensors[name] = to_host(t.detach()) if self._offload else t.detach()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        return to_device(self._tensors.pop(name), self._device)
