"""The store of checkpoints: whole or not there, verified, kept as asked, refused with a reason."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twostep import durable
from twostep.train import checkpoint, tensor_file
from twostep.train.checkpoint import CheckpointError, Store

SIGNATURE = {"model": {"width": 128, "depth": 2}, "dtype": "float32"}


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "student": {"w": torch.full((4, 5), float(step)), "n": torch.tensor(step)},
        "ema": {"w": torch.ones(3) * step},
    }


def save(store: Store, step: int, **others: Any) -> Path:
    return store.save(step, parts(step), {"step": step}, **{"signature": SIGNATURE, **others}).path


def steps(store: Store) -> list[int]:
    return [saved.step for saved in store.all()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_loads_what_was_saved(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b", run="r1")
    state = {"losses": [math.inf, -0.0, None, (1, "x")], "by step": {3: True}}
    saved = store.save(1200, parts(1200), state, signature=SIGNATURE, metrics={"fid": 2})
    assert saved.path == tmp_path / "a/b/step-00001200"
    assert {p.name for p in saved.path.iterdir()} == {
        "student.safetensors",
        "ema.safetensors",
        "state.json",
        "manifest.json",
    }
    for chosen in (None, 1200, saved.path, saved):
        loaded = Store(tmp_path / "a" / "b").load(chosen, signature=SIGNATURE)
        assert (loaded.step, loaded.state) == (1200, state)
        assert {part: set(tensors) for part, tensors in loaded.parts.items()} == {"student": {"w", "n"}, "ema": {"w"}}
        assert all(torch.equal(t, loaded.parts[p][n]) for p, ts in parts(1200).items() for n, t in ts.items())
    assert (saved.run, saved.metrics, saved.world_size, saved.signature) == ("r1", {"fid": 2.0}, 1, SIGNATURE)
    assert set(store.load(signature=None, only=["ema"]).parts) == {"ema"}
    assert [p.name for p in store.folder.iterdir()] == ["step-00001200"]


def test_an_empty_store_has_no_latest(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.latest() is None and store.all() == []
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        store.load(signature=SIGNATURE)
    assert not (tmp_path / "none").exists()


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    save(Store(tmp_path), 1)
    save(Store(tmp_path), 2)
    first, second = Store(tmp_path).all()
    assert first.run == second.run != ""


# What is kept


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=2, keep_best=("fid", "min"))
    for step, fid in enumerate([5.0, 1.0, 1.0, math.nan, 7.0, 6.0]):
        save(store, step, metrics={"fid": fid})
    assert steps(store) == [2, 4, 5]  # the later of equals; nan is never best
    best = store.best()
    assert best is not None and best.step == 2
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000004", "step-00000005"]
    highest = Store(tmp_path, keep_best=("fid", "max")).best()
    assert highest is not None and highest.step == 4
    assert Store(tmp_path, keep_best=("other", "max")).best() is None


def test_the_best_is_none_that_was_gone_back_over(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=1, keep_best=("fid", "min"))
    for step, fid in ((2, 5.0), (6, 1.0), (3, 4.0)):  # from 2 once more, by another way
        save(store, step, metrics={"fid": fid})
    best = store.best()
    assert best is not None and best.step == 3 and steps(store) == [3]


def test_after_a_return_to_an_earlier_step_the_last_save_is_the_latest(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=2)
    for step in (100, 200, 300, 150):
        save(store, step)
        latest = store.latest()
        assert latest is not None and latest.step == step
    assert steps(store) == [300, 150]


@pytest.mark.parametrize("arguments", [{"keep_last": 0}, {"keep_last": True}, {"keep_best": ("fid", "low")}])
def test_says_what_a_store_accepts(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keep_\w+ is .*, expected"):
        Store(tmp_path, **arguments)


# Replacing


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_saving_a_step_again_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    store = Store(tmp_path)
    save(store, 1)
    store.save(1, {"other": {"x": torch.ones(2)}}, "again", signature=SIGNATURE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    loaded = store.load(signature=SIGNATURE)
    assert loaded.state == "again" and set(loaded.parts) == {"other"}


def test_a_death_while_replacing_in_two_steps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    store = Store(tmp_path)
    before = contents(save(store, 1))
    with monkeypatch.context() as patch:
        real, calls = os.rename, []

        def dies(a: Path, b: Path) -> None:
            calls.append(a)
            if len(calls) == 2:
                raise SystemExit
            real(a, b)

        patch.setattr(os, "rename", dies)
        with pytest.raises(SystemExit):
            save(store, 1)
    assert not (tmp_path / "step-00000001").exists()
    assert contents(Store(tmp_path).load(signature=SIGNATURE).saved.path) == before
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".old-step-00000001")
    Store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


# Leftovers


def test_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    save(Store(tmp_path), 1)
    dead, alive = tmp_path / ".tmp-step-00000002-1", tmp_path / ".tmp-step-00000003-2"
    for folder in (dead, alive):
        (folder / "rank-0001").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with durable.locked(alive) as held:
        assert held
        Store(tmp_path)
        assert not dead.exists() and alive.exists()
    Store(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-00000001"]


# A full disk


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, keep_last=1)
    before = contents(save(store, 1))
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *a: pytest.fail("written"))
    big = {"student": {"w": torch.zeros(1000, 1000)}}
    with pytest.raises(
        OSError, match=r"the disk is full: rank 0's part of a checkpoint needs (\d+) bytes, 1234 are free"
    ) as caught:
        store.save(2, big, None, signature=SIGNATURE)
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    assert caught.value.errno == errno.ENOSPC and 4_000_000 <= needed < 6_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and contents(tmp_path / "step-00000001") == before


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_that_fills_while_writing_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, step: int
) -> None:
    store = Store(tmp_path, keep_last=1)
    before = contents(save(store, 1))
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"the disk is full: rank 0's part of a checkpoint needs \d+ bytes, \d+ are free; the checkpoints"
    ):
        save(store, step)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and contents(tmp_path / "step-00000001") == before


def test_a_write_that_fails_is_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    save(store, 1)

    def broken(self: Any, data: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensor_file.Digested, "write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        save(store, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


# Refusals


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lower_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))


def change_run(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (cut, "student.safetensors", r"student\.safetensors is truncated: it has \d+ bytes, \d+ were written"),
        (flip, "student.safetensors", r"student\.safetensors is damaged: its checksum does not match"),
        (flip, "state.json", r"state\.json is damaged: its checksum does not match"),
        (Path.unlink, "ema.safetensors", r"ema\.safetensors is missing"),
        (Path.unlink, "manifest.json", r"not a checkpoint of twostep: it has no manifest\.json"),
        (cut, "manifest.json", r"manifest\.json is damaged"),
        (change_run, "manifest.json", r"manifest\.json is damaged: its checksum does not match"),
        (lambda path: path.write_text("{}"), "manifest.json", "not a checkpoint of twostep: .* has format None"),
        (lambda path: path.write_text("[]"), "manifest.json", "not a checkpoint of twostep: .* holds no mapping"),
        (lower_version, "manifest.json", "has format version 7, this twostep reads 1; use the twostep that wrote it"),
    ],
)
def test_refuses_what_is_damaged_and_offers_the_one_before(
    tmp_path: Path, damage: Any, name: str, message: str
) -> None:
    store = Store(tmp_path)
    good = save(store, 1)
    damage(save(store, 2) / name)
    for chosen in (None, 2, tmp_path / "step-00000002"):
        with pytest.raises(CheckpointError, match=f"step-00000002: .*{message}.*; the last good checkpoint is {good}$"):
            store.load(chosen, signature=SIGNATURE)
    complete = name.startswith(("student", "state")) and damage is flip
    latest = store.latest()
    assert latest is not None and latest.step == (2 if complete else 1)
    flip(good / "student.safetensors")
    with pytest.raises(CheckpointError, match="there is no other good checkpoint"):
        store.load(2, signature=SIGNATURE)


def test_refuses_a_renamed_folder_but_takes_a_copy_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    shutil.copytree(save(store, 1), tmp_path / "best so far")
    assert store.load(tmp_path / "best so far", signature=SIGNATURE).step == 1
    (tmp_path / "run/step-00000001").rename(tmp_path / "run/step-00000009")
    with pytest.raises(CheckpointError, match="step-00000009: holds step 1; it was renamed"):
        store.load(9, signature=SIGNATURE)
    with pytest.raises(CheckpointError, match="step-00000004: there is no such folder"):
        store.load(4, signature=SIGNATURE)


def test_refuses_what_belongs_to_something_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 1, signature={**SIGNATURE, "ranks": (1, 2)})
    save(store, 2, signature={"model": {"width": 64}, "dtype": "float32", "lora": 1})
    expected = {**SIGNATURE, "lora": True, "ranks": [1, 2]}
    with pytest.raises(CheckpointError) as caught:
        store.load(signature=expected)
    assert str(caught.value) == (
        f"{tmp_path}/step-00000002: belongs to something else: model.width: 64 in the checkpoint, 128 now; "
        "model.depth: absent in the checkpoint, 2 now; lora: 1 in the checkpoint, True now; "
        f"ranks: absent in the checkpoint, [1, 2] now; there is no other good checkpoint in {tmp_path}"
    )
    with pytest.raises(CheckpointError, match=r"the last good checkpoint is .*step-00000001"):
        store.load(signature={**SIGNATURE, "ranks": [1, 2]})
    assert store.load(1, signature={**SIGNATURE, "ranks": [1, 2]}).step == 1


def test_asks_only_for_what_is_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match="has no part teacher; it has student, ema"):
        store.load(signature=SIGNATURE, only=["teacher"])
    with pytest.raises(CheckpointError, match="has no rank 1; it was saved by 1"):
        store.load(signature=SIGNATURE, rank=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": -1}, ValueError, "step is -1, expected a whole number"),
        ({"step": True}, ValueError, "step is True"),
        ({"parts": {"../x": {}}}, ValueError, r"a part is called '\.\./x', expected letters"),
        ({"parts": {"a": {"__metadata__": torch.ones(1)}}}, ValueError, "a: __metadata__: the name is taken"),
        ({"parts": {"a": {"x": torch.ones(1, device="meta")}}}, ValueError, "a: x is on meta"),
        ({"parts": {"a": {"x": torch.ones(1).to_sparse()}}}, ValueError, "a: x is on cpu with layout torch.sparse_coo"),
        ({"parts": {"a": {"x": torch.ones(1).to(torch.complex128)}}}, TypeError, "a: x has dtype torch.complex128"),
        ({"parts": {"a": {"x": [1.0]}}}, TypeError, "a: x is a list, accepted: plain tensors"),
        ({"state": {"x": torch.ones(1)}}, TypeError, "x is a torch.Tensor, which JSON cannot hold"),
        ({"signature": {"x": {1}}}, TypeError, "x is a set"),
        ({"world_size": 2}, ValueError, "rank 0 of 2, barrier None; several ranks need a barrier"),
        ({"rank": 1}, ValueError, "rank 1 of 1"),
    ],
)
def test_says_what_cannot_be_saved(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    store = Store(tmp_path)
    save(store, 1)
    arguments = {"step": 2, "parts": parts(2), "state": None, "signature": SIGNATURE, **change}
    with pytest.raises(error, match=message):
        store.save(**arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_manifest_is_plain_json_with_the_checksums(tmp_path: Path) -> None:
    folder = save(Store(tmp_path), 1)
    told = json.loads((folder / "manifest.json").read_text())
    assert (told["format"], told["version"], told["step"], told["world_size"]) == ("twostep-checkpoint", 1, 1, 1)
    for name, file in told["files"].items():
        assert file == {"bytes": (folder / name).stat().st_size, "sha256": tensor_file.digest(folder / name)}
