"""`twostep evaluate [NAME=]WHERE[@key=value,...] ... --out FOLDER`: models, runs and folders of images, compared.

    twostep evaluate teacher=miniature@steps=8 student=runs/first --out report

What was drawn is kept in the folder, and drawn anew only where the model or what it is asked for has changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import answered

if TYPE_CHECKING:
    from .report import Picture, Report
    from .speed import Speed
    from .study import Judge
    from .subjects import Drawn, Order, Subject

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
    kept = f"the same command goes on from what {args.out / 'drawn'} holds"
    return answered("evaluate", lambda: _run(args), out=args.out, kept=kept)


def _run(args: argparse.Namespace) -> int:
    from ..train.result import gone_on
    from .subjects import Subject

    subjects = [Subject.parse(text) for text in args.subjects]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"two subjects are called {max(names, key=names.count)!r}; name them: NAME=WHERE")
    _check_out(args.out, subjects)
    for note in filter(None, (gone_on(subject.where) for subject in subjects)):
        print(note, file=sys.stderr)
    report = study(subjects, Settings.of(args))
    print(report.text(), end="")
    for path in report.write(args.out):
        print(path)
    return 0


def _check_out(out: Path, subjects: Sequence[Subject]) -> None:
    """A report among images that are compared would be one of them the next time."""
    for subject in subjects:
        where = Path(subject.where).expanduser()
        if subject.images and out.expanduser().resolve().is_relative_to(where.resolve()):
            raise ValueError(f"--out is {out}, in the folder of the images {subject.name}: give another folder")


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
        for name in ("reference", "features", "clip", "vqa"):
            place = getattr(self, name)
            if place is not None and not Path(place).expanduser().exists():
                raise ValueError(f"--{name} is {place}, and there is no such file or folder")
        if self.is_miniature and self.size is not None:
            from ..zoo.miniature.shapes import SIDE

            if self.size != (SIDE, SIDE):
                raise ValueError(
                    f"--size is {self.size[0]} {self.size[1]}, the miniature's judge reads images of {SIDE} {SIDE}; "
                    f"for others give --prompts, --reference and --features"
                )
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

    from ..arguments import usable_device
    from .report import Report
    from .study import measure, variety_order
    from .subjects import REAL, Order

    device = str(usable_device(settings.device, "--device"))
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    captions = _captions(settings)
    order = Order(tuple(captions), tuple(range(len(captions))), settings.size, settings.batch)
    varied = variety_order(order, settings.captions, settings.seeds)
    if len(set(varied.captions)) < 2 and not all(subject.images for subject in subjects):
        raise ValueError(
            f"the first {len(order)} prompts of {settings.prompts} are all {captions[0]!r}: variety is measured on at "
            f"least 2 different prompts; give others, or more --images"
        )
    drawn, timed = _draw(subjects, order, varied, settings, dtype, device)
    judge, real, notes = _judge(settings, device)
    rows = [] if real is None else [measure(REAL, real, None, judge, real=True, resamples=settings.resamples)]
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
    several = f"{len(varied) // settings.seeds} captions with {settings.seeds} seeds each"
    summary = f"{len(order)} captions, and {several}, on {device}."
    features = f"{judge.features.name} cell" if settings.is_miniature else judge.features.name
    how = {"settings": vars(settings), "features": features, "versions": _versions(), "device": device}
    return Report(
        settings.title,
        summary,
        rows,
        _pictures(drawn, captions, varied.captions),
        {s.name: found for s in subjects if s.run is not None and (found := _curves(s.run))},
        {**how, "dtype": str(dtype), **facts},
        features=features,
        notes=notes,
    )


def _draw(
    subjects: Sequence[Subject], order: Order, varied: Order, settings: Settings, dtype: Any, device: str
) -> tuple[dict[str, tuple[Drawn, Drawn | None]], dict[str, Speed]]:
    """What each subject draws of both orders, and how fast; folders first, so that their mistakes are told at once."""
    from ..progress import counter
    from .speed import speeds
    from .subjects import draw_once

    models = [subject for subject in subjects if not subject.images]
    found: dict[str, tuple[Drawn, Drawn | None]]
    found = {subject.name: (_read(subject, len(order)), None) for subject in subjects if subject.images}
    timed: dict[str, Speed] = {}
    with counter("images", len(models) * (len(order) + len(varied))) as advance:

        def together(some: Sequence[Subject]) -> None:
            loaded = {subject.name: subject.load(dtype=dtype, device=device) for subject in some}
            for subject in some:
                load = partial(loaded.__getitem__, subject.name)
                quality, variety = draw_once(
                    subject, load, (order, varied), settings.out / "drawn", dtype=dtype, advance=advance
                )
                found[subject.name] = quality, variety
            timed.update(speeds(loaded, order))

        for some in [[model] for model in models] if settings.apart else [models]:
            together(some)
    return {subject.name: found[subject.name] for subject in subjects}, timed


def _read(subject: Subject, count: int) -> Drawn:
    from .subjects import check_captions, read_images

    paths = subject.images
    if len(paths) < count:
        raise ValueError(f"{subject.where} has {len(paths)} images, and --images is {count}")
    read = read_images(paths[:count])
    check_captions(read, subject.where)
    return read


def _pictures(
    drawn: Mapping[str, tuple[Drawn, Drawn | None]], captions: list[str], varied: Sequence[str]
) -> list[Picture]:
    from .charts import side_by_side
    from .report import Picture

    some = slice(0, SHOWN)
    same = {name: one.pixels(some) for name, (one, _) in drawn.items() if one.captions == captions}
    many = {name: two.pixels(some) for name, (_, two) in drawn.items() if two is not None}
    pictures = []
    if same:
        says = "A column is one caption from one noise."
        pictures.append(Picture("The same captions and seeds", says, side_by_side(same, captions[some])))
    if many:
        says = "One caption from different noises: how much is left open, and used."
        pictures.append(Picture("One caption, many seeds", says, side_by_side(many, varied[some])))
    return pictures


def _captions(settings: Settings) -> list[str]:
    if settings.prompts is not None:
        from ..train.data import read_prompts

        prompts = list(read_prompts(settings.prompts))
        if len(prompts) < settings.images:
            raise ValueError(f"{settings.prompts} has {len(prompts)} prompts, and --images is {settings.images}")
        return prompts[: settings.images]
    from ..zoo.miniature import samples

    return samples(settings.stream, 0, settings.images).captions


def _judge(settings: Settings, device: str) -> tuple[Judge, Drawn | None, list[str]]:
    """The judge; real images to be judged as well, where there are enough of them; and a note where there are not."""
    import torch

    from ..images import to_bytes
    from .alignment import load_clip_score, load_vqa_score
    from .features import MiniatureFeatures, load_features
    from .study import Judge, features_of
    from .subjects import Drawn, check_captions, images_in, read_images

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
        paths = images_in(settings.reference)
        if len(paths) < count:
            raise ValueError(f"{settings.reference} has {len(paths)} images, and --images is {count}: give as many")
        real = features_of(read_images(paths[:count]), network)
        judge = Judge(network, network, _named(scores), real)
        if len(paths) < 2 * count:
            found = f"{settings.reference} has {len(paths)} images, and 2 x --images = {2 * count} are needed"
            return judge, None, [f"no row of real images: {found}"]
        rest = read_images(paths[count : 2 * count])
        check_captions(rest, settings.reference)
        return judge, rest, []
    from ..zoo.miniature import claims_of, detector, samples

    seeing = detector.load()

    def seen(images: Any, captions: Any) -> dict[str, Any]:
        if captions is None:
            return {"psnr": detector.check(seeing, images, claims_of([""] * len(images))).psnr}
        found = detector.check(seeing, images, claims_of(captions))
        return {"aligned": found.aligned.double(), "psnr": found.psnr, **_named(scores)(images, captions)}

    each = MiniatureFeatures(seeing, "each")
    reals = [samples(settings.stream, start, count) for start in (count, 2 * count)]
    first, second = (Drawn(to_bytes(one.images), one.captions) for one in reals)
    return Judge(each, each, seen, features_of(first, each), each.cells_of), second, []


def _named(scores: Mapping[str, Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    return lambda images, captions: (
        {} if captions is None else {name: score(images, captions) for name, score in scores.items()}
    )


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
