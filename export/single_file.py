"""A student's networks as single files in the original's names, which ComfyUI and diffusers' from_single_file load.

transformer.safetensors  transformer_2.safetensors   a file for each network
export.json                                          where they come from, and their sigmas
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..disk import check_space
from ..zoo import Backbone, Context, fuse
from ..zoo.program import network as traceable
from . import fresh_process
from .fresh_process import ExportFailed, hold, relative
from .merging import merged, with_weights
from .new_folder import new_folder, target_of
from .original import from_original, to_original
from .probes import FLOAT32
from .quantizing import rounded
from .source import Exported, Source, found

_READ = """
import hashlib
import diffusers
model = getattr(diffusers, facts["class"]).from_single_file(
    facts["file"], config=facts["config"], torch_dtype=getattr(torch, facts["dtype"]))
for name, tensor in model.state_dict().items():
    digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
    made[name] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
"""


def export_single_file(
    student: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    base: str | Path | None = None,
) -> Exported:
    """Writes the folder, or raises and leaves nothing."""
    target = target_of(out, overwrite, found(student))
    source = Source.read(student, base=base)
    source.guard(target)
    check_space(target.parent, source.parameters * dtype.itemsize, "export")
    with new_folder(target, lambda: target_of(target, overwrite)) as new:
        changed, whole, error = 0.0, 0.0, 0.0
        for number, network in enumerate(source.networks, start=1):
            exact = merged(network)
            state = {name: tensor.to(dtype) for name, tensor in exact.items()}
            name = "transformer" if number == 1 else f"transformer_{number}"
            with source.phase("writing"):
                written = {key: tensor.contiguous() for key, tensor in to_original(state, source.family).items()}
                metadata = {"format": "pt", "step": str(number), "sigmas": json.dumps(source.model.sigmas)}
                save_file(written, new / f"{name}.safetensors", metadata=metadata)
            with source.phase("checking"):
                _verify(new / f"{name}.safetensors", state, type(network.model).__name__, dict(network.model.config))
                error = max(error, _hold(new / f"{name}.safetensors", network, dtype))
            changed += sum(float((state[key].float() - tensor).square().sum()) for key, tensor in exact.items())
            whole += sum(float(tensor.square().sum()) for tensor in exact.values())
        rounding, named = (changed / whole) ** 0.5, str(dtype).removeprefix("torch.")
        errors = {"of velocities, against the student": error, "of rounding the weights": rounding}
        return source.leave(new, target, error=0.0, rounding=rounding, dtype=named, errors=errors)


def _hold(file: Path, network: Backbone, dtype: torch.dtype) -> float:
    """Velocities of the file's weights, in float32, against those of the student's own network, adapter and all; in
    another dtype they may be off by thrice what rounding the network's own tensors does."""
    again = with_weights(network, {n: t.float() for n, t in from_original(load_file(file), network.family).items()})
    fuse(again.model)
    factor = network.latent_factor
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = traceable(again).example(2, 4 * factor, 6 * factor, 64)
        context = Context(given["features"], lengths=given.get("lengths"))
        true = network.velocity(given["x"], given["sigma"], context)
        allowed = FLOAT32
        if dtype != torch.float32:
            own = rounded(network, dtype)
            allowed += 3 * relative(own.velocity(given["x"], given["sigma"], context), true)
        found = again.velocity(given["x"], given["sigma"], context)
    return hold(relative(found, true), allowed, "the file's velocities differ from the student's", "the merging")


def _verify(file: Path, state: dict[str, Tensor], model: str, config: dict[str, object]) -> None:
    """diffusers makes of the file what was to be written, bit for bit."""
    folder = file.parent / ".config"
    folder.mkdir()
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    (folder / "config.json").write_text(json.dumps({"_class_name": model, **kept}), encoding="utf-8")
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    facts = {"file": str(file), "config": str(folder), "class": model, "dtype": dtype}
    read = fresh_process.run(_READ, facts, {"nothing": torch.zeros(1)}, what="diffusers could not read the file")
    (folder / "config.json").unlink()
    folder.rmdir()
    differ = sorted(read.keys() ^ state.keys())
    differ += [name for name in read.keys() & state.keys() if bytes(read[name].tolist()) != _digest(state[name])]
    if differ:
        raise ExportFailed(
            f"export: diffusers reads {len(differ)} tensors of {file.name} as others than were written, such as "
            f"{differ[0]}; nothing was left"
        )


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
