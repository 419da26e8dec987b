"""stash: the same bits as without it, memory that moves and comes back, and nothing lost when things go wrong."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from twostep import ops

from .stashed_models import WIDTH, Model, an_input, equal, expected_gradients, gradients, stashed_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_device = pytest.mark.parametrize("device", DEVICES)


@every_device
@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("ahead", [0, 1, 2, 100])
@pytest.mark.parametrize("min_bytes", [0, 4096])
def test_gives_the_same_bits(device: str, how: str, ahead: int, min_bytes: int) -> None:
    model = Model(how=how).to(device)
    expected = expected_gradients(model, device)
    held = ops.stash(min_bytes=min_bytes, ahead=ahead)
    for _ in range(3):
        for inside in (False, True):
            assert equal(stashed_gradients(model, held, device, backward_inside=inside), expected)
            assert held.bytes == 0 and held.peak_bytes > 0


@every_device
def test_gives_the_same_bits_under_autocast(device: str) -> None:
    model = Model().to(device)
    with torch.autocast(device, torch.bfloat16):
        expected = expected_gradients(model, device)
        assert equal(stashed_gradients(model, ops.stash(min_bytes=0), device), expected)


@every_device
def test_gives_the_same_bits_of_a_compiled_model(device: str) -> None:
    torch._dynamo.reset()
    model = Model(how="plain").to(device)
    compiled = torch.compile(model, backend="aot_eager")
    expected = expected_gradients(compiled, device)
    held = ops.stash(min_bytes=0)
    assert equal(stashed_gradients(compiled, held, device), expected) and held.peak_bytes > 0


@every_device
def test_a_second_derivative_comes_through_it(device: str) -> None:
    def norm_of_gradient(held: Any) -> Tensor:
        x = an_input(device).double()
        leaf = x.detach().requires_grad_()
        with held:
            (first,) = torch.autograd.grad((leaf * 2).exp().tanh().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return second

    held = ops.stash(min_bytes=0)
    assert torch.equal(norm_of_gradient(held), norm_of_gradient(torch.enable_grad()))
    assert held.peak_bytes > 0 and held.bytes == 0


@every_device
def test_the_inputs_of_checkpointed_blocks_leave_the_device(device: str) -> None:
    """What autograd held is given back while the graph lives: nobody has the block's input any more."""
    model = Model(blocks=2).to(device)
    storages: list[StorageWeakRef] = []
    model.blocks[1].register_forward_pre_hook(
        lambda _, args: storages.append(StorageWeakRef(args[0].untyped_storage()))
    )
    held = ops.stash(min_bytes=0)
    x = an_input(device)
    with held:
        loss = model(x)
    own = x.numel() * 4
    # Two inputs of blocks, and the output of the last one, which the loss squares.
    assert held.bytes == 3 * own
    assert len(storages) == 1 and storages[0].expired()
    loss.backward()
    assert held.bytes == 0 and held.peak_bytes == held.pooled_bytes == 3 * own


@every_device
def test_views_of_one_storage_are_moved_once_and_keep_their_strides(device: str) -> None:
    fused = torch.randn(4, 6, 3 * 8, device=device, requires_grad=True) * 1
    seen: list[Tensor] = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return sum(t.sum() for t in tensors)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            seen.extend(ctx.saved_tensors)
            return tuple(g.expand(t.shape) for t in seen)

    views = [*fused.chunk(3, -1), fused.transpose(0, 2), fused[1:3, ::2], fused[:1].expand(5, 6, 24)]
    held = ops.stash(min_bytes=0)
    with held:
        total = Save.apply(*views)
    assert held.bytes == fused.numel() * 4
    total.backward()
    assert len(seen) == len(views) and len({t.untyped_storage().data_ptr() for t in seen}) == 1
    for found, view in zip(seen, views, strict=True):
        assert torch.equal(found, view) and found.device == view.device
        assert found.stride() == view.stride() and found.storage_offset() == view.storage_offset()


@every_device
def test_parameters_small_tensors_and_those_to_keep_are_left_alone(device: str) -> None:
    linear = nn.Linear(64, 64, device=device)
    buffer = torch.randn(64, 64, device=device)
    held = ops.stash(min_bytes=64 * 64 * 4, keep=[buffer])
    small = torch.randn(8, 64, device=device, requires_grad=True) * 1
    with held:
        loss = (linear(small) @ linear.weight.t() @ buffer.t() @ buffer[:, :3]).exp().sum()
    assert held.bytes == held.peak_bytes == 0
    loss.backward()
    held = ops.stash(min_bytes=64 * 64 * 4)
    with held:
        small @ buffer
    assert held.peak_bytes == 64 * 64 * 4  # the same buffer, when nobody said to keep it


@every_device
def test_buffers_serve_every_iteration(device: str) -> None:
    model = Model().to(device)
    held = ops.stash(min_bytes=0)
    lane = held._lane_of(an_input(device).device)
    made: list[int] = []
    allocate = lane.empty_host
    lane.empty_host = lambda nbytes: made.append(nbytes) or allocate(nbytes)
    for _ in range(3):
        stashed_gradients(model, held, device)
    assert len(made) == 6  # five blocks and the loss, in the first iteration only
    peak = held.peak_bytes
    assert held.pooled_bytes == peak
    # Nearly as long a sequence takes the same buffers; half as long ones would waste them and displace them instead.
    stashed_gradients(model, held, device, length=22)
    assert len(made) == 6
    for length in (12, 24, 12):
        stashed_gradients(model, held, device, length=length)
        assert held.pooled_bytes <= peak
    held.release()
    assert held.pooled_bytes == 0


@every_device
def test_a_graph_freed_without_backward_gives_its_buffers_back(device: str) -> None:
    model = Model().to(device)
    held = ops.stash(min_bytes=0)
    with held:
        loss = model(an_input(device))
    taken = held.bytes
    assert taken > 0
    del loss
    gc.collect()
    assert held.bytes == 0 and held.pooled_bytes == taken


@every_device
@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_backward_twice(device: str, how: str) -> None:
    model = Model(how=how).to(device)
    expected = expected_gradients(model, device)
    held = ops.stash(min_bytes=0)
    torch.manual_seed(3)
    with held:
        loss = model(an_input(device))
    for _ in range(2):
        assert equal(gradients(model, loss, retain_graph=True), expected)
        assert held.bytes > 0
    assert equal(gradients(model, loss), expected)
    assert held.bytes == 0
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(model, loss)


@every_device
def test_a_failure_in_forward_leaves_nothing_behind(device: str) -> None:
    model = Model().to(device)
    expected = expected_gradients(model, device)
    held = ops.stash(min_bytes=0)

    def fail(*_: Any) -> None:
        raise ValueError("in the last block")

    hook = model.blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the last block"), held:
        model(an_input(device))
    hook.remove()
    gc.collect()
    assert held.bytes == 0 and held.pooled_bytes > 0
    before = held.pooled_bytes
    torch.manual_seed(3)
    assert equal(gradients(model, model(an_input(device))), expected) and held.pooled_bytes == before  # it was left
    assert equal(stashed_gradients(model, held, device), expected)


@every_device
def test_a_failure_in_backward_loses_nothing(device: str) -> None:
    model = Model().to(device)
    expected = expected_gradients(model, device)
    held = ops.stash(min_bytes=0)
    torch.manual_seed(3)
    with held:
        loss = model(an_input(device))
    lane = held._lane_of(torch.device("cuda", 0) if device == "cuda" else torch.device("cpu"))
    load, count = lane.load, iter(range(100))

    def fail_once(host: Tensor, after: Any) -> Any:
        if next(count) == 3:
            raise torch.OutOfMemoryError("for this test")
        return load(host, after)

    lane.load = fail_once
    with pytest.raises(torch.OutOfMemoryError, match="for this test"):
        gradients(model, loss, retain_graph=True)
    assert equal(gradients(model, loss), expected)


@every_device
def test_nested(device: str) -> None:
    """The innermost takes what is saved; an outer one again after it; one that is entered twice is one."""
    model = Model(blocks=2).to(device)
    own = an_input(device).numel() * 4
    outer, inner = ops.stash(min_bytes=0), ops.stash(min_bytes=0)
    x = an_input(device)
    with outer:
        x = checkpoint(model.blocks[0], x, use_reentrant=False)
        with inner:
            x = checkpoint(model.blocks[1], x, use_reentrant=False)
        with outer:
            x = checkpoint(model.blocks[0], x, use_reentrant=False)
        x = checkpoint(model.blocks[1], x, use_reentrant=False)
    assert (outer.bytes, inner.bytes) == (3 * own, own)
    x.sum().backward()
    assert (outer.bytes, inner.bytes) == (0, 0)
    before = outer.pooled_bytes
    model(an_input(device))
    assert outer.pooled_bytes == before


@every_device
@pytest.mark.parametrize("min_bytes", [0, 1 << 30], ids=["moved", "kept"])
def test_a_change_in_place_is_the_error_that_it_is_without(device: str, min_bytes: int) -> None:
    message = "modified by an inplace operation"

    def run(held: Any) -> None:
        x = torch.randn(100, device=device, requires_grad=True)
        with held:
            y = x * 2
            z = y.exp()
            z.add_(1)
        z.sum().backward()

    with pytest.raises(RuntimeError, match=message):
        run(torch.enable_grad())
    with pytest.raises(RuntimeError, match=message):
        run(ops.stash(min_bytes=min_bytes))


@every_device
def test_a_tensor_saved_before_and_after_a_change_is_two(device: str) -> None:
    """The second is what it became; the first is the error above, so only the second is asked for."""
    x = torch.randn(100, device=device, requires_grad=True)
    held = ops.stash(min_bytes=0)
    with held:
        y = x * 1
        before = y.sin()
        y.mul_(3)
        out = y.cos()
    assert held.bytes == 2 * 400
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, -3 * (3 * x).sin())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


@every_device
@pytest.mark.parametrize("min_bytes", [0, 1 << 30], ids=["moved", "kept"])
def test_a_graph_that_nobody_holds_is_gone(device: str, min_bytes: int) -> None:
    """exp saves its own output: a graph that held it with its graph would hold itself."""
    with ops.stash(min_bytes=min_bytes):
        out = (torch.randn(100, device=device, requires_grad=True) * 2).exp()
    storage = StorageWeakRef(out.untyped_storage())
    del out
    assert storage.expired()


@every_device
def test_where_the_host_is_full_activations_stay(device: str) -> None:
    model = Model().to(device)
    expected = expected_gradients(model, device)
    held = ops.stash(min_bytes=0)
    lane = held._lane_of(an_input(device).device)
    allocate, count = lane.empty_host, iter(range(100))

    def empty_host(nbytes: int) -> Tensor:
        if next(count) >= 2:
            raise RuntimeError("no more pages")
        return allocate(nbytes)

    lane.empty_host = empty_host
    with pytest.warns(RuntimeWarning, match=r"no host memory for another 6144 bytes beside 12288 \(no more pages\)"):
        assert equal(stashed_gradients(model, held, device), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert equal(stashed_gradients(model, held, device), expected)


def test_refuses_what_makes_no_sense() -> None:
    for options, error, message in (
        ({"min_bytes": -1}, ValueError, "min_bytes is -1, expected at least 0"),
        ({"ahead": 1.5}, TypeError, "ahead is float, expected an int"),
        ({"keep": [None]}, TypeError, r"keep\[0\] is NoneType, expected a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            ops.stash(**options)


@pytest.mark.gpu
def test_copies_do_not_race_with_the_computation() -> None:
    """The streams are held up at random, so that a missing wait shows: 30 iterations, the same bits."""
    model = Model(blocks=8).cuda()
    expected = expected_gradients(model, "cuda", length=300)
    held = ops.stash(min_bytes=0, ahead=2)
    lane = held._lane_of(torch.device("cuda", torch.cuda.current_device()))
    generator = torch.Generator().manual_seed(0)
    store, load = lane.store, lane.load

    def delayed(stream: torch.cuda.Stream, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            for each in (stream, torch.cuda.current_stream()):
                with torch.cuda.stream(each):
                    torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=generator)))
            return call(*arguments)

        return run

    lane.store, lane.load = delayed(lane.out, store), delayed(lane.back, load)
    for i in range(30):
        assert equal(stashed_gradients(model, held, "cuda", length=300, backward_inside=i % 2 == 1), expected)


@pytest.mark.gpu
def test_takes_less_memory_on_the_device() -> None:
    """Also where the host runs ahead: copies wait behind a long kernel, and the whole forward is queued meanwhile."""
    model = Model(blocks=16).cuda()
    x = torch.randn(2, 1 << 14, WIDTH, device="cuda")

    class Wide(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return t * model.blocks[0].weight.sum() + 1

    def peak(held: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        y = x
        torch.cuda._sleep(200_000_000)
        with held:
            for _ in range(16):
                y = checkpoint(Wide(), y, use_reentrant=False)
        y.sum().backward()
        return torch.cuda.max_memory_allocated()

    own = x.numel() * 4
    without, stashed = peak(torch.enable_grad()), peak(ops.stash(ahead=1))
    assert without - stashed >= 8 * own


@pytest.mark.gpu
def test_a_cuda_graph_is_refused() -> None:
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graphs are not supported"), torch.cuda.graph(graph), ops.stash():
        (x * 2).sin()
