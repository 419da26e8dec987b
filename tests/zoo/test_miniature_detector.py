"""The detector that ships reads scenes rightly, and `check` holds images to what their captions say."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from twostep.zoo.miniature import claims_of, detector, samples, shapes
from twostep.zoo.miniature.detector import Detector, Logits
from twostep.zoo.miniature.shapes import Scenes

ATTRIBUTES = [field.name for field in fields(Scenes)]


@pytest.fixture(scope="module")
def shipped() -> Detector:
    return detector.load()


def test_reads_fresh_scenes_as_rightly_as_it_claims(shipped: Detector) -> None:
    stated = json.loads(detector.WEIGHTS.with_suffix(".json").read_text())
    assert detector.WEIGHTS.stat().st_size < 1 << 20
    for disturbed, name in ((False, "clean"), (True, "disturbed")):
        found = detector.accuracy(shipped, 20_260, 512, disturbed)
        assert set(found) == {*ATTRIBUTES, "everything"} == set(stated["accuracy"][name])
        assert all(value >= 0.99 for value in found.values())
        assert all(value >= 0.99 for value in stated["accuracy"][name].values())


def test_every_kind_of_object_in_every_cell_is_read(shipped: Detector) -> None:
    kinds = torch.cartesian_prod(torch.arange(8), torch.arange(2), torch.arange(9))
    colour, n = torch.arange(len(kinds)) % 7, len(kinds)  # on gray every colour but white, which is covered above
    absent = torch.full((n,), -1)
    shape, colour, size, cell = (torch.stack([v, absent], 1) for v in (kinds[:, 0], colour, kinds[:, 1], kinds[:, 2]))
    scenes = Scenes(torch.ones(n, dtype=torch.int64), shape, colour, size, cell, torch.full((n,), 1))
    seen = detector.detect(shipped, shapes.render(scenes))
    assert all(torch.equal(getattr(seen, name), getattr(scenes, name)) for name in ATTRIBUTES)


def test_true_captions_pass_and_false_ones_do_not(shipped: Detector) -> None:
    batch = samples(3, 0, 128)
    found = detector.check(shipped, batch.images, batch.claims)
    assert found.aligned.all() and set(found.accuracies.values()) == {1.0}
    wrong = detector.check(shipped, batch.images.roll(1, 0), batch.claims)
    assert wrong.aligned.float().mean() < 0.2
    one = detector.check(shipped, batch.images[:1], claims_of([""]))
    assert one.aligned.all() and one.accuracies == {}


def test_the_drawing_of_what_is_seen_tells_clean_images_from_smeared_ones(shipped: Detector) -> None:
    batch = samples(4, 0, 32)
    smeared = F.interpolate(F.avg_pool2d(batch.images, 2), scale_factor=2.0, mode="bilinear")
    clean, blurred = (detector.check(shipped, images, batch.claims) for images in (batch.images, smeared))
    assert blurred.aligned.float().mean() > 0.9  # the words still fit
    assert clean.psnr.min() > 60 and blurred.psnr.max() < 40
    shifted = (batch.images + 0.2).clamp(-1, 1)  # a tenth of the range, where it is not cut off: at least 20 dB
    assert (detector.check(shipped, shifted, batch.claims).psnr >= 20 - 1e-3).all()


def test_reads_any_number_of_occupied_cells_in_reading_order() -> None:
    occupied = torch.full((4, 9), -1.0)
    for row, cells in enumerate(([], [4], [8, 2], [7, 5, 3])):
        occupied[row, cells] = 1.0
    shape, colour, size = (F.one_hot(torch.arange(9) % k, k).float().expand(4, -1, -1) for k in (8, 8, 2))
    scenes = detector._read(Logits(occupied, shape, colour, size, F.one_hot(torch.arange(4), 6).float()))
    assert scenes.count.tolist() == [0, 1, 2, 3] and scenes.background.tolist() == [0, 1, 2, 3]
    assert scenes.cell.tolist() == [[-1, -1], [4, -1], [2, 8], [3, 5]]
    assert scenes.shape.tolist() == [[-1, -1], [4, -1], [2, 0], [3, 5]]
    assert scenes.size.tolist() == [[-1, -1], [0, -1], [0, 0], [1, 1]]


def test_the_loss_is_least_for_the_truth() -> None:
    known = shapes.scenes(0, 0, 16)
    right = torch.full((16, 9), -20.0)
    choices = {name: torch.zeros(16, 9, k) for name, k in (("shape", 8), ("colour", 8), ("size", 2))}
    for i in range(16):
        for slot in range(int(known.count[i])):
            cell = known.cell[i, slot]
            right[i, cell] = 20.0
            for name, scores in choices.items():
                scores[i, cell, getattr(known, name)[i, slot]] = 40.0
    truth = Logits(right, **choices, background=F.one_hot(known.background, 6).float() * 40)
    assert detector.loss(truth, known) < 1e-6
    for name in ("occupied", "shape", "colour", "size", "background"):
        wrong = Logits(**{**vars(truth), name: -getattr(truth, name)})
        assert detector.loss(wrong, known) > 1


def test_training_repeats_itself_and_what_it_saves_comes_back(tmp_path: Path) -> None:
    first, second = (detector.train(seed=5, steps=2, batch=8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    untouched = Detector()
    assert not torch.equal(first.background.weight, untouched.background.weight)
    path = tmp_path / "detector.safetensors"
    detector.save(first, path, {"steps": 2})
    loaded = detector.load(path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name].half().float())
    assert json.loads(path.with_suffix(".json").read_text()) == {"steps": 2}
    with pytest.raises(ValueError, match=r"there is no .*nothing.safetensors; train one with detector.train"):
        detector.load(tmp_path / "nothing.safetensors")
