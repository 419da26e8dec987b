"""The teacher: N Euler steps on a shifted grid, with guidance.

    guided velocity = v(negative) + w (v(prompt) - v(negative))        w = 1 is no guidance

Z-Image's pipelines count w - 1 and call that the scale; here it is always w. Guidance can be limited to an interval of
sigma (arXiv 2404.07724): at the noisiest levels it drives samples together, and at the cleanest it decides nothing.
With eta, steps renew noise as they go (sampling.py), which mends mistakes; limited to an interval as well, since at the
cleanest levels it costs detail (arXiv 2206.00364, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .backbone import Backbone
from .context import Context
from .sampling import ROUNDING, check_grid, euler, sigma_grid

EVERYWHERE = (0.0, 1.0)
Generators = torch.Generator | Sequence[torch.Generator] | None
_NONE = {"guidance": 1, "eta": 0}


def check_interval(
    owner: str, interval: Sequence[float], strength: float | None = None, *, of: str = "guidance"
) -> tuple[float, float]:
    """Two levels sigma. Where the strength of what they limit is given, it must not be none."""
    levels = tuple(float(level) for level in interval) if isinstance(interval, Sequence) else ()
    if len(levels) != 2 or not 0 <= levels[0] <= levels[1] <= 1:
        raise ValueError(f"{owner}: {of}_interval is {interval}, expected two levels, 0 <= least <= greatest <= 1")
    none = _NONE[of]
    if strength == none and levels != EVERYWHERE:
        raise ValueError(f"{owner}: {of}_interval is {levels}, and {of} is {none}, which is none: give {of} too")
    return levels


def check_eta(owner: str, eta: float) -> float:
    if not 0 <= eta <= 1:
        raise ValueError(f"{owner}: eta is {eta}, expected 0 (no noise is renewed) to 1")
    return eta


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
        eta: how much of a step's noise is renewed, 0 (none) to 1 (as in ancestral sampling); see sampling.py.
        eta_interval: the levels sigma, least and greatest, from which a step renews noise.
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
        eta: float = 0.0,
        eta_interval: tuple[float, float] = EVERYWHERE,
    ) -> None:
        sigma_grid(steps, 1.0 if shift is None else shift)
        self.backbone, self.steps, self.shift = backbone, steps, shift
        self.guidance, self.negative = guidance, negative
        self.guidance_interval = check_interval("Teacher", guidance_interval)
        self.eta = check_eta("Teacher", eta)
        self.eta_interval = check_interval("Teacher", eta_interval, self.eta, of="eta")

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
        v = self.velocity(x, sigma, context, guidance=guidance, negative=negative)
        level = torch.as_tensor(sigma, device=x.device, dtype=v.dtype)
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
        generator: Generators = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Clean latents from noise [B, C, H, W], in float32. `on_step(index, x)` sees the state after each step.

        `generator`, or one for each sample, draws the noise of eta; None is torch's own.
        """
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

        drawn_by = list(generator) if isinstance(generator, Sequence) else generator
        if isinstance(drawn_by, list) and len(drawn_by) != len(noise):
            raise ValueError(
                f"Teacher.sample: {len(drawn_by)} generators for {len(noise)} samples, expected one, or one for each"
            )

        def fresh(x: Tensor) -> Tensor:
            return randn_tensor(x.shape, drawn_by, x.device, x.dtype)

        return euler(velocity, noise, grid, eta=self._eta, fresh=fresh, on_step=on_step)

    def _eta(self, sigma: float) -> float:
        return self.eta if _inside(self.eta_interval, sigma) else 0.0

    def _weight(self, guidance: float, sigma: Tensor | float) -> float | Tensor:
        """The scale at this level; a tensor where samples have levels of their own, some of them outside."""
        if guidance == 1 or self.guidance_interval == EVERYWHERE:
            return guidance
        inside = _inside(self.guidance_interval, sigma)
        if inside.dim():
            return torch.where(inside, guidance, 1.0).view(-1, 1, 1, 1)
        return guidance if inside else 1.0

    def _negative(self, context: Context, negative: Context | None) -> Context:
        negative = self.negative if negative is None else negative
        if negative is None:
            raise ValueError(
                "Teacher: guidance other than 1 needs a negative context: encode the empty prompt and pass it as "
                "negative=..., here or to Teacher(...)"
            )
        if negative.batch == context.batch:
            return negative
        if negative.batch != 1:
            raise ValueError(
                f"Teacher: the negative context has {negative.batch} samples, expected 1 or {context.batch}"
            )
        return negative.repeat(context.batch)


def _inside(interval: tuple[float, float], sigma: Tensor | float) -> Tensor:
    level = torch.as_tensor(sigma).float()
    return (interval[0] - ROUNDING <= level) & (level <= interval[1] + ROUNDING)
