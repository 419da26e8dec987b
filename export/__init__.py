"""A student leaves: as a folder that stock diffusers loads, checked in a process that does not know this library."""

from __future__ import annotations

from .folder import ExportFailed, export_folder

__all__ = ["ExportFailed", "export_folder"]
