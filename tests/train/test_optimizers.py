"""Optimizers: torch's own steps, rates as functions of the step, and state that a checkpoint brings back exactly."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from twostep.train.average import Average
from twostep.train.muon import Muon, orthogonal
from twostep.train.optimizers import Optimizer, schedule
from twostep.train.recipe import OptimizerConfig

KINDS = ("adamw", "muon", "adamw8bit")


def network(seed: int = 0) -> dict[str, nn.Parameter]:
    """Names as a student has them: matrices inside blocks and outside, vectors, an adapter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "student.networks.0.model.layers.0.attention.to_q.weight": (64, 64),
        "student.networks.0.model.layers.0.attention_norm1.weight": (64,),
        "student.networks.0.model.layers.0.adaLN_modulation.0.weight": (64, 64),
        "student.networks.0.model.x_embedder.weight": (64, 64),
        "student.networks.0.model.layers.0.attention.to_q.lora_A.step_1.weight": (4, 64),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def train(optimizer: Optimizer, steps: int, seed: int = 1) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed + step)
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def needs(kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao.optim", reason="adamw8bit needs torchao, which is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_state_brought_back_goes_on_in_the_same_bits(kind: str) -> None:
    needs(kind)
    config = OptimizerConfig(kind=kind, lr=1e-2, warmup=3, decay="cosine")  # type: ignore[arg-type]
    whole = Optimizer(network(), config, total=10)
    train(whole, 4)
    kept = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    numbers, weights = whole.numbers(), {n: p.detach().clone() for n, p in whole.parameters.items()}
    again = Optimizer(network(seed=5), config, total=10)
    with torch.no_grad():
        for name, parameter in again.parameters.items():
            parameter.copy_(weights[name])
        room = again.prepare(numbers)
        assert room.keys() == kept.keys()
        for name, tensor in room.items():
            tensor.copy_(kept[name])
    assert all(torch.equal(again.parameters[n], w) for n, w in weights.items()), "making room moves nothing"
    train(whole, 3, seed=50)
    train(again, 3, seed=50)
    assert all(torch.equal(again.parameters[n], p) for n, p in whole.parameters.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_not_been_trained_yet_has_no_state_and_comes_back_without(kind: str) -> None:
    """A step that no update has drawn: its networks had no gradient."""
    needs(kind)
    config = OptimizerConfig(kind=kind, lr=1e-2)  # type: ignore[arg-type]
    whole = Optimizer(network(), config, total=10)
    idle = next(iter(whole.parameters))
    for name, parameter in whole.parameters.items():
        parameter.grad = None if name == idle else torch.ones_like(parameter)
    whole.step()
    whole.zero_grad()
    again = Optimizer(network(), config, total=10)
    assert again.prepare(whole.numbers()).keys() == whole.tensors().keys()
    assert not any(name.startswith(f"{idle}/") for name in again.tensors())


def test_adamw_is_torchs() -> None:
    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    mine, theirs = Optimizer(network(), config, total=5), network()
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, fused=True)
    train(mine, 3)
    for step in range(3):
        generator = torch.Generator().manual_seed(1 + step)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        reference.step()
    assert all(torch.equal(mine.parameters[n], p) for n, p in theirs.items())


def test_muon_takes_the_matrices_inside_blocks_and_nothing_else() -> None:
    optimizer = Optimizer(network(), OptimizerConfig(kind="muon"), total=1)
    muon = next(part for part, _ in optimizer.parts if isinstance(part, torch.optim.Muon))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert [n for n, p in optimizer.parameters.items() if id(p) in taken] == [
        "student.networks.0.model.layers.0.attention.to_q.weight"
    ]


def test_muon_is_torchs() -> None:
    """Within what torch's own rounding to bfloat16 does to it, for wide, tall and square matrices."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(24, 40), (40, 24), (24, 40), (32, 32)]
    mine, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = Muon(mine, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(mine, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_muons_directions_are_nearly_orthogonal() -> None:
    """The oracle: U V^T of the singular value decomposition, whose singular values are all 1."""
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(4))
    found = orthogonal(x).double()
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    assert ((u @ v) * found).sum((1, 2)).div(24).min() > 0.8  # the same singular vectors


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup": 2}, [1 / 3, 2 / 3, 1, 1, 1]),
        ({"decay": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"decay": "linear", "last": 0.5}, [1, 0.875, 0.75, 0.625, 0.5]),
        ({"decay": "cosine"}, [1, 0.8535533906, 0.5, 0.1464466094, 0]),
        ({"decay": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1, 0.5, 0]),
    ],
)
def test_rates(settings: dict[str, Any], rates: list[float]) -> None:
    config = OptimizerConfig(**settings)
    assert [schedule(config, step, 4) for step in range(5)] == pytest.approx(rates)


def test_the_rate_is_what_a_step_takes() -> None:
    """A gradient of ones under Adam without momentum moves each weight by the rate."""
    config = OptimizerConfig(lr=0.1, betas=(0.0, 0.0), decay="linear", eps=1e-12)
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Optimizer({"p": parameter}, config, total=2)
    optimizer.factor = 0.5
    moved = []
    for _ in range(2):
        assert optimizer.rate == pytest.approx(0.05 * schedule(config, optimizer.steps, 2))
        before = parameter.detach().clone()
        parameter.grad = torch.ones(3)
        optimizer.step()
        moved.append(float((before - parameter).detach().max()))
    assert moved == pytest.approx([0.05, 0.025])


def test_without_an_8_bit_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.optim", "twostep.train.adamw8bit", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install torchao"):
        Optimizer(network(), OptimizerConfig(kind="adamw8bit"), total=1)


def test_the_average_follows_and_gives_its_place_back() -> None:
    parameters = network()
    average = Average(parameters, 0.75)
    expected = {name: p.detach().double() for name, p in parameters.items()}
    for step in range(3):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += 1 + step
        average.follow()
        expected = {n: 0.75 * e + 0.25 * parameters[n].detach().double() for n, e in expected.items()}
    now = {name: p.detach().clone() for name, p in parameters.items()}
    with average.in_place():
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, now[name]) for name, p in parameters.items())
    assert any(not torch.equal(average.values[name], now[name]) for name in now)
