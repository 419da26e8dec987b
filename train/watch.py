"""Looking at samples as training goes: sheets of fixed captions and seeds, and numbers of quality and diversity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..evaluate.sheet import contact_sheet, out_of_range
from .cast import DTYPES
from .data import sample_noise
from .feed import Feed
from .journal import Journal, NullJournal
from .methods import Method
from .monitors import Drift, colour_statistics
from .parts import Parts, SharedContexts
from .ranks import PATIENCE, Ranks
from .recipe import EvaluateConfig, Recipe
from .update import OutOfMemory, memory_explained

AT_ONCE = 16  # images of a forward
LARGE = 1 << 14  # numbers of a latent above which images are decoded one by one: an autoencoder needs GiB for each


def check_evaluation(recipe: Recipe, parts: Parts, feed: Feed) -> None:
    """ValueError where the miniature's detector is to look at what it does not know: images of latents of another
    shape than its own, or captions that it cannot read. Said before anything is trained."""
    from ..zoo.miniature import claims_of
    from ..zoo.miniature.shapes import SIDE

    config = recipe.watch.evaluate
    if config is None or config.features is not None:
        return
    head = "watch.evaluate.features is null, which is the miniature's detector"
    give = "give it a folder of DINO or CLIP for transformers, or set watch.evaluate to null"
    size = tuple(parts.latent_space.factor * side for side in feed.usual[1:])
    if size != (SIDE, SIDE):
        raise ValueError(f"{head} for {SIDE} x {SIDE} pixels, and these images have {size[0]} x {size[1]}: {give}")
    for caption in feed.captions_for_samples(config.prompts):
        try:
            claims_of([caption])
        except ValueError:
            raise ValueError(f"{head}, and {caption[:80]!r} is no caption of the miniature's: {give}") from None


class Watch:
    """Samples are the same captions from the same noise every time, so that sheets can be laid beside each other.

    Networks in shards need all ranks to run; otherwise rank 0 samples alone and the others wait.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, method: Method, parts: Parts, feed: Feed) -> None:
        self.recipe, self.ranks, self.method, self.parts, self.feed = recipe, ranks, method, parts, feed
        self.drift = Drift()
        self._metrics: Any = None
        check_evaluation(recipe, parts, feed)

    def state_dict(self) -> dict[str, Any]:
        return {"drift": self.drift.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drift.load_state_dict(state["drift"])

    def due(self, iteration: int) -> bool:
        return self._shows(iteration) or self.evaluates(iteration)

    def evaluates(self, iteration: int) -> bool:
        config = self.recipe.watch.evaluate
        return config is not None and iteration % config.every == 0

    def _shows(self, iteration: int) -> bool:
        every = self.recipe.watch.samples_every
        return every is not None and (iteration % every == 0 or iteration == self.recipe.iterations)

    def begin(self, journal: Journal | NullJournal) -> None:
        """The sheet of the student as it begins, from which drift is measured."""
        if self._shows(0):
            self._at(0, journal, evaluates=False)

    def look(self, iteration: int, journal: Journal | NullJournal) -> dict[str, float]:
        """The sheet and the evaluation that are due; returns the metrics of the latter."""
        return self._at(iteration, journal, self.evaluates(iteration)) if self.due(iteration) else {}

    def _at(self, iteration: int, journal: Journal | NullJournal, evaluates: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        self.ranks.watchdog.beat("sampling", patience=PATIENCE)
        if self.ranks.first or self.ranks.mesh is not None:
            try:
                with memory_explained("sampling"):
                    if self._shows(iteration):
                        self._sheet(iteration, journal)
                    if evaluates:
                        assert self.recipe.watch.evaluate is not None
                        found = self._evaluate(iteration, self.recipe.watch.evaluate, journal)
            except (OutOfMemory, ValueError) as error:  # a run that trains is not ended by being looked at
                journal.event(iteration, f"no samples: {error}")
        self.ranks.barrier("to have sampled")
        return found

    def _sheet(self, iteration: int, journal: Journal | NullJournal) -> None:
        captions = self.feed.captions_for_samples(self.recipe.watch.samples)
        images = self.sample(captions)
        statistics = {name: float(value) for name, value in colour_statistics(images).items()}
        numbers = {**statistics, **self.drift.update(statistics), "out_of_range": out_of_range(images)}
        journal.numbers(iteration, {f"samples/{name}": value for name, value in numbers.items()})
        sheet = contact_sheet(images, columns=math.ceil(math.sqrt(len(images))), captions=captions)
        journal.picture(iteration, "samples", sheet)

    def sample(self, captions: Sequence[str], seed: int = 0) -> Tensor:
        """Images [N, 3, H, W], about [-1, 1], on the CPU: caption i from noise i of the seed."""
        dtype, device = DTYPES[self.recipe.compute.dtype], self.ranks.device
        made = []
        for start in range(0, len(captions), AT_ONCE):
            some = list(captions[start : start + AT_ONCE])
            numbers = range(start, start + len(some))
            context = self._contexts[some].to(device)
            noise = sample_noise(self.recipe.seed + seed, numbers, self.feed.usual).to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
                latents = self.method.sample(noise, context)
            self.ranks.watchdog.beat("decoding samples", patience=PATIENCE)
            with torch.no_grad():
                pieces = latents.split(1 if latents[0].numel() > LARGE else AT_ONCE)
                made += [self.parts.autoencoder.decode(one).float().cpu() for one in pieces]
        return torch.cat(made)

    @cached_property
    def _contexts(self) -> SharedContexts:
        return self.parts.contexts(self.parts.cache)

    def _evaluate(self, iteration: int, config: EvaluateConfig, journal: Journal | NullJournal) -> dict[str, float]:
        if self._metrics is None:
            self._metrics = self._make_metrics(config)
        prompts = self.feed.captions_for_samples(config.prompts)
        captions = [prompt for prompt in prompts for _ in range(config.seeds)]
        images = self.sample(captions, seed=1)  # other noise than that of the sheets
        broken = int((~images.isfinite().flatten(1).all(1)).sum())
        if broken:  # the run is in trouble, which its own updates will say; it is not ended by being looked at
            journal.event(iteration, f"no evaluation: {broken} of {len(images)} samples are not finite")
            return {}
        found: dict[str, float] = self._metrics(images, captions)
        journal.numbers(iteration, {f"evaluate/{name}": value for name, value in found.items()})
        return found

    def _make_metrics(self, config: EvaluateConfig) -> Any:
        """The features, the real images' statistics, and whether captions are kept, once."""
        from ..evaluate import FeatureStatistics, ImageMetrics, MiniatureAlignment, MiniatureFeatures, load_features
        from ..zoo.miniature import detector

        if config.features is None:
            seeing = detector.load()
            features: Any = MiniatureFeatures(seeing)
            alignment: Any = MiniatureAlignment(seeing)
            variety: Any = MiniatureFeatures(seeing, "each")  # these see where things stand
        else:
            features, alignment, variety = load_features(config.features), None, None
        reference = None
        real = self.feed.real_images(config.reference) if config.reference else None
        if real is not None:
            reference = FeatureStatistics(features.name, features.width)
            reference.update(features(real))
        return ImageMetrics(features, reference, alignment, variety)
