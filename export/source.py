"""The student that is to leave, with what is known of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..zoo import Backbone, Student, load_student
from ..zoo.place import repository
from ..zoo.saved_student import pipeline_path, student_facts, student_folder
from .new_folder import sizes_in


@dataclass(frozen=True)
class Exported:
    folder: Path
    bytes: int
    error: float  # of what a fresh process without this library makes of it, relative; 0: bit for bit
    rounding: float  # what was changed in it by writing it in its dtype or rank, relative
    seconds: float  # of all, the check included


@dataclass(frozen=True)
class Source:
    folder: Path
    facts: dict[str, Any]
    model: Student  # float32, of stock diffusers' blocks: what every export is held against
    base: str | None  # where adapters' base was said to lie
    moved: str | None  # where the pipeline was said to lie
    begun: float  # on time.monotonic's clock
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    @classmethod
    def read(
        cls,
        student: str | Path,
        *,
        base: str | Path | None = None,
        pipeline: str | Path | None = None,
        extracting: bool = False,
    ) -> Source:
        """
        Args:
            base: of adapters, where it lies now.
            pipeline: where the pipeline that the student was made for lies now.
            extracting: whole weights are to be taken for their base and a change of it, so they have a base too.
        """
        begun, folder = time.monotonic(), found(student)
        facts = student_facts(folder)
        facts["pipeline"] = facts.get("teacher", facts["pipeline"])  # an export's own may have code of its own
        base, pipeline = _resolved(base), _resolved(pipeline)
        if base is not None and "base" not in facts and not extracting:
            raise ValueError(f"export: --base is {base}, and the student has whole weights, which stand on none")
        _check_precision(folder, facts["steps"])
        stood_on = facts.get("base", [None])[0]
        if base is None and pipeline is not None and stood_on == facts["pipeline"]:
            # The adapters stand on the pipeline's own transformer, which has moved with it.
            base = pipeline if Path(stood_on).is_absolute() and not Path(stood_on).is_dir() else None
        model = load_student(folder, base=base if "base" in facts else None, dtype=torch.float32, fused=False)
        _check_alike(model, facts["steps"])
        source = cls(folder, facts, model, base, pipeline, begun)
        source.seconds["reading"] = round(time.monotonic() - begun, 1)
        return source

    def check_steps(self) -> None:
        """Of a form that holds steps: a base that flow matching has trained has none of its own."""
        if "sampler" in self.facts:
            raise ValueError(
                f"export: {self.folder} is no student but a base that flow matching has trained, which takes as many "
                f"steps as one likes, and this form holds a student's steps; its weights go out as a single file, or "
                f"as a LoRA"
            )

    def in_dtype(self, dtype: torch.dtype) -> Student:
        """The student as it computes in this dtype: what an export in it may be off."""
        base = self.base if self.adapters else None
        return load_student(self.folder, base=base, dtype=dtype, fused=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 1)

    @cached_property
    def pipeline(self) -> Path:
        """The folder of the pipeline that the student was made for; of one on the hub, its place in the cache."""
        place = Path(pipeline_path(str(self.moved or self.facts["pipeline"])))
        if (place / "model_index.json").is_file():
            return place
        name, revision = repository(str(place))
        if place.is_absolute() or self.moved is not None or name.count("/") != 1:
            raise ValueError(
                f"export: the student was made for {place}, and no pipeline is there; say where it is: --pipeline"
            )
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(name, revision=revision, use_safetensors=True))

    @property
    def place(self) -> str:
        """The pipeline, as another recipe or command may name it."""
        return self.facts["pipeline"] if self.moved is None else str(self.pipeline)

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

    def began_as(self) -> list[str]:
        """As a recipe names it."""
        return self.facts.get("base") or self.facts.get("began_as") or [self.place, "transformer"]

    def base_transformer(self) -> tuple[str, str]:
        """The place and subfolder of the network that adapters stand on, or that weights began as."""
        place, subfolder = self.began_as()
        if self.base is not None:
            return str(self.base), subfolder
        return pipeline_path(self.place if place == self.facts["pipeline"] else place), subfolder

    def guard(self, target: Path) -> None:
        """What is written must not take the place of what the student stands on, whoever asks to overwrite."""
        for name, place in (("pipeline", self.place), ("base", self.base_transformer()[0])):
            folder = Path(pipeline_path(place))
            if folder.is_dir() and _in_one_another(target, folder.resolve()):
                raise ValueError(
                    f"export: {target} and {folder}, the student's {name}, are in one another; give another folder"
                )

    def leave(
        self, new: Path, target: Path, *, error: float, rounding: float, errors: dict[str, Any], **more: Any
    ) -> Exported:
        """Writes export.json, the last file of the new folder."""
        sizes = sizes_in(new)
        whole, seconds = sum(sizes.values()), round(time.monotonic() - self.begun, 1)
        teacher, revision = repository(pipeline_path(self.place))
        facts = {
            "method": self.facts.get("method"),
            "iteration": self.facts.get("iteration"),
            "teacher": teacher,  # where it lies: what stock diffusers is given
            "revision": revision,  # of the hub's
            "sigmas": list(self.model.sigmas),
            **more,
            "error": errors,
            "bytes": whole,
            "bytes of parts": sizes,
            "seconds": {**self.seconds, "all": seconds},
            "versions": {name: version(name) for name in ("twostep", "torch", "diffusers", "transformers")},
            "recipe": self.facts.get("recipe"),
        }
        (new / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return Exported(target, whole, error, rounding, seconds)


def _check_precision(folder: Path, steps: list[str]) -> None:
    """Tensors of two dtypes are an accident: of files from two runs, or of a network that was quantized."""
    seen: dict[str, str] = {}
    for step in dict.fromkeys(steps):
        for file in sorted([*folder.glob(f"{step}.safetensors"), *folder.glob(f"{step}/*.safetensors")]):
            try:
                opened: Any = safe_open(file, "pt")
            except SafetensorError as error:
                raise ValueError(f"export: {file} is not a whole safetensors file: {error}") from None
            names = opened.keys()
            for name in names:
                seen.setdefault(opened.get_slice(name).get_dtype(), f"{name} of {file.relative_to(folder)}")
    if len(seen) > 1:
        there = ", ".join(f"{dtype} ({where})" for dtype, where in seen.items())
        raise ValueError(f"export: the student's tensors are of mixed precision: {there}; expected one dtype for all")


def _check_alike(model: Student, steps: list[str]) -> None:
    first, *others = model.distinct_networks()
    names = list(dict.fromkeys(steps))
    for name, other in zip(names[1:], others, strict=True):
        mine, theirs = (dict(network.model.config) for network in (first, other))
        for key in sorted(mine.keys() | theirs.keys()):
            if not key.startswith("_") and mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"export: the student's steps disagree: {key} is {mine.get(key)!r} in {names[0]} and "
                    f"{theirs.get(key)!r} in {name}; they are not of one run"
                )


def found(student: str | Path) -> Path:
    folder = student_folder(student)
    if folder is None:
        raise ValueError(f"export: {student} has no student.json; give a run's folder, or the student/ in it")
    return folder


def _resolved(place: str | Path | None) -> str | None:
    """Found again from any working directory; what is no folder here may be one of the hub."""
    if place is None:
        return None
    folder = Path(place).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(place)


def _in_one_another(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _own(name: str) -> bool:
    return ".lora_" not in name
