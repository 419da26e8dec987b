"""Teacher.sample gives what diffusers' pipelines give, from the same noise and prompt embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    ZImagePipeline,
)
from torch import Tensor

from twostep.zoo import Context, Teacher, load_backbone, sigma_grid

from .models import Case, flux2, fused_backbone, relative_error, stock_model, z_image

SIZE = (8, 12)


def vae_of(case: Case) -> Any:
    torch.manual_seed(0)
    kind = AutoencoderKL if case.family == "z-image" else AutoencoderKLFlux2
    channels = case.config["in_channels"] // (1 if case.family == "z-image" else 4)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return kind(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, layers_per_block=1, **blocks)


def save_pipeline(case: Case, folder: Path) -> None:
    model = stock_model(case)
    if case.family == "z-image":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = ZImagePipeline(scheduler, vae_of(case), None, None, model)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
        pipeline = Flux2KleinPipeline(scheduler, vae_of(case), None, None, model)
    pipeline.save_pretrained(folder)


Z_IMAGE = Case("z-image", z_image(), lengths=(5, 40))
KLEIN = Case("flux2", flux2(), lengths=None)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for case in (Z_IMAGE, KLEIN):
        folders[case.family] = tmp_path_factory.mktemp(case.family)
        save_pipeline(case, folders[case.family])
    return folders


def last_latents(seen: list[Tensor]) -> Any:
    def on_step_end(pipeline: Any, step: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(kwargs["latents"])
        return kwargs

    return on_step_end


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize(("guidance", "truncation"), [(1.0, 1.0), (3.5, 1.0), (3.5, 0.2), (3.5, 0.6)])
def test_z_image_pipeline(pipelines: dict[str, Path], steps: int, guidance: float, truncation: float) -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, *SIZE, generator=g)
    captions = [torch.randn(n, 20, generator=g) for n in (5, 40)]
    empty = torch.randn(3, 20, generator=g)
    pipeline = ZImagePipeline.from_pretrained(pipelines["z-image"], text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    pipeline(
        prompt_embeds=list(captions),
        negative_prompt_embeds=[empty, empty],
        height=SIZE[0] * 2,
        width=SIZE[1] * 2,
        num_inference_steps=steps,
        guidance_scale=guidance - 1,  # the pipeline's scale is ours less one
        cfg_truncation=truncation,
        latents=noise,
        output_type="latent",
        callback_on_step_end=last_latents(seen),
    )
    teacher = Teacher(
        load_backbone(pipelines["z-image"], dtype=torch.float32),
        guidance=guidance,
        negative=Context(empty[None]),
        guidance_interval=(1 - truncation, 1.0),
    )
    context = Context(torch.nn.utils.rnn.pad_sequence(captions, batch_first=True), torch.tensor([5, 40]))
    states: list[Tensor] = []
    found = teacher.sample(noise, context, steps=steps, on_step=lambda _, x: states.append(x))
    assert len(states) == len(seen) == steps
    for state, true in zip(states, seen, strict=True):
        assert relative_error(state, true) <= 1e-5
    assert torch.equal(found, states[-1])


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_klein_pipeline(pipelines: dict[str, Path], steps: int, guidance: float) -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 8, *SIZE, generator=g)
    features, empty = torch.randn(2, 7, 24, generator=g), torch.randn(1, 7, 24, generator=g)
    pipeline = Flux2KleinPipeline.from_pretrained(pipelines["flux2"], text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    pipeline(
        prompt_embeds=features,
        negative_prompt_embeds=empty.expand(2, -1, -1),
        height=SIZE[0] * 4,
        width=SIZE[1] * 4,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
        callback_on_step_end=last_latents(seen),
    )
    backbone = load_backbone(pipelines["flux2"], dtype=torch.float32)
    teacher = Teacher(backbone, guidance=guidance, negative=Context(empty))
    states: list[Tensor] = []
    teacher.sample(noise, Context(features), steps=steps, on_step=lambda _, x: states.append(x))
    assert len(states) == len(seen) == steps
    for state, true in zip(states, seen, strict=True):
        assert relative_error(state, true.transpose(1, 2).unflatten(2, SIZE)) <= 1e-5


def test_the_grids_are_the_published_ones() -> None:
    assert sigma_grid(2) == (1, 0.75, 0)
    assert sigma_grid(4) == (1, 0.9, 0.75, 0.5, 0)
    expected = (1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0)
    assert all(abs(a - b) < 5e-5 for a, b in zip(sigma_grid(8), expected, strict=True))
    assert sigma_grid(4, 1) == (1, 0.75, 0.5, 0.25, 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_a_grid_is_the_schedulers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert torch.allclose(scheduler.sigmas, torch.tensor(sigma_grid(steps)), atol=1e-7)


def test_guidance_is_the_usual_scale() -> None:
    """w = 1 is the conditional velocity, w = 0 the unconditional one, and it is linear in between and beyond."""
    backbone = fused_backbone(Z_IMAGE)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *SIZE, generator=g)
    context = Context(torch.randn(2, 40, 20, generator=g), torch.tensor([5, 40]))
    negative = Context(torch.randn(1, 3, 20, generator=g))
    teacher = Teacher(backbone, negative=negative)
    with torch.no_grad():
        v = {w: teacher.velocity(x, 0.6, context, guidance=w) for w in (0.0, 1.0, 3.0)}
        assert relative_error(v[0.0], backbone.velocity(x, 0.6, negative.repeat(2))) <= 1e-5
        assert torch.equal(v[1.0], backbone.velocity(x, 0.6, context))
        assert relative_error(v[3.0], 3 * v[1.0] - 2 * v[0.0]) <= 1e-5
        clean = teacher.clean(x, torch.tensor([0.6, 0.2]), context, guidance=3.0)
        assert relative_error(clean[0], (x - 0.6 * v[3.0])[0]) <= 1e-5


def test_an_interval_of_guidance_is_each_samples_own() -> None:
    """Levels inside and outside in one batch; and what it saves is counted."""
    backbone = fused_backbone(Z_IMAGE)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *SIZE, generator=g)
    context = Context(torch.randn(3, 40, 20, generator=g))
    negative = Context(torch.randn(1, 3, 20, generator=g))
    whole = Teacher(backbone, guidance=3.0, negative=negative)
    parted = Teacher(backbone, guidance=3.0, negative=negative, guidance_interval=(0.6, 0.95))
    sigma = torch.tensor([0.94, 0.61, 0.59])
    with torch.no_grad():
        guided, found = whole.velocity(x, sigma, context), parted.velocity(x, sigma, context)
        alone = backbone.velocity(x, sigma, context)
        assert torch.equal(found[:2], guided[:2]) and relative_error(found[2:], alone[2:]) <= 1e-5
        assert relative_error(guided[2:], alone[2:]) > 1e-3
        assert torch.equal(parted.velocity(x, 0.59, context), backbone.velocity(x, 0.59, context))
        assert torch.equal(parted.velocity(x, 0.96, context), backbone.velocity(x, 0.96, context))
        assert torch.equal(parted.velocity(x, torch.tensor(0.61), context), whole.velocity(x, 0.61, context))
        for bound in (0.6, 0.95):  # inside, however the level is given
            for level in (bound, torch.tensor(bound), torch.tensor([bound] * 3)):
                assert torch.equal(parted.velocity(x, level, context), whole.velocity(x, level, context))
    # .9, .8333, .75 and .6429 are guided; 1, .9545, .5 and .3 are not
    assert (whole.evaluations(*SIZE), parted.evaluations(*SIZE)) == (16, 12)
    assert Teacher(backbone, guidance_interval=(0.6, 0.95)).evaluations(*SIZE) == 8
    assert Teacher(backbone, guidance_interval=(0, 1)).guidance_interval == (0.0, 1.0)


def test_renewed_noise_is_each_samples_own_and_of_its_interval_only() -> None:
    backbone = fused_backbone(Z_IMAGE)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, *SIZE, generator=g)
    context = Context(torch.randn(2, 40, 20, generator=g), torch.tensor([5, 40]))

    def states(rows: slice = slice(0, 2), **settings: Any) -> list[Tensor]:
        found: list[Tensor] = []
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)][rows]
        few = Context(context.features[rows], torch.tensor([5, 40])[rows])
        teacher = Teacher(backbone, steps=4, **settings)
        teacher.sample(noise[rows], few, generator=generators, on_step=lambda _, x: found.append(x))
        return found

    plain, renewed = states(), states(eta=1.0)
    assert all(not torch.equal(a, b) for a, b in zip(plain, renewed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(renewed, states(eta=1.0), strict=True))
    assert relative_error(renewed[-1][1:], states(slice(1, 2), eta=1.0)[-1]) <= 1e-5
    # The grid is 1, .9, .75, .5: two steps without, and the third begins at .75.
    parted = states(eta=1.0, eta_interval=(0.6, 0.75))
    assert [torch.equal(a, b) for a, b in zip(plain, parted, strict=True)] == [True, True, False, False]


def test_wrong_use_is_explained() -> None:
    backbone = fused_backbone(Z_IMAGE)
    context = Context(torch.randn(2, 7, 20))
    noise = torch.randn(2, 4, *SIZE)
    with pytest.raises(ValueError, match="guidance other than 1 needs a negative context"):
        Teacher(backbone, guidance=3.0).sample(noise, context)
    with pytest.raises(ValueError, match="both steps and sigmas"):
        Teacher(backbone).sample(noise, context, steps=2, sigmas=(1, 0))
    with pytest.raises(ValueError, match=r"fall strictly from at most 1 to 0"):
        Teacher(backbone).sample(noise, context, sigmas=(1, 0.5))
    with pytest.raises(ValueError, match="steps is 0"):
        Teacher(backbone, steps=0)
    with pytest.raises(ValueError, match=r"guidance_interval is \(0\.9, 0\.5\), expected two levels"):
        Teacher(backbone, guidance_interval=(0.9, 0.5))
    with pytest.raises(ValueError, match=r"guidance_interval is 0\.5, expected two levels"):
        Teacher(backbone, guidance_interval=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eta is 1\.5, expected 0 \(no noise is renewed\) to 1"):
        Teacher(backbone, eta=1.5)
    with pytest.raises(ValueError, match=r"eta_interval is \(0\.9, 0\.5\), expected two levels"):
        Teacher(backbone, eta=1.0, eta_interval=(0.9, 0.5))
    with pytest.raises(ValueError, match=r"eta_interval is \(0\.5, 0\.9\), and eta is 0, which is none: give eta too"):
        Teacher(backbone, eta_interval=(0.5, 0.9))
    with pytest.raises(ValueError, match="3 generators for 2 samples, expected one, or one for each"):
        Teacher(backbone, eta=1.0).sample(noise, context, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="shift is 0"):
        Teacher(backbone, shift=0.0)
    with pytest.raises(ValueError, match=r"negative context has 3 samples, expected 1 or 2"):
        Teacher(backbone, guidance=2.0, negative=Context(torch.randn(3, 7, 20))).sample(noise, context)
