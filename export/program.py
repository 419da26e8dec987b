"""A student compiled ahead of time: all its steps in one program, for any batch, size and caption.

sampler.pt2    torch.export and AOTInductor: torch._inductor.aoti_load_package, or AOTIModelPackageLoader in C++
kernels.so     the fused kernels, which the program calls: torch.ops.load_library
run.py         how to run it; needs torch alone
export.json    inputs, sizes, errors, and the machine that it was compiled on

step_1.onnx    or the steps' networks for any runtime of ONNX, without the kernels
"""

from __future__ import annotations

import logging
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_inductor_cache

from .. import ops
from ..zoo import Backbone, Student, fuse
from ..zoo.program import Steps, Traceable, batch_dim, network
from . import fresh_process
from .fresh_process import hold, relative
from .merging import merged, with_weights
from .new_folder import bytes_in, check_space, new_folder, target_of
from .probes import FLOAT32
from .source import Exported, Source, found, write_report

RUN = Path(__file__).parent / "programs" / "run.py"
ONNX_LIMIT = 2**31 - 2**20  # bytes of a protocol buffer, and some room for the graph
# What the check runs: images, rows and columns of tokens, captions. With image tokens to pad, and without; one image.
SHAPES = ((2, 4, 6, 64), (1, 8, 4, 32), (3, 5, 3, 96))
_SAMPLE = """
torch.ops.load_library(facts["kernels"])
sampler = torch._inductor.aoti_load_package(facts["program"])
for number in range(facts["cases"]):
    own = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{number}.")}
    given = {name: t.to(facts["device"]) for name, t in own.items()}
    made[str(number)] = sampler(**given).float().cpu()
"""
_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(facts["file"], providers=["CPUExecutionProvider"])
for number in range(facts["cases"]):
    given = {name.split(".", 1)[1]: t.numpy() for name, t in tensors.items() if name.startswith(f"{number}.")}
    made[str(number)] = torch.from_numpy(session.run(None, given)[0])
"""


def export_program(
    student: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    overwrite: bool = False,
    base: str | Path | None = None,
) -> Exported:
    """Writes the folder, or raises and leaves nothing.

    Args:
        dtype: of the networks: bfloat16 for a GPU, float32 for a CPU where it is not said.
        device: that the program is compiled for, "cuda" or "cpu"; a GPU if there is one.
        base: of adapters, where it lies now.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu: there is no GPU here"
        raise ValueError(f"export: the device is {device!r}, expected {there}")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    if not ops.build_info()["usable"]:
        raise ValueError(
            f"export: a program holds the fused kernels, and they are not built: {ops.build_info()['reason']}"
        )
    target = target_of(out, overwrite, found(student))
    source = Source.read(student, base=base)
    check_space(target.parent, 3 * source.parameters * dtype.itemsize)  # its pieces lie there while it is put together
    with new_folder(target) as new, torch.no_grad():
        steps = Steps(_fused(source, dtype, device))
        cases = _cases(steps.example, source.model)
        true = _in_float32(source, cases, device)
        own = max(relative(steps(**case).cpu(), one) for case, one in zip(cases, true, strict=True))
        example, dims = steps.example(*_size(source.model)), steps.dims()
        compile_program(steps, example, dims, cases, new / "sampler.pt2")
        kind, inputs = steps.dtype, _described(example, dims)
        del steps
        shutil.copy(ops.build_info()["path"], new / "kernels.so")
        shutil.copy(RUN, new / "run.py")
        allowed = FLOAT32 if kind == torch.float32 else max(FLOAT32, 2 * own)
        error = _verify(new, cases, true, device, allowed)
        size = bytes_in(new)
        errors = {"of latents, against the student": error, "of the same student in this dtype": own}
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
        named = str(kind).removeprefix("torch.")
        write_report(new, source.report(inputs=inputs, dtype=named, device=where, bytes=size, error=errors))
    return Exported(target, size, error, own)


def compile_program(
    steps: nn.Module,
    example: dict[str, Tensor],
    dims: dict[str, Any],
    cases: Sequence[dict[str, Tensor]],
    file: Path,
) -> None:
    """Traces at the example's sizes, runs the trace at those of the cases, which checks what was assumed of sizes (the
    compiled program does not), and compiles it; what the compiler leaves lies beside the file, and is removed."""
    traced = _traced(steps, example, dims)
    for case in cases:
        traced.module()(**case)
    with _quiet(), fresh_inductor_cache(dir=str(file.parent)):
        torch._inductor.aoti_compile_and_package(traced, package_path=str(file))


def export_onnx(
    student: str | Path, out: str | Path, *, overwrite: bool = False, base: str | Path | None = None
) -> Exported:
    """step_1.onnx, and step_2.onnx where steps have parameters of their own: (x, sigma, features, ...) -> v, in
    float32."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if absent:
        raise ValueError(f"export: {', '.join(absent)} are not installed:  pip install 'twostep[onnx]'")
    target = target_of(out, overwrite, found(student))
    source = Source.read(student, base=base)
    check_space(target.parent, source.parameters * torch.float32.itemsize)
    model = _fused(source, torch.float32, "cpu")
    errors: list[float] = []
    with new_folder(target) as new, torch.no_grad():
        for number, one in enumerate(model.distinct_networks(), start=1):
            traced, file = network(one), new / f"step_{number}.onnx"
            cases = _cases(traced.example, model)
            example, dims = traced.example(*_size(model)), traced.dims(batch_dim())
            write_onnx(traced, example, dims, cases, file)
            facts = {"file": str(file), "cases": len(cases)}
            made = fresh_process.run(_ONNX, facts, _numbered(cases), what="onnxruntime could not run the network")
            likeliest = "an onnxscript that writes these operators in another way than the tested one"
            for number_of_case, case in enumerate(cases):
                error = relative(made[str(number_of_case)], traced(**case))
                errors.append(hold(error, FLOAT32, "onnxruntime's velocities are", likeliest))
        size, worst = bytes_in(new), max(errors)
        inputs = _described(example, dims)
        write_report(new, source.report(inputs=inputs, bytes=size, error={"of velocities, against the student": worst}))
    return Exported(target, size, worst, 0.0)


def write_onnx(
    traced: Traceable, example: dict[str, Tensor], dims: dict[str, Any], cases: Sequence[dict[str, Tensor]], file: Path
) -> None:
    """A traceable network in ONNX's own operators, run at the cases' sizes before. Weights of more than ONNX's 2 GiB
    lie in a file beside it."""
    program = _traced(cast(nn.Module, traced), example, dims)
    for case in cases:
        program.module()(**case)
    plain = program.run_decompositions({**torch.export.default_decompositions(), **ops.decompositions()})
    with _quiet():
        made = torch.onnx.export(
            plain,
            (),
            kwargs=example,
            dynamic_shapes=_names(dims),
            dynamo=True,
            verbose=False,
            optimize=True,
            input_names=list(example),
            output_names=["v"],
        )
    assert made is not None
    made.save(str(file), external_data=sum(t.nbytes for t in plain.state_dict.values()) > ONNX_LIMIT)


def _fused(source: Source, dtype: torch.dtype, device: str) -> Student:
    """The student on fused networks of plain weights, adapters merged."""
    made: dict[int, Backbone] = {}
    for one in source.networks:
        plain = with_weights(one, merged(one))
        fuse(plain.model.to(device, dtype))
        made[id(one)] = plain
    return Student([made[id(one)] for one in source.model.networks], source.model.sigmas)


def _size(model: Student) -> tuple[int, int, int, int]:
    """Of the example that is traced. Nothing in it may look like another size, or be 0 or 1, such as the image's tokens
    that are missing at the next multiple of 32."""
    one = model.distinct_networks()[0]
    return 2, 4 * one.latent_factor, 6 * one.latent_factor, 64


def _traced(module: nn.Module, example: dict[str, Tensor], dims: dict[str, Any]) -> torch.export.ExportedProgram:
    with _quiet():
        return torch.export.export(module, (), example, dynamic_shapes=dims, strict=False)


def _cases(example: Callable[..., dict[str, Tensor]], model: Student) -> list[dict[str, Tensor]]:
    factor = model.distinct_networks()[0].latent_factor
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [example(batch, rows * factor, columns * factor, tokens) for batch, rows, columns, tokens in SHAPES]


def _numbered(cases: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{number}.{name}": t.cpu() for number, case in enumerate(cases) for name, t in case.items()}


def _in_float32(source: Source, cases: list[dict[str, Tensor]], device: str) -> list[Tensor]:
    exact = Steps(_fused(source, torch.float32, device))
    return [exact(**{n: t.float() if t.is_floating_point() else t for n, t in case.items()}).cpu() for case in cases]


def _verify(new: Path, cases: list[dict[str, Tensor]], true: list[Tensor], device: str, allowed: float) -> float:
    facts = {
        "kernels": str(new / "kernels.so"),
        "program": str(new / "sampler.pt2"),
        "cases": len(cases),
        "device": device,
    }
    made = fresh_process.run(_SAMPLE, facts, _numbered(cases), what="the program could not be run")
    what, likeliest = "the program's latents are", "a compiler other than the tested one"
    return max(hold(relative(made[str(n)], one), allowed, what, likeliest) for n, one in enumerate(true))


def _names(dims: dict[str, dict[int, Any]]) -> dict[str, dict[int, str]]:
    return {name: {axis: dim.__name__ for axis, dim in axes.items()} for name, axes in dims.items()}


def _described(example: dict[str, Tensor], dims: dict[str, dict[int, Any]]) -> dict[str, Any]:
    """Shapes with the names of what may have any size, and dtypes."""

    def size(name: str, axis: int, given: int) -> int | str:
        return names[name].get(axis, given)

    names = _names(dims)
    return {
        name: {"shape": [size(name, axis, n) for axis, n in enumerate(t.shape)], "dtype": str(t.dtype)[6:]}
        for name, t in example.items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of themselves: of operators that this program does not hold, of classes that will be renamed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
