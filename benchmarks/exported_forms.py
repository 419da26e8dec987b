"""The transformer part of an image, from noise to clean latents: teacher and two-step student, and the student's
exported forms, in one run.

    python benchmarks/exported_forms.py --out DIR                        the miniature, on this CPU or GPU
    python benchmarks/exported_forms.py --model PIPELINE --out DIR       another pipeline, in bfloat16 on a GPU

The student's two networks are copies of the teacher's: speed does not depend on what they have learnt. `stock` is what
a pipeline's folder runs. Candidates take turns; medians are compared. The error is that of the latents against the
student in float32. Two bars are said to be met or missed: the program at least 3.7 times as fast as the fused teacher
at 8, and not slower than the fused student, at every batch; the exit status is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from stock_vs_fused import time_turns
from torch import Tensor

from twostep.allocator import keep_freed_memory
from twostep.bench.report import environment
from twostep.export.fresh_process import relative
from twostep.export.program import compile_program, write_onnx
from twostep.export.quantizing import KINDS, quantize
from twostep.zoo import Backbone, Context, Student, Teacher, TwoStepStudent, load_backbone, program
from twostep.zoo.saved_student import pipeline_path


def compiled(steps: program.Steps, example: dict[str, Tensor], folder: Path) -> Callable[..., Tensor]:
    compile_program(steps, example, steps.dims(), [example], folder / "sampler.pt2")
    return torch._inductor.aoti_load_package(str(folder / "sampler.pt2"))


def quantized(student: Student, kind: str, folder: Path, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Of a copy whose weights have 8 bits."""
    own, place = copy.deepcopy(student), folder / kind
    place.mkdir()
    for network in own.distinct_networks():
        quantize(network.model, kind)
    steps, factor = program.Steps(own), own.distinct_networks()[0].latent_factor
    ahead = compiled(steps, steps.example(2, 4 * factor, 6 * factor, 64), place)
    return lambda: ahead(**given)


def onnx_steps(student: Student, folder: Path, threads: int) -> Callable[..., Tensor]:
    """Both steps in onnxruntime; what stands between them, in torch."""
    import onnxruntime

    sessions = []
    for number, network in enumerate(student.networks):
        traced, factor = program.network(network), network.latent_factor
        example, file = traced.example(2, 4 * factor, 6 * factor, 64), folder / f"step_{number}.onnx"
        write_onnx(traced, example, traced.dims(program.batch_dim()), [example], file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        sessions.append(onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]))

    def sample(noise: Tensor, **context: Tensor) -> Tensor:
        x = noise
        given = {name: tensor.numpy() for name, tensor in context.items()}
        for number, session in enumerate(sessions):
            sigma = torch.full((len(x),), student.sigmas[number]).numpy()
            (v,) = session.run(None, {"x": x.numpy(), "sigma": sigma, **given})
            x = x + (student.sigmas[number + 1] - student.sigmas[number]) * torch.from_numpy(v)
        return x

    return sample


def candidates(
    load: Callable[[bool], Backbone], batch: int, size: tuple[int, int], tokens: int, folder: Path, onnx: bool
) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """By name; and what the student samples in float32."""
    stock, fused = load(False), load(True)
    student = TwoStepStudent(fused, copy.deepcopy(fused)).eval()
    plain = TwoStepStudent(stock, copy.deepcopy(stock)).eval()
    exact = copy.deepcopy(student).float()
    steps = program.Steps(student)
    torch.manual_seed(0)
    given = steps.example(batch, *size, tokens)
    context = Context(given["features"], lengths=given.get("lengths"))
    noise = given["noise"]

    def teacher(network: Backbone, count: int) -> Callable[[], Tensor]:
        return lambda: Teacher(network, steps=count).sample(noise, context)

    made: dict[str, Callable[[], Tensor]] = {
        "teacher at 8, stock": teacher(stock, 8),
        "teacher at 8, fused": teacher(fused, 8),
        "teacher at 2, stock": teacher(stock, 2),
        "teacher at 2, fused": teacher(fused, 2),
        "student, stock": lambda: plain.sample(noise, context),
        "student, fused": lambda: student.sample(noise, context),
    }
    factor = fused.latent_factor
    ahead = compiled(steps, steps.example(2, 4 * factor, 6 * factor, 64), folder)
    made["student, program"] = lambda: ahead(**given)
    for kind in KINDS if find_spec("torchao") is not None else ():
        made[f"student, program, {kind}"] = quantized(student, kind, folder, given)
    if onnx:
        runtime = onnx_steps(student, folder, torch.get_num_threads())
        made["student, ONNX"] = lambda: runtime(**given)
    true = exact.sample(noise, Context(given["features"].float(), lengths=given.get("lengths")))
    return made, true


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}: {facts['model']}, "
        f"{facts['dtype']}. Milliseconds for an image, of the transformer alone.",
        "",
        "| batch | candidate | ms | teacher at 8, fused: times as long | error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        eight = next(r["ms"] for r in rows if r["batch"] == row["batch"] and r["name"] == "teacher at 8, fused")
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(f"| {row['batch']} | {row['name']} | {row['ms']:.2f} | {eight / row['ms']:.2f}x | {error} |")
    return "\n".join([*lines, "", *bars(rows)]) + "\n"


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """What is asked of the program, batch by batch."""
    said = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        ms = {row["name"]: row["ms"] for row in rows if row["batch"] == batch}
        for over, least in (("teacher at 8, fused", 3.7), ("student, fused", 1.0)):
            ratio = ms[over] / ms["student, program"]
            verdict = "met" if ratio >= least else "MISSED"
            said.append(f"batch {batch}: the program is {ratio:.2f}x as fast as {over}, asked {least}x: {verdict}")
    return [f"- {line}" for line in said]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="a pipeline's folder (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--size", type=int, nargs=2, default=[16, 16], help="of the latents (default: 16 16)")
    parser.add_argument("--tokens", type=int, default=32, help="of captions (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each candidate (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for exported_forms.md and .json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    where = pipeline_path(args.model)

    def load(fused: bool) -> Backbone:
        return load_backbone(where, dtype=dtype, device=args.device, fused=fused).requires_grad_(False).eval()

    onnx = args.device == "cpu" and all(find_spec(name) is not None for name in ("onnxscript", "onnxruntime"))
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            runs, true = candidates(load, batch, tuple(args.size), args.tokens, Path(folder), onnx)
            seconds = time_turns(runs, args.device, args.seconds)
            for name, run in runs.items():
                error = relative(run().cpu(), true.cpu()) if name.startswith("student") else None
                rows.append({"batch": batch, "name": name, "ms": 1000 * seconds[name] / batch, "error": error})
    facts = {**environment(args.device), "model": args.model, "dtype": str(dtype)[6:], "command": " ".join(sys.argv)}
    text = table(rows, facts)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "exported_forms.md").write_text(text, encoding="utf-8")
        (args.out / "exported_forms.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return int("MISSED" in text)


if __name__ == "__main__":
    sys.exit(main())
