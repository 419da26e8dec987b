"""Faults put into the sources are caught: by the oracle, or by the emulated device. So the checks can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import pytest
import torch

from . import checks
from .checks import Heads, Rows, Samples
from .conftest import CACHE
from .launchers import Emulator, Launch

F32, BF16 = torch.float32, torch.bfloat16


def some_rows(op: Callable[[Launch, Rows], object]) -> Callable[[Launch], None]:
    def check(launch: Launch) -> None:
        for width, dtype, norm in ((520, BF16, "rms"), (129, F32, "layer"), (3840, BF16, "layer"), (64, BF16, "rms")):
            op(launch, Rows(batch=2, length=7, width=width, dtype=dtype, norm=norm, splits=3))
        op(launch, Rows(length=7, width=64, scale="token", shift="token", gate="token", splits=2))

    return check


def some_heads(launch: Launch) -> None:
    checks.qk_norm_rope(launch, Heads(heads=5, key_heads=3, length=5, splits=2, parameters=F32))
    checks.qk_norm_rope(launch, Heads(width=30, offset=1, length=2))


def some_samples(launch: Launch) -> None:
    for case in (Samples(size=9001, network=BF16), Samples(size=1024, gap=8), Samples(batch=3, size=24)):
        for op in (checks.euler_step, checks.two_step_split, checks.gradient_norms, checks.dmd_direction):
            op(launch, case)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    check: Callable[[Launch], None]
    report: str  # how it shows


NORM, RESIDUAL, SEAM = (some_rows(op) for op in (checks.norm_modulate, checks.gated_residual, checks.seam))
WRONG = "wrong; first at"

MUTANTS = [
    Mutant(
        "no barrier between a sum's writes and reads",
        "cuda/team.cuh",
        "    __syncthreads();\n#pragma unroll\n    for (int k = 0; k < K; ++k) values[k] = 0.f;",
        "#pragma unroll\n    for (int k = 0; k < K; ++k) values[k] = 0.f;",
        NORM,
        "race: shared memory",
    ),
    Mutant(
        "no barrier after the lines of sums are cleared",
        "cuda/team.cuh",
        "shared_store(line_ + i, 0.f);\n    __syncthreads();",
        "shared_store(line_ + i, 0.f);",
        NORM,
        "race: shared memory",
    ),
    Mutant("one line of sums instead of two", "cuda/team.cuh", "odd_ ^= 1;", "", RESIDUAL, "race: shared memory"),
    Mutant(
        "half a team is summed",
        "cuda/team.cuh",
        "distance = team.size >> 1;",
        "distance = team.size >> 2;",
        NORM,
        WRONG,
    ),
    Mutant(
        "a team's mask names the lanes of others",
        "cuda/team.cuh",
        "mask = size < 32 ? ((1u << size) - 1u) << first : 0xffffffffu;",
        "mask = size < 32 ? (1u << size) - 1u : 0xffffffffu;\n    (void)first;",
        NORM,
        "leaves out the calling lane",
    ),
    Mutant(
        "the last warps are left out of a sum",
        "cuda/team.cuh",
        "warp < (team.size >> 5); warp += 4",
        "warp + 4 < (team.size >> 5); warp += 4",
        NORM,
        WRONG,
    ),
    Mutant(
        "one vector too many at the end of a row",
        "cuda/team.cuh",
        "        if (column < width) f(v, column);",
        "        if (column <= width) f(v, column);",
        RESIDUAL,
        "out of bounds|race: device memory",
    ),
    Mutant(
        "rows are used before they have arrived",
        "cuda/shared.cuh",
        "__pipeline_wait_prior(4)",
        "__pipeline_wait_prior(5)",
        NORM,
        "before the copy into it was waited for",
    ),
    Mutant(
        "rows are sent for into the slot in use",
        "cuda/rows.cuh",
        "fetch(team, freed, i",
        "fetch(team, slot_, i",
        SEAM,
        "waited for|before it was written|" + WRONG,
    ),
    Mutant(
        "rows are not followed to the next",
        "cuda/rows.cuh",
        "row_[k] += tensors(k).token_stride",
        "row_[k] += k == 0 ? tensors(k).token_stride : 0",
        NORM,
        WRONG,
    ),
    Mutant(
        "rows past the end of a run are sent for",
        "cuda/rows.cuh",
        "i + ahead_ < run.count",
        "i + ahead_ < run.count + 8",
        RESIDUAL,
        "out of bounds",
    ),
    Mutant(
        "the last row of a run is left out",
        "cuda/rows.cuh",
        "left < plan.rows ? left : plan.rows",
        "left < plan.rows ? left - 1 : plan.rows",
        NORM,
        WRONG,
    ),
    Mutant(
        "runs write their sums in one place",
        "cuda/rows.cuh",
        "* partials.splits + run.index) * width",
        "* partials.splits) * width",
        RESIDUAL,
        "written by two threads",
    ),
    Mutant(
        "a slot for fewer vectors than a thread has",
        "cuda/rows.cuh",
        "(thread >> 5) * (count * 32) + (thread & 31)",
        "(thread >> 5) * (count * 16) + (thread & 31)",
        SEAM,
        "race: shared memory|waited for",
    ),
    Mutant(
        "statistics are taken a row late",
        "cuda/rows.cuh",
        "next_ = __ldg(data_ + row + 1);",
        "next_ = __ldg(data_ + row);",
        NORM,
        WRONG,
    ),
    Mutant(
        "the last split is not added",
        "cuda/column_sums.cu",
        "sum_strided(from, s.splits, s.width, inside)",
        "sum_strided(from, s.splits - 1, s.width, inside)",
        SEAM,
        WRONG,
    ),
    Mutant(
        "no barrier before lanes are added",
        "cuda/column_sums.cu",
        "threadIdx.x, total);\n  __syncthreads();",
        "threadIdx.x, total);",
        NORM,
        "race: shared memory|read before it was written",
    ),
    Mutant(
        "the last sample gives nothing to the weight",
        "cuda/column_sums.cu",
        "column, s.batch, sample, inside)",
        "column, s.batch - 1, sample, inside)",
        RESIDUAL,
        WRONG,
    ),
    Mutant(
        "bfloat16 is cut off, not rounded",
        "cuda/vectors.cuh",
        "    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);",
        "    const float cut = __uint_as_float(__float_as_uint(in[0]) & 0xffff0000u);\n"
        "    const __nv_bfloat162 pair = __floats2bfloat162_rn(cut, in[1]);",
        NORM,
        WRONG,
    ),
    Mutant(
        "scale without the one",
        "cuda/modulation.cuh",
        "static __device__ float apply(float x, bool) { return 1.f + x; }",
        "static __device__ float apply(float x, bool) { return x; }",
        NORM,
        WRONG,
    ),
    Mutant(
        "the gradient of the residual stream forgets dout",
        "gated_residual_norm_modulate.cu",
        "for (int e = 0; e < W; ++e) t[e] += dh[e];",
        "",
        SEAM,
        WRONG,
    ),
    Mutant(
        "the norm is of the sum before it is rounded",
        "gated_residual_norm_modulate.cu",
        "x[e] = to_float(from_float<T>(x[e] + c[v][e] * (z[e] * post_rstd)));",
        "x[e] += c[v][e] * (z[e] * post_rstd);",
        SEAM,
        WRONG,
    ),
    Mutant(
        "pairs turn the wrong way in the backward",
        "qk_norm_rope.cu",
        "turn(turns[v], -1.f, dn);",
        "turn(turns[v], 1.f, dn);",
        some_heads,
        WRONG,
    ),
    Mutant(
        "no barrier before a block's heads are added",
        "qk_norm_rope.cu",
        "  __syncthreads();\n  // Runs are numbered",
        "  // Runs are numbered",
        some_heads,
        "race: shared memory|read before it was written",
    ),
    Mutant(
        "sums of k go where those of q are",
        "qk_norm_rope.cu",
        "(blockIdx.x & 1) * p.batch * plan.runs + ",
        "",
        some_heads,
        "written by two threads",
    ),
    Mutant(
        "one head too many",
        "qk_norm_rope.cu",
        "        if (h >= heads) continue;\n        dys[n]",
        "        if (h > heads) continue;\n        dys[n]",
        some_heads,
        "out of bounds",
    ),
    Mutant(
        "one element too many",
        "swiglu.cu",
        "      if (columns[n] >= of.width) continue;\n#pragma unroll\n      for (int e = 0; e < W; ++e) a[n][e] *=",
        "      if (columns[n] > of.width) continue;\n#pragma unroll\n      for (int e = 0; e < W; ++e) a[n][e] *=",
        lambda launch: checks.swiglu(launch, Rows(width=30, length=3, offset=1)),
        "out of bounds|race: device memory|" + WRONG,
    ),
    Mutant(
        "every sample takes the first one's step",
        "euler_step.cu",
        "static_cast<const float*>(deltas) + b)",
        "static_cast<const float*>(deltas) + 0 * b)",
        some_samples,
        WRONG,
    ),
    Mutant(
        "the inherited gradient is not clipped",
        "two_step_split.cu",
        "coefficient *= __ldg(",
        "coefficient *= 1.f + 0.f * __ldg(",
        some_samples,
        WRONG,
    ),
    Mutant(
        "the own gradient is added, not subtracted",
        "two_step_split.cu",
        "g[e] -= own[n][e];",
        "g[e] += own[n][e];",
        some_samples,
        WRONG,
    ),
    Mutant(
        "a sample's last piece is left out",
        "cuda/sample_sums.cu",
        "partials + b * pieces, all ? batch * pieces : pieces)",
        "partials + b * pieces, all ? batch * pieces : pieces - 1)",
        some_samples,
        WRONG,
    ),
    Mutant(
        "no barrier before sums of pieces are added",
        "cuda/sample_sums.cu",
        "shared_store(line + threadIdx.x, total);\n    __syncthreads();",
        "shared_store(line + threadIdx.x, total);",
        some_samples,
        "race: shared memory|read before it was written",
    ),
    Mutant(
        "a difference without its magnitude",
        "cuda/sample_sums.cu",
        "fabsf(terms[n][e] - others[n][e])",
        "(terms[n][e] - others[n][e])",
        some_samples,
        WRONG,
    ),
    Mutant(
        "an infinite branch without a norm breaks its gradient",
        "gated_residual.cu",
        "z[e] = normed ? g + z[e] * project : g;",
        "z[e] = g + z[e] * project;",
        checks.gated_residual_of_a_broken_branch,
        WRONG,
    ),
    Mutant(
        "an infinite mean gives a direction of 0",
        "cuda/sample_sums.cu",
        " + 0. * mean",
        "",
        checks.dmd_direction_of_broken_samples,
        WRONG,
    ),
    Mutant(
        "the direction points back",
        "dmd_direction.cu",
        "(fake[n][e] - real[n][e]) * scale",
        "(real[n][e] - fake[n][e]) * scale",
        some_samples,
        WRONG,
    ),
]


SOURCE = {NORM: "norm_modulate.cu", RESIDUAL: "gated_residual.cu", SEAM: "gated_residual_norm_modulate.cu"}


@cache
def holds(emulator: Emulator, check: Callable[[Launch], None]) -> None:
    """The same check passes on the sources as they are; once is enough."""
    check(emulator)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_fault_in_the_sources_is_caught(builder: ModuleType, emulator: Emulator, mutant: Mutant) -> None:
    holds(emulator, mutant.check)
    change = builder.Substitution(mutant.file, mutant.old, mutant.new)
    affected = [mutant.file if mutant.file.endswith(".cu") else SOURCE[mutant.check]]
    broken = Emulator(builder.load(builder.build(CACHE, [change], affected=affected)))
    with pytest.raises((AssertionError, RuntimeError), match=mutant.report):
        mutant.check(broken)


def test_a_mutation_that_finds_no_place_is_an_error(builder: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 times, expected once"):
        builder.build(CACHE, [builder.Substitution("cuda/team.cuh", "no such text", "")])
    with pytest.raises(ValueError, match="expected once"):
        builder.build(CACHE, [builder.Substitution("cuda/team.cuh", "__syncthreads();", "")])
