"""The loop of what no method of distillation trains: the miniature's autoencoder and its encoders.

One process, AdamW with a warm-up and a cosine; a journal, and checkpoints from which it goes on bit for bit. A step's
data and noise depend on the seed and the step's number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...durable import sole
from ..checkpoint import Store
from ..data import noise_generator
from ..journal import Journal
from ..optimizers import Optimizer
from ..recipe import OptimizerConfig

Loss = Callable[[int, torch.Generator], Mapping[str, Tensor]]  # of a step, with its noise: "loss" is to fall
_NOTED, _KEPT = 20, 200  # steps between two rows of numbers, and between two checkpoints


@dataclass(frozen=True)
class Fit:
    steps: int
    batch: int
    lr: float
    seed: int = 0
    warmup: int = 100


def fit(name: str, parameters: Mapping[str, nn.Parameter], loss: Loss, plan: Fit, folder: Path) -> None:
    """Moves the parameters to where the loss is low; a run that is in the folder goes on, one that is over is loaded.

    Args:
        name: of what is trained, for messages.
    """
    config = OptimizerConfig(lr=plan.lr, betas=(0.9, 0.99), warmup=plan.warmup, decay="cosine")
    optimizer = Optimizer(parameters, config, plan.steps)
    store = Store(folder / "checkpoints", keep_last=1)
    signature = {"of": name, **asdict(plan)}
    with sole(folder, f"training the {name}"):
        begun = _restore(store, optimizer, signature) if store.holds_any() else None
        if begun == plan.steps:
            return
        journal = Journal(folder, total=plan.steps, resumed_at=begun, tensorboard=False)
        try:
            _loop(optimizer, loss, plan, begun or 0, journal, store, signature)
        finally:
            journal.close()


def _loop(
    optimizer: Optimizer,
    loss: Loss,
    plan: Fit,
    begun: int,
    journal: Journal,
    store: Store,
    signature: Mapping[str, object],
) -> None:
    for step in range(begun, plan.steps):
        found = loss(step, noise_generator(plan.seed, f"step {step}"))
        optimizer.zero_grad()
        found["loss"].backward()
        norm = nn.utils.clip_grad_norm_(optimizer.parameters.values(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        done = step + 1
        if done % _NOTED == 0 or done == plan.steps:
            numbers = {name: float(value.detach()) for name, value in found.items()} | {"gradient_norm": float(norm)}
            journal.numbers(done, numbers)
            journal.advance(done, {name: value for name, value in numbers.items() if name.endswith("loss")})
        else:
            journal.advance(done, {})
        if done % _KEPT == 0 or done == plan.steps:
            journal.sync()
            parts = {"parameters": _tensors(optimizer), "optimizer": optimizer.tensors()}
            store.save(done, parts, {"optimizer": optimizer.numbers()}, signature=signature)


def _tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in optimizer.parameters.items()}


def _restore(store: Store, optimizer: Optimizer, signature: Mapping[str, object]) -> int:
    checkpoint = store.load(signature=signature)
    room = optimizer.prepare(checkpoint.state["optimizer"])
    with torch.no_grad():
        for name, tensor in {**_tensors(optimizer), **room}.items():
            part = "optimizer" if name in room else "parameters"
            tensor.copy_(checkpoint.parts[part][name])
    return checkpoint.step
