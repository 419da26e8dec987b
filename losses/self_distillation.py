"""On-policy self-distillation, D-OPSD (arXiv 2605.05204): student and teacher predict at a state the student visited.

    velocity    mean (v_student - stopgrad(v_teacher))^2
    clean       mean (x_hat_student - stopgrad(x_hat_teacher))^2  =  sigma^2 times the velocity form

since x_hat = x_sigma - sigma v at one and the same x_sigma. The paper has the velocity form; its released code the
clean one. The states are detached, so no gradient crosses steps: the backward of each step's loss, one after another,
gives the gradient of the sum over steps with one step's activations.
"""

from __future__ import annotations

from torch import Tensor

from . import arguments
from .reduction import check, reduce, sample_mean, widen

FORMS = ("velocity", "clean")


def self_distillation_loss(
    v_student: Tensor,
    v_teacher: Tensor,
    sigma: float | Tensor | None = None,
    *,
    form: str = "velocity",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The student's distance from the teacher at one visited state.

    Args:
        v_student: velocity at the detached state [B, ...]; carries the gradient.
        v_teacher: the teacher's velocity at the same state and sigma, same shape. Data: it is detached.
        sigma: the state's sigma in (0, 1], a number or one per sample [B]; required by the clean form, checked in both.
        form: "velocity" or "clean".
        weight: [B], multiplies each sample's loss.
        reduction: "mean" (of weight * loss over the samples), "sum", or "none" for [B].
    """
    loss = "self_distillation_loss"
    check(loss, "v_student", v_student, weight, reduction)
    arguments.check_same(loss, "v_teacher", v_teacher, "v_student", v_student)
    arguments.check_choice(loss, "form", form, FORMS)
    if sigma is not None:
        arguments.check_sigma(loss, "sigma", sigma, "v_student", v_student, zero=False, one=True)
    elif form == "clean":
        raise ValueError(f"{loss}: form 'clean' needs sigma, the state's noise level: a number or [batch]")
    student, teacher = widen(v_student, v_teacher.detach())
    difference = student - teacher
    if form == "clean":
        assert sigma is not None
        difference = arguments.per_sample_factor(sigma, difference) * difference
    return reduce(sample_mean(difference.square()), weight, reduction)
