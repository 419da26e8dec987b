"""The student that is to leave, with what is known of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
    folder: Path
    facts: dict[str, Any]
    pipeline: Path
    model: Student  # float32, of stock diffusers' blocks
    base: str | Path | None  # of adapters, where it was said to lie

    @classmethod
    def read(cls, student: str | Path, base: str | Path | None = None) -> Source:
        folder = student_folder(student)
        if folder is None:
            raise ValueError(f"export: {student} has no student.json; give a run's folder, or the student/ in it")
        facts = student_facts(folder)
        pipeline = Path(pipeline_path(facts["pipeline"]))
        if not (pipeline / "model_index.json").is_file():
            raise ValueError(f"export: the student was made for {pipeline}, and no pipeline is there: put it back")
        model = load_student(folder, base=base, dtype=torch.float32, fused=False)
        return cls(folder, facts, pipeline, model, base)

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

    def base_transformer(self) -> tuple[Path, str]:
        """The folder and subfolder of the network that adapters stand on, or that weights began as."""
        if self.base is not None:
            return Path(self.base), self.facts["base"][1] if self.adapters else "transformer"
        if self.adapters:
            place, subfolder = self.facts["base"]
            return Path(pipeline_path(place)), subfolder
        return self.pipeline, "transformer"

    def report(self, **more: Any) -> dict[str, Any]:
        """What export.json says."""
        return {
            "method": self.facts.get("method"),
            "iteration": self.facts.get("iteration"),
            "teacher": self.facts["pipeline"],
            "sigmas": list(self.model.sigmas),
            **more,
            "versions": {name: version(name) for name in ("twostep", "torch", "diffusers", "transformers")},
        }


def _own(name: str) -> bool:
    return ".lora_" not in name


def write_report(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
