"""A folder is there whole or not at all, and what is exported is never what is overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from twostep import durable
from twostep.disk import check_space
from twostep.export.new_folder import new_folder, target_of


def test_it_takes_the_old_ones_place_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with new_folder(target) as new:
        (new / "first").touch()
    with pytest.raises(ZeroDivisionError), new_folder(target) as new:
        raise ZeroDivisionError
    assert [path.name for path in target.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [target]

    rename = os.rename

    def refuses(one: Path, other: Path) -> None:
        if Path(one).name.startswith(durable.TEMPORARY):
            raise OSError("no")
        rename(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_exchange", lambda one, other: False)  # as on NFS
        patch.setattr(os, "rename", refuses)
        with pytest.raises(OSError, match="no"), new_folder(target) as new:
            (new / "third").touch()
    assert [path.name for path in target.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [target]
    with new_folder(target) as new:
        (new / "second").touch()
    assert [path.name for path in target.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [target]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for overwrite, message in ((False, "is there already"), (True, "holds no export")):
        assert target_of(target, overwrite) == target
        check = partial(target_of, target, overwrite)
        context = new_folder(target, check)
        (context.__enter__() / "export.json").touch()
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match=message):
            context.__exit__(None, None, None)
        assert (target / "thesis.txt").read_text() == "mine" and list(tmp_path.iterdir()) == [target]
        (target / "thesis.txt").unlink()
        target.rmdir()


def test_where_something_is_mounted_nothing_can_be_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ValueError, match="is where something is mounted"):
        target_of(tmp_path, True)


def test_others_may_read_it_as_the_umask_has_it(tmp_path: Path) -> None:
    """Whatever the folder that it is in allows."""
    tmp_path.chmod(0o777)
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


KILLED = """
import os, signal, sys
from pathlib import Path
from twostep.export.new_folder import new_folder
from twostep import durable

if sys.argv[2] == "set aside":  # between the two renames where a file system cannot exchange folders
    durable._exchange = lambda one, other: False
    durable.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    rename = os.rename
    os.rename = lambda one, other: rename(one, other) if Path(one).name == "out" else os.kill(os.getpid(), 9)
with new_folder(Path(sys.argv[1])) as new:
    (new / "half").touch()
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["writing", "set aside"])
def test_what_a_killed_export_left_is_cleared_by_the_next_one(tmp_path: Path, when: str) -> None:
    """And nobody else's: a process that still writes, another folder's, a stranger's folder of a like name."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "export.json").touch()
    status = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False).returncode
    assert status == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 and target.exists() == (when == "writing")
    others = [tmp_path / ".tmp-other-1", tmp_path / ".tmp-stranger", tmp_path / ".old-other"]
    for other in others:
        other.mkdir()
    with new_folder(target) as new:
        with pytest.raises(ValueError, match="is there already"):
            target_of(target, False)
        assert new.exists()
    assert target_of(target, True) == target
    assert {*tmp_path.iterdir()} == {target, *others}


def test_what_is_exported_is_not_overwritten(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for out in (student, tmp_path / "run", tmp_path / "link", student / "inside"):
        with pytest.raises(ValueError, match="which is exported, are in one another"):
            target_of(out, True, student)
    assert target_of(tmp_path / "run" / "exported", False, student) == tmp_path / "run" / "exported"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        target_of(tmp_path / "file", True, student)
    with pytest.raises(ValueError, match="is there already; give another folder, or --overwrite"):
        target_of(tmp_path / "run", False)


def test_too_little_space_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export: .* are to be written to .*, and .* are free there"):
        check_space(tmp_path / "not" / "there", 1 << 60, "export")
