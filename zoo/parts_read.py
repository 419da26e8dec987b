"""What the fused blocks read of their parts without calling them: attention modules, whose processor they call, and
norms, whose weight and eps they hand to an operator. Such a part must be exactly what it is taken for, since a forward
of its own would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Norms:
    """Norms of a module, by their paths in it, which one eps serves. A norm may be absent."""

    names: tuple[str, ...]
    kind: type
    weight: bool = True  # it is read; else there must be none
    together: bool = False  # all of them are there, or none


def replaced_forward(module: nn.Module) -> bool:
    """A forward that somebody has put on the instance. accelerate and diffusers do that too, and call the old one."""
    hooked = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
    return "forward" in vars(module) and not hooked and not left_behind(module)


def left_behind(module: nn.Module) -> bool:
    """The class's own forward on the instance: what accelerate leaves there when it takes its hooks away."""
    return getattr(vars(module).get("forward"), "__func__", None) is type(module).forward


def faults_of_attention(module: nn.Module, place: str, kinds: tuple[type, ...]) -> Iterator[str]:
    """A forward on the instance is no fault: such a module is called (zoo/attention.py), and FSDP hooks it."""
    if isinstance(module, kinds) and type(module) not in kinds and "FSDP" not in type(module).__name__:
        yield f"{place} is a {_class(module)}, which derives from a stock class: its forward would be lost"


def faults_of_norms(module: nn.Module, place: str, groups: Iterable[Norms], ours: Any) -> Iterator[str]:
    for group in groups:
        found = {name: _plain(_part(module, name)) for name in group.names}
        norms = {name: norm for name, norm in found.items() if norm is not None}
        wrong = False
        if group.together and norms and len(norms) < len(found):
            yield f"{place} has {', '.join(norms)} and not {', '.join(found.keys() - norms.keys())}: both, or neither"
        for name, norm in norms.items():
            for fault in _faults(norm, group, ours.get(group.kind)):
                wrong = True
                yield f"{place}.{name} {fault}"
        if not wrong and len({norm.eps for norm in norms.values()}) > 1:
            told = ", ".join(f"{name} {norm.eps}" for name, norm in norms.items())
            yield f"{place} has norms of different eps ({told}), and the fused block has one for all"


def _faults(norm: Any, group: Norms, fused: type | None) -> Iterator[str]:
    if type(norm) not in (group.kind, fused):
        yield f"is a {_class(norm)}, expected {group.kind.__name__}: its forward would be lost"
    elif replaced_forward(norm):
        yield "has a forward of its own, which would be lost"
    elif getattr(norm, "bias", None) is not None:
        yield "has a bias, which would be lost"
    elif not group.weight and getattr(norm, "weight", None) is not None:
        yield "has a weight, which would be lost"
    elif norm.eps is None:
        yield "has no eps, and the fused operator needs a number"


def _part(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:  # absent, or None
        return None


def _plain(norm: Any) -> Any:
    """The norm inside PEFT's wrapper of modules_to_save, which answers for the weight that is active."""
    return getattr(norm, "original_module", norm)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
