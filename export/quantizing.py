"""Linear layers' weights in 8 bits, by torchao, as diffusers writes and reads them.

Weights alone: a layer computes in the dtype of its input. A network takes half of bfloat16's bytes.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..zoo import Backbone
from .merging import with_weights

KINDS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def check_quantizing(kind: str | None) -> None:
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"export: the quantization is {kind!r}, expected one of {', '.join(KINDS)}")
    if find_spec("torchao") is None:
        raise ValueError("export: quantized weights need torchao:  pip install 'twostep[quantize]'")


def quantize(folder: Path, kind: str, dtype: torch.dtype, max_shard_size: str) -> None:
    """A network's folder, in its place."""
    import torchao.quantization

    how = diffusers.TorchAoConfig(getattr(torchao.quantization, KINDS[kind])())
    network = _class(folder).from_pretrained(folder, torch_dtype=dtype, quantization_config=how)
    new = folder.with_name(f"{folder.name}.new")
    network.save_pretrained(new, max_shard_size=max_shard_size)
    shutil.rmtree(folder)
    new.rename(folder)


def exact_weights(folder: Path, network: Backbone) -> Backbone:
    """A network of this one's kind with the numbers that the folder's 8 bits stand for, in float32."""
    state = _class(folder).from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    quantized = [name for name, tensor in state.items() if type(tensor) not in (Tensor, nn.Parameter)]
    state |= {name: state[name].dequantize() for name in quantized}
    return with_weights(network, {name: tensor.float() for name, tensor in state.items()})


def _class(folder: Path) -> Any:
    return getattr(diffusers, json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
