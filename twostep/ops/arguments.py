"""What the operators accept, checked once in Python, with errors that say what was given and what is accepted.

The kernels see rows: x as [batch, length, width], modulation as [batch, width] or [batch, 1, width] (per sample) or
[batch, length, width] (per token), all parameters in one dtype. The functions here bring what the caller has into that
form by views and, where dtypes are mixed, by casts that autograd sees. The operators of the two-step backward know no
rows: they see samples, [batch, size].
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def shape_text(t: Tensor) -> str:
    return str(list(t.shape))


def check_tensor(op: str, name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}, expected a torch.Tensor")
    if t.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} has layout {t.layout}, expected torch.strided: pass {name}.to_dense()")


def check_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {like.device}, where the activations are")


def check_choice(op: str, name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, accepted))}")


def check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (float, numbers.Real, torch.SymFloat)):
        raise TypeError(f"{op}: eps is {type(eps).__name__}, expected a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps is {eps}, expected a finite number that is not negative")


def check_rows(op: str, name: str, t: Tensor) -> None:
    check_tensor(op, name, t)
    if t.dim() == 0 or t.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {shape_text(t)}, expected [..., width] with a width of at least 1")


def check_same(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(op, name, t)
    check_device(op, name, t, like)
    if t.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(t)}, expected {shape_text(like)}, the shape of {like_name}"
        )


def check_weight(op: str, name: str, weight: Tensor | None, x: Tensor) -> None:
    if weight is None:
        return
    check_tensor(op, name, weight)
    check_device(op, name, weight, x)
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"{op}: {name} has shape {shape_text(weight)}, expected [{x.shape[-1]}] (width)")


def as_rows(x: Tensor) -> Tensor:
    """x as [batch, length, width]; a matrix is one sample."""
    rank = x.dim()
    if rank == 3:
        return x
    if rank < 3:
        return x.reshape(1, -1, x.shape[-1])
    return x.flatten(1, -2)


def _accepted_modulation(x: Tensor) -> str:
    width = x.shape[-1]
    if x.dim() < 3:
        return f"[{width}] or {shape_text(x)} (per row)"
    return f"[{x.shape[0]}, {width}] (batch, width) or {shape_text(x)} (per token)"


def check_modulation(op: str, name: str, m: Tensor | None, x: Tensor) -> None:
    if m is None:
        return
    check_tensor(op, name, m)
    check_device(op, name, m, x)
    rank, batch, middle = m.dim(), x.shape[0], x.shape[1:-1]
    fits = rank >= 1 and m.shape[-1] == x.shape[-1]
    if fits and rank > 1:
        fits = m.shape[0] == batch or m.shape[0] == 1
    if fits and rank > 2:
        own = m.shape[1:-1]
        fits = rank == x.dim() and (own == middle or all(size == 1 for size in own))
    if not fits or (x.dim() == 1 and rank != 1):
        raise ValueError(f"{op}: {name} has shape {shape_text(m)}, expected {_accepted_modulation(x)}")


def align_modulation(m: Tensor | None, x: Tensor) -> Tensor | None:
    """A checked modulation with x's rank, so that it broadcasts: [batch, width] becomes [batch, 1, ..., width]."""
    if m is None or m.dim() != 2 or x.dim() < 3:
        return m
    return m.reshape(m.shape[0], *([1] * (x.dim() - 2)), m.shape[1])


def modulation_rows(m: Tensor | None, x: Tensor, rows: Tensor) -> Tensor | None:
    """A checked modulation in the kernels' form, for rows = as_rows(x)."""
    if m is None or (x.dim() == 3 and m.dim() > 1 and m.shape[0] == x.shape[0]):
        return m
    batch, width = rows.shape[0], rows.shape[2]
    if x.dim() < 3:  # [width], [1, width] or one row of modulation a row of x, which are tokens of one sample
        return m.reshape(1, -1, width)
    if m.dim() > 3:
        m = m.flatten(1, -2)
    elif m.dim() == 2:
        m = m.unsqueeze(1)
    if batch > 1 and m.requires_grad and (m.dim() < 3 or m.shape[0] == 1):
        m = m.to(accumulation_dtype(x))  # one for all samples: their gradients are added before the one rounding
    return m.expand(batch, -1, -1) if m.dim() == 3 else m.expand(batch, 1, width)


def share_dtype(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """The parameters in one dtype: as they are where they all have the activations' dtype or all float32, which the
    kernels read directly; else cast to the accumulation dtype. Autograd casts the gradients back."""
    wide = accumulation_dtype(x)
    found = {p.dtype for p in parameters if p is not None}
    if not found or found == {x.dtype} or found == {wide}:
        return parameters
    return tuple(None if p is None else p.to(wide) for p in parameters)


def parameter_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The dtype that share_dtype's parameters have; the activations' where there are none."""
    return next((p.dtype for p in parameters if p is not None), x.dtype)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for: by reverse mode, or by a function transform or forward mode, whose tensors
    do not say so themselves."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_data(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors without a graph; as they are where nobody could ask for a derivative."""
    return tuple(t.detach() for t in tensors) if wants_grad(*tensors) else tensors


def check_heads(op: str, name: str, t: Tensor) -> None:
    check_tensor(op, name, t)
    if t.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {shape_text(t)}, expected [batch, length, heads, width]")
    if t.shape[3] == 0 or t.shape[3] % 2 != 0:
        raise ValueError(f"{op}: {name} has a head width of {t.shape[3]}, expected an even number of at least 2")


def check_freqs(op: str, freqs: Tensor, x: Tensor) -> Tensor:
    """freqs in the accumulation dtype."""
    if isinstance(freqs, Tensor) and freqs.is_complex():
        raise TypeError(f"{op}: freqs is complex, expected (cos, sin) pairs: pass torch.view_as_real(freqs)")
    check_tensor(op, "freqs", freqs)
    check_device(op, "freqs", freqs, x)
    batch, length, _, width = x.shape
    if freqs.dim() != 4 or freqs.shape[0] not in (1, batch) or freqs.shape[1:] != (length, width // 2, 2):
        raise ValueError(
            f"{op}: freqs has shape {shape_text(freqs)}, expected [1, {length}, {width // 2}, 2] or "
            f"[{batch}, {length}, {width // 2}, 2] (batch, length, pairs, cos and sin)"
        )
    if freqs.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: freqs requires a gradient, and the table is a constant here: pass freqs.detach()")
    wide = accumulation_dtype(x)
    return freqs if freqs.dtype == wide else freqs.to(wide)


def check_samples(op: str, name: str, t: object) -> None:
    check_tensor(op, name, t)
    assert isinstance(t, Tensor)
    if t.dim() == 0:
        raise ValueError(f"{op}: {name} has shape [], expected [batch, ...]")


def as_samples(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape, [batch, ...], in a form that the kernels read: as they are, which costs nothing, where they
    are contiguous; else as [batch, size], so that a slice of samples is a view and no copy."""
    for t in tensors:
        if not t.is_contiguous():
            break
    else:
        return tensors
    return tuple(t if t.dim() == 2 else t.unsqueeze(1) if t.dim() == 1 else t.flatten(1) for t in tensors)


def from_samples(made: Tensor, like: Tensor) -> Tensor:
    """A result of such tensors, with the shape and dtype of the tensor that it was made for."""
    made = made if made.shape == like.shape else made.view(like.shape)
    return made if made.dtype == like.dtype else made.to(like.dtype)


def check_number(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real, torch.SymFloat)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a number")
    number: Any = value  # numbers.Real promises less than its members keep
    if not float("-inf") < number < float("inf"):
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")


def check_mid(op: str, mid: Any) -> None:
    check_number(op, "mid", mid)
    if not 0 < mid < 1:
        raise ValueError(f"{op}: mid is {mid}, expected the sigma between the two steps: above 0 and below 1")


def check_per_sample(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """One number for all samples of x, or one a sample; a constant."""
    check_tensor(op, name, value)
    check_device(op, name, value, x)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != x.shape[0]):
        raise ValueError(f"{op}: {name} has shape {shape_text(value)}, expected [] or [{x.shape[0]}] (batch)")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires a gradient, and it is a constant here: pass {name}.detach()")


def network_dtype_fits(state: torch.dtype, network: torch.dtype) -> bool:
    """Whether the kernels read tensors of these dtypes side by side: one dtype, or 16 bits beside float32."""
    return network == state or (state == torch.float32 and network in (torch.bfloat16, torch.float16))


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The accumulation dtype that holds them all: float32, or float64 where one of them is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def share_samples_dtype(state: Tensor, *network: Tensor) -> tuple[Tensor, ...]:
    """The state and what a network gave, in dtypes that the kernels read: as they are where they can be, else all in
    float32 (float64 where one is). Autograd casts the gradients back."""
    first = network[0].dtype
    if network[-1].dtype == first and network_dtype_fits(state.dtype, first):  # there are one or two
        return (state, *network)
    wide = widest(state.dtype, *(t.dtype for t in network))
    return tuple(t.to(wide) for t in (state, *network))
