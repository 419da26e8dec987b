"""What a run leaves: the student's networks as diffusers has them, or its adapters, under `student/`.

full    transformer/ (and transformer_2/, ... where steps have parameters of their own): config.json and safetensors,
        which `load_backbone(folder, subfolder=...)` and diffusers load
lora    step_1.safetensors, ...: the tensors of each adapter, by PEFT's names
student.json    sigmas, which network each step runs, the pipeline, adapters' settings and base, and the recipe
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..durable import publish, temporary
from ..zoo import AdapterView, Backbone
from ..zoo.saved_student import FACTS, student_folder
from .configuration import resolved
from .journal import read_events
from .methods import Cast, FlowMatchingConfig
from .ranks import Ranks
from .recipe import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_student(recipe: Recipe, cast: Cast, ranks: Ranks, iteration: int) -> Path:
    """Writes the student as it is now; every rank calls it, rank 0 writes. The folder is whole or not there."""
    networks = cast.student.distinct_networks()
    names = [_name(network, number) for number, network in enumerate(networks, start=1)]
    states = [_whole(network, ranks) for network in networks]
    folder = recipe.out / "student"
    if ranks.first:
        steps = [names[networks.index(network)] for network in cast.student.networks]  # type: ignore[arg-type]
        role = recipe.roles.student
        facts: dict[str, Any] = {"sigmas": cast.student.sigmas, "steps": steps, "method": recipe.method.kind}
        facts |= {"iteration": iteration, "pipeline": _place(recipe.model)}
        began = [_place(role.source or recipe.model), role.subfolder]
        method = recipe.method
        if isinstance(method, FlowMatchingConfig) and role.steps == 1:
            facts["sampler"] = {"steps": method.sample_steps, "guidance": method.sample_guidance}
        if role.weights == "lora":
            alpha = 2 * role.rank if role.alpha is None else role.alpha
            facts |= {"base": began, "rank": role.rank, "alpha": alpha}
            facts["base_weights"] = networks[0].base_weights
        else:
            facts["began_as"] = began
        facts["recipe"] = resolved(recipe)
        with temporary(recipe.out, "student") as new:
            for name, network, state in zip(names, networks, states, strict=True):
                _write(new, name, network, state)
            (new / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            publish(new, folder)
    ranks.barrier("for the student to be written")
    return folder


def written_at(folder: Path) -> int | None:
    """The iteration of the student that is there."""
    path = folder / FACTS
    found: int | None = json.loads(path.read_text(encoding="utf-8")).get("iteration") if path.is_file() else None
    return found


def finished(run: Path) -> bool:
    """Whether its student is of its last iteration: one that was extended and stopped still has the earlier one."""
    events = read_events(run)
    return bool(events) and events[-1]["event"] == "finished"


def gone_on(model: str | Path) -> str | None:
    """What is to be said of a student whose run has gone on since; None of any other model."""
    folder = student_folder(model)
    events = [] if folder is None else read_events(folder.parent)
    if folder is None or not events or finished(folder.parent):
        return None
    last = max((event["iteration"] for event in events if "undone" not in event), default=0)
    return (
        f"note: {folder.parent} has gone on to iteration {last}, and its student is still that of "
        f"{written_at(folder)}: the same train command finishes it"
    )


def _place(model: str) -> str:
    """Found again from any working directory."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _name(network: Backbone, number: int) -> str:
    if isinstance(network, AdapterView):
        assert network.adapter is not None
        return network.adapter
    return "transformer" if number == 1 else f"transformer_{number}"


def _whole(network: Backbone, ranks: Ranks) -> dict[str, Tensor]:
    """The state dict on rank 0's CPU, gathered from the shards tensor by tensor; other ranks help and keep nothing."""
    state = network.state_dict() if isinstance(network, AdapterView) else network.model.state_dict()
    kept = {}
    with torch.no_grad():
        for name, tensor in state.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.first:
                kept[name] = whole.detach().cpu().contiguous()
    return kept


def _write(folder: Path, name: str, network: Backbone, state: dict[str, Tensor]) -> None:
    if isinstance(network, AdapterView):
        save_file(state, folder / f"{name}.safetensors")
        return
    target = folder / name
    target.mkdir()
    network.model.save_config(target)
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
