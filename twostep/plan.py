"""`twostep plan`: what a distillation holds in memory, from shapes alone; with --gpus what it holds, sends and
computes on several."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .arguments import answered
from .tables import columns

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="z-image",
        help="z-image, klein-4b, klein-9b, miniature, or a folder with a config.json",
    )
    parser.add_argument("--height", type=int, default=1024, help="of the images, in pixels")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pixels-per-latent", type=int, help="default: 8 for Z-Image, 16 for FLUX.2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--caption", type=int, help="tokens of a caption (default: 512, or what there is room for)")
    parser.add_argument("--arrangement", choices=["networks", "one base", "both"], default="both")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters on one base")
    parser.add_argument("--mode", choices=["recompute", "retain", "plain"], default="recompute")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of every block")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    scale = parser.add_argument_group("several GPUs", "memory of each, bytes over links, and time; see docs/scaling.md")
    add = scale.add_argument
    add("--gpus", type=int, help="in all; what follows needs it")
    add("--nodes", type=int, help="that the GPUs are in; default: 1")
    add("--parallel", choices=["ddp", "fsdp"], help="default: fsdp")
    add("--replicas", type=int, help="fsdp: groups that hold all shards each (HSDP); default: 1")
    add("--accumulate", type=int, help="batches of an update; default: 1")
    add("--ema", action=argparse.BooleanOptionalAction, help="an average of the student, as the trainer keeps one")
    add("--flops", type=float, help="TFLOP/s that a GPU achieves in bfloat16; default: 400")
    add("--link", type=float, help="GB/s that a GPU sends inside a node; default: 360")
    add("--network", type=float, help="GB/s that a node sends to others; default: 320")


def run(arguments: argparse.Namespace) -> int:
    return answered("plan", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from .zoo.plan import ARRANGEMENTS, MODELS, Setting, caption_room, plan

    config = MODELS[arguments.model] if arguments.model in MODELS else _config(arguments.model, tuple(MODELS))
    step = arguments.pixels_per_latent
    if step is None:
        step = 8 if config["_class_name"].startswith("Z") else 16
    if arguments.caption is None:
        arguments.caption = caption_room(config)
    _check(arguments, step)
    cluster = _cluster(arguments)
    names = ARRANGEMENTS if arguments.arrangement == "both" else (arguments.arrangement,)
    plans: list[Any] = []
    for name in names:
        setting = Setting(
            height=arguments.height // step,
            width=arguments.width // step,
            batch=arguments.batch,
            caption=arguments.caption,
            arrangement=name,
            mode=arguments.mode,
            checkpointing=arguments.checkpointing,
            dtype=getattr(torch, arguments.dtype),
            rank=arguments.rank,
            ema=bool(arguments.ema),
            accumulate=arguments.accumulate or 1,
        )
        print(f"running the updates of {name} on tensors without data ...", file=sys.stderr, flush=True)
        plans.append(plan(config, setting) if cluster is None else _scaled(config, setting, cluster))
    if arguments.json:
        print(json.dumps([_facts(p) for p in plans], indent=1))
    else:
        print(_table(arguments, plans))
    return 0


def _scaled(config: dict[str, Any], setting: Any, cluster: Any) -> Any:
    from .train.rehearsal import average_among
    from .train.sharding import shard
    from .zoo.plan_scale import plan_scale

    return plan_scale(config, setting, cluster, shard, average_among)


SCALE = ("nodes", "parallel", "replicas", "accumulate", "ema", "flops", "link", "network")


def _cluster(arguments: argparse.Namespace) -> Any:
    """The GPUs, or None where there is one and nothing is asked of it."""
    from .zoo.plan_scale import Cluster, Rates

    given = {name: getattr(arguments, name) for name in SCALE if getattr(arguments, name) is not None}
    if arguments.gpus is None:
        if given:
            raise ValueError(f"--{next(iter(given))} is given, and --gpus is not: say how many there are")
        return None
    if given.pop("accumulate", 1) < 1:
        raise ValueError(f"--accumulate is {arguments.accumulate}, expected at least 1")
    given.pop("ema", None)
    units = {"flops": 1e12, "link": 1e9, "network": 1e9}
    rates = Rates(**{name: given.pop(name) * unit for name, unit in units.items() if name in given})
    return Cluster(gpus=arguments.gpus, rates=rates, **given)


def _check(arguments: argparse.Namespace, step: int) -> None:
    if step < 1:
        raise ValueError(f"--pixels-per-latent is {step}, expected at least 1")
    for name in ("height", "width", "batch", "caption", "rank"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    for name in ("height", "width"):
        if getattr(arguments, name) % (2 * step):
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected a multiple of {2 * step} pixels")


def _config(model: str, known: tuple[str, ...]) -> dict[str, Any]:
    from .train.suggest import did_you_mean

    if model == "miniature":
        from .zoo.miniature.model import WEIGHTS

        model = str(WEIGHTS)
    for file in (Path(model, "config.json"), Path(model, "transformer", "config.json")):
        if file.is_file():
            config: dict[str, Any] = json.loads(file.read_text())
            if "_class_name" in config:
                return config
    raise ValueError(
        f"{model!r}: {did_you_mean(model, (*known, 'miniature'))}it is neither one of {', '.join(known)}, miniature "
        f"nor a folder with a diffusers transformer's config.json"
    )


def _facts(p: Any) -> dict[str, Any]:
    facts = {
        "arrangement": p.setting.arrangement,
        "parameters": p.parameters,
        "trainable": p.trainable,
        "held_bytes": p.held,
        "peak_bytes": p.peaks,
    }
    return facts | (_scale_facts(p) if hasattr(p, "cluster") else {})


def _scale_facts(p: Any) -> dict[str, Any]:
    """In bytes and seconds; of every GPU, but for what a node sends."""
    cluster = p.cluster
    return {
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "parallel": cluster.parallel,
        "replicas": cluster.replicas if cluster.parallel == "fsdp" else cluster.gpus,
        "samples_per_update": p.samples,
        "rates": vars(cluster.rates),
        "costs": {
            name: {
                "flops": cost.flops,
                "gathered_bytes": cost.gathered,
                "reduced_bytes": cost.reduced,
                "sent_inside_node_bytes": cost.inside,
                "sent_between_nodes_bytes": cost.between,
                "compute_seconds": cost.compute,
                "communication_seconds": cost.communication,
                "overlapped_seconds": cost.overlapped,
                "in_turn_seconds": cost.in_turn,
            }
            for name, cost in p.costs.items()
        },
        "limit": p.limit,
    }


def _table(arguments: argparse.Namespace, plans: list[Any]) -> str:
    roles = list(plans[0].parameters)
    rows = [["", *(p.setting.arrangement for p in plans)]]
    rows += [
        [f"{role}: million parameters", *(f"{p.parameters.get(role, 0) / 1e6:,.1f}" for p in plans)] for role in roles
    ]
    unit, size = ("GiB", 2**30) if max(max(p.peaks.values()) for p in plans) >= 2**30 else ("MiB", 2**20)
    rows.append([f"held between updates: {unit}", *(f"{p.held / size:,.1f}" for p in plans)])
    rows += [
        [f"peak of a {phase} update: {unit}", *(f"{p.peaks[phase] / size:,.1f}" for p in plans)]
        for phase in plans[0].peaks
    ]
    head = (
        f"{arguments.model}, {arguments.height} x {arguments.width}, batch {arguments.batch}, {arguments.caption} "
        f"caption tokens, {arguments.dtype}, mode {arguments.mode}, checkpointed blocks: "
        f"{'yes' if arguments.checkpointing else 'no'}"
    )
    notes = ["Tensors alone: a CUDA context, cuBLAS workspaces and the allocator's fragmentation come on top."]
    tables = [columns(rows, right=range(1, len(rows[0])))]
    if hasattr(plans[0], "cluster"):
        head += f"\n{_describe(plans[0])}"
        tables += [columns(scaled, right=range(1, len(scaled[0]))) for scaled in map(_scale_rows, plans)]
        notes.append(_assumed(plans[0].cluster.rates))
    return "\n\n".join([head, *tables, "\n".join(notes)])


def _describe(p: Any) -> str:
    cluster, setting = p.cluster, p.setting
    if cluster.gpus == 1:
        how = ""
    elif cluster.parallel == "ddp":
        how = ", ddp: every GPU holds everything"
    else:
        how = f", fsdp: {cluster.replicas} x {cluster.shards} shards"
    samples = _counted(p.samples, "sample") + " an update"
    if setting.accumulate > 1:
        samples += f" in {setting.accumulate} batches"
    gpus, nodes = _counted(cluster.gpus, "GPU"), _counted(cluster.nodes, "node")
    return f"{gpus} in {nodes}{how}; {samples}; an average of the student: {'yes' if setting.ema else 'no'}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


SCALE_ROWS = (
    ("computes: TFLOP a GPU", "flops", 1e12),
    ("gathers: GB a GPU", "gathered", 1e9),
    ("reduces: GB a GPU", "reduced", 1e9),
    ("sends inside a node: GB a GPU", "inside", 1e9),
    ("sends between nodes: GB a node", "between", 1e9),
    ("computes: seconds", "compute", 1.0),
    ("sends: seconds", "communication", 1.0),
    ("takes, all of it overlapped: seconds", "overlapped", 1.0),
    ("takes, nothing overlapped: seconds", "in_turn", 1.0),
)


def _scale_rows(p: Any) -> list[list[str]]:
    """What updates of one arrangement cost."""
    costs = p.costs
    titles = ["an iteration" if name == "iteration" else f"{name} update" for name in costs]
    rows = [[f"{p.setting.arrangement}: most time goes to {p.limit}", *titles]]
    for text, attribute, unit in SCALE_ROWS:
        rows.append([text, *(f"{getattr(cost, attribute) / unit:,.2f}" for cost in costs.values())])
    return rows


def _assumed(rates: Any) -> str:
    return (
        f"An iteration is 5 guidance updates and 1 of the generator. Assumed, not measured: {rates.flops / 1e12:g} "
        f"TFLOP/s a GPU, {rates.link / 1e9:g} GB/s inside a node,\n{rates.network / 1e9:g} GB/s a node to others "
        f"(--flops, --link, --network; docs/scaling.md says whence)."
    )
