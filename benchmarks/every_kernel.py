"""Runs every CUDA kernel once, forward and backward, on small and odd shapes: what compute-sanitizer watches."""

from __future__ import annotations

import itertools

import torch

from twostep import ops
from twostep.bench import cases, timing


def main() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [cases.Shape(2, 5, 128), cases.Shape(1, 3, 3840), cases.Shape(2, 3, 1001), cases.Shape(1, 2, 7)]
    count = 0
    for shape, op, dtype in itertools.product(shapes, cases.OPS, (torch.float32, torch.bfloat16, torch.float16)):
        if op in ("rope", "qk_norm_rope") and min(cases.HEAD, shape.width) % 2:
            shape = cases.Shape(shape.batch, shape.length, shape.width - 1)
        inputs = cases.make(op, shape, dtype, "cuda", generator)
        assert all(t.is_cuda for t in inputs.arguments.values())
        for gradient in timing.both(getattr(ops, op), inputs)():
            assert torch.isfinite(gradient).all(), f"{op} {shape} {dtype}: a gradient is not finite"
            count += 1
    torch.cuda.synchronize()
    print(f"{count} gradients, all finite")


if __name__ == "__main__":
    main()
