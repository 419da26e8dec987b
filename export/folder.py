"""A student as a diffusers folder that stock diffusers loads, checked before it is there.

    transformer/ transformer_2/   the steps' networks; adapters are merged into the base's weights
    pipeline.py                   steps with parameters of their own: the family's pipeline, with a switch between steps
    model_index.json scheduler/   the student's sigmas, so that the folder does not run at others
    vae/ text_encoder/ tokenizer/ the pipeline's own, copied or linked
    export.json                   where it comes from, sizes, and the error that was measured

A student whose steps share one network needs no code of its own: it is the family's stock pipeline, with a scheduler
whose shift gives the student's sigmas at its number of steps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..zoo import AdapterView, Backbone, Student, load_backbone, load_student, load_text_encoder
from ..zoo.autoencoder import load_autoencoder
from ..zoo.sampling import sigma_grid
from ..zoo.saved_student import pipeline_path, student_facts, student_folder
from ..zoo.text_to_image import TextToImage

PIPELINES = Path(__file__).parent / "pipelines"
# The families' pipelines: the class, the file that knows two transformers, and its class.
FAMILIES = {
    "z-image": ("ZImagePipeline", "two_step_z_image.py", "TwoStepZImagePipeline"),
    "flux2": ("Flux2KleinPipeline", "two_step_flux2_klein.py", "TwoStepFlux2KleinPipeline"),
}
OTHER_PARTS = ("vae", "text_encoder", "tokenizer")
PROBES = ("a red circle above a green square", "two shapes", "")
FLOAT32 = 1e-5  # largest relative error of what the folder makes, computed in float32


class ExportFailed(RuntimeError):
    """The folder does not give what the student gives; nothing was left."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    bytes: int
    error: float  # of images in a fresh process without this library, relative
    rounding: float  # what writing the weights in their dtype has changed in them, relative


def export_folder(
    student: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    link: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    base: str | Path | None = None,
) -> Exported:
    """Writes the folder, or raises and leaves nothing.

    Args:
        student: a run's folder, or the student/ in it.
        dtype: of the weights that are written.
        link: links to the pipeline's other parts instead of copies of them.
        overwrite: replace what is at `out`.
        base: of adapters, where it lies now.
    """
    source, target = student_folder(student), Path(out).expanduser().absolute()
    if source is None:
        raise ValueError(f"export: {student} has no student.json; give a run's folder, or the student/ in it")
    if target.exists() and not overwrite:
        raise ValueError(f"export: {target} is there already; give another folder, or --overwrite")
    facts = student_facts(source)
    pipeline = Path(pipeline_path(facts["pipeline"]))
    if not (pipeline / "model_index.json").is_file():
        raise ValueError(f"export: the student was made for {pipeline}, and no pipeline is there: put it back")
    model = load_student(source, base=base, dtype=torch.float32, fused=False)
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    stock, file, own = _family(model, index)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, model, pipeline, dtype, link)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_networks(model, new, dtype, max_shard_size)
        for part in OTHER_PARTS:
            _place(pipeline / part, new / part, link)
        _write_index(model, index, pipeline, new, stock, file, own)
        error, rounding = _verify(model, pipeline, new)
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        report = {
            "method": facts.get("method"),
            "iteration": facts.get("iteration"),
            "teacher": facts["pipeline"],
            "sigmas": list(model.sigmas),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": size,
            "error": {"of images, against the written weights": error, "of rounding the weights": rounding},
            "versions": {name: version(name) for name in ("twostep", "torch", "diffusers", "transformers")},
        }
        (new / "export.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        new.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return Exported(target, size, error, rounding)


def _family(model: Student, index: dict[str, Any]) -> tuple[str, str, str]:
    family = model.distinct_networks()[0].family
    if family not in FAMILIES:
        raise ValueError(f"export: the student is a {family}, known are {', '.join(FAMILIES)}")
    if index["_class_name"] != FAMILIES[family][0]:
        raise ValueError(f"export: the student's pipeline is a {index['_class_name']}, expected {FAMILIES[family][0]}")
    if len(model.distinct_networks()) > 1 and model.steps != 2:
        raise ValueError(f"export: steps have parameters of their own, and there are {model.steps}: a folder holds two")
    return FAMILIES[family]


def _check_space(where: Path, model: Student, pipeline: Path, dtype: torch.dtype, link: bool) -> None:
    networks = sum(_whole(network) for network in model.distinct_networks()) * dtype.itemsize
    parts = 0 if link else sum(p.stat().st_size for part in OTHER_PARTS for p in (pipeline / part).rglob("*"))
    needed, free = networks + parts, shutil.disk_usage(where).free
    if needed > free:
        raise ValueError(
            f"export: {needed / 2**30:.1f} GiB are to be written to {where}, where {free / 2**30:.1f} are free"
        )


def _whole(network: Backbone) -> int:
    return sum(parameter.numel() for name, parameter in network.model.named_parameters() if ".lora_" not in name)


def _write_networks(model: Student, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    for number, network in enumerate(model.distinct_networks(), start=1):
        plain = type(network.model).from_config(network.model.config)
        plain.load_state_dict(merged(network))
        name = "transformer" if number == 1 else f"transformer_{number}"
        plain.to(dtype).save_pretrained(folder / name, max_shard_size=max_shard_size)


def merged(network: Backbone) -> dict[str, Tensor]:
    """The network's weights by the model's own names; of an adapter the base's with its product added in float32."""
    if not isinstance(network, AdapterView) or network.adapter is None:
        return {name: tensor for name, tensor in network.model.state_dict().items() if ".lora_" not in name}
    state: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, module in network.model.named_modules():
        if isinstance(module, BaseTunerLayer) and network.adapter in module.lora_A:
            up, down = module.lora_B[network.adapter].weight, module.lora_A[network.adapter].weight
            added[f"{name}.weight"] = module.scaling[network.adapter] * (up.float() @ down.float())
    for name, tensor in network.model.state_dict().items():
        if ".lora_" in name:
            continue
        own = name.replace(".base_layer.", ".")
        state[own] = tensor + added[own].to(tensor.dtype) if own in added else tensor
    return state


def _place(source: Path, target: Path, link: bool) -> None:
    if not source.is_dir():
        raise ValueError(f"export: the pipeline has no {source.name}/ at {source}")
    if link:
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target)


def _write_index(
    model: Student, index: dict[str, Any], pipeline: Path, new: Path, stock: str, file: str, own: str
) -> None:
    scheduler = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in index.items() if key in ("_diffusers_version", "scheduler", *OTHER_PARTS)}
    kept["transformer"] = index["transformer"]
    scheduler |= {"use_dynamic_shifting": False, "shift": 1.0}
    if len(model.distinct_networks()) > 1:
        shutil.copy(PIPELINES / file, new / "pipeline.py")
        kept |= {"_class_name": ["pipeline", own], "transformer_2": index["transformer"]}
        kept["step_sigmas"] = list(model.sigmas[:-1])
    else:
        kept["_class_name"] = stock
        scheduler["shift"] = _shift_of(model.sigmas)
    if stock == "Flux2KleinPipeline":
        kept["is_distilled"] = True
    (new / "scheduler").mkdir()
    (new / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n", encoding="utf-8")
    (new / "model_index.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _shift_of(sigmas: tuple[float, ...]) -> float:
    """The shift whose grid these sigmas are: s u / (1 + (s - 1) u) at u = 1 - 1 / N is the second of them."""
    steps = len(sigmas) - 1
    if steps == 1:
        return 1.0
    u, second = 1 - 1 / steps, sigmas[1]
    shift = second * (1 - u) / (u * (1 - second))
    if max(abs(a - b) for a, b in zip(sigma_grid(steps, shift), sigmas, strict=True)) > 1e-6:
        raise ValueError(
            f"export: the steps share one network at sigmas {list(sigmas)}, which no shift of the stock pipeline's "
            f"grid gives; train the student with roles.student.shift, or with parameters for each step"
        )
    return shift


# The check: images from the same noise and prompts, in a process that never imports this library

_PROBE = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from diffusers import DiffusionPipeline
folder, given, made, height, width, steps, guidance = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
images = []
for prompt, noise in zip(json.loads(sys.stdin.read()), load_file(given)["noise"], strict=True):
    result = pipeline(prompt=[prompt], height=int(height), width=int(width), num_inference_steps=int(steps),
                      guidance_scale=float(guidance), latents=noise[None].clone(), output_type="pt")
    images.append(result.images.float())
assert not [name for name in sys.modules if name.split(".")[0] == "twostep"]
save_file({"images": torch.cat(images).contiguous()}, made)
"""


def _verify(model: Student, pipeline: Path, new: Path) -> tuple[float, float]:
    """The relative error of the folder's images against those of the student with the weights that were written, and
    what writing them in their dtype has changed."""
    text = load_text_encoder(pipeline, dtype=torch.float32)
    autoencoder = load_autoencoder(pipeline, dtype=torch.float32)
    names = [f"transformer_{number}" if number > 1 else "transformer" for number in range(1, model.steps + 1)]
    own = len(model.distinct_networks()) > 1
    written = [
        load_backbone(new, dtype=torch.float32, fused=False, subfolder=name) for name in (names if own else names[:1])
    ]
    again = Student(written if own else written * model.steps, model.sigmas)
    before, after = (TextToImage(text, autoencoder, one) for one in (model, again))
    size = before.size()
    noise, context = before.noise(range(len(PROBES)), size), before.contexts(PROBES)
    exact, true = (one.images(one.latents(noise, context)) for one in (before, after))
    found = _in_a_fresh_process(model, new, noise, size) * 2 - 1
    error = float((found - true).norm() / true.norm())
    if not error <= FLOAT32:
        raise ExportFailed(
            f"export: the folder's images are {error:.2e} off the student's (relative), allowed are {FLOAT32:.0e}; "
            f"nothing was left. Likeliest is a diffusers that computes this model in another way than the tested one"
        )
    return error, float((exact - true).norm() / exact.norm())


def _in_a_fresh_process(model: Student, new: Path, noise: Tensor, size: tuple[int, int]) -> Tensor:
    guidance = 0.0 if model.distinct_networks()[0].family == "z-image" else 1.0
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place, "given.safetensors"), Path(place, "made.safetensors")
        save_file({"noise": noise.contiguous()}, given)
        words = [sys.executable, "-c", _PROBE, str(new), str(given), str(made)]
        words += [str(number) for number in (*size, model.steps, guidance)]
        environment = {**os.environ, "HF_MODULES_CACHE": place}  # where diffusers puts pipeline.py to import it
        ended = subprocess.run(
            words, input=json.dumps(PROBES), capture_output=True, text=True, cwd=place, env=environment, check=False
        )
        if ended.returncode:
            raise ExportFailed(
                f"export: stock diffusers could not run the folder; nothing was left.\n{ended.stderr[-2000:]}"
            )
        return load_file(made)["images"]
