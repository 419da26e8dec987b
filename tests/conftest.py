"""What all tests share: those marked `gpu` are skipped, with the reason, where there is no GPU to run them on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a verdict depends on the code alone; --hypothesis-profile=random draws others.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expect-package-in",
        type=Path,
        metavar="FOLDER",
        help="fail at once unless twostep is imported from this folder; for tests of a second installation",
    )
    parser.addoption("--malloc", action="store_true", help="also hold dry runs to malloc's own count: many minutes")
    parser.addoption("--write-tables", action="store_true", help="write the tables of docs/ that tests produce")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--expect-package-in")
    if folder is not None:
        from twostep import build

        if not build.BINARY.resolve().is_relative_to(folder.resolve()) or not build.status().usable:
            raise pytest.UsageError(f"twostep comes from {build.BINARY.parent}, expected {folder}; {build.status()}")


def _why_no_gpu() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return f"no GPU is visible to torch {torch.__version__}"
    from twostep import build

    status = build.status()
    if status.stamp is None or not status.usable:
        return f"the kernels are not built: {status.reason}"
    if status.stamp["cuda"] is None:
        return build.no_cuda_kernels_message(status.stamp, torch.version.cuda)
    return build.check_arch(torch.cuda.get_device_capability(), status.stamp["archs"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    reason = _why_no_gpu()
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
