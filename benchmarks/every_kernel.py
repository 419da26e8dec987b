"""Runs every CUDA kernel once, forward and backward, on small and odd shapes: what compute-sanitizer watches."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from twostep import ops
from twostep.bench import cases, timing


def _per_token(t: torch.Tensor, length: int) -> torch.Tensor:
    """A modulation per sample, [batch, 1, width], as one per token; other tensors as they are."""
    if t.dim() != 3 or t.shape[1] != 1 or length == 1:
        return t
    return t.detach().repeat(1, length, 1).requires_grad_()


def run(op: str, inputs: cases.Inputs) -> int:
    if op in cases.DATA_OPS:
        gradients = timing.as_tuple(timing.forward(getattr(ops, op), inputs)())
    else:
        gradients = timing.both(getattr(ops, op), inputs)()
    for gradient in gradients:
        assert torch.isfinite(gradient).all(), f"{op}: a result is not finite"
    return len(gradients)


def main() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [cases.Shape(2, 150, 128), cases.Shape(1, 40, 3840), cases.Shape(2, 33, 1001), cases.Shape(1, 2, 7)]
    count = 0
    for shape, op, dtype in itertools.product(shapes, cases.OPS, (torch.float32, torch.bfloat16, torch.float16)):
        if op in ("rope", "qk_norm_rope"):  # whole heads, of an even width
            shape = cases.Shape(shape.batch, shape.length, shape.width // 2 * 2 if shape.width < 128 else 384)
        inputs = cases.make(op, shape, dtype, "cuda", generator)
        assert all(t.is_cuda for t in inputs.arguments.values())
        count += run(op, inputs)
        per_token = {n: _per_token(t, shape.length) for n, t in inputs.arguments.items()}
        count += run(op, dataclasses.replace(inputs, arguments=per_token))
    torch.cuda.synchronize()
    print(f"{count} results, all finite")


if __name__ == "__main__":
    main()
