"""The two-step update at Z-Image's real size, by the trainer's own parts, on random weights: time, memory, the plan.

    python benchmarks/full_size.py --planned benchmarks/results/2026-11-29-plan --out DIR      on a GPU, 1024 and 512
    python benchmarks/full_size.py --only lora --sizes 1024 --out DIR
    python benchmarks/full_size.py --small --device cpu              the same on a small model: does the script run
    python benchmarks/full_size.py --plan --out DIR                  minutes on any machine; --planned DIR takes it over

What runs are the recipes z-image-turbo-pp-lora (two frozen networks, four adapters, the discriminator's heads) and
z-image-flow-matching (one network in full), with their roles, optimizers and updates. Weights, contexts and latents are
random: neither time nor memory looks at them. `planned` is what `twostep train --dry-run` says of the same recipe; on a
CPU, where no allocator counts, memory is the bytes of live tensors. It knows no stash, which moves what waits to the
host. An arrangement that does not fit is said to, and the next one runs. With --plan nothing runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from committed import Folder
from diffusers import ZImageTransformer2DModel

from twostep import ops
from twostep.bench.report import environment
from twostep.memory import LiveBytes
from twostep.tables import markdown
from twostep.train.average import Average
from twostep.train.cast import DTYPES, Casting
from twostep.train.command import read_recipe
from twostep.train.data import NoiseStreams
from twostep.train.methods import method_class
from twostep.train.monitors import PhaseClock
from twostep.train.ranks import Ranks, join
from twostep.train.recipe import Recipe
from twostep.train.rehearsal import batch_without_data, rehearse
from twostep.train.update import OutOfMemory, Updater, optimizers_of, trainable
from twostep.zoo import Backbone, Context
from twostep.zoo.plan import backbone_like, caption_room

GIB = 2**30
FULL: dict[str, Any] = {}  # the defaults of diffusers' class are Z-Image's
SMALL = {
    "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12], "axes_lens": [256, 64, 64],
}  # fmt: skip
LORA, WHOLE = "z-image-turbo-pp-lora", "z-image-flow-matching"


@dataclass(frozen=True)
class Arrangement:
    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    stash: bool = False


def arrangements() -> list[Arrangement]:
    """The default first: it is what the bars are for."""
    found = []
    for kept in ("blocks recomputed", "blocks kept"):
        for mode in ("recompute", "retain", "plain"):
            settings = (f"method.mode={mode}", f"compute.checkpointing={str(kept != 'blocks kept').lower()}")
            found.append(Arrangement(f"lora, {mode}, {kept}", LORA, settings))
    found.append(replace(found[0], name="lora, recompute, blocks recomputed, stash", stash=True))
    found.append(replace(found[1], name="lora, retain, blocks recomputed, stash", stash=True))
    found.append(
        Arrangement("full, flow matching", WHOLE, ("batch=1", "parallel.kind=ddp", "method.caption_dropout=0"))
    )
    return found


@dataclass
class Row:
    name: str
    latents: str
    seconds: dict[str, float] = field(default_factory=dict)  # of an update of each kind
    peak_gib: dict[str, float] = field(default_factory=dict)
    planned_gib: dict[str, float] = field(default_factory=dict)
    iteration_seconds: float | None = None
    fault: str | None = None


def write_models(folder: Path, small: bool) -> tuple[Path, Path]:
    """The few-step model and the multi-step base, by configuration alone."""
    with torch.device("meta"):
        config = ZImageTransformer2DModel(**(SMALL if small else FULL)).config
    models = folder / "few-step", folder / "base"
    for model in models:
        (model / "transformer").mkdir(parents=True)
        named = {"_class_name": "ZImageTransformer2DModel", **config}
        (model / "transformer" / "config.json").write_text(json.dumps(named), encoding="utf-8")
        (model / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}), encoding="utf-8")
    return models


def random_network(path: Any, *, dtype: torch.dtype, device: Any, fused: bool, subfolder: str) -> Backbone:
    """What `load_backbone` gives, with weights that nobody has trained."""
    with torch.device(device):
        network = backbone_like(path, dtype=dtype, fused=fused, subfolder=subfolder)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return network.eval()


def recipe_of(arrangement: Arrangement, models: tuple[Path, Path]) -> Recipe:
    few_step, base = models
    own = [f"model={few_step}", *arrangement.settings]
    if arrangement.recipe == LORA:
        own += [f"roles.real_score.source={base}", "accumulate=1"]
    found: Recipe = read_recipe(arrangement.recipe, own)
    return found


def plan(recipe: Recipe, shape: tuple[int, int, int], caption: int) -> dict[str, float]:
    return {kind: peak / GIB for kind, peak in rehearse(recipe, recipe.model, shape, 1, caption).peaks.items()}


def run(
    recipe: Recipe, shape: tuple[int, int, int], caption: int, ranks: Ranks, *, stash: bool, times: int
) -> Iterator[tuple[str, float, float, int]]:
    """kind of update, seconds, peak in GiB, and how often it comes in an iteration."""
    device, dtype = ranks.device, DTYPES[recipe.compute.dtype]
    counting = LiveBytes() if device.type == "cpu" else nullcontext()
    with counting as live:
        casting = Casting(recipe, recipe.model, device, load=random_network)
        kind = method_class(recipe.method)
        with torch.device(device):
            width = casting.networks()[0].context_width
            empty = Context(torch.randn(1, caption, width)) if "real_score" in kind.roles else None
            cast = casting.roles(shape[1:], empty)
            batch = batch_without_data(recipe, cast, shape, caption)
        method = kind.build(recipe.method, cast, NoiseStreams(recipe.seed))
        optimizers = optimizers_of(recipe, method, cast.modules())
        average = None if recipe.ema is None else Average(trainable(cast.student), recipe.ema)
        clock = PhaseClock(device)
        updater = Updater(method, optimizers, NoiseStreams(recipe.seed), ranks, dtype, clock)
        counts = counts_of(method)
        for number in range(times + 1):
            for name in counts:
                with ops.stash() if stash else nullcontext(), live.phase(name) if live is not None else nullcontext():
                    outcome = updater.run(name, [batch])
                assert not outcome.faults, outcome.faults
            if number == 0:
                clock.take()  # the first allocates, and makes the optimizers' states
        found = clock.take()
        del average  # held until here, as in a run
    for name, count in counts.items():
        peak = found[f"{name}_peak_gib"] if live is None else live.peaks[name] / GIB
        yield name, found[f"{name}_seconds"], peak, count


def counts_of(method: Any) -> dict[str, int]:
    kinds = list(method.updates(0))
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


Planned = dict[tuple[str, str], dict[str, float]]


def read_plan(folder: Path | None, small: bool) -> Planned:
    if folder is None:
        return {}
    found = Folder(folder).read("full_size")
    if found is None:
        raise ValueError(f"--planned is {folder}, and there is no full_size.json in it")
    if found["small"] != small:
        raise ValueError(f"--planned is {folder}, a plan of the {'small' if found['small'] else 'real'} model")
    rows = found["rows"]
    return {(row["name"], row["latents"]): row["planned_gib"] for row in rows}


def measure(
    arrangement: Arrangement, size: int, models: tuple[Path, Path], planned: Planned, ranks: Ranks | None, times: int
) -> Row:
    recipe = recipe_of(arrangement, models)
    network = json.loads((models[0] / "transformer" / "config.json").read_text(encoding="utf-8"))
    shape = (network["in_channels"], size // 8, size // 8)
    caption = caption_room(network)
    row = Row(arrangement.name, " x ".join(map(str, shape)))
    row.planned_gib = planned.get((row.name, row.latents)) or plan(recipe, shape, caption)
    if ranks is None:
        return row
    try:
        row.iteration_seconds = 0.0
        for name, seconds, peak, count in run(recipe, shape, caption, ranks, stash=arrangement.stash, times=times):
            row.seconds[name], row.peak_gib[name] = seconds, peak
            row.iteration_seconds += count * seconds
    except (OutOfMemory, torch.OutOfMemoryError):
        row.fault, row.iteration_seconds = "does not fit", None
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def table(rows: Sequence[Row]) -> str:
    head = ["what", "latents", "update", "seconds", "peak GiB", "planned GiB", "measured / planned"]
    lines = []
    for row in rows:
        for kind, planned in row.planned_gib.items():
            seconds, peak = row.seconds.get(kind), row.peak_gib.get(kind)
            cells = [row.name, row.latents, kind, row.fault or ("" if seconds is None else f"{seconds:.3f}")]
            cells += ["" if peak is None else f"{peak:.3g}", f"{planned:.3g}"]
            lines.append([*cells, "" if peak is None else f"{peak / planned:.2f}"])
    return markdown(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 512], metavar="PIXELS", help="(1024 512)")
    parser.add_argument("--only", default="", metavar="TEXT", help="arrangements whose name begins so")
    parser.add_argument("--times", type=int, default=2, help="timed updates of each kind (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin nothing after that many (default: %(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="a small model, to see that this runs")
    parser.add_argument("--plan", action="store_true", help="run nothing, and print the plan")
    parser.add_argument("--planned", type=Path, metavar="DIR", help="a plan that --plan --out has written there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write full_size.json and full_size.md there")
    given = parser.parse_args()
    chosen = [one for one in arrangements() if one.name.startswith(given.only)]
    faults = [f"--sizes has {size}, expected multiples of 16" for size in given.sizes if size < 16 or size % 16]
    faults += [] if chosen else [f"--only is {given.only!r}, and no arrangement begins so"]
    faults += [f"--times is {given.times}, expected at least 1"] if given.times < 1 else []
    if given.device == "cuda" and not torch.cuda.is_available():
        faults.append("--device is cuda, and torch sees no GPU")
    if given.device == "cpu" and not (given.small or given.plan):
        faults.append("the real size is for a GPU; on a CPU give --small, or --plan")
    planned: Planned = {}
    try:
        planned = read_plan(given.planned, given.small)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        print("\n".join(f"full_size: {fault}" for fault in faults), file=sys.stderr)
        return 2
    begun = time.monotonic()
    rows: list[Row] = []
    device = torch.device(given.device)
    todo = [(size, one) for size in given.sizes for one in chosen]
    with tempfile.TemporaryDirectory() as folder, join(device=given.device, timeout=3600, sharded=False) as ranks:
        models = write_models(Path(folder), given.small)
        on = None if given.plan else ranks
        work = partial(measure, models=models, planned=planned, ranks=on, times=given.times)
        for number, (size, one) in enumerate(todo):
            if time.monotonic() - begun > 60 * given.minutes:
                print(f"full_size: {len(todo) - number} of {len(todo)} are left after {given.minutes:g} minutes: first "
                      f"{one.name} at {size}", file=sys.stderr)  # fmt: skip
                break
            rows.append(work(one, size))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
            if given.out is not None:
                save(rows, given.out, device.type, given.small)
    print(table(rows))
    return 0


def save(rows: Sequence[Row], folder: Path, device: str, small: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment(device), "command": " ".join(["python", *sys.argv])}
    content = {**facts, "small": small, "rows": [asdict(row) for row in rows]}
    (folder / "full_size.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "full_size.md").write_text(f"    {facts['command']}\n\n{table(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
