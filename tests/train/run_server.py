"""Starts training runs in fresh processes without paying for the imports each time.

python -m tests.train.run_server, from the repository's root. A line of JSON on stdin starts one run, on one or several
ranks, each a fork of this process, which has imported everything and computed nothing; a line of JSON on stdout says
how each rank ended. {"recipe": {...}, "ranks": 2, "kill_after": .5, "call": "module:function"}
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KILLED = -int(signal.SIGKILL)


class Server:
    """The other end: what tests use."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.run_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        recipe: dict[str, Any],
        *,
        ranks: int = 1,
        kill_after: float | None = None,
        send: tuple[int, str] | None = None,
        call: str = "tests.train.run_server:train",
        limit: float = 300.0,
    ) -> tuple[list[int], str]:
        """Exit statuses of the ranks (negative: the signal that killed it), and everything that they printed.

        Args:
            kill_after: seconds after which all ranks are killed, if they still run.
            send: a signal that all ranks get as soon as this file is there and holds something.
            call: what a rank runs, with the recipe.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        ask = {"recipe": recipe, "ranks": ranks, "kill_after": kill_after, "send": send, "call": call, "limit": limit}
        self._process.stdin.write(json.dumps(ask, default=str) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["statuses"], answer["printed"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def train(recipe: dict[str, Any], *options: str) -> int:
    """`twostep train` of a recipe."""
    from twostep.cli import main
    from twostep.train.yaml_tree import to_yaml

    path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return main(["train", str(path), *options])


def _serve() -> None:
    import torch

    import twostep.evaluate
    import twostep.train.engine
    import twostep.zoo.encoders
    import twostep.zoo.miniature.detector  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_start(json.loads(line))), flush=True)


def _start(ask: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    pids = [_fork(ask, rank, port, log.fileno()) for rank in range(ask["ranks"])]
    begun, statuses = time.monotonic(), dict.fromkeys(pids)
    kill, send = ask["kill_after"], ask["send"]
    while any(status is None for status in statuses.values()):
        select.select([], [], [], 0.005)
        passed = time.monotonic() - begun
        running = [pid for pid, status in statuses.items() if status is None]
        failed = any(status not in (None, 0) for status in statuses.values())  # torchrun ends the others then
        if (kill is not None and passed >= kill) or passed >= ask["limit"] or (failed and passed >= ask["limit"] / 4):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        if send is not None and Path(send[1]).is_file() and Path(send[1]).stat().st_size:
            for pid in running:
                os.kill(pid, send[0])
            send = None
        for pid in running:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
    log.seek(0)
    printed = log.read().decode(errors="replace")
    log.close()
    return {"statuses": [statuses[pid] for pid in pids], "printed": printed}


def _fork(ask: dict[str, Any], rank: int, port: int, log: int) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ask["ranks"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ask["ranks"]),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        module, _, name = ask["call"].partition(":")
        status = getattr(importlib.import_module(module), name)(ask["recipe"]) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
