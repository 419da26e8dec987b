"""Seconds for an image of several models, in turns: a drift of the machine falls on all of them alike.

A round is one batch of every model. The median round counts; one round goes ahead that does not, and makes what is made
once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from ..zoo import TextToImage
from .subjects import Order

ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    seconds: float  # for an image, from caption to pixels
    network_seconds: float  # for an image, of the transformer alone


def speeds(models: Mapping[str, TextToImage], order: Order, rounds: int = ROUNDS) -> dict[str, Speed]:
    """
    Args:
        order: its first batch is what is drawn.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(1 + rounds):
        for name, model in models.items():
            taken[name].append(_once(model, order))
    return {name: Speed(*(median(part) for part in zip(*turns[1:], strict=True))) for name, turns in taken.items()}


def _once(model: TextToImage, order: Order) -> tuple[float, float]:
    rows = order.batches()[0]
    start = _now(model)
    context = model.contexts(order.captions[rows])
    noise, generators = model.start(order.seeds[rows], order.size)
    begun = _now(model)
    latents = model.latents(noise, context, generator=generators)
    done = _now(model)
    model.images(latents)
    return (_now(model) - start) / rows.stop, (done - begun) / rows.stop


def _now(model: TextToImage) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
