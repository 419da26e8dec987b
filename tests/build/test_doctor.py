"""`twostep doctor` says what is here and what is broken, and always answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import twostep
from twostep import build, doctor, toolchain
from twostep.build import Stamp
from twostep.doctor import Finding
from twostep.toolchain import Driver, TorchFiles

MakeStamp = Callable[..., Stamp]
MakeTorch = Callable[..., TorchFiles]


def states(findings: list[Finding]) -> list[str]:
    return [finding.state for finding in findings]


# Exit status


def test_only_what_is_broken_makes_the_exit_status_1() -> None:
    sound = [Finding("a", "b", "c", state) for state in ("ok", "info", "warning")]
    assert doctor.exit_status(sound) == 0
    assert doctor.exit_status([*sound, Finding("a", "b", "c", "broken")]) == 1


def test_the_table_marks_what_is_broken() -> None:
    shown = doctor.table([Finding("torch", "version", "2.13.0"), Finding("torch", "import", "fails", "broken")])
    assert shown.splitlines()[0] == "torch"
    assert "BROKEN import" in shown
    assert "BROKEN version" not in shown


@pytest.mark.parametrize("entry", [["-m", "twostep.doctor"], ["-m", "twostep", "doctor"]])
def test_json_and_exit_status_agree(entry: list[str]) -> None:
    done = subprocess.run([sys.executable, *entry, "--json"], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["broken"] is (done.returncode == 1)
    assert report["broken"] is any(finding["state"] == "broken" for finding in report["findings"])
    sections = [finding["section"] for finding in report["findings"]]
    assert list(dict.fromkeys(sections)) == [
        "twostep",
        "torch",
        "GPU",
        "CPU",
        "toolchain",
        "kernels",
        "ops",
        "optional",
    ]
    named = {finding["name"] for finding in report["findings"]}
    assert named >= {*doctor.OPS, *doctor.OPTIONAL, "C++", "nvcc", "threads", "driver", "instruction sets"}


def test_it_answers_where_torch_is_missing() -> None:
    """-S -E leaves only the standard library; the package itself is put on the path by hand."""
    root = str(Path(doctor.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from twostep.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "not installed. Install it:  pip install torch" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


# torch, GPU, toolchain, kernels


def test_an_old_torch_is_broken(torch_files: MakeTorch) -> None:
    findings = doctor.look_at_torch(torch_files("2.8.0"))
    assert findings[0].state == "broken"
    assert "2.8.0 is older than 2.10. Upgrade:  pip install --upgrade torch" in findings[0].value


def test_a_torch_that_does_not_import_is_broken(torch_files: MakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = doctor.look_at_torch(torch_files())
    assert findings[-1].state == "broken"
    assert "`import torch` fails" in findings[-1].value


def test_no_driver_matters_to_a_cuda_torch_alone(torch_files: MakeTorch) -> None:
    assert states(doctor.look_at_gpu(torch_files(), None, None)) == ["info"]
    assert states(doctor.look_at_gpu(torch_files("2.11.0+cu130", "13.0"), None, None)) == ["warning"]


def test_no_gpu_visible_is_a_warning(torch_files: MakeTorch, stamp: MakeStamp) -> None:
    cuda = torch_files("2.11.0+cu130", "13.0")
    findings = doctor.look_at_gpu(cuda, Driver("13.0", ()), stamp(cuda="13.0", archs=["9.0"]))
    assert states(findings) == ["ok", "warning"]
    assert "CUDA_VISIBLE_DEVICES" in findings[-1].value


def test_kernels_for_another_gpu_are_broken(torch_files: MakeTorch, stamp: MakeStamp) -> None:
    cuda = torch_files("2.11.0+cu130", "13.0")
    built = stamp(cuda="13.0", archs=["8.0"])
    assert states(doctor.look_at_gpu(cuda, Driver("13.0", ((8, 6),)), built)) == ["ok", "ok"]
    assert states(doctor.look_at_gpu(cuda, Driver("13.0", ((9, 0),)), built)) == ["ok", "ok", "broken"]


def test_a_driver_older_than_the_kernels_is_broken(torch_files: MakeTorch, stamp: MakeStamp) -> None:
    findings = doctor.look_at_gpu(torch_files(), Driver("12.4", ((9, 0),)), stamp(cuda="13.0", archs=["9.0"]))
    assert "broken" in states(findings)


def test_a_missing_toolchain_breaks_nothing(torch_files: MakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_toolkit", lambda env: None)
    findings = doctor.look_at_toolchain(torch_files("2.11.0+cu130", "13.0"), {"PATH": "/nonexistent"})
    assert "broken" not in states(findings)
    assert any("apt-get install g++" in finding.value for finding in findings)
    assert any("TWOSTEP_NO_CUDA=1" in finding.value for finding in findings)


def test_a_binary_that_does_not_fit_is_broken(torch_files: MakeTorch) -> None:
    findings = doctor.look_at_build(build.Status(False, "the reason", None, Path("_C.so")), torch_files())
    assert findings == [Finding("kernels", "binary", "the reason", "broken")]


def test_cpu_kernels_beside_a_cuda_torch_are_a_warning(torch_files: MakeTorch, stamp: MakeStamp) -> None:
    status = build.Status(True, None, stamp(), Path("_C.so"))
    findings = doctor.look_at_build(status, torch_files("2.11.0+cu130", "13.0"))
    assert findings[-1].state == "warning"
    assert "for the CPU alone" in findings[-1].value
    assert "warning" not in states(doctor.look_at_build(status, torch_files()))


def test_ops_that_do_not_import_are_broken_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(twostep), "ops", raising=False)
    monkeypatch.setitem(sys.modules, "twostep.ops", None)
    [finding] = doctor.look_at_ops()
    assert finding.state == "broken"
    assert "twostep.ops does not import: " in finding.value


# Optional packages


def test_absent_packages_break_nothing() -> None:
    assert doctor.look_at_optional({"no-such-package-xyz": "import x"}) == [
        Finding("optional", "no-such-package-xyz", "not installed", "info")
    ]


def test_a_package_is_really_imported() -> None:
    [sound] = doctor.look_at_optional({"numpy": "import numpy"})
    assert sound.state == "ok"
    [broken] = doctor.look_at_optional({"numpy": "import numpy.no_such_part"})
    assert broken.state == "broken"
    assert "No module named 'numpy.no_such_part'" in broken.value
    assert broken.value.endswith("Mend or remove it:  pip install --force-reinstall numpy")


def test_an_import_that_crashes_or_hangs_is_told_from_those_around_it() -> None:
    results = doctor.try_imports(
        {
            "first": "import json",
            "crashes": "import os; os.abort()",
            "prints": "print('hello'); import json",
            "raises": "raise OSError('undefined symbol: x\\nmore of it')",
            "exits": "import sys; sys.exit(3)",
            "hangs": "import time; time.sleep(60)",
            "last": "import json",
        },
        seconds=2,
    )
    assert results == {
        "first": "",
        "crashes": "the process died with status -6",
        "prints": "",
        "raises": "OSError: undefined symbol: x",
        "exits": "SystemExit: 3",
        "hangs": "not imported within 2 s",
        "last": "",
    }
