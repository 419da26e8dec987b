"""`twostep train RECIPE --dry-run`: what the run will be, from configurations alone: roles, data, updates, memory."""

from __future__ import annotations

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..disk import free_space, size_text
from ..tables import columns
from ..zoo.miniature.tokenizer import MAX_CAPTION_TOKENS
from ..zoo.plan import backbone_like, caption_room
from ..zoo.saved_student import MINIATURE
from .cast import DTYPES, Casting
from .feed import make_feed
from .methods import method_class
from .parts import Parts
from .recipe import PromptsData, Recipe
from .rehearsal import Rehearsal, rehearse
from .torchrun import world_size
from .watch import check_evaluation


def describe_run(recipe: Recipe) -> str:
    """What `--dry-run` prints. Data are looked for and counted; of networks only configurations are read.

    WORLD_SIZE says how many ranks there will be, as torchrun has it: `WORLD_SIZE=8 twostep train ... --dry-run`.
    """
    ranks = world_size()
    if recipe.parallel.kind == "fsdp" and ranks % recipe.parallel.replicas:
        raise ValueError(
            f"parallel.replicas is {recipe.parallel.replicas}, expected a divisor of the number of ranks, {ranks}; say "
            f"how many there will be:  WORLD_SIZE=8 twostep train ... --dry-run"
        )
    parts = Parts(
        recipe.model,
        dtype=DTYPES[recipe.compute.dtype],
        device="cpu",
        cache=recipe.data.contexts if isinstance(recipe.data, PromptsData) else None,
    )
    student, wants = recipe.roles.student, method_class(recipe.method).wants(recipe.method)
    source = parts.path if student.source is None else student.source
    with FakeTensorMode():
        network = backbone_like(source, dtype=torch.bfloat16, subfolder=student.subfolder)
        casting = Casting(recipe, parts.path, torch.device("cpu"), load=backbone_like)
        anchors_at = casting.anchor_sigma() if "anchor" in wants else None
    feed = make_feed(
        recipe.data,
        parts,
        batch=recipe.batch,
        seed=recipe.seed,
        rank=0,
        world_size=ranks,
        wants=wants,
        latent_channels=network.channels,
        latent_factor=network.latent_factor,
        device="cpu",
        anchor_sigma=anchors_at,
    )
    try:
        shape = feed.usual
        check_evaluation(recipe, parts, feed)
        caption = MAX_CAPTION_TOKENS if recipe.model == MINIATURE else caption_room(network.model.config)
        print("running an update of each kind on tensors without data ...", file=sys.stderr, flush=True)
        rehearsal = rehearse(recipe, parts.path, shape, ranks, caption)
        return _text(recipe, rehearsal, feed.describe(), shape, caption, ranks)
    finally:
        feed.close()


# Text


def _text(
    recipe: Recipe, rehearsal: Rehearsal, data: str, shape: tuple[int, int, int], caption: int, world_size: int
) -> str:
    parallel = recipe.parallel
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    if parallel.kind == "fsdp":
        ranks += f", fsdp: {parallel.replicas} x {world_size // parallel.replicas} shards"
    elif world_size > 1:
        ranks += ", ddp: every rank holds everything"
    updates = rehearsal.updates
    each = ", ".join(f"{count} {kind}" for kind, count in updates.items())
    whole = sum(updates.values()) * recipe.iterations
    samples = recipe.batch * recipe.accumulate * world_size
    product = f"batch {recipe.batch} x accumulate {recipe.accumulate} x {world_size} ranks"
    facts = [
        ["method", recipe.method.kind],
        ["model", recipe.model],
        ["ranks", ranks],
        ["data", data],
        ["latents", f"{' x '.join(map(str, shape))}; captions of up to {caption} tokens"],
        ["sigmas", ", ".join(f"{sigma:.4g}" for sigma in rehearsal.sigmas)],
        ["updates", f"{each} an iteration; {recipe.iterations:,} iterations: {whole:,} updates"],
        ["samples", f"{samples:,} an update: {product}"],
        ["compute", _compute(recipe)],
        ["checkpoints", _checkpoints(recipe, rehearsal.checkpoint)],
        ["out", str(recipe.out)],
    ]  # fmt: skip
    note = (
        "Gradients are there from the first batch of an update of their kind to its end. Tensors alone: a CUDA "
        "context, cuBLAS\nworkspaces and the allocator's fragmentation come on top, and so do an autoencoder and a "
        "text encoder where a run needs them."
    )
    roles, memory = _role_rows(rehearsal), _memory_rows(recipe, rehearsal)
    tables = [columns(facts), columns(roles, right=(4, 5)), columns(memory, right=(1, 2, 3, 4))]
    return "\n\n".join([*tables, note])


def _checkpoints(recipe: Recipe, each: int) -> str:
    kept = recipe.checkpoints.keep_last + (recipe.checkpoints.keep_best is not None)
    return (
        f"{size_text(each)} each, of all ranks; {kept} are kept, and one more while it is written: "
        f"{size_text((kept + 1) * each)}; {size_text(free_space(recipe.out))} are free there"
    )


def _compute(recipe: Recipe) -> str:
    compute = recipe.compute
    said = [compute.dtype, "fused operators" if compute.fused else "stock diffusers"]
    said.append("blocks recomputed in backward" if compute.checkpointing else "activations kept")
    if compute.compile:
        said.append("compiled blocks (memory is that of eager ones)")
    return ", ".join(said)


def _role_rows(rehearsal: Rehearsal) -> list[list[str]]:
    head = ["role", "from", "class", "weights", "trainable", "frozen", "dtype"]
    return [
        head,
        *(
            [r.name, r.source, r.kind, r.weights, f"{r.trainable:,}", f"{r.frozen:,}", r.dtype or "-"]
            for r in rehearsal.roles
        ),
    ]


def _memory_rows(recipe: Recipe, rehearsal: Rehearsal) -> list[list[str]]:
    generator, guidance = recipe.optimizers.generator, recipe.optimizers.guidance
    kinds = dict.fromkeys([generator.kind, (guidance or generator).kind])
    unit, size = ("GiB", 2**30) if max(rehearsal.peaks.values()) >= 2**30 else ("MiB", 2**20)

    def row(name: str, *sizes: int) -> list[str]:
        return [name, *(f"{bytes_ / size:,.2f}" for bytes_ in sizes)]

    rows = [[f"{unit} of a rank", "weights", "gradients", " / ".join(kinds), "average"]]
    for name, held in rehearsal.memory.items():
        rows.append(row(name, held.weights, held.gradients, held.optimizer, held.average))
    rows.append(row("held between updates", rehearsal.held))
    return rows + [row(f"peak of a {kind} update", peak) for kind, peak in rehearsal.peaks.items()]
