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
from torch._inductor.exc import InductorError
from torch._inductor.utils import fresh_inductor_cache

from .. import ops
from ..disk import check_space
from ..zoo import Backbone, Context, Student, fuse
from ..zoo.program import Steps, Traceable, batch_dim, network
from . import fresh_process
from .fresh_process import ExportFailed, hold, relative
from .merging import merged, with_weights
from .new_folder import new_folder, target_of
from .probes import FLOAT32, PROMPTS, Probes
from .quantizing import check_quantizing, numbers, quantize, rounded
from .source import Exported, Source, found

RUN = Path(__file__).parent / "programs" / "run.py"
ONNX_LIMIT = 2**31 - 2**20  # bytes of a protocol buffer, and some room for the graph
# What the check runs: images, rows and columns of tokens, captions. With image tokens to pad, and without; one image.
SHAPES = ((2, 4, 6, 64), (1, 8, 4, 32), (3, 5, 3, 96))
MULTIPLE = 32  # of tokens, to which a program of Z-Image takes captions filled up
Case = dict[str, Tensor]
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
    pipeline: str | Path | None = None,
    quantization: str | None = None,
) -> Exported:
    """Writes the folder, or raises and leaves nothing.

    Args:
        dtype: of the networks: bfloat16 for a GPU, float32 for a CPU where it is not said.
        device: that the program is compiled for, "cuda" or "cpu"; a GPU if there is one.
        base: of adapters, where it lies now.
        pipeline: that the student was made for, where it lies now.
        quantization: of the linear layers' weights, by torchao: "int8", or "fp8" (e4m3).
    """
    check_quantizing(quantization)
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
    source = Source.read(student, base=base, pipeline=pipeline)
    source.check_steps()
    source.guard(target)
    needed = 3 * source.parameters * dtype.itemsize  # its pieces lie there while it is put together
    check_space(target.parent, needed, "export")
    with new_folder(target, lambda: target_of(target, overwrite)) as new, torch.no_grad():
        with source.phase("compiling"):
            model = _fused(source, dtype, device)
            written = None
            if quantization is not None:
                written = _quantized(model, source, quantization)
            steps = Steps(model)
            cases = _cases(steps.example, source, dtype, device)
            example, dims = steps.example(*_size(source.model)), steps.dims()
            compile_program(steps, example, dims, cases, new / "sampler.pt2")
            inputs = _described(example, dims)
            del steps, model
            shutil.copy(ops.build_info()["path"], new / "kernels.so")
            shutil.copy(RUN, new / "run.py")
        with source.phase("checking"):
            made = _sampled(new, cases, device)
            error, errors = _verify(source, made, cases, dtype, device, written, quantization)
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
        return source.leave(
            new,
            target,
            error=error,
            rounding=errors[ROUNDED] if quantization is not None else errors[OWN],
            inputs=inputs,
            dtype=str(dtype).removeprefix("torch."),
            quantization=quantization,
            device=where,
            errors=errors,
        )


def compile_program(
    steps: nn.Module,
    example: Case,
    dims: dict[str, Any],
    cases: Sequence[Case],
    file: Path,
) -> None:
    """Traces at the example's sizes, runs the trace at those of the cases, which checks what was assumed of sizes (the
    compiled program does not), and compiles it; what the compiler leaves lies beside the file, and is removed."""
    traced = _traced(steps, example, dims)
    for case in cases:
        traced.module()(**case)
    try:
        with _quiet(), fresh_inductor_cache(dir=str(file.parent)):
            torch._inductor.aoti_compile_and_package(traced, package_path=str(file))
    except InductorError as error:
        raise ExportFailed(f"export: torch's compiler failed; nothing was left. {error}") from error


def export_onnx(
    student: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    base: str | Path | None = None,
    pipeline: str | Path | None = None,
) -> Exported:
    """step_1.onnx, and step_2.onnx where steps have parameters of their own: (x, sigma, features, ...) -> v, in
    float32."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if absent:
        raise ValueError(f"export: {', '.join(absent)} are not installed:  pip install 'twostep[onnx]'")
    target = target_of(out, overwrite, found(student))
    source = Source.read(student, base=base, pipeline=pipeline)
    source.check_steps()
    source.guard(target)
    check_space(target.parent, source.parameters * torch.float32.itemsize, "export")
    model = _fused(source, torch.float32, "cpu")
    samples = _cases(Steps(model).example, source, torch.float32, "cpu")
    cases = [_of_network(case, sigma) for case in samples for sigma in (None, *source.model.sigmas[:-1])]
    errors: list[float] = []
    with new_folder(target, lambda: target_of(target, overwrite)) as new, torch.no_grad():
        for number, one in enumerate(model.distinct_networks()):
            traced, file = network(one), new / f"step_{number + 1}.onnx"
            example, dims = traced.example(*_size(model)), traced.dims(batch_dim())
            with source.phase("writing"):
                write_onnx(traced, example, dims, cases, file)
            with source.phase("checking"):
                errors.append(_verify_onnx(file, source.networks[number], cases))
        inputs, worst = _described(example, dims), max(errors)
        wrong = {"of velocities, against the student": worst}
        return source.leave(new, target, error=worst, rounding=0.0, inputs=inputs, errors=wrong)


def write_onnx(traced: Traceable, example: Case, dims: dict[str, Any], cases: Sequence[Case], file: Path) -> None:
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
        plain = with_weights(one, {name: tensor.to(device, dtype) for name, tensor in merged(one).items()})
        fuse(plain.model)
        made[id(one)] = plain
    return Student([made[id(one)] for one in source.model.networks], source.model.sigmas)


def _quantized(model: Student, source: Source, kind: str) -> Student:
    """Quantizes the networks, in their place; what their weights then stand for, in float32 and stock blocks."""
    made = {}
    for one, stock in zip(model.distinct_networks(), source.networks, strict=True):
        quantize(one.model, kind)
        made[id(one)] = with_weights(stock, {name: tensor.cpu() for name, tensor in numbers(one.model).items()})
    return Student([made[id(one)] for one in model.networks], model.sigmas)


def _size(model: Student) -> tuple[int, int, int, int]:
    """Of the example that is traced. Nothing in it may look like another size, or be 0 or 1, such as the image's tokens
    that are missing at the next multiple of 32."""
    one = model.distinct_networks()[0]
    return 2, 4 * one.latent_factor, 6 * one.latent_factor, 64


def _traced(module: nn.Module, example: Case, dims: dict[str, Any]) -> torch.export.ExportedProgram:
    with _quiet():
        return torch.export.export(module, (), example, dynamic_shapes=dims, strict=False)


def _cases(example: Callable[..., Case], source: Source, dtype: torch.dtype, device: str) -> list[Case]:
    """What is compared: random inputs of each of the sizes, and the probes' noise and captions."""
    factor = source.networks[0].latent_factor
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cases = [example(batch, rows * factor, columns * factor, tokens) for batch, rows, columns, tokens in SHAPES]
    probes = Probes(source.pipeline, source.model)
    for number in range(len(PROMPTS)):
        context = probes.context[number : number + 1]
        features = context.features
        if "lengths" in cases[0]:
            features = nn.functional.pad(features, (0, 0, 0, -features.shape[1] % MULTIPLE))
        made = {"noise": probes.noise[number : number + 1], "features": features.to(dtype)}
        if "lengths" in cases[0]:
            made["lengths"] = context.token_lengths
        cases.append(made)
    return [{name: tensor.to(device) for name, tensor in case.items()} for case in cases]


def _of_network(case: Case, sigma: float | None) -> Case:
    """A sampler's inputs as those of a network by itself: at a level of the student's, or each sample at its own. These
    are levels that float32 holds: of others a thousandfold is rounded before its sine is taken, and that alone is 1e-5.
    """
    context = {name: tensor for name, tensor in case.items() if name != "noise"}
    count = len(case["noise"])
    levels = torch.linspace(0.875, 0.125, count) if sigma is None else torch.full((count,), sigma)
    return {"x": case["noise"], "sigma": levels, **context}


def _context(case: Case) -> Context:
    lengths = case.get("lengths")
    return Context(case["features"], lengths=None if lengths is None else lengths.cpu())


def _numbered(cases: list[Case]) -> Case:
    # Copies: cases may share tensors, and a file of safetensors takes none twice.
    return {f"{number}.{name}": t.cpu().clone() for number, case in enumerate(cases) for name, t in case.items()}


def _sampled(new: Path, cases: list[Case], device: str) -> list[Tensor]:
    facts = {
        "kernels": str(new / "kernels.so"),
        "program": str(new / "sampler.pt2"),
        "cases": len(cases),
        "device": device,
    }
    made = fresh_process.run(_SAMPLE, facts, _numbered(cases), what="the program could not be run")
    return [made[str(number)] for number in range(len(cases))]


# What is measured, all relative and of latents.
OWN = "of the student in this dtype"
ROUNDED = "of rounding the weights"


def _verify(
    source: Source,
    made: list[Tensor],
    cases: list[Case],
    dtype: torch.dtype,
    device: str,
    written: Student | None,
    quantization: str | None,
) -> tuple[float, dict[str, float]]:
    """The program's latents against those of the student of stock blocks: as near as float32 is, and in another dtype
    at most twice as far off as that student is in it. Weights of 8 bits are held as a folder's are: what they stand for
    to thrice what rounding the student's own tensors loses, and the program to them."""

    def sampled(student: Student, dtype: torch.dtype) -> list[Tensor]:
        student.to(device)
        found = [student.sample(case["noise"], _context(case).to(dtype=dtype)).cpu() for case in cases]
        student.to("cpu")
        return found

    def worst(found: list[Tensor], true: list[Tensor]) -> float:
        return max(relative(one, exact) for one, exact in zip(found, true, strict=True))

    true = stands_for = sampled(source.model, torch.float32)
    own = worst(sampled(source.in_dtype(dtype), dtype), true) if dtype != torch.float32 else 0.0
    errors = {OWN: own}
    if written is not None:
        stands_for = sampled(written, torch.float32)
        allowed = FLOAT32 + 3 * worst(sampled(rounded(source.model, dtype, quantization), torch.float32), true)
        what = "latents of the weights that were quantized differ from the student's"
        errors[ROUNDED] = hold(worst(stands_for, true), allowed, what, "a torchao that rounds in another way")
    against = "the student" if written is None else "what the 8 bits stand for"
    what, allowed = f"the program's latents differ from those of {against}", FLOAT32 + 2 * own
    pairs, likeliest = zip(made, stands_for, strict=True), "a compiler other than the tested one"
    error = max(hold(relative(one, exact), allowed, what, likeliest) for one, exact in pairs)
    return error, {f"of latents, against {against}": error, **errors}


def _verify_onnx(file: Path, network: Backbone, cases: list[Case]) -> float:
    """onnxruntime's velocities against those of the student's own network, adapter and all, of stock blocks."""
    facts = {"file": str(file), "cases": len(cases)}
    made = fresh_process.run(_ONNX, facts, _numbered(cases), what="onnxruntime could not run the network")
    what, likeliest = (
        "onnxruntime's velocities differ from the student's",
        "an onnxscript that writes these operators in another way",
    )
    errors = []
    for number, case in enumerate(cases):
        true = network.velocity(case["x"], case["sigma"], _context(case))
        errors.append(hold(relative(made[str(number)], true), FLOAT32, what, likeliest))
    return max(errors)


def _names(dims: dict[str, dict[int, Any]]) -> dict[str, dict[int, str]]:
    return {name: {axis: dim.__name__ for axis, dim in axes.items()} for name, axes in dims.items()}


def _described(example: Case, dims: dict[str, dict[int, Any]]) -> dict[str, Any]:
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
