"""`twostep export STUDENT --out FOLDER`: a student in another form, checked in a fresh process before it is there.

twostep export runs/first --out student                                          a folder of stock diffusers
twostep export runs/first --out adapters --as lora --keys comfyui                LoRA files on the base
twostep export runs/first --out files --as single-file                           files in the original's names
twostep export runs/first --out sampler --as program                             all steps compiled ahead of time
twostep export runs/first --out networks --as onnx                               a network for each step
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..arguments import answered

if TYPE_CHECKING:
    from .source import Exported

FORMS = ("diffusers", "lora", "single-file", "program", "onnx")
# Options that some forms take.
TAKEN_BY = {"parts": ("diffusers",), "max_shard_size": ("diffusers",), "quantize": ("diffusers", "program")}
TAKEN_BY |= {"keys": ("lora",), "rank": ("lora",), "device": ("program",)}
TAKEN_BY |= {"pipeline": ("diffusers", "lora", "program", "onnx")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("student", type=Path, help="a run's folder, or the student/ in it")
    add("--out", type=Path, required=True, help="the folder to make")
    add("--as", dest="form", choices=FORMS, default="diffusers", help="(default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16; float32 for onnx, and for a program on a CPU)",
    )
    add("--pipeline", help="where the pipeline lies now that the student was made for, if it has moved")
    add("--base", help="of adapters: where the base lies now, if not where the run found it")
    add("--overwrite", action="store_true", help="replace what is there, once the new folder is checked")
    add(
        "--parts",
        choices=("copy", "link", "reference"),
        help="diffusers: what becomes of the pipeline's text encoder, tokenizer and autoencoder; who loads a folder "
        "that references them passes them on (default: copy)",
    )
    add("--max-shard-size", help="diffusers: of a file of weights (default: 5GB)")
    add("--quantize", choices=("int8", "fp8"), help="diffusers, program: linear layers' weights in 8 bits")
    add("--keys", choices=("diffusers", "comfyui"), help="lora: whose names (default: diffusers)")
    add("--device", choices=("cpu", "cuda"), help="program: what it is compiled for (default: a GPU if there is one)")
    add("--rank", type=int, help="lora: of the product that is taken from whole weights")


def run(args: argparse.Namespace) -> int:
    from safetensors import SafetensorError
    from transformers.utils import logging

    from .fresh_process import ExportFailed

    logging.disable_progress_bar()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if main else None  # so that what is half written is removed
    try:
        failures = (ExportFailed, SafetensorError)
        return answered("export", lambda: _run(args), out=args.out, kept="nothing was left", failures=failures)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    from ..train.result import gone_on

    if (note := gone_on(args.student)) is not None:
        print(note, file=sys.stderr)
    made = _export(args)
    print(f"{made.folder}: {made.bytes / 2**20:.1f} MiB in {made.seconds:.0f} s; {_said(args, made)}")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _export(args: argparse.Namespace) -> Exported:
    import torch

    from . import export_folder, export_lora, export_onnx, export_program, export_single_file

    for name, forms in TAKEN_BY.items():
        if getattr(args, name) is not None and args.form not in forms:
            raise ValueError(
                f"--{name.replace('_', '-')} is for --as {' and '.join(forms)}, and this is --as {args.form}"
            )
    alike: dict[str, Any] = {"overwrite": args.overwrite, "base": args.base}
    if args.form != "single-file":
        alike["pipeline"] = args.pipeline
    if args.form == "onnx":
        if args.dtype not in (None, "float32"):
            raise ValueError(f"--dtype is {args.dtype}, and onnx is written in float32 alone")
        return export_onnx(args.student, args.out, **alike)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if args.form == "program":
        more = {"device": args.device, "quantization": args.quantize}
        return export_program(args.student, args.out, dtype=dtype, **more, **alike)
    alike["dtype"] = dtype or torch.bfloat16
    if args.form == "single-file":
        return export_single_file(args.student, args.out, **alike)
    if args.form == "lora":
        return export_lora(args.student, args.out, keys=args.keys or "diffusers", rank=args.rank, **alike)
    size = args.max_shard_size or "5GB"
    more = {"parts": args.parts or "copy", "max_shard_size": size, "quantization": args.quantize}
    return export_folder(args.student, args.out, **more, **alike)


def _said(args: argparse.Namespace, made: Exported) -> str:
    kind = args.dtype or "bfloat16"
    if args.form == "single-file":
        return f"diffusers reads the same bits; writing {kind} has changed weights by {made.rounding:.1e}"
    if args.form == "onnx":
        return f"onnxruntime computes the student's velocities, to a relative {made.error:.1e}"
    if args.form == "program":
        what = f"{args.quantize} has changed it" if args.quantize else "the student itself in this dtype is off"
        return f"it samples what was written, to a relative {made.error:.1e} ({what} by {made.rounding:.1e})"
    if args.quantize:
        kind = f"{args.quantize} and {kind}"
    changed = f"{kind} of rank {args.rank}" if args.rank else kind
    return (
        f"stock diffusers draws what was written, to a relative {made.error:.1e}; writing {changed} has changed the "
        f"student's images by {made.rounding:.1e}"
    )
