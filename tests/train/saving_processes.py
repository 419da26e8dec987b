"""Processes that save checkpoints, for test_checkpoint_processes; forked from one that has imported torch.

python saving_processes.py killed FOLDER one|two     for each line of input: a child that saves until it is killed
python saving_processes.py ranks FOLDER              two gloo ranks that save together, and fail in several ways
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from twostep import durable
from twostep.train import checkpoint
from twostep.train.checkpoint import Store

SIGNATURE = {"test": "processes"}


def parts_of(step: int, again: int = 0) -> dict[str, dict[str, Tensor]]:
    """What a step must hold; one that is saved again holds something else."""
    return {
        "student": {"w": torch.arange(1000.0) * step + again, "b": torch.tensor([step, -step])},
        "optimizer": {"m": torch.full((50, 7), 1.0 / step + again, dtype=torch.bfloat16)},
    }


def state_of(step: int, again: int = 0) -> dict[str, Any]:
    return {"step": step, "again": again, "square": step * step, "third": step / 3}


def save_for_ever(folder: Path, way: str) -> None:
    if way == "two":
        durable._exchange = lambda one, other: False
    store = Store(folder, keep_last=2)
    latest = store.latest()
    step = 1 if latest is None else latest.step + 1
    while True:
        for again in range(1 + step % 2):  # every other step is saved twice, so that kills meet replacements too
            store.save(step, parts_of(step, again), state_of(step, again), signature=SIGNATURE)
        step += 1


def killed(folder: Path, way: str) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            save_for_ever(folder, way)
        print(child, flush=True)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)


def own(rank: int, step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "random": {"state": torch.tensor([rank, step])},
        **({"student": parts_of(step)["student"]} if rank == 0 else {}),
    }


def rank_process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    store = Store(folder / "store")
    results: dict[str, Any] = {}

    def attempt(name: str, step: int, parts: dict[str, Any], **changes: Any) -> None:
        arguments = {"signature": SIGNATURE, "rank": rank, "world_size": 2, "barrier": dist.barrier, **changes}
        try:
            saved = store.save(step, parts, {"rank": rank}, **arguments)
            results[name] = [saved.step, saved.token]
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        latest = store.latest()
        results[f"{name}, latest"] = None if latest is None else latest.step
        dist.barrier()

    attempt("first", 1, own(rank, 1))
    attempt("again", 1, own(rank, 1))
    attempt("second", 2, own(rank, 2))
    for failing in (0, 1):
        fails_on_rank(failing, rank, lambda n=failing: attempt(f"full on {n}", 2, own(rank, 3)))
    attempt("steps differ", 4 + rank, own(rank, 4))
    attempt("bad step", -1, own(rank, 4))
    mesh = dist.init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    attempt("sharded", 6, {"student": {"w": sharded}})
    attempt("local", 7, {"student": {"w": sharded.to_local() + rank}})
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def fails_on_rank(failing: int, rank: int, work: Callable[[], None]) -> None:
    def full(path: Path, tensors: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = checkpoint.write_tensors
    if rank == failing:
        checkpoint.write_tensors = full  # type: ignore[assignment]
    work()
    checkpoint.write_tensors = real


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    if sys.argv[1] == "killed":
        killed(folder, sys.argv[3])
    else:
        torch.multiprocessing.start_processes(rank_process, (folder,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
