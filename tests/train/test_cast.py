"""Roles as a recipe has them: what they begin as, and which networks they share."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from twostep.train.cast import Casting
from twostep.train.command import read_recipe
from twostep.train.methods import Cast
from twostep.train.sharding import check_same
from twostep.zoo import AdapterView, Context
from twostep.zoo.miniature import miniature


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few-step model, and beside it the base that it was made from, which has other weights."""
    folder = tmp_path_factory.mktemp("model")
    miniature(untrained_seed=0).save(folder)
    miniature(untrained_seed=1).transformer.save_pretrained(folder / "base")
    return folder


def roles(model: Path, *overrides: str) -> Cast:
    data = "data={kind: prompts, prompts: p.txt, contexts: c, teacher: t}"
    recipe = read_recipe("miniature-turbo-pp", [f"model={model}", data, *overrides])
    empty = Context(torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(2)))
    return Casting(recipe, str(model), torch.device("cpu")).roles((16, 16), empty)


@pytest.mark.parametrize("student", ["full", "lora"])
@pytest.mark.parametrize("fake", ["full", "lora"])
def test_the_fake_score_begins_as_the_real_score(model: Path, student: str, fake: str) -> None:
    cast = roles(model, f"roles.student.weights={student}", f"roles.fake_score.weights={fake}")
    guidance = cast.guidance
    assert guidance is not None
    x, context = torch.randn(2, 4, 16, 16), Context(torch.randn(2, 5, 128))
    with torch.no_grad():
        real = guidance.teacher.backbone.velocity(x, 0.5, context)
        assert torch.equal(guidance.fake.velocity(x, 0.5, context), real)
        assert not torch.equal(cast.student.velocity(0, x, context), real)
    on_one = isinstance(guidance.fake.network, AdapterView)
    assert on_one == (fake == "lora") and (guidance.fake.network.model is guidance.teacher.backbone.model) == on_one
    trained = {name for name, p in guidance.fake.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained) == on_one
    assert not any(p.requires_grad for p in guidance.teacher.backbone.parameters())


def test_one_base_serves_all_that_have_its_weights(model: Path) -> None:
    cast = roles(model, "roles.student.weights=lora", "roles.real_score.subfolder=transformer")
    assert cast.guidance is not None and cast.guidance.discriminator is not None
    networks = [*cast.student.networks, cast.guidance.teacher.backbone, cast.guidance.fake.network]
    networks.append(cast.guidance.discriminator.backbone)
    assert len({id(network.model) for network in networks}) == 1


def test_the_fake_scores_adapter_has_the_students_rank_or_its_own(model: Path) -> None:
    for own, rank in ((), 16), (("roles.fake_score.rank=3",), 3):
        cast = roles(model, "roles.student={weights: lora, rank: 16}", *own)
        assert cast.guidance is not None
        shapes = {p.shape[0] for name, p in cast.guidance.fake.named_parameters() if ".lora_A" in name}
        assert shapes == {rank}


def test_a_role_of_another_family_is_named(model: Path, tmp_path: Path) -> None:
    config = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4)}
    Flux2Transformer2DModel(**config, guidance_embeds=False).save_pretrained(tmp_path / "transformer")
    source = f"roles.real_score={{source: {tmp_path}, subfolder: transformer}}"
    with pytest.raises(ValueError, match=r"roles\.real_score\.source is a flux2 for latents of 16 channels"):
        roles(model, source)


def test_a_student_that_is_tuned_keeps_its_sigmas(model: Path, tmp_path: Path) -> None:
    """What another run has left knows its grid; no scheduler stands beside it."""
    shutil.copytree(model / "transformer", tmp_path / "transformer")
    facts = {"format": "twostep.student", "version": 1, "sigmas": [1.0, 0.6, 0.0], "steps": ["transformer"] * 2}
    facts["pipeline"] = str(model)
    (tmp_path / "student.json").write_text(json.dumps(facts))
    recipe = read_recipe("miniature-d-opsd", [f"model={model}", f"roles.student.source={tmp_path}"])
    for steps, grid in ((2, (1.0, 0.6, 0.0)), (4, (1.0, 0.9, 0.75, 0.5, 0.0))):
        role = replace(recipe.roles.student, steps=steps)
        asked = replace(recipe, roles=replace(recipe.roles, student=role))
        with nullcontext() if steps == 2 else pytest.warns(UserWarning, match="has no scheduler/"):
            found = Casting(asked, str(model), torch.device("cpu")).sigmas((16, 16))
        assert found == pytest.approx(grid)


class TwoRanks:
    """Rank 0 of two, the other of which has found something else."""

    rank, world_size = 0, 2

    def __init__(self, other: dict[str, str]) -> None:
        self.other = other

    def gathered(self, mine: dict[str, str]) -> list[dict[str, str]]:
        return [mine, self.other]


def test_ranks_that_find_other_files_are_told_apart(model: Path) -> None:
    """Frozen networks too, which no gradient would ever tell apart, and what is divided into shards."""
    data = "data={kind: prompts, prompts: p.txt, contexts: c, teacher: t}"
    recipe = read_recipe("miniature-turbo-pp", [f"model={model}", data])
    found = Casting(recipe, str(model), torch.device("cpu")).sources()
    assert set(found) == {"student", "real_score", "discriminator"} and found["student"] != found["real_score"]
    check_same(found, TwoRanks(dict(found)))
    other = {**found, "real_score": found["student"]}
    with pytest.raises(ValueError, match=r"^rank 1 begins with another real_score than rank 0: their files differ"):
        check_same(found, TwoRanks(other))
    lora = read_recipe("miniature-turbo-pp-lora", [f"model={model}", data])
    sources = Casting(lora, str(model), torch.device("cpu")).sources()
    assert sources["fake_score"] == sources["real_score"]  # a checkpoint's adapter belongs to it
