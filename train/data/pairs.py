"""What the teacher makes of prompts, on disk: sampled once, read as often as training needs it.

    pairs-00000-of-00012.safetensors    latents [n, C, H, W] of n prompts, indices [n] (the prompts' numbers), and
                                        anchors [n, C, H, W] if an anchor's sigma was asked for
    index.json                          which prompt is where, and what everything was made with

Prompt `index` starts from noise of the seed and the index alone, so a sample does not depend on who made it or in what
batch, up to the rounding of the network's own kernels at that batch size. The noise is not stored: `cache.noise` draws
it again. An anchor is the teacher's state z_K on the way, at any sigma (between two of its grid it lies on the line
that the step is), in float32. DP-DMD wants it: its target is the average velocity (noise - z_K) / (1 - sigma_K). Shards
are written, resumed and checked like those of contexts (zoo/shards.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from twostep.zoo import AdapterView, Backbone, Context, Teacher
from twostep.zoo.context_cache import DTYPES
from twostep.zoo.encoders import fingerprint
from twostep.zoo.shards import (
    CHECKSUMS,
    Kind,
    Rows,
    check_file,
    check_row,
    checksums_in,
    checksums_of,
    claim,
    clear,
    is_whole,
    merge,
    open_own,
    read_index,
)
from twostep.zoo.teacher import EVERYWHERE

from ...disk import check_space
from ...durable import replaced
from ...progress import progress_bar
from .noise import sample_noise
from .order import check_ranks
from .prompts import fingerprint as prompts_fingerprint

WHERE = "teacher cache"


def _rows(file: Any) -> Rows:
    indices = file.get_tensor("indices").tolist()
    return Rows({"first": indices[0], "count": len(indices), **checksums_in(file)}, {"pairs": len(indices)}, {})


PAIRS = Kind(
    "twostep.pairs",
    1,
    stem="pairs",
    where=WHERE,
    holds="teacher samples",
    writer="TeacherCache.write (`twostep cache`)",
    input="prompts",
    own=(CHECKSUMS,),
    rows=_rows,
)


class Contexts(Protocol):
    """A ContextCache or OnlineContexts."""

    @property
    def encoder(self) -> str: ...

    def __getitem__(self, prompts: list[str], /) -> Context: ...


@dataclass(frozen=True)
class Plan:
    """Everything that decides what stands in which shard."""

    header: dict[str, str]
    count: int  # prompts
    shape: tuple[int, ...]  # of one sample
    grid: tuple[float, ...]
    anchor: tuple[int, float] | None  # the step on which a state is kept, and after which part of it
    shard_size: int

    @property
    def names(self) -> list[str]:
        shards = -(-self.count // self.shard_size)
        return [PAIRS.name(shard, shards) for shard in range(shards)]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.header["dtype"]]

    def part(self, shard: int) -> range:
        return range(self.count)[shard * self.shard_size : (shard + 1) * self.shard_size]

    def bytes(self, shard: int) -> int:
        return len(self.part(shard)) * (bytes_of(self.shape, self.dtype, self.anchor is not None) + 8) + 2048


def bytes_of(shape: Sequence[int], dtype: torch.dtype, anchored: bool) -> int:
    """Of one prompt. Anchors are float32: DP-DMD divides their distance from the noise by the way that they have come,
    and their rounding with it."""
    return math.prod(shape) * (dtype.itemsize + (torch.float32.itemsize if anchored else 0))


class TeacherCache:
    """The teacher's samples that were written to a folder; `cache[indices]` is a batch of them, on the CPU.

    `cache[indices]` is a dict: `latents` [n, C, H, W], `indices` [n], and `anchors` like latents where they were kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._index = read_index(self.folder, PAIRS)
        header = self.header = dict(self._index["header"])
        self.seed = int(header["seed"])
        self.shape: tuple[int, ...] = tuple(json.loads(header["shape"]))
        self.sigmas: tuple[float, ...] = tuple(json.loads(header["sigmas"]))
        self.anchor_sigma: float | None = json.loads(header["anchor_sigma"])
        self.dtype = DTYPES[header["dtype"]]
        self._shards = self._index["shards"]
        for shard in self._shards:
            check_file(self.folder / shard["file"], shard["bytes"], PAIRS)
        self._first: list[int] = [0, *accumulate(shard["count"] for shard in self._shards)]
        self._files: dict[int, Any] = {}

    @staticmethod
    def write(
        folder: str | Path,
        teacher: Teacher,
        contexts: Contexts,
        prompts: Sequence[str],
        *,
        size: tuple[int, int],
        seed: int = 0,
        batch: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        anchor_sigma: float | None = None,
        shard_size: int = 256,
        rank: int = 0,
        world_size: int = 1,
        resume: bool = True,
        progress: bool | Callable[[int, int], None] = True,
    ) -> None:
        """Sample the teacher for every prompt into a folder; one that comes twice is sampled twice, from other noise.

        Args:
            contexts: a ContextCache of the prompts, or OnlineContexts.
            size: height and width of the latents.
            dtype: of the samples as they are stored; the teacher computes in its own, and anchors are float32.
            anchor_sigma: also keep the state at this sigma. Between two of the teacher's grid it lies on the straight
                line that the step is.
            rank, world_size: every rank calls this alike and writes every world_size-th shard; the index appears when
                the last of them is done.
            resume: keep the shards that are there; they must be of the same teacher, prompts and settings. False
                writes everything anew.
            progress: called with (done, total) prompts of this rank; True shows a bar on rank 0.
        """
        check_ranks(WHERE, rank, world_size, batch=batch, shard_size=shard_size)
        folder = Path(folder)
        plan = plan_of(
            teacher, contexts.encoder, prompts, size, seed=seed, dtype=dtype, anchor=anchor_sigma, shard_size=shard_size
        )
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(rank, len(plan.names), world_size)
        if resume:
            claim(folder, plan.header, PAIRS)
        else:
            clear(folder, {plan.names[shard] for shard in mine}, set(plan.names), rank, PAIRS)
        absent = [shard for shard, name in enumerate(plan.names) if not (folder / name).exists()]
        check_space(folder, sum(map(plan.bytes, absent)), WHERE)
        total = sum(len(plan.part(shard)) for shard in mine)
        with progress_bar("teacher samples", shown=progress is True and rank == 0) as bar:
            report = progress if callable(progress) else bar
            done = 0
            for shard in mine:
                if not is_whole(folder / plan.names[shard], plan.header, PAIRS):

                    def within(count: int, before: int = done) -> None:
                        report(before + count, total)

                    _write_shard(folder, plan, shard, teacher, contexts, prompts, batch, within)
                done += len(plan.part(shard))
                report(done, total)
        merge(folder, plan.names, plan.header, PAIRS)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        wanted = indices.tolist() if isinstance(indices, Tensor) else indices
        if isinstance(wanted, (int, str)) or not isinstance(wanted, Sequence) or not wanted:
            raise TypeError(f"{WHERE}: {indices!r} is not a batch; ask for a list of prompts' numbers")
        for index in wanted:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self):
                raise ValueError(f"{WHERE}: prompt {index!r} was asked for, and {self.folder} has {len(self)} prompts")
        names = ["latents"] if self.anchor_sigma is None else ["latents", "anchors"]
        rows = [self._row(index, names) for index in wanted]
        found = {name: torch.stack([row[name] for row in rows]) for name in names}
        return {**found, "indices": torch.tensor(wanted)}

    def noise(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The noise that these samples began with, in float32."""
        wanted = indices.tolist() if isinstance(indices, Tensor) else indices
        return sample_noise(self.seed, wanted, self.shape)

    def check(self, teacher: Teacher, prompts: Sequence[str]) -> None:
        """ValueError unless the samples are this teacher's, with its grid and guidance, of these prompts."""
        mine = {**_teacher_header(teacher, self.sigmas_of(teacher)), "prompts": prompts_fingerprint(prompts)}
        differ = [key for key, value in mine.items() if self.header[key] != value]
        if differ:
            raise ValueError(
                f"{WHERE}: the samples in {self.folder} were made with other {', '.join(differ)}; write a cache for "
                f"this teacher and these prompts into another folder"
            )

    def sigmas_of(self, teacher: Teacher) -> tuple[float, ...]:
        """The teacher's grid at the size of these samples."""
        _, height, width = self.shape
        return teacher.sigmas(height, width)

    def _row(self, index: int, names: list[str]) -> dict[str, Tensor]:
        shard = bisect_right(self._first, index) - 1
        if shard not in self._files:
            path = self.folder / self._shards[shard]["file"]
            self._files[shard] = open_own(path, self.header, PAIRS)
        row = index - self._first[shard]
        tensors = {name: self._files[shard].get_slice(name)[row] for name in names}
        check_row(self.folder / self._shards[shard]["file"], self._shards[shard], row, tuple(tensors.values()), PAIRS)
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # an open file stays with its process


def plan_of(
    teacher: Teacher,
    encoder: str,
    prompts: Sequence[str],
    size: tuple[int, int],
    *,
    seed: int,
    dtype: torch.dtype,
    anchor: float | None,
    shard_size: int,
) -> Plan:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"{WHERE}: prompts are {prompts!r}, expected a sequence of at least one str")
    names = {known: name for name, known in DTYPES.items()}
    if dtype not in names:
        raise ValueError(f"{WHERE}: dtype is {dtype}, expected one of {', '.join(map(str, names))}")
    factor = teacher.backbone.latent_factor
    if len(size) != 2 or any(side < 1 or side % factor for side in size):
        raise ValueError(f"{WHERE}: size is {size}, expected (height, width) of latents, multiples of {factor}")
    grid = teacher.sigmas(*size)
    kept, sigma = _anchor(grid, anchor)
    shape = (teacher.backbone.channels, *size)
    header = {
        "format": PAIRS.format,
        "version": str(PAIRS.version),
        **_teacher_header(teacher, grid),
        "anchor_sigma": json.dumps(sigma),
        "encoder": encoder,
        "seed": str(seed),
        "shape": json.dumps(shape),
        "dtype": names[dtype],
        "shard_size": str(shard_size),
        "prompts": prompts_fingerprint(prompts),
    }
    if kept is not None:
        header["anchors"] = "float32"
    return Plan(header, len(prompts), shape, grid, kept, shard_size)


def _teacher_header(teacher: Teacher, grid: tuple[float, ...]) -> dict[str, str]:
    if teacher.eta:
        raise ValueError(
            f"{WHERE}: the teacher's eta is {teacher.eta}, and what is cached follows from its noise alone: expected 0"
        )
    model = teacher.backbone.model
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    negative = None
    if teacher.guidance != 1:
        if teacher.negative is None:
            raise ValueError(
                f"{WHERE}: the teacher's guidance is {teacher.guidance} and it has no negative context; give it one: "
                f"Teacher(..., negative=contexts[['']])"
            )
        # In bfloat16: what a cache rounds to.
        values = teacher.negative.features.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        negative = [teacher.negative.encoder, teacher.negative.lengths_of_samples(), _digest(values)]
    limited = [] if teacher.guidance == 1 or teacher.guidance_interval == EVERYWHERE else [teacher.guidance_interval]
    network = fingerprint.digest([config, fingerprint.weights(_Weights(teacher.backbone))])
    return {
        "teacher": f"{teacher.backbone.family}:{network}",
        "sigmas": json.dumps(grid),
        "guidance": json.dumps([float(teacher.guidance), negative, *limited]),
    }


class _Weights(nn.Module):
    """A backbone's parameters by the names of its model without adapters: a base stays the model that it was when
    adapters are added to it; those that are switched on count."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # looked at, not owned

    def named_parameters(self, *unused: Any, **settings: Any) -> Iterator[tuple[str, nn.Parameter]]:
        backbone = self.__dict__["backbone"]
        for name, parameter in backbone.model.named_parameters():
            is_adapters = isinstance(backbone, AdapterView) and ".lora_" in name
            if not is_adapters or name.split(".")[-2] == backbone.adapter:
                yield name.replace(".base_layer.", "."), parameter


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _anchor(grid: tuple[float, ...], wanted: float | None) -> tuple[tuple[int, float] | None, float | None]:
    """The step that passes the wanted sigma, which part of it lies before, and that sigma, as the grid has it if it
    does."""
    if wanted is None:
        return None, None
    if not 0 < wanted < 1:
        raise ValueError(f"{WHERE}: anchor_sigma is {wanted}, expected a number between 0 and 1")
    for step, (before, after) in enumerate(pairwise(grid)):
        if after > 0 and abs(after - wanted) < 1e-4:
            return (step, 1.0), after
        if after < wanted:
            return (step, (before - wanted) / (before - after)), wanted
    raise AssertionError(f"a grid that does not end at 0: {grid}")


def _write_shard(
    folder: Path,
    plan: Plan,
    shard: int,
    teacher: Teacher,
    contexts: Contexts,
    prompts: Sequence[str],
    batch: int,
    report: Callable[[int], None],
) -> None:
    name, part = plan.names[shard], plan.part(shard)
    latents: list[Tensor] = []
    anchors: list[Tensor] = []
    before = torch.empty(0)

    def on_step(step: int, x: Tensor) -> None:
        nonlocal before
        if plan.anchor is not None and step == plan.anchor[0]:
            way = plan.anchor[1]
            anchors.append((x if way == 1 else torch.lerp(before, x, way)).to("cpu", torch.float32))
        before = x

    device = teacher.backbone.device
    for start in range(0, len(part), batch):
        indices = list(part[start : start + batch])
        context = contexts[[prompts[index] for index in indices]].to(device)
        noise = sample_noise(int(plan.header["seed"]), indices, plan.shape).to(device)
        before = noise
        sample = teacher.sample(noise, context, sigmas=plan.grid, on_step=on_step).to("cpu", plan.dtype)
        kept = [sample] if plan.anchor is None else [sample, anchors[-1]]
        finite = torch.stack([one.flatten(1).isfinite().all(1) for one in kept]).all(0).tolist()
        if not all(finite):
            bad = indices[finite.index(False)]
            raise ValueError(
                f"{WHERE}: the teacher's sample of prompt {bad}, {prompts[bad][:80]!r}, is not finite in {plan.dtype}; "
                f"look at the teacher's weights and dtype, or store bfloat16"
            )
        latents.append(sample)
        report(start + len(indices))
    tensors = {"latents": torch.cat(latents), "indices": torch.tensor(list(part))}
    if plan.anchor is not None:
        tensors["anchors"] = torch.cat(anchors)
    about = checksums_of(zip(*(tensors[name] for name in ("latents", "anchors") if name in tensors), strict=True))
    with replaced(folder / name) as new:
        save_file(tensors, new, {**plan.header, **about})
