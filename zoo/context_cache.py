"""Contexts of captions on disk: encoded once, read as often as training needs them.

    contexts-00000-of-00012.safetensors    the captions of one shard, end to end, without padding: features [tokens, C],
                                           lengths [captions] or [captions, segments]; the header says part of what
    index.json                             which caption is where, and what everything was made with

Shards are written under another name and renamed when they are whole and on the disk, and they depend on the captions
only, not on who writes them: an interrupted run goes on at the shard that it was at, with as many ranks as there are
then. The index is written when the last shard is there. A caption that comes several times is stored once.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..durable import replaced
from ..progress import progress_bar
from .context import Context
from .encoders.protocol import TextEncoder
from .encoders.tokens import check_count, check_prompts
from .shards import (
    CONTEXTS,
    FORMAT,
    VERSION,
    WHERE,
    check_file,
    check_row,
    checksums_of,
    claim,
    clear,
    is_whole,
    merge,
    open_own,
    read_index,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def dtype_name(dtype: torch.dtype) -> str:
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"{WHERE}: dtype is {dtype}, expected one of {', '.join(map(str, DTYPES.values()))}")


@dataclass(frozen=True)
class Plan:
    """Everything that decides what stands in which shard. Two writers with one plan may share a folder."""

    header: dict[str, str]  # into every shard and the index
    prompts: list[str]  # each once, in the order of their first appearance
    shard_size: int

    @staticmethod
    def of(encoder: TextEncoder, prompts: list[str], shard_size: int, dtype: torch.dtype) -> Plan:
        unique = list(dict.fromkeys(check_prompts(WHERE, prompts)))
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "encoder": encoder.fingerprint,
            "identity": json.dumps(encoder.identity),
            "template": encoder.template,
            "dtype": dtype_name(dtype),
            "shard_size": str(check_count(WHERE, "shard_size", shard_size)),
            "captions": hashlib.sha256("".join(map(prompt_hash, unique)).encode()).hexdigest()[:32],
        }
        return Plan(header, unique, shard_size)

    @property
    def shards(self) -> int:
        return -(-len(self.prompts) // self.shard_size)

    def name(self, shard: int) -> str:
        return CONTEXTS.name(shard, self.shards)

    def part(self, shard: int) -> list[str]:
        return self.prompts[shard * self.shard_size : (shard + 1) * self.shard_size]


class ContextCache:
    """Contexts that were written to a folder; `cache[captions]` or `cache[indices]` is a batch of them, on the CPU.

    Args:
        folder: what `write` filled.
        encoder: the text encoder, or its fingerprint, that the contexts must have been made with; None accepts any.
    """

    def __init__(self, folder: str | Path, encoder: TextEncoder | str | None = None) -> None:
        self.folder = Path(folder)
        self._index = read_index(self.folder, CONTEXTS)
        header = self._index["header"]
        self.encoder: str = header["encoder"]
        self.template: str = header["template"]
        self.files: str | None = self._index.get("files")  # of the text encoder, where it was loaded from files
        self.dtype = DTYPES[header["dtype"]]
        if encoder is not None:
            self.check(encoder)
        self._shards = self._index["shards"]
        for shard in self._shards:
            check_file(self.folder / shard["file"], shard["bytes"], CONTEXTS)
        names = [name for shard in self._shards for name in shard["prompts"]]
        self._place = {name: place for place, name in enumerate(names)}
        self._first = [0, *accumulate(len(shard["prompts"]) for shard in self._shards)]
        self._ends: dict[int, list[int]] = {}
        self._files: dict[int, Any] = {}

    @staticmethod
    def write(
        folder: str | Path,
        encoder: TextEncoder,
        prompts: list[str],
        *,
        shard_size: int = 256,
        batch_size: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        resume: bool = True,
        progress: bool | Callable[[int, int], None] = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Encode captions into a folder.

        Args:
            resume: keep the shards that are there; they must come from the same encoder, captions, dtype and
                shard_size. False writes everything anew.
            progress: called with (done, total) captions of this rank; True shows a bar on rank 0.
            rank, world_size: every rank calls this with the same captions and writes every world_size-th shard; the
                index appears when the last of them is done.
        """
        check_count(WHERE, "world_size", world_size)
        if not 0 <= check_count(WHERE, "rank", rank, least=0) < world_size:
            raise ValueError(f"{WHERE}: rank is {rank}, expected less than world_size {world_size}")
        folder = Path(folder)
        plan = Plan.of(encoder, prompts, shard_size, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(rank, plan.shards, world_size)
        if resume:
            claim(folder, plan.header, CONTEXTS)
        else:
            own, names = ({plan.name(shard) for shard in shards} for shards in (mine, range(plan.shards)))
            clear(folder, own, names, rank, CONTEXTS)
        total = sum(len(plan.part(shard)) for shard in mine)
        with progress_bar("contexts", shown=progress is True and rank == 0) as bar:
            report, done = progress if callable(progress) else bar, 0
            for shard in mine:
                if not (resume and is_whole(folder / plan.name(shard), plan.header, CONTEXTS)):
                    _write_shard(folder, plan, shard, encoder, batch_size)
                done += len(plan.part(shard))
                report(done, total)
        more = {"files": getattr(encoder, "files", None)}
        merge(folder, [plan.name(shard) for shard in range(plan.shards)], plan.header, CONTEXTS, more)

    @staticmethod
    def bytes_needed(encoder: TextEncoder, prompts: list[str], *, dtype: torch.dtype = torch.bfloat16) -> int:
        """How much disk the features of captions take, from their tokens alone: tokens x channels x bytes of the dtype.

        Index and headers add less than 200 bytes for each caption.
        """
        unique = list(dict.fromkeys(check_prompts(WHERE, prompts)))
        dtype_name(dtype)
        return sum(encoder.count_tokens(unique)) * encoder.channels * dtype.itemsize

    def check(self, encoder: TextEncoder | str) -> None:
        """ValueError unless the contexts were made with this encoder."""
        theirs = encoder if isinstance(encoder, str) else encoder.fingerprint
        if theirs == self.encoder:
            return
        differ = ""
        if not isinstance(encoder, str):
            mine, other = json.loads(self._index["header"]["identity"]), encoder.identity
            named = [key for key in {**mine, **other} if mine.get(key) != other.get(key)]
            differ = f"; they differ in {', '.join(named)}"
        raise ValueError(
            f"{WHERE}: {self.folder} was made with the text encoder {self.encoder}, and this one is "
            f"{theirs}{differ}; write a cache for this encoder into another folder"
        )

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, prompt: object) -> bool:
        return isinstance(prompt, str) and prompt_hash(prompt) in self._place

    def __getitem__(self, keys: Sequence[str] | Sequence[int] | Tensor | slice) -> Context:
        """A batch: captions, or their places in the order in which they first came when the cache was written."""
        rows = [self._row(place) for place in self._places(keys)]
        features = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
        if not self._index["lengths"]:
            return Context(features, encoder=self.encoder)
        return Context(features, torch.stack([lengths for _, lengths in rows]), encoder=self.encoder)

    def _places(self, keys: Any) -> list[int]:
        if isinstance(keys, slice):
            keys = range(len(self))[keys]
        if isinstance(keys, Tensor):
            keys = keys.tolist()
        if isinstance(keys, (str, int)) or not isinstance(keys, Sequence):
            raise TypeError(
                f"{WHERE}: {keys!r} is not a batch; ask for a list of captions or of places, or for a slice"
            )
        if not keys:
            raise ValueError(f"{WHERE}: an empty batch was asked for")
        if all(isinstance(key, str) for key in keys):
            absent = [key for key in keys if key not in self]
            if absent:
                raise ValueError(
                    f"{WHERE}: {len(absent)} of {len(keys)} captions are not in {self.folder}, {absent[0][:80]!r} "
                    f"among them; write them, or use OnlineContexts with the text encoder"
                )
            return [self._place[prompt_hash(key)] for key in keys]
        for key in keys:
            if isinstance(key, bool) or not isinstance(key, int):
                raise TypeError(f"{WHERE}: a key is {type(key).__name__}, expected all captions or all places")
            if not -len(self) <= key < len(self):
                raise ValueError(f"{WHERE}: place {key} was asked for, and there are {len(self)} captions")
        return [key % len(self) for key in keys]

    def _row(self, place: int) -> tuple[Tensor, Tensor]:
        """Features [tokens, C] and lengths of one caption."""
        shard = bisect_right(self._first, place) - 1
        row = place - self._first[shard]
        lengths = torch.tensor(self._shards[shard]["lengths"][row])
        if shard not in self._ends:
            counts = (torch.tensor(one).sum().item() for one in self._shards[shard]["lengths"])
            self._ends[shard] = [0, *accumulate(int(count) for count in counts)]
        start, end = self._ends[shard][row : row + 2]
        features = self._file(shard).get_slice("features")[start:end]
        check_row(self.folder / self._shards[shard]["file"], self._shards[shard], row, (features,), CONTEXTS)
        return features, lengths

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            path = self.folder / self._shards[shard]["file"]
            self._files[shard] = open_own(path, self._index["header"], CONTEXTS)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # an open file stays with its process


class OnlineContexts:
    """Contexts with the interface of a cache, encoded when they are asked for, or taken from a cache that has them."""

    def __init__(self, encoder: TextEncoder, cache: ContextCache | None = None, *, batch_size: int = 32) -> None:
        if cache is not None:
            cache.check(encoder)
        self.text_encoder = encoder
        self.cache = cache
        self.batch_size = check_count("online contexts", "batch_size", batch_size)

    @property
    def encoder(self) -> str:
        return self.text_encoder.fingerprint

    def __getitem__(self, prompts: Sequence[str]) -> Context:
        """A batch, on the encoder's device; in the cache's dtype if there is a cache, so that one
        caption has one context."""
        wanted = check_prompts("online contexts", prompts)
        cache = self.cache
        if cache is None:
            return self.text_encoder.encode(wanted, batch_size=self.batch_size)
        fresh = list(dict.fromkeys(prompt for prompt in wanted if prompt not in cache))
        stored = list(dict.fromkeys(prompt for prompt in wanted if prompt in cache))
        place = {prompt: row for row, prompt in enumerate(fresh + stored)}
        parts = []
        if fresh:
            parts.append(self.text_encoder.encode(fresh, batch_size=self.batch_size).to(dtype=cache.dtype))
        if stored:
            parts.append(cache[stored].to(self.text_encoder.device))
        return Context.cat(parts)[[place[prompt] for prompt in wanted]]


def _write_shard(folder: Path, plan: Plan, shard: int, encoder: TextEncoder, batch_size: int) -> None:
    name, part = plan.name(shard), plan.part(shard)
    dtype = DTYPES[plan.header["dtype"]]
    rows: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    has_lengths = True
    order = sorted(range(len(part)), key=lambda row: len(part[row]))  # similar lengths together
    for start in range(0, len(order), check_count(WHERE, "batch_size", batch_size)):
        batch = order[start : start + batch_size]
        context = encoder.encode([part[row] for row in batch], batch_size=batch_size)
        if context.references or context.vision:
            raise ValueError(f"{WHERE}: contexts with images cannot be stored, only those of captions")
        features = context.features.to(dtype).cpu()
        lengths = context.token_lengths if context.lengths is None else context.lengths
        has_lengths = context.lengths is not None
        for row, feature, count, own in zip(batch, features, context.token_lengths.tolist(), lengths, strict=True):
            rows[row], counts[row] = feature[:count], own
            if not bool(rows[row].isfinite().all()):
                raise ValueError(
                    f"{WHERE}: the features of {part[row][:80]!r} are not finite in {plan.header['dtype']}; look at "
                    f"the text encoder's weights, or choose bfloat16"
                )
    tensors = {
        "features": torch.cat([rows[row] for row in range(len(part))]),
        "lengths": torch.stack([counts[row] for row in range(len(part))]),
    }
    about = {"prompts": json.dumps([prompt_hash(prompt) for prompt in part]), "has_lengths": str(int(has_lengths))}
    about |= checksums_of((rows[row],) for row in range(len(part)))
    with replaced(folder / name) as new:
        save_file(tensors, new, {**plan.header, **about})
