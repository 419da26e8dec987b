"""Distillation losses as pure functions of tensors: nothing here needs the rest of the library, or any trainer.

One convention (sigma: 1 is noise, 0 the clean image; velocity v = eps - x), one rule for every loss: float32 or better
inside, one value per sample, then `weight` and `reduction`. docs/losses.md has each formula, its paper and an example.
"""

from __future__ import annotations

from .adversarial import approximate_r1, discriminator_loss, generator_adversarial_loss
from .dmd import decoupled_dmd_loss, decoupled_dmd_terms, dmd_gradient, dmd_loss
from .f_divergence import f_divergence_weight
from .flow_matching import fake_score_loss, flow_matching_loss
from .self_distillation import self_distillation_loss
from .sigmas import logit_normal_sigmas, shift_sigmas, shifted_sigmas, sigmas_below, uniform_sigmas
from .target_prediction import average_velocity, target_prediction_loss

__all__ = [
    "approximate_r1",
    "average_velocity",
    "decoupled_dmd_loss",
    "decoupled_dmd_terms",
    "discriminator_loss",
    "dmd_gradient",
    "dmd_loss",
    "f_divergence_weight",
    "fake_score_loss",
    "flow_matching_loss",
    "generator_adversarial_loss",
    "logit_normal_sigmas",
    "self_distillation_loss",
    "shift_sigmas",
    "shifted_sigmas",
    "sigmas_below",
    "target_prediction_loss",
    "uniform_sigmas",
]
