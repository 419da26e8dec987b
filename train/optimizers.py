"""Optimizers by name, their learning rates as functions of the number of updates, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .muon import Muon
from .recipe import OptimizerConfig

# Where the matrices stand that Muon orthogonalises: inside blocks. Embeddings, modulation and the last layer are not.
_IN_BLOCKS = ("layers.", "refiner.", "transformer_blocks.")
_NOT_HIDDEN = ("adaLN", "modulation", "embed", "lora_")


class Optimizer:
    """The optimizer of one kind of update: one of torch's, or Muon for the matrices and AdamW for all else.

    Args:
        parameters: by names that a checkpoint keeps.
        total: updates of the whole run, to which rates decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, total: int) -> None:
        self.parameters, self.config, self.total = dict(parameters), config, total
        self.steps = 0  # taken so far; skipped updates do not count
        self.factor = 1.0  # on all rates; lowered after a return to an earlier checkpoint
        self.parts = _make(self.parameters, config)

    def step(self) -> None:
        for optimizer, rate in self.parts:
            _set_rate(optimizer, self.factor * rate * schedule(self.config, self.steps, self.total))
            optimizer.step()
        self.steps += 1

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def rate(self) -> float:
        """Of the next step, without Muon's own."""
        return self.factor * self.config.lr * schedule(self.config, self.steps, self.total)

    # State, by the names of parameters

    def tensors(self) -> dict[str, Tensor]:
        """name/key -> tensor of all that the optimizers remember; empty before the first step."""
        return {key: value for key, value in self._entries() if isinstance(value, Tensor)}

    def numbers(self) -> dict[str, Any]:
        plain = {key: value for key, value in self._entries() if not isinstance(value, Tensor)}
        moved = [name for name, parameter in self.parameters.items() if self._state(parameter)]
        return {"steps": self.steps, "factor": self.factor, "plain": plain, "moved": moved}

    def prepare(self, numbers: Mapping[str, Any]) -> dict[str, Tensor]:
        """Takes the numbers of a checkpoint, makes room for its tensors, and returns them to be filled."""
        self.steps, self.factor = numbers["steps"], numbers["factor"]
        for optimizer, _ in self.parts:
            optimizer.state.clear()
        if self.steps:  # a step that no update has trained yet has no state: its networks had no gradient
            self._make_room(numbers["moved"])
        for key, value in numbers["plain"].items():
            name, _, entry = key.rpartition("/")
            self._state(self.parameters[name])[entry] = value
        return self.tensors()

    def _entries(self) -> list[tuple[str, Any]]:
        found = []
        for name, parameter in self.parameters.items():
            optimizer, state = self._holder(parameter)
            for entry, value in state.items():
                if hasattr(optimizer, "stored") and isinstance(value, Tensor) and value.dim():
                    parts = optimizer.stored(parameter, value)  # moments in 8 bits: codes and scales
                    found += [(f"{name}/{entry}{part}", held) for part, held in parts.items()]
                else:
                    found.append((f"{name}/{entry}", value))
        return found

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self._holder(parameter)[1]

    def _holder(self, parameter: nn.Parameter) -> tuple[Any, dict[str, Any]]:
        """Which of the optimizers remembers something of a parameter, and what."""
        for optimizer, _ in self.parts:
            if parameter in optimizer.state:
                return optimizer, optimizer.state[parameter]
        return None, {}

    def _make_room(self, names: Sequence[str]) -> None:
        """A step without gradient and rate: every state exists afterwards, in whatever form the optimizer likes it."""
        for name in names:
            self.parameters[name].grad = torch.zeros_like(self.parameters[name])
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        for optimizer, _ in self.parts:
            _set_rate(optimizer, 0.0)
            optimizer.step()
        self.zero_grad()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step, and wants the rate in the tensor that it made
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def schedule(config: OptimizerConfig, step: int, total: int) -> float:
    """The share of the rate at a step, from 0 on: a rise over the warm-up, then a fall to the last of `total` steps."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    if config.decay == "none":
        return rise
    done = min(1.0, max(0.0, (step - config.warmup) / max(1, total - config.warmup)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.decay == "cosine" else 1 - done
    return rise * (config.last + (1 - config.last) * left)


Part = tuple[torch.optim.Optimizer, float]  # and its base rate


def _make(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[Part]:
    if config.kind == "adamw":
        return [(_adamw(list(parameters.values()), config), config.lr)]
    if config.kind == "adamw8bit":
        return [(_adamw8bit(list(parameters.values()), config), config.lr)]
    hidden = {name: p for name, p in parameters.items() if _is_hidden(name, p)}
    others = [p for name, p in parameters.items() if name not in hidden]
    made: list[Part] = []
    if hidden:
        muon = Muon(
            list(hidden.values()),
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
        )
        made.append((muon, config.muon_lr))
    if others:
        made.append((_adamw(others, config), config.lr))
    return made


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    inside = any(part in name for part in _IN_BLOCKS) and not any(part in name for part in _NOT_HIDDEN)
    return inside and parameter.dim() == 2


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    # Two groups, since a fused step takes tensors in shards, or whole ones, and not both at once.
    sides = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    groups = [{"params": side} for side in sides if side]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def _adamw8bit(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torchao's where it is installed, else bitsandbytes', which knows no shards."""
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    try:
        from .adamw8bit import AdamW8bit as Torchaos
    except ImportError:
        pass
    else:
        return Torchaos(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit as Bitsandbytes
    except ImportError:
        raise ValueError(
            "optimizers: kind 'adamw8bit' needs torchao or bitsandbytes, and neither is installed: pip install torchao"
        ) from None
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            "optimizers: kind 'adamw8bit' on parameters in shards needs torchao, and only bitsandbytes is installed: "
            "pip install torchao"
        )
    return Bitsandbytes(parameters, **settings)
