"""How gradients leave step 2, cross to step 1, and reach the parameters.

Order of additions. In one backward through both steps, autograd adds all contributions to a parameter in the order in
which they come (those of step 2, then those of step 1: (s1 + s2) + f1 + ...), and adds the sum to `.grad` once. Two
backwards add to `.grad` twice, (grad + s) + f, which rounds differently as soon as `.grad` holds something already or a
step uses a parameter twice. So where the steps share parameters the first backward only takes the gradients ("join"),
and the second is given them as roots: they enter the same sums in the same place, and every hook, DDP's among them,
sees one complete gradient. Where nothing is shared there is nothing to join, and each backward accumulates as usual.

FSDP2 keeps gradients of its own between backwards; there its gradient synchronisation is switched instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from twostep.graphs import is_leafs, nodes

from .gradient_norms import gradient_norms
from .two_step_replay import OP
from .two_step_split import inject_gradient, two_step_split

Root = tuple[Tensor, Tensor]  # where a backward starts, and the gradient that it starts with


class Scaler(Protocol):
    """What is used of torch.amp.GradScaler."""

    def scale(self, outputs: Tensor) -> Tensor: ...


def root_gradient(loss: Tensor, loss_scale: float, scaler: Scaler | None) -> Tensor:
    """The gradient a loss starts with: all scaling happens here, so the losses themselves stay as they are."""
    unit = torch.full(loss.shape, loss_scale, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)
    return (unit if scaler is None else scaler.scale(unit)).to(loss.dtype)


@dataclass
class Inheritance:
    """What becomes of the gradient that step 1 inherits: measured, clipped by its norm, weighted, and injected.

    The norm is that of d final_loss / d v0 = (mid - 1) * d final_loss / d z over the whole tensor (as clip_grad_norm_
    has it), without the loss's scale. It stays on the device, and so does the factor that clips.
    """

    mid: float
    weight: float
    clip: float | None
    check_finite: bool
    root: Tensor | None = None  # the gradient that the final loss starts with
    norm: Tensor | None = None

    def measure(self, inherited: Tensor) -> None:
        """Notes the norm that the gradient of z makes at v0."""
        assert self.root is not None
        _, total = gradient_norms(inherited)
        self.norm = total * (1 - self.mid) / self.root.to(total.dtype).reshape(())
        if self.check_finite and not bool(self.norm.isfinite()):
            raise FloatingPointError(f"{OP}: the inherited gradient has norm {self.norm.item()}; it was not passed on")

    def _factor(self) -> Tensor | None:
        if self.clip is None:
            return None
        assert self.norm is not None
        tiny = torch.finfo(self.norm.dtype).tiny
        # An infinite norm would make a factor of 0 and hide the trouble; 0 * norm makes it NaN instead.
        return (self.clip / self.norm.clamp_min(tiny)).clamp(max=1.0) + 0.0 * self.norm

    def inject(self, inherited: Tensor | None, own: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The gradient of v0 in its dtype, from those of z and of x_A; None where there is neither."""
        if inherited is not None and self.norm is None:  # in plain mode it arrives here and nowhere else
            self.measure(inherited)
        if self.weight == 0:  # cut, even where it is not finite
            inherited = None
        if inherited is None and own is None:
            return None
        factor = None if inherited is None else self._factor()
        return inject_gradient(inherited, own, self.mid, weight=self.weight, factor=factor, dtype=dtype)


class _Split(Function):
    """two_step_split, whose backward injects the inherited gradient as `Inheritance` treats it. It keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, noise: Tensor, inheritance: Inheritance) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.inheritance, ctx.velocity = inheritance, v.dtype
        return two_step_split(noise, v, inheritance.mid)

    @staticmethod
    def backward(ctx: Any, inherited: Tensor | None, own: Tensor | None) -> Any:
        return ctx.inheritance.inject(inherited, own, ctx.velocity), None, None


split: Callable[..., tuple[Tensor, Tensor]] = _Split.apply


@dataclass
class Graph:
    """The leaves that a tensor's graph accumulates into, and what the graph says of its makers."""

    leaves: list[Tensor] = field(default_factory=list)
    sharded: bool = False  # FSDP2 reduces gradients from within this graph
    static: bool = False  # DistributedDataParallel(static_graph=True) has begun to learn this graph
    seekers: list[nn.Module] = field(default_factory=list)  # DistributedDataParallel(find_unused_parameters=True)
    reentrant: bool = False  # a reentrant checkpoint, which refuses autograd.grad

    @classmethod
    def of(cls, *outputs: Tensor) -> Graph:
        graph = cls()
        for node in nodes(outputs):
            if is_leafs(node):
                graph.leaves.append(node.variable)
            maker = getattr(type(node), "_forward_cls", None)
            graph.sharded |= maker is not None and maker.__module__.startswith("torch.distributed.fsdp")
            graph.reentrant |= maker is CheckpointFunction
            if maker is not None and maker.__name__ == "_DDPSink" and (ddp := node.ddp_weakref()) is not None:
                graph.static |= ddp.static_graph
                if ddp.find_unused_parameters and not ddp.static_graph:
                    graph.seekers.append(ddp)
        return graph


@contextmanager
def trainable(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Leaves that required a gradient when they were used receive it, even if they have been switched off since.

    Autograd drops the gradient of a leaf that does not require one when it arrives, and switching adapters, as peft's
    set_adapter does between the steps of one base model, switches the other adapters' requires_grad off.
    """
    off = [leaf for leaf in leaves if not leaf.requires_grad]
    for leaf in off:
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        for leaf in off:
            leaf.requires_grad_(False)


def last_backward(roots: list[Root], waiting: Waiting | None) -> None:
    """From the roots, and from what waits, into `.grad`."""
    graph = Graph.of(*(tensor for tensor, _ in roots))
    if waiting is not None:
        _check_seekers(graph, waiting.leaves)
    with trainable([*graph.leaves, *(waiting.leaves if waiting else ())]):
        if waiting is not None:
            roots = [*roots, waiting.root()]
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])


@contextmanager
def outer_graphs_explained() -> Iterator[None]:
    """For step 1's backward after step 2's: what autograd says of a graph that both reach, in terms of the steps."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"{OP}: both steps, or both losses, use a tensor that was made with a graph outside of them, or was kept "
            "from the one to the other (a projected context, a weight in parametrize.cached, a learned factor), and "
            "its graph is gone after step 2's backward. Make it inside each, or use mode='plain'"
        ) from error


def _check_seekers(graph: Graph, waiting: Sequence[Tensor]) -> None:
    """ValueError where DistributedDataParallel believes of what step 2 alone uses that it never receives a gradient."""
    used = {id(leaf) for leaf in graph.leaves}
    late = {id(leaf) for leaf in waiting if id(leaf) not in used}
    if late and any(id(p) in late for ddp in graph.seekers for p in ddp.parameters()):
        raise ValueError(
            f"{OP}: DistributedDataParallel(find_unused_parameters=True), and parameters that step 2 alone uses: it "
            "gave them up when step 1 ran. Use find_unused_parameters=False, with which all that either step uses is "
            "reduced once; or mode='recompute' with sync='each'"
        )


@dataclass(frozen=True)
class Sync:
    """When parameters receive, and ranks exchange, what step 2 gives them.

    first_owners, second_owners: the modules that the steps certainly are; first_uses: all that step 1 may use.
    held: FSDP2's groups of parameters whose gradients of step 2 wait, unreduced, for step 1's; fresh: of them, those
    that held nothing before.
    """

    policy: str | None
    mode: str
    first_owners: tuple[nn.Module, ...]
    second_owners: tuple[nn.Module, ...]
    first_uses: tuple[nn.Module, ...]
    second_uses: tuple[nn.Module, ...]
    held: list[Any] = field(default_factory=list)
    fresh: list[Any] = field(default_factory=list)

    def join(self, graph: Graph, first_leaves: Sequence[Tensor] | None) -> bool:
        """Whether step 2's gradients wait for step 1's. first_leaves: the leaves of step 1's graph, if it is known."""
        static = self._static_graph(graph)
        possible = not (graph.sharded or graph.reentrant or static)
        if possible and self.policy == "last":
            return True
        if first_leaves is None:
            first_leaves = [p for module in self.first_uses for p in module.parameters()] or None
        known = None if first_leaves is None else {id(leaf) for leaf in first_leaves}
        shares = known is None or any(id(leaf) in known for leaf in graph.leaves)
        if possible and self.policy is None:
            return shares
        if self.mode == "retain" and shares and not graph.sharded and _world_size() > 1:
            raise ValueError(
                f"{OP}: sync={self.policy!r} with mode='retain' and parameters that both steps share: "
                "DistributedDataParallel reduces once for each forward, and would not reduce the second backward. Use "
                + ("mode='recompute'" if static else "sync='last', or mode='recompute'")
                + ("; and checkpoint with use_reentrant=False" if graph.reentrant else "")
            )
        return False

    def _static_graph(self, graph: Graph) -> bool:
        """Whether what step 2 uses is in DistributedDataParallel(static_graph=True), which counts how often each
        parameter arrives, and would reduce before the gradients that wait are there."""
        used = {id(leaf) for leaf in graph.leaves}
        seen = {part for module in (*self.first_uses, *self.second_uses) for part in module.modules()}
        static = any(_is_static(part) and any(id(p) in used for p in part.parameters()) for part in seen)
        if graph.static and not static and self.policy != "each":
            raise ValueError(
                f"{OP}: a step is a function around DistributedDataParallel(static_graph=True), which shows on its "
                "first iteration only: pass modules=(module of first, module of second)"
            )
        if static and self.policy == "last":
            raise ValueError(
                f"{OP}: sync='last' and DistributedDataParallel(static_graph=True), which expects each backward's "
                "gradients when it runs: leave static_graph out, or use sync='each' with mode='recompute'"
            )
        return static

    def _shared_modules(self) -> list[nn.Module]:
        second = {id(module) for owner in self.second_owners for module in owner.modules()}
        return [module for owner in self.first_owners for module in owner.modules() if id(module) in second]

    @contextmanager
    def first_backward(self, graph: Graph) -> Iterator[None]:
        """For FSDP2 and sync='last': the modules of both steps keep unsharded gradients until the second backward."""
        if not graph.sharded or self.policy != "last":
            yield
            return
        if not (self.first_owners and self.second_owners):
            raise ValueError(
                f"{OP}: sync='last' and FSDP2, and a step is a function, which does not show its modules: pass "
                "modules=(module of first, module of second)"
            )
        groups = dict.fromkeys(group for module in self._shared_modules() for group in _parameter_groups(module))
        flags = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
        # Those whose trainer accumulates stay his: switched off already, or holding what came before this call.
        mine = [group for group in groups if group.reduce_grads]
        self.held.extend(mine)
        self.fresh.extend(group for group in mine if not any(map(_waits, group.fsdp_params)))
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, reduce, all_reduce in flags:
                group.reduce_grads, group.all_reduce_grads = reduce, all_reduce

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Nothing is left held back: what step 1 did not use is reduced afterwards, and what an error has left is
        dropped, since it stands where clearing `.grad` does not reach and would be added to the next gradient."""
        try:
            yield
        except BaseException:
            for group in self.fresh:
                _drop(group)
            raise
        for group in self.held:
            if any(_waits(parameter) for parameter in group.fsdp_params):
                state = group._training_state
                group.post_backward()
                group.finalize_backward()
                group._training_state = state


def _waits(parameter: Any) -> bool:
    """Whether one of FSDP2's parameters has a gradient that has not been reduced."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)


def _drop(group: Any) -> None:
    for parameter in group.fsdp_params:
        if _waits(parameter):
            parameter.unsharded_accumulated_grad = parameter._unsharded_param.grad = None


def _is_static(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel) and module.static_graph


def _world_size() -> int:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


def _parameter_groups(module: nn.Module) -> Sequence[Any]:
    """FSDP2's own record of a module's parameters. Its setter cannot say what the flag was, and a trainer that is
    accumulating may have switched it off already."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return ()
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and later; one group before that
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return tuple(groups)


@contextmanager
def _unhooked(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Tensor hooks of leaves must see the complete gradient, once; autograd.grad would run them on a part of it."""
    hooked = [(leaf, leaf._backward_hooks) for leaf in leaves if leaf._backward_hooks]
    for leaf, _ in hooked:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, hooks in hooked:
            leaf._backward_hooks = hooks


class Waiting:
    """Parameters, and the gradients that step 2 has for them, on their way into the second backward."""

    def __init__(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.leaves, self._gradients = list(leaves), list(gradients)

    def root(self) -> Root:
        """A tensor whose backward hands the gradients over, with the gradient to start it with.

        To be made last: autograd runs first what was made last, so step 2's part comes before step 1's, as in one
        graph.
        """
        out = deliver(self._gradients, *self.leaves)
        return out, torch.zeros_like(out)


class _Deliver(Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        # Autograd takes a gradient that nobody else holds as it is, and copies it otherwise: hold none.
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


deliver: Callable[..., Tensor] = _Deliver.apply


def second_backward(
    loss: Tensor, root: Tensor, z: Tensor, sync: Sync, first_leaves: Sequence[Tensor] | None
) -> tuple[Tensor | None, Waiting | None]:
    """The backward of step 2 alone: d loss / d z, and what waits for step 1."""
    graph = Graph.of(loss)
    if not sync.join(graph, first_leaves):
        with sync.first_backward(graph), trainable(graph.leaves):
            torch.autograd.backward(loss, root)
        return z.grad, None
    leaves = [leaf for leaf in graph.leaves if leaf is not z]
    with _unhooked(leaves), trainable(leaves):
        inherited, *found = torch.autograd.grad(loss, [z, *leaves], root, allow_unused=True)
    pairs = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
    return inherited, Waiting(*zip(*pairs, strict=True)) if pairs else None
