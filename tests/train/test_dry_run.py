"""`twostep train --dry-run` says what the run will be, from configurations alone."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.zoo.test_plan import WatchMalloc
from twostep.cli import main
from twostep.train.average import Average
from twostep.train.cast import Casting
from twostep.train.configuration import load
from twostep.train.data import NoiseStreams
from twostep.train.dry_run import describe_run
from twostep.train.feed import Feed, make_feed
from twostep.train.methods import method_class
from twostep.train.monitors import PhaseClock
from twostep.train.optimizers import Optimizer
from twostep.train.parts import Parts
from twostep.train.ranks import Ranks
from twostep.train.recipe import OptimizerConfig, Recipe
from twostep.train.rehearsal import Rehearsal, rehearse, state_bytes
from twostep.train.update import Updater, trained_parameters
from twostep.train.watchdog import Watchdog
from twostep.zoo import Backbone, load_backbone
from twostep.zoo.miniature.architecture import build
from twostep.zoo.miniature.model import _assemble

from . import tiny_pipelines, tiny_runs
from .run_server import Server
from .test_optimizers import needs
from .tiny_runs import Place, make_place

CAPTION = 32  # of the tiny captions, filled up as Z-Image does


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place("z-image", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Wide enough that tensors outweigh what else a process allocates."""

    def pipeline(folder: Path) -> Path:
        pieces = build(0, replace(tiny_pipelines.SMALL, width=128, rope_axes=(8, 12, 12)))
        _assemble(pieces, torch.float32, "cpu").save(folder)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_pipelines.PIPELINES, "z-image", pipeline)
        return make_place("z-image", tmp_path_factory.mktemp("wide"))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def read(place: Place, folder: Path, method: str, weights: str = "full", **changes: Any) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_runs.recipe(place, method, weights, folder / "run", **changes)))
    return load(Recipe, file, [])


def cells(text: str, row: str) -> list[str]:
    """The columns of a row of any table."""
    line = next(line for line in text.splitlines() if line.startswith(f"{row} "))
    return re.split(r"\s{2,}", line)


# What it says


def test_it_says_what_the_run_will_be(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = describe_run(
        read(place, tmp_path, "turbo_pp", accumulate=3, parallel={"kind": "fsdp", "replicas": 2}, iterations=1000)
    )
    network = sum(p.numel() for p in load_backbone(place.model).parameters())
    assert cells(text, "ranks")[1] == "4 ranks, fsdp: 2 x 2 shards"
    assert cells(text, "sigmas")[1] == "1, 0.75, 0"
    assert cells(text, "updates")[1] == "2 guidance, 1 generator an iteration; 1,000 iterations: 3,000 updates"
    assert cells(text, "samples")[1] == "24 an update: batch 2 x accumulate 3 x 4 ranks"
    assert cells(text, "data")[1].startswith(f"6 prompts of {place.prompts}; contexts from")
    assert cells(text, "latents")[1].startswith("4 x 16 x 16;")
    model = [str(place.model), "ZImageTransformer2DModel"]
    assert cells(text, "student")[1:] == [*model, "2 x full", f"{2 * network:,}", "0", "float32"]
    assert cells(text, "real_score")[1:] == [*model, "frozen", "0", f"{network:,}", "float32"]
    assert cells(text, "fake_score")[1:] == [*model, "full", f"{network:,}", "0", "float32"]
    assert cells(text, "discriminator")[3] == "heads"
    assert float(cells(text, "peak of a generator update")[1]) > float(cells(text, "held between updates")[1]) > 0


def test_adapters_stand_on_one_base(place: Place, tmp_path: Path) -> None:
    text = describe_run(read(place, tmp_path, "turbo_pp", "lora", compute={"dtype": "bfloat16"}))
    network = sum(p.numel() for p in load_backbone(place.model).parameters())
    assert cells(text, "base")[3:] == ["frozen", "0", f"{network:,}", "bfloat16"]
    assert cells(text, "student")[3] == "lora: step_1, step_2" and cells(text, "student")[5:] == ["0", "float32"]
    assert cells(text, "real_score")[3:] == ["shared", "0", "0", "-"]
    assert cells(text, "fake_score")[3] == "lora: fake_score"


def test_it_reads_no_weights_of_networks(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not even there."""
    bare = tmp_path / "model"
    shutil.copytree(place.model, bare)
    for weights in (*(bare / "transformer").glob("*.safetensors"), *(bare / "vae").glob("*.safetensors")):
        weights.unlink()
    recipe = tiny_runs.recipe(replace(place, model=bare), "flow_matching", "full", tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert cells(text, "updates")[1] == "1 generator an iteration; 4 iterations: 4 updates"
    assert cells(text, "data")[1].startswith(f"6 images of {place.images}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("dp_dmd", {"prompts": "nowhere.txt"}, "nowhere.txt does not exist"),
        ("dp_dmd", {"contexts": "nowhere"}, "nowhere"),
        ("turbo_pp", {"teacher": "nowhere"}, "nowhere"),
        ("flow_matching", {"folder": "nowhere"}, "nowhere"),
    ],
)
def test_data_that_are_not_there(place: Place, tmp_path: Path, method: str, data: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_run(read(place, tmp_path, method, data=data))


def test_ranks_that_cannot_be(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read(place, tmp_path, "flow_matching", parallel={"kind": "fsdp", "replicas": 3})
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="replicas is 3, expected a divisor of the number of ranks, 8; say how many"):
        describe_run(recipe)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many', expected a whole number"):
        describe_run(recipe)


def test_anchors_must_stand_where_the_first_step_ends(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = ["cache", "--model", str(place.model), "--prompts", str(place.prompts), "--out", str(cache)]
    assert main([*command, "--dtype", "float32", "--teacher-steps", "4", "--anchor-sigma", "0.5"]) == 0
    recipe = tiny_runs.recipe(replace(place, cache=cache), "dp_dmd", "full", tmp_path / "run")
    recipe["method"]["cached_anchors"] = True
    recipe["data"]["teacher"] = str(cache / "teacher")
    with pytest.raises(ValueError, match=r"stand at sigma 0\.5, and the student's first step ends at 0\.75"):
        describe_run(load(Recipe, None, base=recipe))


def test_the_longest_context_is_one_that_the_model_has_positions_for(place: Place, tmp_path: Path) -> None:
    """A caption that fills them all, and an image beside it, would be an error of that sample, not of the run."""
    recipe = tiny_runs.recipe(place, "d_opsd", "full", tmp_path / "run")
    recipe["data"]["vision_pixels"] = 1024 * 1024
    assert "d_opsd" in describe_run(load(Recipe, None, base=recipe))


def test_an_optimizer_that_cannot_be(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own checks of optimizers run too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("torchao", "torchao.optim", "twostep.train.adamw8bit", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    changes = {"optimizers": {"generator": {"kind": "adamw8bit"}}, "parallel": {"kind": "fsdp"}}
    with pytest.raises(ValueError, match="needs torchao or bitsandbytes, and neither is installed"):
        describe_run(read(place, tmp_path, "flow_matching", **changes))
    other = ModuleType("bitsandbytes.optim")
    other.AdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", other)
    with pytest.raises(ValueError, match="parameters in shards needs torchao, and only bitsandbytes is installed"):
        describe_run(read(place, tmp_path, "flow_matching", **changes))


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_optimizers_in_shards(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    needs(kind)
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes = {"optimizers": {"generator": {"kind": kind}}, "parallel": {"kind": "fsdp"}}
    assert kind in describe_run(read(place, tmp_path, "flow_matching", **changes))


# Memory


def load_into_memory(*args: Any, **kwargs: Any) -> Backbone:
    """load_backbone leaves weights in the file that is mapped, where malloc does not see them."""
    network = load_backbone(*args, **kwargs)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


@dataclass
class Trainer:
    """The trainer's parts with real tensors, after an update of each kind: states of optimizers are there."""

    updater: Updater
    feed: Feed
    averages: Average

    @classmethod
    def of(cls, recipe: Recipe) -> Trainer:
        kind, cpu = method_class(recipe.method), torch.device("cpu")
        parts = Parts(recipe.model, dtype=torch.float32, device=cpu, cache=getattr(recipe.data, "contexts", None))
        casting = Casting(recipe, parts.path, cpu, load=load_into_memory)
        first = casting.networks()[0]
        feed = make_feed(
            recipe.data,
            parts,
            batch=recipe.batch,
            seed=0,
            rank=0,
            world_size=1,
            wants=kind.wants(recipe.method),
            latent_channels=first.channels,
            latent_factor=first.latent_factor,
            device=cpu,
        )
        assert feed.shape is not None
        cast = casting.roles(feed.shape[1:], parts.empty)
        method = kind.build(recipe.method, cast, NoiseStreams(1))
        optimizers = {
            kind: Optimizer(parameters, recipe.optimizers.generator, 10)
            for kind, parameters in trained_parameters(method, cast.modules()).items()
        }
        ranks = Ranks(0, 1, cpu, Watchdog(0, 1, 600.0))
        updater = Updater(method, optimizers, NoiseStreams(0), ranks, torch.float32, PhaseClock(cpu))
        trainer = cls(
            updater, feed, Average({n: p for n, p in cast.student.named_parameters() if p.requires_grad}, 0.9)
        )
        for update in optimizers:
            updater.run(update, [next(feed)])
        return trainer


@pytest.mark.parametrize(
    ("method", "weights", "ranks"),
    [("turbo_pp", "full", 1), ("turbo_pp", "lora", 1), ("d_opsd", "full", 1), ("flow_matching", "full", 2)],
)
def test_a_checkpoint_is_as_large_as_was_said(
    server: Server, place: Place, tmp_path: Path, method: str, weights: str, ranks: int
) -> None:
    recipe = tiny_runs.recipe(place, method, weights, tmp_path / "run", iterations=1)
    recipe["parallel"]["kind"] = "ddp" if ranks == 1 else "fsdp"
    statuses, printed = server.run(recipe, ranks=ranks)
    assert statuses == [0] * ranks, printed
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    files = [file for file in folder.rglob("*.safetensors") if file.name != "own.safetensors"]  # a rank's generators
    tensors = sum(t.numel() * t.element_size() for file in files for t in load_file(file).values())
    said = rehearsed(load(Recipe, None, base=recipe), ranks).checkpoint
    assert 0.99 * said <= tensors <= 1.01 * said  # an optimizer counts its steps; shards are not quite alike


def rehearsed(recipe: Recipe, world_size: int = 1) -> Rehearsal:
    return rehearse(recipe, recipe.model, (4, 16, 16), world_size, CAPTION)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "weights", "checkpointing"),
    [
        ("turbo_pp", "lora", True),
        ("dp_dmd", "full", False),
        ("decoupled_dmd", "full", True),
        ("flow_matching", "full", False),
        ("d_opsd", "lora", False),
        ("d_opsd", "full", True),
    ],
)
def test_the_peak_of_each_update_is_what_malloc_sees(
    wide: Place, tmp_path: Path, pytestconfig: pytest.Config, method: str, weights: str, checkpointing: bool
) -> None:
    """Within 10 %; the oracle is the C library's own book-keeping while the trainer trains."""
    if not pytestconfig.getoption("--malloc"):
        pytest.skip("takes many minutes: --malloc runs it")
    recipe = read(wide, tmp_path, method, weights, batch=6, compute={"checkpointing": checkpointing})
    Trainer.of(recipe).feed.close()  # unseen: what is loaded on first use is memory too
    predicted = rehearsed(recipe).peaks
    with WatchMalloc() as malloc:
        trainer = Trainer.of(recipe)
        batch = next(trainer.feed)
        trainer.feed.close()  # its thread makes the next batch meanwhile
        for update, peak in predicted.items():
            malloc.peak = 0
            trainer.updater.run(update, [batch])
            assert 0.9 <= peak / malloc.peak <= 1.1, (update, peak, malloc.peak)


def test_shards_divide_what_is_held(place: Place, tmp_path: Path) -> None:
    recipe = read(place, tmp_path, "flow_matching", parallel={"kind": "fsdp"})
    one, two = rehearsed(recipe), rehearsed(recipe, 2)
    assert two.held == pytest.approx(one.held / 2, rel=0.02)
    student = two.memory["student"]
    assert student.weights == student.gradients == student.average == student.optimizer // 2
    assert two.held == pytest.approx(student.weights + student.optimizer + student.average, rel=0.01)


def test_earlier_batches_of_an_update_leave_gradients(place: Place, tmp_path: Path) -> None:
    one, two = (rehearsed(read(place, tmp_path, "flow_matching", accumulate=n)) for n in (1, 2))
    assert two.held == one.held and two.peaks["generator"] > one.peaks["generator"]


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_states_are_as_large_as_the_optimizer_makes_them(kind: Any) -> None:
    needs(kind)
    parameters = {
        "student.layers.0.attention.weight": torch.nn.Parameter(torch.randn(64, 96)),
        "student.layers.0.norm.weight": torch.nn.Parameter(torch.randn(48)),
    }
    optimizer = Optimizer(parameters, OptimizerConfig(kind=kind), 10)
    predicted = sum(size for _, size in state_bytes(optimizer))
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert predicted == sum(state.nbytes for state in optimizer.tensors().values() if state.dim())
