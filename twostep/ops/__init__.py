"""The fused operators: each with a forward and a backward, on the CPU and on CUDA, in one pass over the data.

`reference` holds the same functions in plain PyTorch: the oracle of the tests, and the fallback where no kernel fits.
"""

from . import reference
from .decompositions import decompositions
from .dmd_direction import dmd_direction
from .euler_step import clean_prediction, euler_step
from .gated_residual import gated_residual
from .gated_residual_norm_modulate import gated_residual_norm_modulate
from .gradient_norms import gradient_norms
from .library import backend, build_info
from .norm_modulate import norm_modulate
from .qk_norm_rope import qk_norm_rope
from .rope import rope
from .stash import stash
from .swiglu import swiglu
from .two_step_backward import TwoStepResult, two_step_backward
from .two_step_split import inject_gradient, two_step_split

__all__ = [
    "TwoStepResult",
    "backend",
    "build_info",
    "clean_prediction",
    "decompositions",
    "dmd_direction",
    "euler_step",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gradient_norms",
    "inject_gradient",
    "norm_modulate",
    "qk_norm_rope",
    "reference",
    "rope",
    "stash",
    "swiglu",
    "two_step_backward",
    "two_step_split",
]
