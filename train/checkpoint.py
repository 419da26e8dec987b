"""The checkpoints of a run: each is there whole or not at all, none is used unverified, and none can run code.

    store = Store(folder, keep_last=3, keep_best=("fid", "min"))
    store.save(step, {"student": model.state_dict(), ...}, state, signature={...}, metrics={"fid": 21.3})
    checkpoint = store.load(signature={...})

A save writes everything into a temporary folder beside the others, syncs it to the disk, renames it, syncs the name,
and only then removes what is older than what is to be kept. What is in a checkpoint: `checkpoint_manifest.py`; how it
becomes whole: `twostep/durable.py`; how optimizers and random generators become tensors and JSON: `state_tree.py`.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..durable import publish, recover, remove, sync_folder, temporary
from . import checkpoint_manifest as manifest
from .checkpoint_manifest import CheckpointError, Saved
from .state_tree import encode, join, random_state, restore_random_state, split
from .tensor_file import check_tensors, nbytes, write_bytes, write_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Saved",
    "Store",
    "join",
    "random_state",
    "restore_random_state",
    "split",
]

Parts = Mapping[str, Mapping[str, Tensor]]
_ANNOUNCEMENT = ".saving"
_SHARE = "files.json"
_SLACK = 1 << 20  # headers, the manifest and the folder itself, beyond the tensors and the state


@dataclass(frozen=True)
class Checkpoint:
    """What one rank saved."""

    step: int
    parts: dict[str, dict[str, Tensor]]
    state: Any
    saved: Saved


class Store:
    """The checkpoints in one folder.

    Args:
        folder: made on the first save. Opening a store removes what dead processes left unfinished in it.
        keep_last: how many of the last saves are kept.
        keep_best: (metric, "min" or "max"): the best checkpoint by this metric is kept as well.
        run: the run's id, written into each checkpoint; without one, that of the last checkpoint, or a new one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 3,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
        run: str | None = None,
    ) -> None:
        if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
            raise ValueError(f"Store: keep_last is {keep_last!r}, expected a whole number from 1 on")
        if keep_best is not None and (len(keep_best) != 2 or keep_best[1] not in ("min", "max")):
            raise ValueError(f'Store: keep_best is {keep_best!r}, expected (metric, "min") or (metric, "max")')
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._run = run
        if self.folder.is_dir():
            recover(self.folder)

    # What there is

    def all(self) -> list[Saved]:
        """The complete checkpoints, in the order in which they were saved."""
        found = []
        for folder in self._folders():
            with suppress(CheckpointError):
                found.append(manifest.read_manifest(folder))
        return sorted(found, key=lambda saved: saved.sequence)

    def latest(self) -> Saved | None:
        """The last one saved; never one that is incomplete."""
        return (self.all() or [None])[-1]  # type: ignore[list-item]

    def holds_any(self) -> bool:
        """Whether anything was ever saved here and is not wholly gone; it may be damaged."""
        return bool(self._folders())

    def best(self) -> Saved | None:
        """The best by the metric of `keep_best`, the later of equals; None where no checkpoint has that metric."""
        if self.keep_best is None:
            raise ValueError('Store: best() needs keep_best=(metric, "min" or "max")')
        name, direction = self.keep_best
        there = self.all()
        # Of later steps than the last one saved: they were gone back over.
        valid = [saved for saved in there if saved.step <= there[-1].step]
        rated = [saved for saved in valid if not math.isnan(saved.metrics.get(name, math.nan))]
        sign = 1 if direction == "max" else -1
        return max(reversed(rated), key=lambda saved: sign * saved.metrics[name], default=None)

    def verify(self, saved: Saved) -> None:
        """Reads every byte; CheckpointError unless all are those that were written."""
        manifest.verify_files(manifest.read_manifest(saved.path), list(saved.files))

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if manifest.STEP_FOLDER.fullmatch(path.name)), key=_step_of
        )

    # Loading

    def load(
        self,
        step: int | Path | Saved | None = None,
        *,
        signature: Mapping[str, Any] | None,
        device: str | torch.device = "cpu",
        rank: int = 0,
        only: Collection[str] | None = None,
    ) -> Checkpoint:
        """What `rank` saved at `step`, verified.

        Args:
            step: a step of this store, a checkpoint's folder, one of `all()`, or None for the latest.
            signature: what the checkpoint must belong to; None to take any.
            device: where the tensors go.
            rank: whose parts and state; the number of ranks may have been another (`saved.world_size`).
            only: the parts that are wanted; None for all.

        Raises CheckpointError, which names the checkpoint to go back to where there is one.
        """
        folder = self._choose(step)
        try:
            saved = manifest.read_manifest(folder)
            if signature is not None:
                manifest.check_signature(saved, signature)
            return self._read(saved, rank, only, str(device))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self.offer(folder, signature)}") from None

    def _choose(self, step: int | Path | Saved | None) -> Path:
        if isinstance(step, Saved):
            return step.path
        if isinstance(step, (str, Path)):
            return Path(step)
        if step is not None:
            return self.folder / manifest.step_folder(step)
        latest = self.latest()
        # A save leaves no incomplete folder: it has lost files since. To go on from before it is for the user to say.
        complete = {saved.path for saved in self.all()}
        damaged = [path for path in self._folders() if path not in complete]
        if damaged and (latest is None or _step_of(damaged[-1]) > latest.step):
            return damaged[-1]
        if latest is None:
            raise CheckpointError(f"{self.folder}: there is no checkpoint here")
        return latest.path

    def set_aside(self, step: int) -> list[Path]:
        """Damaged checkpoints of later steps get a name that nobody loads: a run goes on from before them."""
        complete = {saved.path for saved in self.all()}
        moved = []
        for path in self._folders():
            if _step_of(path) > step and path not in complete:
                aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
                path.rename(aside)
                moved.append(aside)
        if moved:
            sync_folder(self.folder)
        return moved

    def _read(self, saved: Saved, rank: int, only: Collection[str] | None, device: str) -> Checkpoint:
        prefix = manifest.rank_folder(rank)
        state_file = f"{prefix}{manifest.STATE}"
        if state_file not in saved.files:
            raise CheckpointError(f"{saved.path}: has no rank {rank}; it was saved by {saved.world_size}")
        own = [name.removeprefix(prefix) for name in saved.files if name.startswith(prefix)]
        stored = [name.removesuffix(manifest.SUFFIX) for name in own if "/" not in name and name != manifest.STATE]
        missing = sorted(set(only or ()) - set(stored))
        if missing:
            raise CheckpointError(f"{saved.path}: has no part {', '.join(missing)}; it has {', '.join(stored)}")
        wanted = {part: f"{prefix}{part}{manifest.SUFFIX}" for part in stored if only is None or part in only}
        manifest.verify_files(saved, list(wanted.values()))
        state = manifest.read_state(saved, rank)
        parts = {part: load_file(saved.path / file, device=device) for part, file in wanted.items()}
        return Checkpoint(saved.step, parts, state, saved)

    def offer(self, refused: Path, signature: Mapping[str, Any] | None) -> str:
        """The last checkpoint that could be loaded instead."""
        for saved in reversed(self.all()):
            if saved.path == refused:
                continue
            with suppress(CheckpointError):
                if signature is not None:
                    manifest.check_signature(saved, signature)
                self.verify(saved)
                return f"the last good checkpoint is {saved.path}"
        return f"there is no other good checkpoint in {self.folder}"

    # Saving

    def save(
        self,
        step: int,
        parts: Parts,
        state: Any,
        *,
        signature: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] | None = None,
    ) -> Saved:
        """Saves a checkpoint, replacing one of the same step, and removes those that are no longer to be kept.

        Args:
            parts: part -> name -> tensor, a file for each part. Plain tensors only; `split` makes them of other state.
            state: nested dicts, lists, tuples, text and numbers.
            signature: what the checkpoint belongs to; `load` compares it.
            metrics: numbers by which `best` chooses.
            rank, world_size, barrier: where several processes save one checkpoint, all of them call `save`, each with
                its own parts and state; `barrier` returns when all have called it. Signature and metrics are rank 0's.
                A failure on one rank is an error on all, after which no new checkpoint is there.
        """
        if not 0 <= rank < world_size or (world_size > 1 and barrier is None):
            raise ValueError(f"save: rank {rank} of {world_size}, barrier {barrier}; several ranks need a barrier")
        together = _Together(barrier if world_size > 1 and barrier is not None else lambda: None)
        with ExitStack() as stack:
            begun = together.do(lambda: self._begin(stack, step, world_size) if rank == 0 else None)
            job: _Job = together.local(lambda: begun if rank == 0 else self._announced(step))
            together.do(lambda: self._write_share(job, parts, state, rank))
            together.do(lambda: self._finish(job, signature, metrics, world_size) if rank == 0 else None)
        saved: Saved = together.local(lambda: self._published(job))
        together.finish()
        if rank == 0:
            self._prune(saved)
        return saved

    def _begin(self, stack: ExitStack, step: int, world_size: int) -> _Job:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"save: step is {step!r}, expected a whole number from 0 on")
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = stack.enter_context(temporary(self.folder, manifest.step_folder(step)))
        token = uuid.uuid4().hex
        if world_size > 1:
            announcement = self.folder / _ANNOUNCEMENT
            stack.callback(lambda: announcement.unlink(missing_ok=True))
            announcement.write_text(json.dumps({"step": step, "token": token, "folder": folder.name}))
        return _Job(step, token, folder)

    def _announced(self, step: int) -> _Job:
        try:
            told = json.loads((self.folder / _ANNOUNCEMENT).read_text())
        except (OSError, ValueError):
            raise CheckpointError(f"{self.folder}: rank 0 could not begin to save; see its error") from None
        if told["step"] != step:
            raise CheckpointError(f"{self.folder}: asked to save step {step} while rank 0 saves step {told['step']}")
        folder = self.folder / told["folder"]
        if not folder.is_dir():
            raise CheckpointError(f"{self.folder}: rank 0 could not begin to save; see its error")
        return _Job(step, told["token"], folder)

    def _write_share(self, job: _Job, parts: Parts, state: Any, rank: int) -> None:
        """This rank's files, all on the disk, and the list of them, which says that they are complete."""
        for part, tensors in parts.items():
            if not manifest.PART.fullmatch(part):
                raise ValueError(f"save: a part is called {part!r}, expected letters, digits, '_', '-' and '.'")
            check_tensors(part, tensors)
        encoded = json.dumps(encode(state), allow_nan=False).encode("ascii")
        tensor_bytes = sum(nbytes(tensor) for tensors in parts.values() for tensor in tensors.values())
        needed = tensor_bytes + len(encoded) + _SLACK
        self._check_space(needed, rank)
        target = job.folder / manifest.rank_folder(rank)
        try:
            target.mkdir(exist_ok=True)
            files = {manifest.STATE: write_bytes(target / manifest.STATE, encoded)}
            for part, tensors in parts.items():
                name = f"{part}{manifest.SUFFIX}"
                files[name] = write_tensors(target / name, tensors)
            write_bytes(target / _SHARE, json.dumps(files).encode("ascii"))
            sync_folder(target)
        except OSError as error:
            raise self._explained(error, needed, rank) from error

    def _finish(
        self, job: _Job, signature: Mapping[str, Any], metrics: Mapping[str, float] | None, world_size: int
    ) -> None:
        """Rank 0's end: the manifest over all ranks' files, and the name that makes it a checkpoint."""
        files: dict[str, dict[str, Any]] = {}
        for rank in range(world_size):
            share = job.folder / f"{manifest.rank_folder(rank)}{_SHARE}"
            if not share.is_file():
                raise CheckpointError(f"{self.folder}: rank {rank} could not write its part; see its error")
            written = json.loads(share.read_bytes())
            files |= {f"{manifest.rank_folder(rank)}{name}": file for name, file in written.items()}
            share.unlink()
        earlier = self.all()
        saved = Saved(
            path=job.folder,
            step=job.step,
            sequence=earlier[-1].sequence + 1 if earlier else 0,
            run=self._run or (earlier[-1].run if earlier else uuid.uuid4().hex),
            token=job.token,
            world_size=world_size,
            signature=manifest.canonical(signature),
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            files=files,
        )
        try:
            write_bytes(job.folder / manifest.MANIFEST, manifest.manifest_bytes(saved))
            sync_folder(job.folder)
            publish(job.folder, self.folder / manifest.step_folder(job.step))
        except OSError as error:
            raise self._explained(error, _SLACK, rank=0) from error

    def _published(self, job: _Job) -> Saved:
        with suppress(CheckpointError):
            saved = manifest.read_manifest(self.folder / manifest.step_folder(job.step))
            if saved.token == job.token:
                return saved
        raise CheckpointError(f"{self.folder}: step {job.step} was not saved, since another rank failed; see its error")

    def _prune(self, newest: Saved) -> None:
        entries = self.all()
        kept = {saved.path for saved in entries[-self.keep_last :]} | {newest.path}
        best = self.best() if self.keep_best is not None else None
        if best is not None:
            kept.add(best.path)
        for saved in entries:
            if saved.path not in kept:
                remove(saved.path)

    # The disk

    def _check_space(self, needed: int, rank: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._full(needed, free, rank)

    def _explained(self, error: OSError, needed: int, rank: int) -> OSError:
        """The error itself, or where it says that the disk is full, one that says what is needed."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        return self._full(needed, shutil.disk_usage(self.folder).free, rank)

    def _full(self, needed: int, free: int, rank: int) -> OSError:
        text = (
            f"{self.folder}: the disk is full: rank {rank}'s part of a checkpoint needs {needed} bytes, {free} are "
            "free; the checkpoints before are untouched; make room, or keep fewer (keep_last)"
        )
        return OSError(errno.ENOSPC, text)


@dataclass(frozen=True)
class _Job:
    """A save on its way."""

    step: int
    token: str
    folder: Path


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


class _Together:
    """Work in step with other ranks: each `do` ends at the barrier, on a rank that has failed too, so that none waits
    for ever; the first failure is raised at the end."""

    def __init__(self, barrier: Callable[[], object]) -> None:
        self.barrier = barrier
        self.failure: Exception | None = None

    def local(self, work: Callable[[], Any]) -> Any:
        if self.failure is None:
            try:
                return work()
            except Exception as error:
                self.failure = error
        return None

    def do(self, work: Callable[[], Any]) -> Any:
        result = self.local(work)
        self.barrier()
        return result

    def finish(self) -> None:
        if self.failure is not None:
            raise self.failure
