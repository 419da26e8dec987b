"""`twostep cache`: contexts and the teacher's samples of all prompts, ahead of training.

    OUT/contexts    a ContextCache of the prompts and of "" (guidance and its dropout ask for it)
    OUT/teacher     a TeacherCache

    torchrun --nproc-per-node 8 -m twostep cache --model FOLDER --prompts prompts.txt --out OUT --size 1024x1024

Every rank writes its shards of both; between them the ranks wait for each other once. The same command goes on where
an interrupted one stopped, with as many ranks as there are then.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep.arguments import add_interval, answered, usable_device

from ..torchrun import Place, place

if TYPE_CHECKING:
    from .prompts import Prompts

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="a diffusers pipeline: its folder, owner/name[@revision] on the Hugging Face hub, or `miniature`",
    )
    add("--subfolder", default="transformer", help="where in it the teacher's transformer lies (default: %(default)s)")
    add("--prompts", required=True, type=Path, help=".txt, .jsonl, .parquet, or a folder of datasets")
    add("--column", help="where the prompts stand in it (default: prompt, caption or text)")
    add("--out", required=True, type=Path, help="the folder to fill")
    add("--contexts-only", action="store_true", help="encode the prompts and do not sample the teacher")
    add("--teacher-steps", type=int, default=8, metavar="N", help="Euler steps of the teacher (default: 8)")
    add("--guidance", type=float, default=1.0, metavar="W", help="the teacher's guidance scale; 1 is none (default: 1)")
    add_interval(parser, "guidance", "levels sigma that are guided")
    add("--shift", type=float, help="of the teacher's sigma grid (default: what the model's pipeline uses)")
    add("--anchor-sigma", type=float, metavar="SIGMA", help="also keep the teacher's state at this sigma")
    add("--size", type=_size, metavar="HxW", help="of the images, in pixels (default: what the model was made for)")
    add("--batch", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    add("--shard-size", type=int, default=256, metavar="N", help="prompts of a shard (default: 256)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the networks and what is stored (default: %(default)s)")
    add("--device", help="where the networks run (default: a GPU for each rank if there are any)")
    add("--overwrite", action="store_true", help="write everything anew instead of going on")


def run(args: argparse.Namespace) -> int:
    def work() -> int:
        with _ranks() as here:
            return _run(args, here)

    return answered("cache", work, out=args.out, kept=f"the same command goes on at what {args.out} lacks")


def _run(args: argparse.Namespace, here: Place) -> int:
    import torch

    from twostep.zoo.context_cache import ContextCache
    from twostep.zoo.saved_student import pipeline_path
    from twostep.zoo.teacher import check_interval

    from ...disk import check_space, free_space, size_text
    from .pairs import TeacherCache, bytes_of
    from .prompts import read_prompts

    check_interval("twostep cache", args.guidance_interval, args.guidance)
    prompts = read_prompts(args.prompts, column=args.column)
    args.model = pipeline_path(args.model)
    device = usable_device(args.device, "--device", here.local)
    rank, world_size = here.rank, here.world_size
    latents = None if args.contexts_only else _latents(args.model, args.subfolder, args.size)
    needed = 0
    if latents is not None:
        shape = (latents.channels, latents.height, latents.width)
        needed = len(prompts) * bytes_of(shape, getattr(torch, args.dtype), args.anchor_sigma is not None)
        needed = max(0, needed - _written(args.out / "teacher", args.overwrite))
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)

    def announce(contexts: int) -> None:
        """The estimate, before anything is written; rank 0 speaks and checks for all."""
        there = free_space(args.out)
        print(
            f"{len(prompts)} prompts: {size_text(contexts)} of contexts and {size_text(needed)} of teacher samples are "
            f"to be written to {args.out}, where {size_text(there)} are free",
            file=sys.stderr,
        )
        check_space(args.out, contexts + needed, "cache")

    _write_contexts(args, prompts, device, rank, world_size, announce)
    if world_size > 1:
        torch.distributed.barrier()  # the teacher reads what all ranks have encoded
    contexts = ContextCache(args.out / "contexts")
    if latents is not None:
        _write_samples(args, prompts, contexts, latents, device, rank, world_size)
    if world_size > 1:
        torch.distributed.barrier()
    if rank == 0:
        print(f"{args.out / 'contexts'}: {len(contexts)} contexts of {contexts.encoder}")
        if latents is not None:
            made = TeacherCache(args.out / "teacher")
            size = " x ".join(map(str, made.shape))
            print(f"{args.out / 'teacher'}: {len(made)} samples of {size}, {len(made.sigmas) - 1} steps each")
    return 0


def _write_contexts(
    args: argparse.Namespace, prompts: Prompts, device: Any, rank: int, world_size: int, announce: Any
) -> None:
    import torch

    from twostep.zoo.context_cache import ContextCache
    from twostep.zoo.encoders import load_text_encoder

    from ...progress import progress_bar

    folder = args.out / "contexts"
    dtype = getattr(torch, args.dtype)
    captions = [*prompts, ""]
    encoder = load_text_encoder(args.model, dtype=dtype, device=device)
    if rank == 0:
        whole = ContextCache.bytes_needed(encoder, captions, dtype=dtype)
        announce(max(0, whole - _written(folder, args.overwrite)))
    with progress_bar("contexts", shown=rank == 0) as report:
        ContextCache.write(
            folder,
            encoder,
            captions,
            shard_size=args.shard_size,
            batch_size=args.batch,
            dtype=dtype,
            resume=not args.overwrite,
            progress=report,
            rank=rank,
            world_size=world_size,
        )


def _write_samples(
    args: argparse.Namespace, prompts: Prompts, contexts: Any, latents: Latents, device: Any, rank: int, world_size: int
) -> None:
    import torch

    from twostep.zoo import Teacher, load_backbone

    from .pairs import TeacherCache

    dtype = getattr(torch, args.dtype)
    backbone = load_backbone(args.model, dtype=dtype, device=device, subfolder=args.subfolder).requires_grad_(False)
    negative = contexts[[""]].to(device) if args.guidance != 1 else None
    teacher = Teacher(
        backbone,
        steps=args.teacher_steps,
        shift=args.shift,
        guidance=args.guidance,
        negative=negative,
        guidance_interval=args.guidance_interval,
    )
    TeacherCache.write(
        args.out / "teacher",
        teacher,
        contexts,
        prompts,
        size=(latents.height, latents.width),
        seed=args.seed,
        batch=args.batch,
        dtype=dtype,
        anchor_sigma=args.anchor_sigma,
        shard_size=args.shard_size,
        rank=rank,
        world_size=world_size,
        resume=not args.overwrite,
    )


@dataclass(frozen=True)
class Latents:
    channels: int
    height: int
    width: int


def _latents(model: str, subfolder: str, size: tuple[int, int] | None) -> Latents:
    """The latents of images of this size, from the model's configurations alone."""
    from twostep.zoo.autoencoder import LatentSpace, autoencoder_config
    from twostep.zoo.loading import config_of
    from twostep.zoo.place import fetched

    try:
        vae = LatentSpace.of(autoencoder_config(model))
        transformer = config_of(fetched(model, "twostep cache", [f"{subfolder}/config.json"]), subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} is no diffusers pipeline with vae/ and {subfolder}/: {error}") from None
    height, width = (vae.sample_size, vae.sample_size) if size is None else size
    step = vae.factor * transformer.get("all_patch_size", [1])[0]
    if height % step or width % step:
        raise ValueError(f"--size is {height}x{width}, expected multiples of {step}: this model's latents and patches")
    return Latents(vae.channels, height // vae.factor, width // vae.factor)


def _written(folder: Path, overwrite: bool) -> int:
    """Bytes of the shards that will stay."""
    return 0 if overwrite else sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give height and width in pixels, such as 1024x768")
    return int(found[1]), int(found[2])


@contextmanager
def _ranks() -> Iterator[Place]:
    """This process's place, and a process group if there are several."""
    here = place()
    if here.world_size == 1:
        yield here
        return
    import torch.distributed as dist

    # The ranks wait at a barrier for the slowest; a day is more than one shard takes.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield here
    finally:
        dist.destroy_process_group()
