"""Recipes of runs on tiny pipelines: every method, in full and as adapters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostep.cli import main

from . import tiny_pipelines

METHODS = ("turbo_pp", "dp_dmd", "d_opsd", "decoupled_dmd", "flow_matching")
WEIGHTS = ("full", "lora")


@dataclass(frozen=True)
class Place:
    """A pipeline's folder, and data made with it."""

    family: str
    model: Path
    prompts: Path
    images: Path
    cache: Path


def make_place(family: str, folder: Path) -> Place:
    model = tiny_pipelines.PIPELINES[family](folder / "model")
    prompts = tiny_pipelines.prompts(folder)
    images = tiny_pipelines.images(folder, 64 if family == "z-image" else 32)
    cache = folder / "cache"
    command = ["cache", "--model", str(model), "--prompts", str(prompts), "--out", str(cache), "--dtype", "float32"]
    assert main([*command, "--teacher-steps", "2"]) == 0
    return Place(family, model, prompts, images, cache)


def recipe(place: Place, method: str, weights: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A few iterations in float32; `changes` are top-level keys, and lie over what is here section by section."""
    prompts: dict[str, Any] = {
        "kind": "prompts",
        "prompts": str(place.prompts),
        "contexts": str(place.cache / "contexts"),
    }
    images = {"kind": "images", "folder": str(place.images)}
    data: dict[str, Any] = {
        "turbo_pp": {**prompts, "teacher": str(place.cache / "teacher")},
        "dp_dmd": prompts,
        "decoupled_dmd": prompts,
        "d_opsd": images,
        "flow_matching": images,
    }[method]
    student: dict[str, Any] = {"weights": weights, **({"rank": 2} if weights == "lora" else {})}
    student |= {
        "turbo_pp": {},
        "dp_dmd": {},
        "d_opsd": {"steps": 3, "per_step": False},
        "decoupled_dmd": {"steps": 3, "per_step": False},
        "flow_matching": {"steps": 1, "per_step": False},
    }[method]
    settings: dict[str, Any] = {"kind": method}
    if method in ("turbo_pp", "dp_dmd", "decoupled_dmd"):
        settings["guidance_per_generator"] = 2
    if method == "dp_dmd":
        settings["teacher_steps"] = 4
    if method == "flow_matching":
        settings["sample_steps"] = 2
    made: dict[str, Any] = {
        "model": str(place.model),
        "method": settings,
        "data": data,
        "out": str(out),
        "iterations": 4,
        "batch": 2,
        "roles": {"student": student},
        "optimizers": {"generator": {"lr": 1e-3}},
        "ema": 0.9,
        "compute": {"dtype": "float32", "device": "cpu", "threads": 1},
        "checkpoints": {"every": 1, "keep_last": 2},
        "watch": {"every": 1, "samples_every": None, "tensorboard": False},
        "parallel": {"timeout": 60.0},
    }
    return merged(made, changes)


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(under)
    for key, value in over.items():
        inside = isinstance(value, dict) and isinstance(found.get(key), dict) and "kind" not in value
        found[key] = merged(found[key], value) if inside else value
    return found
