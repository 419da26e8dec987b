"""Checkpoints and processes: a process killed at any moment leaves a good one, and several ranks save one or none.

That data reaches the disk before its name does (the order of fsync and rename) cannot be seen from here: it shows only
when the machine itself loses power.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from twostep.train.checkpoint import CheckpointError, Store

from . import saving_processes
from .saving_processes import SIGNATURE, own, parts_of, state_of

SCRIPT = Path(saving_processes.__file__)
KILLS = 16


@pytest.fixture(params=["one", "two"], ids=["replaces in one step", "replaces in two steps"])
def saver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), "killed", str(tmp_path), request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run_and_kill(saver: subprocess.Popen[str], seconds: float) -> None:
    assert saver.stdin is not None and saver.stdout is not None
    saver.stdin.write("go\n")
    saver.stdin.flush()
    child = int(saver.stdout.readline())
    time.sleep(seconds)  # not to wait for anything: a moment that nothing in the child determines
    os.kill(child, signal.SIGKILL)
    assert int(saver.stdout.readline()) == signal.SIGKILL


def test_a_killed_process_leaves_a_good_checkpoint(tmp_path: Path, saver: subprocess.Popen[str]) -> None:
    moments = random.Random(0)
    kills = last = interrupted = 0
    # On a slow disk a life may end before its first save does: more lives then, until there was something to see.
    while kills < KILLS or last < 5 or interrupted < 5:
        run_and_kill(saver, moments.uniform(0.01, 0.12))
        kills += 1
        assert kills < 20 * KILLS, "the saves make no progress, or none of the kills met one"
        interrupted += any(path.name.startswith((".tmp-", ".old-")) for path in tmp_path.iterdir())
        store = Store(tmp_path)
        assert not [path for path in tmp_path.iterdir() if not path.name.startswith("step-")]
        latest = store.latest()
        assert latest is not None or last == 0
        assert latest is None or latest.step >= last
        assert len(store.all()) == len(list(tmp_path.iterdir()))  # none is there in part
        for saved in store.all():
            loaded = store.load(saved, signature=SIGNATURE)
            again = loaded.state["again"]
            assert loaded.state == state_of(saved.step, again)
            expected = parts_of(saved.step, again)
            assert {part: set(tensors) for part, tensors in loaded.parts.items()} == {
                part: set(tensors) for part, tensors in expected.items()
            }
            for part, tensors in expected.items():
                assert all(torch.equal(loaded.parts[part][name], tensor) for name, tensor in tensors.items())
        last = 0 if latest is None else latest.step


def test_ranks_save_one_checkpoint_or_none(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "ranks", str(tmp_path)], check=True, timeout=120)
    zero, one = (json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in (0, 1))
    for name, step in (("first", 1), ("again", 1), ("second", 2), ("local", 7)):
        assert zero[name] == one[name] and zero[name][0] == step  # the same save, by its token
    for name in ("full on 0", "full on 1", "steps differ", "bad step", "sharded"):
        assert isinstance(zero[name], str) and isinstance(one[name], str)
        assert zero[f"{name}, latest"] == one[f"{name}, latest"] == 2
    assert "the disk is full: rank 0's part of a checkpoint needs" in zero["full on 0"]
    assert "step 2 was not saved, since another rank failed" in one["full on 0"]
    assert "the disk is full: rank 1's part of a checkpoint needs" in one["full on 1"]
    assert "rank 1 could not write its part" in zero["full on 1"]
    assert "asked to save step 5 while rank 0 saves step 4" in one["steps differ"]
    assert "step is -1" in zero["bad step"] and "rank 0 could not begin to save" in one["bad step"]
    for told in (zero["sharded"], one["sharded"]):
        assert "student: w is a DTensor, accepted: plain tensors; pass its to_local() or full_tensor()" in told
    check_what_the_ranks_left(tmp_path / "store")


def check_what_the_ranks_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000007"]
    names = {str(path.relative_to(folder)) for path in (folder / "step-00000002").rglob("*") if path.is_file()}
    zero = {
        f"step-00000002/{name}" for name in ("manifest.json", "state.json", "student.safetensors", "random.safetensors")
    }
    assert names == zero | {f"step-00000002/rank-0001/{name}" for name in ("state.json", "random.safetensors")}
    store = Store(folder)
    for rank in (0, 1):
        loaded = store.load(2, signature=SIGNATURE, rank=rank)
        assert loaded.state == {"rank": rank} and loaded.saved.world_size == 2
        assert set(loaded.parts) == set(own(rank, 2))
        assert torch.equal(loaded.parts["random"]["state"], torch.tensor([rank, 2]))
        assert torch.equal(store.load(7, signature=SIGNATURE, rank=rank).parts["student"]["w"], torch.ones(2) + rank)
    (folder / "step-00000002/rank-0001/random.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-0001/random\.safetensors is missing"):
        store.load(2, signature=SIGNATURE)
