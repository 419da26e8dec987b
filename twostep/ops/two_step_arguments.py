"""What two_step_backward accepts, with errors that say what was given, what is accepted, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import DTYPES, check_choice, check_number, shape_text
from .two_step_replay import OP, Step, owners

MODES = ("recompute", "retain", "plain")


def velocity(name: str, step: Step, state: Tensor, noise: Tensor) -> Tensor:
    version = None if state.is_inference() else state._version
    in_place = (
        f"{OP}: {name} changes its input in place, which is read again after it: let it work on a copy, as in "
        "lambda x: model(x.clone())"
    )
    try:
        v = step(state)
    except RuntimeError as error:
        if state.requires_grad and "a leaf Variable that requires grad is being used in an in-place" in str(error):
            raise ValueError(f"{in_place}. Or it is a parameter that {name} changes in place") from error
        raise
    if version is not None and state._version != version:
        raise ValueError(in_place)
    if not isinstance(v, Tensor):
        raise TypeError(
            f"{OP}: {name} returned {type(v).__name__}, expected a tensor; wrap it, as in lambda x: model(x).sample"
        )
    if v.dtype not in DTYPES:
        raise TypeError(f"{OP}: {name} returned dtype {v.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if v.shape != noise.shape or v.device != noise.device:
        raise ValueError(
            f"{OP}: {name} returned a velocity of shape {shape_text(v)} on {v.device}, expected the noise's, "
            f"{shape_text(noise)} on {noise.device}"
        )
    return v


def check_arguments(
    first: object,
    second: object,
    noise: object,
    sigmas: Sequence[float],
    first_loss: object,
    final_loss: object,
    mode: str,
    first_pass: str,
    sync: str | None,
) -> float:
    """mid, once everything has been found to be what it should be."""
    for name, given, optional in (
        ("first", first, False),
        ("second", second, False),
        ("first_loss", first_loss, True),
        ("final_loss", final_loss, True),
    ):
        if not callable(given) and not (optional and given is None):
            raise TypeError(f"{OP}: {name} is {type(given).__name__}, expected a callable" + (" or None" * optional))
    if first_loss is None and final_loss is None:
        raise ValueError(f"{OP}: first_loss and final_loss are both None, so there is nothing to learn from: give one")
    check_choice(OP, "mode", mode, MODES)
    check_choice(OP, "first_pass", first_pass, ("no_grad", "grad"))
    if sync is not None:
        check_choice(OP, "sync", sync, ("each", "last"))
    if not isinstance(noise, Tensor) or noise.dtype not in DTYPES:
        given = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{OP}: noise is {given}, expected a tensor of {', '.join(map(str, DTYPES))}")
    if noise.dim() == 0 or noise.numel() == 0:
        raise ValueError(
            f"{OP}: noise has shape {shape_text(noise)}, expected [batch, ...] with at least one sample and value"
        )
    if noise.requires_grad:
        raise ValueError(f"{OP}: noise requires a gradient, and the noise is data here: pass noise.detach()")
    if not torch.is_grad_enabled():
        raise ValueError(
            f"{OP}: called under torch.no_grad or inference_mode: it takes gradients, so leave that region"
        )
    try:
        values = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError):
        raise TypeError(f"{OP}: sigmas is {sigmas!r}, expected three numbers (1, mid, 0)") from None
    if len(values) != 3 or values[0] != 1.0 or values[2] != 0.0 or not 0.0 < values[1] < 1.0:
        raise ValueError(
            f"{OP}: sigmas is {tuple(values)}, expected (1, mid, 0) with mid between 0 and 1: (1, 0.75, 0) is the "
            "grid of shift 3"
        )
    return values[1]


def check_numbers(inherit: float, clip: float | None, loss_scale: float, first_loss: object) -> None:
    check_number(OP, "inherit", inherit)
    if inherit < 0:
        raise ValueError(f"{OP}: inherit is {inherit}, expected a number that is not negative")
    if inherit == 0 and first_loss is None:
        raise ValueError(f"{OP}: inherit is 0 and first_loss is None, so step 1 learns from nothing: give one of them")
    if clip is not None:
        check_number(OP, "clip", clip)
        if clip <= 0:
            raise ValueError(f"{OP}: clip is {clip}, expected a number above 0, or None")
    check_number(OP, "loss_scale", loss_scale)
    if loss_scale <= 0:
        raise ValueError(f"{OP}: loss_scale is {loss_scale}, expected a number above 0, as 1 / micro-batches")


def check_scaler(scaler: object) -> None:
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"{OP}: scaler is {type(scaler).__name__}, expected a torch.amp.GradScaler or None")


def generators_of(given: object) -> tuple[torch.Generator, ...]:
    if isinstance(given, torch.Generator) or not isinstance(given, Iterable):
        raise TypeError(f"{OP}: generators is {type(given).__name__}, expected a list of torch.Generator")
    found = tuple(given)
    for generator in found:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"{OP}: generators holds {type(generator).__name__}, expected torch.Generator")
    return found


def modules_of_steps(
    first: Step, second: Step, given: tuple[Any, Any] | None
) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    if given is None:
        return owners(first), owners(second)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{OP}: modules is {type(given).__name__}, expected a pair (of first, of second)")
    pair = [tuple(g) if isinstance(g, (tuple, list)) else (g,) for g in given]
    for module in (*pair[0], *pair[1]):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{OP}: modules holds {type(module).__name__}, expected torch.nn.Module")
    return pair[0], pair[1]
