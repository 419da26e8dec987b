"""Writes safetensors files in one pass: every byte goes to the disk and to the checksum at once, one tensor at a time.

safetensors' own writer builds the whole file in memory first. The format is 8 bytes of header length (little endian), a
JSON header {name: {dtype, shape, data_offsets}}, and the tensors without gaps. As the official writer does, tensors are
ordered by falling size of element, so that each is aligned, and the header is padded to a multiple of 8.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 16 << 20


class Digested:
    """A file being written: its size and sha256 are known when it is closed, and it is on the disk by then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115 - `finish` closes it

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            self._hash.update(chunk)
            while len(chunk):  # an unbuffered write may take less than it is given
                chunk = chunk[self._file.write(chunk) :]
        self.size += len(view)

    def finish(self) -> dict[str, int | str]:
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


def check_tensors(part: str, tensors: Mapping[str, Tensor]) -> None:
    """TypeError or ValueError for what a file cannot hold as it is."""
    for name, tensor in tensors.items():
        where = f"checkpoint: {part}: {name}"
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"{where}: the name is taken or no text; use another")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{where} is a DTensor, accepted: plain tensors; pass its to_local() or full_tensor()")
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{where} is a {type(tensor).__name__}, accepted: plain tensors")
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise ValueError(f"{where} is on {tensor.device} with layout {tensor.layout}, accepted: dense, with values")
        if tensor.dtype not in DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{where} has dtype {tensor.dtype}, accepted: {accepted}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Writes `tensors` and returns the file's size and sha256; the file is on the disk."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    end = 0
    for name in order:
        start, end = end, end + nbytes(tensors[name])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode("utf-8")
    head += b" " * (-len(head) % 8)
    file = Digested(path)
    try:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            if tensors[name].numel():
                file.write(_bytes_of(tensors[name]))
        return file.finish()
    finally:
        file.abandon()


def write_bytes(path: Path, data: bytes) -> dict[str, int | str]:
    file = Digested(path)
    try:
        file.write(data)
        return file.finish()
    finally:
        file.abandon()


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def digest(path: Path) -> str:
    """The file's sha256."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
