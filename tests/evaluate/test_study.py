"""A study: subjects by name, the same captions and noise for all, every metric against what computes it directly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.train import tiny_pipelines
from twostep.cli import main
from twostep.evaluate import (
    MiniatureFeatures,
    frechet_distance,
    neighbour_metrics,
    prompt_diversity,
    speed,
    vendi_score,
)
from twostep.evaluate.command import Settings, study
from twostep.evaluate.study import Judge, measure, variety_order
from twostep.evaluate.subjects import Drawn, Order, Subject, draw, identity, read_images, to_bytes
from twostep.zoo import TextToImage, load_text_to_image
from twostep.zoo.miniature import claims_of, detector, samples

SMALL = {"images": 12, "captions": 3, "seeds": 2, "batch": 5}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.z_image(tmp_path_factory.mktemp("pipeline"))


def drawings(start: int, count: int) -> Drawn:
    made = samples(3, start, count)
    return Drawn(to_bytes(made.images), made.captions)


@pytest.fixture(scope="module")
def judge() -> Judge:
    seeing = detector.load()
    features = MiniatureFeatures(seeing)

    def scores(images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"aligned": detector.check(seeing, images, claims_of(captions)).aligned.double()}

    return Judge(features, MiniatureFeatures(seeing, "each"), scores, features(drawings(500, 300).pixels()))


# Subjects


def test_subjects_are_read() -> None:
    subject = Subject.parse("base=some/where@steps=28,guidance=4,subfolder=base")
    assert subject == Subject("base", "some/where", {"steps": 28, "guidance": 4.0, "subfolder": "base"})
    assert Subject.parse("x=y@guidance_interval=.5-.95").settings == {"guidance_interval": (0.5, 0.95)}
    assert Subject.parse("runs/first").name == "first" and Subject.parse("runs/a@steps=2").name == "a steps=2"
    assert Subject.parse("a/b=c@steps=2").where == "a/b=c"
    for text, message in (
        ("x=y@step=2", "'step=2' is not one of steps=..., guidance=..., guidance_interval=..., eta=..., eta_"),
        ("x=y@steps=two", "steps is 'two', expected a number"),
        ("x=y@guidance_interval=.5", "guidance_interval is '.5', expected two numbers, such as 0.5-0.95"),
        ("x=", "expected .NAME=.WHERE"),
    ):
        with pytest.raises(ValueError, match=message):
            Subject.parse(text)


def test_what_is_drawn_is_the_models(pipeline: Path) -> None:
    model = load_text_to_image(pipeline, steps=2, dtype=torch.float32)
    order = Order(("a ring", "a star", "two shapes"), (4, 5, 6), batch=2)
    seen: list[int] = []
    drawn = draw(model, order, seen.append)
    assert seen == [2, 1] and drawn.images.dtype == torch.uint8 and drawn.captions == list(order.captions)
    expected = to_bytes(model.draw(order.captions, order.seeds))
    assert (drawn.images.int() - expected.int()).abs().max() <= 1
    assert (drawn.steps, drawn.evaluations) == (2, 2)


def test_models_are_timed_in_turns(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stops for a while, once, leaves the medians alone; more steps take longer."""
    model = {steps: load_text_to_image(pipeline, steps=steps, dtype=torch.float32) for steps in (1, 8)}
    order = Order(("a ring", "a star", "two shapes"), (4, 5, 6), batch=2)
    turns: list[int] = []
    inner = TextToImage.latents

    def latents(self: TextToImage, *given: Any, **more: Any) -> torch.Tensor:
        turns.append(self.steps)
        return inner(self, *given, **more)

    monkeypatch.setattr(TextToImage, "latents", latents)
    clock = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)) * (1 + 100 * (len(turns) == 3)))
    found = speed.speeds({"one": model[1], "eight": model[8]}, order, rounds=3)
    assert turns == [1, 8] * 4
    # The clock ticks once a look: a batch of two, of three looks after the first.
    assert found["one"] == speed.Speed(3 / 2, 1 / 2)
    assert found["eight"] == speed.Speed(3 / 2, 1 / 2)


def test_identity_follows_weights_settings_and_order(pipeline: Path, tmp_path: Path) -> None:
    order = Order(("a ring",), (4,))
    known = identity(Subject("a", str(pipeline), {"steps": 2}), order, torch.float32)
    assert known == identity(Subject("other name", str(pipeline), {"steps": 2}), order, torch.float32)
    changed = [
        identity(Subject("a", str(pipeline), {"steps": 3}), order, torch.float32),
        identity(Subject("a", str(pipeline), {"steps": 2}), Order(("a ring",), (5,)), torch.float32),
        identity(Subject("a", str(pipeline), {"steps": 2}), order, torch.bfloat16),
    ]
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.touch()
    changed.append(identity(Subject("a", str(pipeline), {"steps": 2}), order, torch.float32))
    assert len({known, *changed}) == 5


def test_images_of_a_folder_come_with_their_captions(tmp_path: Path) -> None:
    made = samples(3, 0, 3)
    for number, image in enumerate(to_bytes(made.images)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(made.captions[number] + "\n")
    paths = Subject("a", str(tmp_path)).images
    found = read_images(paths)
    assert torch.equal(found.images, to_bytes(made.images)) and found.captions == made.captions
    Image.new("RGB", (32, 64)).save(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"3.png is 64 x 32, and .*0.png is 64 x 64"):
        read_images(Subject("a", str(tmp_path)).images)


# Measuring


def test_every_number_is_that_of_the_metric_itself(judge: Judge) -> None:
    drawn, many = drawings(0, 200), drawings(900, 40)
    varied = Drawn(many.images, [("a", "b")[number % 2] for number in range(40)])
    found = measure("drawn", drawn, varied, judge, color="red")
    real, fake = judge.real[:200], judge.features(drawn.pixels())
    neighbours = neighbour_metrics(real, fake)
    each = judge.variety(varied.pixels())
    expected = {
        "frechet": frechet_distance(fake, real),
        "aligned": 1.0,
        "precision": neighbours.precision,
        "density": neighbours.density,
        "coverage": neighbours.coverage,
        "diversity": prompt_diversity(each, varied.captions),
        "vendi": vendi_score(each),
    }
    assert found.metrics.keys() == expected.keys() and found.facts == {"color": "red"}
    for name, value in expected.items():
        interval = found.metrics[name]
        assert interval.value == pytest.approx(value, rel=1e-9), name
        assert interval.low <= interval.value <= interval.high, name
    assert found.metrics["frechet"].high - found.metrics["frechet"].low > 0
    again = measure("drawn", drawn, varied, judge)
    assert again.metrics == found.metrics  # the same intervals every time
    with pytest.raises(ValueError, match="400 images, and 300 real ones"):
        measure("drawn", drawings(0, 400), None, judge)


def test_parts_of_images_may_be_frechets_samples(judge: Judge) -> None:
    each = judge.variety
    assert isinstance(each, MiniatureFeatures)
    drawn = drawings(0, 100)
    real, fake = each(drawings(500, 100).pixels()), each(drawn.pixels())
    by_cells = Judge(each, each, judge.scores, real, each.cells_of)
    found = measure("drawn", drawn, None, by_cells).metrics
    true = frechet_distance(each.cells_of(fake).flatten(0, 1), each.cells_of(real).flatten(0, 1))
    assert found["frechet"].value == pytest.approx(true, rel=1e-9)
    # Everything else is of whole images.
    alone = measure("drawn", drawn, None, Judge(each, each, judge.scores, real)).metrics
    assert found["precision"] == alone["precision"]


def test_worse_images_are_found_worse(judge: Judge) -> None:
    good = drawings(0, 200)
    blended = (good.images.int() + good.images.roll(1, 0).int()) // 2
    bad = Drawn(blended.to(torch.uint8), good.captions)
    well, badly = (measure("x", one, None, judge).metrics for one in (good, bad))
    assert badly["frechet"].low > well["frechet"].high
    assert badly["aligned"].high < well["aligned"].low
    assert badly["precision"].value < well["precision"].value


def test_the_variety_set_has_its_own_noise() -> None:
    order = Order(("a", "b", "a", "c"), (0, 1, 2, 3), (32, 32), 7)
    varied = variety_order(order, 2, 3)
    assert varied.captions == ("a", "a", "a", "b", "b", "b") and len(set(varied.seeds) | {0, 1, 2, 3}) == 10
    assert (varied.size, varied.batch) == ((32, 32), 7)


# The command


def test_the_command_compares_and_keeps_what_it_drew(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "evaluate",
        f"two={pipeline}@steps=2",
        f"one={pipeline}@steps=1,guidance=3",
        "--out",
        str(tmp_path / "out"),
    ]
    command += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["real", "two", "one"]
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in facts["measured"]}
    assert rows["one"]["evaluations"] == 2 and rows["one"]["facts"]["guidance"] == 3.0
    assert rows["real images"]["metrics"]["aligned"]["value"] == 1.0
    kept = sorted((tmp_path / "out" / "drawn").iterdir())
    assert len(kept) == 4 and not [path for path in kept if path.suffix != ".safetensors"]

    monkeypatch.setattr(TextToImage, "draw", lambda *_, **__: pytest.fail("it draws again"))
    assert main([*command, "--apart"]) == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text())["measured"]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in facts["measured"]]
    assert all(row["network_seconds"] > 0 for row in again[1:])  # measured, never kept


def test_a_folder_of_images_is_a_subject(tmp_path: Path) -> None:
    made = samples(11, 0, 12)
    for number, image in enumerate(to_bytes(made.images)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(made.captions[number])
    report = study([Subject("drawings", str(tmp_path))], Settings(tmp_path / "out", **SMALL))
    row = report.measured[1]
    assert row.name == "drawings" and row.steps is None and row.metrics["aligned"].value == 1.0
    with pytest.raises(ValueError, match="has 12 images, and --images is 13"):
        study([Subject("drawings", str(tmp_path))], Settings(tmp_path / "out", **{**SMALL, "images": 13}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x@steps=2", "a=y@steps=2"], "two subjects are called 'a'"),
        (["a=x@steps=2", "--images", "3"], "--images is 3, expected at least 8"),
        (["a=x@steps=2", "--prompts", "p.txt"], "--reference and --features not given"),
        (["a=/none@steps=2"], "there is no folder /none"),
        (["a=x@stps=2"], "is not one of steps"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
