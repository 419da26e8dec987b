"""Every property test of this folder can run on each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from twostep.ops import library


def available_isas() -> list[str]:
    if not library.build_info()["usable"]:
        raise RuntimeError(f"the tests need the compiled library: {library.build_info()['reason']}")
    chosen = library.cpu_isa()
    found = []
    for isa in ("avx512", "avx2", "portable"):
        try:
            library.select_cpu_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    library.select_cpu_isa(chosen)
    return found


@pytest.fixture(params=available_isas(), scope="module")
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = library.cpu_isa()
    library.select_cpu_isa(request.param)
    yield request.param
    library.select_cpu_isa(chosen)
