"""Each op's forward and backward against the oracle, as functions of a launch and a shape, for tests and mutants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import launchers, oracle
from .launchers import Launch

EPS = 1e-5


@dataclass(frozen=True)
class Rows:
    """One case of a row op."""

    batch: int = 2
    length: int = 5
    width: int = 128
    dtype: torch.dtype = torch.bfloat16
    parameters: torch.dtype | None = None  # None: as the activations
    norm: str = "rms"
    post_norm: str = "rms"
    gate_act: str = "tanh"
    weight: bool = True
    scale: str = "sample"  # "sample", "token", "chunk" (a strided view of several modulations) or "none"
    shift: str = "sample"
    gate: str = "sample"
    offset: int = 0  # elements that activations start past a 16-byte boundary
    gap: int = 0  # elements between rows
    wants_dout: bool = True
    splits: int | None = None
    seed: int = 0


class Draws:
    """Random inputs, drawn in the dtype and layout that a case asks for."""

    def __init__(self, case: Rows) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        self.parameters = case.parameters or case.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def activation(self) -> Tensor:
        """[B, L, D] with the case's gap between rows and offset of the first."""
        c = self.case
        stride = c.width + c.gap
        memory = self.normal(c.offset + c.batch * c.length * stride).to(c.dtype)
        return memory[c.offset :].view(c.batch, c.length, stride)[..., : c.width]

    def modulation(self, kind: str) -> Tensor | None:
        c = self.case
        if kind == "none":
            return None
        if kind == "token":
            return self.normal(c.batch, c.length, c.width).to(self.parameters)
        if kind == "chunk":
            return self.normal(c.batch, 4 * c.width).to(self.parameters).chunk(4, dim=-1)[2]
        return self.normal(c.batch, c.width).to(self.parameters)

    def weight(self) -> Tensor | None:
        return (1 + 0.2 * self.normal(self.case.width)).to(self.parameters) if self.case.weight else None


def statistics(x: Tensor, norm: str) -> tuple[Tensor | None, Tensor]:
    """Mean and rstd of rows as a forward saves them."""
    wide = x.to(torch.float64)
    mean = wide.mean(-1) if norm == "layer" else torch.zeros(x.shape[:2], dtype=torch.float64)
    rstd = torch.rsqrt((wide - mean[..., None]).square().mean(-1) + EPS)
    return (mean.float() if norm == "layer" else None), rstd.float()


def norm_modulate(launch: Launch, case: Rows) -> list[Tensor]:
    draw = Draws(case)
    x, dy = draw.activation(), draw.activation()
    weight, scale, shift = draw.weight(), draw.modulation(case.scale), draw.modulation(case.shift)
    made = launchers.norm_modulate_forward(
        launch, x, weight, scale, shift, norm=case.norm, eps=EPS, parameters=draw.parameters
    )
    inputs = {"x": x, "weight": weight, "scale": scale, "shift": shift}

    def truth(frozen: bool = False, **leaves: Tensor) -> Tensor:
        return oracle.norm_modulate(**leaves, norm=case.norm, eps=EPS, frozen=frozen)

    oracle.assert_near(made.y, truth(**{k: oracle.wide(v) for k, v in inputs.items()}), "y")
    mean, rstd = statistics(x, case.norm)
    oracle.assert_near(made.rstd, rstd.double(), "rstd")
    if mean is not None:
        oracle.assert_near(made.mean, mean.double(), "mean")

    sample_shift = shift is not None and shift.dim() == 2
    found = launchers.norm_modulate_backward(
        launch,
        *(dy, x, weight, scale, made.mean, made.rstd),
        norm=case.norm,
        parameters=draw.parameters,
        wants_shift=sample_shift,
        splits=case.splits,
    )
    expected = oracle.gradients(truth, inputs, dy)
    leading = oracle.gradients(partial(truth, frozen=True), inputs, dy)
    compare(found, expected, leading, {"dx": "x", "dweight": "weight", "dscale": "scale", "dshift": "shift"})
    return [made.y, made.rstd, *(t for t in found.values() if t is not None)]


def compare(
    found: dict[str, Tensor | None],
    expected: dict[str, Tensor],
    leading: dict[str, Tensor],
    names: dict[str, str],
) -> None:
    """Gradients of parameters are sums of numbers of some units, which may cancel; so may an input's leading term."""
    for output, source in names.items():
        gradient = found[output]
        if gradient is not None:
            terms: Tensor | float = leading[source] if source in {"x", "z"} else 3.0
            oracle.assert_near(gradient, expected[source], output, terms=terms)


def gated_residual(launch: Launch, case: Rows) -> list[Tensor]:
    draw = Draws(case)
    x, z, dout = draw.activation(), draw.activation(), draw.activation()
    gate, weight = draw.modulation(case.gate), draw.weight()
    options = {"norm": case.post_norm, "gate_act": case.gate_act}
    out, rstd = launchers.gated_residual_forward(
        launch, x, z, gate, weight, **options, eps=EPS, parameters=draw.parameters
    )
    inputs = {"z": z, "gate": gate, "weight": weight}

    def truth(frozen: bool = False, **leaves: Tensor) -> Tensor:
        return oracle.branch(**leaves, **options, eps=EPS, frozen=frozen)

    total = oracle.wide(x) + truth(**{k: oracle.wide(v) for k, v in inputs.items()})
    oracle.assert_near(out, total, "out", terms=oracle.wide(x))
    if rstd is not None:
        oracle.assert_near(rstd, statistics(z, "rms")[1].double(), "rstd")
    found = launchers.gated_residual_backward(
        launch, dout, z, gate, weight, rstd, **options, parameters=draw.parameters, splits=case.splits
    )
    leading = oracle.gradients(partial(truth, frozen=True), inputs, dout)
    compare(found, oracle.gradients(truth, inputs, dout), leading, {"dz": "z", "dgate": "gate", "dweight": "weight"})
    return [out, *(t for t in found.values() if t is not None)]


def gated_residual_of_a_broken_branch(launch: Launch) -> None:
    """Without a norm dz does not look at z: it is finite where z is not."""
    case = Rows(post_norm="none", gate_act="none", dtype=torch.float16)
    draw = Draws(case)
    z, dout, gate = draw.activation(), draw.activation(), draw.modulation("sample")
    z[0, 1, 3], z[1, 4, -1] = torch.inf, torch.nan
    found = launchers.gated_residual_backward(
        launch, dout, z, gate, None, None, norm="none", gate_act="none", parameters=torch.float16, splits=None
    )
    assert found["dz"] is not None and gate is not None
    oracle.assert_near(found["dz"], dout.double() * gate.double().unsqueeze(1), "dz")


def seam(launch: Launch, case: Rows) -> list[Tensor]:
    draw = Draws(case)
    x, z, dh = draw.activation(), draw.activation(), draw.activation()
    dout = draw.activation() if case.wants_dout else None
    given = {
        "gate": draw.modulation(case.gate),
        "post_weight": draw.weight(),
        "pre_weight": draw.weight(),
        "scale": draw.modulation(case.scale),
        "shift": draw.modulation(case.shift),
    }
    options = {"post_norm": case.post_norm, "norm": case.norm, "gate_act": case.gate_act}
    made = launchers.seam_forward(launch, x, z, given, **options, eps=EPS, parameters=draw.parameters)

    def gated(z: Tensor, gate: Tensor | None, post_weight: Tensor | None, frozen: bool = False) -> Tensor:
        return oracle.branch(z, gate, post_weight, norm=case.post_norm, gate_act=case.gate_act, eps=EPS, frozen=frozen)

    def modulated(
        out: Tensor, pre_weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, frozen: bool = False
    ) -> Tensor:
        return oracle.norm_modulate(out, pre_weight, scale, shift, norm=case.norm, eps=EPS, frozen=frozen)

    wide = {k: oracle.wide(v) for k, v in given.items()}
    total = oracle.wide(x) + gated(oracle.wide(z), wide["gate"], wide["post_weight"])
    oracle.assert_near(made.out, total, "out", terms=oracle.wide(x))
    # h and the backward read the sum as it is stored, rounded, so the oracle starts from that.
    after_sum = modulated(oracle.wide(made.out), wide["pre_weight"], wide["scale"], wide["shift"])
    oracle.assert_near(made.h, after_sum, "h")
    mean, rstd = statistics(made.out, case.norm)
    saved = {"post_rstd": made.post_rstd, "mean": mean, "rstd": rstd}
    sample_shift = given["shift"] is not None and given["shift"].dim() == 2
    found = launchers.seam_backward(
        launch,
        *(dout, dh, made.out, z, given, saved),
        **options,
        parameters=draw.parameters,
        wants_shift=sample_shift,
        splits=case.splits,
    )
    after = {"out": made.out, "pre_weight": given["pre_weight"], "scale": given["scale"], "shift": given["shift"]}
    expected = oracle.gradients(modulated, after, dh)
    stream = expected["out"] + (0 if dout is None else oracle.wide(dout))
    before = {"z": z, "gate": given["gate"], "post_weight": given["post_weight"]}
    expected |= oracle.gradients(gated, before, stream) | {"x": stream}
    leading = {"x": oracle.gradients(partial(modulated, frozen=True), after, dh)["out"]}
    largest = torch.maximum(stream.abs(), leading["x"].abs())
    leading["z"] = oracle.gradients(partial(gated, frozen=True), before, largest)["z"]
    names = {"dx": "x", "dz": "z"} | {f"d{k}": k for k in given}
    compare(found, expected, leading, names)
    return [made.out, made.h, *(t for t in found.values() if t is not None)]


@dataclass(frozen=True)
class Heads:
    """One case of a head op."""

    batch: int = 2
    length: int = 3
    heads: int = 3
    key_heads: int | None = None
    width: int = 128
    dtype: torch.dtype = torch.bfloat16
    parameters: torch.dtype | None = None
    weight: bool = True
    shared_freqs: bool = True
    packed: bool = False  # q and k are slices of one projection
    offset: int = 0
    splits: int | None = None
    seed: int = 0


def _heads(case: Heads, random: torch.Generator) -> tuple[Tensor, Tensor]:
    key_heads = case.heads if case.key_heads is None else case.key_heads
    counts = (case.heads, key_heads)
    shapes = [(case.batch, case.length, n, case.width) for n in counts]
    if case.packed:
        both = torch.randn(case.batch, case.length, sum(counts), case.width, generator=random).to(case.dtype)
        return both[:, :, : case.heads], both[:, :, case.heads :]
    made = []
    for shape in shapes:
        size = case.batch * case.length * shape[2] * case.width
        memory = torch.randn(size + case.offset, generator=random).to(case.dtype)
        made.append(memory[case.offset :].view(shape))
    return made[0], made[1]


def _freqs(case: Heads, random: torch.Generator) -> Tensor:
    samples = 1 if case.shared_freqs else case.batch
    angles = 7 * torch.randn(samples, case.length, case.width // 2, generator=random)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(-2)
    return table.expand(case.batch, -1, -1)


def qk_norm_rope(launch: Launch, case: Heads) -> list[Tensor]:
    random = torch.Generator().manual_seed(case.seed)
    parameters = case.parameters or case.dtype
    (q, k), (dq_out, dk_out), freqs = _heads(case, random), _heads(case, random), _freqs(case, random)
    draw = [(1 + 0.3 * torch.randn(case.width, generator=random)).to(parameters) for _ in range(2)]
    weights = (draw[0], draw[1]) if case.weight else (None, None)
    made = launchers.qk_norm_rope_forward(launch, q, k, weights, freqs, eps=EPS, parameters=parameters)
    found = launchers.qk_norm_rope_backward(
        launch, dq_out, dk_out, q, k, weights, freqs, eps=EPS, parameters=parameters, splits=case.splits
    )
    turns = freqs.to(torch.float64)
    for name, x, dy, y, weight in (("q", q, dq_out, made[0], weights[0]), ("k", k, dk_out, made[1], weights[1])):

        def truth(x: Tensor, weight: Tensor | None, frozen: bool = False) -> Tensor:
            return oracle.qk_norm(x, weight, turns, eps=EPS, frozen=frozen)

        oracle.assert_near(y, truth(oracle.wide(x), oracle.wide(weight)), f"{name}_out")
        expected = oracle.gradients(truth, {"x": x, "weight": weight}, dy)
        leading = oracle.gradients(partial(truth, frozen=True), {"x": x, "weight": weight}, dy)
        compare(found, expected, leading, {f"d{name}": "x", f"d{name}_weight": "weight"})
    return [*made, *(t for t in found.values() if t is not None)]


def rope(launch: Launch, case: Heads) -> list[Tensor]:
    random = torch.Generator().manual_seed(case.seed)
    x, _ = _heads(case, random)
    freqs = _freqs(case, random)
    y, back = launchers.rope(launch, x, freqs), launchers.rope(launch, x, freqs, inverse=True)
    oracle.assert_near(y, oracle.rope(oracle.wide(x), freqs.to(torch.float64)), "y")
    conjugate = freqs.to(torch.float64) * torch.tensor([1.0, -1.0]).repeat(case.width // 2)
    oracle.assert_near(back, oracle.rope(oracle.wide(x), conjugate), "inverse")
    return [y, back]


def swiglu(launch: Launch, case: Rows, *, joined: bool = False) -> list[Tensor]:
    draw = Draws(case)
    dy = draw.activation()
    if joined:
        gate, up = (3 * draw.normal(case.batch, case.length, 2 * case.width)).to(case.dtype).chunk(2, dim=-1)
    else:
        gate, up = draw.activation() * 3, draw.activation()
    y = launchers.swiglu_forward(launch, gate, up)
    oracle.assert_near(y, oracle.swiglu(oracle.wide(gate), oracle.wide(up)), "y")
    found = launchers.swiglu_backward(launch, dy, gate, up, joined=joined)
    expected = oracle.gradients(oracle.swiglu, {"gate": gate, "up": up}, dy)
    oracle.assert_near(found[0], expected["gate"], "dgate", terms=1.0)
    oracle.assert_near(found[1], expected["up"], "dup")
    return [y, *found]


@dataclass(frozen=True)
class Samples:
    """One case of an op on samples."""

    batch: int = 2
    size: int = 1000
    dtype: torch.dtype = torch.float32
    network: torch.dtype | None = None  # None: as the state
    offset: int = 0  # elements that samples start past a 16-byte boundary
    gap: int = 0  # elements between samples
    per_sample: bool = True  # a step, or a factor, of each sample's own
    seed: int = 0

    def draw(self, count: int, network: bool = False) -> list[Tensor]:
        """So many tensors [batch, size] of the state's dtype, or of the network's."""
        dtype = (self.network or self.dtype) if network else self.dtype
        random = torch.Generator().manual_seed(self.seed + (1000 if network else 0))
        made = []
        for _ in range(count):
            memory = torch.randn(self.offset + self.batch * (self.size + self.gap), generator=random).to(dtype)
            made.append(memory[self.offset :].view(self.batch, self.size + self.gap)[:, : self.size])
        return made

    def numbers(self) -> Tensor:
        return torch.linspace(-1, 0.5, self.batch)


def euler_step(launch: Launch, case: Samples) -> list[Tensor]:
    (x, dy), (v,) = case.draw(2), case.draw(1, network=True)
    delta = case.numbers() if case.per_sample else -0.3
    wide = oracle.wide(delta)[:, None] if isinstance(delta, Tensor) else delta
    y = launchers.euler_step_forward(launch, x, v, delta)
    oracle.assert_near(y, oracle.wide(x) + wide * oracle.wide(v), "y", terms=oracle.wide(x))
    dv = launchers.euler_step_backward(launch, dy, delta, v.dtype)
    oracle.assert_near(dv, wide * oracle.wide(dy), "dv")
    return [y, dv]


def two_step_split(launch: Launch, case: Samples) -> list[Tensor]:
    (noise, inherited, own), (v,) = case.draw(3), case.draw(1, network=True)
    z, x_a = launchers.two_step_split_forward(launch, noise, v, 0.7)
    oracle.assert_near(z, oracle.wide(noise) - 0.3 * oracle.wide(v), "z", terms=oracle.wide(noise))
    oracle.assert_near(x_a, oracle.wide(noise) - oracle.wide(v), "x_a", terms=oracle.wide(noise))
    made = [z, x_a]
    for with_inherited, with_own, with_factors in ((1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 0)):
        factors = None if not with_factors else case.numbers() if case.per_sample else torch.tensor([0.4])
        g, a = inherited if with_inherited else None, own if with_own else None
        dv = launchers.two_step_split_backward(launch, g, a, factors, -0.03, v.dtype)
        scale = torch.ones(1) if factors is None else factors
        exact = torch.zeros(case.batch, case.size, dtype=torch.float64)
        exact = exact if g is None else -0.03 * scale.double()[:, None] * oracle.wide(g)
        exact = exact if a is None else exact - oracle.wide(a)
        oracle.assert_near(dv, exact, "dv", terms=exact if a is None else oracle.wide(a))
        made.append(dv)
    return made


def gradient_norms(launch: Launch, case: Samples) -> list[Tensor]:
    (g,) = case.draw(1)
    norms, total = launchers.gradient_norms(launch, g)
    squares = oracle.wide(g).square()
    # Sums of squares cancel nothing: the last place of the result but one, not the rows' bound.
    torch.testing.assert_close(norms.double(), squares.sum(1).sqrt(), rtol=2.5e-7, atol=0, msg=wrong)
    torch.testing.assert_close(total.double(), squares.sum().sqrt()[None], rtol=2.5e-7, atol=0, msg=wrong)
    return [norms, total]


def wrong(text: str) -> str:
    return f"wrong; first at {text}"


def dmd_direction(launch: Launch, case: Samples) -> list[Tensor]:
    (x,), (real, fake) = case.draw(1), case.draw(2, network=True)
    found = launchers.dmd_direction(launch, x, real, fake, eps=EPS)
    mean = (oracle.wide(x) - oracle.wide(real)).abs().mean(1, keepdim=True).clamp_min(EPS)
    exact = (oracle.wide(fake) - oracle.wide(real)) / mean
    torch.testing.assert_close(found.double(), exact, rtol=4e-7, atol=1e-12, msg=wrong)
    return [found]


def dmd_direction_of_broken_samples(launch: Launch) -> None:
    """A sample whose normaliser is infinite or NaN is NaN throughout, and its neighbour is whole."""
    for value in (torch.inf, -torch.inf, torch.nan):
        for broken in range(3):
            (x,), (real, fake) = Samples(size=5000).draw(1), Samples(size=5000).draw(2, network=True)
            (x, real, fake)[broken][1, -1] = value
            found = launchers.dmd_direction(launch, x, real, fake, eps=EPS)
            assert found[0].isfinite().all(), "wrong; first at the whole sample"
            hidden = found[1, -1:].isfinite() if broken == 2 else ~found[1].isnan()
            assert not hidden.any(), f"wrong; first at {value} in {('x', 'real', 'fake')[broken]}"
