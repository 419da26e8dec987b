"""What the losses accept, with errors that say what was given, what is accepted and what to do.

Shapes, dtypes, devices and Python numbers are always checked. The values inside a tensor are read only where that is
possible: not while torch.compile traces, not inside a torch.func transform or under a dispatch mode, not on meta, fake
or distributed tensors.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from ..values import values_can_be_read

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def shape_text(t: Tensor) -> str:
    return str(list(t.shape))


def check_tensor(loss: str, name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{loss}: {name} is {type(t).__name__}, expected a torch.Tensor")
    if t.dtype not in DTYPES:
        raise TypeError(f"{loss}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def check_samples(loss: str, name: str, t: Tensor) -> None:
    check_tensor(loss, name, t)
    if t.dim() == 0 or t.numel() == 0:
        raise ValueError(
            f"{loss}: {name} has shape {shape_text(t)}, expected [batch, ...] with at least one sample and value"
        )


def check_device(loss: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"{loss}: {name} is on {t.device}, expected {like.device}, where {like_name} is")


def check_same(loss: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """No broadcasting between tensors: [B, 1] against [B] would pass as [B, B], the classic silent bug of losses."""
    check_tensor(loss, name, t)
    check_device(loss, name, t, like_name, like)
    if t.shape != like.shape:
        raise ValueError(
            f"{loss}: {name} has shape {shape_text(t)}, expected {shape_text(like)}, the shape of {like_name}"
        )


def check_per_sample(loss: str, name: str, t: object, like_name: str, like: Tensor) -> None:
    check_tensor(loss, name, t)
    assert isinstance(t, Tensor)
    check_device(loss, name, t, like_name, like)
    if t.dim() != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(
            f"{loss}: {name} has shape {shape_text(t)}, expected [{like.shape[0]}], one value for each sample"
            f" of {like_name}"
        )


def check_choice(loss: str, name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{loss}: {name} is {value!r}, expected one of {', '.join(map(repr, accepted))}")


def check_number(loss: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{loss}: {name} is {type(value).__name__}, expected a number")
    finite = float("-inf") < value < float("inf")  # type: ignore[operator]  # isfinite takes no symbol of torch.compile
    if not finite:
        raise ValueError(f"{loss}: {name} is {value}, expected a finite number")


def check_positive(loss: str, name: str, value: float) -> None:
    check_number(loss, name, value)
    if not value > 0:
        raise ValueError(f"{loss}: {name} is {value}, expected a number above 0")


def check_sigma(
    loss: str, name: str, sigma: float | Tensor, like_name: str, like: Tensor, *, zero: bool, one: bool
) -> None:
    """A number, or one per sample, between 0 and 1; the ends themselves are accepted where `zero` and `one` say so."""
    if not isinstance(sigma, Tensor):
        check_number(loss, name, sigma)
        if not ((sigma >= 0 if zero else sigma > 0) and (sigma <= 1 if one else sigma < 1)):
            raise ValueError(f"{loss}: {name} is {sigma}, expected a value in {_interval(zero, one)}")
        return
    check_tensor(loss, name, sigma)
    if sigma.dim() != 0:
        check_per_sample(loss, name, sigma, like_name, like)
    check_levels(loss, name, sigma, zero=zero, one=one)


def check_levels(loss: str, name: str, sigma: Tensor, *, zero: bool, one: bool) -> None:
    """The values of a checked tensor, of any shape, where they can be read."""
    if not values_can_be_read(sigma):
        return
    inside = ((sigma >= 0) if zero else (sigma > 0)) & ((sigma <= 1) if one else (sigma < 1))
    if not bool(inside.all()):
        wrong = sigma[~inside].flatten()[0].item() if sigma.dim() else sigma.item()
        raise ValueError(f"{loss}: {name} holds {wrong}, expected values in {_interval(zero, one)}")


def _interval(zero: bool, one: bool) -> str:
    hint = " (sigma: 1 is pure noise, 0 the clean image; a timestep in 0..1000 is sigma * 1000)"
    return f"{'[' if zero else '('}0, 1{']' if one else ')'}{hint}"


def per_sample_factor(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number as it is; a tensor [B] as data of like's dtype, shaped to multiply `like` [B, ...]."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device=like.device, dtype=like.dtype)
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() else value
