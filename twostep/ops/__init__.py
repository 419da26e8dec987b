"""The fused operators: each with a forward and a backward, on the CPU and on CUDA, in one pass over the data.

`reference` holds the same functions in plain PyTorch: the oracle of the tests, and the fallback where no kernel fits.
"""

from . import reference
from .gated_residual import gated_residual
from .gated_residual_norm_modulate import gated_residual_norm_modulate
from .library import backend, build_info
from .norm_modulate import norm_modulate
from .qk_norm_rope import qk_norm_rope
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "backend",
    "build_info",
    "gated_residual",
    "gated_residual_norm_modulate",
    "norm_modulate",
    "qk_norm_rope",
    "reference",
    "rope",
    "swiglu",
]
