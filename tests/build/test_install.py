"""Installing for real, in fresh environments: without torch, as a wheel, editable, after an edit.

Nothing is fetched while installing: pip gets --no-index and a folder with setuptools and ninja, so that a success
proves that nothing else was asked for. torch is lent to the fresh environments by a .pth file, which spares a
reinstallation of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import twostep.build

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def environment(**changes: str) -> dict[str, str]:
    """This one without what steers pip, the build or Python's path."""
    steering = ("PIP_", "UV_", "TWOSTEP_", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "MAX_JOBS", "CXX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


class Environment:
    """A fresh virtual environment, with or without torch."""

    def __init__(self, folder: Path, with_torch: bool) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        if with_torch:
            import torch

            packages = self.run("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
            lender = Path(torch.__file__).parents[1]
            (Path(packages) / "lent_torch.pth").write_text(f"{lender}\n")

    def pip(self, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "pip", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False)

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code elsewhere than in the source tree, where `import zoo` would find the folder."""
        command = [str(self.python), "-c", code]
        return subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with one part more. Compiled objects come along: their times and paths stay valid."""
    copy = tmp_path_factory.mktemp("sources") / "twostep"
    copy.mkdir()
    parts = ("twostep", "zoo", "losses", "train", "evaluate", "export")
    ignore = shutil.ignore_patterns("__pycache__", "_C.*")
    for folder in ("build_backend", "csrc", *parts, "build/cpu", "build/cuda"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ROOT.glob("*.*"):
        if file.suffix in (".py", ".toml", ".txt", ".in", ".md"):
            shutil.copy2(file, copy)
    shutil.copy2(ROOT / "LICENSE", copy)
    for package in (copy / "zoo", copy / "zoo" / "trial"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    return copy


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the build may ask for."""
    folder = tmp_path_factory.mktemp("tools")
    pins = [f"{name}=={version}" for name, version in pinned().items() if name in ("setuptools", "ninja")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *pins]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no package index answers: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("with_torch") / "venv", with_torch=True)


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.partition(";")[0].strip().split("==") for line in lines if "==" in line.partition("#")[0])
    return dict(pairs)


# Without what the build needs


@pytest.mark.parametrize("arguments", [["."], ["-e", "."]])
def test_without_torch_it_stops_before_anything_is_fetched(tree: Path, tmp_path: Path, arguments: list[str]) -> None:
    fresh = Environment(tmp_path / "venv", with_torch=False)
    done = fresh.pip("install", "--no-index", *arguments, cwd=tree)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert f"pip install torch=={pinned()['torch']}  and then  pip install -e ." in output
    assert "Traceback" not in output
    for word in ("Collecting", "Downloading", "Could not find a version"):
        assert word not in output


def test_without_a_compiler_it_says_which_to_install(tree: Path, tools: Path, with_torch: Environment) -> None:
    path = str(with_torch.python.parent)
    done = with_torch.pip("install", "--no-index", "--find-links", str(tools), ".", cwd=tree, PATH=path)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "no g++, c++ or clang++ on PATH" in output
    assert "Traceback" not in output


# As a wheel


@pytest.fixture(scope="module")
def wheel(tree: Path, tools: Path, with_torch: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    arguments = ("--no-deps", "--no-index", "--find-links", str(tools), "--wheel-dir", str(folder), ".")
    done = with_torch.pip("wheel", *arguments, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.iterdir()
    return built


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert wheel.name.startswith(f"twostep-{twostep.__version__}-py3-none-linux_")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("twostep/_C.so")
    dist_info = f"twostep-{twostep.__version__}.dist-info/"
    assert all(name.startswith(("twostep/", dist_info)) for name in names)
    assert {"twostep/_C.json", "twostep/py.typed", "twostep/ops/__init__.py", "twostep/zoo/trial/__init__.py"} < set(
        names
    )
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".o", ".ninja"))]
    assert f"{dist_info}licenses/LICENSE" in names
    # What makes the library independent of Python: it knows no symbol of it.
    assert b"PyObject" not in library
    assert b"Py_Initialize" not in library


def test_the_wheel_works_where_only_torch_is(wheel: Path, with_torch: Environment) -> None:
    done = with_torch.pip("install", "--no-deps", "--no-index", str(wheel), cwd=wheel.parent)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, twostep, twostep.build, twostep.zoo.trial\n"
        "from twostep import ops\n"
        "assert twostep.build.status().usable, twostep.build.status()\n"
        "assert 'site-packages' in twostep.__file__\n"
        "assert ops.backend(torch.ones(2)) == 'cpu'\n"
        "print(ops.swiglu(torch.ones(1, 1, 2), torch.ones(1, 1, 2)).shape)"
    )
    done = with_torch.run(code)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_the_folders_are_no_packages_of_their_own(wheel: Path, with_torch: Environment) -> None:
    for name in ("zoo", "csrc", "build_backend", "tests"):
        assert "ModuleNotFoundError" in with_torch.run(f"import {name}").stderr


# Editable


def test_editable_install_notices_an_edit_and_a_reinstall_mends_it(tree: Path, tools: Path, tmp_path: Path) -> None:
    fresh = Environment(tmp_path / "venv", with_torch=True)
    arguments = ("install", "--no-index", "--find-links", str(tools), "--editable", ".")
    done = fresh.pip(*arguments, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    look = "import twostep.ops, twostep.zoo.trial as t; print(t.__file__, twostep.build.status().usable)"
    assert fresh.run(look).stdout.split() == [str(tree / "zoo" / "trial" / "__init__.py"), "True"]
    assert "ModuleNotFoundError" in fresh.run("import zoo").stderr

    source = tree / "csrc" / "cpu" / "dispatch.cpp"
    source.write_text(source.read_text() + "// edited\n")
    error = fresh.run(look).stderr
    assert "BuildError: twostep: the files in csrc" in error
    assert "the binary is stale. Rebuild:  pip install -e ." in error

    assert fresh.pip(*arguments, cwd=tree).returncode == 0
    assert fresh.run(look).stdout.split()[-1:] == ["True"]

    (tree / "twostep" / "_C.so").unlink()
    assert fresh.run("import twostep; print(twostep.__version__)").returncode == 0
    doctor = fresh.run("from twostep.cli import main; raise SystemExit(main(['doctor']))")
    assert doctor.returncode == 1
    assert "the kernels were never compiled. Build them:  pip install -e ." in doctor.stdout


# As a source distribution


def test_the_source_distribution_holds_what_a_build_needs(tree: Path, tmp_path: Path) -> None:
    code = f"import build_backend; print(build_backend.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment(), check=True, capture_output=True)
    [archive] = tmp_path.iterdir()
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "build_backend/extension.py"):
        assert (unpacked / name).is_file(), name
    sources = twostep.build.source_files(tree / "csrc", cuda=True)
    assert len(sources) > 10
    for path in sources:
        assert (unpacked / path.relative_to(tree)).is_file(), path
