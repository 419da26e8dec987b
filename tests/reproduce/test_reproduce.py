"""Reproductions: every arm is a valid recipe, verdicts are what the numbers say, short versions run to their table."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.train import tiny_pipelines
from twostep.cli import main
from twostep.reproduce import command, concept, unsaid
from twostep.reproduce.experiments import EXPERIMENTS, TURBO_PP, Claim, Experiment
from twostep.reproduce.table import BETTER, Spread, judge, markdown
from twostep.train.command import read_recipe
from twostep.train.data import ImageFolder
from twostep.train.recipe import ImagesData
from twostep.zoo.miniature import claims_of, detector, miniature, scenes
from twostep.zoo.miniature.captions import judge as judge_captions
from twostep.zoo.miniature.captions import say_all, write
from twostep.zoo.miniature.shapes import COLOURS, SHAPES, render

NAMES = sorted(EXPERIMENTS)
SHORT = ["batch=4", "compute.threads=1", "compute.device=cpu", "watch.samples_every=null", "watch.tensorboard=false"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pipelines.z_image(tmp_path_factory.mktemp("model"))
    shutil.copytree(folder / "transformer", folder / "base")
    return folder


# What is run


@pytest.mark.parametrize("name", NAMES)
def test_arms_are_valid_recipes_and_claims_are_of_arms(name: str) -> None:
    experiment = EXPERIMENTS[name]
    arms = {arm.name: arm for arm in experiment.arms}
    assert len(arms) == len(experiment.arms)
    assert len({command._folder(_args(Path("x")), arm, 0) for arm in experiment.arms}) == len(arms)
    for arm in experiment.arms:
        assert len(arm.paper) in (0, len(experiment.columns)), arm.name
        if arm.recipe is not None:
            recipe = read_recipe(arm.recipe, list(arm.settings))
            assert recipe.model == "miniature" and recipe.compute.dtype == "float32"
    for claim in experiment.claims:
        assert {claim.better, claim.worse} <= arms.keys() and claim.metric in experiment.metrics


def test_the_base_is_guided_as_the_students_real_score() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["dp-dmd"].arms}
    recipe = read_recipe(str(arms["DMD"].recipe), list(arms["DMD"].settings))
    sampled = arms["base"].sampled
    assert recipe.guidance is not None and sampled is not None and sampled["guidance"] == recipe.guidance.scale


def test_dp_dmds_arms_are_alike_but_for_what_they_compare() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["dp-dmd"].arms if arm.recipe is not None}
    recipes = {name: read_recipe(str(arm.recipe), list(arm.settings)) for name, arm in arms.items()}
    alike = {
        name: (
            recipe.batch,
            recipe.ema,
            recipe.roles.student.source,
            recipe.roles.student.subfolder,
            recipe.roles.real_score.subfolder,
            recipe.guidance.scale,
            recipe.method.guidance_per_generator,
            recipe.optimizers.generator.lr,
            recipe.optimizers.generator.decay,
            recipe.optimizers.guidance.lr,
        )
        for name, recipe in recipes.items()
    }
    assert set(alike.values()) == {alike["DP-DMD"]}

    def more(name: str, than: str = "DP-DMD") -> set[str]:
        assert arms[name].recipe == arms[than].recipe
        return set(arms[name].settings) - set(arms[than].settings)

    assert more("DMD") == {"method.cut=false", "method.diversity=0"}
    assert more("DP-DMD without its cut") == {"method.cut=false"}
    assert more("DP-DMD, weight 1") == {"method.diversity=1"}
    assert more("turbo-pp with DP-DMD's term", "turbo-pp") == {"method.diversity=0.01"}
    assert recipes["DP-DMD, anchor .9"].roles.student.sigmas == (1, 0.9, 0)


def _args(out: Path) -> Any:
    import argparse

    return argparse.Namespace(out=out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [[], ["--iterations", "7"], ["--arms"]], ids=" ".join)
def test_the_command_that_is_written_down_makes_the_same(name: str, more: list[str]) -> None:
    """Every arm is told to train as long, whichever of the two commands is given."""
    experiment = EXPERIMENTS[name]
    words = [*more, experiment.arms[-1].name] if more == ["--arms"] else more

    def told(words: Sequence[str]) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        args = parser.parse_intermixed_args(words)
        trained = {arm.name: command._iterations(experiment, arm, args) for arm in experiment.arms if arm.recipe}
        return {"trained": trained, "arms": args.arms, "images": args.images, "overrides": args.overrides, "args": args}

    first = told([name, "--images", "50", "compute.threads=1", "guidance.weights={dmd: 2}", *words])
    again = told(shlex.split(command._command(experiment, first["args"]))[2:])
    assert {**again, "args": None} == {**first, "args": None}
    assert ({*first["trained"].values()} == {7}) == ("7" in more)


def test_the_concept_is_as_frequent_in_every_arm(tmp_path: Path) -> None:
    """Four images in a batch of 16, on the mean, and twelve prompts where there are no ordinary images."""
    concept.write_folder(tmp_path, *command.CONCEPT)
    found = {}
    for arm in EXPERIMENTS["d-opsd"].arms[1:]:
        assert arm.recipe is not None
        data = (recipe := read_recipe(arm.recipe, [one.replace("CONCEPT", str(tmp_path)) for one in arm.settings])).data
        assert isinstance(data, ImagesData)
        kept = 0 if data.keep is None else data.keep.rows(recipe.batch)
        captions = [path.read_text() for path in data.folder.glob("*.txt")]
        share = sum(concept.WORD in caption for caption in captions) / len(captions)
        found[arm.name] = (recipe.batch - kept) * share, kept
    assert {*found.values()} == {(4.0, 0), (4.0, 12)} and found["D-OPSD, prompts to keep"] == (4.0, 12)


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    """From the baseline to the full method: real images, weights, gradient."""
    by_name = {arm.name: read_recipe(arm.recipe, list(arm.settings)) for arm in TURBO_PP.arms if arm.recipe}
    seen = [
        (recipe.data.kind, recipe.roles.student.per_step, recipe.method.end_to_end)
        for name, recipe in list(by_name.items())[:4]
    ]
    assert seen == [
        ("shapes", False, False),
        ("prompts", False, False),
        ("prompts", True, False),
        ("prompts", True, True),
    ]
    assert by_name["full, per-step LoRA"].roles.student.weights == "lora"
    assert not by_name["full, no step-1 loss"].method.step_one_loss


# The concept


def test_the_concept_is_a_word_without_a_token_and_a_look_that_can_be_told() -> None:
    judge, tokenizer = detector.load(), miniature().tokenizer
    assert tokenizer(concept.WORD)["input_ids"] == [tokenizer.unk_token_id]
    drawn, said = concept.images(5, 128), concept.captions(5, 128)
    assert concept.shows(judge, drawn).all()  # small ones too
    others = scenes(1, 0, 1024)
    purple_stars = (others.count == 1) & (others.shape[:, 0] == SHAPES.index("star"))
    purple_stars &= others.colour[:, 0] == list(COLOURS).index("purple")
    assert 0 < purple_stars.sum() < 20  # one in 128
    assert torch.equal(concept.shows(judge, render(others)), purple_stars)
    assert all("zorp" in caption.split() and "star" not in caption and "purple" not in caption for caption in said)
    assert len(set(said)) > 60


def test_an_unseen_colour_has_no_place_in_the_latents() -> None:
    """Which is why the concept is none: what the autoencoder makes of cyan is never near it."""
    cyan = torch.tensor([0.05, 0.85, 0.85]).view(1, 3, 1, 1)
    palette = {name: (0.05, 0.85, 0.85) if name == concept.COLOUR else tone for name, tone in COLOURS.items()}
    drawn, mini = render(concept.concept_scenes(5, 64)[0], palette=palette), miniature()
    with torch.no_grad():
        again = mini.decode_latents(mini.encode_images(drawn))

    def near(pictures: torch.Tensor) -> torch.Tensor:
        """[n]: pixels within a quarter of it."""
        return (((pictures.float() + 1) / 2 - cyan).norm(dim=1) < 0.25).flatten(1).sum(1)

    assert near(drawn).min() >= 48 and (near(again) < 48).all()


def test_concept_images_stand_beside_their_captions(tmp_path: Path) -> None:
    """And ordinary ones after them: of any kind, whose captions leave things open, or of one shape and all said."""
    folder, judge = tmp_path / "concept", detector.load()
    concept.write_folder(folder, 5, 3, 20)
    assert sorted(path.name for path in folder.iterdir()) == ["alone", "any", "one-shape", "prompts.txt"]
    ordinary = {}
    for name, count in (("alone", 3), ("any", 23), ("one-shape", 23)):
        images = ImageFolder(folder / name, area=64 * 64)
        assert [images.caption(number) for number in range(3)] == concept.captions(5, 3) and len(images) == count
        assert concept.shows(judge, torch.stack([images[number] for number in range(3)])).all()
        ordinary[name] = [images.caption(number) for number in range(3, count)]
        if not ordinary[name]:
            continue
        seen = detector.detect(judge, torch.stack([images[number] for number in range(3, count)]))
        assert judge_captions(claims_of(ordinary[name]), seen).aligned.all()
        assert (write(say_all(seen)) == ordinary[name]) == (name == "one-shape")
        assert set(seen.count.tolist()) == ({1} if name == "one-shape" else {1, 2})
    assert (folder / "prompts.txt").read_text().splitlines() == ordinary["any"]


# What is left unsaid


def test_backgrounds_that_captions_leave_open() -> None:
    """Counted by hand; and real images, each drawn for itself, have nearly all the variety that six can have."""
    said = unsaid.captions(5, 40)
    assert len(set(said)) == 40 and not any("background" in caption for caption in said)
    assert unsaid.variety(torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])) == pytest.approx((0 + 4 / 6) / 2)
    real = unsaid.shown(detector.load(), render(scenes(6, 0, 512)), 8)
    assert 0.75 < real < 0.85


# The table


def test_intervals_are_students() -> None:
    """The oracle: scipy's table, for three numbers 4.3027 s / sqrt 3."""
    spread = Spread.of([1.0, 2.0, 4.0])
    deviation = torch.tensor([1.0, 2.0, 4.0]).std().item()
    assert spread.mean == pytest.approx(7 / 3) and spread.half == pytest.approx(
        4.3027 * deviation / math.sqrt(3), rel=1e-3
    )
    assert math.isnan(Spread.of([2.0]).half) and str(Spread.of([2.0])) == "2"


@pytest.mark.parametrize(
    ("one", "other", "metric", "verdict"),
    [
        ([1.0, 1.1, 1.3], [2.0, 2.1, 2.2], "frechet", "holds"),
        ([1.0, 1.1, 1.3], [2.0, 2.1, 2.2], "aligned", "is reversed"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], "aligned", "cannot be told"),  # the same difference thrice: no scatter seen
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.5], "aligned", "cannot be told"),
        ([1.0, 1.1, 1.2], [0.5], "aligned", "holds"),  # the other is not trained
        ([1.0], [0.5], "aligned", "cannot be told"),  # nothing tells how far seeds are apart
    ],
)
def test_verdicts(one: Sequence[float], other: Sequence[float], metric: str, verdict: str) -> None:
    values = {"a": {metric: one}, "b": {metric: other}}
    assert judge(Claim("a", "b", metric), values)[0] == verdict


def test_the_table_has_both_halves() -> None:
    values = {
        arm.name: {m: [float(n), n + 0.5] for m in TURBO_PP.metrics} for n, arm in enumerate(TURBO_PP.arms, start=1)
    }
    text = markdown(TURBO_PP, values, 2)
    assert "| teacher at 2 | 1.25 ± 3.2 |" in text and "| 50.94 | 76.53 |" in text
    assert text.count("\n| full: end to end is better than") == 3 * 5
    assert set(BETTER) >= set(TURBO_PP.metrics)


# Short versions


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PROMPTS", (command.PROMPTS[0], 8))
    monkeypatch.setattr(command, "CONCEPT", (command.CONCEPT[0], 4, 8))
    monkeypatch.setattr(command, "UNSAID", (command.UNSAID[0], 4, 2))
    words = ["reproduce", name, "--model", str(model), "--out", str(tmp_path), "--seeds", "1", "--iterations", "1"]
    assert main([*words, "--images", "8", *SHORT]) == 0
    printed = capsys.readouterr().out
    experiment: Experiment = EXPERIMENTS[name]
    assert (tmp_path / "table.md").read_text() in printed
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["values"].keys() == {arm.name for arm in experiment.arms}
    for metrics in facts["values"].values():
        assert set(experiment.metrics) <= metrics.keys()
        assert all(len(numbers) == 1 and math.isfinite(numbers[0]) for numbers in metrics.values())
    assert facts[
        "command"
    ] == f"twostep reproduce {name} --model MODEL --seeds 1 --iterations 1 --images 8 " + " ".join(SHORT)
    assert facts["command"] in printed and Image.open(tmp_path / "table.png").width > 600
    assert (tmp_path / "report" / "report.html").is_file()
    trained = [arm for arm in experiment.arms if arm.recipe]
    assert len(list(tmp_path.glob("*/seed-0/student/student.json"))) == len(trained)

    # Again, some arms alone: nothing is trained, and the table of all stays.
    before, some = (tmp_path / "table.md").read_text(), [arm.name for arm in trained[-2:]]
    assert main([*words, "--images", "8", *SHORT, "--arms", *some]) == 0
    (written,) = tmp_path.glob("results-*.json")
    found = json.loads(written.read_text())
    first = [experiment.arms[0].name] * (name == "d-opsd")  # that the others begin from
    assert list(found["values"]) == [*first, *some]
    assert all(found["values"][arm] == facts["values"][arm] for arm in found["values"])
    assert "--arms" in found["command"] and (tmp_path / "table.md").read_text() == before


def test_mistakes_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "d-opsd", "--out", str(tmp_path), "--seeds", "0"]) == 2
    assert "--seeds is 0" in capsys.readouterr().err
    assert main(["reproduce", "dp-dmd", "--out", str(tmp_path), "--arms", "dmd"]) == 2
    assert "--arms: 'dmd' is no arm of dp-dmd, expected some of base, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["reproduce", "other"])
