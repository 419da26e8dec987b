"""torchao's AdamW, whose moments take 8 bits, for whole parameters and for parameters in shards.

A block of numbers shares a scale. torchao cuts blocks of 256 out of whatever lies on a rank, so that they would depend
on the number of ranks. Here no block reaches over the end of a row, and no rank has less than a row: what is rounded
is the same however a parameter is divided, and a checkpoint's rows find their place on any number of ranks.

A step is taken on what lies on this rank, without DTensors around it: torch.compile's cache knows them by their whole
shapes, and gives a rank that has fewer rows than the others the code of theirs (seen with torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as TorchaosAdamW8bit
from torchao.optim.adam import single_param_adam

from .sharding import local

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 32  # torchao's; one whose scale takes an eighth more
FEW = 4096  # of fewer numbers the moments stay float32, as torchao and bitsandbytes have it
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # with a sign, and without


def block_of(parameter: Tensor) -> int | None:
    """How many numbers share a scale; None where the moments stay float32."""
    block = math.gcd(math.prod(parameter.shape[1:]), LARGEST_BLOCK)
    return block if parameter.numel() >= FEW and block >= SMALLEST_BLOCK else None


class AdamW8bit(TorchaosAdamW8bit):  # type: ignore[misc] # torchao has no types
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
        with torch._dynamo.utils.disable_cache_limit():  # a compilation for each shape that there is, and no more
            for group in self.param_groups:
                rates = (group["lr"], *group["betas"], group["weight_decay"], group["eps"])
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state |= {name: _zeros(parameter, signed) for name, signed in MOMENTS.items()}
                    state["step"] += 1
                    mine, gradient = local(parameter.detach()), local(parameter.grad)
                    if mine.numel():
                        step(
                            mine, gradient, state["step"], *(state[name] for name in MOMENTS), None, *rates, True, False
                        )
        return loss

    @staticmethod
    def stored(parameter: nn.Parameter, moment: Tensor) -> dict[str, Tensor]:
        """A moment as plain tensors that share its memory, with the parameter's rows, divided as the parameter is: its
        codes and scales, or itself."""
        block = block_of(parameter)
        if block is None:
            return {"": _like(moment, parameter)}
        if moment.numel():
            codes, scales = cast(Any, moment).codes, cast(Any, moment).scale.view(moment.shape[0], -1)
        else:
            columns = math.prod(parameter.shape[1:]) // block
            codes, scales = moment.to(torch.uint8), moment.new_empty(0, columns)
        return {".codes": _like(codes, parameter), ".scale": _like(scales, parameter)}

    @staticmethod
    def bytes_of(parameter: nn.Parameter) -> int:
        """Of both moments, on this rank."""
        count, block = local(parameter).numel(), block_of(parameter)
        return len(MOMENTS) * (count * parameter.element_size() if block is None else count + 4 * count // block)


def _zeros(parameter: Tensor, signed: bool) -> Tensor:
    block, mine = block_of(parameter), local(parameter)
    if block is None or not mine.numel():  # a rank without a row has nothing to put into blocks
        return torch.zeros_like(mine)
    return cast(Tensor, AdamW8bit._subclass_zeros(mine, signed, block))


def _like(mine: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return mine
    shape = torch.Size([parameter.shape[0], *mine.shape[1:]])
    strides = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    mesh, placements = parameter.device_mesh, parameter.placements
    return cast(Tensor, DTensor.from_local(mine, mesh, placements, run_check=False, shape=shape, stride=strides))
