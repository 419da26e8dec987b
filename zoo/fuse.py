"""Puts the fused operators into a stock diffusers model, in place, and takes them out again.

A module gets a class of the same name that has the same parameters and another `forward`; nothing else about it
changes. So state_dict keys, `save_pretrained`, LoRA layers already inside or added later, gradient checkpointing, hooks
and attention backends stay what they are. `unfuse` gives every module its class back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .parts_read import Norms, faults_of_attention, faults_of_norms, left_behind

Model = TypeVar("Model", bound=nn.Module)


@functools.cache
def _families() -> Mapping[type, type]:
    """stock class -> fused class, for modules and for the attention processors that they hold."""
    from . import flux2, z_image

    return {**z_image.FUSED, **flux2.FUSED}


@functools.cache
def _models() -> tuple[type, ...]:
    from . import flux2, z_image

    return (z_image.STOCK, flux2.STOCK)


@functools.cache
def _attention() -> tuple[type, ...]:
    from . import flux2, z_image

    return z_image.ATTENTION + flux2.ATTENTION


@functools.cache
def _norms() -> Mapping[type, tuple[Norms, ...]]:
    """stock class -> the norms that its fused class, or its attention's fused processor, reads."""
    from . import flux2, z_image

    return {**z_image.NORMS, **flux2.NORMS}


@functools.cache
def _fused_models() -> tuple[type, ...]:
    return tuple(_families()[stock] for stock in _models())


@functools.cache
def _known_to_caches() -> None:
    """diffusers' caches (first block, mag, ...) look up by class what a block takes and returns: ours do as stock's."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:
        return
    for stock, fused in _families().items():
        try:
            known = TransformerBlockRegistry.get(stock)
        except ValueError:
            continue
        TransformerBlockRegistry.register(fused, copy.copy(known))


def _plain(model: nn.Module) -> nn.Module:
    """The diffusers model inside PEFT's and torch.compile's wrappers."""
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise TypeError("fuse: the model is compiled already; fuse first, then torch.compile")
    if hasattr(model, "get_base_model"):  # peft.PeftModel
        return cast(Any, model).get_base_model()
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has been here; also inside PEFT's and FSDP's classes."""
    return isinstance(_plain(model), tuple(_fused_models()))


def fuse(model: Model) -> Model:
    """Makes a stock ZImageTransformer2DModel or Flux2Transformer2DModel run on twostep.ops, in place; returns it.

    May be called before or after LoRA is added, and before torch.compile and FSDP wrap the model. A second call changes
    nothing. An attention processor of your own, or an attention or a norm that is not stock's or has a forward of its
    own, is named in an error. Blocks read the weights of their norms without calling the norms: hooks on norms are not
    called, and what moves every layer by itself when it is called (diffusers' enable_sequential_cpu_offload) cannot
    move those: offload whole models or blocks, or unfuse. Hooks on the model, its blocks, their attention and linear
    layers are called as ever.
    """
    root, classes = _plain(model), _families()
    if not isinstance(root, _models()):
        accepted = ", ".join(stock.__name__ for stock in _models())
        raise TypeError(f"fuse: cannot fuse {type(root).__name__}; accepted are diffusers' {accepted}")
    foreign = _foreign(root, classes)
    if foreign:
        raise TypeError("fuse: " + "; ".join(foreign))
    _exchange(root, classes)
    _known_to_caches()
    # A pipeline that is made with this model writes into model_index.json where its class is to be found: in diffusers.
    root.__dict__["__module__"] = next(s for s in _models() if isinstance(root, s)).__module__
    return model


def unfuse(model: Model) -> Model:
    """Gives a fused model its stock diffusers classes back, in place; returns it. A stock model is left as it is."""
    root = _plain(model)
    _exchange(root, {fused: stock for stock, fused in _families().items()})
    root.__dict__.pop("__module__", None)
    return model


def _exchange(root: nn.Module, classes: Mapping[type, type]) -> None:
    for module in root.modules():
        if type(module) in classes and left_behind(module):
            del module.__dict__["forward"]  # it would stand before the new class's
        for thing in (module, getattr(module, "processor", None)):
            if type(thing) in classes:
                thing.__class__ = classes[type(thing)]


def _foreign(root: nn.Module, classes: Mapping[type, type]) -> list[str]:
    """Why this model cannot be fused: modules of a class that derives from a stock one, processors that are not
    stock's, and parts that would be read as what they are not."""
    ours = set(classes.values())
    complaints: list[str] = []
    for name, module in root.named_modules():
        complaints += faults_of_attention(module, name, _attention())
        groups = next((found for kind, found in _norms().items() if isinstance(module, kind)), ())
        complaints += faults_of_norms(module, name, groups, classes)
        place = f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}"
        if type(module) not in ours and type(module) not in classes and isinstance(module, tuple(classes)):
            wrapped = "FSDP" in type(module).__name__
            advice = "fuse before fully_shard" if wrapped else "its forward would be lost"
            complaints.append(f"{place}, which derives from a stock class: {advice}")
        processor: Any = getattr(module, "processor", None)
        if processor is not None and type(processor) not in ours and type(processor) not in classes:
            complaints.append(
                f"{place} with a processor {type(processor).__name__}, which the fused blocks would bypass: reset it "
                "with set_attn_processor, or leave this model stock"
            )
    return complaints
