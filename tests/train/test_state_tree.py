"""State through tensors and JSON: it comes back bit for bit, and what cannot is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twostep.train.state_tree import decode, encode, join, random_state, restore_random_state, split
from twostep.train.tensor_file import DTYPES, digest, write_tensors


def same(a: Any, b: Any) -> bool:
    """Equality of types, structure and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else [] for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return [(type(k), k) for k in a] == [(type(k), k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def through_disk(folder: Path, state: Any) -> Any:
    tensors, rest = split(state)
    write_tensors(folder / "t.safetensors", tensors)
    loaded = safetensors.torch.load_file(folder / "t.safetensors")
    (folder / "t.safetensors").unlink()
    return join(loaded, json.loads(json.dumps(rest, allow_nan=False)))


keys = st.text(max_size=4) | st.sampled_from(["$tensor", "$dict", "a.b", "a"]) | st.integers(-3, 3)
leaves = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda below: st.lists(below, max_size=3) | st.lists(below, max_size=3).map(tuple) | st.dictionaries(keys, below),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(state=trees)
def test_any_state_survives_json(state: Any) -> None:
    assert same(decode(json.loads(json.dumps(encode(state), allow_nan=False))), state)


shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(list(DTYPES)),
    shapes,
    st.integers(0, 99),
)
arrays = st.builds(lambda t, d: t.numpy().astype(d), shapes.map(torch.ones), st.sampled_from(["f4", "u4", "i8", "?"]))
mixed = st.recursive(
    leaves | tensors | arrays | st.binary(max_size=4),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(state=mixed)
def test_any_state_with_tensors_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    assert same(through_disk(tmp_path_factory.getbasetemp(), state), state)


def test_tensors_whose_paths_coincide_stay_apart(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(2)}, "a.b'": torch.ones(3)}
    assert same(through_disk(tmp_path, state), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-4, betas=(0.0, 0.999), amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-4), capturable=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.LBFGS(p, history_size=3),
    ],
)
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        def loss() -> Tensor:
            optimizer.zero_grad()
            value = model(x).square().mean()
            value.backward()
            return value

        for _ in range(steps):
            optimizer.step(loss)  # type: ignore[arg-type]

    model = torch.nn.Linear(5, 3)
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    stored = through_disk(tmp_path, state)
    assert same(stored, state)

    again = torch.nn.Linear(5, 3)
    again.load_state_dict(model.state_dict())
    resumed = make(again.parameters())
    resumed.load_state_dict(stored)
    train(model, optimizer, 3)
    train(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def draws(numpy_generator: np.random.Generator) -> list[Any]:
    return [
        torch.randn(3),
        random.random(),
        random.gauss(0, 1),
        np.random.randn(3),  # noqa: NPY002
        numpy_generator.normal(size=3),
    ]


def test_randomness_goes_on_where_it_was(tmp_path: Path) -> None:
    numpy_generator = np.random.default_rng(2)
    draws(numpy_generator)  # an odd number of normals: gauss keeps the second of a pair
    state = {"all": random_state(), "numpy": numpy_generator.bit_generator.state}
    stored = through_disk(tmp_path, state)
    expected = draws(numpy_generator)
    draws(numpy_generator)
    restore_random_state(stored["all"])
    numpy_generator.bit_generator.state = stored["numpy"]
    assert same(draws(numpy_generator), expected)


@pytest.mark.gpu
def test_randomness_of_the_gpu_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.randn(3, device="cuda")
    stored = through_disk(tmp_path, random_state())
    expected = torch.randn(3, device="cuda")
    restore_random_state(stored)
    assert torch.equal(torch.randn(3, device="cuda"), expected)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, torch.ones(1)]}, r"a\.1 is a torch\.Tensor, which JSON cannot hold exactly.*give it to `split`"),
        ({"a": b"x"}, r"a is a bytes,.*give it to `split`"),
        ({"a": np.float64(1)}, r"a is a numpy\.float64,.*convert it with bool\(\), int\(\), float\(\) or str\(\)"),
        ({"a": {1.5: 2}}, r"a has the key 1\.5, accepted: keys of type str or int"),
        ({"a": {True: 2}}, "a has the key True"),
        ({"a": {2}}, "a is a set"),
        (torch.float32, r"is a torch\.dtype"),
    ],
)
def test_says_what_json_cannot_hold(state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode(state)


# The files


@settings(max_examples=60, deadline=None)
@given(parts=st.dictionaries(st.text(max_size=5).filter(lambda n: n != "__metadata__"), tensors, max_size=5))
def test_safetensors_reads_what_is_written(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, Tensor]) -> None:
    path = tmp_path_factory.getbasetemp() / "file.safetensors"
    told = write_tensors(path, parts)
    try:
        assert told == {"bytes": path.stat().st_size, "sha256": digest(path)}
        assert same(dict(sorted(safetensors.torch.load_file(path).items())), dict(sorted(parts.items())))
        assert same(dict(sorted(safetensors.torch.load(path.read_bytes()).items())), dict(sorted(parts.items())))
    finally:
        path.unlink()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    z = torch.complex(x, -x)
    views = {"t": x.t(), "e": x[:1].expand(3, 6), "s": x[::2, 1::2], "c": z.conj(), "n": z.conj().imag}
    views["p"] = torch.nn.Parameter(x[1])
    write_tensors(tmp_path / "f", views)
    loaded = safetensors.torch.load_file(tmp_path / "f")
    assert all(torch.equal(loaded[name], view) for name, view in views.items())


def test_data_larger_than_a_chunk_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostep.train.tensor_file.CHUNK", 1000)
    x = torch.randn(3333)
    told = write_tensors(tmp_path / "f", {"x": x})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "f")["x"], x)
    assert told["sha256"] == digest(tmp_path / "f")


def test_every_tensor_is_aligned_in_the_file(tmp_path: Path) -> None:
    mixed_sizes = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES}
    write_tensors(tmp_path / "f", mixed_sizes)
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert (8 + length + entry["data_offsets"][0]) % mixed_sizes[name].element_size() == 0
