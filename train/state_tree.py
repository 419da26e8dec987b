"""State as tensors and JSON, and back exactly: nothing that is read can run code, and nothing is rounded.

`split` takes what `state_dict()` of an optimizer, or `random_state`, gives: nested dicts (with text or int keys), lists
and tuples of tensors, NumPy arrays, bytes, numbers, text, booleans and None. Tensors, arrays and bytes get the path at
which they were found as their name in safetensors; `join` puts them back. What JSON cannot say is an object of one key:

    {"$float": "nan"}   {"$tuple": [...]}   {"$dict": [[key, value], ...]}   {"$tensor" or "$array" or "$bytes": name}
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

JSON = Any  # None, bool, int, float, str, and lists and dicts of these
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_Leaf = Callable[[str, Any], JSON]


def encode(value: Any) -> JSON:
    """State without tensors as strict JSON (which has no NaN, infinity, tuple or int key)."""
    return _encode(value, "state", _no_leaf)


def decode(value: JSON) -> Any:
    return _decode(value, {})


def split(state: Any) -> tuple[dict[str, Tensor], JSON]:
    """Tensors by name, and the rest with their names in their places. Shared memory is stored twice."""
    tensors: dict[str, Tensor] = {}

    def leaf(path: str, value: Any) -> JSON:
        name = path
        while name in tensors:  # {"a.b": x} and {"a": {"b": y}}
            name += "'"
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"$tensor": name}
        if isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(np.array(value, order="C"))
            return {"$array": name}
        if isinstance(value, (bytes, bytearray)):
            tensors[name] = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0).byte()
            return {"$bytes": name}
        return _no_leaf(path, value)

    return tensors, _encode(state, "", leaf)


def join(tensors: Mapping[str, Tensor], rest: JSON) -> Any:
    """What `split` was given."""
    return _decode(rest, tensors)


def _no_leaf(path: str, value: Any) -> JSON:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    hint = ""
    if isinstance(value, (Tensor, np.ndarray, bytes, bytearray)):
        hint = "; give it to `split`, and what that returns to the checkpoint's parts and state"
    elif isinstance(value, (np.generic, bool, int, float, str)):
        hint = "; convert it with bool(), int(), float() or str()"
    accepted = "None, bool, int, float, str, and lists, tuples and dicts of these"
    raise TypeError(
        f"checkpoint: {path or 'state'} is a {kind}, which JSON cannot hold exactly; accepted: {accepted}{hint}"
    )


def _encode(value: Any, path: str, leaf: _Leaf) -> JSON:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, dict):
        return _encode_dict(value, path, leaf)
    if type(value) in (list, tuple):
        items = [_encode(item, f"{path}.{i}" if path else str(i), leaf) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    return leaf(path or "value", value)


def _encode_dict(value: dict[Any, Any], path: str, leaf: _Leaf) -> JSON:
    for key in value:
        if type(key) not in (str, int):
            raise TypeError(f"checkpoint: {path or 'state'} has the key {key!r}, accepted: keys of type str or int")
    encoded = {key: _encode(item, f"{path}.{key}" if path else str(key), leaf) for key, item in value.items()}
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return encoded
    return {"$dict": [[key, item] for key, item in encoded.items()]}


def _decode(value: JSON, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _decode(item, tensors) for key, item in value.items()}
    ((tag, content),) = value.items()
    if tag == "$float":
        return _NOT_FINITE[content]
    if tag == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "$dict":
        return {key: _decode(item, tensors) for key, item in content}
    if tag not in ("$tensor", "$array", "$bytes"):
        raise ValueError(f"checkpoint: state has the mark {tag!r}, which this version does not know")
    if content not in tensors:
        raise ValueError(
            f"checkpoint: state refers to the tensor {content!r}, which is not among those given to `join`"
        )
    tensor = tensors[content]
    if tag == "$tensor":
        return tensor
    array = tensor.cpu().numpy()
    return array.copy() if tag == "$array" else array.tobytes()


def random_state() -> dict[str, Any]:
    """Every source of randomness of this process, for `split`: torch's own, the current GPU's, Python's and NumPy's
    global one."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),  # noqa: NPY002 - libraries draw from it whether we like it or not
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` told."""
    if state["cuda"] is not None:
        if not torch.cuda.is_available():
            raise ValueError("checkpoint: the random state has a GPU's, and no GPU is visible; resume on one")
        torch.cuda.set_rng_state(state["cuda"].cpu())
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
