"""Which weights lie in a folder: a run does not go on with others. A hub's model is told by its files as well, whatever
the commit."""

from __future__ import annotations

from ..zoo.file_identity import identity_of
from ..zoo.place import fetched, inside


def source_identity(model: str, subfolder: str) -> str:
    folder = fetched(model, "load_backbone", [inside(subfolder, "*.safetensors")], [inside(subfolder, "*.json")])
    place = folder / subfolder if (folder / subfolder).is_dir() else folder
    return identity_of(path for path in place.iterdir() if path.suffix in (".json", ".safetensors"))
