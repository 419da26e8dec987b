"""Samplers against their distribution functions, their bounds, and their generator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twostep import losses


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_cdf(z: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(z)).numpy()


def unshift(sigma: np.ndarray, shift: float) -> np.ndarray:
    return sigma / (shift - (shift - 1) * sigma)  # solves s = shift u / (1 + (shift - 1) u) for u


SAMPLERS: dict[str, tuple[Callable[..., Tensor], Callable[[np.ndarray], np.ndarray]]] = {
    "uniform": (losses.uniform_sigmas, lambda s: s),
    "shift 3": (functools.partial(losses.shifted_sigmas, shift=3.0), lambda s: unshift(s, 3.0)),
    "shift 1/2": (functools.partial(losses.shifted_sigmas, shift=0.5), lambda s: unshift(s, 0.5)),
    "logit-normal": (
        functools.partial(losses.logit_normal_sigmas, mean=-0.4, std=1.3),
        lambda s: normal_cdf((np.log(s) - np.log1p(-s) + 0.4) / 1.3),
    ),
}
EACH = pytest.mark.parametrize(("sampler", "cdf"), SAMPLERS.values(), ids=SAMPLERS.keys())


@EACH
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.02, 0.98), (0.3, 0.75)])
def test_follows_its_distribution_restricted_to_the_interval(sampler, cdf, low: float, high: float) -> None:
    n = 20_000
    sigma = sampler(n, low=low, high=high, generator=seeded(), dtype=torch.float64).sort().values.numpy()
    with np.errstate(divide="ignore"):
        first, last = cdf(np.array([low, high]))
    expected = (cdf(sigma) - first) / (last - first)
    distance = np.abs(expected - (np.arange(n) + 0.5) / n).max()
    # Kolmogorov and Smirnov: a right sampler exceeds this for one seed in 10^6, and the seed is fixed.
    assert distance < math.sqrt(-0.5 * math.log(0.5e-6)) / math.sqrt(n)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(SAMPLERS)),
    ends=st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)).filter(lambda e: abs(e[0] - e[1]) > 1e-2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_stays_strictly_inside(name: str, ends: tuple[float, float], dtype: torch.dtype, seed: int) -> None:
    low, high = sorted(ends)
    sigma = SAMPLERS[name][0](256, low=low, high=high, generator=seeded(seed), dtype=dtype)
    assert sigma.dtype == dtype
    assert sigma.shape == (256,)
    assert ((sigma > low) & (sigma < high)).all()


@EACH
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("high", [1.0, 0.75, 0.7])
def test_extreme_draws_do_not_round_onto_a_bound(monkeypatch, sampler, cdf, u: float, high: float) -> None:
    monkeypatch.setattr("twostep.losses.sigmas._uniform", lambda batch, generator: torch.full((batch,), u).double())
    for low in (0.0, 0.1):
        sigma = sampler(1, low=low, high=high, generator=seeded()).double()
        assert low < sigma.item() < high


@EACH
def test_bounds_may_differ_within_a_batch(sampler, cdf) -> None:
    high = torch.tensor([1.0, 0.75, 0.3, 0.05]).repeat(500)
    low = high / 2
    sigma = sampler(2000, low=low, high=high, generator=seeded())
    assert ((sigma > low) & (sigma < high)).all()
    alone = sampler(2000, low=0.375, high=0.75, generator=seeded())
    torch.testing.assert_close(sigma[1::4], alone[1::4])  # each sample depends on its own bounds alone


@EACH
def test_below_a_step(sampler, cdf) -> None:
    steps = torch.tensor([1.0, 0.75]).repeat(1000)
    sigma = losses.sigmas_below(2000, steps, low=0.02, sampler=sampler, generator=seeded())
    assert ((sigma > 0.02) & (sigma < steps)).all()
    assert sigma[::2].max() > 0.75  # a step's own bound, not the least of all
    expected = sampler(2000, low=0.02, high=steps, generator=seeded())
    assert torch.equal(sigma, expected)


@EACH
def test_generator_decides(sampler, cdf) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampler(8, generator=seeded(5))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert torch.equal(first, sampler(8, generator=seeded(5)))
    assert not torch.equal(first, sampler(8, generator=seeded(6)))
    generator = seeded(5)
    sampler(8, generator=generator)
    assert not torch.equal(first, sampler(8, generator=generator)), "the generator did not advance"
    assert len(first.unique()) == 8, "one level for the whole batch"


@EACH
def test_device_is_where_the_levels_go(sampler, cdf) -> None:
    assert sampler(3, generator=seeded()).device.type == "cpu"
    assert sampler(3, generator=seeded(), device="meta").device.type == "meta"


@pytest.mark.gpu
@EACH
def test_levels_do_not_depend_on_the_device(sampler, cdf) -> None:
    on_gpu = sampler(64, generator=seeded(3), device="cuda", low=torch.full((64,), 0.1, device="cuda"))
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), sampler(64, generator=seeded(3), low=0.1))
    drawn_there = sampler(64, generator=torch.Generator("cuda").manual_seed(3))
    assert drawn_there.device.type == "cuda"


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_shift_gives_the_known_grids(steps: int) -> None:
    """methods: shift 3 gives 1, .75 | 1, .9, .75, .5 | 1, .9545, .9, .8333, .75, .6429, .5, .3."""
    grid = losses.shift_sigmas(torch.arange(steps, 0, -1, dtype=torch.float64) / steps, 3.0)
    known = {
        2: [1, 3 / 4],
        4: [1, 9 / 10, 3 / 4, 1 / 2],
        8: [1, 21 / 22, 9 / 10, 5 / 6, 3 / 4, 9 / 14, 1 / 2, 3 / 10],
    }[steps]
    torch.testing.assert_close(grid, torch.tensor(known, dtype=torch.float64))
    torch.testing.assert_close(losses.shift_sigmas(grid, 1 / 3), torch.arange(steps, 0, -1).double() / steps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: losses.uniform_sigmas(0, generator=g), ValueError, "batch is 0, expected at least 1"),
        (lambda g: losses.uniform_sigmas(2.0, generator=g), TypeError, "batch is float, expected an int"),
        (lambda g: losses.uniform_sigmas(2, generator=None), TypeError, "generator is NoneType, expected a torch.Gen"),
        (lambda g: losses.uniform_sigmas(2), TypeError, "generator"),
        (
            lambda g: losses.uniform_sigmas(2, 0.5, 0.5, generator=g),
            ValueError,
            r"the interval is \(0.5, 0.5\), expected 0 <= low < high <= 1",
        ),
        (lambda g: losses.uniform_sigmas(2, -0.1, generator=g), ValueError, r"the interval is \(-0.1, 1.0\)"),
        (lambda g: losses.uniform_sigmas(2, 0.1, 980.0, generator=g), ValueError, r"the interval is \(0.1, 980.0\)"),
        (lambda g: losses.uniform_sigmas(2, high=torch.ones(3), generator=g), ValueError, r"high has shape \[3\], exp"),
        (
            lambda g: losses.sigmas_below(2, torch.tensor([0.5, 0.0]), generator=g),
            ValueError,
            r"the interval is \(0.0, 0.0\)",
        ),
        (
            lambda g: losses.uniform_sigmas(2, torch.tensor([0.0, math.nan]), generator=g),
            ValueError,
            "the interval is",
        ),
        (
            lambda g: losses.uniform_sigmas(2, generator=g, dtype=torch.bfloat16),
            ValueError,
            "dtype is torch.bfloat16, expected torch.float32 or torch.float64",
        ),
        (lambda g: losses.uniform_sigmas(2, 0.5, 0.5 + 1e-9, generator=g), ValueError, "no torch.float32 number lies"),
        (lambda g: losses.shifted_sigmas(2, 0.0, generator=g), ValueError, "shift is 0.0, expected a number above 0"),
        (lambda g: losses.shift_sigmas(torch.ones(2), -3.0), ValueError, "shift is -3.0, expected a number above 0"),
        (
            lambda g: losses.shift_sigmas(torch.tensor([[0.5, 500.0]]), 3.0),
            ValueError,
            r"sigma holds 500.0, ",
        ),
        (
            lambda g: losses.sigmas_below(3, 0.5, sampler="uniform", generator=g),
            TypeError,
            "sampler is str",
        ),
        (lambda g: losses.uniform_sigmas(1, 0.5, 0.5 + 1e-10, generator=g), ValueError, "^uniform_sigmas: no torch.fl"),
        (lambda g: losses.logit_normal_sigmas(2, std=0.0, generator=g), ValueError, "std is 0.0, expected a number ab"),
        (
            lambda g: losses.logit_normal_sigmas(2, mean=20.0, high=0.5, generator=g),
            ValueError,
            "the interval from low to high holds .* of the distribution",
        ),
    ],
)
def test_says_what_is_wrong(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(seeded())
