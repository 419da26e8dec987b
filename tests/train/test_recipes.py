"""The recipes of the package: each is valid as it stands, and each trains on a tiny pipeline of its model's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from twostep.cli import main
from twostep.evaluate import MiniatureAlignment
from twostep.train.command import RECIPES, read_recipe
from twostep.train.configuration import ConfigurationError, dump, load, resolved
from twostep.train.engine import signature
from twostep.train.recipe import ALIGNED, ImagesData, PromptsData, Recipe
from twostep.zoo.miniature import detector, samples

from . import tiny_runs
from .run_server import Server

NAMES = sorted(path.stem for path in RECIPES.glob("[!_]*.yaml"))
METHODS = ("turbo-pp", "dp-dmd", "d-opsd", "decoupled-dmd", "flow-matching")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny_runs.Place]:
    return {family: tiny_runs.make_place(family, tmp_path_factory.mktemp(family)) for family in ("z-image", "klein")}


def test_every_method_has_one_for_every_model() -> None:
    models = ("miniature", "z-image", "klein-4b", "klein-9b")
    assert {f"{model}-{method}" for model in models for method in METHODS} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_survives_being_written_down(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name, [])
    dump(recipe, tmp_path / "recipe.yaml")
    assert load(Recipe, tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str, server: Server, places: dict[str, tiny_runs.Place], tmp_path: Path) -> None:
    """Every model's source becomes the tiny pipeline of its classes; all else but numbers of steps stays."""
    place = places["klein" if name.startswith("klein") else "z-image"]
    recipe = resolved(read_recipe(name, []))
    recipe["model"] = str(place.model)
    for role in recipe["roles"].values():
        if role is None:
            continue
        if role.get("source") is not None:
            role["source"] = str(place.model)
        if "subfolder" in role:
            role["subfolder"] = "transformer"  # the tiny one has no other
    data = recipe["data"]
    if data["kind"] == "prompts":
        data |= {"prompts": str(place.prompts), "contexts": str(place.cache / "contexts")}
        data["teacher"] = None if data["teacher"] is None else str(place.cache / "teacher")
    if data["kind"] == "images":
        data |= {"folder": str(place.images), "vision": None}  # the tiny pipeline brings its own
    recipe |= {"out": str(tmp_path), "iterations": 1, "batch": 2, "accumulate": 1}
    recipe["parallel"]["kind"] = "ddp"  # FSDP's own test is test_ranks.py
    recipe["compute"] |= {"device": "cpu", "threads": 1}
    recipe["watch"] |= {"samples": 2, "every": 1}
    if recipe["watch"]["evaluate"] is not None:
        recipe["watch"]["evaluate"] |= {"every": 1, "prompts": 2, "seeds": 2, "reference": 4}
    if "sample_steps" in recipe["method"]:
        recipe["method"]["sample_steps"] = 2
    statuses, printed = server.run(recipe)
    assert statuses == [0], printed
    assert (tmp_path / "student" / "student.json").is_file()
    assert list((tmp_path / "samples").glob("*.png"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("miniature-")])
def test_of_the_miniature_says_what_it_will_be(name: str, places: dict[str, tiny_runs.Place], capsys: Any) -> None:
    place, kind = places["z-image"], read_recipe(name, []).data
    given = [f"data.folder={place.images}"] if isinstance(kind, ImagesData) else []
    if isinstance(kind, PromptsData):
        given = [f"data.prompts={place.prompts}", "data.contexts=null", f"data.teacher={place.cache / 'teacher'}"]
        given = given if kind.teacher is not None else given[:2]
    assert main(["train", name, *given, "watch.evaluate=null", "--dry-run"]) == 0
    assert "peak of a generator update" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("miniature-decoupled-dmd", "guidance.scale=0.5", "guidance.scale is 0.5, and decoupled_dmd takes"),
        ("miniature-decoupled-dmd", "guidance.weights.dmd=2", "decoupled_dmd has method.dm_weight"),
        ("miniature-dp-dmd", "method.teacher_steps=0", "teacher_steps is 0, expected at least 1"),
    ],
)
def test_what_a_method_cannot_run_with_is_an_error(name: str, change: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_recipe(name, [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["roles.student.steps=3"], "roles.student.steps is 3, and turbo_pp trains 2"),
        (["data.teacher=null"], "write them with `twostep cache`"),
        (["method.inherited=1"], "did you mean 'inherit'?"),
        (["roles.fake_score.subfolder=base"], "subfolder is 'base' and source is null, the real score's"),
        (["roles.fake_score={weights: lora, rank: 0}"], "rank is 0, expected at least 1"),
        (["checkpoints.keep_best=[frechet, min]"], "watch.evaluate, which would measure it, is not"),
        (["ema=1"], "ema is 1"),
        (["optimizers.generator.lr=-1"], "lr is -1"),
        (["parallel.replicas=2", "parallel.kind=ddp"], "with 'ddp' every rank is a replica"),
        (["batch=0"], "batch is 0"),
        (["method.guidance_per_generator=0"], "guidance_per_generator is 0"),
        (["method.step_one_loss=false", "method.inherit=0"], "step 1 would learn nothing"),
        (["compute.threads=0"], "threads is 0"),
        (["watch.evaluate.every=0"], "every is 0"),
        (["watch.evaluate.prompts=1", "watch.evaluate.seeds=1"], "at least 2 images"),
        (["checkpoints.keep_best=[frechett, min]", "watch.evaluate={}"], "did you mean 'frechet'?"),
        (["checkpoints.keep_best=[alignment/colours, max]", "watch.evaluate={}"], "did you mean 'alignment/colour'?"),
        (
            ["checkpoints.keep_best=[frechet, min]", "watch.evaluate={reference: 0}"],
            "watch.evaluate.reference is 0: without real images there is no Frechet distance",
        ),
        (
            ["checkpoints.keep_best=[alignment/aligned, max]", "watch.evaluate={features: dino}"],
            "what captions say is the miniature's detector's to judge",
        ),
        (["roles.student.rank=8"], "roles.student.rank is 8, and its weights are 'full'"),
        (["roles.fake_score.alpha=8"], "roles.fake_score.alpha is 8.0, and its weights are 'full'"),
        (["optimizers.generator.muon_lr=1"], "muon_lr is 1.0, and kind is 'adamw': it would change nothing"),
        (["optimizers.generator.eps=0"], "eps is 0.0"),
        (["optimizers.generator.kind=muon", "optimizers.generator.muon_momentum=1"], "muon_momentum 1.0"),
        (["guidance.lowest=1"], "lowest is 1.0, expected a level from 0 up to 1"),
        (["guidance.weights.dmd=-1"], "dmd is -1.0, expected at least 0"),
        (["guidance.r1_noise=0"], "r1_noise is 0.0"),
        (["method.inherit=-1"], "inherit is -1.0, expected a share from 0 on"),
        (["method.inherit_clip=-1"], "inherit_clip is -1.0, expected a number above 0"),
        (["roles.student.shift=-3"], "shift is -3.0, expected a number above 0"),
        (["roles.student.sigmas=[0,0.5,1]"], "sigmas are [0.0, 0.5, 1.0], expected to fall from 1 to 0"),
        (["roles.student.sigmas=[0.9,0.5,0]"], "sigmas are [0.9, 0.5, 0.0], expected to fall from 1 to 0"),
        (["roles.real_score={shift: 0}"], "shift is 0.0, expected a number above 0"),
        (["optimizers.generator.last=0.5"], "last is 0.5, and decay is 'none': it would change nothing"),
        (["method.end_to_end=false", "method.inherit=0.5"], "end_to_end is off: nothing is inherited"),
    ],
)
def test_contradictions_are_errors_that_name_both_sides(
    changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "z-image-turbo-pp", *changes]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["guidance.loss=hinge"], "guidance.loss is 'hinge', and dp_dmd has no discriminator"),
        (
            ["guidance.weights.generator_gan=5"],
            "weights.generator_gan is 5.0, and dp_dmd has no discriminator",
        ),
        (
            ["checkpoints.keep_best=[frechet, min]", "watch.evaluate={}", "data.teacher=null", "data.contexts=null"],
            "data.teacher is null: without real images there is no Frechet distance",
        ),
    ],
)
def test_what_a_method_would_not_read(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "z-image-dp-dmd", *changes]) == 2
    assert message in capsys.readouterr().err


def test_levels_that_leave_no_room_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "miniature-dp-dmd", "--dry-run", "guidance.lowest=0.9"]) == 2
    said = capsys.readouterr().err
    assert "guidance.lowest is 0.9, and re-noise levels lie between it and the input" in said
    assert "expected less than 0.75" in said


def test_a_device_that_there_is_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "miniature-dp-dmd", "compute.device=xyz", f"out={tmp_path}"]) == 2
    assert "compute.device is 'xyz', expected cpu, cuda or cuda:N" in capsys.readouterr().err


def test_prompts_are_kept_by_the_method_that_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    keep = "data.keep={prompts: p.txt}"
    recipe = read_recipe("z-image-d-opsd", [keep, "data.keep.share=.75", "batch=8"])
    assert isinstance(recipe.data, ImagesData) and recipe.data.keep is not None and recipe.data.keep.rows(8) == 6
    unread = "data.keep is given, and {} does not read it: only d_opsd does"
    images = "data={kind: images, folder: i, keep: {prompts: p.txt}}"
    of = "data.keep.share is {} of a batch of {}, which leaves no room for {}"
    cases = {
        ("z-image-d-opsd", keep, "data.keep.share=1"): "share is 1.0, expected a number between 0 and 1",
        ("z-image-d-opsd", keep, "data.keep.share=.1", "batch=4"): of.format(0.1, 4, "prompts"),
        ("z-image-d-opsd", keep, "batch=1"): of.format(0.5, 1, "prompts"),
        ("z-image-d-opsd", keep, "data.keep.share=.9", "batch=2"): of.format(0.9, 2, "images"),
        ("z-image-d-opsd", "data.keep.share=.3"): "data.keep.prompts: missing",
        ("z-image-d-opsd", keep, "method.on_policy=false"): "with method.on_policy=false every caption needs an image",
        ("z-image-flow-matching", keep): unread.format("flow_matching"),
        ("z-image-decoupled-dmd", images): unread.format("decoupled_dmd"),
        ("z-image-dp-dmd", images): unread.format("dp_dmd"),
    }
    for words, message in cases.items():
        assert main(["train", *words]) == 2
        assert message in capsys.readouterr().err


def test_homes_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = read_recipe("miniature-turbo-pp", ["out=~/run", "data.contexts=~/c", "data.prompts=~/p.txt"])
    assert recipe.out == tmp_path / "run"
    assert isinstance(recipe.data, PromptsData)
    assert recipe.data.contexts == tmp_path / "c" and recipe.data.prompts == tmp_path / "p.txt"


def test_the_best_may_be_by_all_that_the_detector_judges() -> None:
    drawn = samples(0, 0, 64)  # what few captions do not claim is not judged
    seen = MiniatureAlignment(detector.load())(drawn.images, drawn.captions)
    assert set(ALIGNED) == set(seen)


def test_a_method_refuses_roles_that_it_has_not() -> None:
    with pytest.raises(ConfigurationError, match="d_opsd has the roles average"):
        read_recipe("z-image-d-opsd", ["roles.real_score={}"])
    with pytest.raises(ConfigurationError, match="flow_matching has no real score to guide"):
        read_recipe("z-image-flow-matching", ["guidance={}"])


def test_overrides_may_stand_around_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "z-image-turbo-pp", "batch=0", "--fresh", "ema=1"]) == 2
    said = capsys.readouterr().err
    assert "batch is 0" in said and "ema is 1" in said
    with pytest.raises(SystemExit):
        main(["train", "z-image-turbo-pp", "--fresh", "--no-such-option"])
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def test_the_command_lists_recipes_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)
    assert main(["train", "--keys"]) == 0
    keys = capsys.readouterr().out
    assert "optimizers.generator.lr" in keys and "method.inherit" in keys
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in keys.splitlines()[2:]]
    assert not [key for key, *_, meaning in rows if not meaning and not key.split(" ")[0].endswith("kind")]
    assert main(["train"]) == 2 and main(["train", "no-such-recipe"]) == 2
    assert "there is no recipe 'no-such-recipe'" in capsys.readouterr().err


def test_the_resolved_recipe_is_kept_with_the_run(
    server: Server, places: dict[str, tiny_runs.Place], tmp_path: Path
) -> None:
    recipe: dict[str, Any] = tiny_runs.recipe(places["z-image"], "dp_dmd", "lora", tmp_path, iterations=1)
    assert server.run(recipe)[0] == [0]
    kept = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert kept["roles"]["student"]["rank"] == 2 and kept["guidance"] is None and kept["seed"] == 0
    facts = (tmp_path / "environment.jsonl").read_text()
    assert '"torch"' in facts and '"git"' in facts and '"ranks": 1' in facts


def test_a_checkpoint_belongs_to_what_settings_mean_and_not_to_how_they_are_said() -> None:
    def of(*changes: str) -> dict[str, Any]:
        return signature(read_recipe("miniature-turbo-pp", list(changes)), {}, {})

    plain = of()
    assert of("optimizers.generator.lr=1e-6", "optimizers.guidance.lr=1e-6", "iterations=7") == plain
    assert of("optimizers.guidance=null") == plain
    assert of("roles.fake_score.rank=null", "roles.discriminator.hidden=null") == plain
    assert of("optimizers.guidance.kind=muon") != plain
    assert of("roles.discriminator.hidden=8") != plain
