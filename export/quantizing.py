"""Linear layers' weights in 8 bits, by torchao, as diffusers writes and reads them; and in programs.

Weights alone: a layer computes in the dtype of its input. A network takes half of bfloat16's bytes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from torch import Tensor, nn

from ..zoo import Backbone
from ..zoo.adapters import AdapterView
from .merging import with_weights

Model = TypeVar("Model", bound=nn.Module)
KINDS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def check_quantizing(kind: str | None) -> None:
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"export: the quantization is {kind!r}, expected one of {', '.join(KINDS)}")
    if find_spec("torchao") is None:
        raise ValueError("export: quantized weights need torchao:  pip install 'twostep[quantize]'")


def quantize(network: nn.Module, kind: str) -> None:
    """In its place."""
    import torchao.quantization

    torchao.quantization.quantize_(network, _how(kind))


def quantize_folder(folder: Path, kind: str, dtype: torch.dtype, max_shard_size: str) -> None:
    """A network's folder, in its place."""
    how = diffusers.TorchAoConfig(_how(kind))
    network = _class(folder).from_pretrained(folder, torch_dtype=dtype, quantization_config=how)
    new = folder.with_name(f"{folder.name}.new")
    network.save_pretrained(new, max_shard_size=max_shard_size)
    shutil.rmtree(folder)
    new.rename(folder)


def rounded(
    model: Model, dtype: torch.dtype, kind: str | None = None, *, among: Callable[[str], bool] = lambda name: True
) -> Model:
    """A copy whose tensors have lost what writing loses, of adapters their base's too; without torchao.

    Args:
        among: whether a tensor of this name is written.
    """
    made = copy.deepcopy(model)
    bases = dict.fromkeys(module.model for module in made.modules() if isinstance(module, AdapterView))
    inside = [one for root in (made, *bases) for one in root.named_modules()]  # a view has no base among its modules
    for place, module in inside:
        for name, parameter in module.named_parameters(recurse=False):
            if not among(f"{place}.{name}"):
                continue
            tensor = parameter.detach().to(dtype).float()
            if kind is not None and isinstance(module, nn.Linear) and name == "weight":
                largest = tensor.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                if kind == "int8":
                    tensor = (tensor / largest * 127).round() / 127 * largest
                else:
                    tensor = (tensor / largest * 448).to(torch.float8_e4m3fn).float() / 448 * largest
            parameter.data = tensor
    return made


def exact_weights(folder: Path, network: Backbone) -> Backbone:
    """A network of this one's kind with the numbers that the folder's 8 bits stand for, in float32."""
    return with_weights(network, numbers(_class(folder).from_pretrained(folder, torch_dtype=torch.float32)))


def numbers(network: nn.Module) -> dict[str, Tensor]:
    """What its weights stand for, in float32."""
    state = network.state_dict()
    quantized = [name for name, tensor in state.items() if type(tensor) not in (Tensor, nn.Parameter)]
    state |= {name: state[name].dequantize() for name in quantized}
    return {name: tensor.float() for name, tensor in state.items()}


def _how(kind: str) -> Any:
    import torchao.quantization

    return getattr(torchao.quantization, KINDS[kind])()


def _class(folder: Path) -> Any:
    return getattr(diffusers, json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
