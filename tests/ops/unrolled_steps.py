"""Steps, losses, and the oracle of the two-step backward: one graph through both steps, written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep import ops

MID = 0.75
SIGMAS = (1.0, MID, 0.0)
WIDTH = 12


class Steps(nn.Module):
    """A residual network; `dropout` draws random numbers, `twice` runs every block twice, so that a parameter gets
    several contributions from one step."""

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        twice: bool = False,
        checkpointed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.SiLU(), nn.Dropout(dropout), nn.Linear(20, WIDTH)
            )
            for _ in range(2)
        )
        self.repeats = 2 if twice else 1
        self.checkpointed = checkpointed
        self.calls = 0
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # which would compile anew for every number
            self.calls += 1
        for _ in range(self.repeats):
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def noise(dtype: torch.dtype = torch.float32, batch: int = 5, device: str = "cpu") -> Tensor:
    return torch.randn(batch, 3, WIDTH, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def first_loss(x: Tensor) -> Tensor:
    return (x.sin() * x).mean()


def final_loss(x: Tensor) -> Tensor:
    return (x - 0.3).square().mean() + x.tanh().mean()


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def by_hand(
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    eps: Tensor,
    on_first: Callable[[Tensor], Tensor] | None = first_loss,
    on_final: Callable[[Tensor], Tensor] | None = final_loss,
    *,
    plain: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total loss, v0, x_A, x: the unrolled sampler as one writes it down, with one graph.

    Its steps are the operators, whose own tests hold them to float64; with `plain`, expressions that round as often.
    """
    v0 = first(eps)
    if plain:
        v0 = wide(v0)
        z, x_A = wide(eps) + (MID - 1) * v0, wide(eps) - v0
        x = z - MID * wide(second(z.to(eps.dtype)))
    else:
        z, x_A = ops.two_step_split(wide(eps), v0, MID)
        x = ops.euler_step(z, second(z.to(eps.dtype)), -MID)
    total = on_final(x) if on_final is not None else 0.0
    if on_first is not None:
        total = total + on_first(x_A)
    assert isinstance(total, Tensor)
    return total, v0, x_A, x


def parameters(*modules: nn.Module) -> list[Tensor]:
    """Each once, those without a gradient as well."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def taken(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which are then cleared."""
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def assert_same(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> None:
    """Bit for bit, and not trivially."""
    assert len(left) == len(right) and any(t is not None and bool(t.any()) for t in right)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None and b is not None:
            assert a.dtype == b.dtype and torch.equal(a, b), (i, float((a.double() - b.double()).abs().max()))
