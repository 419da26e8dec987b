"""examples/slurm.sh starts ranks, hands a signal to them and not to torchrun, and puts the job back into the queue."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"

# SLURM and torchrun as far as the script uses them. Nodes are more than a pipe holds: who reads one only breaks it.
# A rank saves on SIGTERM and ends with 0, as `twostep train` does.
STANDS_FOR = {
    "rank": """
trap 'echo saved > "$SEEN/rank-said"; exit "$ENDS"' TERM
[ "$WAITS" = no ] || echo > "$SEEN/started"
while [ "$WAITS" = yes ]; do sleep 0.05; done
""",
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo first; seq 20000; else echo "$@" >> "$SEEN/queue"; fi',
    "torchrun": """
echo "$@" > "$SEEN/calls"
trap 'echo signalled > "$SEEN/agent"' TERM
rank &
wait $!
""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    for name, body in STANDS_FOR.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    os.mkfifo(tmp_path / "started")
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SEEN": str(tmp_path),
        "SLURM_JOB_ID": f"test-{os.getpid()}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "WAITS": "yes",
        "ENDS": "0",
    }


def signalled(job: dict[str, str]) -> int:
    """The script's status, once it was signalled as SLURM does ahead of the end."""
    process = subprocess.Popen([SCRIPT, "recipe.yaml", "out=runs/first"], env=job)
    with os.fdopen(os.open(Path(job["SEEN"], "started"), os.O_RDWR)) as started:  # the rank writes it
        assert select.select([started], [], [], 60)[0]
    process.send_signal(signal.SIGUSR1)
    return process.wait(timeout=60)


def test_a_job_whose_time_ends_saves_and_goes_back_into_the_queue(job: dict[str, str]) -> None:
    assert signalled(job) == 0
    assert Path(job["SEEN"], "rank-said").read_text() == "saved\n"
    assert not Path(job["SEEN"], "agent").exists()
    assert requeued(job) == [f"requeue {job['SLURM_JOB_ID']}"]


def test_a_job_that_could_not_save_is_not_repeated(job: dict[str, str]) -> None:
    assert signalled({**job, "ENDS": "1"}) == 1
    assert requeued(job) == []


def test_a_run_that_is_over_is_not_repeated(job: dict[str, str]) -> None:
    done = subprocess.run([SCRIPT, "recipe.yaml", "out=runs/first"], env={**job, "WAITS": "no"}, timeout=60)
    assert done.returncode == 0 and requeued(job) == []


def test_ranks_meet_at_the_first_node(job: dict[str, str]) -> None:
    subprocess.run([SCRIPT, "recipe.yaml", "out=runs/first"], env={**job, "WAITS": "no"}, timeout=60, check=True)
    command = Path(job["SEEN"], "calls").read_text().split()
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=first:29500"} <= set(command)
    assert command[-5:] == ["-m", "twostep", "train", "recipe.yaml", "out=runs/first"]


def requeued(job: dict[str, str]) -> list[str]:
    path = Path(job["SEEN"], "queue")
    return path.read_text().splitlines() if path.exists() else []
