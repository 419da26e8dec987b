"""On a CPU, candidates take turns and find no input in the cache that another has just read."""

from __future__ import annotations

from collections.abc import Callable

from twostep.bench import timing


def test_no_two_candidates_work_on_the_same_inputs_within_a_turn() -> None:
    names, inputs = ("ours", "eager", "compiled", "copy"), 6
    used: list[tuple[str, int]] = []

    def call(name: str, index: int) -> Callable[[], None]:
        return lambda: used.append((name, index))

    timing.time_cpu({name: [call(name, i) for i in range(inputs)] for name in names}, seconds=0)
    used = used[len(names) * 3 :]  # the calls that are not measured
    turns = [used[i : i + len(names)] for i in range(0, len(used), len(names))]
    assert len(turns) >= inputs
    for turn in turns:
        assert [name for name, _ in turn] == list(names)
        assert len({index for _, index in turn}) == len(names)
    for name in names:
        assert {index for other, index in used if other == name} == set(range(inputs))
