"""A network, or all steps of a student, as a program of tensors alone, for torch.export.

module = Steps(student)             forward(noise, features, ...) -> clean latents
torch.export.export(module, (), module.example(2, 16, 16, 32), dynamic_shapes=module.dims())
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .adapters import AdapterView
from .backbone import Backbone
from .student import Student

BATCH = 1024  # at most; torch.export wants a bound


class Traceable(Protocol):
    """A family's network whose shapes may be symbols; its forward takes x, sigma and what `example` names besides."""

    def example(self, batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]: ...

    def dims(self, batch: Any) -> dict[str, dict[int, Any]]: ...

    def __call__(self, **given: Tensor) -> Tensor: ...


def batch_dim() -> Any:
    return torch.export.Dim("batch", min=1, max=BATCH)


def network(backbone: Backbone) -> Traceable:
    """The family's traceable network: forward(x, sigma, features, ...) -> v."""
    from .flux2.backbone import Flux2Backbone
    from .flux2.traceable import TraceableFlux2
    from .z_image.backbone import ZImageBackbone
    from .z_image.traceable import TraceableZImage

    if isinstance(backbone, AdapterView):
        raise TypeError("program: the network has an adapter on; merge it into the base's weights first")
    if not backbone.fused:
        raise TypeError("program: the network is stock diffusers, whose rotary tables are complex: fuse it first")
    if isinstance(backbone, ZImageBackbone):
        return TraceableZImage(backbone.model, backbone.patch_size)
    if isinstance(backbone, Flux2Backbone):
        return TraceableFlux2(backbone.model, backbone.embedded_guidance)
    raise TypeError(f"program: a {type(backbone).__name__} has no traceable form")


class Steps(nn.Module):
    """All steps of a student in one: forward(noise [B, C, H, W], features, ...) -> clean latents, float32."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        made = {id(one): network(one) for one in student.distinct_networks()}
        self.networks = nn.ModuleList([cast(nn.Module, made[id(one)]) for one in student.networks])
        self.sigmas, self.dtype = student.sigmas, student.distinct_networks()[0].dtype

    def forward(self, noise: Tensor, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        context = {"features": features} if lengths is None else {"features": features, "lengths": lengths}
        x = noise.float()
        for number, one in enumerate(self.networks):
            sigma = torch.full((x.shape[0],), self.sigmas[number], dtype=torch.float32, device=x.device)
            v = one(x.to(self.dtype), sigma, **context).float()
            x = x + (self.sigmas[number + 1] - self.sigmas[number]) * v
        return x

    def example(self, batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        given = self._first.example(batch, height, width, tokens)
        del given["sigma"]
        return {"noise": given.pop("x").float(), **given}

    def dims(self) -> dict[str, Any]:
        found = self._first.dims(batch_dim())
        del found["sigma"]
        return {"noise": found.pop("x"), **found}

    @property
    def _first(self) -> Traceable:
        return cast(Traceable, self.networks[0])
