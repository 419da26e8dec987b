"""DP-DMD's target against flows whose average velocity is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from twostep import losses

from .gaussians import example, integrate, two_modes

ANCHORS = [0.0, 0.25, 0.75, 0.95]


@pytest.mark.parametrize("anchor_sigma", ANCHORS)
def test_target_is_the_average_velocity_of_the_flow(anchor_sigma: float) -> None:
    """(1 / (1 - s)) * integral from s to 1 of the velocity along the closed-form trajectory, by Gauss-Legendre."""
    noise, teacher = torch.randn(6, 3, dtype=torch.float64), example(3)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    average = torch.zeros_like(noise)
    for node, weight in zip(nodes, weights, strict=True):
        sigma = anchor_sigma + (1 - anchor_sigma) * (node + 1) / 2
        average += weight / 2 * teacher.velocity(teacher.flow(noise, sigma), sigma)
    anchor = teacher.flow(noise, anchor_sigma)
    torch.testing.assert_close(losses.average_velocity(noise, anchor, anchor_sigma), average, rtol=1e-8, atol=1e-8)
    assert losses.target_prediction_loss(average, noise, anchor, anchor_sigma) < 1e-15
    v = torch.randn_like(noise)
    torch.testing.assert_close(
        losses.target_prediction_loss(v, noise, anchor, anchor_sigma), (v - average).square().mean(), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("anchor_sigma", ANCHORS)
def test_one_euler_step_with_the_target_lands_on_the_anchor(anchor_sigma: float) -> None:
    """For a teacher without a closed flow (two modes), integrated numerically: the sign and the scale of the target."""
    noise = torch.randn(6, 1, dtype=torch.float64)
    anchor = integrate(two_modes().velocity, noise, max(anchor_sigma, 1e-3), 60)
    anchor_sigma = max(anchor_sigma, 1e-3)
    v = torch.zeros_like(noise, requires_grad=True)
    for _ in range(60):
        loss = losses.target_prediction_loss(v, noise, anchor, anchor_sigma, reduction="sum")
        (slope,) = torch.autograd.grad(loss, v)
        v = (v - 0.25 * slope).detach().requires_grad_()
    torch.testing.assert_close((noise + (anchor_sigma - 1) * v).detach(), anchor)


def test_anchors_may_differ_within_a_batch() -> None:
    noise, v, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), example(3)
    anchors = torch.cat([teacher.flow(noise[i : i + 1], s) for i, s in enumerate(ANCHORS)])
    together = losses.target_prediction_loss(v, noise, anchors, torch.tensor(ANCHORS).double(), reduction="none")
    alone = [
        losses.target_prediction_loss(v[i : i + 1], noise[i : i + 1], anchors[i : i + 1], s)
        for i, s in enumerate(ANCHORS)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("sigma", "error", "message"),
    [
        (1.0, ValueError, r"anchor_sigma is 1.0, expected a value in \[0, 1\)"),
        (750, ValueError, r"anchor_sigma is 750, .*a timestep in 0..1000 is sigma \* 1000"),
        (-0.1, ValueError, "anchor_sigma is -0.1"),
        (math.nan, ValueError, "anchor_sigma is nan, expected a finite number"),
        ("0.75", TypeError, "anchor_sigma is str, expected a number"),
        (torch.tensor([0.5, 1.0]), ValueError, r"anchor_sigma holds 1.0, expected values in \[0, 1\)"),
        (torch.tensor([0.5, math.nan]), ValueError, "anchor_sigma holds nan"),
        (torch.tensor(1.5), ValueError, "anchor_sigma holds 1.5"),
        (torch.tensor([0.5]), ValueError, r"anchor_sigma has shape \[1\], expected \[2\], one value for each sample"),
        (torch.full((2, 1), 0.5), ValueError, r"anchor_sigma has shape \[2, 1\], expected \[2\]"),
        (torch.tensor([0, 0]), TypeError, "anchor_sigma has dtype torch.int64"),
    ],
)
def test_says_what_is_wrong(sigma: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        losses.target_prediction_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), sigma)


def test_sigma_per_sample_compiles_and_maps() -> None:
    torch.compiler.reset()
    v, noise, anchor = torch.randn(3, 4, 5).unbind()
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75])
    expected = losses.target_prediction_loss(v, noise, anchor, sigma, reduction="none")
    compiled = torch.compile(losses.target_prediction_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, noise, anchor, sigma, reduction="none"), expected)
    mapped = torch.func.vmap(lambda *one: losses.target_prediction_loss(*(t[None] for t in one)))
    torch.testing.assert_close(mapped(v, noise, anchor, sigma), expected)
