"""A student leaves, in forms that others load; each is checked in a process that does not know this library."""

from __future__ import annotations

from .folder import export_folder
from .fresh_process import ExportFailed
from .lora import export_lora
from .original import from_original, to_original
from .program import export_onnx, export_program
from .single_file import export_single_file
from .source import Exported

__all__ = [
    "ExportFailed",
    "Exported",
    "export_folder",
    "export_lora",
    "export_onnx",
    "export_program",
    "export_single_file",
    "from_original",
    "to_original",
]
