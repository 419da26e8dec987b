"""On two ranks, a backbone and the adapters on it compute what one process computes: DDP, FSDP2, mixed precision."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .sharded_ranks import SHARDED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    file = tmp_path_factory.mktemp("ranks") / "rendezvous"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.zoo.sharded_ranks", str(rank), "2", str(file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(err[-3000:] for _, err in outputs)
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_compute_what_one_does(errors: dict[str, dict[str, float]], name: str) -> None:
    """Every gradient, those of the pad tokens among them; and an adapter's state goes out of the shards and back."""
    found = dict(errors[name])
    assert found.pop("mixed precision") <= 2
    assert all(error <= 1e-5 for error in found.values()), found
