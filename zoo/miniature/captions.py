"""What is said about a scene, and whether it is so.

    a large red circle at the top left on a blue background
    a shape above a small green star
    two shapes on a checkered background
    a striped background

Every attribute may be left unsaid, so that one caption has many pictures. What is said is kept as numbers (`Claims`),
and a caption is those numbers and nothing else: `claims_of(write(claims))` gives them back. "a circle" says that there
is one object; a caption of a background alone, or an empty one, says nothing about objects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .counter import chance
from .shapes import BACKGROUNDS, CENTRES, COLOURS, SHAPES, SIZES, Scenes

CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")  # a relation's converse is its neighbour: relation ^ 1

# How often an attribute is said. An object's attributes are drawn apart from the other's.
SAID = {"objects": 0.95, "shape": 0.8, "colour": 0.8, "size": 0.5, "cell": 0.5, "relation": 0.7, "background": 0.6}
ATTRIBUTES = ("count", "shape", "colour", "size", "cell", "relation", "background")


@dataclass(frozen=True)
class Claims:
    """What n captions say; -1 is unsaid. The columns of objects are in the order in which a caption names them."""

    count: Tensor  # [n], 1 or 2; 0: unsaid, and then nothing is said about objects
    shape: Tensor  # [n, 2]
    colour: Tensor  # [n, 2]
    size: Tensor  # [n, 2]
    cell: Tensor  # [n], of a single object
    relation: Tensor  # [n], of the first object to the second
    background: Tensor  # [n]

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice | Tensor) -> Claims:
        return Claims(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> Claims:
        return Claims(*(getattr(self, field.name).to(device) for field in fields(self)))


# Fields of the counter, after those of shapes.py.
_OBJECTS, _ORDER, _CELL, _RELATION, _BACKGROUND, _FIRST, _SECOND = 32, 33, 34, 35, 36, 40, 48


def say(scenes: Scenes, seed: int, index: Tensor) -> Claims:
    """True claims about each scene; which ones depends on (seed, index) alone."""

    def said(field: int, what: str) -> Tensor:
        return chance(seed, index, field, SAID[what])

    objects = said(_OBJECTS, "objects")
    two = objects & (scenes.count == 2)
    swap = two & chance(seed, index, _ORDER, 0.5)
    order = torch.stack([swap.long(), 1 - swap.long()], 1)
    spoken = {}
    for offset, what in enumerate(("shape", "colour", "size")):
        both = torch.stack([said(_FIRST + offset, what), said(_SECOND + offset, what)], 1) & objects[:, None]
        spoken[what] = torch.where(
            both, getattr(scenes, what).gather(1, order), -1
        )  # -1 already where there is no second
    relation = relation_of(scenes) ^ swap.long()
    return Claims(
        torch.where(objects, scenes.count, 0),
        cell=torch.where(objects & (scenes.count == 1) & said(_CELL, "cell"), scenes.cell[:, 0], -1),
        relation=torch.where(two & said(_RELATION, "relation"), relation, -1),
        # A caption that names no object names the background, or it would be empty.
        background=torch.where(said(_BACKGROUND, "background") | ~objects, scenes.background, -1),
        **spoken,
    )


def say_all(scenes: Scenes) -> Claims:
    """All that a caption can say: nothing is left open but the place of two shapes, whose relation is said."""
    alone = scenes.count == 1
    cell, relation = torch.where(alone, scenes.cell[:, 0], -1), torch.where(alone, -1, relation_of(scenes))
    return Claims(scenes.count, scenes.shape, scenes.colour, scenes.size, cell, relation, scenes.background)


def relation_of(scenes: Scenes) -> Tensor:
    """[n]: the first object's relation to the second; -1 where there are not two, or where they stand on a diagonal."""
    row, column = scenes.cell // len(CENTRES), scenes.cell % len(CENTRES)
    right, down = column[:, 1] - column[:, 0], row[:, 1] - row[:, 0]
    sideways, upright = (down == 0) & (right != 0), (right == 0) & (down != 0)
    relation = torch.where(sideways, (right < 0).long(), 2 + (down < 0).long())
    return torch.where((scenes.count == 2) & (sideways | upright), relation, -1)


def write(claims: Claims) -> list[str]:
    """One caption for each row."""
    columns = (getattr(claims, field.name).tolist() for field in fields(claims))
    return [_caption(*row) for row in zip(*columns, strict=True)]


_BACKGROUND_NAMES, _COLOUR_NAMES, _SIZE_NAMES = tuple(BACKGROUNDS), tuple(COLOURS), tuple(SIZES)


def _caption(
    count: int, shape: list[int], colour: list[int], size: list[int], cell: int, relation: int, background: int
) -> str:
    ground = "" if background < 0 else _with_article(f"{_BACKGROUND_NAMES[background]} background")
    if count == 0:
        return ground
    if count == 2 and relation < 0 and max(*shape, *colour, *size) < 0:
        words = "two shapes"
    else:
        named = [_noun_phrase(shape[i], colour[i], size[i]) for i in range(count)]
        words = f" {RELATIONS[relation] if relation >= 0 else 'and'} ".join(named)
    if cell >= 0:
        words += f" at the {CELLS[cell]}"
    return f"{words} on {ground}" if ground else words


def _noun_phrase(shape: int, colour: int, size: int) -> str:
    noun = SHAPES[shape] if shape >= 0 else "shape"
    if colour >= 0:
        noun = f"{_COLOUR_NAMES[colour]} {noun}"
    return _with_article(noun if size < 0 else f"{_SIZE_NAMES[size]} {noun}")


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _choice(name: str, words: Sequence[str]) -> str:
    return f"(?P<{name}>{'|'.join(sorted(words, key=len, reverse=True))})"


def _object(name: str) -> str:
    size, colour, shape = (f"{what}_{name}" for what in ("size", "colour", "shape"))
    adjectives = f"(?:{_choice(size, _SIZE_NAMES)} )?(?:{_choice(colour, _COLOUR_NAMES)} )?"
    return f"an? {adjectives}(?:{_choice(shape, SHAPES)}|shape)"


_GROUND = f"an? {_choice('background', _BACKGROUND_NAMES)} background"
_GRAMMAR = re.compile(
    f"(?:(?P<two>two shapes)|{_object('first')}(?: at the {_choice('cell', CELLS)}"
    f"| (?:{_choice('relation', RELATIONS)}|(?P<both>and)) {_object('second')})?)(?: on {_GROUND})?"
)
_GROUND_ALONE = re.compile(_GROUND)


def claims_of(captions: Sequence[str]) -> Claims:
    """What captions of this grammar say."""
    rows = [_parse(caption) for caption in captions]
    shapes = {field.name: (-1, 2) if field.name in ("shape", "colour", "size") else (-1,) for field in fields(Claims)}
    return Claims(
        *(torch.tensor([row[i] for row in rows], dtype=torch.int64).view(shapes[name]) for i, name in enumerate(shapes))
    )


def _parse(caption: str) -> tuple[int | list[int], ...]:
    match = (_GROUND_ALONE if caption.endswith("background") and " on " not in caption else _GRAMMAR).fullmatch(caption)
    if match is None and caption:
        raise ValueError(
            f"claims_of: {caption!r} is not a caption of the miniature; expected for example 'a large red circle at "
            f"the top left on a blue background', 'a star above an orange ring', 'two shapes' or ''"
        )
    found = match.groupdict() if match else {}

    def number(name: str, words: Sequence[str]) -> int:
        return words.index(word) if (word := found.get(name)) else -1

    pair = {
        what: [number(f"{what}_{who}", words) for who in ("first", "second")]
        for what, words in (("shape", SHAPES), ("colour", _COLOUR_NAMES), ("size", _SIZE_NAMES))
    }
    two = any(found.get(name) for name in ("two", "both", "relation"))
    alone = match is None or match.re is _GROUND_ALONE
    return (
        0 if alone else 1 + two,
        *pair.values(),
        number("cell", CELLS),
        number("relation", RELATIONS),
        number("background", _BACKGROUND_NAMES),
    )


@dataclass(frozen=True)
class Verdict:
    """For each attribute and image: how many claims were made (0, 1 or 2), and how many hold."""

    said: dict[str, Tensor]  # each [n]
    held: dict[str, Tensor]  # each [n]

    @property
    def aligned(self) -> Tensor:
        """[n]: does everything hold that the caption says?"""
        return torch.stack([self.said[name] == self.held[name] for name in ATTRIBUTES]).all(0)

    def accuracies(self) -> dict[str, float]:
        """The part of its claims that hold, for every attribute that is claimed at all."""
        return {
            name: int(self.held[name].sum()) / total for name in ATTRIBUTES if (total := int(self.said[name].sum())) > 0
        }


def judge(claims: Claims, scenes: Scenes) -> Verdict:
    """Which claims hold in which scene.

    Captions do not say which of two objects is which: the reading under which more claims hold is taken.
    """
    if len(claims) != len(scenes):
        raise ValueError(f"judge: {len(claims)} captions and {len(scenes)} scenes, expected one caption for each scene")
    said = {name: (getattr(claims, name) >= 0).long() for name in ATTRIBUTES}
    said["count"] = (claims.count > 0).long()
    readings = [_held(claims, scenes, swap) for swap in (False, True)]
    totals = [
        torch.stack([held.view(len(claims), -1).sum(1) for held in reading.values()]).sum(0) for reading in readings
    ]
    swap = totals[1] > totals[0]
    held = {}
    for name in ATTRIBUTES:
        first, second = (reading[name] & (said[name] > 0) for reading in readings)
        choice = torch.where(swap.view(-1, *[1] * (first.dim() - 1)), second, first).long()
        held[name] = choice.view(len(claims), -1).sum(1)
        said[name] = said[name].view(len(claims), -1).sum(1)
    return Verdict(said, held)


def _held(claims: Claims, scenes: Scenes, swap: bool) -> dict[str, Tensor]:
    """Claims that hold if the object named first is the scene's first, or its second. An unsaid one may match a -1."""
    order = slice(None) if not swap else torch.tensor([1, 0], device=scenes.count.device)
    held = {what: getattr(claims, what) == getattr(scenes, what)[:, order] for what in ("shape", "colour", "size")}
    relation = relation_of(scenes)
    return {
        **held,
        "count": claims.count == scenes.count,
        "cell": claims.cell == scenes.cell[:, order][:, 0],
        "relation": claims.relation == torch.where(relation < 0, -1, relation ^ int(swap)),
        "background": claims.background == scenes.background,
    }
