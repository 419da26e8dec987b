"""Noise levels to train at: one per sample, strictly inside (low, high), from an explicit torch.Generator.

Every sampler draws one uniform number u per sample and maps it through the inverse distribution function of its density
restricted to (low, high), so bounds cost no rejected draws and pile nothing up at their ends:

    uniform         sigma = low + (high - low) u
    shifted         uniform in the unshifted level, then sigma = s u / (1 + (s - 1) u)    arXiv 2403.03206
    logit-normal    sigma = sigmoid(mean + std z), z normal                               arXiv 2403.03206

Bounds are numbers or tensors [batch] (a step's own input). Levels are drawn in float64 on the generator's device and
stay there, or move to `device`: a CPU generator gives the same levels on every device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import arguments

Bound = float | Tensor
DTYPES = (torch.float32, torch.float64)
# Ours: below this share of the distribution the inverse in float64 has lost most of its digits.
SMALLEST_SHARE = 1e-6


class Sampler(Protocol):
    """What `sigmas_below` accepts: any of the samplers here, or a partial of one."""

    def __call__(
        self,
        batch: int,
        *,
        low: Bound,
        high: Bound,
        generator: torch.Generator,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Tensor: ...


def uniform_sigmas(
    batch: int,
    low: Bound = 0.0,
    high: Bound = 1.0,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform in (low, high), [batch]. DMD2's code re-noises uniformly in (.02, .98)."""
    lowest, highest = _bounds("uniform_sigmas", batch, low, high, generator, dtype)
    sigma = lowest + (highest - lowest) * _uniform(batch, generator)
    return _inside("uniform_sigmas", sigma, lowest, highest, device, dtype)


def shifted_sigmas(
    batch: int,
    shift: float,
    low: Bound = 0.0,
    high: Bound = 1.0,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform before a shift of the time axis, restricted to (low, high) after it, [batch]. shift > 1 favours noise."""
    arguments.check_positive("shifted_sigmas", "shift", shift)
    lowest, highest = _bounds("shifted_sigmas", batch, low, high, generator, dtype)
    first, last = _shift(lowest, 1 / shift), _shift(highest, 1 / shift)
    sigma = _shift(first + (last - first) * _uniform(batch, generator), shift)
    return _inside("shifted_sigmas", sigma, lowest, highest, device, dtype)


def logit_normal_sigmas(
    batch: int,
    mean: float = 0.0,
    std: float = 1.0,
    low: Bound = 0.0,
    high: Bound = 1.0,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """sigmoid of a normal with this mean and standard deviation, restricted to (low, high), [batch]."""
    name = "logit_normal_sigmas"
    arguments.check_number(name, "mean", mean)
    arguments.check_positive(name, "std", std)
    lowest, highest = _bounds(name, batch, low, high, generator, dtype)
    first, last = (torch.special.ndtr((bound.logit() - mean) / std) for bound in (lowest, highest))
    share = last - first
    if bool((share < SMALLEST_SHARE).any()):
        raise ValueError(
            f"{name}: the interval from low to high holds {share.min().item():.1e} of the distribution, expected at"
            f" least {SMALLEST_SHARE}: choose mean and std that reach it, or uniform_sigmas"
        )
    sigma = torch.sigmoid(mean + std * torch.special.ndtri(first + share * _uniform(batch, generator)))
    return _inside(name, sigma, lowest, highest, device, dtype)


def sigmas_below(
    batch: int,
    step_sigma: Bound,
    *,
    low: float = 0.0,
    sampler: Sampler = uniform_sigmas,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Strictly below the input level of the step being trained, [batch].

    So re-noise Z-Image Turbo++ (arXiv 2606.12575) and Decoupled DMD's augmentation term (arXiv 2511.22677).

    Args:
        batch: how many.
        step_sigma: the step's input level, a number or one per sample [batch].
        low: the least level.
        sampler: the density, restricted to (low, step_sigma): `uniform_sigmas`, or functools.partial of another.
        generator, device, dtype: as in the samplers.
    """
    if not callable(sampler):
        raise TypeError(
            f"sigmas_below: sampler is {type(sampler).__name__}, expected a function of this module, such as"
            " uniform_sigmas, or functools.partial of one"
        )
    return sampler(batch, low=low, high=step_sigma, generator=generator, device=device, dtype=dtype)


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """s * sigma / (1 + (s - 1) * sigma): moves levels towards noise for shift > 1; 1 / shift undoes it."""
    arguments.check_tensor("shift_sigmas", "sigma", sigma)
    arguments.check_positive("shift_sigmas", "shift", shift)
    arguments.check_levels("shift_sigmas", "sigma", sigma, zero=True, one=True)
    return _shift(sigma, shift)


def _shift(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _uniform(batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)


def _bounds(
    name: str, batch: int, low: Bound, high: Bound, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both bounds as float64 on the generator's device, checked: 0 <= low < high <= 1."""
    if isinstance(batch, bool) or not isinstance(batch, int):
        raise TypeError(f"{name}: batch is {type(batch).__name__}, expected an int")
    if batch < 1:
        raise ValueError(f"{name}: batch is {batch}, expected at least 1")
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{name}: generator is {type(generator).__name__}, expected a torch.Generator: one per rank and purpose"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"{name}: dtype is {dtype}, expected torch.float32 or torch.float64: half precision has few levels near 1"
        )
    lowest, highest = (_bound(name, label, b, batch, generator) for label, b in (("low", low), ("high", high)))
    bad = ~((lowest >= 0) & (lowest < highest) & (highest <= 1))
    if bool(bad.any()):
        first, last = (t.expand(bad.shape)[bad].flatten()[0].item() for t in (lowest, highest))
        raise ValueError(f"{name}: the interval is ({first}, {last}), expected 0 <= low < high <= 1")
    return lowest, highest


def _bound(name: str, label: str, bound: Bound, batch: int, generator: torch.Generator) -> Tensor:
    if not isinstance(bound, Tensor):
        arguments.check_number(name, label, bound)
        return torch.tensor(float(bound), dtype=torch.float64, device=generator.device)
    arguments.check_tensor(name, label, bound)
    if bound.shape not in ((), (batch,)):
        raise ValueError(f"{name}: {label} has shape {arguments.shape_text(bound)}, expected a number or [{batch}]")
    return bound.detach().to(generator.device, torch.float64)


def _inside(
    name: str, sigma: Tensor, lowest: Tensor, highest: Tensor, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """Rounds to dtype without reaching a bound: levels that round onto one take its neighbour inside."""
    least = torch.nextafter(_rounded(lowest, dtype, up=False), torch.tensor(2.0, dtype=dtype, device=lowest.device))
    most = torch.nextafter(_rounded(highest, dtype, up=True), torch.tensor(-1.0, dtype=dtype, device=lowest.device))
    if bool((least > most).any()):
        raise ValueError(f"{name}: no {dtype} number lies between low and high: widen the interval")
    return torch.minimum(torch.maximum(sigma.to(dtype), least), most).to(device)


def _rounded(bound: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """The bound as dtype, rounded outwards, so that its neighbour inside is within the interval."""
    near = bound.to(dtype)
    towards = torch.tensor(2.0 if up else -1.0, dtype=dtype, device=bound.device)
    beyond = near.double() < bound if up else near.double() > bound
    return torch.where(beyond, torch.nextafter(near, towards), near)
