"""A small model that saves tensors of every kind, and its gradients with and without a stash."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep import ops
from twostep.ops.stash import Stash

WIDTH = 32


class Block(nn.Module):
    """Everything that saves: views of one projection, softmax (its output), dropout (a mask), a norm, an index."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(ops.norm_modulate(x, self.weight)).chunk(3, -1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        mixed = nn.functional.dropout(mixed, 0.2) * mixed.argmax(-1, keepdim=True).cos()
        return x + self.out(mixed.tanh()[:, torch.arange(x.shape[1] - 1, -1, -1)])


class Model(nn.Module):
    def __init__(self, blocks: int = 5, how: str = "checkpoint") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x.square().mean()


def an_input(device: str, length: int = 24) -> Tensor:
    """Not a leaf that requires a gradient, so that it is an activation like the others."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, length, WIDTH, generator=generator).to(device).requires_grad_() * 1


def gradients(model: nn.Module, loss: Tensor, **options: Any) -> list[Tensor]:
    model.zero_grad()
    loss.backward(**options)
    return [loss.detach(), *(p.grad for p in model.parameters())]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def expected_gradients(model: nn.Module, device: str, **shape: int) -> list[Tensor]:
    torch.manual_seed(3)
    return gradients(model, model(an_input(device, **shape)))


def stashed_gradients(
    model: nn.Module, held: Stash, device: str, *, backward_inside: bool = False, **shape: int
) -> list[Tensor]:
    torch.manual_seed(3)
    with held:
        loss = model(an_input(device, **shape))
        if backward_inside:  # before the last copies out have been waited for
            return gradients(model, loss)
    return gradients(model, loss)
