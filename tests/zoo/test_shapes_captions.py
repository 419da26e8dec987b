"""Captions say true things about scenes, and only what their claims record; text and claims are two forms of the
same.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep.zoo.miniature import captions, claims_of, judge, samples, shapes, write
from twostep.zoo.miniature.captions import CELLS, RELATIONS, Claims
from twostep.zoo.miniature.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scenes


def equal(a: Claims, b: Claims) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Claims))


def choice(words: object) -> st.SearchStrategy[int]:
    return st.integers(-1, len(words) - 1)  # type: ignore[arg-type]


@st.composite
def any_claims(draw: st.DrawFn) -> Claims:
    """Whatever the grammar can say, true of some scene or not."""
    count = draw(st.integers(0, 2))
    pairs = [
        [draw(choice(words)) if slot < count else -1 for slot in range(2)]
        for words in (SHAPES, tuple(COLOURS), tuple(SIZES))
    ]
    return Claims(
        torch.tensor([count]),
        *(torch.tensor([pair]) for pair in pairs),
        cell=torch.tensor([draw(choice(CELLS)) if count == 1 else -1]),
        relation=torch.tensor([draw(choice(RELATIONS)) if count == 2 else -1]),
        background=torch.tensor([draw(choice(BACKGROUNDS))]),
    )


@settings(max_examples=300, deadline=None)
@given(claims=any_claims())
def test_claims_come_back_from_their_caption(claims: Claims) -> None:
    assert equal(claims_of(write(claims)), claims)


def test_a_stream_of_captions_is_true_and_comes_back() -> None:
    batch = samples(5, 0, 500)
    assert equal(claims_of(batch.captions), batch.claims)
    verdict = judge(batch.claims, batch.scenes)
    assert verdict.aligned.all() and set(verdict.accuracies().values()) == {1.0}
    tail = samples(5, 490, 10)
    assert tail.captions == batch.captions[490:] and torch.equal(tail.images, batch.images[490:])


def test_captions_read_like_english() -> None:
    for caption in (
        "a large red circle at the top left on a blue background",
        "an orange star above a small ring",
        "a shape and a green shape on a striped background",
        "a large orange heart at the center",
        "two shapes on a checkered background",
        "a gray background",
        "",
    ):
        assert write(claims_of([caption])) == [caption]
    assert equal(claims_of([""]), claims_of([""])) and int(claims_of([""]).count) == 0
    assert int(claims_of(["a blue background"]).count) == 0
    nothing = claims_of([])
    assert len(nothing) == 0 and nothing.shape.shape == (0, 2)


def test_one_caption_has_many_pictures_and_every_attribute_is_sometimes_unsaid() -> None:
    drawn = shapes.scenes(6, 0, 20_000)
    claims, two = captions.say(drawn, 6, torch.arange(20_000)), drawn.count == 2
    expected = captions.SAID
    rates = {
        "objects": (claims.count > 0).float().mean(),
        "relation": (claims.relation[two] >= 0).float().mean() / expected["objects"],
        "cell": (claims.cell[~two] >= 0).float().mean() / expected["objects"],
        **{
            what: (getattr(claims, what)[two] >= 0).float().mean() / expected["objects"]
            for what in ("shape", "colour", "size")
        },
        # A caption without objects always names the background.
        "background": (claims.background[claims.count > 0] >= 0).float().mean(),
    }
    assert set(rates) == set(expected)
    for what, rate in rates.items():
        assert abs(float(rate) - expected[what]) < 0.02, what
    mentioned_first = claims.relation[two & (claims.relation >= 0)]
    assert set(mentioned_first.tolist()) == {0, 1, 2, 3}
    rows = torch.cat([getattr(drawn, field.name).view(20_000, -1) for field in fields(Scenes)], 1).tolist()
    pictures: dict[str, set[tuple[int, ...]]] = {}
    for caption, row in zip(write(claims), rows, strict=True):
        pictures.setdefault(caption, set()).add(tuple(row))
    counts = sorted(map(len, pictures.values()))
    assert counts[-10] > 20 and sum(counts) > 19_000  # hardly a picture comes twice with the same caption


def true_of(claims: Claims, scenes: Scenes, i: int) -> bool:
    """By words: is there a way of matching the objects named to the objects seen under which all is so?"""
    seen = [
        {name: int(getattr(scenes, name)[i, slot]) for name in ("shape", "colour", "size", "cell")}
        for slot in range(int(scenes.count[i]))
    ]
    background = int(claims.background[i])
    if background >= 0 and background != int(scenes.background[i]):
        return False
    count = int(claims.count[i])
    if count == 0:
        return True
    if count != len(seen):
        return False

    def fits(order: list[dict[str, int]]) -> bool:
        for slot, found in enumerate(order):
            for name in ("shape", "colour", "size"):
                claim = int(getattr(claims, name)[i, slot])
                if claim >= 0 and claim != found[name]:
                    return False
        if int(claims.cell[i]) >= 0 and int(claims.cell[i]) != order[0]["cell"]:
            return False
        if int(claims.relation[i]) >= 0:
            (ay, ax), (by, bx) = (divmod(found["cell"], 3) for found in order)
            holds = {
                "left of": ay == by and ax < bx,
                "right of": ay == by and ax > bx,
                "above": ax == bx and ay < by,
                "below": ax == bx and ay > by,
            }
            return holds[RELATIONS[int(claims.relation[i])]]
        return True

    return fits(seen) or fits(seen[::-1])


def test_judges_as_the_words_mean() -> None:
    n = 1000
    batch = samples(7, 0, n)
    other = shapes.scenes(8, 0, n)
    # Scenes that differ from the described one in one thing, and scenes that have nothing to do with it.
    changed = [replace(batch.scenes, **{field.name: getattr(other, field.name)}) for field in fields(Scenes)[1:]]
    mirrored = replace(
        batch.scenes, cell=torch.where(batch.scenes.count[:, None] == 2, batch.scenes.cell.flip(1), batch.scenes.cell)
    )
    answers = []
    for scenes in (batch.scenes, other, mirrored, *changed):
        consistent = (scenes.shape >= 0).sum(1) == scenes.count
        for name in ("colour", "size", "cell"):
            consistent &= (getattr(scenes, name) >= 0).sum(1) == scenes.count
        rows = consistent.nonzero().flatten()
        aligned = judge(batch.claims[rows], scenes[rows]).aligned.tolist()
        expected = [true_of(batch.claims, scenes, i) for i in rows.tolist()]
        assert aligned == expected
        answers += expected
    assert 0.1 < sum(answers) / len(answers) < 0.9


def test_counts_what_is_claimed_and_what_holds() -> None:
    scene = Scenes(  # a large red circle above a small blue star, on black
        *(torch.tensor(value) for value in ([2], [[0, 5]], [[0, 4]], [[1, 0]], [[1, 7]], [0]))
    )
    claims = claims_of(["a small blue star below a large green circle on a white background"])
    verdict = judge(claims, scene)
    assert {name: int(value) for name, value in verdict.said.items()} == {
        "count": 1, "shape": 2, "colour": 2, "size": 2, "cell": 0, "relation": 1, "background": 1,
    }  # fmt: skip
    assert {name: int(value) for name, value in verdict.held.items()} == {
        "count": 1, "shape": 2, "colour": 1, "size": 2, "cell": 0, "relation": 1, "background": 0,
    }  # fmt: skip
    assert verdict.accuracies()["colour"] == 0.5 and "cell" not in verdict.accuracies()
    assert not verdict.aligned.any()


def test_no_count_of_objects_but_the_claimed_one_will_do() -> None:
    scene = shapes.scenes(0, 0, 1)
    claims = claims_of(["a shape"])
    for count in range(4):
        assert bool(judge(claims, replace(scene, count=torch.tensor([count]))).aligned) == (count == 1)


@pytest.mark.parametrize(
    "caption", ["a red circel", "red circle", "a circle above", "two circles", "a circle on a pink background"]
)
def test_says_what_is_wrong_with_a_caption(caption: str) -> None:
    with pytest.raises(ValueError, match=f"'{caption}' is not a caption of the miniature; expected for example"):
        claims_of([caption])
    with pytest.raises(ValueError, match="1 captions and 2 scenes, expected one caption for each scene"):
        judge(claims_of(["a circle"]), shapes.scenes(0, 0, 2))
