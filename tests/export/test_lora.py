"""LoRA files: stock diffusers with them on the base draws the student's images; whole weights lose what is said."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from tests.train import tiny_runs
from tests.zoo.models import CASES, stock_model
from twostep.cli import main
from twostep.export import ExportFailed, export_lora, export_single_file, lora
from twostep.export.lora import named, taken_apart
from twostep.export.merging import Product, plain, products
from twostep.export.original import place, to_original
from twostep.zoo import Backbone, load_student
from twostep.zoo.saved_student import student_facts

Runs = dict[tuple[str, str, bool], Path]


@pytest.mark.parametrize("keys", ["diffusers", "comfyui"])
@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_stock_diffusers_draws_the_students_images(family: str, keys: str, runs: Runs, tmp_path: Path) -> None:
    """A fresh process checks the images; a file holds an adapter."""
    for per_step in (True, False):
        made = export_lora(runs[family, "lora", per_step], tmp_path / str(per_step), keys=keys, dtype=torch.float32)
        assert made.error <= 1e-5 and made.rounding <= 1e-5
        files = sorted(path.name for path in made.folder.glob("*.safetensors"))
        assert files == (
            ["step_1.safetensors", "step_2.safetensors"] if per_step else ["pytorch_lora_weights.safetensors"]
        )
        facts = json.loads((made.folder / "export.json").read_text())
        assert (
            facts["keys"] == keys and facts["rank"] == student_facts(runs[family, "lora", per_step] / "student")["rank"]
        )


def test_names_are_those_that_are_looked_for(runs: Runs, tmp_path: Path) -> None:
    def names(family: str, keys: str) -> set[str]:
        made = export_lora(runs[family, "lora", False], tmp_path / f"{family}-{keys}", keys=keys)
        return set(load_file(made.folder / "pytorch_lora_weights.safetensors"))

    assert "transformer.layers.0.attention.to_q.lora_A.weight" in names("z-image", "diffusers")
    assert "diffusion_model.layers.0.attention.to_q.lora_B.weight" in names("z-image", "comfyui")
    assert "transformer.transformer_blocks.0.attn.to_add_out.lora_A.weight" in names("klein", "diffusers")
    found = names("klein", "comfyui")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in found
    assert "diffusion_model.single_blocks.0.linear1.lora_B.weight" in found
    assert not [name for name in found if "to_q" in name or "transformer" in name]


@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_every_key_is_one_that_comfyui_maps(family: str, runs: Runs, tmp_path: Path) -> None:
    """ComfyUI (comfy/lora.py, model_lora_keys_unet) knows `diffusion_model.` before each weight of the file that it
    loads, by the original's names; of Z-Image also q, k and v as rows of qkv, and out as to_out.0 (comfy/utils.py,
    z_image_to_diffusers). None is left out, and all fit."""
    run = runs[family, "lora", False]
    made = export_lora(run, tmp_path / "out", keys="comfyui", dtype=torch.float32)
    found = load_file(made.folder / "pytorch_lora_weights.safetensors")
    network = load_student(run, dtype=torch.float32, fused=False).networks[0]
    weights = to_original(plain(network), network.family)
    if family == "z-image":
        for name in [name for name in weights if name.endswith(".attention.qkv.weight")]:
            attention, rows = name.removesuffix("qkv.weight"), weights[name].chunk(3)
            weights |= {f"{attention}to_{part}.weight": some for part, some in zip("qkv", rows, strict=True)}
            weights[f"{attention}to_out.0.weight"] = weights[f"{attention}out.weight"]
    modules = {name.rsplit(".lora_", 1)[0] for name in found}
    for module in modules:
        up, down = (found[f"{module}.lora_{part}.weight"] for part in "BA")
        weight = weights[f"{module.removeprefix('diffusion_model.')}.weight"]
        assert (up.shape[0], down.shape[1]) == weight.shape, module
    adapted = {place(module, network.family).module if family == "klein" else module for module in products(network)}
    assert modules == {f"diffusion_model.{module}" for module in adapted} and len(found) == 2 * len(modules)


def test_joined_products_are_those_of_q_k_and_v() -> None:
    """One of them absent, as an adapter that stands on q and v alone has it."""
    make = torch.Generator().manual_seed(0)
    q, v = (Product(torch.randn(r, 6, generator=make), torch.randn(4, r, generator=make)) for r in (2, 3))
    module = "transformer_blocks.7.attn."
    found = named({f"{module}to_q": q, f"{module}to_v": v}, "flux2", "comfyui")
    prefix = "diffusion_model.double_blocks.7.img_attn.qkv.lora_"
    assert found.keys() == {f"{prefix}A.weight", f"{prefix}B.weight"}
    product = found[f"{prefix}B.weight"] @ found[f"{prefix}A.weight"]
    expected = torch.cat([q(), torch.zeros(4, 6), v()])
    assert torch.allclose(product, expected, atol=1e-6)


def test_whole_weights_are_taken_apart_as_well_as_can_be() -> None:
    """Against the singular values themselves; and a change of that rank comes out whole."""
    case = CASES["z-image"]
    base, weights = (stock_model(case, seed).state_dict() for seed in (0, 1))
    found, behind = taken_apart(weights, base, "z-image", 4)
    module = "layers.1.feed_forward.w2"
    values = torch.linalg.svdvals((weights[f"{module}.weight"] - base[f"{module}.weight"]).double())
    best = float(values[4:].square().sum())
    left = weights[f"{module}.weight"] - base[f"{module}.weight"] - found[module]()
    assert float(left.double().square().sum()) == pytest.approx(best, rel=1e-3)
    every = {name: float((weights[name] - base[name]).double().square().sum()) for name in base}
    kept = sum(
        every[f"{one}.weight"]
        - float((weights[f"{one}.weight"] - base[f"{one}.weight"] - found[one]()).double().square().sum())
        for one in found
    )
    assert behind == pytest.approx(math.sqrt(1 - kept / sum(every.values())), rel=1e-4)

    own = {f"{module}.weight": base[f"{module}.weight"] + found[module]()}
    again, behind = taken_apart({**base, **own}, base, "z-image", 4)
    assert behind < 1e-4 and again[module].down.shape[0] == 4
    with pytest.raises(ValueError, match="there is nothing to take apart"):
        taken_apart(base, base, "z-image", 4)


@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_whole_weights_become_files(family: str, runs: Runs, tmp_path: Path) -> None:
    """A higher rank leaves less behind, and the file's images differ as much as is said."""
    few = export_lora(runs[family, "full", True], tmp_path / "few", rank=2, dtype=torch.float32)
    many = export_lora(runs[family, "full", True], tmp_path / "many", rank=48, dtype=torch.float32)
    assert few.error <= 1e-5 and many.error <= 1e-5
    behind = [
        json.loads((made.folder / "export.json").read_text())["error"][
            "share of the weights' change that is left behind, by step"
        ]
        for made in (few, many)
    ]
    assert all(a > b > 0 for a, b in zip(*behind, strict=True))  # norms and embeddings stay behind at any rank
    assert few.rounding > 0


def test_the_check_sees_a_wrong_file(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(factors: dict[str, Product], family: str, keys: str) -> dict[str, torch.Tensor]:
        return named({name: Product(one.down, one.up * 0.5) for name, one in factors.items()}, family, keys)

    monkeypatch.setattr(lora, "named", halved)
    with pytest.raises(ExportFailed, match="stock diffusers' images differ"):
        export_lora(runs["z-image", "lora", True], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_adapters_than_the_students_are_refused(
    dtype: torch.dtype, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are consistent in themselves, and not the student."""

    def scaled(network: Backbone) -> dict[str, Product]:
        return {name: Product(one.down, one.up * 1.3) for name, one in products(network).items()}

    monkeypatch.setattr(lora, "products", scaled)
    with pytest.raises(ExportFailed, match="images of the factors that were written differ"):
        export_lora(runs["klein", "lora", True], tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_the_base_may_have_moved(runs: Runs, places: dict[str, tiny_runs.Place], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["klein", "lora", True] / "student", run / "student")
    facts = json.loads((run / "student" / "student.json").read_text())
    facts |= {"base": [str(tmp_path / "gone"), "transformer"], "pipeline": str(tmp_path / "gone")}
    (run / "student" / "student.json").write_text(json.dumps(facts))
    place = str(places["klein"].model)
    made = export_lora(run, tmp_path / "out", base=place, pipeline=place)
    assert json.loads((made.folder / "export.json").read_text())["base"] == [place, "transformer"]
    with pytest.raises(ValueError, match="and no pipeline is there; say where it is: --pipeline"):
        export_lora(run, tmp_path / "other", base=place)
    with pytest.raises(ValueError, match="the student has whole weights, which stand on none"):
        export_single_file(runs["klein", "full", True], tmp_path / "other", base=place)


def test_a_pinned_pipeline_of_the_hub(
    runs: Runs, places: dict[str, tiny_runs.Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two commits the one that is named, in the process that checks as well."""
    commits = tmp_path / "hub" / "models--owner--name" / "snapshots"
    shutil.copytree(places["klein"].model, commits / ("1" * 40))
    (commits / ("0" * 40)).mkdir()
    (commits.parent / "refs").mkdir()
    for name, commit in (("main", "0"), ("v1", "1")):
        (commits.parent / "refs" / name).write_text(commit * 40)
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    run = tmp_path / "run"
    shutil.copytree(runs["klein", "lora", True] / "student", run / "student")
    facts = json.loads((run / "student" / "student.json").read_text())
    facts |= {"base": ["owner/name@v1", "transformer"], "pipeline": "owner/name@v1"}
    (run / "student" / "student.json").write_text(json.dumps(facts))
    made = export_lora(run, tmp_path / "out", dtype=torch.float32)
    assert made.error <= 1e-5
    facts = json.loads((made.folder / "export.json").read_text())
    assert facts["base"] == ["owner/name@v1", "transformer"]
    assert (facts["teacher"], facts["revision"]) == ("owner/name", "v1")  # as stock diffusers takes them


def test_the_command(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters, whole, out = (
        str(x) for x in (runs["z-image", "lora", True], runs["z-image", "full", True], tmp_path / "o")
    )
    assert main(["export", adapters, "--out", out, "--as", "lora", "--keys", "comfyui"]) == 0
    assert "stock diffusers draws what was written" in capsys.readouterr().out
    for words, message in (
        ([adapters, "--as", "lora", "--rank", "4", "--overwrite"], "--rank is 4, and the student's adapters have one"),
        ([whole, "--as", "lora", "--overwrite"], "say the rank of the product to take from them: --rank"),
        ([whole, "--as", "lora", "--rank", "0", "--overwrite"], "--rank is 0, expected at least 1"),
        ([whole, "--as", "lora", "--rank", "9999", "--overwrite"], "--rank is 9999, and no layer has more than"),
        ([whole, "--rank", "4", "--overwrite"], "--rank is for --as lora, and this is --as diffusers"),
        ([whole, "--as", "single-file", "--parts", "link", "--overwrite"], "--parts is for --as diffusers"),
        ([adapters, "--as", "lora"], "is there already"),
    ):
        assert main(["export", *words, "--out", out]) == 2
        assert message in capsys.readouterr().err


def test_a_file_is_one_that_the_students_own_format_knows(runs: Runs, tmp_path: Path) -> None:
    """diffusers' names without its prefix, scales taken out again, are the adapter that was trained."""
    run = runs["z-image", "lora", False]
    made = export_lora(run, tmp_path / "out", dtype=torch.float32)
    found = load_file(made.folder / "pytorch_lora_weights.safetensors")
    student = load_student(run, dtype=torch.float32, fused=False)
    trained = student.networks[0].state_dict()
    assert len(found) == len(trained)
    for name, tensor in trained.items():
        scale = 2.0 if "lora_B" in name else 1.0  # alpha is twice the rank
        assert torch.equal(found[f"transformer.{name}"], scale * tensor)
