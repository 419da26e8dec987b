"""Where batches come from, a class for each kind of data: what a Feed makes ahead.

What is made of a folder's image, or of a prompt to keep beside images, is made of it alone and stored. The rounding of
a network depends on what shares its batch, and what was stored from an earlier batch must equal what a resumed run
makes anew. Other prompts and drawn shapes are encoded as a batch: a batch of the order is the same at every resume.
Those of a pool of shapes, which come again as they were, are stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..zoo.context import Context
from ..zoo.encoders import fingerprint
from ..zoo.miniature import samples, say, scenes_at, write
from ..zoo.miniature.shapes import SIDE
from .data.batches import Batch, PromptBatches, ShapesBatches
from .data.images import ImageFolder
from .data.order import BucketOrder, Order
from .data.pairs import TeacherCache
from .data.prompts import Prompts
from .methods.method import TrainingBatch
from .parts import Parts, SharedContexts, TargetEncoder

SHOWN = 0x5A3C_F00D  # the stream that samples and references are drawn from; a run's own seed is another
AT_ONCE = 8  # latents decoded at a time for references
Shape = tuple[int, int, int]  # channels, height, width of latents


class Source(Protocol):
    """What a kind of data is behind a Feed: a Stateful of batches that can say what it is made of."""

    shape: Shape | None  # of latents; None for several
    usual: Shape  # of these one

    def __iter__(self) -> Iterator[TrainingBatch]: ...

    def __next__(self) -> TrainingBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def captions(self, count: int) -> list[str]: ...

    def real_images(self, count: int) -> Tensor | None: ...

    def describe(self) -> str: ...

    def identity(self) -> dict[str, Any]: ...


# Prompts


class PromptsSource:
    def __init__(
        self,
        parts: Parts,
        batches: PromptBatches,
        contexts: SharedContexts,
        teacher: TeacherCache | None,
        hands: frozenset[str],
        shape: Shape,
        device: torch.device,
    ) -> None:
        self.parts, self.batches, self.contexts, self.teacher = parts, batches, contexts, teacher
        self.prompts, self.hands, self.device = batches.prompts, hands, device
        self.shape: Shape | None = shape
        self.usual = self._latents = shape

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        with _quiet(self.device):
            batch = next(self.batches)
            plain = TrainingBatch(batch.context.to(self.device), (len(batch.indices), *self._latents))
            found = self._of_teacher(batch) if self.teacher is not None and self.hands else {}
            moved: dict[str, Any] = {name: x.to(self.device, torch.float32) for name, x in found.items()}
            return replace(plain, **moved)

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def captions(self, count: int) -> list[str]:
        return _first(self.prompts, count)

    def real_images(self, count: int) -> Tensor | None:
        """The teacher's, decoded."""
        if self.teacher is None:
            return None
        teacher = TeacherCache(self.teacher.folder)  # with files of its own: the other's are a thread's
        numbers = list(range(min(count, len(teacher))))
        autoencoder, made = self.parts.autoencoder, []
        with torch.no_grad():
            for start in range(0, len(numbers), AT_ONCE):
                latents = teacher[numbers[start : start + AT_ONCE]]["latents"]
                made.append(autoencoder.decode(latents).float().clamp(-1, 1).cpu())
        return torch.cat(made)

    def describe(self) -> str:
        said = [f"{len(self.prompts)} prompts of {self.prompts.source}", _describe_contexts(self.contexts)]
        size = " x ".join(map(str, self._latents))
        if self.teacher is None:
            said.append(f"no images; noise of {size}")
        else:
            held = ["images"] if "latents" in self.hands else []
            held += [f"anchors at sigma {self.teacher.anchor_sigma:.6g}"] if "anchor" in self.hands else []
            said.append(f"{' and '.join(held) or 'the size'} of {size} from {self.teacher.folder}")
        return "; ".join(said)

    def _of_teacher(self, batch: Batch) -> dict[str, Tensor]:
        assert self.teacher is not None
        if batch.context.encoder != self.teacher.header["encoder"]:
            raise ValueError(
                f"data.teacher: the samples in {self.teacher.folder} were made with contexts of "
                f"{self.teacher.header['encoder']}, and here they are of {batch.context.encoder}: give samples and "
                f"contexts that one `twostep cache` wrote for this model"
            )
        there, found = self.teacher[batch.indices], {}
        if "latents" in self.hands:
            found["latents"] = there["latents"]
        if "anchor" in self.hands:
            found |= {"anchor": there["anchors"], "anchor_noise": self.teacher.noise(batch.indices)}
        return found

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "prompts",
            "prompts": self.prompts.fingerprint,
            "contexts": self.contexts.encoder,
            "teacher": None if self.teacher is None else _digest(self.teacher.header),
            "shape": list(self._latents),
        }


# Images, and what is made of them


@dataclass(frozen=True)
class Making:
    """What images become, as far as it is wanted."""

    parts: Parts
    hands: frozenset[str]
    vision: str | None = None
    vision_pixels: int = 512 * 512

    @cached_property
    def target(self) -> TargetEncoder | None:
        if "target_context" not in self.hands:
            return None
        return self.parts.target_encoder(self.vision, self.vision_pixels)

    @property
    def reads_images(self) -> bool:
        """Beside the autoencoder."""
        return self.target is not None and self.target.reads_images

    @property
    def needs_latents(self) -> bool:
        return "latents" in self.hands or (self.target is not None and not self.target.reads_images)

    def latents(self, images: Tensor) -> Tensor:
        return self.parts.autoencoder.encode(images).float()

    def batch(self, context: Context, latents: Tensor | None, target: Context | None, shape: Shape) -> TrainingBatch:
        handed = latents if "latents" in self.hands else None
        return TrainingBatch(context, (context.batch, *shape), latents=handed, target_context=target)

    def identity(self) -> dict[str, Any]:
        vae = self.parts.autoencoder.vae if self.needs_latents else None
        return {
            "target": None if self.target is None else self.target.fingerprint,
            "autoencoder": None if vae is None else _digest([self._scaling(vae), fingerprint.weights(vae)]),
        }

    @staticmethod
    def _scaling(vae: Any) -> list[Any]:
        """What latents depend on beside weights: factors, or a batch norm's statistics."""
        norm = getattr(vae, "bn", None)
        if norm is not None:
            return [norm.running_mean.tolist(), norm.running_var.tolist()]
        return [vae.config.scaling_factor, vae.config.shift_factor]


@dataclass(frozen=True)
class Made:
    """What was made of one image and its caption, on the CPU."""

    context: Context  # a batch of one, as the others
    latents: Tensor | None
    target: Context | None

    @property
    def nbytes(self) -> int:
        tensors = [self.context.features, self.latents, None if self.target is None else self.target.features]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class ImagesSource:
    def __init__(
        self,
        making: Making,
        folder: ImageFolder,
        contexts: SharedContexts,
        order: BucketOrder,
        device: torch.device,
        memory: int,
        kept: tuple[Prompts, Order] | None = None,
    ) -> None:
        self.making, self.folder, self.contexts, self.order = making, folder, contexts, order
        self.device, self.memory = device, memory
        self.kept = None if kept is None else PromptBatches(kept[0], _Alone(self), kept[1])
        self.shape: Shape | None = self._shape_of(0) if len(folder.sizes) == 1 else None
        self.usual = self.shape or self._square()
        self._stored: dict[int | str, Made] = {}  # by an image's number, or a prompt
        self._taken = 0  # bytes

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        with _quiet(self.device):
            bucket, numbers = next(self.order)
            made = [self._made(number) for number in numbers]
            context = Context.cat([one.context for one in made]).to(self.device)
            rows = [one.latents for one in made if one.latents is not None]
            latents = torch.cat(rows).to(self.device) if rows else None
            targets = [one.target for one in made if one.target is not None]
            target = Context.cat(targets).to(self.device) if targets else None
            if target is None and self.making.target is not None:
                captions = [self.folder.caption(number) for number in numbers]
                target = self.making.target(captions, None, context, latents)
            batch = self.making.batch(context, latents, target, self._shape_of(bucket))
            if self.kept is None:
                return batch
            return replace(batch, kept=next(self.kept).context.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        kept = {} if self.kept is None else {"keep": self.kept.state_dict()}
        return {"images": self._fingerprint, "order": self.order.state_dict(), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["images"] != self._fingerprint:
            raise ValueError(
                f"feed: the state is of other images than those of {self.folder.folder} (or of other captions, or "
                f"buckets); resume with the folder that the run began with, or begin a new run"
            )
        if (self.kept is None) != ("keep" not in state):
            raise ValueError(
                f"feed: the state is of a run {'without' if self.kept else 'with'} data.keep; resume as the run began, "
                f"or begin a new run"
            )
        if self.kept is not None:
            self.kept.load_state_dict(state["keep"])
        self.order.load_state_dict(state["order"])

    def captions(self, count: int) -> list[str]:
        return _first((entry.caption for entry in self.folder.entries), count)

    def real_images(self, count: int) -> Tensor | None:
        """Of the bucket with the most images."""
        numbers = max(self.folder.buckets, key=len)[:count]
        return torch.stack([self.folder[number] for number in numbers])

    def describe(self) -> str:
        sizes = ", ".join(
            f"{len(items)} of {height} x {width}"
            for (height, width), items in zip(self.folder.sizes, self.folder.buckets, strict=True)
        )
        said = f"{len(self.folder)} images of {self.folder.folder}: {sizes}; {_describe_contexts(self.contexts)}"
        if self.kept is None:
            return said
        prompts, count = self.kept.prompts, self.kept.order.batch
        beside = f"with every {self.order.batch} images {count} prompts to keep, of the {len(prompts)}"
        return f"{said}; {beside} in {prompts.source}"

    def identity(self) -> dict[str, Any]:
        mine = {"kind": "images", "images": self._fingerprint, "contexts": self.contexts.encoder}
        kept = {} if self.kept is None else {"keep": self.kept.prompts.fingerprint}
        return {**mine, **kept, **self.making.identity()}

    @cached_property
    def _fingerprint(self) -> str:
        """Of names, captions and buckets: what tells folders apart. Not of the files' bytes: a run goes on after a
        damaged image has been mended."""
        rows = [[entry.path.relative_to(self.folder.folder).as_posix(), entry.caption] for entry in self.folder.entries]
        return _digest([rows, self.folder.sizes, self.folder.buckets])

    def _shape_of(self, bucket: int) -> Shape:
        (height, width), space = self.folder.sizes[bucket], self.making.parts.latent_space
        return space.channels, height // space.factor, width // space.factor

    def _square(self) -> Shape:
        """Of the area that all buckets have about."""
        space, unit = self.making.parts.latent_space, self.folder.factor
        side = max(1, round(math.sqrt(self.folder.area) / unit)) * unit // space.factor
        return space.channels, side, side

    def _made(self, number: int) -> Made:
        if number in self._stored:
            return self._stored[number]
        making, caption = self.making, self.folder.caption(number)
        context = self.contexts[[caption]]
        latents = target = None
        if making.needs_latents or making.reads_images:
            image = self.folder[number].unsqueeze(0).to(self.device)
            latents = making.latents(image) if making.needs_latents else None
            if making.target is not None and making.reads_images:
                target = _on_cpu(making.target([caption], image, context, latents))
        return self._store(number, Made(_on_cpu(context), None if latents is None else latents.cpu(), target))

    def of_prompt(self, prompt: str) -> Context:
        if prompt not in self._stored:
            return self._store(prompt, Made(_on_cpu(self.contexts[[prompt]]), None, None)).context
        return self._stored[prompt].context

    def _store(self, name: int | str, made: Made) -> Made:
        # Every image comes once an epoch, so that when memory is full, what is there serves as well as anything else.
        if self._taken + made.nbytes <= self.memory:
            self._stored[name], self._taken = made, self._taken + made.nbytes
        return made


@dataclass(frozen=True)
class _Alone:
    """Contexts of prompts, each made alone and stored with what was made of images."""

    source: ImagesSource

    @property
    def encoder(self) -> str:
        return self.source.contexts.encoder

    def __getitem__(self, prompts: list[str]) -> Context:
        return Context.cat([self.source.of_prompt(prompt) for prompt in prompts])


# Shapes


class ShapesSource:
    def __init__(self, making: Making, contexts: SharedContexts, batches: ShapesBatches, device: torch.device) -> None:
        self.making, self.contexts, self.batches, self.device = making, contexts, batches, device
        space = making.parts.latent_space
        self._latents = (space.channels, SIDE // space.factor, SIDE // space.factor)
        self.shape: Shape | None = self._latents
        self.usual = self._latents
        self._kept: dict[int, TrainingBatch] = {}  # of a pool, by the first sample

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        with _quiet(self.device):
            if self.batches.pool is None:
                return self._made()
            start = self.batches.next
            if start in self._kept:
                self.batches.skip()
            else:
                self._kept[start] = _moved(self._made(), torch.device("cpu"))
            return _moved(self._kept[start], self.device)

    def _made(self) -> TrainingBatch:
        drawn, making = next(self.batches), self.making
        context, images = self.contexts[drawn.captions].to(self.device), drawn.images.to(self.device)
        latents = making.latents(images) if making.needs_latents else None
        target = None if making.target is None else making.target(drawn.captions, images, context, latents)
        return making.batch(context, latents, target, self._latents)

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def captions(self, count: int) -> list[str]:
        drawn = torch.arange(4 * count)  # about one of five captions has come before
        return _first(write(say(scenes_at(SHOWN, drawn), SHOWN, drawn)), count)

    def real_images(self, count: int) -> Tensor | None:
        return samples(SHOWN, 0, count).images

    def describe(self) -> str:
        pool = "" if self.batches.pool is None else f", {self.batches.pool} of them"
        return f"drawn shapes, {SIDE} x {SIDE}, stream {self.batches.seed}{pool}; {_describe_contexts(self.contexts)}"

    def identity(self) -> dict[str, Any]:
        mine = {"kind": "shapes", "pool": self.batches.pool, "contexts": self.contexts.encoder}
        return {**mine, **self.making.identity()}


# What they share


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """For a thread that makes batches: it records no gradients, and its current GPU is the run's, not the first."""
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _on_cpu(context: Context) -> Context:
    # Not Context.to, which does not wait: what comes off a GPU is looked at right away.
    return replace(context, features=context.features.cpu())


def _moved(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    """To the CPU and back, waiting for what comes off a GPU, as Context.to does not."""
    context, target = (
        None if found is None else replace(found, features=found.features.to(device))
        for found in (batch.context, batch.target_context)
    )
    assert context is not None
    latents = None if batch.latents is None else batch.latents.to(device)
    return replace(batch, context=context, latents=latents, target_context=target)


def _first(captions: Iterable[str], count: int) -> list[str]:
    """The first different ones."""
    found: dict[str, None] = {}
    for caption in captions:
        if len(found) == count:
            break
        found.setdefault(caption)
    return list(found)


def _describe_contexts(contexts: SharedContexts) -> str:
    stored = contexts.stored
    return "contexts are made on the way" if stored is None else f"contexts from {stored.folder}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
