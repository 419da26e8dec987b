"""Running step 1 a second time so that it gives the same bits: random numbers, autocast, and a check that names causes.

A replay needs what the first run read besides its input: the states of the random generators (torch's on the CPU,
torch's on the noise's device, and those the caller names) and the autocast state. What cannot be put back, such as
buffers that the step overwrites, is at least noticed when the caller asks to verify.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
OP = "two_step_backward"


@dataclass(frozen=True)
class RandomState:
    """The states of every generator that a step may draw from."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    generators: tuple[tuple[torch.Generator, Tensor], ...]

    @classmethod
    def capture(cls, device: torch.device, generators: Sequence[torch.Generator]) -> RandomState:
        accelerator = None
        if device.type not in ("cpu", "meta"):
            accelerator = torch.get_device_module(device).get_rng_state(device)
        named = tuple((generator, generator.get_state()) for generator in generators)
        return cls(torch.get_rng_state(), device, accelerator, named)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        for generator, state in self.generators:
            generator.set_state(state)


@dataclass(frozen=True)
class AutocastState:
    """Autocast of the CPU and of the noise's device: (device type, enabled, dtype, cache enabled) of each."""

    regions: tuple[tuple[str, bool, torch.dtype, bool], ...]

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
        cached = torch.is_autocast_cache_enabled()
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached) for kind in kinds)
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype, cached in self.regions:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield


@dataclass(frozen=True)
class Conditions:
    """What a step reads besides its input, taken before its first run."""

    random: RandomState
    autocast: AutocastState

    @classmethod
    def capture(cls, device: torch.device, generators: Sequence[torch.Generator]) -> Conditions:
        return cls(RandomState.capture(device, generators), AutocastState.capture(device))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the conditions of the first run; afterwards, the generators go on from where they were."""
        generators = [generator for generator, _ in self.random.generators]
        now = RandomState.capture(self.random.device, generators)
        self.random.restore()
        try:
            with self.autocast.restored():
                yield
        finally:
            now.restore()


def owners(step: Step) -> tuple[nn.Module, ...]:
    """The module that a step is, or is a method or a partial of; empty where that cannot be seen."""
    if isinstance(step, nn.Module):
        return (step,)
    if isinstance(step, functools.partial):
        return owners(step.func)
    owner = getattr(step, "__self__", None)
    return (owner,) if isinstance(owner, nn.Module) else ()


def reachable(step: Step) -> tuple[nn.Module, ...]:
    """Every module that a step can be seen to use: its owner, those in its arguments, its closure, its attributes. A
    guess: for messages, and for choices where a miss costs rounding or memory and never correctness."""
    found = owners(step)
    if found:
        return found
    function = step.func if isinstance(step, functools.partial) else step
    values: list[Any] = [*step.args, *step.keywords.values()] if isinstance(step, functools.partial) else []
    if inspect.isfunction(function):
        values += function.__defaults__ or ()
        with suppress(ValueError):  # a closure over a name that has no value yet
            variables = inspect.getclosurevars(function)
            values += [*variables.nonlocals.values(), *variables.globals.values()]
    else:
        values += vars(getattr(function, "__self__", function)).values() if hasattr(function, "__dict__") else ()
    modules: list[nn.Module] = []
    for value in values:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        modules += [part for part in parts if isinstance(part, nn.Module)]
    return tuple(modules)


class StateWatch:
    """Which buffers of some modules hold other values than when this was made.

    It compares copies: version counters would cost nothing, but batch norm writes its running statistics past them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._new: dict[str, Tensor] = {}
        self._before = {name: buffer.detach().clone() for name, buffer in self._buffers().items()}

    def _buffers(self) -> dict[str, Tensor]:
        return {
            f"{'' if len(self._modules) == 1 else type(module).__name__ + '.'}{name}": buffer
            for module in self._modules
            for name, buffer in module.named_buffers()
        }

    def changed(self) -> list[str]:
        """Those that are other than before; what was made since, such as a table on its first use, is noted."""
        now = self._buffers()
        self._new = {name: buffer.detach().clone() for name, buffer in now.items() if name not in self._before}
        gone = [name for name in self._before if name not in now]
        return gone + [name for name, before in self._before.items() if name in now and _differ(before, now[name])]

    def still_changing(self) -> list[str]:
        """Of what was noted, what has changed again."""
        now = self._buffers()
        return [name for name, buffer in self._new.items() if name not in now or _differ(buffer, now[name])]


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.dtype != b.dtype or bool(differences(a, b).any())


def differences(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one shape and dtype differ in their bits; a NaN equals a NaN."""
    if a.is_complex():
        return differences(torch.view_as_real(a), torch.view_as_real(b)).any(-1)
    if not a.is_floating_point():
        return a != b
    return (a != b) & ~(a.isnan() & b.isnan()) | (a == 0) & (b == 0) & (a.signbit() != b.signbit())


def check_leaves(before: Sequence[Tensor], after: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    """RuntimeError unless both runs of step 1 reached the same parameters."""
    kept = {id(leaf) for leaf in after}
    lost = [leaf for leaf in before if id(leaf) not in kept]
    if not lost:
        return
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    named = ", ".join(names.get(id(leaf), f"a leaf of shape {list(leaf.shape)}") for leaf in lost[:5])
    more = ", ..." if len(lost) > 5 else ""
    raise RuntimeError(
        f"{OP}: first did not use {named}{more} when it was run again, and they would receive no gradient of it: it "
        "keeps what it has computed of them. mode='retain' runs it once"
    )


def check_replay(before: Tensor, after: Tensor, changed: Sequence[str], first_pass: str, watched: bool) -> None:
    """RuntimeError, with causes to look for, unless step 1 gave the same bits twice and left no buffer changed."""
    different = differences(before, after)
    count = int(different.sum())
    state = f"first changes state whenever it runs: {', '.join(changed)}" if changed else ""
    if count == 0:
        if changed:
            raise RuntimeError(
                f"{OP}: {state}. Its output is the same, but mode='recompute' runs it twice and so the state moves "
                "twice: put those modules in eval(), or use mode='retain'"
            )
        return
    distance = (before.double() - after.double()).abs().nan_to_num(nan=float("inf")).where(different, 0.0)
    where = [int(i) for i in torch.unravel_index(distance.argmax(), distance.shape)]
    causes = [state] if changed else []
    if not changed and not watched:
        causes.append("a module that changes state in forward (pass modules=(...) to have its buffers named)")
    causes.append("dropout or noise from a torch.Generator of its own (pass it in generators=)")
    causes.append("randomness outside torch, or kernels that are not deterministic")
    if first_pass == "no_grad":
        causes.append("a program that rounds differently under no_grad, as torch.compile's may (use first_pass='grad')")
    raise RuntimeError(
        f"{OP}: first gave another output when it was run again: max difference {float(distance.max()):.1e} at {where},"
        f" {count} of {before.numel()} values differ. Look for: {'; '.join(causes)}. mode='retain' runs it once"
    )
