"""Images come cut and scaled as they should, in buckets, each with its caption; what is broken is named."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.train.data import BucketOrder, ImageFolder, Prefetch, bucket_sizes
from twostep.train.data.images import centre, fit, nearest_bucket

SMALL = {"area": 64 * 64, "factor": 16}


def save(path: Path, height: int, width: int, colour: int = 100, caption: str | None = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), colour, dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption or f"caption of {path.stem}\n", "utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine square images, four wide ones, one tall one."""
    shapes = [(70, 70)] * 9 + [(40, 80)] * 4 + [(90, 50)]
    for number, (height, width) in enumerate(shapes):
        save(tmp_path / f"part {number % 2}" / f"{number:02d}.png", height, width, colour=number * 10)
    return tmp_path


@settings(max_examples=60, deadline=None)
@given(factor=st.integers(1, 32), side=st.integers(2, 40), aspect=st.floats(1, 4))
def test_buckets_are_multiples_of_one_area_and_symmetric(factor: int, side: int, aspect: float) -> None:
    area = (side * factor) ** 2
    sizes = bucket_sizes(area, factor, aspect)
    assert (side * factor, side * factor) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes) and len(set(sizes)) == len(sizes)
    assert [w / h for h, w in sizes] == sorted(w / h for h, w in sizes)
    for h, w in sizes:
        assert h % factor == 0 and w % factor == 0 and max(h, w) <= aspect * min(h, w)
        # Half a factor of the longer side, at most, is lost or won.
        assert abs(h * w - area) <= min(h, w) * factor / 2 + 1e-9 or abs(h * w - area) <= max(h, w) * factor / 2 + 1e-9


def test_the_nearest_bucket_is_that_of_the_nearest_ratio() -> None:
    sizes = bucket_sizes(1024 * 1024, 32)
    assert len(sizes) > 10
    for h, w in itertools.product((1, 3, 7, 10), repeat=2):
        best = min(abs(math.log((b[1] / b[0]) / (w / h))) for b in sizes)
        chosen = sizes[nearest_bucket(h * 100, w * 100, sizes)]
        assert abs(math.log((chosen[1] / chosen[0]) / (w / h))) == pytest.approx(best)
    assert sizes[nearest_bucket(500, 500, sizes)] == (1024, 1024)


def ramp(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards, in steps of one."""
    row = np.broadcast_to(np.arange(width, dtype=np.uint8), (height, width))
    column = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None], (height, width))
    return Image.fromarray(np.stack([row, column, 0 * row], axis=2))


def test_the_centre_is_cut_and_nothing_is_stretched() -> None:
    same = fit(ramp(60, 100), 60, 60)  # no scaling: exactly the middle columns
    expected = torch.stack([torch.arange(20.0, 80).expand(60, 60), torch.arange(60.0)[:, None].expand(60, 60)])
    assert same.shape == (3, 60, 60) and same.dtype == torch.float32
    assert torch.allclose((same[:2] + 1) * 127.5, expected, atol=1e-4)
    half = (fit(ramp(200, 120), 50, 50) + 1) * 127.5  # 120 x 120 from row 40 on, at 2.4 pixels for one
    centres = (torch.arange(50.0) + 0.5) * 2.4 - 0.5
    inside = slice(5, -5)  # at the edges of an image the filter sees one side only
    assert float((half[0, :, inside] - centres[inside]).abs().max()) <= 0.6
    assert float((half[1, inside] - 40 - centres[inside, None]).abs().max()) <= 0.6


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(st.integers(1, 9000), st.integers(1, 9000)), number=st.integers(0, 10**6))
def test_the_cut_lies_inside_the_image_and_has_the_buckets_shape(size: tuple[int, int], number: int) -> None:
    sizes = bucket_sizes(1024 * 1024, 16)
    height, width = sizes[number % len(sizes)]
    left, top, right, bottom = centre(size, (width, height))
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) / (bottom - top) == pytest.approx(width / height)
    assert left == pytest.approx(size[0] - right, abs=1e-9) and top == pytest.approx(size[1] - bottom, abs=1e-9)


@pytest.mark.parametrize("size", [(6000, 4000), (4000, 6000), (1500, 1000)])
def test_photographs_whose_cut_rounds_beyond_their_edge_can_be_read(size: tuple[int, int]) -> None:
    sizes = bucket_sizes(1024 * 1024, 16)
    bucket = sizes[nearest_bucket(size[1], size[0], sizes)]
    assert fit(Image.new("RGB", size), *bucket).shape[1:] == bucket


def test_resampling_is_pillows_lanczos() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    expected = np.asarray(noise.crop((0, 16, 64, 80)).resize((32, 32), Image.Resampling.LANCZOS))
    found = (fit(noise, 32, 32) + 1) * 127.5
    # Inside, where the filter does not reach over the edge of the cut.
    inner = torch.from_numpy(expected.astype(np.float32)).permute(2, 0, 1)[:, 6:-6, 6:-6]
    assert torch.allclose(found[:, 6:-6, 6:-6], inner, atol=1e-3)
    extremes = fit(Image.fromarray(np.array([[[0, 255, 255]] * 4] * 4, dtype=np.uint8)), 4, 4)
    assert extremes[:, 0, 0].tolist() == [-1, 1, 1]


def test_reads_images_with_the_captions_beside_them(folder: Path) -> None:
    images = ImageFolder(folder, **SMALL)
    assert len(images) == 14
    assert [entry.path.stem for entry in images.entries] == [f"{n:02d}" for n in [*range(0, 14, 2), *range(1, 14, 2)]]
    for number, entry in enumerate(images.entries):
        assert images.caption(number) == f"caption of {entry.path.stem}"
        colour = int(entry.path.stem) * 10 / 127.5 - 1
        image = images[number]
        assert float((image - colour).abs().max()) < 1e-6
        original = Image.open(entry.path)
        wanted = original.width / original.height
        assert abs(math.log(image.shape[2] / image.shape[1] / wanted)) < 0.15
    assert sorted(len(bucket) for bucket in images.buckets) == [1, 4, 9]


def test_reads_metadata(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.jpg", 64, 64, caption=None)
    save(tmp_path / "2.webp", 64, 64, caption=None)
    rows = [{"file_name": "a/1.jpg", "caption": " one "}, {"file_name": "2.webp", "caption": "two", "more": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    images = ImageFolder(tmp_path, **SMALL)
    assert [images.caption(i) for i in range(2)] == ["two", "one"]


def test_turns_by_exif_and_lays_transparency_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    wide = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8), 40, 0).repeat(40, 1))
    wide.save(tmp_path / "a.png", exif=exif)
    clear = np.zeros((64, 64, 4), dtype=np.uint8)
    clear[:, :32] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    images = ImageFolder(tmp_path, **SMALL)
    turned = images[0]
    assert turned.shape[1] > turned.shape[2]  # tall, as it is shown
    assert turned[:, 2, 2].tolist() == [1, -1, -1] and turned[:, -2, 2].tolist() == [-1, -1, 1]
    assert images[1][:, 30, 4].tolist() == [1, -1, -1] and images[1][:, 30, -4].tolist() == [1, 1, 1]


def test_a_png_that_xmp_turns_has_the_bucket_that_it_is_shown_in(tmp_path: Path) -> None:
    note = PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    Image.new("RGB", (90, 50)).save(tmp_path / "a.png", pnginfo=note)
    (tmp_path / "a.txt").write_text("a")
    shown = ImageFolder(tmp_path, **SMALL)[0]
    assert shown.shape[1] > shown.shape[2]


def test_takes_linked_folders_and_other_kinds_of_image_and_leaves_hidden_ones(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    save(folder / "a.png", 64, 64)
    save(folder / ".trash" / "b.png", 64, 64)
    save(folder / ".c.png", 64, 64)
    for ending in ("gif", "tiff", "jfif"):
        save(elsewhere / f"{ending}.png", 64, 64, caption=None).unlink()
        with Image.new("RGB", (64, 64)) as image:
            image.save(elsewhere / f"{ending}.{ending}", format="JPEG" if ending == "jfif" else None)
        (elsewhere / f"{ending}.txt").write_text(ending)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    images = ImageFolder(folder, **SMALL)
    assert [entry.path.name for entry in images.entries] == ["a.png", "gif.gif", "jfif.jfif", "tiff.tiff"]
    assert [images[number].shape for number in range(4)] == [(3, 64, 64)] * 4


def test_names_captions_of_which_it_is_not_clear_what_they_are_of(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 64, 64)
    save(tmp_path / "a.jpg", 64, 64)
    (tmp_path / "b.heic").write_bytes(b"?")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "README.txt").write_text("of no image")
    found = ImageFolder.check(tmp_path)
    assert len(found) == 2
    assert "a.txt is the caption of a.jpg and of a.png" in found[0]
    assert "b.heic has a caption and none of the endings of images: .png, .jpg" in found[1]


def test_batches_of_buckets_hold_one_size_and_go_on_where_they_were(folder: Path) -> None:
    images = ImageFolder(folder, **SMALL)
    whole = list(itertools.islice(BucketOrder(images.buckets, 3, seed=4), 20))
    sizes = [{tuple(images[item].shape) for item in items} for _, items in whole]
    assert all(len(of_batch) == 1 for of_batch in sizes) and len(set.union(*sizes)) == 3
    first = Prefetch(BucketOrder(images.buckets, 3, seed=4))
    head = [next(first) for _ in range(7)]
    state = first.state_dict()
    first.close()
    rest = []
    for rank in range(2):  # on two ranks from here on
        resumed = BucketOrder(images.buckets, 3, seed=4, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        rest.append(list(itertools.islice(resumed, 6)))
    assert head + [batch for pair in zip(*rest, strict=True) for batch in pair] == whole[:19]


def test_names_every_file_that_is_broken_or_has_no_caption(folder: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError, match=r"^image folder: ") as caught:
            ImageFolder(folder, **SMALL)
        return str(caught.value)

    good = save(folder / "z good.png", 64, 64)
    assert ImageFolder.check(folder) == []
    save(folder / "a none.png", 64, 64, caption=None)
    save(folder / "b empty.png", 64, 64, caption=" ")
    save(folder / "c latin.png", 64, 64).with_suffix(".txt").write_bytes("caf\xe9".encode("latin-1"))
    save(folder / "d nothing.png", 64, 64).write_bytes(b"not an image")
    Image.fromarray(np.zeros((64, 64), dtype=np.uint16)).save(save(folder / "e deep.png", 64, 64))
    wrong = ["a none.png has no caption: there is no a none.txt", "b empty.png has no caption: b empty.txt is empty"]
    wrong += [
        "c latin.txt is not UTF-8",
        "d nothing.png cannot be read as an image",
        "e deep.png has pixels of mode I;16",
    ]
    assert "has 5 files to repair or remove" in message() and all(one in message() for one in wrong)
    half = save(folder / "f half.png", 64, 64)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(half)
    half.write_bytes(half.read_bytes()[:2000])  # the header is whole
    found = ImageFolder.check(folder)
    assert len(found) == 6 and all(sum(one in line for line in found) == 1 for one in [*wrong, "f half.png is damaged"])
    for name in "abcde":
        for path in folder.glob(f"{name} *"):
            path.unlink()
    images = ImageFolder(folder, **SMALL)
    with pytest.raises(ValueError, match=r"f half\.png is damaged"):
        images[next(i for i, entry in enumerate(images.entries) if entry.path == half)]
    assert images.entries[-1].path == good


def test_names_every_line_of_metadata_that_is_wrong(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        save(tmp_path / name, 64, 64, caption=None)
    lines = [
        '{"file_name": "1.png", "caption": "one"}',
        '{"file_name": "1.png", "caption": "again"}',
        "{",
        '{"file_name": 3}',
    ]
    lines += ['{"file_name": "no.png", "caption": "x"}', '{"file_name": "2.png", "caption": ""}']
    lines += [r'{"file_name": "3.png", "caption": "half \ud83d"}', '{"file_name": "a/../1.png", "caption": "x"}']
    lines += ['{"file_name": "../1.png", "caption": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = "\n".join(ImageFolder.check(tmp_path))
    for part in (
        "line 2, names 1.png a second time",
        "line 3, is not {",
        "line 4, is not",
        "line 5, names no.png, which",
        "line 7, is not",
        "line 8, names a/../1.png a second time",
        "line 9, names ../1.png, which is not in the folder",
    ):
        assert part in found
    assert "line 6, is not" in found and "2.png has no caption" in found and "3.png has no caption" in found
    with pytest.raises(ValueError, match=r"and 5 more: ImageFolder\.check"):
        ImageFolder(tmp_path, **SMALL)


def test_refuses_folders_and_buckets_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        ImageFolder(tmp_path / "no")
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path)
    for arguments, message in (
        ((0, 1), "area is 0"),
        ((100, 11), "less than one square"),
        ((9, 1, 0.5), "max_aspect is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            bucket_sizes(*arguments)
