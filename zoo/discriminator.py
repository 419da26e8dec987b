"""The discriminator: features of a frozen diffusion model on noised latents, and a small trainable head a tapped block.

That much is Turbo++'s (arXiv 2606.12575). Which blocks and what heads is not published; ours: a head after about half,
three quarters and all of the blocks. A head is a LayerNorm, a projection, and a 3 x 3 convolution over the grid of
tokens; it says real or fake token by token. The blocks behind the last tapped one do not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .backbone import Backbone, need_backbone
from .context import Context


def default_blocks(count: int) -> tuple[int, ...]:
    """The blocks at about 1/2, 3/4 and the end of `count`: their indices."""
    return tuple(sorted({max(round(count * part) - 1, 0) for part in (0.5, 0.75, 1.0)}))


class Head(nn.Module):
    """Tokens [B, h w, D] -> logits [B, h w]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        h = nn.functional.silu(self.project(ops.norm_modulate(tokens, norm="layer", eps=1e-6)))
        mixed = self.mix(h.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.out(nn.functional.silu(h + mixed)).squeeze(-1)


class Discriminator(nn.Module):
    """Logits of noised latents, real above zero.

    The backbone is frozen here (its parameters never get a gradient from this role), and gradients flow through it to
    its input, which is how the generator learns. It may be shared with other frozen roles, or be an AdapterBase's
    `base`.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        *,
        blocks: Sequence[int] | None = None,
        hidden: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        need_backbone("Discriminator", backbone)
        count = len(backbone.blocks())
        self.blocks = default_blocks(count) if blocks is None else tuple(blocks)
        wrong = [index for index in self.blocks if not 0 <= index < count]
        if wrong or not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ValueError(
                f"Discriminator: blocks are {list(self.blocks)}, expected different indices from 0 to {count - 1}: "
                f"this model has {count} blocks"
            )
        # Not a submodule: the optimizer and the checkpoint of this role hold the heads alone.
        self.__dict__["backbone"] = backbone.requires_grad_(False)
        with backbone.device:
            self.heads = nn.ModuleList(
                Head(backbone.width, min(backbone.width, 256) if hidden is None else hidden) for _ in self.blocks
            )
        if generator is not None:
            self._initialise(generator)

    def _initialise(self, generator: torch.Generator) -> None:
        """PyTorch's default, from this generator."""
        for parameter in self.heads.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return self.heads.parameters()

    def forward(self, x: Tensor, sigma: Tensor | float, context: Context) -> Tensor:
        """[B, heads x tokens] logits in float32, of latents x [B, C, H, W] noised to sigma."""
        tapped = self.backbone.features(x, sigma, context, self.blocks)
        factor = self.backbone.latent_factor
        grid = (x.shape[2] // factor, x.shape[3] // factor)
        dtype = next(self.heads.parameters()).dtype
        logits = [head(tokens.to(dtype), grid) for head, tokens in zip(self.heads, tapped, strict=True)]
        return torch.cat(logits, dim=1).float()
