"""What a run leaves in its folder, and the settings that change how it runs and not what it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from twostep.train.checkpoint import Store
from twostep.train.journal import read_events, read_metrics
from twostep.zoo import load_backbone

from . import run_server, tiny_runs
from .run_server import Server


def profiled(recipe: dict[str, Any]) -> int:
    return run_server.train(recipe, "--profile")


def earlier(recipe: dict[str, Any]) -> int:
    return run_server.train(recipe, "--checkpoint", "1")


def test_samples_evaluation_and_the_best_checkpoint(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "watch": {
            "every": 1,
            "samples_every": 2,
            "samples": 4,
            "tensorboard": True,
            "evaluate": {"every": 1, "prompts": 2, "seeds": 2, "reference": 4},
        },
        "checkpoints": {"every": 1, "keep_last": 1, "keep_best": ["frechet", "min"]},
    }
    statuses, printed = server.run(tiny_runs.recipe(place, "turbo_pp", "full", tmp_path, **changes))
    assert statuses == [0], printed
    rows = read_metrics(tmp_path)
    by_iteration = {row["iteration"]: row["evaluate/frechet"] for row in rows if "evaluate/frechet" in row}
    assert sorted(by_iteration) == [1, 2, 3, 4]
    assert {"evaluate/diversity", "evaluate/vendi", "evaluate/alignment/aligned"} <= set().union(*rows)
    assert {"samples/saturation_drift", "samples/contrast_drift", "samples/out_of_range"} <= set().union(*rows)
    watched = ("critic_lag", "logit_gap", "final_dmd_gradient_norm", "first_loss", "final_loss", "inherited_norm")
    timed = ("generator_seconds", "guidance_peak_gib", "generator_gradient_norm", "guidance_rate")
    assert all(name in rows[-1] or any(name in row for row in rows) for name in (*watched, *timed))
    sheets = sorted((tmp_path / "samples").glob("*.png"))
    assert [path.name for path in sheets] == [f"samples-{iteration:08d}.png" for iteration in (0, 2, 4)]
    drift = {row["iteration"]: row["samples/contrast_drift"] for row in rows if "samples/contrast_drift" in row}
    assert sorted(drift) == [0, 2, 4] and drift[0] == 1 and drift[2] != 1  # of the student as it began
    assert Image.open(sheets[0]).size[0] > 2 * 64
    assert list((tmp_path / "tensorboard").iterdir())
    store = Store(tmp_path / "checkpoints", keep_last=1, keep_best=("frechet", "min"))
    best = store.best()
    assert best is not None and best.step == min(by_iteration, key=lambda k: (by_iteration[k], -k))
    assert {saved.step for saved in store.all()} == {4, best.step}


def test_the_student_is_the_average_and_loads(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    statuses, printed = server.run(tiny_runs.recipe(place, "dp_dmd", "full", tmp_path))
    assert statuses == [0], printed
    facts = json.loads((tmp_path / "student" / "student.json").read_text())
    assert facts["sigmas"] == [1.0, 0.75, 0.0] and facts["steps"] == ["transformer", "transformer_2"]
    last = Store(tmp_path / "checkpoints").load(signature=None)
    for number, name in enumerate(facts["steps"]):
        network = load_backbone(tmp_path / "student", subfolder=name, dtype=torch.float32)
        for key, value in network.model.state_dict().items():
            assert torch.equal(value, last.parts["ema"][f"networks.{number}.model.{key}"]), key
    ema = last.parts["ema"]
    assert any(not torch.equal(value, last.parts["student"][name]) for name, value in ema.items())


def test_a_profile_is_written(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    recipe = tiny_runs.recipe(place, "flow_matching", "lora", tmp_path, iterations=7)
    statuses, printed = server.run(recipe, call="tests.train.test_engine:profiled")
    assert statuses == [0], printed
    trace = json.loads((tmp_path / "profile" / "rank-0.json").read_text())
    assert len(trace["traceEvents"]) > 100
    assert "norm_modulate" in (tmp_path / "profile" / "rank-0.txt").read_text()


def test_goes_on_from_an_earlier_checkpoint(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    recipe = tiny_runs.recipe(place, "flow_matching", "full", tmp_path, iterations=2)
    assert server.run(recipe)[0] == [0]
    before = read_metrics(tmp_path)
    statuses, printed = server.run(recipe, call="tests.train.test_engine:earlier")
    assert statuses == [0], printed
    assert [event["facts"] for event in read_events(tmp_path) if event["event"] == "resumed"] == [
        {"checkpoint": "step-00000001"}
    ]
    after = read_metrics(tmp_path)
    assert [row["final_loss"] for row in after] == [row["final_loss"] for row in before]


@pytest.mark.slow
def test_compiled_blocks_learn_what_others_do(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        changes: dict[str, Any] = {"iterations": 2, "compute": {"compile": compiled}}
        statuses, printed = server.run(tiny_runs.recipe(place, "dp_dmd", "lora", out, **changes), limit=1200)
        assert statuses == [0], printed
        losses.append([(row["diversity_loss"], row["fake_score_loss"]) for row in read_metrics(out)])
    for plain, compiled_row in zip(*losses, strict=True):
        assert compiled_row == pytest.approx(plain, rel=1e-3)


def test_checkpointed_blocks_learn_the_same(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    """To the bit, at float32 on one thread: the same operations, run once more."""
    rows = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        changes: dict[str, Any] = {"iterations": 2, "compute": {"checkpointing": checkpointing}}
        assert server.run(tiny_runs.recipe(place, "turbo_pp", "lora", out, **changes))[0] == [0]
        rows.append([(row["final_loss"], row["fake_score_loss"]) for row in read_metrics(out)])
    assert rows[0] == rows[1]


def test_replicas_of_shards_learn_what_shards_do(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    rows = []
    for replicas in (1, 2):
        out = tmp_path / str(replicas)
        changes: dict[str, Any] = {"iterations": 2, "parallel": {"kind": "fsdp", "replicas": replicas}}
        statuses, printed = server.run(tiny_runs.recipe(place, "turbo_pp", "lora", out, **changes), ranks=4)
        assert statuses == [0] * 4, printed
        rows.append([(row["final_loss"], row["fake_score_loss"], row["logit_gap"]) for row in read_metrics(out)])
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, rel=2e-4, abs=1e-6)
