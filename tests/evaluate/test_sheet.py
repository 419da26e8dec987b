"""Contact sheets: every image where it belongs, captions that can be read, and nothing out of range in secret."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from twostep.evaluate.sheet import (
    LINES,
    MARGIN,
    NARROWEST,
    PAPER,
    contact_sheet,
    out_of_range,
    painted,
    wrapped,
)


def random_images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet)


@pytest.mark.parametrize(("count", "columns", "scale"), [(1, 1, 1), (5, 2, 1), (3, 7, 3), (6, 3, 2)])
def test_every_image_is_in_its_place_and_the_rest_is_paper(count: int, columns: int, scale: int) -> None:
    images = random_images(count, 3, 4, 6)
    sheet = pixels(contact_sheet(images, columns=columns, scale=scale)).copy()
    rows = math.ceil(count / columns)
    height, width = 4 * scale, 6 * scale
    assert sheet.shape == (MARGIN + rows * (height + MARGIN), MARGIN + min(columns, count) * (width + MARGIN), 3)
    for index in range(count):
        top = MARGIN + index // columns * (height + MARGIN)
        left = MARGIN + index % columns * (width + MARGIN)
        shown = sheet[top : top + height, left : left + width]
        exact = painted(images)[index].permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        assert np.array_equal(shown, exact)
        sheet[top : top + height, left : left + width] = PAPER
    assert (sheet == PAPER).all()


def test_bytes_are_the_nearest_and_the_ends_are_black_and_white() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    images = (every.double() / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(painted(images)[0, 0].flatten(), every)
    assert torch.equal(painted(images + 0.49 / 127.5)[0, 0].flatten()[:-1], every[:-1])


def test_values_that_cannot_be_shown_are_seen_and_counted() -> None:
    images = torch.zeros(1, 3, 2, 2)
    images[0, :, 0, 0] = torch.tensor([5.0, -5.0, 0.0])
    images[0, 1, 1, 1] = math.nan
    images[0, 2, 1, 0] = math.inf
    shown = painted(images)[0]
    assert shown[:, 0, 0].tolist() == [255, 0, 128]
    assert shown[:, 1, 1].tolist() == shown[:, 1, 0].tolist() == [255, 0, 255]
    assert shown[:, 0, 1].tolist() == [128, 128, 128]
    assert out_of_range(images) == 4 / 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_of_the_range_are_in_it(dtype: torch.dtype) -> None:
    assert out_of_range(torch.tensor([-1.0, 1.0, 0.0], dtype=dtype)) == 0


def test_captions_stand_below_their_images_and_move_nothing() -> None:
    images = random_images(3, 3, 8, 200)
    bare, captioned = contact_sheet(images, columns=2), contact_sheet(images, columns=2, captions=["one", "", "three"])
    assert captioned.width == bare.width and captioned.height > bare.height
    sheet = pixels(captioned)
    row = 8 + MARGIN
    assert np.array_equal(sheet[:row], pixels(bare)[:row])
    line = (captioned.height - bare.height) // 2
    half = MARGIN + 200 + MARGIN // 2
    below_first, below_second = sheet[row : row + line, :half], sheet[row : row + line, half:]
    assert (below_first < 128).any(), "the caption's ink"
    assert (below_second == PAPER).all(), "the second has no caption"
    assert (sheet[-MARGIN:] == PAPER).all()


def test_captions_of_small_images_have_room_to_be_read() -> None:
    sheet = contact_sheet(random_images(2, 3, 16, 16), columns=2, captions=["three red circles"] * 2)
    assert sheet.width == MARGIN + 2 * (NARROWEST + MARGIN)
    left = MARGIN + (NARROWEST - 16) // 2
    middle = pixels(sheet)[MARGIN : MARGIN + 16, left : left + 16]
    assert np.array_equal(middle, painted(random_images(2, 3, 16, 16))[0].permute(1, 2, 0).numpy())


@given(st.text(alphabet=st.sampled_from("ab ﬁ汉\n"), max_size=80), st.integers(3, 30))
def test_lines_fit_and_lose_nothing_unless_they_say_so(text: str, width: int) -> None:
    lines = wrapped(text, width, len)
    assert len(lines) <= LINES and all(0 < len(line) <= width for line in lines)
    given_letters, shown = "".join(text.split()), "".join("".join(lines).split())
    if shown.endswith("…"):
        assert given_letters.startswith(shown[:-1]) and len(given_letters) > len(shown) - 1
    else:
        assert shown == given_letters


def test_lines_break_between_words_where_there_are_any() -> None:
    assert wrapped("a cat  sits\non mats", 8, len) == ["a cat", "sits on", "mats"]
    assert wrapped("incomprehensible", 8, len) == ["incompre", "hensible"]
    assert wrapped("one two three four five", 5, len) == ["one", "two", "thre…"]
    assert wrapped(" ", 5, len) == []


@pytest.mark.parametrize(
    ("images", "others", "said"),
    [
        (torch.zeros(2, 1, 4, 4), {}, r"\[2, 1, 4, 4\], expected floating point \[N, 3, height, width\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, "torch.uint8"),
        (torch.zeros(0, 3, 4, 4), {}, r"\[0, 3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), {"captions": ["one"]}, "1 captions for 2 images"),
        (torch.zeros(2, 3, 4, 4), {"captions": []}, "0 captions for 2 images"),
        (torch.zeros(2, 3, 4, 4), {"columns": 0}, "columns is 0"),
        (torch.zeros(2, 3, 4, 4), {"scale": 0}, "scale 0"),
    ],
)
def test_what_makes_no_sheet_is_refused(images: Tensor, others: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        contact_sheet(images, **{"columns": 2, **others})


def test_one_text_is_no_list_of_captions() -> None:
    with pytest.raises(TypeError, match="captions is one text"):
        contact_sheet(torch.zeros(3, 3, 4, 4), columns=3, captions="cat")
