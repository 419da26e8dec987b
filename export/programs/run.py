"""A student that was compiled ahead of time. Written by twostep (Apache-2.0); needs torch alone.

    python run.py            draws noise and a random caption's features, samples, and says how long it takes

noise     [B, C, H, W], float32
features  [B, L, F], of the pipeline's text encoder, in the program's dtype
lengths   [B], Z-Image alone: tokens of each caption. L is a multiple of 32, and the next one after every length.
"""

import json
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def load():
    if not hasattr(torch.ops.twostep, "swiglu"):  # loaded by twostep already; a second copy crashes
        torch.ops.load_library(str(HERE / "kernels.so"))
    return torch._inductor.aoti_load_package(str(HERE / "sampler.pt2"))


def sample(sampler, noise, features, lengths=None):
    """Latents. The program itself checks nothing: what it would compute wrongly without a word is an error here."""
    given = {"noise": noise, "features": features}
    if lengths is not None:
        given["lengths"] = lengths
    inputs, sizes = json.loads((HERE / "export.json").read_text())["inputs"], {}
    if given.keys() != inputs.keys():
        raise ValueError(f"given are {', '.join(given)}, expected {', '.join(inputs)}")
    for name, one in inputs.items():
        shape, dtype = list(given[name].shape), str(given[name].dtype).removeprefix("torch.")
        fits = dtype == one["dtype"] and len(shape) == len(one["shape"])
        if not fits or not all(_fits(n, size, sizes) for n, size in zip(shape, one["shape"], strict=True)):
            also = f", with {', '.join(f'{k} = {v}' for k, v in sizes.items())}" if sizes else ""
            raise ValueError(f"{name} is {dtype} of shape {shape}, expected {one['dtype']} of {one['shape']}{also}")
    if lengths is not None:
        tokens = features.shape[1]
        if not ((lengths > tokens - 32) & (lengths <= tokens)).all():
            raise ValueError(
                f"features hold {tokens} tokens and captions end at {lengths.tolist()}: fill up to a multiple of 32, "
                f"and put captions into one call that end within the same 32"
            )
    return sampler(**{name: tensor.contiguous() for name, tensor in given.items()})


def _fits(given, size, sizes):
    """Whether a size is the number, or a multiple such as 2*rows of the same rows as before."""
    if isinstance(size, int):
        return given == size
    factor, _, name = size.rpartition("*")
    count, rest = divmod(given, int(factor or 1))
    return rest == 0 and count > 0 and sizes.setdefault(name, count) == count


def random_inputs(batch=2, height=16, width=16, tokens=32):
    facts = json.loads((HERE / "export.json").read_text())
    device = "cpu" if facts["device"].startswith("CPU") else "cuda"
    sizes = {0: batch, 1: tokens, 2: height, 3: width}
    made = {}
    for name, one in facts["inputs"].items():
        shape = [size if isinstance(size, int) else sizes[axis] for axis, size in enumerate(one["shape"])]
        dtype = getattr(torch, one["dtype"])
        made[name] = (
            torch.randn(shape).to(device, dtype) if dtype.is_floating_point else torch.full(shape, tokens).to(device)
        )
    return made


if __name__ == "__main__":
    sampler, given = load(), random_inputs()
    sample(sampler, **given)
    begun = time.perf_counter()
    latents = sample(sampler, **given)
    if latents.is_cuda:
        torch.cuda.synchronize()
    print(f"latents {list(latents.shape)} in {1000 * (time.perf_counter() - begun):.1f} ms")
