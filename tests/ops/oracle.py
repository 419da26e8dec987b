"""Is a fused operator right? Decided by float64, with eager PyTorch's own error at that dtype as the measure.

For every output and every gradient:  |fused - float64| <= 2 |eager - float64| + what one rounding must cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twostep import ops
from twostep.bench import expressions
from twostep.ops.arguments import align_modulation

WITHOUT_NORM = ("rope", "swiglu", "euler_step", "two_step_split")
# Their outputs are the activations and something else, which may cancel: noise + (mid - 1) v. What is left then has the
# rounding of the terms, and whether a product is rounded before it is added (it is not in a fused multiply-add) shows.
ADDS_TO_ACTIVATIONS = ("gated_residual", "gated_residual_norm_modulate", "rope", "euler_step", "two_step_split")


@dataclass
class Case:
    """One call of an operator: its name, its tensors by argument name, its options."""

    op: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[str, ...] = ("freqs", "delta")

    def leaves(self, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        for name, t in self.tensors.items():
            made[name] = None if t is None else convert(t.detach())
            if t is not None and name not in self.constants:
                made[name].requires_grad_()
        return made


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run(
    function: Callable[..., Any], case: Case, leaves: dict[str, Tensor | None], incoming: Sequence[Tensor | None] | None
) -> dict[str, Tensor]:
    """Outputs and gradients by name; incoming gradients of None leave that output unused."""
    outputs = as_tuple(function(**leaves, **case.options))
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if incoming is None:
        return found
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, incoming, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    for name, t in leaves.items():
        if t is not None and t.requires_grad:
            found[f"gradient of {name}"] = t.grad if t.grad is not None else torch.zeros_like(t)
    return found


def incoming_gradients(case: Case, generator: torch.Generator) -> list[Tensor]:
    with torch.no_grad():
        outputs = as_tuple(getattr(ops.reference, case.op)(**case.tensors, **case.options))
    return [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o.device, o.dtype) for o in outputs]


def check(case: Case, seed: int = 0, incoming: Sequence[Tensor | None] | None = None, *, strict: bool = False) -> None:
    """Fused against float64, eager PyTorch's error as the yardstick; strict allows nothing for terms that cancel."""
    generator = torch.Generator().manual_seed(seed)
    if incoming is None:
        incoming = incoming_gradients(case, generator)
    # clone(memory_format=preserve) would drop the strides of a view, so fused sees views of cloned storage.
    fused = run(getattr(ops, case.op), case, case.leaves(lambda t: t), incoming)
    eager = run(_rounded(case), case, case.leaves(lambda t: t.clone()), incoming)
    exact = run(getattr(ops.reference, case.op), case, case.leaves(lambda t: t.double()), incoming)
    activation = next(t for t in case.tensors.values() if t is not None)
    for name, truth in exact.items():
        compare(case, name, fused[name], eager[name], truth, activation, () if strict else incoming)


def _rounded(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The eager expression with its outputs in the dtype of the activations, where mixed dtypes promoted them."""
    activation = next(iter(case.tensors.values()))

    def function(**arguments: Any) -> tuple[Tensor, ...]:
        for name in ("gate", "scale", "shift"):
            if name in arguments:
                arguments[name] = align_modulation(arguments[name], activation)
        return tuple(o.to(activation.dtype) for o in as_tuple(getattr(expressions.diffusers, case.op)(**arguments)))

    return function


def compare(
    case: Case,
    name: str,
    fused: Tensor,
    eager: Tensor,
    truth: Tensor,
    activation: Tensor,
    incoming: Sequence[Tensor | None],
) -> None:
    assert fused.shape == truth.shape, f"{case.op}: {name} has shape {fused.shape}, expected {truth.shape}"
    assert torch.isfinite(fused).all(), f"{case.op}: {name} is not finite"
    if truth.numel() == 0:
        return
    error = (fused.double() - truth).norm().item()
    yardstick = (eager.double() - truth).norm().item()
    size = truth.norm().item()
    # What float32 (float64) arithmetic costs on terms that may cancel: the size of the terms, not of their sum.
    unit = torch.finfo(ops.reference.accumulation_dtype(activation)).eps
    terms = size
    if name.startswith("output") and case.op in ADDS_TO_ACTIVATIONS:
        terms += activation.double().norm().item()
    if incoming and name.startswith("gradient"):
        terms += gross(case, incoming) * truth.numel() ** 0.5
    # A handful of elements may round luckily in eager code; then one rounding of the activations is allowed.
    coarsest = max(torch.finfo(activation.dtype).eps, torch.finfo(fused.dtype).eps)
    rounding = coarsest * size if truth.numel() < 1024 else 0.0
    allowed = 2 * yardstick + rounding + (8 if incoming else 1) * unit * terms
    given = {n: None if t is None else (t.dtype, tuple(t.shape), t.stride()) for n, t in case.tensors.items()}
    assert error <= allowed, (
        f"{case.op}: {name} is off by {error:.3e}, eager by {yardstick:.3e}, allowed {allowed:.3e} (norm {size:.3e}); "
        f"{given} {case.options}"
    )


def gross(case: Case, incoming: Sequence[Tensor | None]) -> float:
    """The size of one term of a gradient before terms cancel: |incoming| * |parameters| / the smallest deviation."""
    largest = max((g.abs().max().item() for g in incoming if g is not None and g.numel()), default=0.0)
    for name, t in case.tensors.items():
        if t is None or not t.numel():
            continue
        if "weight" in name or name == "gate":
            largest *= max(1.0, t.abs().max().item())
        elif name == "scale":
            largest *= 1 + t.abs().max().item()
    smallest = 1.0
    for name in ("x", "z", "q", "k"):
        t = case.tensors.get(name)
        if t is None or not t.numel() or case.op in WITHOUT_NORM:
            continue
        wide = t.double()
        if case.options.get("norm") == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        smallest = min(smallest, (wide.square().mean(-1) + case.options.get("eps", 1e-5)).sqrt().min().item())
    return largest / smallest
