"""Every loss as a call on random tensors, beside its formula written naively: what test_every_loss.py goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twostep import losses


@dataclass(frozen=True)
class Call:
    """loss(*tensors, weight=, reduction=) takes `inputs` tensors of one shape; naive(*tensors) gives its values [B]."""

    loss: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    inputs: int
    learns: tuple[int, ...] = (0,)  # the inputs that receive a gradient; the others are data
    divides_by: Callable[..., list[Tensor]] = lambda *tensors: []  # [B] each; must not vanish


def mean(t: Tensor) -> Tensor:
    return torch.stack([sample.mean() for sample in t])


def spread(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))


def dmd(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    p_real, p_fake = x - real, x - fake
    grad = (p_real - p_fake) / spread(mean(p_real.abs()), x)
    return 0.5 * mean((x - (x - grad).detach()) ** 2)


def decoupled(normalizer: str, x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    dm, ca = (x - real) - (x - fake), 2.5 * ((x - cond) - (x - uncond))
    if normalizer == "guided":
        grad = (0.5 * dm + ca) / spread(mean((x - (real + 2.5 * (cond - uncond))).abs()), x)
    elif normalizer == "separate":
        grad = 0.5 * dm / spread(mean((x - real).abs()), x) + ca / spread(mean((x - cond).abs()), x)
    else:
        grad = 0.5 * dm + ca
    return 0.5 * mean((x - (x - grad).detach()) ** 2)


def decoupled_call(normalizer: str) -> Call:
    def loss(x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, **options) -> Tensor:
        return losses.decoupled_dmd_loss(
            x,
            dm_real_clean=real,
            dm_fake_clean=fake,
            ca_cond_clean=cond,
            ca_uncond_clean=uncond,
            guidance=3.5,
            dm_weight=0.5,
            normalizer=normalizer,
            **options,
        )

    def divides_by(x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor) -> list[Tensor]:
        guided = real + 2.5 * (cond - uncond)
        return [mean((x - clean).abs()) for clean in (guided, real, cond)]

    return Call(loss, partial(decoupled, normalizer), 5, divides_by=divides_by)


def log_sigmoid(d: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-d))


GENERATOR = {
    "softplus": lambda fake, real: mean(torch.log1p(torch.exp(-fake))),
    "bce": lambda fake, real: mean(-log_sigmoid(fake)),
    "hinge": lambda fake, real: -mean(fake),
    "relativistic": lambda fake, real: mean(-log_sigmoid(fake - real)),
}
DISCRIMINATOR = {
    "softplus": lambda fake, real: mean(torch.log1p(torch.exp(fake)) + torch.log1p(torch.exp(-real))),
    "bce": lambda fake, real: mean(-torch.log(1 - torch.sigmoid(fake)) - log_sigmoid(real)),
    "hinge": lambda fake, real: mean((1 + fake) * (fake > -1) + (1 - real) * (real < 1)),
    "relativistic": lambda fake, real: mean(-log_sigmoid(real - fake)),
}

CALLS: dict[str, Call] = {
    "dmd_loss": Call(losses.dmd_loss, dmd, 3, divides_by=lambda x, real, fake: [mean((x - real).abs())]),
    **{f"decoupled_dmd_loss {n}": decoupled_call(n) for n in ("guided", "separate", "none")},
    **{
        f"generator_adversarial_loss {kind}": Call(
            partial(losses.generator_adversarial_loss, kind=kind, missing_gradient="ignore"), naive, 2
        )
        for kind, naive in GENERATOR.items()
    },
    **{
        f"discriminator_loss {kind}": Call(partial(losses.discriminator_loss, kind=kind), naive, 2, learns=(0, 1))
        for kind, naive in DISCRIMINATOR.items()
    },
    "approximate_r1": Call(losses.approximate_r1, lambda a, b: mean((a - b) ** 2), 2, learns=(0, 1)),
    "fake_score_loss": Call(losses.fake_score_loss, lambda v, x, eps: mean((v - (eps - x)) ** 2), 3),
    "flow_matching_loss": Call(losses.flow_matching_loss, lambda v, x, eps: mean((v - (eps - x)) ** 2), 3),
    "target_prediction_loss": Call(
        partial(losses.target_prediction_loss, anchor_sigma=0.75),
        lambda v, noise, anchor: mean((v - (noise - anchor) / 0.25) ** 2),
        3,
    ),
    "self_distillation_loss velocity": Call(
        losses.self_distillation_loss, lambda student, teacher: mean((student - teacher) ** 2), 2
    ),
    "self_distillation_loss clean": Call(
        partial(losses.self_distillation_loss, sigma=0.75, form="clean"),
        lambda student, teacher: mean((0.75 * student - 0.75 * teacher) ** 2),
        2,
    ),
}
