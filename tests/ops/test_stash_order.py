"""stash over a lane whose copies happen as late as its events allow: order, reuse and lifetime of what is copied."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from twostep import ops
from twostep.ops.stash import Stash, _HostLane

from .stashed_models import Model, equal, expected_gradients, stashed_gradients


class Lagging(_HostLane):
    """A lane whose copies run at the last moment that is allowed, over memory that holds nonsense until then.

    A copy out reads its source late, when somebody waits for it or lets go of the source; a copy back runs when it is
    waited for. What is used without waiting is nonsense; a source that is gone before its copy, and a host buffer that
    is overwritten before its copy back, fail here.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names: dict[int, int] = {}
        self.reading: dict[int, Any] = {}  # host buffers that a copy back has yet to read
        self.alive = 0
        self.most_alive = 0

    def _run(self, copy: dict[str, Any] | None) -> None:
        if copy is not None and copy["action"] is not None:
            action, copy["action"] = copy["action"], None
            action()

    def store(self, source: Tensor, host: Tensor, after: Any) -> Any:
        pending = self.reading.pop(host.data_ptr(), None)
        assert pending is None or pending is after, "a buffer is overwritten that a copy back may still read"
        self._run(after)
        self.names[host.data_ptr()] = len(self.names)
        host.fill_(255)  # NaN in every floating dtype
        held = weakref.ref(source)

        def action() -> None:
            left = held()
            assert left is not None, "a source is gone that a copy out has yet to read"
            host.copy_(left)

        return {"action": action}

    def free(self, copy: Any, source: Tensor) -> None:
        self._run(copy)

    def drop(self, copy: Any, t: Tensor) -> None:
        self.log += ["drop"] if copy["action"] is not None else []
        self._run(copy)

    def load(self, host: Tensor, after: Any) -> tuple[Tensor, Any]:
        buffer = torch.full_like(host, 255)
        self.log.append(f"load {self.names[host.data_ptr()]}")
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)

        def action() -> None:
            self._run(after)
            buffer.copy_(host)

        copy = {"action": action}
        self.reading[host.data_ptr()] = copy
        return buffer, copy

    def wait(self, copy: Any, buffer: Tensor) -> None:
        self.log.append("wait")
        self.alive -= 1
        self._run(copy)


def _lagging(**options: Any) -> tuple[Stash, Lagging]:
    held, lane = ops.stash(min_bytes=0, **options), Lagging()
    held._lanes[torch.device("cpu")] = lane
    return held, lane


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_waits_for_every_copy(how: str, ahead: int) -> None:
    model = Model(how=how)
    expected = expected_gradients(model, "cpu")
    held, lane = _lagging(ahead=ahead)
    for _ in range(3):
        for inside in (False, True):
            assert equal(stashed_gradients(model, held, "cpu", backward_inside=inside), expected)
    assert lane.log.count("wait") >= 6 * 6


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_sends_for_activations_in_reverse_and_ahead_of_their_use(ahead: int) -> None:
    model = Model(blocks=4)
    held, lane = _lagging(ahead=ahead)
    stashed_gradients(model, held, "cpu")
    expected: list[str] = []
    for asked in (4, 3, 2, 1, 0):  # four inputs of blocks and the output, which the loss squares
        for i in range(asked, max(asked - ahead, 0) - 1, -1):
            expected += [f"load {i}"] if f"load {i}" not in expected else []
            expected += ["wait"] if i == asked else []
    assert [line for line in lane.log if line != "drop"] == expected
    assert lane.most_alive == max(ahead, 1)


def test_a_buffer_is_reused_only_behind_the_last_copy_out_of_it() -> None:
    """Sent for, and then not asked for: the graph goes while the copy back has yet to run."""
    held, lane = _lagging(ahead=2)
    x = [torch.randn(50, requires_grad=True) for _ in range(3)]
    with held:
        outs = [(t * 2).sin() for t in x]
    outs[2].sum().backward()  # sends for the other two
    assert lane.log.count("wait") == 1 and lane.log.count("drop") == 2 and len(lane.log) == 6
    del outs
    assert lane.log.count("drop") == 4  # and their memory is held back for as long
    with held:  # Lagging.store asserts
        again = [(t * 3).cos() for t in x]
    for out, t in zip(again, x, strict=True):
        (gradient,) = torch.autograd.grad(out.sum(), t)
        torch.testing.assert_close(gradient, -3 * (3 * t).sin())
