"""A student that a run left (its `student/`) or an export made, on its networks again.

student.json         sigmas; the network that each step runs; the pipeline that it was made for, HERE for its own folder
transformer/, ...    full: networks as diffusers has them
step_1.safetensors   adapters: their tensors by PEFT's names, on the base that student.json names
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .adapters import AdapterBase
from .backbone import Backbone
from .loading import load_backbone
from .miniature.model import weights_folder
from .student import Student, TwoStepStudent

FACTS = "student.json"
MINIATURE = "miniature"
HERE = "."


def student_folder(path: str | Path) -> Path | None:
    """The student's folder, of itself or of a run; None where there is none."""
    folder = Path(path).expanduser()
    return next((found for found in (folder, folder / "student") if (found / FACTS).is_file()), None)


def student_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_student: {folder / FACTS} is not JSON: {error}") from None
    kinds: dict[str, type | tuple[type, ...]] = {"sigmas": list, "steps": list, "pipeline": str}
    if isinstance(facts, dict) and "base" in facts:
        kinds |= {"base": list, "rank": int, "alpha": (int, float)}
    said = facts if isinstance(facts, dict) else {}
    wrong = sorted(name for name, kind in kinds.items() if not isinstance(said.get(name), kind))
    if "sampler" in said:  # a base, which takes as many steps as one likes
        sampler = said["sampler"] if isinstance(said["sampler"], dict) else {}
        numbers: dict[str, type | tuple[type, ...]] = {"steps": int, "guidance": (int, float)}
        wrong += [f"sampler.{name}" for name, kind in numbers.items() if not isinstance(sampler.get(name), kind)]
    if wrong:
        raise ValueError(f"load_student: {folder / FACTS} does not say {', '.join(wrong)}; was it written by a run?")
    if facts["pipeline"] == HERE:
        facts["pipeline"] = str(folder)
    return facts


def pipeline_path(name: str) -> str:
    """What a recipe calls a model, as loaders take it: MINIATURE is the package's own folder."""
    if name == MINIATURE:
        return str(weights_folder())
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def load_student(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    fused: bool = True,
) -> Student:
    """The student in this folder, or in a run's: frozen, ready to sample.

    Args:
        base: for adapters, where the base lies now, if not where the run found it.
        dtype: of networks and bases; adapters stay float32, as they were trained.
    """
    folder = student_folder(path)
    if folder is None:
        raise ValueError(f"load_student: {path} has no {FACTS}; give a run's folder, or the student/ in it")
    facts = student_facts(folder)
    names: list[str] = facts["steps"]

    def load(place: str | Path, subfolder: str | None) -> Backbone:
        return load_backbone(place, dtype=dtype, device=device, fused=fused, subfolder=subfolder)

    networks: dict[str, Backbone] = {}
    if "base" in facts:
        place, subfolder = facts["base"]
        place = pipeline_path(place) if base is None else base
        # float16 does not hold the small numbers of the other dtypes, and would make another fingerprint of them.
        first, where = (torch.float32, "cpu") if dtype == torch.float16 else (dtype, device)
        network = load_backbone(place, dtype=first, device=where, fused=fused, subfolder=subfolder)
        adapters = AdapterBase(network)
        _check_base(facts.get("base_weights"), adapters.base_weights, folder, f"{place}/{subfolder}")
        network.model.to(device, dtype)
        for name in dict.fromkeys(names):
            view = adapters.add(name, rank=facts["rank"], alpha=facts["alpha"])
            view.load_state_dict(load_file(folder / f"{name}.safetensors"))
            networks[name] = view
    else:
        networks = {name: load(folder, name) for name in dict.fromkeys(names)}
    steps = [networks[name] for name in names]
    student = TwoStepStudent(*steps, sigmas=facts["sigmas"]) if len(steps) == 2 else Student(steps, facts["sigmas"])
    student.requires_grad_(False)
    return student.eval()


def _check_base(trained_on: str | None, found: str | None, folder: Path, place: str) -> None:
    """Adapters fit any base of the shape of theirs, and mean something on their own alone."""
    if trained_on is not None and trained_on != found:
        raise ValueError(
            f"load_student: the adapters in {folder} were trained on other weights than those in {place} (fingerprint "
            f"{trained_on}, not {found}); give base=..., the model that they were trained on"
        )
