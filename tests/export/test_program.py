"""Programs that were compiled ahead of time, and networks in ONNX: one for every batch, size and caption."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twostep.cli import main
from twostep.export import ExportFailed, export_onnx, export_program, program
from twostep.export.fresh_process import hold, relative
from twostep.export.merging import merged
from twostep.export.quantizing import quantize
from twostep.zoo import load_student, load_text_to_image
from twostep.zoo.flux2 import traceable as flux2_traceable
from twostep.zoo.z_image import packing, traceable

Runs = dict[tuple[str, str, bool], Path]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "weights"), [("z-image", "lora"), ("klein", "full")])
def test_a_program_samples_what_the_student_samples(family: str, weights: str, runs: Runs, tmp_path: Path) -> None:
    made = export_program(runs[family, weights, True], tmp_path / "out", dtype=torch.float32, device="cpu")
    assert made.error <= 1e-5
    facts = json.loads((made.folder / "export.json").read_text())
    assert facts["inputs"]["noise"]["shape"][0] == "batch"
    # Beside the check that the export made, the student's own sampler on real captions, in this process.
    student = load_text_to_image(runs[family, weights, True], dtype=torch.float32)
    context = student.contexts(["a red circle", "a star"])
    lengths = context.lengths_of_samples()
    features = context.features
    if family == "z-image":
        features = nn.functional.pad(features, (0, 0, 0, 32 - features.shape[1]))
    given = {"noise": student.noise([1, 2]), "features": features}
    if family == "z-image":
        given["lengths"] = torch.tensor(lengths)
    run = runpy.run_path(str(made.folder / "run.py"))
    sampler, expected = run["load"](), student.model.sample(given["noise"], context)
    assert relative(sampler(**given), expected) <= 1e-5
    # What the program would take without a word is told by the folder's own function.
    strided = given["noise"].transpose(2, 3).contiguous().transpose(2, 3)
    assert relative(run["sample"](sampler, **{**given, "noise": strided}), expected) <= 1e-5
    wrong: dict[str, Tensor] = {"noise": given["noise"].bfloat16(), "features": given["features"][:1]}
    wrong |= {"more noise": given["noise"][:, :-1], "more features": given["features"][..., :-1]}
    if family == "z-image":
        wrong |= {"lengths": given["lengths"] - 32, "most features": given["features"][:, :-1]}
    for name, tensor in wrong.items():
        with pytest.raises(ValueError, match=r"expected|captions end at"):
            run["sample"](sampler, **{**given, name.split()[-1]: tensor})
    # The folder's own script, in a process that knows torch alone.
    script = str(made.folder / "run.py")
    code = f"import runpy, sys; sys.modules['twostep'] = None; runpy.run_path({script!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("latents [2, ")


@pytest.mark.slow
def test_a_program_in_bfloat16_is_held_to_twice_its_own_error(runs: Runs, tmp_path: Path) -> None:
    made = export_program(runs["klein", "full", False], tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    assert 1e-4 < made.error <= 2 * made.rounding < 0.2


@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_onnx_computes_the_students_velocities(family: str, runs: Runs, tmp_path: Path) -> None:
    """onnxruntime at three batches, sizes and captions, against the network; a file for each network."""
    import onnx

    made = export_onnx(runs[family, "full", False], tmp_path / "one")
    assert made.error <= 1e-5
    assert [path.name for path in made.folder.glob("*.onnx")] == ["step_1.onnx"]
    graph = onnx.load(str(made.folder / "step_1.onnx")).graph
    assert {node.domain for node in graph.node} == {""}  # ONNX's own operators alone
    assert graph.input[0].name == "x" and graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_each_step_has_its_network(runs: Runs, tmp_path: Path) -> None:
    made = export_onnx(runs["z-image", "lora", True], tmp_path / "two")
    first, second = sorted(made.folder.glob("*.onnx"))
    assert (first.name, second.name) == ("step_1.onnx", "step_2.onnx") and first.read_bytes() != second.read_bytes()


def test_the_check_sees_a_wrong_program(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = program.write_onnx, []

    def another(traced: Any, example: Any, dims: Any, cases: Any, file: Path) -> None:
        """The network with one weight changed, or one that overflows at one of the sizes alone."""
        seen.append(file)
        with torch.no_grad():
            next(traced.parameters()).mul_(1.01)
            write(traced, example, dims, cases, file)
            next(traced.parameters()).div_(1.01)

    monkeypatch.setattr(program, "write_onnx", another)
    with pytest.raises(ExportFailed, match="onnxruntime's velocities differ"):
        export_onnx(runs["klein", "full", False], tmp_path / "out")
    assert seen and list(tmp_path.iterdir()) == []


def _times(factor: float) -> Any:
    own = traceable.TraceableZImage.forward

    def another(self: Any, x: Any, sigma: Any, features: Any, lengths: Any) -> Any:
        return factor * own(self, x, sigma, features, lengths)

    return another


def test_a_network_that_takes_a_level_for_fixed_is_not_left(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = flux2_traceable.TraceableFlux2.forward

    def fixed(self: Any, x: Any, sigma: Any, features: Any) -> Any:
        return own(self, x, torch.full_like(sigma, 0.5), features)  # the example's

    monkeypatch.setattr(flux2_traceable.TraceableFlux2, "forward", fixed)
    with pytest.raises(ExportFailed, match="onnxruntime's velocities differ"):
        export_onnx(runs["klein", "full", False], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["network", "merging"])
def test_a_network_that_is_traced_wrongly_is_not_left(
    wrong: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is traced computes something else than the student: a form of the network, or adapters merged wrongly."""
    if wrong == "network":
        monkeypatch.setattr(traceable.TraceableZImage, "forward", _times(1.01))
    else:
        monkeypatch.setattr(program, "merged", lambda network: {k: 1.1 * v for k, v in merged(network).items()})
    with pytest.raises(ExportFailed, match="onnxruntime's velocities differ"):
        export_onnx(runs["z-image", "lora", False], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_program_of_another_network_is_not_left(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own rounding is that of the student, not of what was traced."""
    monkeypatch.setattr(traceable.TraceableZImage, "forward", _times(1.3))
    with pytest.raises(ExportFailed, match="the program's latents differ"):
        export_program(runs["z-image", "full", False], tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("z-image", "fp8"), ("klein", "int8")])
def test_a_program_of_eight_bits(family: str, kind: str, runs: Runs, tmp_path: Path) -> None:
    """It holds 8 bits and computes what they stand for, which is the student's to that precision."""
    pytest.importorskip("torchao")
    run = runs[family, "full", False]
    made = export_program(run, tmp_path / "out", device="cpu", quantization=kind)
    assert made.error <= 1e-5 < made.rounding < 0.3
    facts = json.loads((made.folder / "export.json").read_text())
    assert facts["quantization"] == kind and facts["dtype"] == "float32"
    with zipfile.ZipFile(made.folder / "sampler.pt2") as packed:
        (code,) = [packed.read(name).decode() for name in packed.namelist() if name.endswith(".wrapper.cpp")]
    held = {"int8": "dtype_int8", "fp8": "dtype_float8_e4m3fn"}[kind]
    layers = [m for m in load_student(run).networks[0].modules() if isinstance(m, nn.Linear)]
    assert len(re.findall(rf"constants_info_\[\d+\]\.dtype = cached_torch_{held};", code)) == len(layers)


@pytest.mark.slow
def test_eight_bits_of_other_weights_are_not_left(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")

    def scaled(network: Any, how: str) -> None:
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(1.5 * module.weight, requires_grad=False)
        quantize(network, how)

    monkeypatch.setattr(program, "quantize", scaled)
    with pytest.raises(ExportFailed, match="latents of the weights that were quantized differ"):
        export_program(runs["klein", "full", False], tmp_path / "out", device="cpu", quantization="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_program_on_a_gpu(runs: Runs, tmp_path: Path) -> None:
    for family, weights in (("z-image", "lora"), ("klein", "full")):
        made = export_program(runs[family, weights, True], tmp_path / family)
        facts = json.loads((made.folder / "export.json").read_text())
        assert facts["dtype"] == "bfloat16" and not facts["device"].startswith("CPU")
        assert 1e-4 < made.error <= 1e-5 + 2 * made.rounding < 0.2
        ended = subprocess.run(
            [sys.executable, str(made.folder / "run.py")], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0 and ended.stdout.startswith("latents [2, "), ended.stderr


def test_weights_beyond_onnxs_limit_lie_beside_it(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ONNX_LIMIT", 1000)
    made = export_onnx(runs["klein", "full", False], tmp_path / "out")
    assert made.error <= 1e-5
    beside = made.folder / "step_1.onnx.data"
    weights = runs["klein", "full", False] / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert beside.stat().st_size > 0.9 * weights.stat().st_size and made.bytes > beside.stat().st_size
    moved = made.folder.rename(tmp_path / "moved")  # the place of the second is no absolute one
    import onnxruntime

    onnxruntime.InferenceSession(str(moved / "step_1.onnx"), providers=["CPUExecutionProvider"])


def test_an_image_that_is_not_finite_is_off_at_any_place() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(ExportFailed, match="differ by a relative nan"):
        max(hold(relative(one, torch.ones(3)), 1e-5, "images differ", "nothing") for one in (good, bad, good))


def test_a_size_that_was_taken_for_fixed_is_an_error(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form of padding that makes a program for images without any, from an example without any."""
    monkeypatch.setattr(traceable, "_padded", packing.pad_tokens)
    monkeypatch.setattr(program, "_size", lambda model: (2, 8, 16, 64))  # 4 x 8 tokens: nothing to pad
    with pytest.raises(AssertionError, match="Guard failed"):
        export_onnx(runs["z-image", "full", False], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_explained(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(runs["klein", "full", False]), str(tmp_path / "out")
    assert main(["export", run, "--out", out, "--as", "onnx", "--dtype", "bfloat16"]) == 2
    assert "onnx is written in float32 alone" in capsys.readouterr().err
    assert main(["export", run, "--out", out, "--device", "cpu"]) == 2
    assert "--device is for --as program, and this is --as diffusers" in capsys.readouterr().err
    assert main(["export", run, "--out", out, "--as", "onnx"]) == 0
    assert "onnxruntime computes the student's velocities" in capsys.readouterr().out
