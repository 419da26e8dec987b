"""A network in the library's one convention: sigma and velocity, whatever the network itself speaks.

    x_sigma = (1 - sigma) x + sigma eps        v = eps - x        clean prediction = x_sigma - sigma v

sigma is 1 for pure noise. A subclass holds every sign, time and packing convention of its family in `_predict`; nothing
outside knows them. Everything that a Backbone computes goes through its `forward`, so that FSDP2's hooks see it (DDP is
a module around a module, whose own call alone reduces: average gradients as the trainer does, or wrap what calls the
roles). FSDP2 with a MixedPrecisionPolicy: cast_forward_inputs=False keeps the rotary tables in float32 on their way
into the blocks (the backbone casts what has to be cast).
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..values import values_can_be_read
from .context import Context
from .fuse import is_fused
from .sampling import ROUNDING


class Level:
    """sigma [B] on its way into `forward`. FSDP casts tensors among the arguments, and in dataclasses among them, to
    its compute dtype; it does not look in here. A sigma rounded to bfloat16, .9545 to .9531, is 1.4 of Z-Image's
    thousand times away."""

    __slots__ = ("sigma",)

    def __init__(self, sigma: Tensor) -> None:
        self.sigma = sigma


def need_backbone(owner: str, given: object) -> None:
    if not isinstance(getattr(given, "_orig_mod", given), Backbone):  # torch.compile's wrapper calls it
        inside = getattr(given, "backbone", None)
        hint = "pass its .backbone" if isinstance(inside, Backbone) else "load_backbone makes one"
        raise TypeError(f"{owner}: given {type(given).__name__}, expected a Backbone: {hint}")


class Backbone(nn.Module, ABC):
    """A diffusers transformer as a velocity field. `model` is the diffusers model itself, for saving and for PEFT."""

    family: str  # "z-image", "flux2"
    latent_factor: int  # height and width of latents are multiples of this

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    # What a subclass defines

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    @abstractmethod
    def context_width(self) -> int:
        """Channels of a context's features."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the tokens that `features` returns."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The main blocks in order: what `features` counts, and what checkpointing, compiling and sharding go by."""

    @abstractmethod
    def default_shift(self, height: int, width: int, steps: int) -> float:
        """The shift of the sigma grid that the public pipeline uses for latents of this size and so many steps."""

    @abstractmethod
    def _predict(self, x: Tensor, sigma: Tensor, context: Context, taps: Sequence[int] | None) -> Tensor | list[Tensor]:
        """v in the family's own network, from checked inputs; with taps, the image's tokens after those blocks."""

    # What everybody calls

    def velocity(self, x: Tensor, sigma: Tensor | float, context: Context) -> Tensor:
        """v = eps - x at x [B, C, H, W] and sigma (a number, or [B]); in the dtype of x."""
        return self(x, Level(self._sigma(x, sigma)), context).to(x.dtype)

    def clean(self, x: Tensor, sigma: Tensor | float, context: Context) -> Tensor:
        """The clean prediction x - sigma v, in float32 or better: sigma is not rounded to what x is in."""
        v, wide = self.velocity(x, sigma, context), torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) - torch.as_tensor(sigma, dtype=wide, device=x.device).view(-1, 1, 1, 1) * v.to(wide)

    def features(self, x: Tensor, sigma: Tensor | float, context: Context, blocks: Sequence[int]) -> list[Tensor]:
        """The image's tokens [B, tokens, width] after each of these blocks; what is behind the last does not run."""
        count = len(self.blocks())
        wrong = [index for index in blocks if not 0 <= index < count]
        if not blocks or wrong:
            raise ValueError(
                f"{self._name}: blocks are {list(blocks)}, expected at least one index from 0 to {count - 1}: this "
                f"model has {count} blocks"
            )
        return self(x, Level(self._sigma(x, sigma)), context, tuple(blocks))

    def forward(
        self, x: Tensor, sigma: Tensor | float | Level, context: Context, taps: Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """`velocity`, or with taps `features`: the one way in, for wrappers that hook it."""
        level = sigma.sigma if isinstance(sigma, Level) else self._sigma(x, sigma)
        self._check(x, context)
        dtype = self.dtype
        if context.features.dtype != dtype or context.features.device != x.device:
            context = context.to(x.device, dtype)
        out = self._predict(x.to(dtype), level, context, taps)
        return out if isinstance(out, list) else out.to(x.dtype)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        if enabled:
            self.model.enable_gradient_checkpointing()
        else:
            self.model.disable_gradient_checkpointing()

    @property
    def dtype(self) -> torch.dtype:
        """What inputs are cast to: the dtype of the parameters. Autocast, where it is on, goes on from there."""
        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        return parameter.dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def fused(self) -> bool:
        """Whether the model runs on twostep.ops (fuse) or is stock diffusers."""
        return is_fused(self.model)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _sigma(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """sigma as float32 [B] on x's device."""
        if not isinstance(x, Tensor) or x.dim() != 4:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{self._name}: x is {given}, expected one tensor [batch, channels, height, width]; images of "
                "different sizes go into different batches"
            )
        if not x.is_floating_point():
            raise TypeError(f"{self._name}: x is {x.dtype}, expected a floating-point dtype: latents, not pixels")
        self._check_sigma(sigma)
        level = torch.as_tensor(sigma, dtype=torch.float32)
        if level.dim() == 0:
            return level.to(x.device).expand(len(x))
        if level.shape != (len(x),):
            raise ValueError(
                f"{self._name}: sigma has shape {list(level.shape)}, expected a number or [{len(x)}] (batch)"
            )
        return level.to(x.device)

    def _check_sigma(self, sigma: object) -> None:
        """Numbers, and tensors whose values are at hand: those on a GPU are not waited for."""
        wanted = "expected numbers from 0 (clean) to 1 (noise)"
        if not isinstance(sigma, (numbers.Real, Tensor)):
            raise TypeError(f"{self._name}: sigma is {type(sigma).__name__}, {wanted}, one or a tensor")
        if not isinstance(sigma, Tensor):
            if not -ROUNDING <= float(sigma) <= 1 + ROUNDING:
                raise ValueError(f"{self._name}: sigma is {sigma}, {wanted}")
            return
        if not sigma.is_floating_point():
            raise TypeError(f"{self._name}: sigma has dtype {sigma.dtype}, {wanted}")
        if sigma.device.type == "cpu" and values_can_be_read(sigma):
            inside = (sigma >= -ROUNDING) & (sigma <= 1 + ROUNDING)
            if not bool(inside.all()):
                raise ValueError(f"{self._name}: sigma is {sigma.detach().flatten().tolist()[:8]}, {wanted}")

    def _check(self, x: Tensor, context: Context) -> None:
        batch, channels, height, width = x.shape
        if 0 in x.shape:
            raise ValueError(
                f"{self._name}: x has shape {list(x.shape)}: a batch needs at least one sample, of some size"
            )
        if channels != self.channels or height % self.latent_factor or width % self.latent_factor:
            raise ValueError(
                f"{self._name}: x has shape {list(x.shape)}, expected [batch, {self.channels}, height, width] with a "
                f"height and width that are multiples of {self.latent_factor}"
            )
        if not isinstance(context, Context):
            raise TypeError(f"{self._name}: context is {type(context).__name__}, expected a twostep.zoo.Context")
        if context.batch != batch:
            raise ValueError(
                f"{self._name}: the context has {context.batch} samples and x has {batch}; repeat a context with "
                f"context.repeat(times)"
            )
        maker, colon, _ = context.encoder.partition(":")
        if colon and not maker.startswith(self.family):
            raise ValueError(
                f"{self._name}: the context was made by {context.encoder}, an encoder of another family than "
                f"{self.family}; encode the captions with load_text_encoder of this model's own pipeline"
            )
        if context.features.shape[2] != self.context_width:
            made_by = f" (encoder {context.encoder})" if context.encoder else ""
            raise ValueError(
                f"{self._name}: the context{made_by} has {context.features.shape[2]} channels, expected "
                f"{self.context_width}: it was made by another text encoder than this model's"
            )
        for reference in context.references:
            if reference.shape[1] != channels or any(n % self.latent_factor for n in reference.shape[2:]):
                raise ValueError(
                    f"{self._name}: a reference has shape {list(reference.shape)}, expected [{batch}, {channels}, "
                    f"height, width] with multiples of {self.latent_factor}"
                )
