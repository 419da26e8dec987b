"""The exported folder: stock diffusers draws the student's images from it, and nothing is there that does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, ZImagePipeline, ZImageTransformer2DModel

from tests.train import tiny_runs
from tests.train.run_server import Server
from twostep.cli import main
from twostep.export import ExportFailed, export_folder, export_single_file, folder
from twostep.export.fresh_process import relative
from twostep.export.merging import merged
from twostep.zoo import load_student, load_text_to_image

STOCK = {"z-image": ZImagePipeline, "klein": Flux2KleinPipeline}


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_stock_diffusers_draws_the_students_images(
    family: str, weights: str, per_step: bool, runs: dict[tuple[str, str, bool], Path], tmp_path: Path
) -> None:
    run = runs[family, weights, per_step]
    made = export_folder(run, tmp_path / "out", dtype=torch.float32)
    assert made.error <= 1e-5 and made.rounding <= 1e-5
    # Beside the check that the export made in a process of its own, the same here, in this test's words.
    pipeline = DiffusionPipeline.from_pretrained(made.folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, STOCK[family]) and (type(pipeline) is STOCK[family]) == (not per_step)
    student = load_text_to_image(run, dtype=torch.float32)
    size = student.size()
    settings = {} if per_step else {"num_inference_steps": 2, "guidance_scale": 0.0 if family == "z-image" else 1.0}
    found = pipeline(
        prompt=["a red circle"], height=size[0], width=size[1], latents=student.noise([3]), output_type="pt", **settings
    ).images
    expected = (student.draw(["a red circle"], [3]) + 1) / 2
    assert (found - expected).norm() / expected.norm() <= 1e-4
    facts = json.loads((made.folder / "export.json").read_text())
    assert (
        facts["method"] == "dp_dmd" and facts["sigmas"] == list(student.model.sigmas) and facts["bytes"] == made.bytes
    )


def test_adapters_that_hardly_differ_leave_in_bfloat16(places: dict[str, tiny_runs.Place], tmp_path: Path) -> None:
    """Then rounding what they stand on is all that is lost, and it is what is allowed."""
    recipe = tiny_runs.recipe(places["z-image"], "dp_dmd", "lora", tmp_path / "run", iterations=1, ema=None)
    recipe["optimizers"]["generator"]["lr"] = 1e-6
    server = Server()
    try:
        assert server.run(recipe)[0] == [0]
    finally:
        server.close()
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        made = export_folder(tmp_path / "run", tmp_path / f"folder {number}", dtype=dtype)
        assert 1e-5 < made.rounding < 0.1
        assert export_single_file(tmp_path / "run", tmp_path / f"file {number}", dtype=dtype).rounding > 1e-5
    other = tmp_path / "other"
    shutil.copytree(places["z-image"].model, other)
    network = ZImageTransformer2DModel.from_pretrained(other, subfolder="transformer")
    next(network.parameters()).data += 1
    network.save_pretrained(other / "transformer")
    for dtype in (torch.float16, torch.bfloat16):
        load_student(tmp_path / "run", dtype=dtype)
        with pytest.raises(ValueError, match="were trained on other weights"):
            load_student(tmp_path / "run", base=other, dtype=dtype)


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize(("family", "kind"), [("z-image", None), ("klein", None), ("z-image", "int8")])
def test_the_library_takes_the_folder_for_the_student(
    family: str, kind: str | None, per_step: bool, runs: dict[tuple[str, str, bool], Path], tmp_path: Path
) -> None:
    """Wherever it has been moved to, in its own steps and no others."""
    if kind is not None:
        pytest.importorskip("torchao")
    run = runs[family, "full", per_step]
    made = export_folder(run, tmp_path / "made", dtype=torch.float32, quantization=kind)
    moved = made.folder.rename(tmp_path / "moved")
    student, again = (load_text_to_image(place, dtype=torch.float32) for place in (run, moved))
    assert again.steps == student.steps and again.model.sigmas == student.model.sigmas
    expected = student.draw(["a red circle"], [3])
    assert (again.draw(["a red circle"], [3]) - expected).norm() / expected.norm() <= (1e-4 if kind is None else 0.1)
    command = ["sample", "--model", str(moved), "--prompt", "a red circle", "--out", str(tmp_path / "images")]
    assert main(command) == 0 and len(list((tmp_path / "images").glob("0000-*.png"))) == 1
    assert main([*command, "--steps", "8", "--overwrite"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_other_weights_than_the_students_are_refused(
    dtype: torch.dtype,
    weights: str,
    runs: dict[tuple[str, str, bool], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder that is consistent in itself, and not the student."""
    monkeypatch.setattr(folder, "merged", lambda network: {k: 1.3 * v for k, v in merged(network).items()})
    with pytest.raises(ExportFailed, match="images of the weights that were written differ"):
        export_folder(runs["z-image", weights, True], tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_it_does_not_run_at_other_steps(runs: dict[tuple[str, str, bool], Path], tmp_path: Path) -> None:
    for family in STOCK:
        out = export_folder(runs[family, "full", True], tmp_path / family, dtype=torch.float32).folder
        pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
        for settings in ({"num_inference_steps": 8}, {"guidance_scale": 5.0}, {"sigmas": [1.0, 0.5]}):
            with pytest.raises(ValueError, match="this model was made for"):
                pipeline(prompt="a ring", **settings)
        first = pipeline.transformer
        with pytest.raises(ZeroDivisionError):  # whatever ends it, the first transformer is back in its place
            pipeline(prompt="a ring", height=64, width=64, callback_on_step_end=lambda *_: 1 / 0)
        assert pipeline.transformer is first


def test_rounded_weights_are_reported_and_sharded(runs: dict[tuple[str, str, bool], Path], tmp_path: Path) -> None:
    made = export_folder(runs["z-image", "full", True], tmp_path / "out", max_shard_size="50KB")
    assert made.error <= 1e-5 < made.rounding < 0.2
    files = list((made.folder / "transformer").glob("*.safetensors"))
    assert len(files) > 1 and (made.folder / "transformer_2").is_dir()
    again = DiffusionPipeline.from_pretrained(made.folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert again.transformer.dtype == torch.bfloat16


def test_links_point_to_the_pipelines_parts(
    runs: dict[tuple[str, str, bool], Path], places: dict[str, tiny_runs.Place], tmp_path: Path
) -> None:
    made = export_folder(runs["z-image", "full", False], tmp_path / "out", parts="link", dtype=torch.float32)
    assert (made.folder / "vae").is_symlink() and (made.folder / "vae").resolve() == places["z-image"].model / "vae"


@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_parts_that_are_referenced_are_passed_on(
    family: str, runs: dict[tuple[str, str, bool], Path], places: dict[str, tiny_runs.Place], tmp_path: Path
) -> None:
    run = runs[family, "full", True]
    made = export_folder(run, tmp_path / "out", parts="reference", dtype=torch.float32)
    assert made.error <= 1e-5 and not (made.folder / "vae").exists() and not (made.folder / "text_encoder").exists()
    facts = json.loads((made.folder / "export.json").read_text())
    assert facts["teacher"] == str(places[family].model) and facts["parts"] == "reference"
    again = load_text_to_image(made.folder, dtype=torch.float32)  # which knows where they are
    expected = load_text_to_image(run, dtype=torch.float32).draw(["a red circle"], [3])
    assert relative(again.draw(["a red circle"], [3]), expected) <= 1e-4
    with pytest.raises(ValueError, match="parts are 'move', expected one of copy, link, reference"):
        export_folder(run, tmp_path / "other", parts="move")


def test_export_json_says_what_it_is(runs: dict[tuple[str, str, bool], Path], tmp_path: Path) -> None:
    """Recipe, bytes of every part, seconds of every phase."""
    made = export_folder(runs["klein", "full", True], tmp_path / "out", dtype=torch.float32)
    facts = json.loads((made.folder / "export.json").read_text())
    assert facts["recipe"]["method"]["kind"] == "dp_dmd" and facts["recipe"]["iterations"] == 2
    parts = facts["bytes of parts"]
    assert {"transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "pipeline.py"} <= parts.keys()
    for name in ("transformer_2", "vae"):
        assert parts[name] == sum(file.stat().st_size for file in (made.folder / name).iterdir())
    assert sum(parts.values()) == facts["bytes"] == made.bytes
    seconds = facts["seconds"]
    assert seconds.keys() == {"reading", "writing", "checking", "all"} and seconds["all"] == made.seconds
    assert seconds["all"] == pytest.approx(seconds["reading"] + seconds["writing"] + seconds["checking"], abs=0.5)


def test_a_folder_that_computes_badly_in_its_own_dtype_is_not_left(
    runs: dict[tuple[str, str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right weights, that its pipeline in bfloat16 draws other images with."""
    spoiled = 'made["as it is used"] = draw(pipeline)'
    monkeypatch.setattr(folder, "_PROBE", folder._PROBE.replace(spoiled, spoiled + " * 1.2"))
    with pytest.raises(ExportFailed, match="the folder's images, drawn in bfloat16, differ"):
        export_folder(runs["z-image", "full", True], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["diffusers", "single-file", "lora"])
def test_a_disk_that_is_full_in_the_middle_leaves_nothing(
    form: str, runs: dict[tuple[str, str, bool], Path], tmp_path: Path
) -> None:
    """A limit on the size of files, which the system reports as a full disk is reported: in the middle of a file."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from twostep.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["export", str(runs["z-image", "full", True]), "--out", str(tmp_path / "out"), "--as", form]
    words += ["--rank", "16"] if form == "lora" else []
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "File too large" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    assert not list(tmp_path.iterdir())


def test_merged_adapters_are_the_students_networks(runs: dict[tuple[str, str, bool], Path]) -> None:
    student = load_student(runs["z-image", "lora", True], dtype=torch.float32, fused=False)
    first = student.networks[0]
    plain = type(first.model).from_config(first.model.config)
    plain.load_state_dict(merged(first))
    from twostep.zoo.z_image.backbone import ZImageBackbone

    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = load_text_to_image(runs["z-image", "lora", True], dtype=torch.float32).contexts(["a ring"])
    with torch.no_grad():
        expected, found = first.velocity(x, 0.7, context), ZImageBackbone(plain.eval()).velocity(x, 0.7, context)
    assert (found - expected).norm() / expected.norm() <= 1e-5


def test_a_folder_that_draws_something_else_is_not_left(
    runs: dict[tuple[str, str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check sees a broken export: the two steps' networks exchanged, and a pipeline that does not run."""
    run = runs["z-image", "full", True]
    write = folder._write_index

    def exchanged(model: object, index: object, pipeline: Path, new: Path, *rest: str) -> None:
        write(model, index, pipeline, new, *rest)  # type: ignore[arg-type]
        text = (new / "pipeline.py").read_text()
        (new / "pipeline.py").write_text(text.replace("pipeline.transformer = pipeline.transformer_2", "pass"))

    monkeypatch.setattr(folder, "_write_index", exchanged)
    with pytest.raises(ExportFailed, match="the folder's images differ"):
        export_folder(run, tmp_path / "out")
    monkeypatch.setattr(folder, "_write_index", lambda *_: None)
    with pytest.raises(ExportFailed, match="stock diffusers could not run the folder"):
        export_folder(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    runs: dict[tuple[str, str, bool], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(runs["z-image", "full", True]), str(tmp_path / "out")
    assert main(["export", run, "--out", out]) == 0
    assert "stock diffusers draws what was written" in capsys.readouterr().out
    assert main(["export", run, "--out", out]) == 2
    assert "is there already; give another folder, or --overwrite" in capsys.readouterr().err
    assert main(["export", run, "--out", out, "--overwrite", "--dtype", "float32"]) == 0
    assert main(["export", str(tmp_path), "--out", out]) == 2
    assert "has no student.json" in capsys.readouterr().err


def test_sigmas_that_no_shift_gives_are_refused() -> None:
    assert folder._shift_of((1.0, 0.75, 0.0)) == pytest.approx(3.0)
    assert folder._shift_of((1.0, 0.9, 0.75, 0.5, 0.0)) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="which no shift of the stock pipeline's grid gives"):
        folder._shift_of((1.0, 0.9, 0.1, 0.0))


def test_the_pipelines_need_diffusers_alone() -> None:
    for file in folder.PIPELINES.glob("*.py"):
        code = f"import runpy, sys; runpy.run_path({str(file)!r}); assert 'twostep' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Eight bits


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("family", "per_step"), [("z-image", True), ("klein", False)])
def test_weights_of_eight_bits(
    family: str, per_step: bool, kind: str, runs: dict[tuple[str, str, bool], Path], tmp_path: Path
) -> None:
    """Stock diffusers reads them from safetensors, and they stand for the student's to 8 bits: the oracle is here."""
    pytest.importorskip("torchao")
    run = runs[family, "full", per_step]
    whole = export_folder(run, tmp_path / "whole", dtype=torch.bfloat16)
    made = export_folder(run, tmp_path / "out", dtype=torch.bfloat16, quantization=kind)
    assert made.error <= 1e-5 < made.rounding
    assert json.loads((made.folder / "export.json").read_text())["quantization"] == kind
    weights = [
        sum(f.stat().st_size for f in (one.folder / "transformer").glob("*.safetensors")) for one in (made, whole)
    ]
    assert weights[0] < 0.8 * weights[1]  # tiny layers have many scales
    loaded = DiffusionPipeline.from_pretrained(made.folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    state, true = loaded.transformer.state_dict(), merged(load_student(run, fused=False).distinct_networks()[0])
    quantized = [name for name, tensor in state.items() if type(tensor) is not torch.Tensor]
    assert any("attention" in name or "attn" in name for name in quantized)
    for name in quantized:
        largest = true[name].abs().amax(1, keepdim=True)  # a row's 255 levels, or 3 bits of mantissa; and bfloat16
        error = (state[name].dequantize().float() - true[name].float()).abs() / largest
        assert error.max() <= (0.55 / 127 if kind == "int8" else 1 / 16) + 2**-8, name


def test_eight_bits_that_do_not_compute_are_refused(
    runs: dict[tuple[str, str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantized layers are run as they are used, beside the numbers that they stand for."""
    pytest.importorskip("torchao")
    run = runs["z-image", "full", True]
    spoiled = 'made["as it is used"] = draw(pipeline)'
    assert spoiled in folder._PROBE
    monkeypatch.setattr(folder, "_PROBE", folder._PROBE.replace(spoiled, spoiled + " * 1.2"))
    with pytest.raises(ExportFailed, match="the folder's images, drawn in bfloat16, differ"):
        export_folder(run, tmp_path / "out", quantization="int8")
    assert not list(tmp_path.iterdir())


def test_quantization_says_what_it_needs(
    runs: dict[tuple[str, str, bool], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = runs["z-image", "full", True], tmp_path / "out"
    with pytest.raises(ValueError, match="'int4', expected one of int8, fp8"):
        export_folder(run, out, quantization="int4")
    monkeypatch.setattr("twostep.export.quantizing.find_spec", lambda name: None)
    assert main(["export", str(run), "--out", str(out), "--quantize", "int8"]) == 2
    assert "pip install 'twostep[quantize]'" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(out), "--as", "onnx", "--quantize", "int8"]) == 2
    assert "--quantize is for --as diffusers and program, and this is --as onnx" in capsys.readouterr().err
