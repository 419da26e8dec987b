"""Saved activations wait for their backward in host memory instead of on the device.

`stash` takes what autograd saves while it is entered (of a checkpointed model: the inputs of its blocks) to pinned host
memory on a stream of its own, and brings it back on another, ahead of the backward that asks for it. Nothing waits on
the host. PyTorch's torch.autograd.graph.save_on_cpu does the same in the middle of the computation, copy by copy.

What keeps it right, step by step:

    saved     the copy out waits for the stream that made the activation. The activation's memory is held until that
              stream has been told to wait for the copy, two activations later, and is then free in its order. Marking
              it as in use elsewhere (record_stream) would hold it until the copy is seen to be done, and a host that
              runs ahead of the device sees none done before the whole forward is queued
    buffers   a host buffer is reused only behind the last copy out of it
    fetched   the copy back waits for the copy out, and for what was on the stream when its memory was allocated there
    unpacked  the stream that runs the backward waits for the copy back, and its memory too is free in its order
    changed   an activation that is modified in place after it was saved is the error in backward that it is without

Storages are moved, not tensors: a storage that several views share goes once, bytes as they are, so a tensor comes back
with its values, strides and offset, and whatever reads it rounds as it would have. A storage held by a saved view is
what autograd would have kept on the device, so nothing is moved in vain.

On the CPU the same code runs with plain copies to ordinary host memory: it saves nothing there, and is what the tests
of order, reuse and lifetime run on. Not inside a CUDA graph: a capture can neither wait for the host's buffers nor
allocate them, and stash raises there.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

# Bytes of a host buffer that one may waste to reuse it: batches of other lengths share buffers, and no buffer is held
# for something half its size.
SLACK = 1.25

# Storages on their way out at a time: while one is copied, the next may be made. The computation waits for the link
# where it saves faster than that.
LEAVING = 2


class Lane(Protocol):
    """How bytes move between one device and the host. Copies are the lane's own tokens; None is one long past."""

    def empty_host(self, nbytes: int) -> Tensor: ...

    def store(self, source: Tensor, host: Tensor, after: Any) -> Any:
        """Copies to the host, once `after` and what made the source are done."""

    def free(self, copy: Any, source: Tensor) -> None:
        """The source may go: the stream that saved it goes on only when the copy out of it is done."""

    def load(self, host: Tensor, after: Any) -> tuple[Tensor, Any]:
        """Copies to a new tensor on the device, once `after` is done."""

    def wait(self, copy: Any, buffer: Tensor) -> None:
        """What runs next on this thread's stream finds the copy done, and may use the buffer."""

    def drop(self, copy: Any, t: Tensor) -> None:
        """The tensor may go, which the copy reads or writes and nobody has waited for: held back until it is done."""


class _HostLane:
    """Plain copies, done when they return."""

    def empty_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def store(self, source: Tensor, host: Tensor, after: Any) -> Any:
        host.copy_(source)

    def free(self, copy: Any, source: Tensor) -> None:
        pass

    def load(self, host: Tensor, after: Any) -> tuple[Tensor, Any]:
        return host.clone(), None

    def wait(self, copy: Any, buffer: Tensor) -> None:
        pass

    def drop(self, copy: Any, t: Tensor) -> None:
        pass


@dataclass
class _CudaCopy:
    by: torch.cuda.Stream
    done: torch.cuda.Event
    beside: torch.cuda.Stream  # the stream of the computation that asked for it


class _CudaLane:
    """Copies on two streams of their own, one each way: the link to the host carries both at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out = torch.cuda.Stream(device)
        self.back = torch.cuda.Stream(device)

    def _copy(self, by: torch.cuda.Stream, to: Tensor, source: Tensor, after: _CudaCopy | None) -> _CudaCopy:
        beside = torch.cuda.current_stream(self.device)
        by.wait_stream(beside)
        if after is not None:
            by.wait_event(after.done)
        with torch.cuda.stream(by):
            to.copy_(source, non_blocking=True)
        return _CudaCopy(by, by.record_event(), beside)

    def empty_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def store(self, source: Tensor, host: Tensor, after: Any) -> Any:
        return self._copy(self.out, host, source, after)

    def free(self, copy: Any, source: Tensor) -> None:
        copy.beside.wait_event(copy.done)

    def load(self, host: Tensor, after: Any) -> tuple[Tensor, Any]:
        # The memory comes from the current stream's pool, where earlier work may still use it: the copy starts behind
        # that. It runs beside whatever the current stream is given next.
        buffer = torch.empty(host.numel(), dtype=torch.uint8, device=self.device)
        return buffer, self._copy(self.back, buffer, host, after)

    def wait(self, copy: Any, buffer: Tensor) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copy.done)
        if stream != copy.beside:  # the memory belongs to the stream that sent for it
            buffer.record_stream(stream)

    def drop(self, copy: Any, t: Tensor) -> None:
        if not copy.done.query():
            t.record_stream(copy.by)


def _lane(device: torch.device) -> Lane:
    return _CudaLane(device) if device.type == "cuda" else _HostLane()


class _Pool:
    """Host buffers between uses, each with the last copy in or out of it, the longest unused first."""

    def __init__(self) -> None:
        self.free: dict[torch.device, list[tuple[Tensor, Any]]] = {}

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() for buffers in self.free.values() for buffer, _ in buffers)

    def put(self, device: torch.device, buffer: Tensor, last_copy: Any) -> None:
        self.free.setdefault(device, []).append((buffer, last_copy))

    def take(self, device: torch.device, nbytes: int) -> tuple[Tensor, Any] | None:
        """The smallest buffer that is large enough and not much too large."""
        buffers = self.free.get(device, [])
        fitting = [i for i, (b, _) in enumerate(buffers) if nbytes <= b.numel() <= SLACK * nbytes]
        return buffers.pop(min(fitting, key=lambda i: buffers[i][0].numel())) if fitting else None

    def drop(self, nbytes: int) -> None:
        """Gives up buffers until so many bytes are free, or none are left. One is out of use by then, or PyTorch's
        own pinned allocator, which saw the copies, holds it back until it is."""
        for buffers in self.free.values():
            while buffers and nbytes > 0:
                nbytes -= buffers.pop(0)[0].numel()


class _Entry:
    """The bytes of one storage as they were when it was saved: on the host, and for a while on the device again."""

    def __init__(self, owner: Stash, device: torch.device, nbytes: int, host: Tensor, after: Any) -> None:
        self.owner, self.device, self.nbytes = owner, device, nbytes
        self.host, self.last_copy = host, after
        self.fetched: Tensor | None = None
        self.arrived: Any = None  # the copy that brings it
        self.handles = 0  # saved tensors that are views of it
        self.wanted = 0  # of these, how many have yet to take the bytes that were fetched
        self.order = 0

    def store(self, source: Tensor) -> None:
        lane = self.owner._lane_of(self.device)
        self.last_copy = lane.store(source, self.host[: self.nbytes], self.last_copy)
        self.owner._leaving.append((lane, self.last_copy, source))

    def fetch(self) -> None:
        if self.fetched is None:
            lane = self.owner._lane_of(self.device)
            self.fetched, self.arrived = lane.load(self.host[: self.nbytes], self.last_copy)
            self.last_copy, self.wanted = self.arrived, self.handles

    def take(self) -> Tensor:
        """The bytes on the device, ready to use; kept there until every saved view has had them."""
        self.fetch()
        buffer = self.fetched
        assert buffer is not None
        self.owner._lane_of(self.device).wait(self.arrived, buffer)
        self.wanted -= 1
        if self.wanted <= 0:
            self.fetched = None
        return buffer

    def __del__(self) -> None:
        if self.fetched is not None:
            self.owner._lane_of(self.device).drop(self.arrived, self.fetched)
        self.owner._released(self)


class _Handle:
    """What autograd holds in the place of a saved tensor."""

    def __init__(self, entry: _Entry, t: Tensor) -> None:
        self.entry, self.dtype = entry, t.dtype
        self.size, self.stride, self.offset = t.size(), t.stride(), t.storage_offset()
        self.version = _Version.without_memory(t)
        entry.handles += 1

    def __del__(self) -> None:
        self.entry.handles -= 1

    def tensor(self, storage_bytes: Tensor) -> Tensor:
        made = torch.empty(0, dtype=self.dtype, device=storage_bytes.device)
        return made.set_(storage_bytes.untyped_storage(), self.offset, self.size, self.stride)


class _Version:
    """A tensor's version, and a counter that still counts when the tensor's memory is gone: autograd itself looks at
    neither once hooks are in place, and a tensor changed after it was saved must not give a wrong gradient."""

    def __init__(self, t: Tensor, counter: Tensor) -> None:
        self.saved, self.shape = t._version, list(t.shape)
        self.counter = counter  # shares t's count of changes

    @classmethod
    def without_memory(cls, t: Tensor) -> _Version:
        counter = t.detach()
        counter.data = torch.empty(0, dtype=t.dtype, device=t.device)
        return cls(t, counter)

    def check(self) -> None:
        if self.counter._version != self.saved:
            raise RuntimeError(
                "stash: one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: shape {self.shape} is at version {self.counter._version}; expected version {self.saved}"
            )


class _Kept:
    """A saved tensor that stays where it is. Without its graph unless it is a leaf: autograd adds that again, and a
    tensor that a graph holds must not hold the graph."""

    def __init__(self, t: Tensor) -> None:
        self.tensor = t if t.is_leaf else t.detach()
        self.version = _Version(t, self.tensor)


class Stash:
    """A context manager: see `stash`. May be entered again, also while it is, and its buffers serve every time."""

    def __init__(self, min_bytes: int, ahead: int, keep: Iterable[Tensor]) -> None:
        self.min_bytes, self.ahead = min_bytes, ahead
        self.bytes = 0
        self.peak_bytes = 0
        self._keep = list(keep)  # holds them, so that no other storage takes the address of one
        self._keep_storages = {t.untyped_storage()._cdata for t in self._keep}
        self._lanes: dict[torch.device, Lane] = {}
        self._pool = _Pool()
        self._known: dict[int, tuple[StorageWeakRef, int, weakref.ref[_Entry]]] = {}
        self._entries: list[weakref.ref[_Entry]] = []  # in the order in which they were saved
        self._leaving: deque[tuple[Lane, Any, Tensor]] = deque()  # copies out, and what they read
        self._hooks: list[saved_tensors_hooks] = []
        self._lock = threading.RLock()  # autograd has a thread a device, and each may free what another saved
        self._warned = False

    @property
    def pooled_bytes(self) -> int:
        """Bytes of host buffers that wait to be used again."""
        return self._pool.bytes

    def release(self) -> None:
        """Gives the buffers that are not in use back to the system."""
        with self._lock:
            self._pool.drop(self._pool.bytes)

    def __enter__(self) -> Stash:
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.pop().__exit__()
        with self._lock:
            while self._leaving:
                lane, copy, source = self._leaving.popleft()
                lane.drop(copy, source)

    def _lane_of(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = _lane(device)
        return self._lanes[device]

    def _stays(self, t: Tensor) -> bool:
        if type(t) is not Tensor or t.layout != torch.strided or t.device.type not in ("cpu", "cuda"):
            return True  # parameters; and sharded, quantised or fake tensors, whose bytes are elsewhere
        if (t.is_leaf and t.requires_grad) or isinstance(t._base, torch.nn.Parameter):
            return True
        if t.is_conj() or t.is_neg():  # their bytes do not say so
            return True
        storage = t.untyped_storage()
        return storage.nbytes() < max(self.min_bytes, 1) or storage._cdata in self._keep_storages

    def _pack(self, t: Tensor) -> _Handle | _Kept:
        if self._stays(t):
            return _Kept(t)
        if t.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("stash: CUDA graphs are not supported; capture without it, or run this part eagerly")
        with self._lock:
            entry = self._entry_of(t)
            return _Kept(t) if entry is None else _Handle(entry, t)

    def _entry_of(self, t: Tensor) -> _Entry | None:
        """The entry of t's storage, new unless it has one as it is; None where the host has no memory for it."""
        storage = t.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None:
            same, version, reference = known
            found = reference()
            if found is not None and not same.expired() and version == t._version:
                return found
        nbytes, device = storage.nbytes(), t.device
        buffer = self._pool.take(device, nbytes)
        if buffer is None:
            # Never more in all than was in use at once before.
            self._pool.drop(self.bytes + nbytes + self._pool.bytes - max(self.peak_bytes, self.bytes + nbytes))
            try:
                buffer = self._lane_of(device).empty_host(nbytes), None
            except (RuntimeError, MemoryError) as error:
                self._say_full(nbytes, error)
                return None
        entry = _Entry(self, device, nbytes, *buffer)
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        entry.store(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))
        while len(self._leaving) > LEAVING:
            lane, copy, source = self._leaving.popleft()
            lane.free(copy, source)
        while self._entries and self._entries[-1]() is None:
            self._entries.pop()
        entry.order = len(self._entries)
        self._entries.append(weakref.ref(entry))
        self._known[storage._cdata] = (StorageWeakRef(storage), t._version, weakref.ref(entry))
        return entry

    def _say_full(self, nbytes: int, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"stash: no host memory for another {nbytes} bytes beside {self.bytes} ({first}); activations that do "
                "not fit stay on the device",
                RuntimeWarning,
                stacklevel=2,
            )

    def _unpack(self, packed: _Handle | _Kept) -> Tensor:
        packed.version.check()
        if isinstance(packed, _Kept):
            return packed.tensor
        with self._lock:
            made = packed.tensor(packed.entry.take())
            self._fetch_before(packed.entry.order)
        return made

    def _fetch_before(self, order: int) -> None:
        """Sends for what was saved before: the backward comes to it next."""
        left = self.ahead
        while left > 0 and order > 0:
            order -= 1
            entry = self._entries[order]()
            if entry is not None:
                entry.fetch()
                left -= 1

    def _released(self, entry: _Entry) -> None:
        with self._lock:
            self.bytes -= entry.nbytes
            self._pool.put(entry.device, entry.host, entry.last_copy)
            if not self.bytes:
                self._known.clear()


def stash(*, min_bytes: int = 1 << 20, ahead: int = 2, keep: Iterable[Tensor] = ()) -> Stash:
    """A context manager: what autograd saves inside waits for its backward in host memory.

        held = ops.stash(keep=model.parameters())
        for batch in batches:
            with held:
                loss = model(batch)      # blocks under torch.utils.checkpoint: their inputs leave the device
            loss.backward()              # and come back in time

    Gradients are the same bits as without it; but a storage that is saved again while it waits is taken for the same
    one if its version is, so that what is rewritten past PyTorch, through NumPy or `.data`, is not noticed. Host
    buffers are pinned and serve every iteration; `held.bytes` is what is held at the moment, `held.peak_bytes` the most
    so far, `held.pooled_bytes` what waits to be used again.

    Args:
        min_bytes: a storage smaller than this stays. A copy costs two launches and two events each way, and one of less
            than a mebibyte frees too little for that.
        ahead: how many storages are sent for ahead of the one that the backward asks for: so many and one more are on
            the device at a time.
        keep: tensors whose storages stay, and views of them. Parameters stay anyway.

    Raises inside a CUDA graph's capture. Function transforms (torch.func) have no saved tensors and refuse any hooks.
    """
    for name, value, least in (("min_bytes", min_bytes, 0), ("ahead", ahead, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"stash: {name} is {type(value).__name__}, expected an int")
        if value < least:
            raise ValueError(f"stash: {name} is {value}, expected at least {least}")
    kept = list(keep)
    for i, t in enumerate(kept):
        if not isinstance(t, Tensor):
            raise TypeError(f"stash: keep[{i}] is {type(t).__name__}, expected a torch.Tensor")
    return Stash(min_bytes, ahead, kept)
