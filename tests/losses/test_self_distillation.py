"""D-OPSD's loss in both forms, and its backward a step at a time."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from twostep import losses

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()

    def forward(self, x: Tensor, sigma: float, context: Tensor) -> Tensor:
        return self.layers(torch.cat([x, torch.full_like(x[:, :1], sigma), context], 1))


def step_losses(student: Network, teacher: Network, form: str, *, each: bool) -> list[Tensor]:
    """One on-policy roll-out; with `each`, backward after every step, otherwise the losses are left to the caller."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    text, image = torch.zeros(5, 1, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    found = []
    for sigma, after in itertools.pairwise(SIGMAS):
        x = x.detach()
        v = student(x, sigma, text)
        loss = losses.self_distillation_loss(v, teacher(x, sigma, image), sigma, form=form) / (len(SIGMAS) - 1)
        x = x + (after - sigma) * v
        if each:
            loss.backward()
        found.append(loss)
    return found


@pytest.mark.parametrize("form", ["velocity", "clean"])
def test_backward_step_by_step_equals_the_summed_one(form: str) -> None:
    torch.manual_seed(0)
    student = Network()
    teacher, twin = Network(), copy.deepcopy(student)
    step_losses(student, teacher, form, each=True)
    sum(step_losses(twin, teacher, form, each=False)).backward()
    for stepwise, summed in zip(student.parameters(), twin.parameters(), strict=True):
        assert stepwise.grad.abs().max() > 0
        torch.testing.assert_close(stepwise.grad, summed.grad, rtol=1e-13, atol=1e-16)
    assert all(p.grad is None for p in teacher.parameters()), "the teacher is data"


def test_clean_form_compares_clean_predictions() -> None:
    x, student, teacher = torch.randn(3, 4, 5, 6, dtype=torch.float64).unbind()
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    per = sigma[:, None, None]
    expected = ((x - per * student) - (x - per * teacher)).square().mean()
    torch.testing.assert_close(losses.self_distillation_loss(student, teacher, sigma, form="clean"), expected)
    weighted = losses.self_distillation_loss(student, teacher, weight=sigma**2)
    torch.testing.assert_close(weighted, expected)


def test_velocity_form_does_not_depend_on_sigma() -> None:
    student, teacher = torch.randn(2, 4, 5).unbind()
    assert torch.equal(
        losses.self_distillation_loss(student, teacher, 0.3), losses.self_distillation_loss(student, teacher)
    )


@pytest.mark.parametrize(
    ("sigma", "form", "error", "message"),
    [
        (None, "clean", ValueError, "form 'clean' needs sigma"),
        (0.5, "score", ValueError, "form is 'score', expected one of 'velocity', 'clean'"),
        (0.0, "clean", ValueError, r"sigma is 0.0, expected a value in \(0, 1\]"),
        (-0.5, "velocity", ValueError, r"sigma is -0.5, expected a value in \(0, 1\]"),
        (900.0, "clean", ValueError, r"sigma is 900.0, .*a timestep in 0..1000"),
        (torch.tensor([0.5, 0.0]), "clean", ValueError, "sigma holds 0.0, expected values in"),
        (torch.nn.Parameter(torch.tensor(5.0)), "clean", ValueError, "sigma holds 5.0, expected values in"),
        (torch.tensor([0.5, 0.5, 0.5]), "clean", ValueError, r"sigma has shape \[3\], expected \[2\]"),
        (True, "clean", TypeError, "sigma is bool, expected a number"),
    ],
)
def test_says_what_is_wrong(sigma: object, form: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        losses.self_distillation_loss(torch.ones(2, 3), torch.ones(2, 3), sigma, form=form)
