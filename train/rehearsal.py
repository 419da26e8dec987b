"""A run's roles and updates on tensors without data: what `--dry-run` says of parameters and memory.

The trainer's own cast, method and average run here, as rank 0 of as many ranks as there will be (zoo/plan_scale.py).
Optimizers are made and not stepped: their states are added by their size, since some have kernels that know no tensors
without data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..zoo import AdapterView, Backbone, Context
from ..zoo.encoders import klein_reference_context
from ..zoo.plan import backbone_like, context_room
from ..zoo.plan_scale import Cluster, RankCount, Work, counted, ranks_without_processes
from .adamw8bit import FEW, LARGEST_BLOCK
from .average import Average
from .cast import DTYPES, Casting
from .data import NoiseStreams, noise_generator
from .methods import Cast, DecoupledDMD, FlowMatchingConfig, Method, TrainingBatch, method_class
from .optimizers import Optimizer
from .ranks import Ranks
from .recipe import ImagesData, Recipe
from .sharding import average_gradients, local
from .update import optimizers_of, trainable
from .watchdog import Watchdog

VISION_PATCH = 32  # pixels of a side of what becomes one token of Qwen3-VL


@dataclass(frozen=True)
class RoleFacts:
    name: str
    source: str
    kind: str  # the network's class
    weights: str
    trainable: int
    frozen: int
    dtype: str


@dataclass
class Held:
    """Bytes of a role on a rank."""

    weights: int = 0
    gradients: int = 0  # while they are there
    optimizer: int = 0
    average: int = 0


@dataclass
class Rehearsal:
    sigmas: tuple[float, ...]
    updates: Counter[str]  # of an iteration
    roles: list[RoleFacts] = field(default_factory=list)
    memory: dict[str, Held] = field(default_factory=dict)
    held: int = 0  # bytes between updates
    checkpoint: int = 0  # bytes of one, of all ranks
    peaks: dict[str, int] = field(default_factory=dict)  # bytes at the worst moment of each kind of update
    work: dict[str, Work] = field(default_factory=dict)


def average_among(parameters: list[nn.Parameter], count: int) -> None:
    """average_gradients as rank 0 of so many."""
    average_gradients(parameters, Ranks(0, count, torch.device("cpu"), Watchdog(0, count, 600.0)))


def rehearse(recipe: Recipe, path: str, shape: tuple[int, int, int], world_size: int, caption: int) -> Rehearsal:
    """
    Args:
        path: the recipe's model, resolved: a folder or a hub id.
        shape: channels, height and width of latents.
        caption: tokens of a caption.
    """
    recipe = _steady(recipe)
    noise_generator(recipe.seed, "rehearsal")  # the first one looks at torch's own numbers, and those must be real
    cluster = Cluster(world_size, 1, recipe.parallel.kind, recipe.parallel.replicas)
    with ranks_without_processes(cluster) as mesh, counted() as count:
        casting = Casting(recipe, path, torch.device("cpu"), mesh, load=backbone_like)
        width = casting.networks()[0].context_width
        method_kind = method_class(recipe.method)
        empty = Context(torch.randn(1, caption, width)) if "real_score" in method_kind.roles else None
        cast = casting.roles(shape[1:], empty)
        method = method_kind.build(recipe.method, cast, NoiseStreams(recipe.seed))
        optimizers = optimizers_of(recipe, method, cast.modules())
        result = Rehearsal(cast.student.sigmas, Counter(method.updates(0)))
        result.memory = _memory(recipe, cast, optimizers)
        result.roles = _roles(recipe, path, cast)
        result.checkpoint = _checkpoint(cast, result.memory, cluster.shards if recipe.parallel.kind == "fsdp" else 1)
        batch = batch_without_data(recipe, cast, shape, caption)
        kept = [torch.empty(sum(held.optimizer for held in result.memory.values()), dtype=torch.uint8)]
        averages = None if recipe.ema is None else Average(trainable(cast.student), recipe.ema)
        _run(recipe, method, batch, count, world_size)
        result.peaks, result.work = dict(count.peaks), count.work
        result.held = result.peaks.pop("between updates")
        del kept, averages
    return result


def _steady(recipe: Recipe) -> Recipe:
    """The recipe without what looks at numbers on the way, or at code: neither changes what is held."""
    method = recipe.method
    if isinstance(method, FlowMatchingConfig):
        # The coins of a batch: of its two kinds of context, the one that is longer.
        method = replace(method, caption_dropout=0.0, image_contexts=float(method.image_contexts > 0))
    return replace(recipe, method=method, compute=replace(recipe.compute, compile=False))


def _run(recipe: Recipe, method: Method, batch: TrainingBatch, count: RankCount, world_size: int) -> None:
    """An update of each kind, up to the optimizer's step."""
    if isinstance(method, DecoupledDMD):  # it draws which step to train; the last runs all others before it
        method._step = lambda: method.student.steps - 1  # type: ignore[method-assign]
    streams, dtype = NoiseStreams(recipe.seed), DTYPES[recipe.compute.dtype]
    for kind, parameters in method.parameters().items():
        if recipe.accumulate > 1:  # what earlier batches have left
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        with count.phase(kind):
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                method.run(kind, batch, streams, 1 / recipe.accumulate)
            with count.once():
                average_among(parameters, world_size)
        for parameter in parameters:
            parameter.grad = None
    with count.phase("between updates"):
        pass


def batch_without_data(recipe: Recipe, cast: Cast, shape: tuple[int, int, int], caption: int) -> TrainingBatch:
    """What the method wants of the data, of the largest kind."""
    wants, network = method_class(recipe.method).wants(recipe.method), cast.student.distinct_networks()[0]
    keep = recipe.data.keep if isinstance(recipe.data, ImagesData) else None
    rows = recipe.batch - (0 if keep is None else keep.rows(recipe.batch))
    whole = (rows, *shape)
    context = Context(torch.randn(rows, caption, network.context_width))

    def drawn(name: str) -> Tensor | None:
        return torch.randn(whole) if name in wants else None

    target = None
    if "target_context" in wants:
        if network.family == "flux2":
            target = klein_reference_context(context, torch.randn(whole))
        else:
            pixels = recipe.data.vision_pixels if isinstance(recipe.data, ImagesData) else VISION_PATCH**2
            tokens = context_room(network.model.config, caption + pixels // VISION_PATCH**2)  # more is an error then
            target = Context(torch.randn(rows, tokens, network.context_width))
    kept = None if keep is None else Context(torch.randn(recipe.batch - rows, caption, network.context_width))
    return TrainingBatch(context, whole, drawn("latents"), drawn("anchor"), drawn("anchor"), target, kept)


# What there is


def _networks(cast: Cast) -> Iterator[tuple[str, list[nn.Module]]]:
    """Each role and its networks; first the base of the adapters, where there is one."""
    student = cast.student.distinct_networks()
    if isinstance(student[0], AdapterView):
        yield "base", [_Base(student[0])]
    yield "student", list(student)
    if cast.guidance is not None:
        yield "real_score", [cast.guidance.teacher.backbone]
        yield "fake_score", [cast.guidance.fake.network]
        if (discriminator := cast.guidance.discriminator) is not None:
            yield "discriminator", [discriminator.backbone, discriminator]
    if cast.average is not None:
        yield "average", list(cast.average.distinct_networks())


class _Base(nn.Module):
    """The network under the adapters, without them."""

    model: Any

    def __init__(self, view: AdapterView) -> None:
        super().__init__()
        self.__dict__["model"] = view.model

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if ".lora_" not in name)


def _roles(recipe: Recipe, path: str, cast: Cast) -> list[RoleFacts]:
    """Each parameter stands at the first role that has it."""
    found: list[RoleFacts] = []
    seen: set[int] = set()
    for name, modules in _networks(cast):
        own = {id(p): p for module in modules for _, p in module.named_parameters() if id(p) not in seen}
        seen |= own.keys()
        trainable = [p for p in own.values() if p.requires_grad]
        frozen = [p for p in own.values() if not p.requires_grad]
        network = next((m for m in modules if hasattr(m, "model")), modules[0])
        found.append(
            RoleFacts(
                name=name,
                source=_source(recipe, path, name),
                kind=type(network.model).__name__,
                weights=_weights(name, modules, bool(own)),
                trainable=sum(p.numel() for p in trainable),
                frozen=sum(p.numel() for p in frozen),
                dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own.values()})),
            )
        )
    return found


def _source(recipe: Recipe, path: str, name: str) -> str:
    role = getattr(recipe.roles, {"base": "student", "average": "student"}.get(name, name))
    source = None if role is None else role.source
    if source is None and name == "fake_score" and recipe.roles.real_score is not None:
        source = recipe.roles.real_score.source  # an adapter's base as well
    return path if source is None else str(source)


def _weights(name: str, modules: list[nn.Module], own: bool) -> str:
    if name == "base":
        return "frozen"
    if name == "discriminator":
        return "heads"
    networks = [module for module in modules if isinstance(module, Backbone)]
    if all(isinstance(network, AdapterView) and network.adapter is not None for network in networks):
        return "lora: " + ", ".join(str(network.adapter) for network in networks if isinstance(network, AdapterView))
    if not own:
        return "shared"
    trained = any(p.requires_grad for module in networks for p in module.parameters())
    copies = f"{len(networks)} x " if len(networks) > 1 else ""
    return copies + ("full" if trained else "frozen")


def _memory(recipe: Recipe, cast: Cast, optimizers: Mapping[str, Optimizer]) -> dict[str, Held]:
    """Of each role on a rank; what is shared stands at the first role that has it."""
    states = {id(p): size for optimizer in optimizers.values() for p, size in state_bytes(optimizer)}
    found: dict[str, Held] = {}
    seen: set[int] = set()
    for name, modules in _networks(cast):
        held = found[name] = Held()
        for parameter in (p for module in modules for _, p in module.named_parameters()):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = local(parameter).numel() * parameter.element_size()
            held.weights += size
            held.gradients += size if id(parameter) in states else 0
            held.optimizer += states.get(id(parameter), 0)
            held.average += size if name == "student" and recipe.ema is not None and parameter.requires_grad else 0
    return found


def _checkpoint(cast: Cast, memory: Mapping[str, Held], shards: int) -> int:
    """What RunState keeps: parameters of the roles that move, whole, and the shares of all that goes with them."""
    parameters = {id(p): p for module in cast.modules().values() for p in module.parameters()}
    whole = sum(p.numel() * p.element_size() for p in parameters.values())
    return whole + shards * sum(held.optimizer + held.average for held in memory.values())


def state_bytes(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, int]]:
    """Each parameter, and what the optimizer will remember of it on this rank."""
    for part, _ in optimizer.parts:
        for parameter in (p for group in part.param_groups for p in group["params"]):
            count = local(parameter).numel()
            if isinstance(part, torch.optim.Muon):
                size = count * parameter.element_size()  # a momentum
            elif hasattr(part, "bytes_of"):
                size = part.bytes_of(parameter)
            elif isinstance(part, torch.optim.AdamW) or count < FEW or count % LARGEST_BLOCK:
                size = 2 * count * parameter.element_size()  # two moments
            else:
                size = 2 * (count + 4 * count // LARGEST_BLOCK)  # bitsandbytes: two moments in 8 bits, and their scales
            yield parameter, size
