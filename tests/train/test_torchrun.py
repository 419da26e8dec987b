from __future__ import annotations

import pytest

from twostep.train.torchrun import Place, place, world_size

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_there_is_one_rank() -> None:
    assert place() == Place(0, 1, 0) and world_size() == 1


def test_torchruns_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("5", "8", "1", "localhost"), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == Place(5, 8, 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "-1", "RANK is '-1', expected a whole number from 0 on"),
        ("RANK", "²", "RANK is '²'"),
        ("RANK", "1", "RANK is 1 and its WORLD_SIZE 1"),
        ("LOCAL_RANK", "a", "LOCAL_RANK is 'a'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', expected a whole number from 1 on; torchrun sets it"),
        ("WORLD_SIZE", "2", "WORLD_SIZE is 2 and MASTER_ADDR is not set; start several ranks with torchrun"),
    ],
)
def test_what_is_no_place_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        place()
