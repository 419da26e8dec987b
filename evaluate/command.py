"""`twostep evaluate [NAME=]WHERE[@key=value,...] ... --out FOLDER`: models, runs and folders of images, compared.

    twostep evaluate teacher=miniature@steps=8 student=runs/first --out report

What was drawn is kept in the folder, and drawn anew only where the model or what it is asked for has changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..zoo import TextToImage
    from .report import Report
    from .speed import Speed
    from .study import Judge
    from .subjects import Drawn, Order, Subject

FAULT = 2
STREAM = 0x7E57  # of the miniature's captions and real images; what settings are chosen by is another
SHOWN = 8  # images of a row
CURVES = {"losses": "_loss", "gradients": "_gradient_norm"}  # of a run's numbers, by how their names end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("subjects", nargs="+", metavar="[NAME=]WHERE[@key=value,...]", help="a run, a pipeline, `miniature`, or images")
    add("--out", type=Path, required=True, help="folder of the report")
    add("--images", type=int, default=1000, help="captions of the quality set (default: %(default)s)")
    add("--captions", type=int, default=32, help="captions of the variety set (default: %(default)s)")
    add("--seeds", type=int, default=8, help="images of each of those (default: %(default)s)")
    add("--resamples", type=int, default=Settings.resamples, help="of slow metrics' intervals (default: %(default)s)")
    add("--batch", type=int, default=32, help="images drawn at a time (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels; by default what the models are made for")
    add("--prompts", type=Path, help="captions, one a line (.txt), or .jsonl or .parquet; by default the miniature's")
    add("--reference", type=Path, help="folder of real images; by default the miniature's")
    add(
        "--features",
        type=Path,
        help="DINOv2, DINOv3, CLIP, or inception-2015-12-05.pt; by default the detector",
    )
    add("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    add("--vqa", type=Path, help="folder of a model that reads images and answers, for the VQA score")
    add(
        "--stream",
        type=int,
        default=STREAM,
        help="the miniature's captions and real images: choose settings by another",
    )
    add(
        "--dtype", choices=("bfloat16", "float32"), help="of the networks (default: bfloat16 on a GPU, float32 without)"
    )
    add("--device", help="default: a GPU if there is one")
    add(
        "--apart",
        action="store_true",
        help="load one model after the other: less memory, but a drift of the machine goes into the ratios of speeds",
    )
    add("--title", default="twostep evaluate")


def run(args: argparse.Namespace) -> int:
    from .subjects import Subject

    try:
        subjects = [Subject.parse(text) for text in args.subjects]
        names = [subject.name for subject in subjects]
        if len(set(names)) < len(names):
            raise ValueError(f"two subjects are called {max(names, key=names.count)!r}; name them: NAME=WHERE")
        report = study(subjects, Settings.of(args))
    except (ValueError, OSError) as error:
        print(f"twostep evaluate: {error}", file=sys.stderr)
        return FAULT
    print(report.text(), end="")
    for path in report.write(args.out):
        print(path)
    return 0


@dataclass(frozen=True)
class Settings:
    out: Path
    images: int = 1000
    captions: int = 32
    seeds: int = 8
    resamples: int = 100
    batch: int = 32
    size: tuple[int, int] | None = None
    prompts: Path | None = None
    reference: Path | None = None
    features: Path | None = None
    clip: Path | None = None
    vqa: Path | None = None
    stream: int = STREAM
    dtype: str | None = None
    device: str | None = None
    apart: bool = False
    title: str = "twostep evaluate"

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        given = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        given["size"] = None if args.size is None else tuple(args.size)
        return cls(**given)

    def __post_init__(self) -> None:
        for name, least in (("images", 8), ("captions", 2), ("seeds", 2), ("resamples", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least {least}")
        given = {"--prompts": self.prompts, "--reference": self.reference, "--features": self.features}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(
                f"{' and '.join(missing)} not given: prompts, reference and features go together, or are all the "
                f"miniature's"
            )

    @property
    def is_miniature(self) -> bool:
        return self.prompts is None


def study(subjects: list[Subject], settings: Settings, **facts: Any) -> Report:
    """Draws, measures and puts together; nothing is written but what was drawn.

    Speeds are never kept: they are measured anew, of all models in turns where those may be loaded together.
    """
    import torch

    from ..progress import counter
    from .report import Picture, Report
    from .speed import speeds
    from .study import measure, variety_order
    from .subjects import Order

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    captions = _captions(settings)
    order = Order(tuple(captions), tuple(range(len(captions))), settings.size, settings.batch)
    varied = variety_order(order, settings.captions, settings.seeds)
    kept = settings.out / "drawn"
    drawn: dict[str, tuple[Drawn, Drawn | None]] = {}
    timed: dict[str, Speed] = {}
    with counter("images", len(subjects) * (len(order) + len(varied))) as advance:
        for together in [[subject] for subject in subjects] if settings.apart else [subjects]:
            models = {s.name: s.load(dtype=dtype, device=device) for s in together if not s.images}
            drawn |= {s.name: _drawn(s, models, order, varied, dtype, kept, advance) for s in together}
            timed |= speeds(models, order)
            del models
    judge, real = _judge(settings, device)
    rows = [] if real is None else [measure("real images", real, None, judge, resamples=settings.resamples)]
    for subject in subjects:
        quality, variety = drawn[subject.name]
        facts_of = {"where": subject.where, **subject.settings}
        measured = measure(
            subject.name,
            quality,
            variety,
            judge,
            speed=timed.get(subject.name),
            resamples=settings.resamples,
            **facts_of,
        )
        rows.append(measured)
    same = {name: one.pixels(slice(0, SHOWN)) for name, (one, _) in drawn.items() if one.captions == captions}
    many = {name: two.pixels(slice(0, SHOWN)) for name, (_, two) in drawn.items() if two is not None}
    pictures = []
    if same:
        says = "A column is one caption from one noise."
        pictures.append(Picture("The same captions and seeds", says, _grid(same, captions[:SHOWN])))
    if many:
        says = "One caption from different noises: how much is left open, and used."
        pictures.append(Picture("One caption, many seeds", says, _grid(many, list(varied.captions[:SHOWN]))))
    several = f"{len(varied) // settings.seeds} captions with {settings.seeds} seeds each"
    summary = f"{len(order)} captions, and {several}, on {device}."
    return Report(
        settings.title,
        summary,
        rows,
        pictures,
        {s.name: found for s in subjects if s.run is not None and (found := _curves(s.run))},
        {"settings": vars(settings), "versions": _versions(), "device": device, "dtype": str(dtype), **facts},
    )


def _grid(rows: Mapping[str, Any], captions: list[str]) -> Any:
    from .charts import side_by_side

    return side_by_side(dict(rows), captions)


def _captions(settings: Settings) -> list[str]:
    if settings.prompts is not None:
        from ..train.data import read_prompts

        prompts = list(read_prompts(settings.prompts))
        if len(prompts) < settings.images:
            raise ValueError(f"{settings.prompts} has {len(prompts)} prompts, and --images is {settings.images}")
        return prompts[: settings.images]
    from ..zoo.miniature import samples

    return samples(settings.stream, 0, settings.images).captions


def _judge(settings: Settings, device: str) -> tuple[Judge, Drawn | None]:
    """The judge, and real images to be judged as well, where there are enough of them."""
    import torch

    from .alignment import load_clip_score, load_vqa_score
    from .features import MiniatureFeatures, load_features
    from .study import Judge, features_of
    from .subjects import IMAGES, Drawn, read_images, to_bytes

    count = settings.images
    scores: dict[str, Callable[..., Any]] = {}
    if settings.clip is not None:
        clip = load_clip_score(settings.clip, device=device)
        scores["clip_score"] = clip.scores
    if settings.vqa is not None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        scores["vqa_score"] = load_vqa_score(settings.vqa, device=device, dtype=dtype).scores
    if not settings.is_miniature:
        assert settings.reference is not None and settings.features is not None
        network = load_features(settings.features, device=device)
        paths = sorted(path for path in settings.reference.rglob("*") if path.suffix.lower() in IMAGES)
        if len(paths) < count:
            raise ValueError(f"{settings.reference} has {len(paths)} images, and --images is {count}: give as many")
        real = features_of(read_images(paths[:count]), network)
        rest = read_images(paths[count : 2 * count]) if len(paths) >= 2 * count else None
        return Judge(network, network, _named(scores), real), rest
    from ..zoo.miniature import claims_of, detector, samples

    seeing = detector.load()

    def seen(images: Any, captions: Any) -> dict[str, Any]:
        found = detector.check(seeing, images, claims_of(captions))
        return {"aligned": found.aligned.double(), "psnr": found.psnr, **_named(scores)(images, captions)}

    each = MiniatureFeatures(seeing, "each")
    reals = [samples(settings.stream, start, count) for start in (count, 2 * count)]
    first, second = (Drawn(to_bytes(one.images), one.captions) for one in reals)
    return Judge(each, each, seen, features_of(first, each), each.cells_of), second


def _named(scores: Mapping[str, Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    return lambda images, captions: {name: score(images, captions) for name, score in scores.items()}


def _drawn(
    subject: Subject,
    models: Mapping[str, TextToImage],
    order: Order,
    varied: Order,
    dtype: Any,
    kept: Path,
    advance: Callable[[int], object],
) -> tuple[Drawn, Drawn | None]:
    from .subjects import draw_once, read_images

    if paths := subject.images:
        advance(len(order) + len(varied))
        if len(paths) < len(order):
            raise ValueError(f"{subject.where} has {len(paths)} images, and --images is {len(order)}")
        return read_images(paths[: len(order)]), None
    model = models[subject.name]
    quality, variety = draw_once(subject, lambda: model, (order, varied), kept, dtype=dtype, advance=advance)
    return quality, variety


def _curves(run: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    from ..train.journal import read_metrics

    lines = read_metrics(run)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, ending in CURVES.items():
        for name in sorted({name for line in lines for name in line if name.endswith(ending)}):
            points = [(float(line["iteration"]), float(line[name])) for line in lines if name in line]
            found.setdefault(label, {})[name.removesuffix(ending)] = points
    watched = [line for line in lines if "evaluate/frechet" in line]
    if watched:
        found["Frechet"] = {"on the way": [(line["iteration"], line["evaluate/frechet"]) for line in watched]}
    return found


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("twostep", "torch", "diffusers", "transformers")}
