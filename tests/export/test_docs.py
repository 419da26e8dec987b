"""docs/export.md as it stands there, commands and code, on tiny pipelines of both families."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from twostep.cli import main
from twostep.export.fresh_process import relative
from twostep.zoo import load_text_to_image
from twostep.zoo.text_to_image import TextToImage

Runs = dict[tuple[str, str, bool], Path]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FOLDER, FILES, LORA, PROGRAM, ONNX = "A pipeline's folder", "Single files", "LoRA", "A program", "ONNX"
NAMED = {"first": ("full", True), "shared": ("full", False), "adapters": ("lora", True)}
PROMPT = "a red circle"
families = pytest.mark.parametrize("family", ["z-image", "klein"])


def code(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)


def exporting(section: str) -> Iterator[list[str]]:
    """The words of its commands."""
    for line in re.findall(r"(?:^    |made by: )(twostep export .*)$", SECTIONS[section], re.MULTILINE):
        yield shlex.split(line, comments=True)[1:]


@pytest.fixture
def here(family: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the page's runs are."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name, (weights, per_step) in NAMED.items():
        Path("runs", name).symlink_to(runs[family, weights, per_step], target_is_directory=True)
    return tmp_path


def drawn(block: str, family: str, student: TextToImage) -> torch.Tensor:
    """The image of a block, of the student's noise, in float32; the student's size is not the pipeline's default."""
    height, width = student.size()
    wanted = f'prompt="{PROMPT}", latents=noise, output_type="pt", height={height}, width={width}'
    block = block.replace(f'prompt="{PROMPT}"', wanted).replace("bfloat16", "float32")
    if family == "klein":
        block = block.replace('"guidance_scale": 0.0', '"guidance_scale": 1.0')
        block = block.replace("ZImageTransformer2DModel as", "Flux2Transformer2DModel as")
    names: dict[str, Any] = {"noise": student.noise([3])}
    exec(block, names)
    return names["image"].unsqueeze(0)


def assert_same(found: torch.Tensor, student: TextToImage) -> None:
    assert relative(found, (student.draw([PROMPT], [3]) + 1) / 2) <= 1e-4


@families
def test_folders(family: str, here: Path) -> None:
    """The steps' own networks, one for both, and parts that are passed on."""
    for words in exporting(FOLDER):
        assert main([*[word for word in words if word != "bfloat16" and word != "--dtype"], "--dtype", "float32"]) == 0
    own, shared, referenced = code(FOLDER)
    for block, run in ((own, "first"), (shared, "shared"), (referenced, "first")):
        student = load_text_to_image(here / "runs" / run, dtype=torch.float32)
        assert_same(drawn(block, family, student), student)


@families
def test_single_files(family: str, here: Path) -> None:
    (words,), (block,) = exporting(FILES), code(FILES)
    assert main([*words, "--dtype", "float32"]) == 0
    student = load_text_to_image(here / "runs" / "first", dtype=torch.float32)
    assert_same(drawn(block, family, student), student)


@families
def test_lora_files(family: str, here: Path) -> None:
    """The block with its folder, and with the one by the other names."""
    for words in exporting(LORA):
        # No layer of these has 64 dimensions.
        assert main([*(word.replace("64", "16") for word in words), "--dtype", "float32"]) == 0
    (block,) = code(LORA)
    student = load_text_to_image(here / "runs" / "adapters", dtype=torch.float32)
    for folder in ("lora", "comfyui"):
        assert_same(drawn(block.replace('"lora/', f'"{folder}/'), family, student), student)
    assert (here / "extracted" / "step_2.safetensors").is_file()


def inputs(student: TextToImage, family: str) -> dict[str, torch.Tensor]:
    context = student.contexts([PROMPT, "a star"])
    features = context.features
    if family == "klein":
        return {"noise": student.noise([1, 2]), "features": features}
    features = nn.functional.pad(features, (0, 0, 0, 32 - features.shape[1]))
    return {"noise": student.noise([1, 2]), "features": features, "lengths": context.token_lengths}


def of_family(block: str, family: str) -> str:
    return block if family == "z-image" else re.sub(r', (lengths=|"lengths": |torch::Tensor )?lengths', "", block)


@families
def test_onnx(family: str, here: Path) -> None:
    (words,), (block,) = exporting(ONNX), code(ONNX)
    assert main(words) == 0
    student = load_text_to_image(here / "runs" / "first", dtype=torch.float32)
    given = inputs(student, family)
    names: dict[str, Any] = {name: tensor.numpy() for name, tensor in given.items()}
    exec(of_family(block, family), names)
    expected = student.model.sample(given["noise"], student.contexts([PROMPT, "a star"]))
    assert relative(torch.from_numpy(names["x"]), expected) <= 1e-4


@families
def test_images(family: str, here: Path) -> None:
    """Of a run, of its folder, and of the miniature."""
    assert main(["export", "runs/first", "--out", "student"]) == 0
    lines = re.findall(r"^    twostep (sample .*)$", SECTIONS["Images"], re.MULTILINE)
    assert len(lines) == 3
    for words in lines:
        assert main(shlex.split(words)) == 0
        folder = shlex.split(words)[-1]
        assert len(list(Path(folder).glob("*.png"))) == int(re.search(r"--count (\d+)", words)[1]) + 1  # and the sheet
    (file,) = Path("student").glob("transformer/*.safetensors")
    file.touch()  # another model, for all that is known
    assert main([*shlex.split(lines[1])]) == 2 == main([*shlex.split(lines[0]), "--subfolder", "transformer_2"])


MAIN = """
#include <fstream>
#include <iostream>
#include <iterator>

int main() {
  std::ifstream file("given.pt", std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  torch::IValue list = torch::pickle_load(bytes);
  std::vector<torch::Tensor> given;
  for (const torch::IValue& one : list.toListRef()) given.push_back(one.toTensor());
  auto made = torch::pickle_save(sample(GIVEN));
  std::ofstream("made.pt", std::ios::binary).write(made.data(), made.size());
}
"""


@pytest.mark.slow
@families
def test_programs(family: str, here: Path) -> None:
    """In processes of their own: Python that does not know this library, and C++ that knows no Python."""
    (words,), (block,), (source,) = exporting(PROGRAM), code(PROGRAM), code(PROGRAM, "cpp")
    assert main([*words, "--device", "cpu"]) == 0
    student = load_text_to_image(here / "runs" / "first", dtype=torch.float32)
    given = inputs(student, family)
    expected = student.model.sample(given["noise"], student.contexts([PROMPT, "a star"]))
    torch.save(list(given.values()), "given.pt")
    script = f"import torch\n{', '.join(given)} = torch.load('given.pt')\n{of_family(block, family)}"
    script += "\ntorch.save(latents, 'latents.pt')"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert relative(torch.load("latents.pt"), expected) <= 1e-5

    arguments = ", ".join(f"given[{number}]" for number in range(len(given)))
    Path("main.cpp").write_text(of_family(source, family) + MAIN.replace("GIVEN", arguments))
    place = Path(torch.__file__).parent
    headers = [f"-I{place}/include", f"-I{place}/include/torch/csrc/api/include"]
    libraries = [f"-L{place}/lib", f"-Wl,-rpath,{place}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "main.cpp", "-o", "sample", *headers, *libraries, "-ldl"]
    subprocess.run(command, check=True, timeout=300)
    subprocess.run(["./sample"], check=True, timeout=120)
    assert relative(torch.load("made.pt"), expected) <= 1e-5
