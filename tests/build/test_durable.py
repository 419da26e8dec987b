"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from twostep.durable import clear_leftovers, is_leftover, replaced


def fail_halfway(path: Path) -> None:
    with replaced(path) as new:
        new.write_text("two")
        raise RuntimeError


def test_a_file_is_replaced_at_the_end_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replaced(path) as new:
        new.write_text("one")
        assert not path.exists() and is_leftover(new)
    with pytest.raises(RuntimeError):
        fail_halfway(path)
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_with_the_next_write_and_nothing_else(tmp_path: Path) -> None:
    others = [tmp_path / name for name in (".a.txt.swp", ".a.txt.old.tmp", ".b.txt.tmp-0123abcd", "a.txt.tmp-0", ".a.txtx")]
    for other in others:
        other.touch()
    left = tmp_path / ".a.txt.tmp-0123abcd"
    left.touch()
    with replaced(tmp_path / "a.txt", alone=False) as new:  # another rank may be writing it
        new.touch()
    assert left.exists()
    with replaced(tmp_path / "a.txt") as new:
        new.touch()
    assert not left.exists() and all(other.exists() for other in others)
    left.touch()
    clear_leftovers(tmp_path / "a.txt")
    assert not left.exists()
