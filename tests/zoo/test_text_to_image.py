"""A model that draws: a pipeline's images for a teacher, a run's own for a student, and each image its seed's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tests.train import tiny_runs
from tests.train.run_server import Server
from twostep.export import export_folder, export_single_file
from twostep.train.data import noise_generator
from twostep.zoo import Student, Teacher, TwoStepStudent, load_backbone, load_student, load_text_to_image

from .models import relative_error


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_runs.Place:
    return tiny_runs.make_place("z-image", tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def runs(place: tiny_runs.Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each kind, as a run leaves it."""
    server, made = Server(), {}
    try:
        for weights in tiny_runs.WEIGHTS:
            made[weights] = tmp_path_factory.mktemp(weights)
            recipe = tiny_runs.recipe(place, "turbo_pp", weights, made[weights], iterations=1, ema=None)
            statuses, printed = server.run(recipe)
            assert statuses == [0], printed
    finally:
        server.close()
    return made


def test_a_pipeline_draws_what_diffusers_draws(place: tiny_runs.Place) -> None:
    from diffusers import ZImagePipeline

    model = load_text_to_image(place.model, steps=4, guidance=3.0, dtype=torch.float32)
    assert (model.steps, model.evaluations()) == (4, 8)
    noise = model.noise([5, 6])
    found = model.images(model.latents(noise, model.contexts(["a red circle", "two shapes"])))
    pipeline = ZImagePipeline.from_pretrained(place.model)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        ["a red circle", "two shapes"], height=64, width=64, num_inference_steps=4, guidance_scale=2.0,
        latents=noise, output_type="pt", negative_prompt=["", ""],
    ).images  # fmt: skip
    assert relative_error((found + 1) / 2, expected) <= 1e-4


def test_an_image_is_its_captions_and_its_seeds(place: tiny_runs.Place) -> None:
    model = load_text_to_image(place.model, steps=2, dtype=torch.float32)
    both = model.draw(["a red circle", "two shapes"], [5, 6])
    alone = model.draw(["two shapes"], [6])
    assert both.shape == (2, 3, 64, 64) and both.abs().max() <= 1
    assert relative_error(alone, both[1:]) <= 1e-5
    assert relative_error(model.draw(["two shapes"], [7]), alone) > 1e-3
    assert model.draw(["a ring"], [0], size=(32, 48)).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="the size is 60 x 64, expected multiples of 8"):
        model.draw(["a ring"], [0], size=(60, 64))
    with pytest.raises(ValueError, match="2 captions and 1 seeds"):
        model.draw(["a ring", "a star"], [0])


@pytest.mark.parametrize("weights", tiny_runs.WEIGHTS)
def test_a_runs_student_is_the_one_that_was_trained(
    weights: str, runs: dict[str, Path], place: tiny_runs.Place
) -> None:
    student = load_student(runs[weights], dtype=torch.float32)
    assert isinstance(student, TwoStepStudent) and student.sigmas == (1.0, 0.75, 0.0)
    assert not any(p.requires_grad for p in student.parameters())
    saved = torch.stack([p.double().square().sum() for p in student.first.parameters()]).sum()
    other = torch.stack([p.double().square().sum() for p in student.second.parameters()]).sum()
    assert saved != other  # a network a step
    # The oracle: the parameters that the run's last checkpoint holds.
    from safetensors.torch import load_file

    (path,) = sorted((runs[weights] / "checkpoints").glob("step-*"))[-1:]
    kept = next(load_file(file) for file in path.rglob("student.safetensors"))
    mine = {name: p.detach() for name, p in student.named_parameters()}
    assert mine.keys() == kept.keys() and all(torch.equal(mine[name], kept[name]) for name in kept)
    model = load_text_to_image(runs[weights] / "student", dtype=torch.float32)
    assert isinstance(model.model, Student) and (model.steps, model.evaluations()) == (2, 2)
    noise, context = model.noise([3]), model.contexts(["a red circle"])
    assert torch.equal(model.latents(noise, context), student.sample(noise, context))


def test_adapters_find_their_base_where_it_is_now(
    runs: dict[str, Path], place: tiny_runs.Place, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    for file in (runs["lora"] / "student").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    facts = json.loads((folder / "student.json").read_text())
    facts["base"] = ["/nowhere", "transformer"]
    (folder / "student.json").write_text(json.dumps(facts))
    noise = torch.randn(1, 4, 16, 16, generator=noise_generator(0, "test"))
    context = load_text_to_image(place.model, steps=2, dtype=torch.float32).contexts(["a ring"])
    moved = load_student(folder, base=place.model, dtype=torch.float32)
    assert torch.equal(
        moved.sample(noise, context), load_student(runs["lora"], dtype=torch.float32).sample(noise, context)
    )
    with pytest.raises(ValueError, match="/nowhere does not exist"):
        load_student(folder)


def test_adapters_know_their_base(runs: dict[str, Path], place: tiny_runs.Place, tmp_path: Path) -> None:
    """In any precision and wherever it lies; and another of its shape, one weight apart, is refused."""
    for dtype in (torch.float32, torch.bfloat16):
        load_student(runs["lora"], dtype=dtype, fused=dtype == torch.float32)
    other = tmp_path / "other"
    shutil.copytree(place.model, other)
    transformer = ZImageTransformer2DModel.from_pretrained(other / "transformer")
    with torch.no_grad():
        transformer.layers[0].attention.to_q.weight[0, 0] += 0.1
    transformer.save_pretrained(other / "transformer")
    with pytest.raises(ValueError, match=r"were trained on other weights than those in .*other/transformer"):
        load_student(runs["lora"], base=other, dtype=torch.float32)


def test_an_image_with_renewed_noise_is_of_its_seed_too(place: tiny_runs.Place) -> None:
    model = load_text_to_image(place.model, steps=3, eta=1.0, dtype=torch.float32)
    one = model.draw(["a ring"], [5])
    with_others = model.draw(["a star", "a ring"], [4, 5])
    assert (one - with_others[1:]).abs().max() < 1e-4
    plain = load_text_to_image(place.model, steps=3, dtype=torch.float32).draw(["a ring"], [5])
    assert (one - plain).abs().max() > 1e-2
    noise, generators = model.start([4, 5])
    assert torch.equal(noise, model.noise([4, 5]))
    by_hand = model.images(model.latents(noise, model.contexts(["a star", "a ring"]), generator=generators))
    assert torch.equal(by_hand, with_others)


def test_a_base_takes_the_steps_of_its_runs_samples_or_those_that_are_given(
    place: tiny_runs.Place, tmp_path: Path
) -> None:
    """A run of flow matching leaves no student of one step."""
    server = Server()
    try:
        recipe = tiny_runs.recipe(place, "flow_matching", "full", tmp_path, iterations=1, ema=None)
        recipe["method"] |= {"sample_steps": 3, "sample_guidance": 2.0}
        recipe["roles"]["student"]["steps"] = 1
        statuses, printed = server.run(recipe)
        assert statuses == [0], printed
    finally:
        server.close()
    base = load_backbone(tmp_path / "student" / "transformer", dtype=torch.float32)
    for given, steps, guidance in (({}, 3, 2.0), ({"steps": 2, "guidance": 1.5}, 2, 1.5)):
        model = load_text_to_image(tmp_path, dtype=torch.float32, **given)
        noise, context = model.noise([1]), model.contexts(["a ring"])
        teacher = Teacher(base, steps=steps, guidance=guidance, negative=model.contexts([""]))
        assert relative_error(model.latents(noise, context), teacher.sample(noise, context)) < 1e-6
    with pytest.raises(ValueError, match="is no student but a base that flow matching has trained"):
        export_folder(tmp_path, tmp_path / "out")
    assert export_single_file(tmp_path, tmp_path / "file").folder.is_dir()  # of weights alone


def test_wrong_folders_are_explained(runs: dict[str, Path], place: tiny_runs.Place, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a student, which has steps of its own"):
        load_text_to_image(runs["full"], steps=4)
    with pytest.raises(ValueError, match="and guidance is 1, which is none"):
        load_text_to_image(place.model, steps=4, guidance_interval=(0.5, 0.9))
    with pytest.raises(ValueError, match="and eta is 0, which is none: give eta too"):
        load_text_to_image(place.model, steps=4, eta_interval=(0.5, 0.9))
    with pytest.raises(ValueError, match="leave out steps, guidance, eta and shift"):
        load_text_to_image(runs["full"], eta=1.0)
    with pytest.raises(
        ValueError, match=r"the subfolder is 'transformer', and .* is a student, whose networks are its"
    ):
        load_text_to_image(runs["full"], subfolder="transformer")
    with pytest.raises(ValueError, match="say how many steps"):
        load_text_to_image(place.model)
    with pytest.raises(ValueError, match=r"neither model_index.json \(a pipeline\) nor student.json"):
        load_text_to_image(tmp_path, steps=2)
    with pytest.raises(ValueError, match="does not exist; expected a diffusers folder"):
        load_text_to_image(tmp_path / "none", steps=2)
    with pytest.raises(ValueError, match=r"has no student.json"):
        load_student(tmp_path)
    (tmp_path / "student.json").write_text('{"sigmas": [1, 0.75, 0]}')
    with pytest.raises(ValueError, match="does not say pipeline, steps"):
        load_student(tmp_path)


def test_a_teacher_is_what_load_backbone_and_teacher_make(place: tiny_runs.Place) -> None:
    model = load_text_to_image(place.model, steps=3, dtype=torch.float32, subfolder="transformer")
    noise, context = model.noise([1]), model.contexts(["a ring"])
    teacher = Teacher(load_backbone(place.model, dtype=torch.float32), steps=3)
    assert torch.equal(model.latents(noise, context), teacher.sample(noise, context))
