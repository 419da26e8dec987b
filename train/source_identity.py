"""Which weights lie in a folder, told without reading all of them: a run does not go on with others.

The configuration, and of every safetensors file its size and evenly spaced pieces, header and end among them. Two
trainings of a network differ nearly everywhere, so pieces tell them apart; hashing 12 GB at each start would tell no
more. A hub's model is told by its files as well, whatever the commit.
"""

from __future__ import annotations

import hashlib

from ..zoo.place import fetched, inside

PIECES, PIECE = 64, 4096


def source_identity(model: str, subfolder: str) -> str:
    folder = fetched(model, "load_backbone", [inside(subfolder, "*.safetensors")], [inside(subfolder, "*.json")])
    place = folder / subfolder if (folder / subfolder).is_dir() else folder
    total = hashlib.sha256()
    for path in sorted(path for path in place.iterdir() if path.suffix in (".json", ".safetensors")):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(max(0, size - PIECE) * number // (PIECES - 1))
                total.update(file.read(PIECE))
    return total.hexdigest()[:32]
