"""What an update costs on several GPUs: memory of each, bytes over links, floating-point operations, and time.

The update runs as in plan.py, on tensors without data, and among ranks without processes: torch's "fake" process group,
whose collectives return at once. FSDP2's own code gathers, frees and reduces there, so memory and bytes are counted and
not modelled; a test holds the bytes to those of two real ranks. What is modelled:

    ring        n ranks pass pieces around: each sends (n - 1) / n of what is gathered or scattered to its neighbour,
                twice that for an all-reduce. Ranks fill nodes in order, so a ring leaves each node once
    compute     operations of matrix products, attention and convolutions / rate
    time        between compute and communication overlapped, max(a, b), and one after the other, a + b
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..memory import LiveBytes
from .backbone import Backbone
from .plan import Plan, Setting, check_arrangement, count_parameters, make_roles, run_updates

PARALLEL = ("ddp", "fsdp")
GUIDANCE_PER_GENERATOR = 5  # Turbo++'s
Divide = Callable[[Backbone, DeviceMesh, torch.dtype], None]  # twostep.train.sharding.shard
Average = Callable[[list[nn.Parameter], int], None]  # average_gradients of so many ranks; zoo does not import train


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links achieve. ASSUMED, not measured here: an H100 SXM's data sheet, and what is usual of it.

    flops      989e12 dense in bfloat16 by the data sheet, of which 40 % is usual for transformers of this size
    link       NVLink 4: 900e9 in both directions together, so 450e9 in one; 80 % of that
    network    a node's eight 400 Gbit/s adapters: 400e9 in one direction; 80 % of that
    """

    flops: float = 400e12  # of a GPU, each second
    link: float = 360e9  # bytes that a GPU sends inside a node, each second
    network: float = 320e9  # bytes that a node sends to other nodes, each second

    def __post_init__(self) -> None:
        for name in ("flops", "link", "network"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}, expected a number above 0")


@dataclass(frozen=True)
class Cluster:
    gpus: int = 1  # in all
    nodes: int = 1
    parallel: str = "fsdp"
    replicas: int = 1  # groups that hold all shards each
    rates: Rates = Rates()

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel is {self.parallel!r}, expected one of {', '.join(map(repr, PARALLEL))}")
        if self.gpus % self.nodes:
            raise ValueError(f"gpus is {self.gpus}, expected a multiple of the number of nodes, {self.nodes}")
        if self.replicas > 1 and self.parallel == "ddp":
            raise ValueError("replicas is for parallel 'fsdp': with 'ddp' every GPU is a replica")
        if self.gpus % self.replicas:
            raise ValueError(f"replicas is {self.replicas}, expected a divisor of the number of GPUs, {self.gpus}")
        if self.shards % self.per_node and self.per_node % self.shards:
            raise ValueError(
                f"a replica has {self.shards} GPUs and a node {self.per_node}: expected that one divides the other, "
                f"so that every node's links carry the same; choose another number of replicas"
            )

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def shards(self) -> int:
        """GPUs that hold one set of parameters together."""
        return self.gpus // self.replicas if self.parallel == "fsdp" else 1


# What happens on a rank


@dataclass(frozen=True)
class Collective:
    kind: str  # "gather", "scatter" (a sum, of which each rank keeps its part), "reduce" (a sum for all)
    bytes: int  # of the whole: what is gathered, or goes into the sum
    ranks: tuple[int, ...]


@dataclass
class Work:
    """Of one batch of an update, and once an update."""

    flops: int = 0
    collectives: list[Collective] = field(default_factory=list)
    once: list[Collective] = field(default_factory=list)

    def of_update(self, accumulate: int) -> list[Collective]:
        return self.collectives * accumulate + self.once


_C10D = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce"}
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_DEVICE = torch.ops.prim.device.default  # a fake tensor asks for its device more often than it computes


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations, two for a multiplication and its addition, by torch's own formulas."""
    packet = func._overloadpacket
    if packet is _ATTENTION:
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def collective_of(func: Any, args: Any) -> Collective | None:
    """What a c10d operator sends around."""
    kind = _C10D.get(func._overloadpacket.__name__) if func.namespace == "c10d" else None
    if kind is None:
        return None
    whole = args[1] if kind == "scatter" else args[0]
    size = sum(leaf.nbytes for leaf in tree_leaves(whole) if isinstance(leaf, Tensor))
    group = dist.ProcessGroup.unbox(args[1] if kind == "reduce" else args[2])
    return Collective(kind, size, tuple(dist.get_process_group_ranks(group)))


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of tensors; of a divided one, the part that is here."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, DTensor):
            yield leaf.to_local().untyped_storage()
        elif isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


class RankCount(LiveBytes):
    """LiveBytes that follows the storages which FSDP empties and fills again, and the work of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self._now, self._is_once = Work(), False
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self._gathered: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return func(*args, **kwargs)
        for storage in [storage for storage in self._gathered if not storage.nbytes()]:  # given back
            self._count(storage)
            self._gathered.discard(storage)
        if func.namespace == "fsdp":
            for storage in _storages((args, kwargs)):
                self._count(storage)
                self._gathered.add(storage)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._count(storage)
        self._now.flops += flops_of(func, args, kwargs, out)
        collective = collective_of(func, args)
        if collective is not None:
            (self._now.once if self._is_once else self._now.collectives).append(collective)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        held = self._sizes.get(storage)
        if held is None:
            held = self._sizes[storage] = [0]
            weakref.finalize(storage, self._forget, held)
        size = storage.nbytes()
        self.live += size - held[0]
        held[0] = size
        self._phase_peak = max(self._phase_peak, self.live)
        self.peak = max(self.peak, self.live)

    def _forget(self, held: list[int]) -> None:
        self.live -= held[0]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._now = self._now, self.work.setdefault(name, Work())
        with super().phase(name):
            yield
        self._now = before

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """What is sent inside is sent once an update, however many batches it has."""
        self._is_once = True
        yield
        self._is_once = False


@contextlib.contextmanager
def ranks_without_processes(cluster: Cluster) -> Iterator[DeviceMesh | None]:
    """This process as rank 0 of as many as there are GPUs; the mesh of the shards, where there are several."""
    from torch.testing._internal.distributed import fake_pg  # registers the backend

    if dist.is_initialized():
        raise ValueError("plan: this process is a rank already; plan before torch.distributed is initialised")
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=cluster.gpus)
    try:
        mesh = None
        if cluster.shards > 1:
            shape, names = (cluster.gpus,), ("shard",)
            if cluster.replicas > 1:
                shape, names = (cluster.replicas, cluster.shards), ("replicate", "shard")  # type: ignore[assignment]
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        yield mesh
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def counted() -> Iterator[RankCount]:
    """Tensors made inside have no data, and are counted."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), RankCount() as count:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copy.deepcopy looks
        # Its output is a view, and nobody writes there.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield count


# What it costs


@dataclass(frozen=True)
class Cost:
    """Of an update, or several, on every GPU."""

    flops: float = 0.0
    gathered: float = 0.0  # bytes of whole parameters that a GPU puts together
    reduced: float = 0.0  # bytes of gradients that a GPU gives into sums
    inside: float = 0.0  # bytes that a GPU sends to its neighbour in the node
    between: float = 0.0  # bytes that a node sends to the next
    compute: float = 0.0  # seconds
    communication: float = 0.0

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.communication)

    @property
    def in_turn(self) -> float:
        return self.compute + self.communication

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> Cost:
        return Cost(**{name: times * value for name, value in vars(self).items()})


def ring(collective: Collective, per_node: int) -> tuple[float, float]:
    """Bytes that a GPU sends inside its node, and that a node sends to the next."""
    count = len(collective.ranks)
    edge = collective.bytes * (count - 1) / count * (2 if collective.kind == "reduce" else 1)
    nodes = {rank // per_node for rank in collective.ranks}
    here = sum(rank // per_node == collective.ranks[0] // per_node for rank in collective.ranks)
    groups = per_node // here  # that do the same at the same time, over the same adapters
    return (edge if here > 1 else 0.0), (edge * groups if len(nodes) > 1 else 0.0)


def cost(work: Work, cluster: Cluster, accumulate: int = 1) -> Cost:
    rates, total = cluster.rates, Cost(flops=work.flops * accumulate)
    total += Cost(compute=total.flops / rates.flops)
    total += Cost(reduced=sum(collective.bytes for collective in work.once))
    for collective in work.of_update(accumulate):
        inside, between = ring(collective, cluster.per_node)
        total += Cost(
            gathered=collective.bytes if collective.kind == "gather" else 0,
            # What HSDP's groups then reduce among each other are the same gradients, not more of them.
            reduced=collective.bytes if collective.kind == "scatter" else 0,
            inside=inside,
            between=between,
            communication=max(inside / rates.link, between / rates.network),
        )
    return total


@dataclass
class ScaledPlan(Plan):
    cluster: Cluster = field(default_factory=Cluster)
    work: dict[str, Work] = field(default_factory=dict)

    @property
    def costs(self) -> dict[str, Cost]:
        """Of each kind of update, and of an iteration: five of guidance, one of the generator."""
        found = {kind: cost(work, self.cluster, self.setting.accumulate) for kind, work in self.work.items()}
        return {**found, "iteration": found["guidance"] * GUIDANCE_PER_GENERATOR + found["generator"]}

    @property
    def samples(self) -> int:
        """Of an update, over all GPUs."""
        return self.setting.batch * self.setting.accumulate * self.cluster.gpus

    @property
    def limit(self) -> str:
        """What an iteration's time is spent on most."""
        whole, rates = self.costs["iteration"], self.cluster.rates
        parts = {
            "compute": whole.compute,
            "links in a node": whole.inside / rates.link,
            "network between nodes": whole.between / rates.network,
        }
        return max(parts, key=lambda name: parts[name])


def plan_scale(config: Any, setting: Setting, cluster: Cluster, divide: Divide, average: Average) -> ScaledPlan:
    """Runs the updates as rank 0 of a cluster, on fake tensors, and counts.

    Args:
        divide: FSDP2 on a network, in place.
        average: the mean over so many ranks of those gradients that are not reduced already.
    """
    check_arrangement(setting)
    result = ScaledPlan(setting, cluster=cluster)
    with ranks_without_processes(cluster) as mesh, counted() as count:
        roles = make_roles(config, setting)
        if mesh is not None:
            for network in roles.networks:
                divide(network, mesh, setting.dtype)
        count_parameters(roles, result)

        def averaged(parameters: list[nn.Parameter]) -> None:
            with count.once():
                average(parameters, cluster.gpus)

        run_updates(roles, setting, count.phase, averaged)
        result.peaks = dict(count.peaks)
        result.held = result.peaks.pop("between updates")
        result.work = {kind: count.work[kind] for kind in result.peaks}
    return result


def totals(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """How many collectives of each kind, and their bytes."""
    found: dict[str, dict[str, int]] = {}
    for collective in collectives:
        one = found.setdefault(collective.kind, {"calls": 0, "bytes": 0})
        one["calls"] += 1
        one["bytes"] += collective.bytes
    return found
