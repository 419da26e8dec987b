"""What is in an image: the judge of whether the miniature drew what its caption says.

A small convolutional net looks at each of the 9 cells through the 32 x 32 pixels around it and says what stands there,
if anything, and which background the image has. Read in reading order, the occupied cells are a `Scenes`, so that
claims are checked by the same code in a drawing (`captions.judge`) and in a generated image (`check`). A count of 0, or
of 3 and more, is reported as it is and satisfies no caption that says one.

A net that has only seen shapes takes a blob for the nearest one. Every scene has exactly one picture, though, so
`redraw` paints what was detected, and the distance to that picture says how cleanly an image was drawn.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import Claims, Verdict, judge
from .shapes import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, Scenes, render, scenes

WEIGHTS = Path(__file__).parent / "weights" / "detector.safetensors"
_OUTPUTS = (1, len(SHAPES), len(COLOURS), len(SIZES))  # of a cell: occupied or not, shape, colour, size


@dataclass(frozen=True)
class Logits:
    occupied: Tensor  # [n, cells]
    shape: Tensor  # [n, cells, shapes]
    colour: Tensor  # [n, cells, colours]
    size: Tensor  # [n, cells, sizes]
    background: Tensor  # [n, backgrounds]


class Detector(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_layer(3, width, stride=2),
            *_layer(width, 2 * width, stride=2),
            *_layer(2 * width, 2 * width),
            *_layer(2 * width, 3 * width, stride=2),
        )  # [n, 3 * width, 8, 8], a column for 8 pixels
        # Four columns wide and two apart: exactly the 32 pixels around each cell's centre.
        self.cells = nn.Sequential(
            nn.Conv2d(3 * width, 4 * width, 4, stride=2), nn.SiLU(), nn.Conv2d(4 * width, sum(_OUTPUTS), 1)
        )
        self.background = nn.Linear(3 * width, len(BACKGROUNDS))

    def forward(self, images: Tensor) -> Logits:
        """images: [n, 3, 64, 64] in [-1, 1]."""
        hidden, whole = self.penultimate(images)
        cells = self.cells[2](hidden).flatten(2).transpose(1, 2)  # [n, cells, outputs]
        occupied, shape, colour, size = cells.split(_OUTPUTS, 2)
        return Logits(occupied.squeeze(2), shape, colour, size, self.background(whole))

    def penultimate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the last, linear layers read: [n, 4 * width, 3, 3] of the cells, [n, 3 * width] of the whole image."""
        features = self.features(images)
        return self.cells[:2](features), features.mean((2, 3))


def _layer(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()


@torch.no_grad()
def detect(detector: Detector, images: Tensor, batch: int = 256) -> Scenes:
    """The scenes that images show: the first two occupied cells in reading order, and how many there are."""
    found = [_read(detector(part.float())) for part in images.split(batch)]
    return Scenes(*(torch.cat([getattr(part, name) for part in found]) for name in Scenes.__dataclass_fields__))


def _read(logits: Logits) -> Scenes:
    occupied = logits.occupied > 0
    # Occupied cells first, in reading order: their numbers, and numbers past the last for the others.
    number = torch.arange(CELLS, device=occupied.device)
    order = torch.where(occupied, number, CELLS + number).argsort(1)[:, :2]
    there = occupied.gather(1, order)

    def read(choice: Tensor) -> Tensor:
        return torch.where(there, choice.gather(1, order), -1)

    shape, colour, size = (read(scores.argmax(2)) for scores in (logits.shape, logits.colour, logits.size))
    cell = torch.where(there, order, -1)
    return Scenes(occupied.sum(1), shape, colour, size, cell, logits.background.argmax(1))


@dataclass(frozen=True)
class Check:
    aligned: Tensor  # [n] bool: everything that the caption says is so
    accuracies: dict[str, float]  # of the claims about each attribute, the part that holds
    verdict: Verdict
    scenes: Scenes  # what was seen
    psnr: Tensor  # [n], dB: the image against the drawing of what was seen; how cleanly it is drawn


def check(detector: Detector, images: Tensor, claims: Claims) -> Check:
    """Does each image [n, 3, 64, 64] show what its caption says?"""
    seen = detect(detector, images)
    verdict = judge(claims, seen)
    return Check(verdict.aligned, verdict.accuracies(), verdict, seen, redraw(images, seen))


def redraw(images: Tensor, seen: Scenes) -> Tensor:
    """[n], dB: the peak signal-to-noise ratio of images against the drawings of these scenes."""
    error = (images.float().clamp(-1, 1) - render(seen)) / 2
    return -10 * error.square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def loss(logits: Logits, scenes: Scenes) -> Tensor:
    """Cross entropy of everything; of a cell's shape, colour and size only where something stands."""
    there = scenes.cell >= 0
    row, slot = there.nonzero(as_tuple=True)
    cell = scenes.cell[there]
    occupied = torch.zeros_like(logits.occupied).index_put((row, cell), torch.ones((), device=cell.device))
    total = F.binary_cross_entropy_with_logits(logits.occupied, occupied) * CELLS
    total = total + F.cross_entropy(logits.background, scenes.background)
    for what in ("shape", "colour", "size"):
        total = total + F.cross_entropy(getattr(logits, what)[row, cell], getattr(scenes, what)[row, slot])
    return total


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """What generated images suffer and drawings do not: blur, noise and wrong brightness, to each image its own."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator) * (high - low) + low

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(0, 0.8))
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.12)
    return images * uniform(0.9, 1.05) + uniform(-0.06, 0.06) + noise


def train(seed: int, steps: int, batch: int = 128, rate: float = 3e-3) -> Detector:
    """Trains a detector on scenes 0 .. steps * batch - 1 of the stream `seed`, disturbed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate, weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        known = scenes(seed, step * batch, batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = detector(disturb(render(known), generator))
        objective = loss(Logits(*(getattr(logits, name).float() for name in Logits.__dataclass_fields__)), known)
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    return detector.eval()


def accuracy(detector: Detector, seed: int, count: int, disturbed: bool = False) -> dict[str, float]:
    """The part of scenes 0 .. count - 1 of a stream read rightly, for every attribute and for all at once."""
    right: dict[str, int] = {}
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, 256):
        known = scenes(seed, start, min(256, count - start))
        images = render(known)
        seen = detect(detector, disturb(images, generator) if disturbed else images)
        same = {
            name: (getattr(seen, name) == getattr(known, name)).view(len(known), -1).all(1)
            for name in Scenes.__dataclass_fields__
        }
        same["everything"] = torch.stack(list(same.values())).all(0)
        for name, flags in same.items():
            right[name] = right.get(name, 0) + int(flags.sum())
    return {name: hits / count for name, hits in right.items()}


def save(detector: Detector, path: str | Path, facts: dict[str, object]) -> None:
    """The weights in half precision, and beside them, as json, what is known about them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in detector.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def load(path: str | Path = WEIGHTS) -> Detector:
    """The detector that comes with the package, or that `save` wrote, in single precision."""
    if not Path(path).is_file():
        raise ValueError(
            f"detector.load: there is no {path}; train one with detector.train and write it with detector.save"
        )
    detector = Detector()
    detector.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return detector.eval().requires_grad_(False)
