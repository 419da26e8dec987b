"""The chain that makes the miniature's weights, each stage from those before it, and each going on where it stopped.

    autoencoder    drawn images                                    autoencoder/
    encoders       captions, and captions with images              encoders/    -> pipeline/, transformer untrained
    base           flow matching: many steps, with guidance        base/        recipe miniature-flow-matching
    teacher        decoupled DMD: 8 steps, without guidance        teacher/     recipe miniature-decoupled-dmd
    weights        all of it in bfloat16, as it ships              weights/     transformer/ is the teacher, and base/

The two runs of `twostep train` are processes of their own, one or several. The miniature's larger sister has the
package's own autoencoder and encoders, and a transformer of fifteen times the size.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...durable import publish, temporary
from ...zoo.miniature import BASE_AT_ITS_BEST, Miniature, miniature
from ...zoo.miniature.architecture import LARGE, Sizes, build_transformer
from ...zoo.miniature.model import weights_folder
from ..result import finished
from .autoencoder import reconstruction_psnr, train_autoencoder
from .encoders import reading, train_encoders
from .fit import Fit

AUTOENCODER = Fit(steps=2000, batch=16, lr=2e-3)
ENCODERS = Fit(steps=1500, batch=64, lr=1.5e-3)
RECIPES = {"base": "miniature-flow-matching", "teacher": "miniature-decoupled-dmd"}
FRESH = (0xF4E5, 1024)  # a stream that nothing is trained on, and how many of its samples say how good a part is
MEASURED: dict[str, Mapping[str, Any]] = {
    "base at 28, guidance 2.5 in .5-.9, eta 1 in .3-.9": BASE_AT_ITS_BEST,
    "base at 28, guidance 4 in .5-.95": {
        "steps": 28,
        "guidance": 4.0,
        "guidance_interval": (0.5, 0.95),
        "subfolder": "base",
    },
    "teacher at 8": {"steps": 8},
    "teacher at 2": {"steps": 2},
}
VARIETY = (32, 8)  # captions, and images of each, that diversity is measured on
STAGES = ("autoencoder", "encoders", "base", "teacher", "weights")
MADE_ALREADY = STAGES[:2]  # of the larger sister: the package's


class StageFailed(RuntimeError):
    """A run of `twostep train` ended with this status."""

    def __init__(self, stage: str, status: int) -> None:
        super().__init__(f"the {stage} did not become ready (exit status {status}); the same command goes on")
        self.status = status


@dataclass(frozen=True)
class Chain:
    """
    Args:
        steps: of stages that are to have others than they are made with.
        ranks: processes of the base's and the teacher's runs.
        settings: of those runs, as `twostep train` takes them.
        images: that the quality of what ships is measured on.
        large: the larger sister, on the package's autoencoder and encoders.
    """

    out: Path
    seed: int = 0
    steps: Mapping[str, int] | None = None
    ranks: int = 1
    settings: tuple[str, ...] = ()
    images: int = 2000
    large: bool = False

    def run(self, until: str = STAGES[-1]) -> None:
        stages = tuple(stage for stage in STAGES if stage not in MADE_ALREADY) if self.large else STAGES
        if until not in stages:
            raise ValueError(f"the larger sister has no stage {until!r}, expected one of {', '.join(stages)}")
        self._check_size()
        made = [stage for stage in MADE_ALREADY if self.large and stage in (self.steps or {})]
        if made:
            raise ValueError(f"--steps names {', '.join(made)}, which the larger sister takes from the package")
        if self.large:
            self._on_the_packages_parts()
        for stage in stages[: stages.index(until) + 1]:
            print(f"== {stage}", file=sys.stderr, flush=True)
            getattr(self, f"_{stage}")()

    def _check_size(self) -> None:
        config = self._pipeline / "transformer" / "config.json"
        if config.exists():
            found = json.loads(config.read_text(encoding="utf-8"))["dim"]
            expected = (LARGE if self.large else Sizes()).width
            if found != expected:
                raise ValueError(f"{self.out} holds a miniature of width {found}, and this one has {expected}")

    # The parts that are not distilled

    def _on_the_packages_parts(self) -> None:
        """They see what a transformer is to draw, however large it is."""
        if self._pipeline.exists():
            return
        mini = miniature()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            mini.transformer = build_transformer(LARGE).eval()
        facts = json.loads((weights_folder() / "measured.json").read_text(encoding="utf-8"))
        self._write_pipeline(mini, {name: fact for name, fact in facts.items() if name != "images"})

    def _autoencoder(self) -> None:
        """Alone, so that the encoders may be made at another time or place."""
        if not self._pipeline.exists():
            self._trained_autoencoder(miniature(untrained_seed=self.seed))

    def _encoders(self) -> None:
        if self._pipeline.exists():
            return
        mini = miniature(untrained_seed=self.seed)
        self._trained_autoencoder(mini)
        readers = train_encoders(mini, self._fit("encoders", ENCODERS), self.out / "encoders")
        facts = {
            "autoencoder, psnr on fresh images": reconstruction_psnr(mini.vae, *FRESH),
            "encoders, share read rightly": reading(mini, readers, *FRESH),
        }
        self._write_pipeline(mini, facts)

    def _write_pipeline(self, mini: Miniature, facts: Mapping[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with temporary(self.out, self._pipeline.name) as new:
            mini.save(new)
            (new / "measured.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            publish(new, self._pipeline)

    def _trained_autoencoder(self, mini: Miniature) -> None:
        train_autoencoder(mini.vae, self._fit("autoencoder", AUTOENCODER), self.out / "autoencoder")

    def _fit(self, stage: str, plan: Fit) -> Fit:
        steps = (self.steps or {}).get(stage, plan.steps)
        return Fit(steps, plan.batch, plan.lr, seed=self.seed, warmup=min(plan.warmup, steps // 4))

    # The runs of twostep train

    def _base(self) -> None:
        self._train("base")

    def _teacher(self) -> None:
        base = self.out / "base" / "student"
        roles = [f"roles.{role}.{key}" for role in ("student", "real_score") for key in ("source", "subfolder")]
        self._train("teacher", *(f"{key}={base if key.endswith('source') else 'transformer'}" for key in roles))

    def _train(self, stage: str, *more: str) -> None:
        if (self.out / stage / "student").is_dir():
            return
        own = [f"model={self._pipeline}", f"out={self.out / stage}", f"seed={self.seed}", *more]
        if self.steps and stage in self.steps:
            own.append(f"iterations={self.steps[stage]}")
        threads = max(1, (os.cpu_count() or 1) // self.ranks)
        alone = [sys.executable]
        together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        command = [*alone, *(together if self.ranks > 1 else []), "-m", "twostep", "train", RECIPES[stage]]
        status = _waited([*command, *own, *self.settings], {**os.environ, "OMP_NUM_THREADS": str(threads)})
        if status or not finished(self.out / stage):
            raise StageFailed(stage, status)

    # What ships

    def _weights(self) -> None:
        with temporary(self.out, "weights") as new:
            self._with_transformer("teacher").save(new, torch.bfloat16)
            self._with_transformer("base").transformer.to(torch.bfloat16).save_pretrained(new / "base")
            parts = json.loads((self._pipeline / "measured.json").read_text(encoding="utf-8"))
            _forget_places(new)
            facts = {**parts, "images": self._quality(new)}
            (new / "measured.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            for stage in STAGES[:-1]:
                (new / "training").mkdir(exist_ok=True)
                if self.large and stage in MADE_ALREADY:
                    continue
                shutil.copy(self.out / stage / "metrics.jsonl", new / "training" / f"{stage}.jsonl")
            publish(new, self.out / "weights")

    def _quality(self, weights: Path) -> dict[str, Any]:
        """Of what ships, as it ships."""
        from ...evaluate.command import Settings, study
        from ...evaluate.subjects import Subject

        subjects = [Subject(name, str(weights), dict(settings)) for name, settings in MEASURED.items()]
        captions, seeds = VARIETY
        settings = Settings(
            self.out / "report", images=self.images, captions=captions, seeds=seeds, title="The miniature"
        )
        report = study(subjects, settings)
        report.write(self.out / "report")
        rows = {
            row.name: {metric: [round(x, 4) for x in (i.value, i.low, i.high)] for metric, i in row.metrics.items()}
            for row in report.measured
        }
        return {"count": self.images, "value, low, high": rows}

    def _with_transformer(self, stage: str) -> Miniature:
        from diffusers import ZImageTransformer2DModel

        mini = miniature(self._pipeline)
        mini.transformer = ZImageTransformer2DModel.from_pretrained(self.out / stage / "student" / "transformer")
        return mini

    @property
    def _pipeline(self) -> Path:
        return self.out / "pipeline"


def _waited(command: list[str], env: dict[str, str]) -> int:
    """The status at the end, whatever comes in between: a run that is asked to stop saves first, and whoever starts the
    chain again must not find it still running. A terminal's Ctrl-C reaches it by itself."""
    process = subprocess.Popen(command, env=env)
    handlers: dict[int, Any] = {signal.SIGTERM: lambda *_: process.terminate(), signal.SIGINT: lambda *_: None}
    asked = handlers if threading.current_thread() is threading.main_thread() else {}
    before = {number: signal.signal(number, handler) for number, handler in asked.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_places(folder: Path) -> None:
    """diffusers writes down where a model was loaded from, which is nobody's business."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
