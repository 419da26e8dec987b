"""Code that is run in a process of its own, which never imports this library: what leaves works without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from signal import Signals
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_FRAME = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
facts, tensors = json.loads(sys.stdin.read()), load_file("given.safetensors")
made = {}
%s
assert not [name for name in sys.modules if name.split(".")[0] == "twostep"]
save_file({name: tensor.contiguous() for name, tensor in made.items()}, "made.safetensors")
"""


class ExportFailed(RuntimeError):
    """What was written does not give what the student gives; nothing was left."""


def run(code: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, what: str) -> dict[str, Tensor]:
    """The tensors that the code puts into `made`, from `facts` and `tensors`.

    Args:
        what: in the error, what could not be run.
    """
    with tempfile.TemporaryDirectory() as place:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(place, "given.safetensors"))
        environment = {**os.environ, "HF_MODULES_CACHE": place}  # where diffusers puts pipeline.py to import it
        ended = subprocess.run(
            [sys.executable, "-c", _FRAME % code],
            input=json.dumps(facts),
            capture_output=True,
            text=True,
            cwd=place,
            env=environment,
            check=False,
        )
        if ended.returncode < 0:
            signal = Signals(-ended.returncode).name
            raise ExportFailed(
                f"export: {what}: the process was ended by {signal}; nothing was left. SIGKILL is most often too "
                f"little memory: the check computes in float32"
            )
        if ended.returncode:
            raise ExportFailed(f"export: {what}; nothing was left.\n{ended.stderr[-2000:]}")
        return load_file(Path(place, "made.safetensors"))


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


def hold(error: float, allowed: float, what: str, likeliest: str) -> float:
    """
    Args:
        what: is off and from what, as in "the file's weights differ from the student's".
    """
    if not error <= allowed:
        raise ExportFailed(
            f"export: {what} by a relative {error:.2e}, allowed are {allowed:.0e}; nothing was left. Likeliest is "
            f"{likeliest}"
        )
    return error
