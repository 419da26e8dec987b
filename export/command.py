"""`twostep export STUDENT --out FOLDER`: a diffusers folder, checked in a fresh process before it is there.

twostep export runs/first --out student --dtype bfloat16
DiffusionPipeline.from_pretrained("student", trust_remote_code=True)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FAULT, FAILED = 2, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("student", type=Path, help="a run's folder, or the student/ in it")
    add("--out", type=Path, required=True, help="the folder to make")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights (%(default)s)")
    add("--link", action="store_true", help="link to the pipeline's other parts instead of copying them")
    add("--base", help="of adapters: where the base lies now, if not where the run found it")
    add("--max-shard-size", default="5GB", help="of a file of weights (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace what is there, once the new folder is checked")


def run(args: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    from .folder import ExportFailed, export_folder

    logging.disable_progress_bar()
    try:
        made = export_folder(
            args.student,
            args.out,
            dtype=getattr(torch, args.dtype),
            link=args.link,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            base=args.base,
        )
    except ValueError as error:
        print(f"twostep export: {error}", file=sys.stderr)
        return FAULT
    except (ExportFailed, OSError) as error:
        print(f"twostep export: {error}", file=sys.stderr)
        return FAILED
    print(
        f"{made.folder}: {made.bytes / 2**20:.1f} MiB; stock diffusers draws what the student draws, to a relative "
        f"{made.error:.1e}; writing {args.dtype} has changed its images by {made.rounding:.1e}"
    )
    return 0
