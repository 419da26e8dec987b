"""The teacher: N Euler steps on a shifted grid, with guidance.

    guided velocity = v(negative) + w (v(prompt) - v(negative))        w = 1 is no guidance

Z-Image's pipelines count w - 1 and call that the scale; here it is always w. Guidance can be limited to an interval of
sigma (arXiv 2404.07724): at the noisiest levels it drives samples together, and at the cleanest it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backbone import Backbone
from .context import Context
from .sampling import check_grid, euler, sigma_grid

EVERYWHERE = (0.0, 1.0)
ROUNDING = 1e-6  # of levels, which come in float32 and as Python's numbers: a bound belongs to the interval


def check_interval(owner: str, interval: Sequence[float], guidance: float | None = None) -> tuple[float, float]:
    """Two levels sigma. Where the guidance that they limit is given, it must be one."""
    levels = tuple(float(level) for level in interval) if isinstance(interval, Sequence) else ()
    if len(levels) != 2 or not 0 <= levels[0] <= levels[1] <= 1:
        raise ValueError(f"{owner}: guidance_interval is {interval}, expected two levels, 0 <= least <= greatest <= 1")
    if guidance == 1 and levels != EVERYWHERE:
        raise ValueError(f"{owner}: guidance_interval is {levels}, and guidance is 1, which is none: give guidance too")
    return levels


class Teacher:
    """A backbone as a multi-step sampler; also the real score of distribution matching, by `clean`.

    Args:
        backbone: full, or a view of an AdapterBase. The teacher does not freeze it: load_backbone's parameters ask
            for gradients, as a student's do, and `velocity` would keep their graph. So: .requires_grad_(False).
        steps, shift: of the default grid. shift=None takes what the family's public pipeline uses.
        guidance: the scale w. Other than 1 it needs a negative context, here or in each call.
        negative: context of the empty (or a negative) prompt, of batch 1.
        guidance_interval: the levels sigma, least and greatest, that are guided; elsewhere the prompt's velocity alone
            is asked for. A pipeline's cfg_truncation T is (1 - T, 1).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        steps: int = 8,
        shift: float | None = None,
        guidance: float = 1.0,
        negative: Context | None = None,
        guidance_interval: tuple[float, float] = EVERYWHERE,
    ) -> None:
        sigma_grid(steps, 1.0 if shift is None else shift)
        self.backbone, self.steps, self.shift = backbone, steps, shift
        self.guidance, self.negative = guidance, negative
        self.guidance_interval = check_interval("Teacher", guidance_interval)

    def sigmas(self, height: int, width: int, steps: int | None = None) -> tuple[float, ...]:
        """The grid for latents of this size."""
        steps = self.steps if steps is None else steps
        shift = self.backbone.default_shift(height, width, steps) if self.shift is None else self.shift
        return sigma_grid(steps, shift)

    def evaluations(self, height: int, width: int) -> int:
        """Of the network for an image with latents of this size (NFE); guidance takes two a step."""
        weights = [self._weight(self.guidance, sigma) for sigma in self.sigmas(height, width)[:-1]]
        return sum(1 if weight == 1 else 2 for weight in weights)

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor | float,
        context: Context,
        *,
        guidance: float | None = None,
        negative: Context | None = None,
    ) -> Tensor:
        """The guided velocity, in float32 or better."""
        w = self._weight(self.guidance if guidance is None else guidance, sigma)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if not isinstance(w, Tensor) and w == 1:
            return self.backbone.velocity(x, sigma, context).to(wide)
        level = torch.as_tensor(sigma)
        both = torch.cat([level, level]) if level.dim() else level
        contexts = Context.cat([context, self._negative(context, negative)])
        positive, other = self.backbone.velocity(torch.cat([x, x]), both, contexts).to(wide).chunk(2)
        if isinstance(w, Tensor):
            w = w.to(positive)
        return other + w * (positive - other)

    def clean(
        self,
        x: Tensor,
        sigma: Tensor | float,
        context: Context,
        *,
        guidance: float | None = None,
        negative: Context | None = None,
    ) -> Tensor:
        """The guided clean prediction x - sigma v."""
        level = torch.as_tensor(sigma, device=x.device).float()
        v = self.velocity(x, sigma, context, guidance=guidance, negative=negative)
        return x - level.view(-1, 1, 1, 1) * v

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        context: Context,
        *,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance: float | None = None,
        negative: Context | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Clean latents from noise [B, C, H, W], in float32. `on_step(index, x)` sees the state after each step."""
        if steps is not None and sigmas is not None:
            raise ValueError("Teacher.sample: both steps and sigmas were given; sigmas say how many steps there are")
        if noise.dim() != 4:
            raise ValueError(
                f"Teacher.sample: noise has shape {list(noise.shape)}, expected [batch, channels, height, width]"
            )
        height, width = noise.shape[2:]
        grid = self.sigmas(height, width, steps) if sigmas is None else check_grid("Teacher.sample", sigmas)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self.velocity(x, sigma, context, guidance=guidance, negative=negative)

        return euler(velocity, noise, grid, on_step=on_step)

    def _weight(self, guidance: float, sigma: Tensor | float) -> float | Tensor:
        """The scale at this level; a tensor where samples have levels of their own, some of them outside."""
        least, greatest = self.guidance_interval
        if guidance == 1 or (least, greatest) == EVERYWHERE:
            return guidance
        level = torch.as_tensor(sigma).float()
        inside = (least - ROUNDING <= level) & (level <= greatest + ROUNDING)
        if level.dim():
            return torch.where(inside, guidance, 1.0).view(-1, 1, 1, 1)
        return guidance if inside else 1.0

    def _negative(self, context: Context, negative: Context | None) -> Context:
        negative = self.negative if negative is None else negative
        if negative is None:
            raise ValueError(
                "Teacher: guidance other than 1 needs a negative context: encode the empty prompt and pass it as "
                "negative=..., "
                "here or to Teacher(...)"
            )
        if negative.batch == context.batch:
            return negative
        if negative.batch != 1:
            raise ValueError(
                f"Teacher: the negative context has {negative.batch} samples, expected 1 or {context.batch}"
            )
        return negative.repeat(context.batch)
