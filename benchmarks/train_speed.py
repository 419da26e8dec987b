"""A whole turbo_pp iteration of the trainer on the miniature: fused operators against stock diffusers' forwards.

    python benchmarks/train_speed.py --out DIR

Both are the same recipe, `compute.fused` true and false, on the same untrained miniature, prompts and cache. They take
turns, iteration by iteration, in one process, so that whatever else the machine does meets both. An iteration is the
method's: guidance updates (roll-out, fake score, discriminator), then the generator's two-step update with its six
forwards without a graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from twostep.bench.report import environment
from twostep.cli import main as command
from twostep.train.configuration import load
from twostep.train.data.prompts import write_prompts
from twostep.train.engine import Run
from twostep.train.ranks import join
from twostep.train.recipe import Recipe
from twostep.train.signals import Signals
from twostep.zoo.miniature import miniature, samples

PROMPTS = 256


def prepare(folder: Path) -> None:
    """The untrained miniature, prompts, their contexts and the teacher's images."""
    miniature(untrained_seed=0).save(folder / "model")
    drawn = samples(seed=0, start=0, count=PROMPTS)
    write_prompts(folder / "prompts.txt", drawn.captions)
    ask = ["cache", "--model", str(folder / "model"), "--prompts", str(folder / "prompts.txt"), "--batch", "32"]
    if command([*ask, "--teacher-steps", "2", "--out", str(folder / "data"), "--dtype", "float32"]):
        raise SystemExit("train_speed: the cache could not be written; its message is above")


def recipe(folder: Path, *, fused: bool, dtype: str, weights: str, batch: int) -> Recipe:
    data = {
        "kind": "prompts",
        "prompts": str(folder / "prompts.txt"),
        "contexts": str(folder / "data" / "contexts"),
        "teacher": str(folder / "data" / "teacher"),
    }
    base: dict[str, Any] = {
        "model": str(folder / "model"),
        "method": {"kind": "turbo_pp"},
        "data": data,
        "out": str(folder / f"run-{fused}"),
        "batch": batch,
        "roles": {"student": {"weights": weights, **({"rank": 16} if weights == "lora" else {})}},
        "compute": {"dtype": dtype, "fused": fused, "device": "cpu"},
    }
    return load(Recipe, None, base=base)


def iteration(run: Run) -> float:
    """Seconds of one, without its data, which are the same for both and made ahead."""
    kinds = run.method.updates(0)
    batches = [[next(run.state.feed)] for _ in kinds]
    start = time.perf_counter()
    for kind, batch in zip(kinds, batches, strict=True):
        outcome = run.updater.run(kind, batch)
        assert not outcome.faults, outcome.faults
    return time.perf_counter() - start


def measure(folder: Path, dtype: str, weights: str, batch: int, count: int) -> dict[str, Any]:
    with join(device="cpu", timeout=3600, sharded=False) as ranks:
        runs = {
            name: Run.of(recipe(folder, fused=fused, dtype=dtype, weights=weights, batch=batch), ranks, Signals())
            for name, fused in (("stock", False), ("fused", True))
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(count + 1):
            for name, run in runs.items():
                taken = iteration(run)
                if number:  # the first allocates and warms caches
                    seconds[name].append(taken)
        for run in runs.values():
            run.state.feed.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [stock / fused for stock, fused in zip(seconds["stock"], seconds["fused"], strict=True)]
    return {
        "dtype": dtype,
        "weights": weights,
        "batch": batch,
        "seconds": median,
        "ratio": median["stock"] / median["fused"],
        "ratios": sorted(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=7, help="timed, of each")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--weights", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for train_speed.json and train_speed.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for dtype in args.dtype:
            for weights in args.weights:
                rows.append(measure(Path(scratch), dtype, weights, args.batch, args.iterations))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    lines = [
        "| weights | dtype | batch | stock: s | fused: s | ratio | least and most of the pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, ratios = row["seconds"], row["ratios"]
        lines.append(
            f"| {row['weights']} | {row['dtype']} | {row['batch']} | {seconds['stock']:.2f} | {seconds['fused']:.2f} | "
            f"{row['ratio']:.2f}x | {ratios[0]:.2f}x to {ratios[-1]:.2f}x |"
        )
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", "benchmarks/train_speed.py", *sys.argv[1:]])
        facts = {"environment": environment("cpu"), "command": command, "rows": rows}
        (args.out / "train_speed.json").write_text(json.dumps(facts, indent=1) + "\n")
        (args.out / "train_speed.md").write_text(table)


if __name__ == "__main__":
    main()
