"""`twostep sample --model FOLDER --prompt TEXT --out DIR`: images of prompts, from a student or a pipeline.

    OUT/0000-a-red-circle-7.png    the prompt's number, the prompt, the seed; all of it is in the PNG's own text as well
    OUT/sheet.png                  all of them on one sheet

Images that are there already, of the same prompt, seed and model, are kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import add_interval, answered, usable_device
from .durable import replaced

STEPS = 8  # of a pipeline
MOST_ON_SHEET = 256
LARGEST_SEED = 2**63 - 1  # in 64 bits with a sign


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a run or its student, a diffusers pipeline, a hub id, or `miniature`")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", type=Path, metavar="FILE", help=".txt (one a line), .jsonl or .parquet")
    add("--seed", type=int, default=0, help="of each prompt's first image (default: %(default)s)")
    add(
        "--count", type=int, default=1, metavar="N", help="images of each prompt, with seeds that count up (default: 1)"
    )
    add("--out", type=Path, required=True, help="folder of the images")
    add("--steps", type=int, help=f"of a pipeline, or a trained base; a student has its own (default: {STEPS})")
    add("--guidance", type=float, metavar="W", help="of a pipeline; 1 is none (default: 1; a trained base's own)")
    add_interval(
        parser, "guidance", "of a pipeline: levels sigma that are guided; cfg_truncation T of diffusers is 1-T 1"
    )
    add("--eta", type=float, default=0.0, help="of a pipeline: noise that its steps renew, 0 to 1 (default: 0, none)")
    add_interval(parser, "eta", "of a pipeline: levels sigma from which noise is renewed")
    add("--subfolder", help="where in a pipeline the transformer lies (default: transformer)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels (default: what the model was made for)")
    add("--batch", type=int, default=8, help="images at a time (default: %(default)s)")
    add(
        "--dtype", choices=("bfloat16", "float32"), help="of the networks (default: bfloat16 on a GPU, float32 without)"
    )
    add("--device", help="default: a GPU if there is one")
    add("--overwrite", action="store_true", help="draw anew what is there")


def run(args: argparse.Namespace) -> int:
    return answered(
        "sample", lambda: _run(args), out=args.out, kept=f"the same command goes on at what {args.out} lacks"
    )


@dataclass(frozen=True)
class Wanted:
    number: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60].rstrip("-")
        return f"{self.number:04}-{words or 'prompt'}-{self.seed}.png"


def _run(args: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    from .evaluate.subjects import SHEET, state_of
    from .train.result import gone_on
    from .zoo import load_text_to_image
    from .zoo.saved_student import student_facts, student_folder
    from .zoo.teacher import EVERYWHERE

    for name, least in (("count", 1), ("batch", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least {least}")
    prompts = _prompts(args)
    wanted = [
        Wanted(number, prompt, args.seed + copy) for number, prompt in enumerate(prompts) for copy in range(args.count)
    ]
    if not 0 <= args.seed <= LARGEST_SEED - args.count:
        raise ValueError(f"--seed is {args.seed}, expected a number from 0 to {LARGEST_SEED - args.count}")
    device = usable_device(args.device, "--device")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    steps = STEPS if args.steps is None and student_folder(args.model) is None else args.steps
    student = student_folder(args.model)
    sampler = {} if student is None else student_facts(student).get("sampler", {})
    guidance = sampler.get("guidance", 1.0) if args.guidance is None else args.guidance
    steps = sampler.get("steps") if steps is None else steps
    facts = {"model": str(args.model), "steps": steps, "guidance": guidance}
    facts["subfolder"] = None if args.subfolder == "transformer" else args.subfolder  # its default, said or not
    facts |= {"size": args.size, "dtype": str(dtype).removeprefix("torch."), "files": state_of(args.model)}
    if args.eta:
        facts["eta"] = args.eta
    for what in ("guidance_interval", "eta_interval"):
        if tuple(getattr(args, what)) != EVERYWHERE:
            facts[what] = list(getattr(args, what))
    missing = [one for one in wanted if args.overwrite or not _is_there(args.out / one.name, one, facts)]
    if missing:
        if (note := gone_on(args.model)) is not None:
            print(note, file=sys.stderr)
        logging.disable_progress_bar()
        model = load_text_to_image(
            args.model,
            steps=steps,
            guidance=guidance,
            guidance_interval=tuple(args.guidance_interval),
            eta=args.eta,
            eta_interval=tuple(args.eta_interval),
            subfolder=args.subfolder,
            dtype=dtype,
            device=device,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        _draw(model, missing, args, facts)
    sheet = _sheet([args.out / one.name for one in wanted], wanted, args.out / SHEET)
    print(f"{len(wanted)} images in {args.out} ({len(wanted) - len(missing)} were there){sheet}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if bool(args.prompt) == (args.prompts is not None):
        raise ValueError("give --prompt TEXT (once or several times), or --prompts FILE")
    from .train.data import read_prompts
    from .train.data.prompts import is_text

    if not args.prompt:
        return list(read_prompts(args.prompts))
    for prompt in args.prompt:
        if not is_text(prompt):
            raise ValueError(f"--prompt is {prompt!a}, which is not UTF-8")
    return list(args.prompt)


def _is_there(path: Path, wanted: Wanted, facts: dict[str, Any]) -> bool:
    """True for the very image; ValueError for another one of that name."""
    from PIL import Image

    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            found = json.loads(image.info.get("twostep", "{}"))
    except (OSError, SyntaxError, ValueError):
        return False  # damaged: it is drawn anew
    if found != {**facts, "prompt": wanted.prompt, "seed": wanted.seed}:
        raise ValueError(
            f"{path} is there, and is another image (its settings: {found}); give another --out, or --overwrite"
        )
    return True


def _draw(model: Any, missing: list[Wanted], args: argparse.Namespace, facts: dict[str, Any]) -> None:
    from .images import to_bytes
    from .progress import counter

    size = None if args.size is None else tuple(args.size)
    model.draw([missing[0].prompt], [missing[0].seed], size)  # what is made once is made, and a wrong size is told
    begun = time.perf_counter()
    with counter("images", len(missing)) as advance:
        for start in range(0, len(missing), args.batch):
            some = missing[start : start + args.batch]
            images = model.draw([one.prompt for one in some], [one.seed for one in some], size)
            for one, pixels in zip(some, to_bytes(images).cpu(), strict=True):
                _save(args.out / one.name, pixels, {**facts, "prompt": one.prompt, "seed": one.seed})
            advance(len(some))
    seconds = (time.perf_counter() - begun) / len(missing)
    print(
        f"{model.steps} steps, {model.evaluations(size)} evaluations, {seconds:.3g} seconds an image on {model.device}"
    )


def _save(path: Path, pixels: Any, facts: dict[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from . import __version__
    from .images import pil_image

    text = PngInfo()
    text.add_itxt("prompt", facts["prompt"])
    text.add_text("seed", str(facts["seed"]))
    text.add_itxt("model", facts["model"])
    text.add_text("software", f"twostep {__version__}")
    text.add_itxt("twostep", json.dumps(facts))
    with replaced(path) as new:
        pil_image(pixels).save(new, format="PNG", pnginfo=text)


def _sheet(paths: list[Path], wanted: list[Wanted], target: Path) -> str:
    import math

    import torch

    from .evaluate.sheet import contact_sheet
    from .evaluate.subjects import read_images

    paths, wanted = paths[:MOST_ON_SHEET], wanted[:MOST_ON_SHEET]
    images = read_images(paths).images.to(torch.float32) / 127.5 - 1
    sheet = contact_sheet(images, columns=math.ceil(math.sqrt(len(paths))), captions=[one.prompt for one in wanted])
    sheet.save(target)
    return f"; {target.name} shows the first {MOST_ON_SHEET}" if len(paths) == MOST_ON_SHEET else f"; on one: {target}"
