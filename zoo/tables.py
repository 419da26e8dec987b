"""A cache for tensors that depend on shapes alone: rotary tables, masks, layouts of a sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def cached_tables(maxsize: int) -> Callable[[Function], Function]:
    """lru_cache for a function of hashable arguments that makes constant tensors.

    While fake or traced tensors are made (torch.export, torch.compile, `twostep plan`) nothing is kept, and what is
    kept can take part in autograd, even if it was first asked for under inference_mode.
    """

    def decorate(function: Function) -> Function:
        kept = functools.lru_cache(maxsize=maxsize)(function)

        @functools.wraps(function)
        def table(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
                return function(*arguments)
            with torch.inference_mode(False), torch.no_grad():
                return kept(*arguments)

        return cast(Function, table)

    return decorate
