"""One update: batches, gradients, their mean over ranks, a look whether they are finite, the clip, the step.

Nothing here knows a method. The host waits for the device once in an update, for the norm of the gradient and whether
all losses are finite, because whoever steps on a NaN has lost the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data import NoiseStreams
from .methods import Method, TrainingBatch
from .monitors import PhaseClock
from .optimizers import Optimizer
from .ranks import PATIENCE, Ranks
from .recipe import Recipe
from .sharding import average_gradients, gradient_norm, local


class OutOfMemory(RuntimeError):
    """The device, or the machine, has no memory left, with what to do about it."""


@dataclass
class Outcome:
    metrics: dict[str, Tensor]  # means over the accumulated batches, on the device
    norm: float  # of the whole gradient, before the clip
    faults: list[str] = field(default_factory=list)  # what is not finite, by role and parameter; the update was skipped
    stop: int = 0  # a signal that some rank has received


@dataclass
class Updater:
    method: Method
    optimizers: Mapping[str, Optimizer]
    streams: NoiseStreams
    ranks: Ranks
    dtype: torch.dtype  # that networks compute in
    clock: PhaseClock
    doing: str = "an update"  # for the watchdog
    known: set[str] = field(default_factory=set)  # kinds that have run

    def run(self, kind: str, batches: Sequence[TrainingBatch], stop: int = 0) -> Outcome:
        optimizer = self.optimizers[kind]
        with self.clock.phase(kind), memory_explained(f"a {kind} update"):
            metrics = self._gradients(kind, batches)
            self.ranks.watchdog.beat(f"reducing the gradients of a {kind} update")
            if kind not in self.known:
                self._check_alike(kind, optimizer)
            average_gradients(optimizer.parameters.values(), self.ranks)
            gradients = {n: p.grad for n, p in optimizer.parameters.items() if p.grad is not None}
            outcome = self._judged(metrics, gradients, stop)
            if not outcome.faults:
                self._clip(optimizer, list(gradients.values()), outcome.norm)
                optimizer.step()
            optimizer.zero_grad()
        return outcome

    def _gradients(self, kind: str, batches: Sequence[TrainingBatch]) -> dict[str, Tensor]:
        share = 1 / len(batches)
        seen: list[Mapping[str, Tensor]] = []
        for number, batch in enumerate(batches, start=1):
            # The first of a kind compiles, and allocates.
            patience = 1.0 if kind in self.known else PATIENCE
            of = f", batch {number} of {len(batches)}" if len(batches) > 1 else ""
            self.ranks.watchdog.beat(f"{self.doing}{of}", patience)
            mixed = self.dtype != torch.float32
            with torch.autocast(self.ranks.device.type, self.dtype) if mixed else nullcontext():
                seen.append(self.method.run(kind, batch, self.streams, share))
        return {name: torch.stack([one[name].float() for one in seen]).mean() for name in seen[0]}

    def _check_alike(self, kind: str, optimizer: Optimizer) -> None:
        """Averaging goes by position: once for each kind, every rank has gradients of the same parameters."""
        mine = [name for name, p in optimizer.parameters.items() if p.grad is not None]
        for rank, theirs in enumerate(self.ranks.gathered(mine)):
            if theirs != mine:
                differ = sorted(set(mine) ^ set(theirs))[:3]
                raise ValueError(
                    f"a {kind} update gave ranks {self.ranks.rank} and {rank} gradients of different parameters "
                    f"({', '.join(differ)}): every rank must run the same networks"
                )
        self.known.add(kind)

    def _judged(self, metrics: dict[str, Tensor], gradients: dict[str, Tensor], stop: int) -> Outcome:
        """All ranks come to the same verdict: one that skips alone would leave the others waiting."""
        losses = {name: value for name, value in metrics.items() if name.endswith("loss")}
        norm = gradient_norm(list(gradients.values())) if gradients else torch.zeros((), dtype=torch.float64)
        finite = torch.stack([value.double() for value in losses.values()]).isfinite().all() if losses else None
        told = [norm] if finite is None else [norm, finite.to(norm)]
        mine, *rest = torch.stack(told).tolist()  # the one wait
        bad = not math.isfinite(mine) or 0.0 in rest
        worst, signal = self.ranks.highest([float(bad), float(stop)])
        outcome = Outcome(metrics, mine, stop=int(signal))
        if worst:
            every = self.ranks.gathered(_not_finite(losses, gradients))
            outcome.faults = list(dict.fromkeys(fault for found in every for fault in found))
        return outcome

    def _clip(self, optimizer: Optimizer, gradients: list[Tensor], norm: float) -> None:
        limit = optimizer.config.clip
        if limit is not None and norm > limit:
            torch._foreach_mul_([local(gradient) for gradient in gradients], limit / norm)


def _not_finite(losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> list[str]:
    """What is not finite on this rank: every loss, and of each role the first parameter and how many more there are."""
    found = [f"{name} is {value.item()}" for name, value in losses.items() if not bool(value.isfinite())]
    bad = [name for name, gradient in gradients.items() if not bool(local(gradient).isfinite().all())]
    for role in dict.fromkeys(name.split(".")[0] for name in bad):
        own = [name for name in bad if name.split(".")[0] == role]
        more = f" and of {len(own) - 1} more of its parameters" if len(own) > 1 else ""
        found.append(f"{role}: the gradient of {own[0].removeprefix(f'{role}.')}{more} is not finite")
    return found or ["the norm of the gradient is not finite"] * (not losses and bool(gradients))


@contextmanager
def memory_explained(doing: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not named and "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise OutOfMemory(
            f"out of memory in {doing} ({lines[0][:200]}). What helps, cheapest first: "
            "compute.checkpointing=true; a smaller batch with more accumulate; method.mode=recompute; "
            "roles.student.weights=lora (frozen bases); parallel.kind=fsdp on several GPUs. "
            "`twostep plan` and `twostep train --dry-run` predict each without a GPU"
        ) from error


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def trained_parameters(method: Method, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """kind of update -> role.name -> parameter: what the optimizers hold, by names that a checkpoint keeps."""
    names: dict[int, str] = {}
    for role, module in modules.items():
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), f"{role}.{name}")
    return {kind: {names[id(p)]: p for p in parameters} for kind, parameters in method.parameters().items()}


def optimizers_of(recipe: Recipe, method: Method, modules: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
    """One for each kind of update, that knows how many steps there will be."""
    settings, guidance = recipe.optimizers.generator, recipe.optimizers.guidance
    chosen = {"generator": settings, "guidance": settings if guidance is None else guidance}
    updates = Counter(method.updates(0))
    return {
        kind: Optimizer(parameters, chosen[kind], updates[kind] * recipe.iterations)
        for kind, parameters in trained_parameters(method, modules).items()
    }
