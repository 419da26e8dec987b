"""The raw results that are committed: the pages say what they say, and a new run is held against them."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "results" / "2026-11-28-xeon-2-threads"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def again(tmp_path: Path) -> Callable[..., Path]:
    """The committed run, with its kernels' first row changed."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "again"
        shutil.copytree(RUN, folder)
        found = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
        row = found["rows"][0]
        row["copy_bytes_per_second"] *= changes.get("copy", 1)
        row["seconds"]["twostep"] *= changes.get("twostep", 1)
        found["environment"]["device"] = changes.get("device", found["environment"]["device"])
        if changes.get("short"):
            del found["rows"][0]
        (folder / "kernels.json").write_text(json.dumps(found), encoding="utf-8")
        return folder

    return make


def test_the_pages_say_what_the_results_say(script: Callable[[str], ModuleType]) -> None:
    assert script("page").main(["--check"]) == 0, "python benchmarks/page.py"


def test_a_page_that_says_something_else_is_told(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    page = script("page")
    changed = tmp_path / "performance.md"
    changed.write_text(page.PAGE.read_text(encoding="utf-8").replace("norm_modulate", "norm"), encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", changed)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"# x\n\n{page.BEGIN}\n{page.END}\n", encoding="utf-8")
    assert page.main(["--check"]) == 1
    assert "performance.md: is not what the results say" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected one"):
        page.between("no marks", "content", changed)


def test_the_same_run_is_not_worse(
    script: Callable[[str], ModuleType], again: Callable[..., Path], capsys: Any
) -> None:
    assert script("regressions").main([str(RUN), str(again())]) == 0
    assert "0 worse" in capsys.readouterr().out


def test_a_slower_kernel_is_named(script: Callable[[str], ModuleType], again: Callable[..., Path], capsys: Any) -> None:
    assert script("regressions").main([str(RUN), str(again(twostep=1.3))]) == 1
    assert "worse: norm_modulate 32x96x128 float32 forward: percent of a copy" in capsys.readouterr().out
    assert script("regressions").main([str(RUN), str(RUN.parent / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_machine_that_copies_faster_is_no_slower_kernel(
    script: Callable[[str], ModuleType], again: Callable[..., Path]
) -> None:
    assert script("regressions").main([str(RUN), str(again(copy=1.5))]) == 0


def test_what_was_not_measured_again_is_said(
    script: Callable[[str], ModuleType], again: Callable[..., Path], capsys: Any
) -> None:
    assert script("regressions").main([str(RUN), str(again(short=True))]) == 0
    assert "not in the new run: 1, such as norm_modulate" in capsys.readouterr().out


def test_other_devices_are_compared_only_when_that_is_asked_for(
    script: Callable[[str], ModuleType], again: Callable[..., Path], capsys: Any
) -> None:
    folder = again(device="another")
    assert script("regressions").main([str(RUN), str(folder)]) == 2
    assert "--other-device" in capsys.readouterr().err
    assert script("regressions").main([str(RUN), str(folder), "--other-device"]) == 0


def test_a_file_that_no_benchmark_wrote_is_an_error(
    script: Callable[[str], ModuleType], again: Callable[..., Path], capsys: Any
) -> None:
    folder = again()
    (folder / "train_speed.json").write_text("{}", encoding="utf-8")
    assert script("regressions").main([str(RUN), str(folder)]) == 2
    assert "is not what a benchmark writes" in capsys.readouterr().err
