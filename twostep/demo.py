"""`twostep demo`: the miniature's 8-step teacher becomes a 2-step student, and both are laid side by side.

    OUT/prompts.txt, data/    captions, and the teacher's images for them: the discriminator's real ones
    OUT/run/                  the training, by the recipe miniature-demo (turbo_pp); its student/ is the result
    OUT/report/               report.html, and the same as a picture and as numbers
    OUT/student/              the student as a folder of stock diffusers

Whatever has been done is kept: interrupted at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .arguments import INTERRUPTED, answered

RECIPE = "miniature-demo"
PROMPTS = (0xDE30, 1024)  # the stream of the captions to learn from, and how many
VARIETY = (24, 6)  # captions that are drawn several times, and how often
# Bars that the demo holds itself to, beside cleanness (which speckle does not meet as it meets precision): arXiv
# 2606.12575 has no numbers of its own for a model of this size.
GAP, ALIGNED, VARIED, FASTER = 0.8, 0.9, 0.85, 3.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, such as iterations=400")
    add("--out", type=Path, default=Path("runs/demo"), help="where everything is put (default: %(default)s)")
    add("--model", default="miniature", help="a folder that holds another miniature (default: the package's own)")
    add("--images", type=int, default=1200, help="images that quality is measured on (default: %(default)s)")
    add("--web", action="store_true", help="no training: a page on which the teacher and the student of OUT draw")
    add("--port", type=int, default=7860, help="of the page (default: %(default)s)")
    add("--host", default="127.0.0.1", help="that the page listens on; 0.0.0.0 for all (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from .export import ExportFailed

    logging.disable_progress_bar()
    work = _web if args.web else _demo
    return answered("demo", lambda: work(args), out=args.out, failures=(ExportFailed,))


def _demo(args: argparse.Namespace) -> int:
    import torch

    from .allocator import keep_freed_memory
    from .train.result import finished

    keep_freed_memory()
    begun = time.monotonic()
    out = args.out.resolve()
    settings = _settings(args, out)  # whose mistakes are told at once, and so are the recipe's
    _recipe(args, out)
    out.mkdir(parents=True, exist_ok=True)
    _say("1 of 3: the teacher draws what the discriminator takes for real")
    if status := _cache(args.model, out):
        return status
    _say("2 of 3: a student learns to do in 2 steps what the teacher does in 8")
    if (status := _train(args, out)) or not finished(out / "run"):
        return status or INTERRUPTED  # stopped by a signal: everything is kept
    _say("3 of 3: teacher and student draw the same captions")
    report = _compare(args, settings, out)
    written = report.write(out / "report")
    _say("the student leaves")
    exported = _export(out)
    print(f"\n{report.text()}")
    for verdict in report.verdicts:
        print(f"{verdict.text}: {verdict.found} (asked: {verdict.asked}) {verdict.said}")
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes on {'a GPU' if torch.cuda.is_available() else 'the CPU'}")
    print(f"report     {written[0]}\nstudent    {out / 'student'} ({exported})")
    print(
        "\nNext:\n"
        f"  twostep sample --model {out / 'run'} --prompt 'a red circle above a green square' --count 8 --out images\n"
        f"  twostep evaluate student={out / 'run'} --out report --images 2000     more images, tighter intervals\n"
        f"  twostep demo --out {args.out} --model {args.model} "
        "iterations=1000     a longer training goes on from here\n"
        "  twostep train --list                                                 recipes for Z-Image and FLUX.2-klein"
    )
    return 0


def _web(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    import torch

    from .evaluate.subjects import Subject
    from .zoo.saved_student import student_folder

    run = args.out.resolve() / "run"
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio:  pip install 'twostep[web]'")
    if student_folder(run) is None:
        raise ValueError(f"there is no student in {run} yet:  twostep demo --out {args.out}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    subjects = (Subject("Teacher", args.model, {"steps": 8}), Subject("Student", str(run)))
    models = {subject.name: subject.load(dtype=dtype, device=device) for subject in subjects}
    from .web import page, serve

    made = page(models, "twostep: teacher and student")
    address = serve(made, host=args.host, port=args.port)
    print(f"{address}   (Ctrl-C ends it)", flush=True)
    try:
        made.block_thread()
    finally:
        made.close(verbose=False)
    return 0


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def _cache(model: str, out: Path) -> int:
    from .cli import main
    from .train.data.prompts import write_prompts
    from .zoo.miniature import samples

    prompts = out / "prompts.txt"
    if not prompts.exists():
        stream, count = PROMPTS
        write_prompts(prompts, samples(stream, 0, count).captions)
    where = ["--model", model, "--prompts", str(prompts), "--out", str(out / "data")]
    return main(["cache", *where, "--dtype", "float32", "--batch", "32"])


def _overrides(args: argparse.Namespace, out: Path) -> list[str]:
    data = out / "data"
    own = [f"model={args.model}", f"out={out / 'run'}", f"data.prompts={out / 'prompts.txt'}"]
    own += [f"data.contexts={data / 'contexts'}", f"data.teacher={data / 'teacher'}"]
    return [*own, *args.overrides]


def _recipe(args: argparse.Namespace, out: Path) -> None:
    from .train.command import read_recipe

    read_recipe(RECIPE, _overrides(args, out))


def _train(args: argparse.Namespace, out: Path) -> int:
    from .cli import main

    return main(["train", RECIPE, *_overrides(args, out)])


def _settings(args: argparse.Namespace, out: Path) -> Any:
    from .evaluate.command import Settings

    return Settings(out / "report", images=args.images, captions=VARIETY[0], seeds=VARIETY[1], title="twostep demo")


def _compare(args: argparse.Namespace, settings: Any, out: Path) -> Any:
    from dataclasses import replace

    from .evaluate.command import study
    from .evaluate.subjects import Subject
    from .zoo.miniature import BASE_AT_ITS_BEST

    def teacher(name: str, **settings: Any) -> Subject:
        return Subject(name, args.model, settings)

    subjects = [
        teacher("base at 28", **BASE_AT_ITS_BEST),
        teacher("teacher at 8", steps=8),
        teacher("teacher at 2", steps=2),
        Subject("student at 2", str(out / "run")),
    ]
    report = study(subjects, settings)
    return replace(report, verdicts=verdicts({row.name: row for row in report.measured}))


def verdicts(rows: dict[str, Any]) -> list[Any]:
    """Each with the interval of what was found: images were resampled alike for all rows, and so the pairs are kept."""
    from .evaluate.intervals import Interval, combined
    from .evaluate.report import Verdict

    student, eight, two = (rows[name] for name in ("student at 2", "teacher at 8", "teacher at 2"))

    def beside(metric: str, other: Any) -> Interval:
        return combined(share, student.metrics[metric], other.metrics[metric])

    def verdict(text: str, found: Interval, asked: float, form: str) -> Verdict:
        said = f"{found.value:{form}}"
        if found.drawn:
            said += f", {found.low:{form}} to {found.high:{form}}"
        sure = asked <= found.low or found.high < asked  # with ends of NaN: no
        return Verdict(text, f"at least {asked:{form}}", said, asked <= found.value < float("inf"), sure)

    gap = (row.metrics["frechet"] for row in (two, student, eight))
    seconds = share(eight.network_seconds, student.network_seconds)
    return [
        verdict("Frechet gap between the teacher at 2 and at 8 that is closed", combined(closed, *gap), GAP, ".0%"),
        verdict("captions kept, beside the teacher at 8", beside("aligned", eight), ALIGNED, ".0%"),
        verdict("precision, beside the teacher at 2", beside("precision", two), 1.0, ".0%"),
        verdict("cleanness in dB, beside the teacher at 2", beside("psnr", two), 1.0, ".0%"),
        verdict("diversity, beside the teacher at 8", beside("diversity", eight), VARIED, ".0%"),
        verdict("coverage, beside the teacher at 8", beside("coverage", eight), VARIED, ".0%"),
        verdict("times as fast as the teacher at 8", Interval(seconds, seconds, seconds, 1.0), FASTER, ".1f"),
    ]


def share(one: float, other: float) -> float:
    """NaN, which meets no bar, where there is nothing to compare with."""
    return one / other if other > 0 else float("nan")


def closed(two: float, student: float, eight: float) -> float:
    """The part of the gap between two and eight steps that the student closes; all of it and more where a resample
    shows no gap."""
    return (two - student) / (two - eight) if two > eight else float("inf")


def _export(out: Path) -> str:
    """As a folder of stock diffusers, which is loaded and run in a process that does not know this library."""
    import torch

    from .export import export_folder

    made = export_folder(out / "run", out / "student", dtype=torch.float32, overwrite=True)
    return f"{made.bytes / 2**20:.1f} MiB; stock diffusers draws the same images, to a relative {made.error:.1e}"
