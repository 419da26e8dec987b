"""The student that is to leave, with what is known of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..zoo import Backbone, Student, load_student
from ..zoo.saved_student import pipeline_path, student_facts, student_folder


@dataclass(frozen=True)
class Exported:
    folder: Path
    bytes: int
    error: float  # of what a fresh process without this library makes of it, relative; 0: bit for bit
    rounding: float  # what was changed in it by writing it in its dtype or rank, relative


@dataclass(frozen=True)
class Source:
    facts: dict[str, Any]
    model: Student  # float32, of stock diffusers' blocks
    base: str | Path | None  # where adapters' base was said to lie
    moved: str | Path | None  # where the pipeline was said to lie
    begun: float  # on time.monotonic's clock

    @classmethod
    def read(cls, student: str | Path, *, base: str | Path | None = None, pipeline: str | Path | None = None) -> Source:
        """
        Args:
            base: of adapters, where it lies now.
            pipeline: where the pipeline that the student was made for lies now.
        """
        begun, folder = time.monotonic(), found(student)
        facts = student_facts(folder)
        if base is not None and "base" not in facts:
            raise ValueError(f"export: --base is {base}, and the student has whole weights, which stand on none")
        return cls(facts, load_student(folder, base=base, dtype=torch.float32, fused=False), base, pipeline, begun)

    @cached_property
    def pipeline(self) -> Path:
        """The folder of the pipeline that the student was made for; of one on the hub, its place in the cache."""
        place = Path(pipeline_path(str(self.moved or self.facts["pipeline"])))
        if (place / "model_index.json").is_file():
            return place
        if place.is_absolute() or self.moved is not None or str(place).count("/") != 1:
            raise ValueError(
                f"export: the student was made for {place}, and no pipeline is there; say where it is: --pipeline"
            )
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(str(place), use_safetensors=True))

    @property
    def networks(self) -> list[Backbone]:
        return self.model.distinct_networks()

    def order(self) -> list[int]:
        """Of each step, which of the networks it runs."""
        return [next(n for n, one in enumerate(self.networks) if one is step) for step in self.model.networks]

    @property
    def family(self) -> str:
        return self.networks[0].family

    @property
    def parameters(self) -> int:
        """Of all networks, once adapters are merged."""
        return sum(p.numel() for network in self.networks for n, p in network.model.named_parameters() if _own(n))

    @property
    def per_step(self) -> bool:
        return len(self.networks) > 1

    @property
    def adapters(self) -> bool:
        return "base" in self.facts

    def base_transformer(self) -> tuple[str, str]:
        """The place and subfolder of the network that adapters stand on, or that weights began as."""
        place, subfolder = self.facts.get("base") or self.facts.get("began_as") or [str(self.pipeline), "transformer"]
        return (pipeline_path(place) if self.base is None else str(self.base)), subfolder

    def report(self, **more: Any) -> dict[str, Any]:
        """What export.json says."""
        return {
            "method": self.facts.get("method"),
            "iteration": self.facts.get("iteration"),
            "teacher": self.facts["pipeline"],
            "sigmas": list(self.model.sigmas),
            **more,
            "seconds": round(time.monotonic() - self.begun, 1),  # of all, the check included
            "versions": {name: version(name) for name in ("twostep", "torch", "diffusers", "transformers")},
        }


def found(student: str | Path) -> Path:
    folder = student_folder(student)
    if folder is None:
        raise ValueError(f"export: {student} has no student.json; give a run's folder, or the student/ in it")
    return folder


def _own(name: str) -> bool:
    return ".lora_" not in name


def write_report(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
