"""All that a run is made of, into a checkpoint and back, whatever the number of ranks was and is.

Every tensor is written once: a whole one by rank 0, a divided one in pieces by those who have them, with the rows that
each piece is. Whoever restores reads the rows that it needs from whichever rank's files have them, one tensor at a
time; so a checkpoint of 8 ranks in shards goes on on 3, or on one without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import checkpoint_manifest as manifest
from .average import Average
from .checkpoint import Checkpoint, CheckpointError, Saved, Store, join, random_state, restore_random_state, split
from .data import NoiseStreams
from .feed import Feed
from .optimizers import Optimizer
from .ranks import Ranks
from .sharding import is_keeper, local, rows

Tensors = dict[str, Tensor]
_OWN = "own"  # the part with the tensors of a rank's own state: streams and random generators


@dataclass
class Progress:
    """Where a run is. Everything else of it is in networks, optimizers, streams and the data's position."""

    iteration: int = 0  # completed
    position: int = 0  # updates of the next one that are done
    skipped: dict[str, int] = field(default_factory=dict)  # by kind: updates in a row that were not finite
    skipped_in_all: int = 0
    returns: int = 0  # to earlier checkpoints, since it last recovered
    failed_at: int = 0  # the iteration of the last return
    owed: bool = False  # a checkpoint is due, and waits for updates that are finite
    watched: dict[str, Any] = field(default_factory=dict)  # what monitors remember


@dataclass
class RunState:
    modules: Mapping[str, nn.Module]  # by role
    optimizers: Mapping[str, Optimizer]  # by kind of update
    average: Average | None
    streams: NoiseStreams  # this rank's
    shared: NoiseStreams  # alike on all ranks
    feed: Feed
    ranks: Ranks
    progress: Progress = field(default_factory=Progress)

    # Saving

    def save(
        self,
        store: Store,
        signature: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        feed_state: Mapping[str, Any] | None = None,
    ) -> Saved:
        """`feed_state`: the data's position, where it is not the present one."""
        own, rest = split(
            {
                "streams": self.streams.state_dict(),
                "shared": self.shared.state_dict(),
                "random": random_state(),
                "feed": self.feed.state_dict() if feed_state is None else feed_state,
            }
        )
        parts: dict[str, Tensors] = {_OWN: own}
        pieces: dict[str, dict[str, tuple[int, int] | None]] = {}  # part -> name -> rows; None: all of it
        for part, tensors in self._parts().items():
            kept = {name: tensor for name, tensor in tensors.items() if is_keeper(tensor, self.ranks)}
            if kept:
                parts[part] = {name: local(tensor) for name, tensor in kept.items()}
            pieces[part] = {name: rows(tensor) for name, tensor in kept.items()}
        state = {
            "progress": vars(self.progress),
            "own": rest,
            "optimizers": {kind: optimizer.numbers() for kind, optimizer in self.optimizers.items()},
            "holds": pieces,
        }
        return store.save(
            self.progress.iteration,
            parts,
            state,
            signature=signature,
            metrics=metrics,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            barrier=lambda: self.ranks.highest([0.0]),
        )

    def _parts(self) -> dict[str, Tensors]:
        found: dict[str, Tensors] = {
            role: {name: p.detach() for name, p in module.named_parameters()} for role, module in self.modules.items()
        }
        for kind, optimizer in self.optimizers.items():
            found[f"optimizer.{kind}"] = optimizer.tensors()
        if self.average is not None:
            found["ema"] = self.average.values
        return found

    # Restoring

    def restore(self, store: Store, which: Any, signature: Mapping[str, Any]) -> Saved:
        """Everything as it was. Which: a step, a checkpoint's folder, or None for the last."""
        first = store.load(which, signature=signature, only=[_OWN])
        try:
            self._restore(store, first)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {store.offer(first.saved.path, signature)}") from None
        return first.saved

    def _restore(self, store: Store, first: Checkpoint) -> None:
        saved, mine = first.saved, first
        known = self.ranks.rank < saved.world_size
        if known and not self.ranks.first:
            mine = store.load(saved, signature=None, rank=self.ranks.rank, only=[_OWN])
        for kind, optimizer in self.optimizers.items():
            optimizer.prepare(first.state["optimizers"][kind])
        with torch.no_grad():
            _Reader(saved, first.state["holds"]).fill(self._parts())
        self.progress = Progress(**mine.state["progress"])
        own = join(mine.parts[_OWN], mine.state["own"])
        self.feed.load_state_dict(join(first.parts[_OWN], first.state["own"])["feed"])
        self.shared.load_state_dict(own["shared"])
        if known:  # a rank that was not there before begins its streams
            self.streams.load_state_dict(own["streams"])
            restore_random_state(own["random"])


class _Reader:
    """Rows of tensors from the files of all ranks. A file is read only where it has rows that are wanted here, and
    verified before that: ranks that go on as they were read their own files and rank 0's."""

    def __init__(self, saved: Saved, first: Mapping[str, Any]) -> None:
        self.saved = saved
        self.holds: list[Mapping[str, Any]] = [first]
        if any(where is not None for names in first.values() for where in names.values()):
            self.holds += [manifest.read_state(saved, rank)["holds"] for rank in range(1, saved.world_size)]
        self._files: dict[str, Any] = {}

    def fill(self, parts: Mapping[str, Tensors]) -> None:
        for part, tensors in parts.items():
            pieces = self._pieces(part)
            given, wanted = set(pieces), set(tensors)
            if given != wanted:
                absent, foreign = sorted(wanted - given)[:3], sorted(given - wanted)[:3]
                raise CheckpointError(
                    f"{self.saved.path}: {part} does not fit: {len(wanted - given)} tensors are missing {absent}, "
                    f"{len(given - wanted)} are unexpected {foreign}"
                )
            for name, tensor in tensors.items():
                self._fill(part, name, tensor, pieces[name])

    def _pieces(self, part: str) -> dict[str, list[tuple[int, int | None, int | None]]]:
        """name -> (rank, first row, last row); rows None for a whole tensor."""
        found: dict[str, list[tuple[int, int | None, int | None]]] = {}
        for rank, holds in enumerate(self.holds):
            for name, where in holds.get(part, {}).items():
                start, stop = (None, None) if where is None else where
                found.setdefault(name, []).append((rank, start, stop))
        return found

    def _fill(self, part: str, name: str, tensor: Tensor, pieces: list[tuple[int, int | None, int | None]]) -> None:
        target = local(tensor)
        wanted = rows(tensor)
        if wanted is None and pieces[0][1] is None:
            self._check_shape(part, name, tensor, self._slice(part, name, pieces[0][0]).get_shape())
            target.copy_(self._tensor(part, name, pieces[0][0]))
            return
        begin, end = (0, tensor.shape[0]) if wanted is None else wanted
        filled = 0
        for rank, start, stop in pieces:
            first = 0 if start is None else start
            last = tensor.shape[0] if stop is None else stop
            low, high = max(begin, first), min(end, last)
            if low < high:
                piece = self._slice(part, name, rank)
                others = tensor.shape[0] - (last - first)
                self._check_shape(part, name, tensor, [others + piece.get_shape()[0], *piece.get_shape()[1:]])
                target[low - begin : high - begin].copy_(piece[low - first : high - first])
                filled += high - low
        if filled != end - begin:
            raise CheckpointError(
                f"{self.saved.path}: {part}: {name} has {filled} of the {end - begin} rows that are wanted"
            )

    def _check_shape(self, part: str, name: str, tensor: Tensor, found: list[int]) -> None:
        if list(tensor.shape) != list(found):
            raise CheckpointError(
                f"{self.saved.path}: {part}: {name} has shape {list(found)}, expected {list(tensor.shape)}"
            )

    def _slice(self, part: str, name: str, rank: int) -> Any:
        return self._open(f"{manifest.rank_folder(rank)}{part}{manifest.SUFFIX}").get_slice(name)

    def _tensor(self, part: str, name: str, rank: int) -> Tensor:
        return self._open(f"{manifest.rank_folder(rank)}{part}{manifest.SUFFIX}").get_tensor(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            manifest.verify_files(self.saved, [file])
            self._files[file] = safe_open(self.saved.path / file, framework="pt")
        return self._files[file]
