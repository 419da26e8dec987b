"""`twostep reproduce EXPERIMENT --out FOLDER`: trains every arm with every seed, measures all alike, writes the table.

    FOLDER/prompts.txt, cache*/, concept/   what arms learn from
    FOLDER/ARM/seed-N/                      runs of `twostep train`
    FOLDER/report/drawn/                    what was drawn
    FOLDER/table.md, table.png              the table beside the paper's, and the same as a picture
    FOLDER/results.json                     every number, the command, and the time it took
    FOLDER/report/                          page and picture of the first seed

With --arms only those arms, over more seeds as a rule: their runs stand beside the others', and what is written is
called table-ARM-ARM.md and so on; the page is of all arms, and is not written.

Everything is kept as it is made: whatever ends it, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..arguments import INTERRUPTED, answered
from ..durable import replaced
from .experiments import EXPERIMENTS, Arm, Experiment

PROMPTS = (0x9E0D, 2048)  # the stream of captions, and how many
CONCEPT = (0xC1A2, 64, 192)  # its stream, images of it to learn from, and ordinary ones beside them
ASKED = (0xC1A4, 256)  # its stream when it is asked for, and how often
UNSAID = (0xC1A8, 64, 8)  # the stream of captions that leave the background open, how many, and images of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("overrides", nargs="*", metavar="key=value", help="settings of every arm, over its own: compute.threads=1")
    add("--out", type=Path, help="where everything is put (default: runs/reproduce/EXPERIMENT)")
    add("--model", default="miniature", help="a folder that holds another miniature (default: the package's own)")
    add("--arms", nargs="+", metavar="ARM", help="only these, by their names in the table")
    add("--seeds", type=int, default=3, help="runs of every arm (default: %(default)s)")
    add("--iterations", type=int, help="of every run (default: each arm's own)")
    add("--images", type=int, default=2000, help="images that quality is measured on (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..allocator import keep_freed_memory

    logging.disable_progress_bar()
    keep_freed_memory()
    args.out = (args.out or Path("runs/reproduce") / args.experiment).resolve()
    return answered("reproduce", lambda: _run(EXPERIMENTS[args.experiment], args), out=args.out)


def _run(experiment: Experiment, args: argparse.Namespace) -> int:
    from ..train.result import finished

    if args.seeds < 1 or (args.iterations or 1) < 1:
        raise ValueError(f"--seeds is {args.seeds} and --iterations {args.iterations}, expected at least 1")
    if args.arms:
        experiment = only(experiment, args.arms)
    args.out.mkdir(parents=True, exist_ok=True)
    if status := _prepare(experiment, args):
        return status
    trained = [arm for arm in experiment.arms if arm.recipe is not None]
    for number, (seed, arm) in enumerate([(s, a) for s in range(args.seeds) for a in trained], start=1):
        _say(f"run {number} of {args.seeds * len(trained)}: {arm.name}, seed {seed}")
        folder = _folder(args, arm, seed)
        if (status := _train(experiment, arm, seed, args)) or not finished(folder):
            return status or INTERRUPTED  # stopped by a signal: everything is kept
    _say("measuring")
    _measure(experiment, args)
    return 0


def only(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """The experiment of some arms, of those that they begin from, and of the claims about them."""
    known = {arm.name: arm for arm in experiment.arms}
    for name in names:
        if name not in known:
            raise ValueError(f"--arms: {name!r} is no arm of {experiment.name}, expected some of {', '.join(known)}")
    begun = any("STUDENT" in setting for name in names for setting in known[name].settings)
    kept = {*names, *([experiment.arms[0].name] if begun else [])}
    return replace(
        experiment,
        arms=tuple(arm for arm in experiment.arms if arm.name in kept),
        claims=tuple(claim for claim in experiment.claims if {claim.better, claim.worse} <= kept),
    )


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "plus")).strip("-")


def _folder(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    return Path(args.out) / _slug(arm.name) / f"seed-{seed}"


def _prepare(experiment: Experiment, args: argparse.Namespace) -> int:
    from ..cli import main
    from ..train.data.prompts import write_prompts
    from ..zoo.miniature import samples
    from .concept import write_folder

    concept = args.out / "concept"
    if experiment.concept and not concept.exists():
        write_folder(args.out / "concept.new", *CONCEPT)
        (args.out / "concept.new").rename(concept)
    if not experiment.cached:
        return 0
    prompts = args.out / "prompts.txt"
    if not prompts.exists():
        stream, count = PROMPTS
        write_prompts(prompts, samples(stream, 0, count).captions)
    for number, sigma in enumerate(experiment.anchor_sigmas or (None,)):
        out = args.out / ("cache" if number == 0 else f"cache-{sigma}")
        where = ["--model", args.model, "--prompts", str(prompts), "--out", str(out)]
        anchor = [] if sigma is None else ["--anchor-sigma", str(sigma)]
        if status := main(["cache", *where, "--dtype", "float32", "--batch", "32", *anchor]):
            return status
    return 0


def _train(experiment: Experiment, arm: Arm, seed: int, args: argparse.Namespace) -> int:
    from ..cli import main

    assert arm.recipe is not None
    places = {"PROMPTS": args.out / "prompts.txt", "CACHE": args.out / "cache", "CONCEPT": args.out / "concept"}
    places["STUDENT"] = _folder(args, experiment.arms[0], seed) / "student"
    settings = list(arm.settings)
    for word, place in places.items():
        settings = [setting.replace(word, str(place)) for setting in settings]
    own = [f"model={args.model}", f"out={_folder(args, arm, seed)}", f"seed={seed}"]
    own += [f"iterations={_iterations(experiment, arm, args)}", "watch.evaluate=null"]
    return main(["train", arm.recipe, *own, *settings, *args.overrides])


def _iterations(experiment: Experiment, arm: Arm, args: argparse.Namespace) -> int:
    return int(args.iterations or arm.iterations or experiment.iterations)


def _measure(experiment: Experiment, args: argparse.Namespace) -> None:
    import torch

    from ..bench.report import environment
    from ..evaluate.command import Settings, study
    from ..evaluate.subjects import Subject
    from .figure import draw
    from .table import markdown

    begun = time.monotonic()
    values: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in experiment.arms}
    for seed in range(args.seeds):
        subjects = []
        for arm in experiment.arms:
            if arm.recipe is not None:
                subjects.append(Subject(arm.name, str(_folder(args, arm, seed))))
            elif seed == 0:
                subjects.append(Subject(arm.name, args.model, dict(arm.sampled)))
        settings = Settings(
            args.out / "report",
            images=args.images,
            captions=experiment.varied,
            resamples=Settings.resamples if seed == 0 else 2,  # of the page alone: the table's intervals are over seeds
            title=f"twostep reproduce {experiment.name}",
        )
        report = study(subjects, settings)
        rows = {row.name: row for row in report.measured}
        for subject in subjects:
            found = {name: interval.value for name, interval in rows[subject.name].metrics.items()}
            for name, measure in (("concept", _concept), ("unsaid", _unsaid)):
                if name in experiment.metrics:
                    found[name] = measure(subject, args.out / "report" / "drawn")
            for name, value in found.items():
                values[subject.name].setdefault(name, []).append(value)
        if seed == 0 and not args.arms:
            report.write(args.out / "report")
    facts: dict[str, Any] = {
        "experiment": experiment.name,
        "command": _command(experiment, args),
        "iterations": {arm.name: _iterations(experiment, arm, args) for arm in experiment.arms if arm.recipe},
        "overrides": args.overrides,
        "seeds": args.seeds,
        "images": args.images,
        "captions of diversity": experiment.varied,
        "training_seconds": {arm.name: _seconds(args, arm) for arm in experiment.arms if arm.recipe is not None},
        "machine": environment("cuda" if torch.cuda.is_available() else "cpu"),
        "measuring_seconds": round(time.monotonic() - begun, 1),
        "values": values,
    }
    table = f"{_made(facts)}\n\n{markdown(experiment, values, args.seeds)}"
    which = "".join(f"-{_slug(name)}" for name in args.arms or ())
    draw(experiment, values, args.out / f"table{which}.png")
    for name, text in ((f"table{which}.md", table), (f"results{which}.json", json.dumps(facts, indent=1) + "\n")):
        with replaced(args.out / name) as new:
            new.write_text(text, encoding="utf-8")
    print(table)
    print(args.out / f"table{which}.md")


def _command(experiment: Experiment, args: argparse.Namespace) -> str:
    """That makes the same, wherever it is run: without the places of this machine."""
    words = ["twostep reproduce", experiment.name]
    if args.model != "miniature":
        words.append("--model MODEL")
    if args.arms:
        words.append(f"--arms {shlex.join(args.arms)}")
    given = {"seeds": args.seeds, "iterations": args.iterations, "images": args.images}
    words += [f"--{name} {value}" for name, value in given.items() if value is not None]
    return " ".join([*words, shlex.join(args.overrides)]).strip()


def _made(facts: Mapping[str, Any]) -> str:
    trained = sum(map(sum, facts["training_seconds"].values())) / 60
    return (
        f"    {facts['command']}\n\n"
        f"Trained for {trained:.0f} minutes and measured for {facts['measuring_seconds'] / 60:.0f}, on "
        f"{facts['machine']['device']}, threads: {facts['machine']['threads']}; {facts['machine']['date']}, twostep "
        f"{facts['machine']['twostep']}, torch {facts['machine']['torch']}."
    )


def _concept(subject: Any, kept: Path) -> float:
    """The share of images that show the concept, of captions that name it."""
    from ..zoo.miniature import detector
    from .concept import captions, shows

    pictures = _drawn(subject, captions(*ASKED), list(range(ASKED[1])), kept)
    return float(shows(detector.load(), pictures).double().mean())


def _unsaid(subject: Any, kept: Path) -> float:
    """How varied backgrounds are of which captions say nothing."""
    from ..zoo.miniature import detector
    from .unsaid import captions, shown

    stream, count, seeds = UNSAID
    said = [caption for caption in captions(stream, count) for _ in range(seeds)]
    return shown(detector.load(), _drawn(subject, said, list(range(len(said))), kept), seeds)


def _drawn(subject: Any, captions: Sequence[str], seeds: Sequence[int], kept: Path) -> Any:
    """Pixels in [-1, 1]."""
    import torch

    from ..evaluate.subjects import Order, draw_once

    order = Order(tuple(captions), tuple(seeds))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    load = partial(subject.load, dtype=dtype, device=device)
    (drawn,) = draw_once(subject, load, (order,), kept, dtype=dtype)
    return drawn.pixels()


def _seconds(args: argparse.Namespace, arm: Arm) -> list[float]:
    from ..train.journal import read_metrics

    return [read_metrics(_folder(args, arm, seed))[-1]["seconds"] for seed in range(args.seeds)]
