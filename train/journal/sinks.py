"""Where a journal's numbers and pictures go besides its own files: TensorBoard, and wandb where it is configured."""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL.Image import Image

from .line_file import replace_file

if TYPE_CHECKING:
    from ..recipe import WandbSettings

Settings = Mapping[str, Any]


class Sink(Protocol):
    def numbers(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def picture(self, iteration: int, name: str, image: Image) -> None: ...

    def rewind(self, iteration: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `folder`. Going back is a new file, which hides what the others hold behind its iteration."""

    def __init__(self, folder: Path, resumed_at: int | None, settings: Settings | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._new = SummaryWriter
        self._folder = folder
        self._writer = self._open(resumed_at)
        if settings is not None:
            text = json.dumps(settings, indent=2, ensure_ascii=False, default=str).replace("\n", "\n    ")
            self._writer.add_text("settings", f"    {text}", max(resumed_at or 0, 0))  # four spaces: code, in Markdown

    def _open(self, resumed_at: int | None) -> Any:
        # purge_step hides its own step too, and the iteration that is gone back to stays.
        purge = None if resumed_at is None else resumed_at + 1
        return self._new(str(self._folder), purge_step=purge, flush_secs=30)

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, iteration: int, name: str, image: Image) -> None:
        self._writer.add_image(name, np.asarray(image), iteration, dataformats="HWC")

    def rewind(self, iteration: int) -> None:
        self._writer.close()
        self._writer = self._open(iteration)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of wandb, under the id that stands in `folder`/wandb.json when the run is resumed.

    wandb ignores what is logged at a step lower than its last. So the iteration is a metric of its own, against which
    the others are drawn. wandb cannot forget either: after going back, its charts show what was dropped beside what
    came in its place; the journal's files and TensorBoard show the latter alone.
    """

    def __init__(
        self, config: WandbSettings, folder: Path, resumed_at: int | None, settings: Settings | None, module: Any = None
    ) -> None:
        self._module = module or import_wandb()
        self._run = self._module.init(
            project=config.project,
            entity=config.entity,
            name=config.name,
            mode=config.mode,
            id=_run_id(folder / "wandb.json", config, resumed_at),
            resume="allow",
            dir=str(folder),
        )
        if settings is not None:
            self._run.config.update(dict(settings), allow_val_change=True)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "iteration": iteration})

    def picture(self, iteration: int, name: str, image: Image) -> None:
        self._run.log({name: self._module.Image(image), "iteration": iteration})

    def rewind(self, iteration: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"wandb is configured and not importable ({error}); run `pip install wandb`, or take it out of the recipe"
        ) from error


def _run_id(path: Path, config: WandbSettings, resumed_at: int | None) -> str:
    """The id in `path`, or a new one where the run is new or had no wandb so far."""
    place = {"project": config.project, "entity": config.entity}
    if resumed_at is not None and path.exists():
        kept = json.loads(path.read_text("utf-8"))
        was = {key: kept.get(key) for key in place}
        if was != place:
            raise ValueError(
                f"wandb: the run to be resumed is in {was}, the recipe says {place}; name the former, or remove {path} "
                "to log into a new run"
            )
        return str(kept["id"])
    found = secrets.token_hex(4)
    replace_file(path, [json.dumps({"id": found, **place}).encode() + b"\n"])
    return found
