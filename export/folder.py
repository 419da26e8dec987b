"""A student as a diffusers folder that stock diffusers loads, checked before it is there.

    transformer/ transformer_2/   the steps' networks; adapters are merged into the base's weights
    pipeline.py                   steps with parameters of their own: the family's pipeline, with a switch between steps
    model_index.json scheduler/   the student's sigmas
    vae/ text_encoder/ tokenizer/ the pipeline's own: copied, linked, or left where they are
    export.json                   where it comes from, sizes, and the error that was measured
    student.json                  by which this library takes the folder for the student that it is

A folder of two networks runs at the student's sigmas alone. A student whose steps share one needs no code of its own:
it is the family's stock pipeline, with a scheduler whose shift gives the student's sigmas at its number of steps, and
that number is the caller's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..disk import check_space
from ..zoo import Student, load_backbone
from ..zoo.sampling import sigma_grid
from ..zoo.saved_student import FACTS, HERE
from . import fresh_process
from .fresh_process import hold, relative
from .merging import merged, with_weights
from .new_folder import bytes_in, new_folder, target_of
from .probes import FLOAT32, PROMPTS, Probes
from .quantizing import check_quantizing, exact_weights, quantize_folder, rounded
from .source import Exported, Source, found

PIPELINES = Path(__file__).parent / "pipelines"
# The families' pipelines: the class, the file that knows two transformers, and its class.
FAMILIES = {
    "z-image": ("ZImagePipeline", "two_step_z_image.py", "TwoStepZImagePipeline"),
    "flux2": ("Flux2KleinPipeline", "two_step_flux2_klein.py", "TwoStepFlux2KleinPipeline"),
}
OTHER_PARTS = ("vae", "text_encoder", "tokenizer")
PARTS = ("copy", "link", "reference")


def export_folder(
    student: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    parts: str = "copy",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    base: str | Path | None = None,
    pipeline: str | Path | None = None,
    quantization: str | None = None,
) -> Exported:
    """Writes the folder, or raises and leaves nothing.

    Args:
        student: a run's folder, or the student/ in it.
        dtype: of the weights that are written.
        parts: of the pipeline besides its transformer: "copy" them, "link" to them, or "reference" them: whoever loads
            the folder passes them on from the pipeline that export.json names as the teacher.
        overwrite: replace what is at `out`.
        base: of adapters, where it lies now.
        pipeline: that the student was made for, where it lies now.
        quantization: of the linear layers' weights, by torchao: "int8", or "fp8" (e4m3).
    """
    check_quantizing(quantization)
    if parts not in PARTS:
        raise ValueError(f"export: parts are {parts!r}, expected one of {', '.join(PARTS)}")
    target = target_of(out, overwrite, found(student))
    source = Source.read(student, base=base, pipeline=pipeline)
    source.check_steps()
    model, pipeline = source.model, source.pipeline
    source.guard(target)
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    stock, file, own = _family(model, index)
    copied = sum(bytes_in(pipeline / part) for part in OTHER_PARTS) if parts == "copy" else 0
    both = dtype.itemsize + (quantization is not None)  # what is quantized stands beside what it is made from
    check_space(target.parent, source.parameters * both + copied, "export")
    with new_folder(target, lambda: target_of(target, overwrite)) as new:
        with source.phase("writing"):
            _write_networks(model, new, dtype, max_shard_size, quantization)
            for part in OTHER_PARTS:
                _place(pipeline / part, new / part, parts)
            _write_index(model, index, pipeline, new, stock, file, own)
            steps = [_name(number) for number in source.order()]
            where = source.place if parts == "reference" else HERE
            facts = {"sigmas": list(model.sigmas), "steps": steps, "pipeline": where}
            facts |= {name: source.facts[name] for name in ("method", "iteration", "recipe") if name in source.facts}
            facts |= {"teacher": source.place, "began_as": source.began_as()}
            (new / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        with source.phase("checking"):
            errors = _verify(source, new, dtype, quantization, referenced=parts == "reference")
        named = str(dtype).removeprefix("torch.")
        return source.leave(
            new,
            target,
            error=errors[WRITTEN],
            rounding=errors[ROUNDED],
            dtype=named,
            quantization=quantization,
            parts=parts,
            errors=errors,
        )


def _family(model: Student, index: dict[str, Any]) -> tuple[str, str, str]:
    family = model.distinct_networks()[0].family
    if family not in FAMILIES:
        raise ValueError(f"export: the student is a {family}, known are {', '.join(FAMILIES)}")
    if index.get("_class_name") != FAMILIES[family][0]:
        there = index.get("_class_name", "thing without a class in model_index.json")
        raise ValueError(f"export: the student's pipeline is a {there}, expected {FAMILIES[family][0]}")
    if len(model.distinct_networks()) > 1 and model.steps != 2:
        raise ValueError(f"export: steps have parameters of their own, and there are {model.steps}: a folder holds two")
    return FAMILIES[family]


def _write_networks(
    model: Student, folder: Path, dtype: torch.dtype, max_shard_size: str, quantization: str | None
) -> None:
    for number, network in enumerate(model.distinct_networks()):
        state, name = {key: tensor.to(dtype) for key, tensor in merged(network).items()}, _name(number)
        with_weights(network, state).model.save_pretrained(folder / name, max_shard_size=max_shard_size)
        if quantization is not None:
            quantize_folder(folder / name, quantization, dtype, max_shard_size)


def _name(number: int) -> str:
    """Of a network's folder, counted from 0."""
    return f"transformer_{number + 1}" if number else "transformer"


def _place(source: Path, target: Path, how: str) -> None:
    if not source.is_dir():
        raise ValueError(f"export: the pipeline has no {source.name}/ at {source}")
    if how == "link":
        target.symlink_to(source.resolve(), target_is_directory=True)
    elif how == "copy":
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
from diffusers import DiffusionPipeline

def load(dtype):
    given = {}
    if facts["elsewhere"] is not None:
        given = DiffusionPipeline.from_pretrained(facts["elsewhere"], transformer=None, torch_dtype=dtype).components
        given = {name: given[name] for name in facts["parts"]}
    pipeline = DiffusionPipeline.from_pretrained(facts["folder"], trust_remote_code=True, torch_dtype=dtype, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

def unquantized(pipeline):
    networks = [part for name, part in pipeline.components.items() if name.startswith("transformer")]
    for module in (module for network in networks for module in network.modules()):
        for name, weight in list(module._parameters.items()):
            if hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter:
                module._parameters[name] = torch.nn.Parameter(weight.dequantize().float(), requires_grad=False)
    for network in networks:
        network.is_quantized = False
        network.to(torch.float32)
    return pipeline

def draw(pipeline):
    images = []
    for prompt, noise in zip(facts["prompts"], tensors["noise"], strict=True):
        result = pipeline(prompt=[prompt], latents=noise[None].clone(), output_type="pt", **facts["settings"])
        images.append(result.images.float())
    return torch.cat(images)

pipeline = load(torch.float32)
made["images"] = draw(unquantized(pipeline) if facts["quantized"] else pipeline)
dtype = getattr(torch, facts["dtype"])
if facts["quantized"] or dtype != torch.float32:
    del pipeline
    pipeline = load(dtype)
    made["as it is used"] = draw(pipeline)
"""
# What is measured, all relative and of images.
WRITTEN = "in float32, against the written weights"
ROUNDED = "of rounding the weights"
USED = "in the folder's dtype, against the student in float32"
OWN = "of the student in that dtype"


def _verify(
    source: Source, new: Path, dtype: torch.dtype, quantization: str | None, *, referenced: bool
) -> dict[str, float]:
    """Three comparisons:

    - the written weights with the student's: nothing is lost in float32, otherwise at most thrice what rounding the
      student's own tensors loses, adapters apart from their base;
    - stock diffusers in float32 with the written weights;
    - stock diffusers in the folder's own dtype with the student: at most twice as far off as the student is in that
      dtype, and for weights of 8 bits what they lose besides.
    """
    model, probes = source.model, Probes(source.pipeline, source.model)
    exact, errors = probes.images(model), {}
    allowed = FLOAT32
    if dtype != torch.float32 or quantization is not None:
        allowed += 3 * relative(probes.images(rounded(model, dtype, quantization)), exact)
    written = []
    for number, network in enumerate(model.distinct_networks()):
        name = _name(number)
        if quantization is None:
            written.append(load_backbone(new, dtype=torch.float32, fused=False, subfolder=name))
        else:
            written.append(exact_weights(new / name, network))
    again = Student(written if len(written) > 1 else written * model.steps, model.sigmas)
    true = probes.images(again)
    what = "images of the weights that were written differ from the student's"
    errors[ROUNDED] = hold(relative(true, exact), allowed, what, "the merging")
    noise, settings = probes.noise, probes.settings
    del again, written, probes  # the next one loads it in the folder's dtype, and then the other process all of it
    errors[OWN] = 0.0
    if dtype != torch.float32:
        own = source.in_dtype(dtype)
        errors[OWN] = relative(Probes(source.pipeline, own, dtype).images(own), exact)
        del own
    facts: dict[str, Any] = {"folder": str(new), "prompts": PROMPTS, "settings": settings, "parts": OTHER_PARTS}
    facts |= {"quantized": quantization is not None, "dtype": str(dtype).removeprefix("torch.")}
    facts["elsewhere"] = str(source.pipeline) if referenced else None
    made = fresh_process.run(_PROBE, facts, {"noise": noise}, what="stock diffusers could not run the folder")
    likeliest = "a diffusers that computes this model in another way than the tested one"
    what = "the folder's images differ from the written weights'"
    errors[WRITTEN] = hold(relative(made["images"], true), FLOAT32, what, likeliest)
    if "as it is used" in made:
        off, allowed = relative(made["as it is used"], exact), FLOAT32 + 2 * errors[OWN]
        if quantization is not None:
            allowed += errors[ROUNDED]
            likeliest = "a torchao that computes these weights in another way than the tested one"
        what = f"the folder's images, drawn in {facts['dtype']}, differ from the student's"
        errors[USED] = hold(off, allowed, what, likeliest)
    return errors
