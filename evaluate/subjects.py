"""What can be compared: models that draw, and folders of images that somebody has drawn.

    NAME=WHERE@key=value,...     base=miniature@steps=28,guidance=4,subfolder=base     student=runs/first

WHERE is the folder of a run (its student), a diffusers pipeline (with steps, and guidance, guidance_interval, eta,
eta_interval, shift or subfolder where they are wanted), a hub id, "miniature", or a folder of images, each with its
caption in a .txt of its name, or in the text of the PNG that `twostep sample` wrote.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..durable import replaced
from ..images import ENDINGS, decoded, open_image, to_bytes
from ..zoo import TextToImage, load_text_to_image
from ..zoo.place import REVISION
from ..zoo.saved_student import pipeline_path, student_facts, student_folder

SHEET = "sheet.png"  # where `twostep sample` lays out the images that lie beside it
REAL = "real images"  # the row of these in a report
PIECE = 256  # images that are kept together: what an interruption loses at most


def _interval(text: str) -> tuple[float, float]:
    least, greatest = text.split("-")
    return float(least), float(greatest)


_READ: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "guidance": float,
    "guidance_interval": _interval,  # 0.5-0.95
    "eta": float,
    "eta_interval": _interval,
    "shift": float,
    "subfolder": str,
}


@dataclass(frozen=True)
class Subject:
    name: str
    where: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Subject:
        name, equals, rest = text.partition("=")
        if not equals or "@" in name or "/" in name:
            name, rest = "", text
        where, given = _settings_apart(rest)
        settings: dict[str, Any] = {}
        for item in filter(None, given.split(",")):
            key, equals, value = item.partition("=")
            if key not in _READ or not equals:
                raise ValueError(f"{text!r}: {item!r} is not one of {', '.join(f'{key}=...' for key in _READ)}")
            try:
                settings[key] = _READ[key](value)
            except ValueError:
                expected = "two numbers, such as 0.5-0.95" if key.endswith("_interval") else "a number"
                raise ValueError(f"{text!r}: {key} is {value!r}, expected {expected}") from None
        if not where:
            raise ValueError(f"{text!r}: expected [NAME=]WHERE[@key=value,...], such as student=runs/first")
        if name == REAL:
            raise ValueError(f"{text!r}: {REAL!r} is the name of the row of real images; give another")
        return cls(name or " ".join([Path(where).name, *filter(None, given.split(","))]), where, settings)

    @property
    def images(self) -> list[Path]:
        """Those of a folder of images; none for a model."""
        folder = Path(self.where).expanduser()
        if not folder.is_dir() or student_folder(folder) is not None or (folder / "model_index.json").is_file():
            return []
        found = images_in(folder)
        if found and self.settings:
            raise ValueError(f"{self.name}: {folder} is a folder of images, which takes no {', '.join(self.settings)}")
        if not found and not any((folder / name).is_file() for name in ("export.json", "metrics.jsonl")):
            raise ValueError(
                f"{self.name}: {folder} is no model (no model_index.json or student.json), and holds no images "
                f"({', '.join(ENDINGS)})"
            )
        return found

    @property
    def run(self) -> Path | None:
        """The run's folder, where there is a journal of its training."""
        folder = Path(self.where).expanduser()
        return next((one for one in (folder, folder.parent) if (one / "metrics.jsonl").is_file()), None)

    def load(self, *, dtype: torch.dtype, device: torch.device | str) -> TextToImage:
        return load_text_to_image(self.where, dtype=dtype, device=device, **self.settings)


@dataclass(frozen=True)
class Order:
    """What models are asked to draw."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int] | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.seeds):
            raise ValueError(
                f"an order has {len(self.captions)} captions and {len(self.seeds)} seeds, expected as many"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def batches(self) -> list[slice]:
        return self._parts(self.batch)

    def pieces(self) -> list[Order]:
        """About PIECE images each, of whole batches, so that the same images come out."""
        parts = self._parts(max(1, PIECE // self.batch) * self.batch)
        return [replace(self, captions=self.captions[rows], seeds=self.seeds[rows]) for rows in parts]

    def _parts(self, count: int) -> list[slice]:
        return [slice(at, min(at + count, len(self))) for at in range(0, len(self), count)]


@dataclass(frozen=True)
class Drawn:
    images: Tensor  # [N, 3, H, W], uint8
    captions: list[str]  # "" where there is none
    steps: int | None = None
    evaluations: int | None = None  # of the network, for an image

    def pixels(self, rows: slice = slice(None)) -> Tensor:
        """Float32 in [-1, 1]."""
        return self.images[rows].float() / 127.5 - 1

    @classmethod
    def joined(cls, pieces: Sequence[Drawn]) -> Drawn:
        """Pieces that one model drew."""
        captions = [caption for piece in pieces for caption in piece.captions]
        return cls(torch.cat([piece.images for piece in pieces]), captions, pieces[0].steps, pieces[0].evaluations)


def draw(model: TextToImage, order: Order, advance: Callable[[int], object] = lambda count: None) -> Drawn:
    """Draws the order.

    Args:
        advance: is called with the number of images that have been drawn since.
    """
    made: list[Tensor] = []
    for rows in order.batches():
        made.append(to_bytes(model.draw(order.captions[rows], order.seeds[rows], order.size)).cpu())
        advance(rows.stop - rows.start)
    return Drawn(torch.cat(made), list(order.captions), model.steps, model.evaluations(order.size))


def draw_once(
    subject: Subject,
    load: Callable[[], TextToImage],
    orders: Sequence[Order],
    kept: Path,
    *,
    dtype: torch.dtype,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Drawn]:
    """Each order drawn, or read from the folder `kept` where it was drawn before; the model is loaded at most once.

    Pieces are kept one by one, so that a set that was interrupted goes on.
    """
    model = functools.cache(load)

    def piece(order: Order) -> Drawn:
        path = kept / f"{identity(subject, order, dtype)}.safetensors"
        drawn = _read(path)
        if drawn is None:
            drawn = draw(model(), order, advance)
            _write(path, drawn, subject.name)
        else:
            advance(len(order))
        return drawn

    return [Drawn.joined([piece(part) for part in order.pieces()]) for order in orders]


def _read(path: Path) -> Drawn | None:
    """None where it is not there, or damaged: it is drawn anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return Drawn(file.get_tensor("images"), **json.loads(file.metadata()["facts"]))
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, drawn: Drawn, of: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {name: value for name, value in vars(drawn).items() if name != "images"}
    with replaced(path) as new:
        save_file({"images": drawn.images}, new, metadata={"of": of, "facts": json.dumps(facts)})


def images_in(folder: Path) -> list[Path]:
    """In order, at any depth; without the sheets that show the images beside them once more."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    beside = {path.parent for path in found if path.name != SHEET}
    return [path for path in found if path.name != SHEET or path.parent not in beside]


def check_captions(drawn: Drawn, folder: str | Path) -> None:
    """ValueError where some images of the folder have a caption and some have none: no score would be of all."""
    lacking = drawn.captions.count("")
    if 0 < lacking < len(drawn.captions):
        raise ValueError(
            f"{folder}: {lacking} of {len(drawn.captions)} images have no caption; give each one, in a .txt of the "
            f"image's name or in the PNG's text key `prompt` (as twostep sample writes it), or leave it out for all"
        )


def read_images(paths: Sequence[Path]) -> Drawn:
    """Images of a folder, all of one size, with their captions: from the .txt beside them, or else from the text that
    `twostep sample` writes into a PNG; "" where there is neither."""
    import numpy as np

    pixels: list[Tensor] = []
    captions: list[str] = []
    for path in paths:
        found = torch.from_numpy(np.array(decoded(path))).permute(2, 0, 1)
        if pixels and found.shape != pixels[0].shape:
            raise ValueError(
                f"{path} is {found.shape[1]} x {found.shape[2]}, and {paths[0]} is {pixels[0].shape[1]} x "
                f"{pixels[0].shape[2]}: images that are compared have one size"
            )
        pixels.append(found)
        captions.append(_caption(path))
    return Drawn(torch.stack(pixels), captions)


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        with open_image(path) as image:
            image.load()  # text may stand behind the pixels
            return str(image.info.get("prompt", "")).strip()
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{text} is not UTF-8") from None


def identity(subject: Subject, order: Order, dtype: torch.dtype) -> str:
    """What decides which images come out, files by their sizes and times."""
    decides = [subject.where, subject.settings, asdict(order), str(dtype), files_of(subject.where)]
    return _digest(decides)


def _settings_apart(text: str) -> tuple[str, str]:
    """WHERE, and what is set behind an @; owner/name@v1 is a place, of which nothing is set."""
    if Path(text).expanduser().exists():
        return text, ""
    settings = re.search(f"@(?=({'|'.join(_READ)})=)", text)
    if settings is not None:
        return text[: settings.start()], text[settings.end() :]
    where, _, given = text.partition("@")
    pinned = where.count("/") == 1 and REVISION.fullmatch(given) and not given.startswith(tuple(_READ))
    return (text, "") if pinned and not Path(where).expanduser().exists() else (where, given)


def state_of(model: str) -> str:
    """Another text once a file of the model is another."""
    return _digest(files_of(model))


def files_of(model: str) -> list[tuple[str, int, int]]:
    """Those of a student, of its pipeline and base, or of a pipeline: names, sizes and times."""
    student = student_folder(model)
    places = [Path(pipeline_path(model))]
    if student is not None:
        facts = student_facts(student)
        places = [student, *(Path(pipeline_path(name)) for name in (facts["pipeline"], *facts.get("base", [])[:1]))]
    return [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for place in dict.fromkeys(places)
        if place.is_dir()
        for path in sorted(place.rglob("*"))
        if path.suffix in (".safetensors", ".json")
    ]


def _digest(decides: object) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
