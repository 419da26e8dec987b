"""Calls the CUDA launchers with tensors: allocates outputs, says which strides a launcher wants, and nothing else.

What runs them is a `Launch`: the emulated device here; the checks never see which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NORMS = {"none": 0, "rms": 1, "layer": 2}
GATE_ACTS = {"none": 0, "tanh": 1}
NOT_SUPPORTED = 801

# Fields passed with strides; every other tensor is contiguous and passed as an address.
ROWS = {"x", "y_", "z", "dy", "dout", "dh", "scale", "shift", "gate", "up", "freqs"}
ROWS |= {"v", "noise", "inherited", "own", "g", "real", "fake"}  # samples: one stride
SWIGLU_ROWS = {"dgate", "dup"}
HEADS = {"q", "k", "dq_out", "dk_out"}


class Launch(Protocol):
    def __call__(self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor | None]) -> int: ...

    def splits(self, batch: int, length: int, width: int) -> int: ...


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _argument(launcher: str, name: str, value: Any, outputs: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    heads = name in HEADS or (launcher == "rope" and name == "x")
    rows = launcher.startswith("swiglu") and name in SWIGLU_ROWS
    # `out` is an output of the seam's forward and an input, with strides, of its backward.
    rows = rows or (name not in outputs and (name in ROWS or name == "out"))
    if value.numel() == 0:
        strides = (0, 0)
    elif heads or rows:
        assert value.stride(-1) == 1 or value.shape[-1] == 1
        strides = (*value.stride()[: value.dim() - 1], 0)
    else:
        assert value.is_contiguous()
    if heads:
        return (value.data_ptr(), value.shape[2], *((0, 0, 0) if value.numel() == 0 else value.stride()[:3]))
    return (value.data_ptr(), strides[0], strides[1]) if rows else value.data_ptr()


class Emulator:
    """Launches on the emulated device; only the tensors of the call are its memory."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def splits(self, batch: int, length: int, width: int) -> int:
        return int(self.module.splits(batch, length, width))

    @contextmanager
    def configured(self, **settings: Any) -> Iterator[None]:
        self.module.configure(**settings)
        try:
            yield
        finally:
            self.module.configure()

    def __call__(self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor | None]) -> int:
        self.module.clear_ranges()
        for tensors, writable in ((inputs, False), (outputs, True)):
            spans = sorted(_span(t) for t in tensors.values() if isinstance(t, Tensor) and t.numel() > 0)
            merged: list[list[int]] = []
            for begin, end in spans:
                if merged and begin < merged[-1][1]:
                    merged[-1][1] = max(merged[-1][1], end)
                else:
                    merged.append([begin, end])
            for begin, end in merged:
                self.module.register_range(begin, end - begin, writable)
        fields = {k: _argument(name, k, v, outputs) for k, v in {**inputs, **outputs}.items() if v is not None}
        return int(getattr(self.module, name)(fields))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that no kernel has written: a value that stays shows up as NaN."""
    return torch.full(shape, torch.nan, dtype=dtype)


def _shape(x: Tensor, parameters: torch.dtype | None = None) -> dict[str, Any]:
    batch, length, width = x.shape[0], x.shape[1], x.shape[-1]
    shape = {"dtype": DTYPES[x.dtype], "batch": batch, "length": length, "width": width}
    return shape if parameters is None else {**shape, "param_dtype": DTYPES[parameters]}


def _succeed(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the launcher returned CUDA error {status}")


class Modulated(NamedTuple):
    y: Tensor
    mean: Tensor | None
    rstd: Tensor


def norm_modulate_forward(
    launch: Launch,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    norm: str,
    eps: float,
    parameters: torch.dtype,
) -> Modulated:
    rows = x.shape[:2]
    out = Modulated(
        poisoned(*x.shape, dtype=x.dtype),
        poisoned(*rows, dtype=torch.float32) if norm == "layer" else None,
        poisoned(*rows, dtype=torch.float32),
    )
    inputs = {"x": x, "weight": weight, "scale": scale, "shift": shift, "norm": NORMS[norm], "eps": eps}
    _succeed(launch("norm_modulate_forward", {**_shape(x, parameters), **inputs}, out._asdict()))
    return out


def _partials(launch: Launch, sums: int, x: Tensor, splits: int | None, width: int) -> dict[str, Any]:
    count = launch.splits(x.shape[0], x.shape[1], width) if splits is None else splits
    partials = poisoned(sums, x.shape[0], count, x.shape[-1], dtype=torch.float32)
    return {"partials": partials, "splits": count}


def _backward(
    launch: Launch, name: str, inputs: dict[str, Any], outputs: dict[str, Tensor | None], partials: dict[str, Any]
) -> dict[str, Tensor | None]:
    memory = {**outputs, "partials": partials["partials"]}
    _succeed(launch(name, {**inputs, "splits": partials["splits"]}, memory))
    return outputs


def _modulation_gradient(x: Tensor, modulation: Tensor | None, parameters: torch.dtype) -> Tensor | None:
    return None if modulation is None else poisoned(*modulation.shape, dtype=parameters)


def norm_modulate_backward(
    launch: Launch,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    norm: str,
    parameters: torch.dtype,
    wants_shift: bool,
    splits: int | None = None,
) -> dict[str, Tensor | None]:
    outputs = {
        "dx": poisoned(*x.shape, dtype=x.dtype),
        "dweight": None if weight is None else poisoned(x.shape[-1], dtype=parameters),
        "dscale": _modulation_gradient(x, scale, parameters),
        "dshift": poisoned(x.shape[0], x.shape[-1], dtype=parameters) if wants_shift else None,
    }
    inputs = {
        **_shape(x, parameters),
        "norm": NORMS[norm],
        "scale_per_token": scale is not None and scale.dim() == 3,
        "dy": dy,
        "x": x,
        "weight": weight,
        "scale": scale,
        "mean": mean,
        "rstd": rstd,
    }
    partials = _partials(launch, 2, x, splits, x.shape[-1])
    return _backward(launch, "norm_modulate_backward", inputs, outputs, partials)


def gated_residual_forward(
    launch: Launch,
    x: Tensor,
    z: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    *,
    norm: str,
    gate_act: str,
    eps: float,
    parameters: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    out = poisoned(*x.shape, dtype=x.dtype)
    rstd = poisoned(*x.shape[:2], dtype=torch.float32) if norm == "rms" else None
    inputs = {
        **_shape(x, parameters),
        "x": x,
        "z": z,
        "gate": gate,
        "weight": weight,
        "norm": NORMS[norm],
        "gate_act": GATE_ACTS[gate_act],
        "eps": eps,
    }
    _succeed(launch("gated_residual_forward", inputs, {"out": out, "rstd": rstd}))
    return out, rstd


def gated_residual_backward(
    launch: Launch,
    dout: Tensor,
    z: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    *,
    norm: str,
    gate_act: str,
    parameters: torch.dtype,
    splits: int | None = None,
) -> dict[str, Tensor | None]:
    outputs = {
        "dz": poisoned(*z.shape, dtype=z.dtype),
        "dgate": _modulation_gradient(z, gate, parameters),
        "dweight": None if weight is None else poisoned(z.shape[-1], dtype=parameters),
    }
    inputs = {
        **_shape(z, parameters),
        "norm": NORMS[norm],
        "gate_act": GATE_ACTS[gate_act],
        "gate_per_token": gate is not None and gate.dim() == 3,
        "dout": dout,
        "z": z,
        "gate": gate,
        "weight": weight,
        "rstd": rstd,
    }
    partials = _partials(launch, 1, z, splits, z.shape[-1])
    return _backward(launch, "gated_residual_backward", inputs, outputs, partials)


class Seam(NamedTuple):
    out: Tensor
    h: Tensor
    post_rstd: Tensor | None
    mean: Tensor | None
    rstd: Tensor


def seam_forward(
    launch: Launch,
    x: Tensor,
    z: Tensor,
    parameters_: Mapping[str, Tensor | None],
    *,
    post_norm: str,
    norm: str,
    gate_act: str,
    eps: float,
    parameters: torch.dtype,
) -> Seam:
    rows = x.shape[:2]
    made = Seam(
        poisoned(*x.shape, dtype=x.dtype),
        poisoned(*x.shape, dtype=x.dtype),
        poisoned(*rows, dtype=torch.float32) if post_norm == "rms" else None,
        poisoned(*rows, dtype=torch.float32) if norm == "layer" else None,
        poisoned(*rows, dtype=torch.float32),
    )
    options = {"post_norm": NORMS[post_norm], "norm": NORMS[norm], "gate_act": GATE_ACTS[gate_act], "eps": eps}
    inputs = {**_shape(x, parameters), "x": x, "z": z, **parameters_, **options}
    _succeed(launch("gated_residual_norm_modulate_forward", inputs, made._asdict()))
    return made


def seam_backward(
    launch: Launch,
    dout: Tensor | None,
    dh: Tensor,
    out: Tensor,
    z: Tensor,
    parameters_: Mapping[str, Tensor | None],
    statistics: Mapping[str, Tensor | None],
    *,
    post_norm: str,
    norm: str,
    gate_act: str,
    parameters: torch.dtype,
    wants_shift: bool,
    splits: int | None = None,
) -> dict[str, Tensor | None]:
    width = z.shape[-1]
    gate, scale = parameters_["gate"], parameters_["scale"]
    outputs = {
        "dx": poisoned(*z.shape, dtype=z.dtype),
        "dz": poisoned(*z.shape, dtype=z.dtype),
        "dgate": _modulation_gradient(z, gate, parameters),
        "dpost_weight": None if parameters_["post_weight"] is None else poisoned(width, dtype=parameters),
        "dpre_weight": None if parameters_["pre_weight"] is None else poisoned(width, dtype=parameters),
        "dscale": _modulation_gradient(z, scale, parameters),
        "dshift": poisoned(z.shape[0], width, dtype=parameters) if wants_shift else None,
    }
    inputs = {
        **_shape(z, parameters),
        "post_norm": NORMS[post_norm],
        "norm": NORMS[norm],
        "gate_act": GATE_ACTS[gate_act],
        "gate_per_token": gate is not None and gate.dim() == 3,
        "scale_per_token": scale is not None and scale.dim() == 3,
        "dout": dout,
        "dh": dh,
        "out": out,
        "z": z,
        **statistics,
        **{k: parameters_[k] for k in ("gate", "post_weight", "pre_weight", "scale")},
    }
    partials = _partials(launch, 3, z, splits, width)
    return _backward(launch, "gated_residual_norm_modulate_backward", inputs, outputs, partials)


def qk_norm_rope_forward(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    freqs: Tensor,
    *,
    eps: float,
    parameters: torch.dtype,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = poisoned(*q.shape, dtype=q.dtype), poisoned(*k.shape, dtype=k.dtype)
    inputs = {"q": q, "k": k, "q_weight": weights[0], "k_weight": weights[1], "freqs": freqs, "eps": eps}
    outputs = {"q_out": q_out, "k_out": k_out}
    _succeed(launch("qk_norm_rope_forward", {**_shape(q, parameters), **inputs}, outputs))
    return q_out, k_out


def qk_norm_rope_backward(
    launch: Launch,
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    freqs: Tensor,
    *,
    eps: float,
    parameters: torch.dtype,
    splits: int | None = None,
) -> dict[str, Tensor | None]:
    width = q.shape[-1]
    outputs = {
        "dq": poisoned(*q.shape, dtype=q.dtype),
        "dk": poisoned(*k.shape, dtype=k.dtype),
        "dq_weight": None if weights[0] is None else poisoned(width, dtype=parameters),
        "dk_weight": None if weights[1] is None else poisoned(width, dtype=parameters),
    }
    inputs = {
        **_shape(q, parameters),
        "dq_out": dq_out,
        "dk_out": dk_out,
        "q": q,
        "k": k,
        "freqs": freqs,
        "eps": eps,
        "q_weight": weights[0],
        "k_weight": weights[1],
    }
    partials = _partials(launch, 2, q, splits, width * max(q.shape[2], k.shape[2]))
    return _backward(launch, "qk_norm_rope_backward", inputs, outputs, partials)


def rope(launch: Launch, x: Tensor, freqs: Tensor, *, inverse: bool = False) -> Tensor:
    y = poisoned(*x.shape, dtype=x.dtype)
    _succeed(launch("rope", {**_shape(x), "x": x, "freqs": freqs, "inverse": inverse}, {"y": y}))
    return y


def swiglu_forward(launch: Launch, gate: Tensor, up: Tensor) -> Tensor:
    y = poisoned(*gate.shape, dtype=gate.dtype)
    _succeed(launch("swiglu_forward", {**_shape(gate), "gate": gate, "up": up}, {"y": y}))
    return y


def swiglu_backward(launch: Launch, dy: Tensor, gate: Tensor, up: Tensor, *, joined: bool) -> tuple[Tensor, Tensor]:
    """With `joined`, the gradients are the two halves of one tensor, as where one projection makes both inputs."""
    if joined:
        halves = poisoned(*gate.shape[:2], 2 * gate.shape[2], dtype=gate.dtype).chunk(2, dim=-1)
        dgate, dup = halves[0], halves[1]
    else:
        dgate, dup = (poisoned(*gate.shape, dtype=gate.dtype) for _ in range(2))
    inputs = {**_shape(gate), "dy": dy, "gate": gate, "up": up}
    _succeed(launch("swiglu_backward", inputs, {"dgate": dgate, "dup": dup}))
    return dgate, dup


def _samples(state: Tensor, network: torch.dtype | None = None, name: str = "velocity_dtype") -> dict[str, Any]:
    shape = {"dtype": DTYPES[state.dtype], "batch": state.shape[0], "size": state.shape[1]}
    return shape if network is None else {**shape, name: DTYPES[network]}


def _steps(delta: float | Tensor) -> dict[str, Any]:
    return {"deltas": delta} if isinstance(delta, Tensor) else {"delta": delta}


def euler_step_forward(launch: Launch, x: Tensor, v: Tensor, delta: float | Tensor) -> Tensor:
    y = poisoned(*x.shape, dtype=x.dtype)
    inputs = {**_samples(x, v.dtype), "x": x, "v": v, **_steps(delta)}
    _succeed(launch("euler_step_forward", inputs, {"y": y}))
    return y


def euler_step_backward(launch: Launch, dy: Tensor, delta: float | Tensor, velocity: torch.dtype) -> Tensor:
    dv = poisoned(*dy.shape, dtype=velocity)
    _succeed(launch("euler_step_backward", {**_samples(dy, velocity), "dy": dy, **_steps(delta)}, {"dv": dv}))
    return dv


def two_step_split_forward(launch: Launch, noise: Tensor, v: Tensor, mid: float) -> tuple[Tensor, Tensor]:
    z, x_a = (poisoned(*noise.shape, dtype=noise.dtype) for _ in range(2))
    inputs = {**_samples(noise, v.dtype), "noise": noise, "v": v, "step": mid - 1}
    _succeed(launch("two_step_split_forward", inputs, {"z_out": z, "x_a": x_a}))
    return z, x_a


def two_step_split_backward(
    launch: Launch,
    inherited: Tensor | None,
    own: Tensor | None,
    factors: Tensor | None,
    coefficient: float,
    velocity: torch.dtype,
) -> Tensor:
    state = inherited if inherited is not None else own
    assert state is not None
    dv = poisoned(*state.shape, dtype=velocity)
    inputs = {
        **_samples(state, velocity),
        "inherited": inherited,
        "own": own,
        "factors": factors,
        "factor_stride": 1 if factors is not None and factors.shape[0] > 1 else 0,
        "coefficient": coefficient,
    }
    _succeed(launch("two_step_split_backward", inputs, {"dv": dv}))
    return dv


SAMPLE_PIECE = 4096  # csrc/views.h


def _piece_sums(x: Tensor) -> Tensor:
    return poisoned(x.shape[0], -(-x.shape[1] // SAMPLE_PIECE), dtype=torch.float32)


def gradient_norms(launch: Launch, g: Tensor) -> tuple[Tensor, Tensor]:
    norms, total = poisoned(g.shape[0], dtype=torch.float32), poisoned(1, dtype=torch.float32)
    outputs = {"norms": norms, "total": total, "partials": _piece_sums(g)}
    _succeed(launch("gradient_norms", {**_samples(g), "g": g}, outputs))
    return norms, total


def dmd_direction(launch: Launch, x: Tensor, real: Tensor, fake: Tensor, *, eps: float) -> Tensor:
    direction = poisoned(*x.shape, dtype=torch.float32)
    inputs = {**_samples(x, real.dtype, "prediction_dtype"), "x": x, "real": real, "fake": fake, "eps": eps}
    scratch = {"partials": _piece_sums(x), "scales": poisoned(x.shape[0], dtype=torch.float32)}
    _succeed(launch("dmd_direction", inputs, {"direction": direction, **scratch}))
    return direction
