"""One rank of the distributed checks of the two-step backward: prints a JSON of findings on rank 0.

python unrolled_ranks.py RANK WORLD FILE
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from twostep import ops

SIGMAS = (1, 0.75, 0)
BLOCKS, WIDTH = 4, 16


class Net(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype, checkpointed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        torch.manual_seed(seed)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout)) for _ in range(BLOCKS))
        )
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapters = Net(1, torch.float32), nn.ModuleList(Net(seed, torch.float32) for seed in (2, 3))

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.base(x) + self.adapters[step](x)


class Heads(nn.Module):
    """A trunk that both steps use, and a head for each: methods of one module, which does not tell who uses what."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.trunk, self.heads = nn.Linear(WIDTH, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def first(self, x: Tensor) -> Tensor:
        return self.heads[0](self.trunk(x).tanh())

    def second(self, z: Tensor) -> Tensor:
        return self.heads[1](self.trunk(z).tanh())


def whole(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(modules: list[nn.Module]) -> list[Tensor | None]:
    found = [whole(p.grad) for module in modules for p in module.parameters()]
    for module in modules:
        module.zero_grad(set_to_none=True)
    return [None if g is None else g.detach().clone() for g in found]


def distance(left: list[Tensor | None], right: list[Tensor | None]) -> float:
    """The largest difference; 0 for the same bits. A gradient that only one has is an infinite one."""
    largest = 0.0
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            largest = float("inf") if a is not b else largest
        elif not torch.equal(a, b):
            largest = max(largest, float((a - b).abs().max()))
    return largest


def first_loss(x: Tensor) -> Tensor:
    return x.square().mean()


def final_loss(x: Tensor) -> Tensor:
    return (x - 1).square().mean()


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def sharded(net: Net) -> nn.Module:
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


class Findings:
    def __init__(self, rank: int) -> None:
        self.found: dict[str, Any] = {}
        self.rank = rank

    def compare(
        self,
        kind: str,
        steps: str = "shared",
        dtype: torch.dtype = torch.float32,
        calls: int = 1,
        checkpointed: bool = False,
    ) -> None:
        """Every mode and policy against plain and against one process, as distances, and the collectives of each."""
        wrap = {"ddp": ddp, "fsdp": sharded}[kind]
        noise = torch.randn(3, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(self.rank))
        nets = [Net(seed, dtype, checkpointed) for seed in ((1,) if steps == "shared" else (1, 2))]
        modules = [wrap(copy.deepcopy(net)) for net in nets]
        first, second = modules[0], modules[-1]
        single = self._single_process(nets, calls, dtype)
        plain = None
        case = self.found.setdefault(f"{kind} {steps} {str(dtype)[6:]}" + " checkpointed" * checkpointed, {})
        policies = [("plain", None)] + [
            (mode, sync) for mode in ("retain", "recompute") for sync in (None, "last", "each")
        ]
        for mode, sync in policies:
            with Collectives() as comms:
                try:
                    for _ in range(calls):
                        ops.two_step_backward(
                            first, second, noise, SIGMAS, first_loss, final_loss, mode=mode, sync=sync
                        )
                except ValueError as error:
                    case[f"{mode} {sync}"] = {"error": str(error)}
                    continue
            on_shards = all(isinstance(p.grad, DTensor) for m in modules for p in m.parameters())
            found = gradients(modules)
            plain = found if plain is None else plain
            case[f"{mode} {sync}"] = {
                "from plain": distance(found, plain),
                "from one process": distance(found, single),
                "sharded": on_shards,
                "gathered": comms.counts["_allgather_base_"],
                "reduced": comms.counts["_reduce_scatter_base_"] + comms.counts["allreduce_"],
            }

    def _single_process(self, nets: list[Net], calls: int, dtype: torch.dtype) -> list[Tensor | None]:
        """The same gradient from all ranks' noise in one process: the mean over ranks is that of the losses."""
        alone = [copy.deepcopy(net) for net in nets]
        world = dist.get_world_size()
        for rank in range(world):
            noise = torch.randn(3, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(rank))
            for _ in range(calls):
                v0 = alone[0](noise)
                z = noise - 0.25 * v0
                x = z - 0.75 * alone[-1](z)
                ((final_loss(x) + first_loss(noise - v0)) / world).backward()
        return gradients(alone)  # type: ignore[arg-type]

    def options(self, kind: str) -> None:
        """Dropout, a share of the gradient that is clipped, verification, offload: recompute's distance to plain."""
        wrap = {"ddp": ddp, "fsdp": sharded}[kind]
        noise = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(self.rank))
        modules = [wrap(Net(seed, torch.float32, dropout=0.3)) for seed in (1, 2)]
        results = []
        for options in ({"mode": "plain"}, {"verify": True, "offload": True}, {"first_pass": "grad"}):
            torch.manual_seed(10 + self.rank)
            ops.two_step_backward(
                *modules,
                noise,
                SIGMAS,
                first_loss,
                final_loss,
                inherit=0.3,
                clip=1e-3,
                **options,  # type: ignore[arg-type]
            )
            results.append(gradients(modules))
        for module in modules:
            module.eval()
        ops.two_step_backward(*modules, noise, SIGMAS, first_loss, final_loss, mode="plain")  # type: ignore[arg-type]
        without = gradients(modules)
        self.found[f"options {kind}"] = [distance(result, results[0]) for result in [*results[1:], without]]

    def functions_need_modules(self) -> None:
        net = sharded(Net(1, torch.float32))
        noise = torch.randn(3, WIDTH)
        step = lambda x: net(x)  # noqa: E731
        arguments = (step, step, noise, SIGMAS, first_loss, final_loss)
        try:
            ops.two_step_backward(*arguments, sync="last")
            self.found["functions"] = "no error"
        except ValueError as error:
            self.found["functions"] = str(error)
        net.zero_grad()
        # The trainer may be accumulating without synchronisation: its setting must come through.
        net.set_requires_gradient_sync(False)
        ops.two_step_backward(*arguments, sync="last", modules=(net, net))
        self.found["sync stays off"] = all(p.grad is None for p in net.parameters())
        net.set_requires_gradient_sync(True)
        ops.two_step_backward(*arguments, sync="last", modules=(net, net))
        accumulated = gradients([net])
        for _ in range(2):
            ops.two_step_backward(*arguments, modules=(net, net), sync="each")
        self.found["accumulated without sync"] = distance(accumulated, gradients([net]))

    def fsdp_holds_back(self) -> None:
        """sync="last": what step 2 alone uses is reduced too, and what an error leaves is not in the next gradient."""
        noise = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(self.rank))
        net = Heads()
        for part in (net.trunk, *net.heads):
            fully_shard(part)
        results = {}
        for mode, sync in (("plain", None), ("retain", "last"), ("recompute", "last")):
            arguments = (net.first, net.second, noise, SIGMAS, first_loss)
            for _ in range(2):
                with Collectives() as comms:
                    ops.two_step_backward(*arguments, final_loss, mode=mode, sync=sync)  # type: ignore[arg-type]
            results[mode] = gradients([net])
            self.found[f"heads {mode}"] = (
                distance(results[mode], results["plain"]),
                comms.counts["_reduce_scatter_base_"],
            )
            try:
                ops.two_step_backward(
                    *arguments[:-1],
                    lambda x: first_loss(x) * float("nan"),
                    final_loss,
                    mode=mode,  # type: ignore[arg-type]
                    sync=sync,  # type: ignore[arg-type]
                    check_finite=True,
                )
                self.found[f"heads {mode} after an error"] = "no error"
            except FloatingPointError:
                net.zero_grad()
                for part in (net.trunk, *net.heads):
                    if hasattr(part, "reset_iter_state"):  # torch 2.13; before, one more backward does it
                        part.reset_iter_state()
                    else:
                        part(torch.zeros(1, WIDTH)).sum().backward()
                net.zero_grad()
                for _ in range(2):
                    ops.two_step_backward(*arguments, final_loss, mode=mode, sync=sync)  # type: ignore[arg-type]
                self.found[f"heads {mode} after an error"] = distance(gradients([net]), results["plain"])

    def ddp_that_accumulates(self) -> None:
        """no_sync of the caller's own around the first of two calls."""
        net = ddp(Net(1, torch.float64))
        noise = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(self.rank))
        results = []
        for mode in ("plain", "retain", "recompute"):
            with net.no_sync():  # type: ignore[operator]
                ops.two_step_backward(net, net, noise[0], SIGMAS, first_loss, final_loss, mode=mode)
            ops.two_step_backward(net, net, noise[1], SIGMAS, first_loss, final_loss, mode=mode)
            results.append(gradients([net]))
        self.found["no_sync"] = [distance(result, results[0]) for result in results]
        try:
            step = lambda x: net(x)  # noqa: E731
            ops.two_step_backward(step, step, noise[0], SIGMAS, first_loss, final_loss, mode="retain", sync="each")
            self.found["hidden ddp"] = "no error"
        except ValueError as error:
            self.found["hidden ddp"] = str(error)

    def static_graph(self) -> None:
        """DistributedDataParallel that learns how often each parameter arrives: over three iterations."""
        noise = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(self.rank))
        for shared in (True, False):
            plain: dict[int, list[Tensor | None]] = {}
            for mode, sync in (("plain", None), ("retain", None), ("recompute", None), ("recompute", "last")):
                nets = [Net(seed, torch.float32) for seed in ((1,) if shared else (1, 2))]
                modules = [DistributedDataParallel(net, static_graph=True) for net in nets]
                found: Any = []
                try:
                    for turn in range(3):
                        ops.two_step_backward(
                            modules[0], modules[-1], noise, SIGMAS, first_loss, final_loss, mode=mode, sync=sync
                        )
                        made = gradients(list(modules))
                        found.append(distance(made, plain.setdefault(turn, made)))
                except ValueError as error:
                    found = str(error)
                self.found[f"static {'shared' if shared else 'separate'} {mode} {sync}"] = found
        hidden = {"net": [[DistributedDataParallel(Net(1, torch.float32), static_graph=True)]]}
        step = lambda x, held=hidden: held["net"][0][0](x)  # noqa: E731
        try:
            ops.two_step_backward(step, step, noise, SIGMAS, first_loss, final_loss)
            self.found["static hidden"] = "no error"
        except ValueError as error:
            self.found["static hidden"] = str(error)

    def unused_parameters(self) -> None:
        """An adapter for each step in one DistributedDataParallel that looks for unused parameters."""
        noise = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(self.rank))
        results: dict[str, Any] = {}
        for seeks in (False, True):
            for mode, sync in (("plain", None), ("recompute", None), ("recompute", "each")):
                net = DistributedDataParallel(Adapted(), find_unused_parameters=seeks)
                steps = (lambda x, net=net: net(x, 0)), (lambda x, net=net: net(x, 1))
                try:
                    ops.two_step_backward(*steps, noise, SIGMAS, first_loss, final_loss, mode=mode, sync=sync)
                    results[f"{seeks} {mode} {sync}"] = gradients([net])
                except (ValueError, RuntimeError) as error:
                    self.found[f"unused {seeks} {mode} {sync}"] = str(error)
        for name, result in results.items():
            self.found[f"unused {name}"] = distance(result, results["False plain None"])


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    findings = Findings(rank)
    for kind in ("ddp", "fsdp"):
        findings.compare(kind, "separate")
        findings.compare(kind)
        findings.compare(kind, dtype=torch.float64, calls=1 if kind == "fsdp" else 2)
        findings.compare(kind, checkpointed=True)
        findings.options(kind)
    findings.functions_need_modules()
    findings.fsdp_holds_back()
    findings.ddp_that_accumulates()
    findings.static_graph()
    findings.unused_parameters()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(findings.found))


if __name__ == "__main__":
    main()
