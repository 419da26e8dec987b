"""The drawn data: the same scene for the same (seed, index) however it is asked for, and pixels that are what they
should be.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep.zoo.miniature import counter, shapes
from twostep.zoo.miniature.shapes import BACKGROUNDS, CELLS, CENTRES, COLOURS, PAIRS, SHAPES, SIZES, Scenes

MASK = (1 << 64) - 1


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def equal(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Scenes))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    index=st.integers(0, (1 << 62)),
    field=st.integers(0, 60),
    choices=st.integers(1, 1 << 24),
)
def test_draws_are_splitmix64_of_seed_index_and_field(seed: int, index: int, field: int, choices: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = splitmix((seed + golden) & MASK)
    bits = splitmix((splitmix((index * golden + key) & MASK) + (field + 1) * golden) & MASK)
    expected = ((bits >> 32) * choices) >> 32
    assert int(counter.draw(seed, torch.tensor([index]), field, choices)) == expected


def test_draws_are_even_and_fields_do_not_follow_each_other() -> None:
    index = torch.arange(1 << 16)
    counts = [torch.bincount(counter.draw(5, index, field, 16), minlength=16) for field in (0, 1, 40)]
    for count in counts:  # chi square of 15 degrees of freedom: beyond 45 once in ten thousand
        assert ((count - 4096).square() / 4096).sum() < 45
    both = counter.draw(5, index, 0, 16) * 16 + counter.draw(5, index, 1, 16)
    assert ((torch.bincount(both, minlength=256) - 256).square() / 256).sum() < 350  # of 255 degrees of freedom
    assert abs(counter.chance(5, index, 7, 0.3).float().mean() - 0.3) < 0.01


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 40), start=st.integers(0, 1 << 40), cut=st.integers(1, 11))
def test_a_scene_and_its_pixels_do_not_depend_on_the_batch(seed: int, start: int, cut: int) -> None:
    whole = shapes.scenes(seed, start, 12)
    images = shapes.render(whole)
    first, rest = shapes.scenes(seed, start, cut), shapes.scenes(seed, start + cut, 12 - cut)
    assert equal(whole[:cut], first) and equal(whole[cut:], rest)
    assert torch.equal(images, torch.cat([shapes.render(first), shapes.render(rest)]))
    backwards = torch.arange(11, -1, -1)
    assert equal(whole[backwards], shapes.scenes_at(seed, start + backwards))
    assert torch.equal(images[5:6], shapes.render(whole[5:6]))


def test_streams_differ() -> None:
    assert not equal(shapes.scenes(0, 0, 64), shapes.scenes(1, 0, 64))
    assert not equal(shapes.scenes(0, 0, 64), shapes.scenes(0, 64, 64))


def test_every_scene_is_legal_and_every_legal_choice_occurs() -> None:
    drawn = shapes.scenes(11, 0, 60_000)
    two = drawn.count == 2
    assert set(drawn.count.tolist()) == {1, 2} and abs(two.float().mean() - 0.5) < 0.01
    for name in ("shape", "colour", "size", "cell"):
        value = getattr(drawn, name)
        assert (value[:, 0] >= 0).all() and (value[two] >= 0).all() and (value[~two, 1] == -1).all()
    assert (drawn.colour[two, 0] != drawn.colour[two, 1]).all()
    assert set(map(tuple, drawn.cell[two].tolist())) == set(PAIRS)
    assert set(drawn.cell[~two, 0].tolist()) == set(range(CELLS))
    for slot in range(2):
        there = drawn.count > slot
        kinds = torch.stack([drawn.shape[there, slot], drawn.colour[there, slot], drawn.size[there, slot]], 1)
        assert len(kinds.unique(dim=0)) == len(SHAPES) * len(COLOURS) * len(SIZES)
        on = torch.stack([drawn.background[there], drawn.colour[there, slot]], 1).unique(dim=0)
        assert {tuple(row) for row in on.tolist()} == {(b, c) for b, row in enumerate(shapes.LEGAL) for c in row}


def test_legal_colours_are_those_that_can_be_told_from_the_background() -> None:
    def distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        return float(np.linalg.norm(np.subtract(a, b)))

    for legal, tones in zip(shapes.LEGAL, BACKGROUNDS.values(), strict=True):
        seen = {i for i, rgb in enumerate(COLOURS.values()) if min(distance(rgb, tone) for tone in tones) > 0.3}
        assert set(legal) == seen
    palette = list(COLOURS.values())
    assert min(distance(a, b) for i, a in enumerate(palette) for b in palette[:i]) > 0.3


# The oracle: is a point inside a shape of radius 1? From the shapes' definitions, without distances.


def inside_polygon(x: np.ndarray, y: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Winding number, as the sum of the angles under which the edges are seen."""
    turn = np.zeros_like(x)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, 0), strict=True):
        a, b = (ax - x) + 1j * (ay - y), (bx - x) + 1j * (by - y)
        turn += np.angle(b * a.conj())
    return np.abs(turn) > np.pi


def fill_box(vertices: np.ndarray) -> np.ndarray:
    low, high = vertices.min(0), vertices.max(0)
    return (vertices - (low + high) / 2) * 2 / (high - low).max()


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "ring":
        return (x * x + y * y <= 1) & (x * x + y * y >= 0.25)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.88
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= 0.34) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    if shape == "diamond":
        return np.abs(x) / 0.72 + np.abs(y) <= 1
    if shape == "triangle":
        half = np.sqrt(3) / 2
        return (y <= half) & (np.abs(x) <= (y + half) / np.sqrt(3))
    if shape == "star":
        angle, radius = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.0)
        return inside_polygon(x, y, fill_box(np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)))
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    curve = np.stack([16 * np.sin(t) ** 3, np.cos(4 * t) + 2 * np.cos(3 * t) + 5 * np.cos(2 * t) - 13 * np.cos(t)], 1)
    return inside_polygon(x, y, fill_box(curve))


def coverage(shape: str, radius: float, side: int, cx: float, cy: float, samples: int = 12) -> np.ndarray:
    line = (np.arange(side * samples) + 0.5) / samples
    x, y = np.meshgrid((line - cx) / radius, (line - cy) / radius)
    return inside(shape, x, y).reshape(side, samples, side, samples).mean((1, 3))


@pytest.mark.parametrize("radius", SIZES.values())
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stamp_is_the_part_of_each_pixel_that_the_shape_covers(shape: str, radius: float) -> None:
    error = np.abs(shapes.stamp(shape, radius).double().numpy() - coverage(shape, radius, 32, 16, 16))
    # 144 samples of a pixel are exact to about one row of them, 1/12; on average over the pixels far better.
    assert error.max() < 1 / 12 and error.mean() < 0.003


def test_a_picture_is_its_background_with_the_shapes_laid_over_it() -> None:
    drawn = shapes.scenes(21, 0, 8)
    tile = np.arange(64) // 8
    for i, image in enumerate(shapes.render(drawn).double().numpy()):
        name = list(BACKGROUNDS)[drawn.background[i]]
        second = (tile[None, :] + (tile[:, None] if name == "checkered" else 0 * tile[:, None])) % 2 == 1
        tones = np.array(BACKGROUNDS[name])
        picture = np.where(second[..., None], tones[-1], tones[0])
        for slot in range(int(drawn.count[i])):
            row, column = divmod(int(drawn.cell[i, slot]), 3)
            radius = list(SIZES.values())[drawn.size[i, slot]]
            alpha = coverage(SHAPES[drawn.shape[i, slot]], radius, 64, CENTRES[column], CENTRES[row], 6)[..., None]
            picture = picture * (1 - alpha) + np.array(list(COLOURS.values())[drawn.colour[i, slot]]) * alpha
        error = np.abs((image.transpose(1, 2, 0) + 1) / 2 - picture)
        assert error.max() < 1 / 6 and error.mean() < 0.002


def test_images_lie_between_minus_one_and_one_and_shapes_keep_apart() -> None:
    drawn = shapes.scenes(2, 0, 256)
    images = shapes.render(drawn, torch.float16)
    assert images.shape == (256, 3, 64, 64) and images.dtype == torch.float16
    assert images.min() >= -1 and images.max() <= 1
    large = shapes._coverage(torch.device("cpu"))[:, 1].amax(0)  # [cells, 64, 64]: whatever any large shape touches
    for a, b in PAIRS:
        assert not ((large[a] > 0) & (large[b] > 0)).any()


def test_says_what_is_wrong_with_an_index() -> None:
    with pytest.raises(ValueError, match=r"index is torch.float32 of shape \[3\], expected int64 \[n\]"):
        shapes.scenes_at(0, torch.zeros(3))
