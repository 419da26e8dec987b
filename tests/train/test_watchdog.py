"""What the watchdog says, from what the ranks last said of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from twostep.train import watchdog
from twostep.train.watchdog import HANGS, Watchdog


def verdict(beats: dict[int, tuple[int, str]], world_size: int = 3, stopped: Sequence[int] = ()) -> str:
    return Watchdog(0, world_size, 10.0)._verdict(beats, 12.0, stopped)


def test_names_the_rank_that_the_others_wait_for() -> None:
    said = verdict({0: (7, "reducing"), 1: (6, "a generator update"), 2: (7, "reducing")})
    assert "rank 0 has not moved for 12 s (reducing)" in said
    assert "rank 1 hangs (a generator update), and the others wait for it" in said


def test_names_several() -> None:
    said = verdict({0: (7, "reducing"), 1: (6, "an update"), 2: (6, "an update")})
    assert "ranks 1, 2 hangs" in said


def test_accuses_nobody_where_all_stand_alike() -> None:
    said = verdict(dict.fromkeys(range(3), (7, "an update")))
    assert "all ranks stand at the same place" in said and "hangs" not in said


def test_names_the_one_without_a_sign_of_life() -> None:
    said = verdict(dict.fromkeys(range(3), (7, "an update")), stopped=[2])
    assert "rank 2 gives no sign of life, and the others wait for it" in said and "same place" not in said


def test_names_the_one_that_waits_for_nobody_where_all_have_counted_alike() -> None:
    places = {0: (True, "distributed_c10d.py:1"), 1: (False, "mine.py:7 in forward"), 2: (True, "fsdp.py:9")}
    said = Watchdog(0, 3, 10.0)._verdict(dict.fromkeys(range(3), (7, "an update")), 12.0, (), places)
    assert "rank 1 hangs, and the others wait for it" in said
    assert "rank 1 is at mine.py:7 in forward" in said and "same place" not in said


@pytest.mark.parametrize("waits", [True, False])
def test_places_that_are_all_of_a_kind_accuse_nobody(waits: bool) -> None:
    places = {rank: (waits, f"file.py:{rank}") for rank in range(3)}
    said = Watchdog(0, 3, 10.0)._verdict(dict.fromkeys(range(3), (7, "an update")), 12.0, (), places)
    assert "all ranks stand at the same place" in said and "hangs" not in said and "rank 2 is at file.py:2" in said


def test_names_a_rank_that_never_came() -> None:
    assert "rank 2 never said anything" in verdict({0: (1, "loading"), 1: (1, "loading")})


class Ended(Exception):
    pass


def watch(dog: Watchdog, monkeypatch: pytest.MonkeyPatch, waits: Callable[[float], float | None]) -> None:
    """Its own loop, on the test's clock: `waits(pause)` says how long a pause took; None: it is stopped."""
    clock = [100.0]

    class Stop:
        def wait(self, pause: float) -> bool:
            took = waits(pause)
            clock[0] += took or 0.0
            return took is None

    def leave(status: int) -> None:
        assert status == HANGS
        raise Ended

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(dog, "_stop", Stop())
    dog.beat("beginning")
    dog._watch()


@pytest.mark.parametrize(("patience", "ends"), [(100.0, False), (1.0, True)])
def test_a_beat_in_time_keeps_it_quiet(patience: float, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog(0, 1, 5.0)
    looks = iter(range(60))

    def waits(pause: float) -> float | None:
        look = next(looks, None)
        if look is not None and look < 40:  # 20 seconds of work
            dog.beat("working")
        elif look == 40:
            dog.beat("a long save", patience)  # and 10 of silence
        return None if look is None else pause

    if ends:
        with pytest.raises(Ended):
            watch(dog, monkeypatch, waits)
        assert next(looks) > 50
    else:
        watch(dog, monkeypatch, waits)


@pytest.mark.parametrize(("waits", "ends"), [([0.5] * 30, True), ([0.5] * 9 + [1000.0] + [0.5] * 9, False)])
def test_a_suspended_process_has_not_hung(waits: list[float], ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z, or a machine that slept: its own thread was not run either. Then the time-out begins anew."""
    left = iter(waits)
    if ends:
        with pytest.raises(Ended):
            watch(Watchdog(0, 1, 5.0), monkeypatch, lambda pause: next(left, None))
    else:
        watch(Watchdog(0, 1, 5.0), monkeypatch, lambda pause: next(left, None))
