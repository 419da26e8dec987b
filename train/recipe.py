"""A recipe: what `twostep train` is told. Strict (configuration.py): every key is here, with its type and its default.

    model -> roles -> method        which networks there are, what becomes of them, how they learn
    data, batch, accumulate         what an update sees
    optimizers, ema, compute        how parameters move
    parallel                        how ranks share the work
    checkpoints, watch, trouble     what is kept, what is shown, what happens when something goes wrong

Sections that a method has no use for are errors where they are given (`real_score` for flow matching), and those that
it needs have defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from .methods import DOPSDConfig, MethodConfig, Weights, method_class
from .suggest import did_you_mean
from .told import told


def _idle(section: Any, names: Iterable[str], idle: bool, reason: str, where: str = "") -> Iterable[str]:
    """Settings that are given where nothing would read them."""
    if not idle or section is None:
        return
    usual = type(section)()
    for name in names:
        if getattr(section, name) != getattr(usual, name):
            yield f"{where}{name} is {getattr(section, name)!r}, and {reason}: it would change nothing"


# Roles


@dataclass(frozen=True, kw_only=True)
class StudentRole:
    source: str | None = told(None, "where its weights begin: a folder or hub id; null: the model's own")
    subfolder: str = told("transformer", "of the source")
    weights: Literal["full", "lora"] = told("full", "train copies in float32, or adapters on a frozen base")
    per_step: bool = told(True, "parameters of its own for every step; false: all steps share them")
    steps: int = told(2, "Euler steps")
    shift: float | None = told(None, "of its sigma grid; null: what the model's pipeline uses")
    sigmas: tuple[float, ...] | None = told(None, "the grid itself, from 1 down to 0, instead of steps and shift")
    rank: int = told(64, "of the adapters")
    alpha: float | None = told(None, "of the adapters; null: twice the rank")

    def check(self) -> Iterable[str]:
        if self.steps < 1:
            yield f"steps is {self.steps}, expected at least 1"
        if self.rank < 1:
            yield f"rank is {self.rank}, expected at least 1"
        if self.sigmas is not None and len(self.sigmas) != self.steps + 1:
            yield f"sigmas are {len(self.sigmas)} numbers, and {self.steps} steps have {self.steps + 1}: set steps too"
        if self.sigmas is not None and self.shift is not None:
            yield "both sigmas and shift are given, and sigmas are shifted already: set shift to null"
        yield from _check_shift(self.shift)
        if self.sigmas is not None:
            grid = list(self.sigmas)
            if grid[:1] != [1.0] or grid[-1:] != [0.0] or any(b >= a for a, b in pairwise(grid)):
                yield f"sigmas are {grid}, expected to fall from 1 to 0"


def _check_shift(shift: float | None) -> Iterable[str]:
    if shift is not None and shift <= 0:
        yield f"shift is {shift}, expected a number above 0; 1 is none"


@dataclass(frozen=True, kw_only=True)
class RealScoreRole:
    source: str | None = told(None, "a multi-step base that answers to guidance; null: the model's own weights")
    subfolder: str = told("transformer", "of the source")
    shift: float | None = told(None, "of the grid on which DP-DMD runs it; null: what the model's pipeline uses")

    def check(self) -> Iterable[str]:
        yield from _check_shift(self.shift)


@dataclass(frozen=True, kw_only=True)
class FakeScoreRole:
    source: str | None = told(None, "what it begins as, and its adapter is on; null: the real score's")
    subfolder: str = told("transformer", "of the source")
    weights: Literal["full", "lora"] | None = told(None, "null: as the student's")
    rank: int | None = told(None, "of the adapter; null: the student's")
    alpha: float | None = told(None, "of the adapter; null: twice the rank")

    def check(self) -> Iterable[str]:
        if self.rank is not None and self.rank < 1:
            yield f"rank is {self.rank}, expected at least 1"
        if self.source is None and self.subfolder != "transformer":
            yield f"subfolder is {self.subfolder!r} and source is null, the real score's: give both, or neither"


@dataclass(frozen=True, kw_only=True)
class DiscriminatorRole:
    source: str | None = told(None, "whose features it looks at; null: the model's own weights")
    subfolder: str = told("transformer", "of the source")
    blocks: tuple[int, ...] | None = told(None, "after which blocks it looks; null: about 1/2, 3/4 and the last")
    hidden: int | None = told(None, "width of its heads; null: at most 256")


@dataclass(frozen=True, kw_only=True)
class Roles:
    student: StudentRole = told(StudentRole(), "the network in training")
    real_score: RealScoreRole | None = told(None, "what distribution matching pulls to; null: with its defaults")
    fake_score: FakeScoreRole | None = told(None, "follows the student; null: with its defaults")
    discriminator: DiscriminatorRole | None = told(None, "real or generated; null: with its defaults")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    scale: float = told(4.0, "guidance of the real score; 1 is none (ours: no paper publishes Turbo++'s)")
    weights: Weights = told(Weights(), "of the terms (Turbo++'s)")
    loss: Literal["softplus", "hinge", "bce", "relativistic"] = told("softplus", "of generator and discriminator")
    lowest: float = told(0.02, "least re-noise level")
    r1_noise: float = told(0.1, "how far the approximate R1 moves its input")

    def check(self) -> Iterable[str]:
        if self.scale < 0:
            yield f"scale is {self.scale}, expected at least 0; 1 is none"
        if not 0 <= self.lowest < 1:
            yield f"lowest is {self.lowest}, expected a level from 0 up to 1"
        if self.r1_noise <= 0:
            yield f"r1_noise is {self.r1_noise}, expected a number above 0"


# Data


@dataclass(frozen=True, kw_only=True)
class PromptsData:
    """Prompts, and what a cache has of them: contexts, the teacher's images, anchors."""

    kind: Literal["prompts"] = "prompts"
    prompts: Path = field(metadata={"help": ".txt, .jsonl, .parquet, or a folder of datasets"})
    column: str | None = told(None, "where the prompts stand in it; null: prompt, caption or text")
    contexts: Path | None = told(None, "contexts that `twostep cache` wrote; null: encode as training goes")
    teacher: Path | None = told(None, "the teacher's images (and anchors) that `twostep cache` wrote")
    size: tuple[int, int] | None = told(None, "height and width in pixels; null: the cache's, or the model's own")


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Prompts without images, on which D-OPSD's student is held to what it was."""

    prompts: Path = field(metadata={"help": ".txt, .jsonl, .parquet, or a folder of datasets"})
    column: str | None = told(None, "where the prompts stand in it; null: prompt, caption or text")
    share: float = told(0.5, "of a batch, and so of the loss; the rest are images")

    def check(self) -> Iterable[str]:
        if not 0 < self.share < 1:
            yield f"share is {self.share}, expected a number between 0 and 1"

    def rows(self, batch: int) -> int:
        """How many of a batch are prompts to keep."""
        return round(self.share * batch)


@dataclass(frozen=True, kw_only=True)
class ImagesData:
    """A folder of images with captions, in buckets of aspect ratio."""

    kind: Literal["images"] = "images"
    folder: Path = field(metadata={"help": "images with captions beside them, or with metadata.jsonl"})
    area: int | None = told(None, "pixels of an image, about; null: the square that the model was made for")
    max_aspect: float = told(2.0, "of the longest bucket")
    vision: str | None = told(None, "D-OPSD on Z-Image: the Qwen3-VL that reads caption and image; a folder or hub id")
    vision_pixels: int = told(512 * 512, "most pixels of an image that the vision encoder reads")
    keep: KeepConfig | None = told(None, "D-OPSD: what the student is not to forget; null: nothing beside the images")
    memory: int = told(1 << 30, "bytes of the CPU's that latents and contexts are kept in once they are made; 0: none")

    def check(self) -> Iterable[str]:
        if self.area is not None and self.area < 1:
            yield f"area is {self.area}, expected a number of pixels of at least 1, or null"
        if self.max_aspect < 1:
            yield f"max_aspect is {self.max_aspect}, expected a number from 1 on; 1 is squares only"
        for name, least in (("vision_pixels", 1), ("memory", 0)):
            if getattr(self, name) < least:
                yield f"{name} is {getattr(self, name)}, expected at least {least}"


@dataclass(frozen=True, kw_only=True)
class ShapesData:
    """The miniature's drawn images and captions."""

    kind: Literal["shapes"] = "shapes"
    pool: int | None = told(
        None,
        "samples after which they come again; what was made of one stays in memory (15 kB); null: never",
    )


DataConfig = PromptsData | ImagesData | ShapesData


# How parameters move


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    kind: Literal["adamw", "adamw8bit", "muon"] = told("adamw", "adamw8bit needs torchao, or bitsandbytes (no shards)")
    lr: float = told(1e-5, "learning rate")
    betas: tuple[float, float] = told((0.0, 0.9), "of the moments (Turbo++'s)")
    eps: float = told(1e-8, "of the denominator")
    weight_decay: float = told(0.0, "decoupled")
    muon_lr: float = told(0.02, "muon: of the matrices inside blocks; all others move by AdamW with lr")
    muon_momentum: float = told(0.95, "muon: of the matrices inside blocks")
    clip: float | None = told(1.0, "largest norm of the whole gradient; null: none")
    warmup: int = told(0, "updates of this kind over which the rate rises from 0")
    decay: Literal["none", "cosine", "linear"] = told("none", "of the rate, from the warm-up to the last update")
    last: float = told(0.0, "share of the rate that is left at the end of the decay")

    def check(self) -> Iterable[str]:
        if self.lr <= 0:
            yield f"lr is {self.lr}, expected a number above 0"
        if self.clip is not None and self.clip <= 0:
            yield f"clip is {self.clip}, expected a number above 0, or null for none"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas are {list(self.betas)}, expected two numbers from 0 up to 1"
        if self.warmup < 0:
            yield f"warmup is {self.warmup}, expected at least 0"
        if not 0 <= self.last <= 1:
            yield f"last is {self.last}, expected a share from 0 to 1"
        if self.eps <= 0 or self.weight_decay < 0:
            yield f"eps is {self.eps} and weight_decay {self.weight_decay}, expected above 0, and at least 0"
        if self.muon_lr <= 0 or not 0 <= self.muon_momentum < 1:
            yield f"muon_lr is {self.muon_lr} and muon_momentum {self.muon_momentum}, expected above 0, and 0 up to 1"
        yield from _idle(self, ("muon_lr", "muon_momentum"), self.kind != "muon", f"kind is '{self.kind}'")
        yield from _idle(self, ("last",), self.decay == "none", "decay is 'none'")


@dataclass(frozen=True, kw_only=True)
class Optimizers:
    generator: OptimizerConfig = told(OptimizerConfig(), "of the student")
    guidance: OptimizerConfig | None = told(None, "of fake score and discriminator; null: as the generator's")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    dtype: Literal["bfloat16", "float32"] = told("bfloat16", "networks compute in it; trained weights stay float32")
    device: str | None = told(None, "null: a GPU for each rank if there are any, else the CPU")
    checkpointing: bool = told(False, "recompute each block in the backward pass")
    compile: bool = told(False, "torch.compile of the blocks")
    fused: bool = told(True, "twostep's operators; false: stock diffusers")
    threads: int | None = told(None, "of the CPU; null: torch's own choice")

    def check(self) -> Iterable[str]:
        if self.threads is not None and self.threads < 1:
            yield f"threads is {self.threads}, expected at least 1, or null for torch's own choice"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    kind: Literal["ddp", "fsdp"] = told("ddp", "whole networks on every rank, or all in shards")
    replicas: int = told(1, "fsdp: groups that hold all shards each (HSDP); ranks are divided among them")
    timeout: float = told(600.0, "seconds without progress after which a rank is taken to hang")

    def check(self) -> Iterable[str]:
        if self.replicas < 1:
            yield f"replicas is {self.replicas}, expected at least 1"
        if self.replicas > 1 and self.kind != "fsdp":
            yield "replicas is for kind 'fsdp': with 'ddp' every rank is a replica"
        if self.timeout <= 0:
            yield f"timeout is {self.timeout}, expected a number of seconds above 0"


# What is kept, shown, and done in trouble

JUDGED, ALIGNMENT = ("frechet", "diversity", "vendi"), "alignment/"  # what twostep.evaluate gives on-line
# Of the miniature's detector: MiniatureAlignment's, without its import.
ALIGNED = ("aligned", "count", "shape", "colour", "size", "cell", "relation", "background", "psnr")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = told(500, "iterations between two")
    keep_last: int = told(3, "how many are kept")
    keep_best: tuple[str, Literal["min", "max"]] | None = told(None, "and the best by a metric: [frechet, min]")

    def check(self) -> Iterable[str]:
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, expected at least 1"
        known = (*JUDGED, *(f"{ALIGNMENT}{name}" for name in ALIGNED))
        if self.keep_best is not None and self.keep_best[0] not in known:
            near = did_you_mean(self.keep_best[0], known)
            yield f"keep_best names {self.keep_best[0]!r}; {near}accepted: {', '.join(known)}"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """On-line quality and diversity (twostep.evaluate) of samples for prompts that are drawn once."""

    every: int = told(500, "iterations between two")
    prompts: int = told(32, "how many")
    seeds: int = told(4, "images of each: diversity is measured among them")
    features: str | None = told(None, "a folder of DINO or CLIP for transformers; null: the miniature's detector")
    reference: int = told(512, "real images for the Frechet distance; 0: none")

    def check(self) -> Iterable[str]:
        if self.every < 1:
            yield f"every is {self.every}, expected at least 1"
        if self.prompts < 1 or self.seeds < 1 or self.prompts * self.seeds < 2:
            yield f"prompts is {self.prompts} and seeds {self.seeds}, expected at least 2 images in all"
        if self.reference < 0 or self.reference == 1:
            yield f"reference is {self.reference}, expected 0 for none, or at least 2 images"


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    project: str = field(metadata={"help": "of Weights & Biases"})
    entity: str | None = told(None, "whose")
    name: str | None = told(None, "of the run")
    mode: Literal["online", "offline"] = told("online", "offline: to be synchronised later")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    every: int = told(10, "iterations between two rows of numbers")
    samples_every: int | None = told(
        500, "iterations between two sheets of samples, the first at the start; null: none"
    )
    samples: int = told(16, "images of a sheet")
    evaluate: EvaluateConfig | None = told(None, "quality and diversity as training goes")
    tensorboard: bool = told(True, "write event files")
    wandb: WandbSettings | None = told(None, "also log to Weights & Biases")

    def check(self) -> Iterable[str]:
        if self.every < 1:
            yield f"every is {self.every}, expected at least 1"
        if self.samples_every is not None and (self.samples_every < 1 or self.samples < 1):
            yield "samples_every and samples are at least 1 (or samples_every null)"


@dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """Updates whose loss or gradient is not finite are skipped, and counted."""

    in_a_row: int = told(8, "skipped updates in a row before going back to the last good checkpoint")
    lower: float = told(0.5, "what the learning rates are multiplied by then")
    returns: int = told(2, "how many times, before the run stops with a report")

    def check(self) -> Iterable[str]:
        if self.in_a_row < 1 or self.returns < 0:
            yield f"in_a_row is {self.in_a_row} and returns {self.returns}, expected at least 1 and at least 0"
        if not 0 < self.lower <= 1:
            yield f"lower is {self.lower}, expected a number above 0, at most 1"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: str = field(
        metadata={"help": "a diffusers pipeline: its folder, a hub id (owner/name[@revision]), or `miniature`"}
    )
    method: MethodConfig = field(metadata={"help": "how it learns: docs/methods.md"})
    data: DataConfig = field(metadata={"help": "what it learns from"})
    out: Path = field(metadata={"help": "the run's folder; a run that is there goes on"})
    seed: int = told(0, "of all noise, orders and new parameters")
    iterations: int = told(20_000, "each is the method's updates in turn")
    batch: int = told(4, "samples of a rank at a time")
    accumulate: int = told(1, "batches of an update")
    roles: Roles = told(Roles(), "the networks")
    guidance: GuidanceConfig | None = told(None, "of distribution matching and the discriminator; null: its defaults")
    optimizers: Optimizers = told(Optimizers(), "for each kind of update")
    ema: float | None = told(0.99, "average of the student, for samples and export; null: none")
    compute: ComputeConfig = told(ComputeConfig(), "how networks run")
    parallel: ParallelConfig = told(ParallelConfig(), "how ranks share the work")
    checkpoints: CheckpointConfig = told(CheckpointConfig(), "what is kept")
    watch: WatchConfig = told(WatchConfig(), "what is shown")
    trouble: TroubleConfig = told(TroubleConfig(), "what happens then")

    def check(self) -> Iterable[str]:
        for name in ("iterations", "batch", "accumulate"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, expected at least 1"
        if self.ema is not None and not 0 <= self.ema < 1:
            yield f"ema is {self.ema}, expected a number from 0 up to 1, or null for none"
        yield from self._check_roles()
        yield from self._check_data()
        best, evaluate = self.checkpoints.keep_best, self.watch.evaluate
        if best is not None and evaluate is not None:
            yield from self._check_best(best[0], evaluate)
        if best is not None and evaluate is None:
            yield "checkpoints.keep_best is given, and watch.evaluate, which would measure it, is not"
        elif best is not None and evaluate is not None and self.checkpoints.every % evaluate.every:
            yield (
                f"checkpoints.every is {self.checkpoints.every}, and with keep_best it must be a multiple of "
                f"watch.evaluate.every, {evaluate.every}: a checkpoint is judged by an evaluation of its own"
            )

    def _check_best(self, metric: str, evaluate: EvaluateConfig) -> Iterable[str]:
        """That it will be measured."""
        named = f"checkpoints.keep_best is by {metric}, and"
        without = isinstance(self.data, PromptsData) and self.data.teacher is None
        if metric == "frechet" and (evaluate.reference == 0 or without):
            which = "data.teacher is null" if without else "watch.evaluate.reference is 0"
            yield f"{named} {which}: without real images there is no Frechet distance"
        if metric.startswith(ALIGNMENT) and evaluate.features is not None:
            yield f"{named} watch.evaluate.features is given: what captions say is the miniature's detector's to judge"

    def _check_roles(self) -> Iterable[str]:
        kind, method, student = self.method.kind, method_class(self.method), self.roles.student
        for name in ("real_score", "fake_score", "discriminator"):
            if getattr(self.roles, name) is not None and name not in method.roles:
                yield f"roles.{name} is given, and {kind} has the roles {', '.join(method.roles)}"
        if self.guidance is not None and kind == "decoupled_dmd" and self.guidance.scale < 1:
            yield f"guidance.scale is {self.guidance.scale}, and {kind} takes the real score apart from 1 on"
        if self.guidance is not None and "real_score" not in method.roles:
            yield f"guidance is given, and {kind} has no real score to guide"
        if self.optimizers.guidance is not None and "fake_score" not in method.roles:
            yield f"optimizers.guidance is given, and {kind} has no guidance update"
        if self.guidance is not None:
            adversarial = "discriminator" in method.roles
            reason = f"{kind} has no discriminator"
            yield from _idle(self.guidance, ("loss", "r1_noise"), not adversarial, reason, "guidance.")
            weights = ("generator_gan", "discriminator", "r1")
            yield from _idle(self.guidance.weights, weights, not adversarial, reason, "guidance.weights.")
            decoupled = f"{kind} has method.dm_weight and its own step size"
            yield from _idle(self.guidance.weights, ("dmd",), kind == "decoupled_dmd", decoupled, "guidance.weights.")
        for name in ("student", "fake_score"):
            role = getattr(self.roles, name)
            full = role is not None and (role.weights or student.weights) == "full"
            yield from _idle(role, ("rank", "alpha"), full, "its weights are 'full'", f"roles.{name}.")
        least, most = method.steps
        if student.steps < least or (most is not None and student.steps > most):
            yield f"roles.student.steps is {student.steps}, and {kind} trains {least if most else f'{least} or more'}"

    def _check_data(self) -> Iterable[str]:
        kind, data, wants = self.method.kind, self.data, method_class(self.method).wants(self.method)
        if isinstance(data, PromptsData):
            if "target_context" in wants:
                yield f"data is of kind 'prompts', and {kind} learns from images: kind 'images' or 'shapes'"
            elif data.teacher is None and "latents" in wants:
                yield f"data.teacher is null, and {kind} needs images: write them with `twostep cache`"
            elif data.teacher is None and "anchor" in wants:
                yield "data.teacher is null, and the anchors are in it: write them with `twostep cache --anchor-sigma`"
        elif "anchor" in wants:
            yield f"data is of kind {data.kind!r}, and the teacher's anchors come with kind 'prompts' and a cache"
        if isinstance(data, ImagesData) and data.keep is not None:
            if not isinstance(self.method, DOPSDConfig):
                yield f"data.keep is given, and {kind} does not read it: only d_opsd does"
            elif not self.method.on_policy:
                yield "data.keep is given, and with method.on_policy=false every caption needs an image"
            if not 0 < data.keep.rows(self.batch) < self.batch:
                yield (
                    f"data.keep.share is {data.keep.share} of a batch of {self.batch}, which leaves no room for "
                    f"{'prompts' if data.keep.rows(self.batch) == 0 else 'images'}: choose another share or batch"
                )
