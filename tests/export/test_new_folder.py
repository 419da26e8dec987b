"""A folder is there whole or not at all, and what is exported is never what is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from twostep.export.new_folder import check_space, new_folder, target_of


def test_it_takes_the_old_ones_place_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with new_folder(target) as new:
        (new / "first").touch()
    with pytest.raises(ZeroDivisionError), new_folder(target) as new:
        raise ZeroDivisionError
    assert [path.name for path in target.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [target]

    rename = Path.rename

    def refuses(self: Path, to: Path) -> Path:
        if self.name.endswith(".old") or to.name.endswith(".old"):
            return rename(self, to)
        raise OSError("no")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"), new_folder(target) as new:
        patch.setattr(Path, "rename", refuses)
    assert [path.name for path in target.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [target]
    with new_folder(target) as new:
        (new / "second").touch()
    assert [path.name for path in target.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [target]


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
    with pytest.raises(ValueError, match=r"are to be written to .*, where .* are free"):
        check_space(tmp_path / "not" / "there", 1 << 60)
