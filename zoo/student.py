"""The two-step student: two Euler steps without re-noising, and step 1's one-jump clean prediction.

    z = eps + (mid - 1) v0,  v0 = first(eps)          x = z - mid v1,  v1 = second(z)          x_A = eps - v0

Its parameters per step are separate copies of the teacher, one copy for both, or an adapter a step on one frozen base
(Turbo++ ablates all three).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .adapters import AdapterBase
from .backbone import Backbone, need_backbone
from .context import Context
from .sampling import check_grid, euler, sigma_grid

KINDS = ("decoupled", "shared", "adapters")


class Student(nn.Module):
    """A few-step student: one network a step (the same one may stand in several places) on a grid of sigmas."""

    def __init__(self, networks: Sequence[Backbone], sigmas: Sequence[float]) -> None:
        super().__init__()
        self.sigmas = check_grid(type(self).__name__, sigmas)
        if len(networks) != len(self.sigmas) - 1:
            raise ValueError(
                f"{type(self).__name__}: there are {len(networks)} networks and sigmas {list(self.sigmas)}, expected "
                f"one network a step: {len(self.sigmas) - 1}"
            )
        if self.sigmas[0] != 1:
            raise ValueError(
                f"{type(self).__name__}: sigmas begin at {self.sigmas[0]}, expected 1: a student starts from noise"
            )
        for network in networks:
            need_backbone(type(self).__name__, network)
        self.networks = nn.ModuleList(networks)

    @property
    def steps(self) -> int:
        return len(self.networks)

    def distinct_networks(self) -> list[Backbone]:
        """Each network once, in order of its first step."""
        return list(dict.fromkeys(cast(list[Backbone], list(self.networks))))

    def _network(self, step: int) -> Backbone:
        return cast(Backbone, self.networks[step])

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (p for network in self.distinct_networks() for p in network.parameters() if p.requires_grad)

    def velocity(self, step: int, x: Tensor, context: Context) -> Tensor:
        """The velocity of a step (from 0), at the sigma of its input."""
        if not 0 <= step < self.steps:
            raise ValueError(f"{type(self).__name__}: step is {step}, expected 0 to {self.steps - 1}")
        return self._network(step).velocity(x, self.sigmas[step], context)

    def step(self, step: int, x: Tensor, context: Context) -> Tensor:
        """The state after a step, in float32 or better."""
        x = x if x.dtype == torch.float64 else x.float()
        v = self.velocity(step, x, context).to(x.dtype)
        return x + (self.sigmas[step + 1] - self.sigmas[step]) * v

    @torch.no_grad()
    def sample(
        self, noise: Tensor, context: Context, *, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Clean latents from noise [B, C, H, W], in float32."""
        steps = iter(range(self.steps))
        return euler(lambda x, _: self.velocity(next(steps), x, context), noise, self.sigmas, on_step=on_step)


class TwoStepStudent(Student):
    def __init__(self, first: Backbone, second: Backbone, *, sigmas: Sequence[float] | None = None) -> None:
        """first and second may be one network. sigmas are 1, .75, 0 (a shift of 3) where they are not given."""
        super().__init__([first, second], sigma_grid(2) if sigmas is None else sigmas)

    @classmethod
    def from_teacher(
        cls,
        teacher: Backbone | AdapterBase,
        *,
        kind: str = "decoupled",
        sigmas: Sequence[float] | None = None,
        rank: int = 64,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> TwoStepStudent:
        """A student that begins as its teacher: "decoupled" copies it twice, "shared" once, "adapters" adds an adapter
        a step ("step_1", "step_2") to an AdapterBase. Copies are trainable and in float32 or as the teacher is."""
        if kind not in KINDS:
            raise ValueError(f"TwoStepStudent: kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
        if kind == "adapters":
            if not isinstance(teacher, AdapterBase):
                raise TypeError("TwoStepStudent: kind='adapters' needs an AdapterBase: pass AdapterBase(backbone)")
            views = [teacher.add(f"step_{n}", rank=rank, alpha=alpha, generator=generator) for n in (1, 2)]
            return cls(*views, sigmas=sigmas)
        if isinstance(teacher, AdapterBase):
            raise TypeError(
                f"TwoStepStudent: kind={kind!r} copies the teacher, and was given an AdapterBase: use kind='adapters'"
            )
        need_backbone("TwoStepStudent", teacher)
        first = copy.deepcopy(teacher).requires_grad_(True)
        second = first if kind == "shared" else copy.deepcopy(teacher).requires_grad_(True)
        return cls(first, second, sigmas=sigmas)

    @property
    def first(self) -> Backbone:
        return self._network(0)

    @property
    def second(self) -> Backbone:
        return self._network(1)

    def step_one(self, noise: Tensor, context: Context) -> Tensor:
        """z, the state after step 1."""
        return self.step(0, noise, context)

    def step_two(self, z: Tensor, context: Context) -> Tensor:
        """x, the clean latents after step 2."""
        return self.step(1, z, context)

    def one_jump(self, noise: Tensor, context: Context) -> Tensor:
        """x_A, what step 1 alone predicts: noise - v0."""
        noise = noise if noise.dtype == torch.float64 else noise.float()
        return noise - self.velocity(0, noise, context).to(noise.dtype)
