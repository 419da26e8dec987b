"""Whether the values inside a tensor can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def in_transform() -> bool:
    """Inside torch.func (grad, vmap, jvp, ...) or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def values_can_be_read(t: Tensor) -> bool:
    if torch.compiler.is_compiling() or t.device.type == "meta":
        return False
    hidden: bool = isinstance(t, FakeTensor) or is_traceable_wrapper_subclass(t)  # distributed: no values, or not all
    return not hidden and torch._C._len_torch_dispatch_stack() == 0 and not in_transform()
