"""What tests of whole runs stand on: the server that runs them in forks, and what they are trained from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import tiny_runs
from .run_server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_runs.Place:
    return tiny_runs.make_place("z-image", tmp_path_factory.mktemp("z-image"))
