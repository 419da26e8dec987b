"""Two ranks, whole or in shards, train as one process that sees both ranks' batches and noise."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from twostep.train.journal import read_metrics

from . import tiny_runs
from .run_server import Server
from .test_optimizers import needs
from .test_resume import contents

CASES = [(method, weights) for method in tiny_runs.METHODS for weights in tiny_runs.WEIGHTS]
# float32: sums in another order, through Adam's division; measured at most 2e-5 for losses over four iterations.
TOLERANCE = 2e-4


def one_process(recipe: dict[str, Any]) -> int:
    """The oracle: a loop by hand over the same parts, in which each update adds both ranks' gradients, halved.

    Writes the losses of each iteration to losses.json: the mean over both ranks' batches.
    """
    from twostep.train.configuration import load
    from twostep.train.data import NoiseStreams
    from twostep.train.engine import Run
    from twostep.train.ranks import join
    from twostep.train.recipe import Recipe
    from twostep.train.signals import Signals

    with ExitStack() as stack:
        ranks = stack.enter_context(join(device="cpu", timeout=60, sharded=False))
        config = load(Recipe, None, base=recipe)
        runs = []
        for rank in (0, 1):
            ranks.rank, ranks.world_size = rank, 2  # data and noise are this rank's; nothing is sent
            ranks.gathered = lambda value: [value]  # type: ignore[method-assign]
            ranks.from_first = lambda ask: ask()  # type: ignore[method-assign]
            runs.append(Run.of(config, ranks, Signals()))
        method, optimizers, average = runs[0].method, runs[0].state.optimizers, runs[0].state.average
        losses: list[dict[str, float]] = []
        for iteration in range(config.iterations):
            seen: dict[str, list[float]] = {}
            for kind in method.updates(iteration):
                shared = runs[0].state.shared.state_dict()
                for run in runs:
                    runs[0].state.shared.load_state_dict(shared)  # both ranks draw the same from these
                    streams: NoiseStreams = run.state.streams
                    for name, value in method.run(kind, next(run.state.feed), streams, 0.5).items():
                        seen.setdefault(name, []).append(float(value))
                optimizer = optimizers[kind]
                gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
                torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), optimizer.config.clip or 1e9)
                assert gradients
                optimizer.step()
                optimizer.zero_grad()
                if kind == "generator":
                    assert average is not None
                    average.follow()
                    if hasattr(method, "follow"):
                        method.follow()
            losses.append({name: sum(values) / len(values) for name, values in seen.items()})
        config.out.mkdir(parents=True)
        (config.out / "losses.json").write_text(json.dumps(losses))
        for run in runs:
            run.state.feed.close()
    return 0


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny_runs.Place]:
    return {family: tiny_runs.make_place(family, tmp_path_factory.mktemp(family)) for family in ("z-image",)}


@pytest.mark.parametrize(("method", "weights"), CASES)
def test_two_ranks_reach_the_losses_of_one_process(
    server: Server, places: dict[str, tiny_runs.Place], tmp_path: Path, method: str, weights: str
) -> None:
    place = places["z-image"]
    statuses, printed = server.run(
        tiny_runs.recipe(place, method, weights, tmp_path / "one"), call="tests.train.test_ranks:one_process"
    )
    assert statuses == [0], printed
    true = json.loads((tmp_path / "one" / "losses.json").read_text())
    for kind in ("ddp", "fsdp"):
        recipe = tiny_runs.recipe(place, method, weights, tmp_path / kind, parallel={"kind": kind})
        statuses, printed = server.run(recipe, ranks=2)
        assert statuses == [0, 0], printed
        found = read_metrics(tmp_path / kind)
        assert len(found) == len(true)
        for mine, theirs in zip(found, true, strict=True):
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), f"{kind}: {name}"


def muon_in_shards(recipe: dict[str, Any]) -> int:
    """Muon on matrices that are divided among ranks, against Muon on whole ones: tall, wide, and of fewer rows than
    ranks."""
    from torch import nn
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    from twostep.train.muon import Muon
    from twostep.train.ranks import join

    shapes = [(7, 12), (12, 7), (7, 12), (2, 5), (7, 12), (7, 12)]
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    with join(device="cpu", timeout=60, sharded=True, replicas=recipe["replicas"]) as ranks:
        mesh = ranks.mesh
        assert mesh is not None
        placements = [*[torch.distributed.tensor.Replicate()] * (mesh.ndim - 1), Shard(0)]

        def divided(tensor: torch.Tensor) -> DTensor:
            return distribute_tensor(tensor, mesh, placements)

        generator = torch.Generator().manual_seed(5)
        whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        parts = [nn.Parameter(divided(parameter.detach().clone())) for parameter in whole]
        optimizers = Muon(whole, **settings), Muon(parts, **settings)
        for _ in range(3):
            for one, part in zip(whole, parts, strict=True):
                one.grad = torch.randn(one.shape, generator=generator)
                part.grad = divided(one.grad.clone())
            for optimizer in optimizers:
                optimizer.step()
        for one, part in zip(whole, parts, strict=True):
            torch.testing.assert_close(part.detach().full_tensor(), one.detach(), rtol=1e-5, atol=1e-6)
            assert part.detach().to_local().shape[0] < one.shape[0]
    return 0


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_muon_in_shards_is_muon(server: Server, ranks: int, replicas: int) -> None:
    statuses, printed = server.run({"replicas": replicas}, ranks=ranks, call="tests.train.test_ranks:muon_in_shards")
    assert statuses == [0] * ranks, printed


def adamw8bit_in_shards(recipe: dict[str, Any]) -> int:
    """Moments in 8 bits of parameters that are divided among ranks, against whole ones: rows of one block, of several,
    of small blocks and of none, fewer rows than ranks, and a vector."""
    from torch import nn
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from twostep.train.optimizers import Optimizer
    from twostep.train.ranks import join
    from twostep.train.recipe import OptimizerConfig

    shapes = {
        "one": (22, 256),
        "several": (7, 768),
        "small": (70, 96),
        "none": (70, 99),
        "few": (2, 2560),
        "v": (5000,),
    }
    torch.compiler.set_stance("force_eager")  # a compilation for each shape takes seconds
    with join(device="cpu", timeout=600, sharded=True, replicas=recipe["replicas"]) as ranks:
        mesh = ranks.mesh
        assert mesh is not None
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]

        def divided(tensor: torch.Tensor) -> DTensor:
            return distribute_tensor(tensor, mesh, placements)

        def joined(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

        generator = torch.Generator().manual_seed(6)
        whole = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        parts = {name: nn.Parameter(divided(parameter.detach().clone())) for name, parameter in whole.items()}
        config = OptimizerConfig(kind="adamw8bit", lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        one, other = Optimizer(whole, config, 10), Optimizer(parts, config, 10)
        for _ in range(3):
            for name, parameter in whole.items():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parts[name].grad = divided(parameter.grad.clone())
            one.step()
            other.step()
        expected, found = one.tensors(), other.tensors()
        assert expected.keys() == found.keys()
        in_blocks = {key.split("/")[0] for key in expected if key.endswith(".codes")}
        assert in_blocks == {"one", "several", "small", "few"}
        for key, value in expected.items():
            assert torch.equal(joined(found[key]), value), key
        for name, parameter in parts.items():
            assert torch.equal(parameter.detach().full_tensor(), whole[name].detach()), name

        numbers, kept = other.numbers(), {key: value.clone() for key, value in found.items()}
        room = other.prepare(numbers)  # anew: every tensor is there again, to be filled in place
        for key, value in room.items():
            value.copy_(kept[key])
        for key, value in other.tensors().items():
            assert torch.equal(joined(value), expected[key]), key

        torch.compiler.set_stance("default")  # and one that some ranks have more rows of than others, as it is used
        one, other = (Optimizer({"one": side["one"]}, config, 10) for side in (whole, parts))
        whole["one"].grad = torch.randn(shapes["one"], generator=generator)
        parts["one"].grad = divided(whole["one"].grad.clone())
        one.step()
        other.step()
        assert torch.equal(parts["one"].detach().full_tensor(), whole["one"].detach())
    return 0


@pytest.mark.parametrize(("ranks", "replicas"), [(3, 1), (4, 2)])
def test_moments_in_8_bits_are_the_same_bits_in_shards(server: Server, ranks: int, replicas: int) -> None:
    needs("adamw8bit")
    call = "tests.train.test_ranks:adamw8bit_in_shards"
    statuses, printed = server.run({"replicas": replicas}, ranks=ranks, call=call)
    assert statuses == [0] * ranks, printed


def test_muon_in_shards_reaches_the_losses_of_whole_networks(
    server: Server, places: dict[str, tiny_runs.Place], tmp_path: Path
) -> None:
    place, optimizers = places["z-image"], {"generator": {"kind": "muon", "muon_lr": 1e-3}}
    found = {}
    for name, ranks in (("ddp", 2), ("fsdp", 2)):
        changes: dict[str, Any] = {"parallel": {"kind": name}, "optimizers": optimizers}
        recipe = tiny_runs.recipe(place, "flow_matching", "full", tmp_path / name, **changes)
        statuses, printed = server.run(recipe, ranks=ranks)
        assert statuses == [0] * ranks, printed
        found[name] = [row["final_loss"] for row in read_metrics(tmp_path / name)]
    assert len(found["ddp"]) == 4 and found["fsdp"] == pytest.approx(found["ddp"], rel=TOLERANCE)


MOVES = [(("fsdp", 2), ("ddp", 1)), (("ddp", 1), ("fsdp", 2)), (("fsdp", 2), ("fsdp", 3)), (("ddp", 2), ("ddp", 1))]
KEPT = [("full", "adamw"), ("lora", "adamw"), ("full", "muon")]


@pytest.mark.parametrize(
    ("weights", "optimizer", "before", "after"),
    [(*kept, *move) for move in MOVES for kept in KEPT] + [("full", "adamw8bit", *MOVES[0])],
    ids=lambda value: value if isinstance(value, str) else f"{value[1]} {value[0]}",
)
def test_a_run_goes_on_with_another_number_of_ranks(
    server: Server,
    places: dict[str, tiny_runs.Place],
    tmp_path: Path,
    weights: str,
    optimizer: str,
    before: tuple[str, int],
    after: tuple[str, int],
) -> None:
    """Nothing of the state is changed on the way: what is saved again at once is what was there."""
    needs(optimizer)
    place = places["z-image"]

    def run(side: tuple[str, int], iterations: int) -> None:
        changes: dict[str, Any] = {"parallel": {"kind": side[0]}, "iterations": iterations}
        changes["optimizers"] = {"generator": {"kind": optimizer}}
        statuses, printed = server.run(tiny_runs.recipe(place, "dp_dmd", weights, tmp_path, **changes), ranks=side[1])
        assert statuses == [0] * side[1], printed

    run(before, 2)
    saved = whole(tmp_path)
    # A run that is over already reads its checkpoint, writes the student again and takes no step.
    (tmp_path / "student" / "student.json").unlink()
    run(after, 2)
    student = whole(tmp_path)
    assert saved.keys() == student.keys()
    assert all(torch.equal(saved[name], student[name]) for name in saved)
    run(after, 3)
    assert len(read_metrics(tmp_path)) == 3


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in contents(folder).items() if name.startswith("student/")}


def test_ranks_draw_different_noise(places: dict[str, tiny_runs.Place]) -> None:
    from twostep.train.data import NoiseStreams

    draws = [torch.randn(4, generator=NoiseStreams(0, rank)["student"]) for rank in (0, 1)]
    assert not torch.equal(*draws)
