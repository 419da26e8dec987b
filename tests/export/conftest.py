"""Students of real, tiny runs, of both families."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import tiny_runs
from tests.train.run_server import Server


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny_runs.Place]:
    return {family: tiny_runs.make_place(family, tmp_path_factory.mktemp(family)) for family in ("z-image", "klein")}


@pytest.fixture(scope="session")
def runs(
    places: dict[str, tiny_runs.Place], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, bool], Path]:
    """Students by family, weights, and whether their steps have parameters of their own."""
    server, made = Server(), {}
    try:
        for family, place in places.items():
            for weights, per_step in (("full", True), ("full", False), ("lora", True), ("lora", False)):
                out = tmp_path_factory.mktemp(f"{family}-{weights}-{per_step}")
                recipe = tiny_runs.recipe(place, "dp_dmd", weights, out, iterations=2, ema=None)
                recipe["roles"]["student"]["per_step"] = per_step
                recipe["optimizers"]["generator"]["lr"] = 1e-2  # far from where it began
                statuses, printed = server.run(recipe)
                assert statuses == [0], printed
                made[family, weights, per_step] = out
    finally:
        server.close()
    return made
