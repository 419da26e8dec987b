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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..zoo import Backbone, Student, fuse
from ..zoo.program import BATCH, Steps, network
from . import fresh_process
from .fresh_process import hold, relative
from .merging import merged, with_weights
from .new_folder import bytes_in, check_space, new_folder, target_of
from .probes import FLOAT32
from .source import Exported, Source, write_report

RUN = Path(__file__).parent / "programs" / "run.py"
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
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    if not ops.build_info()["usable"]:
        raise ValueError(
            f"export: a program holds the fused kernels, and they are not built: {ops.build_info()['reason']}"
        )
    target = target_of(out, overwrite)
    source = Source.read(student, base)
    check_space(target.parent, 2 * source.parameters * dtype.itemsize)
    model = _fused(source, dtype, device)
    steps = Steps(model)
    with new_folder(target) as new, torch.no_grad():
        program = _traced(steps, steps.example(*_size(model)), steps.dims())
        for case in _cases(steps.example, model):
            program.module()(**case)  # which checks what was assumed of sizes; the compiled program does not
        with _quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(new / "sampler.pt2"))
        shutil.copy(ops.build_info()["path"], new / "kernels.so")
        shutil.copy(RUN, new / "run.py")
        error, rounding = _verify(source, steps, new, device)
        size = bytes_in(new)
        write_report(
            new,
            source.report(
                inputs=_described(steps.example(*_size(model)), steps.dims()),
                dtype=str(dtype).removeprefix("torch."),
                device=torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
                bytes=size,
                error={"of latents, against the student": error, "of the same student in this dtype": rounding},
            ),
        )
    return Exported(target, size, error, rounding)


def export_onnx(
    student: str | Path, out: str | Path, *, overwrite: bool = False, base: str | Path | None = None
) -> Exported:
    """step_1.onnx, and step_2.onnx where steps have parameters of their own: (x, sigma, features, ...) -> v, in
    float32."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if absent:
        raise ValueError(f"export: {', '.join(absent)} are not installed:  pip install 'twostep[onnx]'")
    target = target_of(out, overwrite)
    source = Source.read(student, base)
    check_space(target.parent, source.parameters * torch.float32.itemsize)
    model = _fused(source, torch.float32, "cpu")
    worst = 0.0
    with new_folder(target) as new, torch.no_grad():
        for number, one in enumerate(model.distinct_networks(), start=1):
            traced, file = network(one), new / f"step_{number}.onnx"
            dims = traced.dims(torch.export.Dim("batch", min=1, max=BATCH))  # type: ignore[operator]
            example = traced.example(*_size(model))  # type: ignore[operator]
            program = _traced(traced, example, dims)
            cases = _cases(traced.example, model)  # type: ignore[arg-type]
            for case in cases:
                program.module()(**case)
            plain = program.run_decompositions({**torch.export.default_decompositions(), **ops.decompositions()})
            with _quiet():
                torch.onnx.export(
                    plain,
                    (),
                    kwargs=example,
                    dynamic_shapes=_names(dims),
                    dynamo=True,
                    verbose=False,
                    external_data=False,
                    optimize=True,
                    input_names=list(example),
                    output_names=["v"],
                ).save(str(file))  # type: ignore[union-attr]
            facts = {"file": str(file), "cases": len(cases)}
            found = fresh_process.run(_ONNX, facts, _numbered(cases), what="onnxruntime could not run the network")
            error = max(relative(found[str(n)], traced(**case)) for n, case in enumerate(cases))
            likeliest = "an onnxscript that writes these operators in another way than the tested one"
            worst = max(worst, hold(error, FLOAT32, "onnxruntime's velocities are", likeliest))
        size = bytes_in(new)
        inputs = _described(example, dims)
        write_report(new, source.report(inputs=inputs, bytes=size, error={"of velocities, against the student": worst}))
    return Exported(target, size, worst, 0.0)


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


def _verify(source: Source, steps: Steps, new: Path, device: str) -> tuple[float, float]:
    """The program's error against the float32 student, and that of the same student in the program's dtype: the one is
    held to twice the other, and in float32 to FLOAT32."""
    cases = _cases(steps.example, source.model)
    exact = Steps(_fused(source, torch.float32, device))
    true = [exact(**{name: t.float() if t.is_floating_point() else t for name, t in case.items()}) for case in cases]
    facts = {
        "kernels": str(new / "kernels.so"),
        "program": str(new / "sampler.pt2"),
        "cases": len(cases),
        "device": device,
    }
    found = fresh_process.run(_SAMPLE, facts, _numbered(cases), what="the program could not be run")
    error = max(relative(found[str(n)], one.cpu()) for n, one in enumerate(true))
    own = max(relative(steps(**case), one) for case, one in zip(cases, true, strict=True))
    allowed = FLOAT32 if steps.dtype == torch.float32 else max(FLOAT32, 2 * own)
    return hold(error, allowed, "the program's latents are", "a compiler other than the tested one"), own


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
