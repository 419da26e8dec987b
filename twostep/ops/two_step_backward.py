"""The gradient of a two-step sampler through both steps, with the activations of one step at a time.

    v0 = first(noise)      z = noise + (mid - 1) * v0                   the first Euler step, sigma 1 -> mid
    v1 = second(z)         x = z + (0 - mid) * v1                       the second, mid -> 0
    x_A = noise + (0 - 1) * v0                                          step 1's one-jump clean prediction
    L = final_loss(x) + first_loss(x_A)

    d final_loss / d v0 = (mid - 1) * d final_loss / d z                the inherited gradient g
    d L / d v0 = inherit * g + d first_loss / d v0,  which then runs backward through `first`

Only g, as large as v0, crosses from step 2 to step 1, so step 2 can be differentiated, and its activations freed,
before step 1's are needed (Z-Image Turbo++, arXiv 2606.12575, appendix A; there u = -v, s0 = 1 - mid). Modes:

    plain      one backward through both graphs: two steps of activations
    retain     the paper's: z is a leaf; `first`'s graph stays alive while `second` runs: two steps of activations while
               `second` runs, one while `first` is differentiated
    recompute  `first` runs without a graph and leaves v0 and the random states; its graph is built when `second`'s is
               gone: one step of activations, for one more forward of `first`

The paper adds w * sum(u0 * g) to step 1's loss. That sum's gradient is w * g * 1, so g is handed to autograd as the
gradient that v0 starts with: no product, reduction or second pass over g.

The arithmetic is three fused operators. `two_step_split` makes z and x_A in one pass over noise and v0; `euler_step`
makes x; the split's backward is `inject_gradient`: inherit * clip * (mid - 1) * d/dz - d/dx_A in one pass with one
rounding, where the clip's factor comes from `gradient_norms` and never leaves the device. In every mode this backward
is the one node where both gradients meet, in `plain` because the graph says so, in the others because step 1's backward
starts at its z with the gradient that step 2 left. So all modes do the same operations on the same numbers. Only
`recompute` pays for that: its first run of `first` makes an x_A and its second a z that nobody reads, a latent each.

Leaf precision: the state (z, x, x_A and their gradients) is in float32 (float64 if noise or v0 are), whatever dtype the
velocities have; v0's gradient is rounded once, to v0's dtype. `second` is given z in the noise's dtype, as `first` was
given the noise.

Autocast keeps the casts of weights for as long as its region lasts. A cast that both steps used would add their
gradients in the low precision, and only where both are in one graph; it would also hold a copy of step 2's weights
while step 1 is differentiated. So the cache is emptied between the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twostep.graphs import nodes

from .arguments import as_samples, from_samples, shape_text, widest
from .euler_step import euler_step
from .two_step_arguments import check_arguments, check_numbers, check_scaler, generators_of, modules_of_steps, velocity
from .two_step_gradients import (
    Graph,
    Inheritance,
    Root,
    Scaler,
    Sync,
    Waiting,
    last_backward,
    outer_graphs_explained,
    root_gradient,
    second_backward,
    split,
)
from .two_step_offload import Held
from .two_step_replay import OP, Conditions, StateWatch, Step, check_leaves, check_replay, reachable

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TwoStepResult:
    """What a call leaves besides the gradients. Nothing here has a graph, and reading it is what waits for the device.

    first_loss, final_loss: as the callables returned them, unscaled; None where there is none.
    x, x_A, z: the image, step 1's one-jump clean prediction, and the state between the steps; float32 at least.
    inherited_norm: norm of d final_loss / d v0 over the whole tensor, before inherit and clip, unscaled; None without
        final_loss.
    finite: whether the losses and the norm are all finite, a boolean tensor on the device.
    """

    first_loss: Tensor | None
    final_loss: Tensor | None
    x: Tensor
    x_A: Tensor
    z: Tensor
    inherited_norm: Tensor | None
    finite: Tensor

    def not_finite(self) -> list[str]:
        """The names of the values that are not finite; waits for the device."""
        named = {name: getattr(self, name) for name in ("first_loss", "final_loss", "inherited_norm")}
        return [name for name, value in named.items() if value is not None and not bool(value.isfinite().all())]


def two_step_backward(
    first: Step,
    second: Step,
    noise: Tensor,
    sigmas: Sequence[float],
    first_loss: Loss | None,
    final_loss: Loss | None,
    *,
    inherit: float = 1.0,
    mode: str = "recompute",
    clip: float | None = None,
    loss_scale: float = 1.0,
    scaler: Scaler | None = None,
    generators: Iterable[torch.Generator] = (),
    first_pass: str = "no_grad",
    verify: bool = False,
    check_finite: bool = False,
    offload: bool = False,
    sync: str | None = None,
    modules: tuple[Any, Any] | None = None,
) -> TwoStepResult:
    """Adds the gradients of first_loss(x_A) + final_loss(x) to the parameters of both steps.

    Args:
        first, second: from a noisy image to its velocity (eps - x), of the same shape. They may be the same module.
        noise: where sampling starts; data, so it requires no gradient.
        sigmas: (1, mid, 0).
        first_loss, final_loss: from x_A, and from x, to a scalar. One of them may be None.
        inherit: weight of the gradient that step 1 inherits; 1 is the plain gradient of both steps, 0 cuts it.
        mode: "recompute", "retain" or "plain"; they differ in memory and time.
        clip: the largest norm, over the whole tensor, of the inherited gradient before `inherit`; None does not clip.
        loss_scale: factor on all gradients, as 1 / micro-batches under accumulation; not on losses, norm and clip.
        scaler: a torch.amp.GradScaler, applied to the gradients; losses, norm and clip are without its scale.
        generators: every torch.Generator that `first` draws from, besides torch's own.
        first_pass: "no_grad", or "grad" for steps whose program rounds differently without a graph. For recompute.
        verify: compare what `first` gives the second time, bit for bit, and raise RuntimeError that names what differs;
            with first_pass="grad" also that both runs reach the same parameters. For recompute; waits for the device.
        check_finite: raise FloatingPointError, naming it, if a loss or the inherited gradient is not finite; waits for
            the device. With a scaler, losses alone: a gradient that overflows at its scale is the scaler's to skip.
        offload: keep what waits between the backwards in pinned host memory.
        sync: "last" accumulates and reduces gradients once, in the second backward, "each" in both; None chooses "each"
            for FSDP2 and for steps that share no parameters, else "last".
        modules: (those of first, those of second), each a module or several, where the steps are functions.
    """
    mid = check_arguments(first, second, noise, sigmas, first_loss, final_loss, mode, first_pass, sync)
    check_numbers(inherit, clip, loss_scale, first_loss)
    check_scaler(scaler)
    replayed = generators_of(generators)
    first_owners, second_owners = modules_of_steps(first, second, modules)
    uses = first_owners or reachable(first)
    policy = Sync(sync, mode, first_owners, second_owners, uses, second_owners or reachable(second))
    unroll = _Unroll(
        first,
        second,
        noise,
        mid,
        first_loss,
        final_loss,
        Inheritance(mid, float(inherit), clip, check_finite and scaler is None),
        float(loss_scale),
        scaler,
        check_finite,
    )
    if mode == "plain":
        return _plain(unroll)
    held = Held(noise.device, offload)
    with policy.settled():
        # Without a final loss, second keeps nothing that first's graph adds to.
        if mode == "retain" or final_loss is None:
            return _retain(unroll, policy, held)
        conditions = Conditions.capture(noise.device, replayed)
        if uses and not any(p.requires_grad for module in uses for p in module.parameters()):
            first_pass = "grad"  # which costs nothing where all is frozen, and says so before step 2 leaves a gradient
        return _recompute(unroll, policy, held, conditions, uses, first_pass, verify)


@dataclass(frozen=True)
class _Unroll:
    """One call: what it was given, and the pieces that every mode is made of."""

    first: Step
    second: Step
    noise: Tensor
    mid: float
    first_loss: Loss | None
    final_loss: Loss | None
    inheritance: Inheritance
    loss_scale: float
    scaler: Scaler | None
    check_finite: bool

    def run_first(self) -> Tensor:
        """v0. A graph is asked for where one is being recorded."""
        v = velocity("first", self.first, self.noise, self.noise)
        if torch.is_grad_enabled() and not v.requires_grad:
            raise ValueError(
                f"{OP}: first's output has no graph: its parameters are frozen, or it runs under torch.no_grad or "
                "detaches what it returns. Let at least one parameter of first require a gradient; if step 1 is meant "
                "to stay as it is, there is nothing to unroll: differentiate second alone"
            )
        return v

    def split(self, v0: Tensor) -> tuple[Tensor, Tensor]:
        """z and x_A, in at least float32."""
        noise = self.noise.to(widest(self.noise.dtype, v0.dtype))
        # Shaped out here: views made inside a Function may not be changed in place, and a loss may do that.
        z, x_A = split(*as_samples(v0, noise), self.inheritance)
        return from_samples(z, noise), from_samples(x_A, noise)

    def run_second(self, z: Tensor) -> Tensor:
        """x, from z in at least float32."""
        v = velocity("second", self.second, z.to(self.noise.dtype), self.noise)
        return euler_step(z.to(widest(z.dtype, v.dtype)), v, -self.mid)

    def run_first_loss(self, x_A: Tensor) -> Root | None:
        if self.first_loss is None:
            return None
        loss = self._loss("first_loss", self.first_loss, x_A)
        return loss, root_gradient(loss, self.loss_scale, self.scaler)

    def run_final_loss(self, x: Tensor) -> Root:
        assert self.final_loss is not None
        loss = self._loss("final_loss", self.final_loss, x)
        root = self.inheritance.root = root_gradient(loss, self.loss_scale, self.scaler)
        return loss, root

    def _loss(self, name: str, function: Loss, image: Tensor) -> Tensor:
        made_by = [image.grad_fn]
        loss = function(image)
        made_by.append(image.grad_fn)  # another one if the loss changes the image in place
        if not isinstance(loss, Tensor):
            raise TypeError(f"{OP}: {name} returned {type(loss).__name__}, expected a scalar tensor")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(
                f"{OP}: {name} returned a tensor of shape {shape_text(loss)} and dtype {loss.dtype}, expected one "
                "floating number: reduce it with .mean() or .sum()"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"{OP}: {name} returned a tensor without a graph: it detaches the image, or runs under no_grad"
            )
        if not any(node is maker for node in nodes([loss]) for maker in made_by):
            raise ValueError(
                f"{OP}: {name} does not depend on the image that it was given: it detaches the image, or looks at it "
                "under no_grad, and nothing would reach the steps"
            )
        if self.check_finite and not bool(loss.isfinite()):
            raise FloatingPointError(f"{OP}: {name} is {loss.item()}; no gradient of it was taken")
        return loss

    def result(
        self, z: Tensor, x: Tensor, x_A: Tensor, first_loss: Tensor | None, final_loss: Tensor | None
    ) -> TwoStepResult:
        first_loss = None if first_loss is None else first_loss.detach()
        final_loss = None if final_loss is None else final_loss.detach()
        values = [v for v in (first_loss, final_loss, self.inheritance.norm) if v is not None]
        finite = torch.stack([value.isfinite().reshape(()) for value in values]).all()
        return TwoStepResult(first_loss, final_loss, x, x_A, z, self.inheritance.norm, finite)


INHERITED = "inherited"  # the gradient of z, that step 1 inherits from step 2


def _plain(unroll: _Unroll) -> TwoStepResult:
    z, x_A = unroll.split(unroll.run_first())
    torch.clear_autocast_cache()
    final = None
    if unroll.final_loss is None:
        x = _continued(unroll, z)
    else:
        x = unroll.run_second(z)
        final = unroll.run_final_loss(x)
    first = unroll.run_first_loss(x_A)
    last_backward([root for root in (final, first) if root is not None], None)
    return unroll.result(z.detach(), x.detach(), x_A.detach(), first and first[0], final and final[0])


def _continued(unroll: _Unroll, z: Tensor) -> Tensor:
    """x where nothing is learned from it."""
    with torch.no_grad():
        return unroll.run_second(z.detach())


def _retain(unroll: _Unroll, sync: Sync, held: Held) -> TwoStepResult:
    z, x_A = unroll.split(unroll.run_first())
    torch.clear_autocast_cache()
    if unroll.final_loss is None:
        held.put("x", _continued(unroll, z))
        final_loss = waiting = None
    else:
        final_loss, waiting = _second_half(unroll, sync, held, z.detach(), Graph.of(z).leaves)
    return _first_half(unroll, held, z, x_A, waiting, final_loss)


def _recompute(
    unroll: _Unroll,
    sync: Sync,
    held: Held,
    conditions: Conditions,
    uses: Sequence[nn.Module],
    first_pass: str,
    verify: bool,
) -> TwoStepResult:
    watch = StateWatch(uses) if verify else None
    leaves: list[Tensor] | None = None
    with torch.no_grad() if first_pass == "no_grad" else nullcontext():
        v0 = unroll.run_first()
        if first_pass == "grad":
            leaves = Graph.of(v0).leaves
            v0 = v0.detach()
    torch.clear_autocast_cache()
    changed = watch.changed() if watch else []
    if verify:
        held.put("v0", v0.clone())  # compiled programs may write their next output where this one stands
    z = unroll.split(v0)[0].detach()
    del v0
    final_loss, waiting = _second_half(unroll, sync, held, z, leaves)
    del z  # the one that is run again is the same, bit for bit
    torch.clear_autocast_cache()
    with conditions.again():
        again = unroll.run_first()
    if watch is not None:
        changed += watch.still_changing()
        check_replay(held.take("v0"), again.detach(), changed, first_pass, bool(uses))
        if leaves is not None:
            check_leaves(leaves, Graph.of(again).leaves, uses)
    return _first_half(unroll, held, *unroll.split(again), waiting, final_loss)


def _second_half(
    unroll: _Unroll, sync: Sync, held: Held, z: Tensor, first_leaves: Sequence[Tensor] | None
) -> tuple[Tensor, Waiting | None]:
    """Step 2 from z, made a leaf: its loss, and what waits for step 1; x and the gradient of z are held."""
    z.requires_grad_()
    x = unroll.run_second(z)
    loss, root = unroll.run_final_loss(x)
    held.put("x", x)
    del x
    inherited, waiting = second_backward(loss, root, z, sync, first_leaves)
    assert inherited is not None  # the loss reaches x, and x is z + ...
    unroll.inheritance.measure(inherited)
    z.grad = None
    if unroll.inheritance.weight != 0:
        held.put(INHERITED, inherited)
    return loss.detach(), waiting


def _first_half(
    unroll: _Unroll,
    held: Held,
    z: Tensor,
    x_A: Tensor,
    waiting: Waiting | None,
    final_loss: Tensor | None,
) -> TwoStepResult:
    """Step 1's backward, from its own loss and, through the z that it made, from what it inherits."""
    first = unroll.run_first_loss(x_A)
    roots = [] if first is None else [first]
    if held.has(INHERITED):
        roots.append((z, held.take(INHERITED)))
    with outer_graphs_explained():
        last_backward(roots, waiting)
    return unroll.result(z.detach(), held.take("x"), x_A.detach(), first and first[0], final_loss)
