"""A study: subjects by name, the same captions and noise for all, every metric against what computes it directly."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.evaluate import folders
from tests.train import tiny_pipelines
from twostep.cli import main
from twostep.evaluate import (
    MiniatureFeatures,
    frechet_distance,
    neighbour_metrics,
    prompt_diversity,
    speed,
    subjects,
    vendi_score,
)
from twostep.evaluate.command import Settings, study
from twostep.evaluate.neighbours import balls_around
from twostep.evaluate.study import NEIGHBOURS, Judge, _quality, measure, variety_order
from twostep.evaluate.subjects import Drawn, Order, Subject, draw, draw_once, identity, read_images
from twostep.images import to_bytes
from twostep.zoo import TextToImage, load_text_to_image
from twostep.zoo.miniature import claims_of, detector, samples

SMALL = {"images": 12, "captions": 3, "seeds": 2, "batch": 5}
WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.z_image(tmp_path_factory.mktemp("pipeline"))


def drawings(start: int, count: int) -> Drawn:
    made = samples(3, start, count)
    return Drawn(to_bytes(made.images), made.captions)


def save(drawn: Drawn, folder: Path, captions: Sequence[str] = ()) -> Path:
    """Images with the first captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(drawn.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    for number, caption in enumerate(captions):
        (folder / f"{number:02}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge() -> Judge:
    seeing = detector.load()
    features = MiniatureFeatures(seeing)

    def scores(images: torch.Tensor, captions: Sequence[str] | None) -> dict[str, torch.Tensor]:
        if captions is None:
            return {}
        return {"aligned": detector.check(seeing, images, claims_of(captions)).aligned.double()}

    return Judge(features, MiniatureFeatures(seeing, "each"), scores, features(drawings(500, 300).pixels()))


# Subjects


def test_subjects_are_read() -> None:
    subject = Subject.parse("base=some/where@steps=28,guidance=4,subfolder=base")
    assert subject == Subject("base", "some/where", {"steps": 28, "guidance": 4.0, "subfolder": "base"})
    assert Subject.parse("x=y@guidance_interval=.5-.95").settings == {"guidance_interval": (0.5, 0.95)}
    assert Subject.parse("runs/first").name == "first" and Subject.parse("runs/a@steps=2").name == "a steps=2"
    assert Subject.parse("a/b=c@steps=2").where == "a/b=c"
    pinned = Subject.parse("x=owner/name@v1@steps=2")
    assert pinned == Subject("x", "owner/name@v1", {"steps": 2})
    assert Subject.parse("owner/name@v1") == Subject("name@v1", "owner/name@v1", {})
    assert Subject.parse("miniature@subfolder=a@b,steps=2").settings == {"subfolder": "a@b", "steps": 2}
    for text, message in (
        ("x=y@step=2", "'step=2' is not one of steps=..., guidance=..., guidance_interval=..., eta=..., eta_"),
        ("x=y@steps", "'steps' is not one of steps=..."),
        ("owner/name@steps", "'steps' is not one of steps=..."),
        ("owner/name@steps8", "'steps8' is not one of steps=..."),
        ("owner/name@v1@v2", "'v1@v2' is not one of steps=..."),
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


def test_timing_leaves_torchs_generator_alone(pipeline: Path) -> None:
    """A teacher that renews noise is timed as it draws: with its seeds' generators."""
    model = load_text_to_image(pipeline, steps=2, eta=1.0, dtype=torch.float32)
    before = torch.get_rng_state()
    speed.speeds({"renewed": model}, Order(("a ring", "a star"), (4, 5), batch=2), rounds=1)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_images_are_read_as_they_are_shown_or_refused_by_name(tmp_path: Path) -> None:
    half = np.zeros((64, 64, 4), dtype=np.uint8)
    half[:, :32] = (255, 0, 0, 255)
    Image.fromarray(half).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half[..., :3]).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    clear, turned = read_images(sorted(tmp_path.iterdir())).images
    assert clear[:, 5, 5].tolist() == [255, 0, 0] and clear[:, 5, 60].tolist() == [255, 255, 255]
    assert turned[0, 5, 60] > 200 and turned[0, 60, 60] < 50  # the left half stands above
    Image.fromarray(np.full((64, 64), 20000, dtype=np.uint16)).save(tmp_path / "z.png")
    with pytest.raises(ValueError, match=r"z\.png has pixels of mode I;16"):
        read_images([tmp_path / "z.png"])
    (tmp_path / "z.png").write_bytes((tmp_path / "clear.png").read_bytes()[:120])
    with pytest.raises(ValueError, match=r"z\.png is damaged"):
        read_images([tmp_path / "z.png"])
    (tmp_path / "clear.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"clear\.txt is not UTF-8"):
        read_images([tmp_path / "clear.png"])


def test_numbers_that_no_pixel_can_be_are_an_error() -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 3 images hold numbers that are not finite \(rows \[1\]\)"):
        to_bytes(images)


def test_a_damaged_piece_is_drawn_anew(pipeline: Path, tmp_path: Path) -> None:
    model, order = load_text_to_image(pipeline, steps=1, dtype=torch.float32), Order(("a ring",), (1,))
    subject = Subject("a", str(pipeline), {"steps": 1})
    (drawn,) = draw_once(subject, lambda: model, [order], tmp_path, dtype=torch.float32)
    (piece,) = tmp_path.iterdir()
    for damaged in (b"", piece.read_bytes()[:50], bytes(200)):
        piece.write_bytes(damaged)
        (again,) = draw_once(subject, lambda: model, [order], tmp_path, dtype=torch.float32)
        assert torch.equal(again.images, drawn.images)


def test_a_caption_is_read_from_the_png_where_no_text_lies_beside_it(tmp_path: Path) -> None:
    made = drawings(0, 3)
    save(made, tmp_path, ["a star"])
    for number in (0, 1):
        text = PngInfo()
        text.add_itxt("prompt", "a ring")
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number:02}.png", pnginfo=text)
    assert read_images(Subject("a", str(tmp_path)).images).captions == ["a star", "a ring", ""]


def test_the_sheet_beside_images_is_none_of_them(tmp_path: Path) -> None:
    save(drawings(0, 2), tmp_path / "some")
    Image.new("RGB", (300, 64)).save(tmp_path / "some" / "sheet.png")
    (tmp_path / "alone").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "alone" / "sheet.png")
    found = [path.relative_to(tmp_path).as_posix() for path in Subject("a", str(tmp_path)).images]
    assert found == ["alone/sheet.png", "some/00.png", "some/01.png"]


def test_a_set_is_drawn_and_kept_in_pieces_of_whole_batches(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "PIECE", 5)
    model = load_text_to_image(pipeline, steps=1, dtype=torch.float32)
    order = Order(("a ring", "a star", "two shapes") * 3, tuple(range(9)), batch=2)
    assert [len(piece) for piece in order.pieces()] == [4, 4, 1]
    assert [len(piece) for piece in Order(order.captions, order.seeds, batch=7).pieces()] == [7, 2]  # a batch at least
    subject = Subject("a", str(pipeline), {"steps": 1})
    seen: list[int] = []
    loads = iter([model])  # once
    (found,) = draw_once(subject, lambda: next(loads), [order], tmp_path, dtype=torch.float32, advance=seen.append)
    whole = draw(model, order)
    assert torch.equal(found.images, whole.images) and found.captions == whole.captions
    assert (found.steps, found.evaluations) == (whole.steps, whole.evaluations) and sum(seen) == 9
    (again,) = draw_once(subject, lambda: pytest.fail("loads"), [order], tmp_path, dtype=torch.float32)
    assert torch.equal(again.images, whole.images)


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
        "recall": neighbours.recall,
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
    assert list(found.metrics)[2:4] == ["precision", "recall"]
    for name in ("frechet", "recall"):
        assert found.metrics[name].high - found.metrics[name].low > 0
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
    command += WORDS
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


def test_an_interrupted_set_goes_on(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle: the same study, not interrupted."""
    monkeypatch.setattr(subjects, "PIECE", 5)
    command = ["evaluate", f"one={pipeline}@steps=1", *WORDS, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    inner, drawn, most = TextToImage.draw, [0], 2

    def stopped(self: TextToImage, captions: Sequence[str], *rest: Any) -> torch.Tensor:
        if drawn[0] == most:
            raise KeyboardInterrupt
        drawn[0] += 1
        return inner(self, captions, *rest)

    monkeypatch.setattr(TextToImage, "draw", stopped)
    capsys.readouterr()
    assert main([*command, str(tmp_path / "out")]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "drawn").iterdir())) == 2
    drawn[0], most = 0, 100
    assert main([*command, str(tmp_path / "out")]) == 0
    assert drawn[0] == 1 + 2  # batches that were lacking: of 12 images in fives one, of 6 two
    one, other = (json.loads((tmp_path / out / "report.json").read_text())["measured"] for out in ("whole", "out"))
    assert [row["metrics"] for row in one] == [row["metrics"] for row in other]


def test_images_without_captions_have_no_score_that_a_caption_decides(tmp_path: Path) -> None:
    made = drawings(0, 12)
    silent, spoken = save(made, tmp_path / "silent"), save(made, tmp_path / "spoken", made.captions)
    both = [Subject("silent", str(silent)), Subject("spoken", str(spoken))]
    report = study(both, Settings(tmp_path / "out", **SMALL))
    real, without, with_captions = report.measured
    assert "aligned" in real.metrics and real.real and not (without.real or with_captions.real)
    assert set(with_captions.metrics) - set(without.metrics) == {"aligned"}
    assert without.metrics["psnr"].value == with_captions.metrics["psnr"].value
    report.write(tmp_path / "out")
    with (tmp_path / "out" / "report.csv").open() as file:
        named = {row["name"] for row in csv.DictReader(file) if row["metric"] == "aligned"}
    assert named == {"real images", "spoken"}
    at = [head["title"] for head in report._heads()].index("aligned")
    assert [row[at]["text"] for row in map(report._cells, report.measured)] == ["1", "", "1"]
    save(made, tmp_path / "some", made.captions[:5])
    with pytest.raises(ValueError, match=r"some: 7 of 12 images have no caption; give .* \.txt .* key `prompt`"):
        study([Subject("some", str(tmp_path / "some"))], Settings(tmp_path / "out", **SMALL))


def test_what_twostep_sample_drew_is_a_subject(pipeline: Path, tmp_path: Path) -> None:
    captions = samples(11, 0, 12).captions
    (tmp_path / "prompts.txt").write_text("\n".join(captions), encoding="utf-8")
    out = tmp_path / "sampled"
    words = ["--model", str(pipeline), "--steps", "1", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out)]
    assert main(["sample", *words]) == 0
    assert (out / "sheet.png").is_file()
    assert read_images(Subject("sampled", str(out)).images).captions == captions
    report = study([Subject("sampled", str(out))], Settings(tmp_path / "out", **SMALL))
    assert "aligned" in report.measured[1].metrics


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompts and networks of somebody's own."""
    place = tmp_path_factory.mktemp("given")
    folders.dinov2(place / "dino")
    folders.clip(place / "clip")
    (place / "prompts.txt").write_text("a ring\na star\n" * 6, encoding="utf-8")
    return {"prompts": place / "prompts.txt", "features": place / "dino", "clip": place / "clip"}


def test_real_images_are_a_row_where_there_are_enough(given: dict[str, Path], tmp_path: Path) -> None:
    made = drawings(0, 24)
    reference = save(made, tmp_path / "reference")
    subject = Subject("mine", str(save(Drawn(made.images[:12], []), tmp_path / "mine", ["a ring"] * 12)))
    settings = Settings(tmp_path / "out", **SMALL, reference=reference, **given)
    report = study([subject], settings)
    real, mine = report.measured
    assert real.real and "clip_score" in mine.metrics and "clip_score" not in real.metrics  # it has no captions
    assert "dinov2 dino, float32" in report.page() and "dinov2 dino, float32" in report.facts()["settings"]["features"]
    assert not report.notes
    save(made, reference, ["a ring"] * 15)
    with pytest.raises(ValueError, match="reference: 9 of 12 images have no caption"):
        study([subject], settings)
    (reference / "00.png").unlink()
    few = study([subject], settings)
    line = f"no row of real images: {reference} has 23 images, and 2 x --images = 24 are needed"
    assert [row.name for row in few.measured] == ["mine"]
    assert few.text().splitlines()[-1] == line and line in few.page()


def test_prompts_that_are_all_the_same_are_told_before_drawing(
    given: dict[str, Path], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "same.txt").write_text("a ring\n" * 12, encoding="utf-8")
    monkeypatch.setattr(TextToImage, "draw", lambda *_, **__: pytest.fail("it draws"))
    settings = Settings(tmp_path / "out", **SMALL, reference=tmp_path, **{**given, "prompts": tmp_path / "same.txt"})
    with pytest.raises(ValueError, match=r"same\.txt are all 'a ring': variety is measured on at least 2 different"):
        study([Subject("one", str(pipeline), {"steps": 1})], settings)


def test_a_folder_of_images_is_a_subject(tmp_path: Path) -> None:
    made = drawings(0, 12)
    save(made, tmp_path, made.captions)
    report = study([Subject("drawings", str(tmp_path))], Settings(tmp_path / "out", **SMALL))
    row = report.measured[1]
    assert row.name == "drawings" and row.steps is None and row.metrics["aligned"].value == 1.0
    with pytest.raises(ValueError, match="has 12 images, and --images is 13"):
        study([Subject("drawings", str(tmp_path))], Settings(tmp_path / "out", **{**SMALL, "images": 13}))


def test_mistakes_with_folders_of_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(drawings(0, 12), tmp_path / "images")
    (tmp_path / "empty").mkdir()
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    for subject, out, message in (
        ("images@steps=4,guidance=3", "out", "is a folder of images, which takes no steps, guidance"),
        ("empty", "out", "holds no images (.png, .jpg"),
        ("images", "images/report", "in the folder of the images images: give another folder"),
    ):
        assert main(["evaluate", f"{tmp_path}/{subject}", *words, "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    save(drawings(0, 12), tmp_path / "images")
    report = study([Subject(r"x$\foo$", str(tmp_path / "images"))], Settings(tmp_path / "out", **SMALL))
    assert report.write(tmp_path / "report")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x@steps=2", "a=y@steps=2"], "two subjects are called 'a'"),
        (["a=x@steps=2", "--images", "3"], "--images is 3, expected at least 8"),
        (["a=x@steps=2", "--prompts", "p.txt"], "--reference and --features not given"),
        (["a=/none@steps=2"], "/none does not exist"),
        (["a=x@stps=2"], "is not one of steps"),
        (["real images=x@steps=2"], "is the name of the row of real images"),
        (["a=x@steps=2", "--clip", "/none"], "--clip is /none, and there is no such file or folder"),
        (["a=x@steps=2", "--size", "96", "96"], "--size is 96 96, the miniature's judge reads images of 64 64"),
        (["a=x@steps=2", "--device", "mps"], "--device is 'mps', expected cpu, cuda or cuda:N"),
        (["a=x/y"], "x/y is no folder here, and so a pipeline of the hub's; say how many steps"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_intervals_hold_the_truth_given_the_real_images() -> None:
    """What the page and docs/evaluate.md say of them: 150 sets of 200 real images, 200 generated ones of each."""
    random, count, sets = torch.Generator().manual_seed(0), 200, 150

    def generated(many: int) -> torch.Tensor:
        return 0.9 * torch.randn(many, 8, generator=random) + 0.3

    found: dict[str, list[Any]] = {"precision": [], "density": []}
    truth: dict[str, list[float]] = {"precision": [], "density": []}
    for _ in range(sets):
        real = torch.randn(count, 8, generator=random)
        balls, many = (balls_around(real, generated(of), k=NEIGHBOURS) for of in (count, 3000))
        quality = _quality(torch.zeros(count, 1), real, balls, lambda rows: rows[:, None, :1], random, 100)
        for metric, true in (("precision", many.precise), ("density", many.inside / NEIGHBOURS)):
            found[metric].append(quality[metric])
            truth[metric].append(true.double().sum().item() / 3000)
    held = {}
    for metric, intervals in found.items():
        fresh = sum(truth[metric]) / sets
        given = sum(one.low <= true <= one.high for one, true in zip(intervals, truth[metric], strict=True))
        held[metric] = given / sets, sum(one.low <= fresh <= one.high for one in intervals) / sets
    assert all(given > 0.9 for given, _ in held.values()), held
    assert 0.8 < held["precision"][1] < 0.9 and 0.65 < held["density"][1] < 0.8, held
