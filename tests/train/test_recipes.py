"""The recipes of the package: each is valid as it stands, and each trains on a tiny pipeline of its model's classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from twostep.cli import main
from twostep.train.command import RECIPES, read_recipe
from twostep.train.configuration import ConfigurationError, dump, load, resolved
from twostep.train.recipe import Recipe

from . import tiny_runs
from .run_server import Server

NAMES = sorted(path.stem for path in RECIPES.glob("[!_]*.yaml"))
METHODS = ("turbo-pp", "dp-dmd", "d-opsd", "decoupled-dmd", "flow-matching")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["roles.student.steps=3"], "roles.student.steps is 3, and turbo_pp trains 2"),
        (["data.teacher=null"], "write them with `twostep cache`"),
        (["method.inherited=1"], "did you mean 'inherit'?"),
        (["roles.student.weights=lora", "roles.fake_score.source=x"], "an adapter begins as the one base"),
        (["roles.fake_score.weights=lora"], "adapters need the one frozen base"),
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
    ],
)
def test_contradictions_are_errors_that_name_both_sides(
    changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "z-image-turbo-pp", *changes]) == 2
    assert message in capsys.readouterr().err


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
