"""What is read of a profiler's table. The profiler and a GPU are not here: its output is as its manual prints it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINTED = """==PROF== Connected to process 4242 (/usr/bin/python3)
a line of the program's own
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Kernel Name","Block Size","Grid Size","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","","","byte","byte"
"0","4242","python3","void rows<bf16, 8, 4>(Problem, int)","(128, 1, 1)","(264, 1, 1)","1,000,000","500000"
"1","4242","python3","void columns(Problem)","(128, 1, 1)","(264, 1, 1)","2000","0"
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("dram_bytes")


def test_kernels_of_a_call_are_added_up(script: ModuleType) -> None:
    assert script.totals(PRINTED) == (2, 1_002_000.0, 500_000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"byte"', '"Mbyte"'), "in 'Mbyte', expected 'byte'"),
        (("dram__bytes_write.sum", "dram__bytes.sum"), "no dram__bytes_write.sum"),
        (('"ID"', "ID"), "printed no table"),
    ],
)
def test_another_table_is_an_error(script: ModuleType, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.totals(PRINTED.replace(*change))


def test_the_profiler_is_called_once_for_each_case(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    profiler = tmp_path / "ncu"
    profiler.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\ncat <<'END'\n{PRINTED}END\n", encoding="utf-8")
    profiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert script.main(["--ops", "rope", "gradient_norms", "--shape", "2x8x64"]) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split("--worker ")[1] for call in calls] == [
        "rope 2x8x64 forward", "rope 2x8x64 backward", "gradient_norms 2x8x64 forward",
    ]  # fmt: skip
    assert "| rope | 2x8x64 | forward | 2 | 1.0 | 0.5 | 0.0 |" in capsys.readouterr().out


def test_without_the_profiler_it_says_where_it_comes_from(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.main([]) == 2
    assert "there is no ncu on PATH" in capsys.readouterr().err
