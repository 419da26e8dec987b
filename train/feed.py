"""A feed: what updates are given, as a recipe's `data` says. Batches are made ahead, on the run's device.

    prompts    contexts from a cache or encoded here; the teacher's latents and anchors from its cache
    images     a folder in buckets of aspect ratio; latents and contexts are made here, and kept in memory up to a limit
    shapes     the miniature's drawn data; every sample is new, or a pool of them is kept in memory

A feed resumes bit for bit: a batch depends on its place in the order and on how many ranks share it, and on nothing
that was before (sources.py says how).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .data.batches import PromptBatches, ShapesBatches
from .data.images import ImageFolder
from .data.order import BucketOrder, Order
from .data.pairs import TeacherCache
from .data.prefetch import Prefetch
from .data.prompts import Prompts, read_prompts
from .methods.method import TrainingBatch
from .parts import Parts, SharedContexts
from .recipe import DataConfig, ImagesData, KeepConfig, PromptsData
from .sources import ImagesSource, Making, PromptsSource, Shape, ShapesSource, Source


class Feed:
    """An endless iterator of TrainingBatch with a state: torchdata's Stateful, and torch.distributed.checkpoint's."""

    def __init__(self, source: Source, contexts: SharedContexts) -> None:
        self._source, self._ahead = source, Prefetch(source)
        self.contexts = contexts  # of the captions that captions_for_samples gives, and of the batches

    @property
    def shape(self) -> Shape | None:
        """Of latents, where all are of one; None for several buckets."""
        return self._source.shape

    @property
    def usual(self) -> Shape:
        """Of latents, for what asks for one shape: of several buckets, which have about one area, the square."""
        return self._source.usual

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        return next(self._ahead)

    def state_dict(self) -> dict[str, Any]:
        """After the last batch that was taken; the same on all ranks."""
        return self._ahead.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead.load_state_dict(dict(state))

    def close(self) -> None:
        """Ends the thread; the next batch, if there is one, is the one after the last taken."""
        self._ahead.close()

    def captions_for_samples(self, count: int) -> list[str]:
        """The same captions in every run on these data, each once; fewer where there are not that many."""
        return self._source.captions(count)

    def real_images(self, count: int) -> Tensor | None:
        """Images [n, 3, H, W] in [-1, 1] on the CPU, n at most count; None where there are none of one size."""
        return self._source.real_images(count)

    def describe(self) -> str:
        """A line; loads nothing."""
        return self._source.describe()

    def identity(self) -> dict[str, Any]:
        """What the data are, wherever they lie: a run resumes with the same only."""
        return self._source.identity()


def make_feed(
    data: DataConfig,
    parts: Parts,
    *,
    batch: int,
    seed: int,
    rank: int,
    world_size: int,
    wants: frozenset[str],
    latent_channels: int,
    latent_factor: int,
    device: torch.device | str,
    anchor_sigma: float | None = None,
) -> Feed:
    """
    Args:
        batch: samples of this rank.
        wants: what every batch has beside its context: latents, anchor, target_context.
        latent_channels, latent_factor: of the networks, which the latents are for.
        anchor_sigma: where the method wants its anchors; None: wherever they are.
    """
    space = parts.latent_space
    if space.channels != latent_channels:
        raise ValueError(
            f"feed: the networks take latents of {latent_channels} channels, and the autoencoder of {parts.model} "
            f"makes {space.channels}"
        )
    if "anchor" in wants and not isinstance(data, PromptsData):
        raise ValueError(
            f"data is of kind {data.kind!r}, and the teacher's anchors come with kind 'prompts' and a cache"
        )
    where = torch.device(device)
    source: Source
    if isinstance(data, PromptsData):
        prompts = read_prompts(data.prompts, column=data.column)
        contexts = _contexts_of(data, parts, prompts)
        teacher = None if data.teacher is None else _teacher_of(data, prompts, latent_channels)
        hands = _hands(data, teacher, wants, anchor_sigma)
        shape = _shape(data, teacher, parts, latent_factor)
        batches = PromptBatches(
            prompts, contexts, Order(len(prompts), batch, seed=seed, rank=rank, world_size=world_size)
        )
        source = PromptsSource(parts, batches, contexts, teacher, hands, shape, where)
    elif isinstance(data, ImagesData):
        contexts = parts.contexts(None)
        area = space.sample_size**2 if data.area is None else data.area
        folder = ImageFolder(data.folder, area=area, factor=space.factor * latent_factor, max_aspect=data.max_aspect)
        kept = None if data.keep is None else _to_keep(data.keep, batch, seed, rank, world_size)
        images = batch - (0 if kept is None else kept[1].batch)
        order = BucketOrder(folder.buckets, images, seed=seed, rank=rank, world_size=world_size)
        making = Making(parts, wants, data.vision, data.vision_pixels)
        source = ImagesSource(making, folder, contexts, order, where, data.memory, kept)
    else:
        contexts = parts.contexts(None)
        source = ShapesSource(
            Making(parts, wants),
            contexts,
            ShapesBatches(batch, seed=seed, rank=rank, world_size=world_size, pool=data.pool),
            where,
        )
    return Feed(source, contexts)


def _to_keep(keep: KeepConfig, batch: int, seed: int, rank: int, world_size: int) -> tuple[Prompts, Order]:
    try:
        prompts = read_prompts(keep.prompts, column=keep.column)
    except ValueError as error:
        raise ValueError(f"data.keep: {error}") from None
    return prompts, Order(len(prompts), keep.rows(batch), seed=seed, rank=rank, world_size=world_size)


# What a cache of prompts has to offer


def _contexts_of(data: PromptsData, parts: Parts, prompts: Prompts) -> SharedContexts:
    contexts = parts.contexts(data.contexts)
    if contexts.stored is not None:
        absent = [prompt for prompt in prompts if prompt not in contexts.stored]
        if absent:
            raise ValueError(
                f"data.contexts: {len(absent)} of the {len(prompts)} prompts of {data.prompts} are not in "
                f"{data.contexts}, {absent[0][:80]!r} among them: write them with `twostep cache`, or leave "
                f"data.contexts null to encode as training goes"
            )
    return contexts


def _teacher_of(data: PromptsData, prompts: Prompts, channels: int) -> TeacherCache:
    assert data.teacher is not None
    teacher = TeacherCache(data.teacher)
    if teacher.header["prompts"] != prompts.fingerprint:
        raise ValueError(
            f"data.teacher: the samples in {data.teacher} are of {len(teacher)} other prompts than the {len(prompts)} "
            f"of {data.prompts} (or of another order of them): give the file that `twostep cache` was given"
        )
    if teacher.shape[0] != channels:
        raise ValueError(
            f"data.teacher: the samples in {data.teacher} have {teacher.shape[0]} channels, and the networks take "
            f"{channels}: write a cache with this model's family"
        )
    return teacher


def _hands(
    data: PromptsData, teacher: TeacherCache | None, wants: frozenset[str], anchor_sigma: float | None
) -> frozenset[str]:
    """What batches bring of the teacher's cache."""
    if "target_context" in wants:
        raise ValueError("data: the method learns from images, and prompts have none: kind 'images' or 'shapes'")
    if teacher is None:
        if wants:
            raise ValueError(
                f"data.teacher is null, and the method wants {' and '.join(sorted(wants))}: write them with "
                f"`twostep cache{' --anchor-sigma' if 'anchor' in wants else ''}`"
            )
        return frozenset()
    there = {"latents"} if teacher.anchor_sigma is None else {"latents", "anchor"}
    if "anchor" in wants - there:
        at = f" {anchor_sigma:.6g}" if anchor_sigma is not None else ""
        raise ValueError(
            f"data.teacher: {data.teacher} holds no anchors, and the method wants them: write them with "
            f"`twostep cache --anchor-sigma{at}`"
        )
    given = teacher.anchor_sigma
    if "anchor" in wants and anchor_sigma is not None and given is not None and abs(given - anchor_sigma) > 1e-4:
        raise ValueError(
            f"data.teacher: the anchors in {data.teacher} stand at sigma {given:.6g}, and the student's first step "
            f"ends at {anchor_sigma:.6g}: write them with `twostep cache --anchor-sigma {anchor_sigma:.6g}`, or "
            f"choose the student's sigmas for them"
        )
    return wants & there


def _shape(data: PromptsData, teacher: TeacherCache | None, parts: Parts, latent_factor: int) -> Shape:
    space = parts.latent_space
    height, width = (space.sample_size, space.sample_size) if data.size is None else data.size
    step = space.factor * latent_factor
    if height < 1 or width < 1 or height % step or width % step:
        raise ValueError(
            f"data.size is {height} x {width}, expected multiples of {step}: this model's latents and patches"
        )
    shape = (space.channels, height // space.factor, width // space.factor)
    if teacher is None:
        return shape
    channels, high, wide = teacher.shape
    if data.size is not None and (high, wide) != shape[1:]:
        raise ValueError(
            f"data.size is {height} x {width}, and the samples in {data.teacher} are of "
            f"{high * space.factor} x {wide * space.factor}: leave it null, or write samples of that size"
        )
    return channels, high, wide
