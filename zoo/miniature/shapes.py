"""The miniature's images: one or two coloured shapes on a background, 64 x 64, drawn by code, without end.

A scene is a row of small integers (`Scenes`); `scenes` draws them from (seed, index) alone, `render` paints them.
Positions lie on a 3 x 3 grid and sizes are two, so every scene has exactly one picture: an image can be judged against
the drawing of what it claims to show. Two shapes stand in the outer cells of one row or one column, so that exactly one
relation holds.

Painting: a shape's coverage is the box-filtered inside of its signed distance function. There are only 8 shapes x 2
sizes, so the 16 stamps are computed once and a picture is a gather and two blends: 2 x 48 KiB moved per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from .counter import draw

SIDE = 64
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star", "diamond", "heart")
COLOURS = {
    "red": (0.87, 0.13, 0.13),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.98, 0.87, 0.15),
    "green": (0.10, 0.62, 0.25),
    "blue": (0.12, 0.33, 0.88),
    "purple": (0.53, 0.17, 0.70),
    "pink": (1.00, 0.56, 0.76),
    "white": (1.00, 1.00, 1.00),
}
# One tone, or two that alternate; stripes are vertical. 8 pixels wide, as the squares of the board.
BACKGROUNDS = {
    "black": ((0.05, 0.05, 0.07),),
    "gray": ((0.50, 0.51, 0.53),),
    "blue": ((0.12, 0.33, 0.88),),
    "white": ((1.00, 1.00, 1.00),),
    "striped": ((0.16, 0.18, 0.24), (0.32, 0.35, 0.43)),
    "checkered": ((0.74, 0.71, 0.66), (0.88, 0.86, 0.82)),
}
SIZES = {"small": 8.0, "large": 13.0}  # half the side of the box that a shape fits in
CENTRES = (16, 32, 48)  # of the grid's columns and rows; on the borders of the latent's 8-pixel patches
CELLS = len(CENTRES) ** 2  # counted in reading order
# The outer cells of a row or a column, in reading order. Their centres are 32 apart, and two large shapes take 26.
PAIRS = ((0, 2), (3, 5), (6, 8), (0, 6), (1, 7), (2, 8))
# White is lost on the pale board, and every colour on itself.
_UNSEEN = {("white", "checkered"), *((name, name) for name in COLOURS)}
LEGAL = tuple(
    tuple(i for i, colour in enumerate(COLOURS) if (colour, background) not in _UNSEEN) for background in BACKGROUNDS
)
_TILE = 8
_STAMP = 32  # a stamp reaches from one centre's neighbour to the other's


@dataclass(frozen=True)
class Scenes:
    """n scenes. Objects stand in reading order; where there is one, the second column holds -1."""

    count: Tensor  # [n], 1 or 2
    shape: Tensor  # [n, 2], index into SHAPES
    colour: Tensor  # [n, 2], index into COLOURS
    size: Tensor  # [n, 2], index into SIZES
    cell: Tensor  # [n, 2], 0 .. 8
    background: Tensor  # [n], index into BACKGROUNDS

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))


# Fields of the counter. A number is never reused: captions.py goes on from 32.
_COUNT, _BACKGROUND, _PLACE, _FIRST, _SECOND = 0, 1, 2, 8, 16
_SHAPE, _COLOUR, _SIZE = 0, 1, 2


def scenes(seed: int, start: int, count: int) -> Scenes:
    """Scenes start .. start + count - 1 of the stream `seed`."""
    return scenes_at(seed, torch.arange(start, start + count))


def scenes_at(seed: int, index: Tensor) -> Scenes:
    """The scenes of these indices: a scene depends on (seed, index), on no other."""
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"scenes_at: index is {index.dtype} of shape {list(index.shape)}, expected int64 [n]")
    count = draw(seed, index, _COUNT, 2) + 1
    background = draw(seed, index, _BACKGROUND, len(BACKGROUNDS))
    two = count == 2
    pair = torch.tensor(PAIRS, device=index.device)[draw(seed, index, _PLACE, len(PAIRS))]
    single = draw(seed, index, _PLACE, CELLS)
    cell = torch.stack([torch.where(two, pair[:, 0], single), pair[:, 1]], 1)
    colour = _colours(seed, index, background)
    shape, size = (
        torch.stack([draw(seed, index, who + what, choices) for who in (_FIRST, _SECOND)], 1)
        for what, choices in ((_SHAPE, len(SHAPES)), (_SIZE, len(SIZES)))
    )
    there = torch.stack([torch.ones_like(two), two], 1)
    shape, colour, size, cell = (torch.where(there, value, -1) for value in (shape, colour, size, cell))
    return Scenes(count, shape, colour, size, cell, background)


def _colours(seed: int, index: Tensor, background: Tensor) -> Tensor:
    """Two different colours that show on the background: the second draw skips the first's place in the list."""
    longest = max(map(len, LEGAL))
    table = torch.tensor([row + (-1,) * (longest - len(row)) for row in LEGAL], device=index.device)
    choices = torch.tensor([len(row) for row in LEGAL], device=index.device)[background]
    first = draw(seed, index, _FIRST + _COLOUR, choices)
    second = draw(seed, index, _SECOND + _COLOUR, choices - 1)
    second = second + (second >= first)
    return torch.stack([table[background, first], table[background, second]], 1)


def render(
    scenes: Scenes, dtype: torch.dtype = torch.float32, *, palette: Mapping[str, Sequence[float]] = COLOURS
) -> Tensor:
    """[n, 3, 64, 64] in [-1, 1], on the scenes' device; another palette has as many colours, in the scenes' order."""
    device = scenes.count.device
    coverage = _coverage(device)
    colours = torch.tensor(list(palette.values()), device=device) * 2 - 1
    image = _backgrounds(device)[scenes.background]
    for slot in range(2):
        # Where there is no second object its place holds -1: the last shape's picture, blended with weight 0.
        there = (scenes.count > slot).float()[:, None, None, None]
        alpha = coverage[scenes.shape[:, slot], scenes.size[:, slot], scenes.cell[:, slot]][:, None] * there
        image = torch.lerp(image, colours[scenes.colour[:, slot]][:, :, None, None], alpha)
    return image.to(dtype)


@lru_cache(maxsize=4)
def _backgrounds(device: torch.device) -> Tensor:
    """[backgrounds, 3, 64, 64] in [-1, 1]."""
    tile = torch.arange(SIDE, device=device) // _TILE % 2
    pictures = []
    for name, tones in BACKGROUNDS.items():
        alternate = tile[None, :] ^ (tile[:, None] if name == "checkered" else torch.zeros_like(tile)[:, None])
        first, last = torch.tensor(tones[0], device=device), torch.tensor(tones[-1], device=device)
        pictures.append(torch.where(alternate.bool(), last[:, None, None], first[:, None, None]))
    return torch.stack(pictures) * 2 - 1


@lru_cache(maxsize=4)
def _coverage(device: torch.device) -> Tensor:
    """[shapes, sizes, cells, 64, 64]: every stamp in every cell; 2.3 MiB."""
    stamps = torch.stack([torch.stack([stamp(shape, radius) for radius in SIZES.values()]) for shape in SHAPES])
    pages = torch.zeros(len(SHAPES), len(SIZES), CELLS, SIDE, SIDE)
    half = _STAMP // 2
    for cell in range(CELLS):
        y, x = CENTRES[cell // len(CENTRES)], CENTRES[cell % len(CENTRES)]
        pages[:, :, cell, y - half : y + half, x - half : x + half] = stamps
    return pages.to(device)


def stamp(shape: str, radius: float, oversampling: int = 8) -> Tensor:
    """[32, 32]: the part of every pixel that the shape covers, its centre in the middle of the stamp.

    One sample of a distance is off by up to .2 at corners and in notches; averaging 8 x 8 of them leaves .01.
    """
    steps = _STAMP * oversampling
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / oversampling - _STAMP / 2
    points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1) / radius
    inside = (0.5 - _DISTANCE[shape](points) * radius * oversampling).clamp(0, 1)
    return inside.view(_STAMP, oversampling, _STAMP, oversampling).mean((1, 3)).float()


# Signed distances in the box [-1, 1] x [-1, 1], y downwards, negative inside; points are [..., 2].


def _circle(points: Tensor) -> Tensor:
    return points.square().sum(-1).sqrt() - 1


def _ring(points: Tensor) -> Tensor:
    return (points.square().sum(-1).sqrt() - 0.75).abs() - 0.25


def _polygon(vertices: list[tuple[float, float]]) -> Callable[[Tensor], Tensor]:
    """Distance to the nearest edge; its sign by counting the edges that a ray to the right crosses."""

    def distance(points: Tensor) -> Tensor:
        nearest = points.new_full(points.shape[:-1], math.inf)
        inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
        x, y = points.unbind(-1)
        for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
            dx, dy = bx - ax, by - ay
            along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
            nearest = torch.minimum(nearest, torch.hypot(x - ax - along * dx, y - ay - along * dy))
            if dy != 0:
                inside ^= ((y < ay) != (y < by)) & (x < ax + (y - ay) * dx / dy)
        return torch.where(inside, -nearest, nearest)

    return distance


def _star() -> list[tuple[float, float]]:
    """Five points; the pentagram's own inner radius is .38, .45 keeps the arms thick enough for 16 pixels."""
    corners = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
    return _centred([(r * math.sin(angle), -r * math.cos(angle)) for angle, r in corners])


def _heart() -> list[tuple[float, float]]:
    turn = [2 * math.pi * k / 72 for k in range(72)]
    return _centred(
        [
            (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
            for t in turn
        ]
    )


def _centred(vertices: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moved and scaled, with equal factors, to fill the box's width or height."""
    low, high = (tuple(side(v[axis] for v in vertices) for axis in (0, 1)) for side in (min, max))
    scale = 2 / max(high[0] - low[0], high[1] - low[1])
    return [((x - (low[0] + high[0]) / 2) * scale, (y - (low[1] + high[1]) / 2) * scale) for x, y in vertices]


_EDGE, _ARM = 0.88, 0.34  # half a square's side, so that its area is the circle's; half the width of a cross's arm
_CROSS = [(_ARM, 1), (_ARM, _ARM), (1, _ARM), (1, -_ARM), (_ARM, -_ARM), (_ARM, -1)]

VERTICES: dict[str, list[tuple[float, float]]] = {
    "square": [(-_EDGE, -_EDGE), (_EDGE, -_EDGE), (_EDGE, _EDGE), (-_EDGE, _EDGE)],
    "triangle": _centred([(0.0, -math.sqrt(3)), (1.0, 0.0), (-1.0, 0.0)]),
    "cross": _CROSS + [(-x, -y) for x, y in _CROSS],
    "star": _star(),
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "heart": _heart(),
}
_DISTANCE = {"circle": _circle, "ring": _ring, **{name: _polygon(vertices) for name, vertices in VERTICES.items()}}
