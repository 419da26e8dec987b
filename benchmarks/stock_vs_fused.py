"""A diffusers model as it is, compiled, and fused by twostep.zoo: forward, and forward with backward, in one run.

    python benchmarks/stock_vs_fused.py --out DIR                   the miniature's size, on this CPU
    python benchmarks/stock_vs_fused.py --device cuda --out DIR     blocks of the real models, on a GPU

The candidates take turns, of one run that is not measured and TURN that are: the first pays for the memory and the
caches that another model has left, which nobody who runs one model has to. Medians are compared. `floor` is what the
matrix products and the attention of the fused model take by the profiler: nothing that leaves those alone can be
faster, so stock / floor is the best ratio there is. On the CPU the allocator is the system's, as it is for users;
--keep-freed-memory spares both candidates its page faults.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from twostep import __version__
from twostep.allocator import keep_freed_memory
from twostep.zoo import fuse

TURN = 4  # measured runs of a turn
MATMULS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "_scaled_dot_product",
    "attention",
    "gemm",
    "cutlass",
    "flash",
    "sm90",
)


@dataclass(frozen=True)
class Model:
    name: str
    kind: type
    config: dict[str, Any]
    batch: int
    size: tuple[int, int]  # of the latents
    caption: int  # tokens


MINIATURE = Model(
    "z-image, dim 128, 4 blocks",
    ZImageTransformer2DModel,
    {
        "in_channels": 4, "dim": 128, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
        "cap_feat_dim": 64, "axes_dims": [8, 12, 12], "axes_lens": [256, 64, 64],
    },
    32, (16, 16), 32,
)  # fmt: skip
KLEIN_MINIATURE = Model(
    "flux2, dim 128, 2 + 4 blocks",
    Flux2Transformer2DModel,
    {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4,
        "joint_attention_dim": 64, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False,
    },
    32, (8, 8), 32,
)  # fmt: skip
Z_IMAGE = Model(
    "Z-Image, 4 of 30 blocks", ZImageTransformer2DModel, {"n_layers": 4, "n_refiner_layers": 0}, 1, (128, 128), 512
)
KLEIN_4B = Model(
    "FLUX.2-klein 4B, 1 of 5 + 4 of 20 blocks",
    Flux2Transformer2DModel,
    {
        "num_layers": 1, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 7680, "guidance_embeds": False,
    },
    1, (64, 64), 512,
)  # fmt: skip


@dataclass
class Row:
    model: str
    batch: int
    tokens: int
    dtype: str
    direction: str
    milliseconds: dict[str, float]
    floor: float
    peak_mib: dict[str, float]


def build(model: Model, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        network = model.kind(**model.config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
            parameter.data = parameter.data.to(dtype)
    return network


def inputs(model: Model, dtype: torch.dtype, device: str) -> Callable[[nn.Module], Tensor]:
    """A call by diffusers' own interface, captions of different lengths, as its pipelines make it."""
    g = torch.Generator().manual_seed(0)
    n, (height, width) = model.batch, model.size
    x = torch.randn(
        n,
        model.config.get("in_channels", 16 if model.kind is ZImageTransformer2DModel else 128),
        height,
        width,
        generator=g,
    )
    x, t = x.to(device, dtype), torch.rand(n, generator=g).to(device)
    if model.kind is ZImageTransformer2DModel:
        lengths = torch.randint(model.caption - 24, model.caption + 1, (n,), generator=g).tolist()
        features = model.config.get("cap_feat_dim", 2560)
        captions = [torch.randn(length, features, generator=g).to(device, dtype) for length in lengths]
        images = list(x.unsqueeze(2))
        return lambda network: torch.stack(network(images, t, captions, return_dict=False)[0])
    tokens = x.flatten(2).transpose(1, 2).contiguous()
    caption = torch.randn(n, model.caption, model.config["joint_attention_dim"], generator=g).to(device, dtype)
    zero = torch.zeros(1, dtype=torch.int64)
    image_ids = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero).to(device)
    text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(model.caption)).to(device)
    return lambda network: network(tokens, caption, t, image_ids, text_ids, return_dict=False)[0]


def directions(call: Callable[[nn.Module], Tensor]) -> dict[str, Callable[[nn.Module], Any]]:
    def forward(network: nn.Module) -> None:
        with torch.no_grad():
            call(network)

    def both(network: nn.Module) -> None:
        network.zero_grad(set_to_none=True)
        call(network).sum().backward()

    return {"forward": forward, "forward + backward": both}


def seconds_of(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_turns(runs: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(), run()
    deadline = time.perf_counter() + seconds * len(runs)
    while len(next(iter(samples.values()))) < 2 * TURN or time.perf_counter() < deadline:
        for name, run in runs.items():
            run()
            samples[name] += [seconds_of(run, device) for _ in range(TURN)]
    return {name: statistics.median(found) for name, found in samples.items()}


def peak_memory(runs: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    if device != "cuda":
        return {}
    peaks = {}
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def floor_of(run: Callable[[], Any], device: str) -> float:
    """Seconds of matrix products and attention in one run."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, *([kind.CUDA] if device == "cuda" else [])]) as profile:
        seconds_of(run, device)
    total = 0.0
    for event in profile.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if any(word in event.key for word in MATMULS) and on_device == (device == "cuda"):
            total += event.self_device_time_total if on_device else event.self_cpu_time_total
    return total / 1e6


def measure(model: Model, dtype: torch.dtype, device: str, compiled: bool, seconds: float) -> list[Row]:
    stock = build(model, dtype, device)
    networks = {"stock": stock, "fused": fuse(copy.deepcopy(stock))}
    if compiled:
        for name in ("stock", "fused"):
            network = copy.deepcopy(networks[name])
            network.compile_repeated_blocks(fullgraph=True) if model.kind is ZImageTransformer2DModel else [
                block.compile() for block in (*network.transformer_blocks, *network.single_transformer_blocks)
            ]
            networks[f"{name} compiled"] = network
    rows = []
    image = model.size[0] * model.size[1] // (4 if model.kind is ZImageTransformer2DModel else 1)
    for direction, run in directions(inputs(model, dtype, device)).items():
        runs = {name: (lambda network=network, run=run: run(network)) for name, network in networks.items()}
        found = time_turns(runs, device, seconds)
        rows.append(
            Row(
                model.name,
                model.batch,
                image + model.caption,
                str(dtype).removeprefix("torch."),
                direction,
                {name: value * 1e3 for name, value in found.items()},
                min(floor_of(runs["fused"], device) for _ in range(5)) * 1e3,
                peak_memory(runs, device),
            )
        )
        print(table(rows[-1:]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.milliseconds))
    head = [
        "model",
        "batch x tokens",
        "dtype",
        "direction",
        *(f"{n}: ms" for n in names),
        "floor: ms",
        "stock / fused",
        "best possible",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        times = [f"{row.milliseconds[n]:.1f}" if n in row.milliseconds else "" for n in names]
        stock = row.milliseconds["stock"]
        ratios = [f"{stock / row.milliseconds['fused']:.2f}x", f"{stock / row.floor:.2f}x"]
        cells = [
            row.model,
            f"{row.batch} x {row.tokens}",
            row.dtype,
            row.direction,
            *times,
            f"{row.floor:.1f}",
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()


def save(rows: list[Row], folder: Path, device: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    facts = {
        "machine": machine,
        "torch": torch.__version__,
        "twostep": __version__,
        "python": platform.python_version(),
        "date": str(date.today()),
        "command": " ".join(["python", *sys.argv]),
    }
    (folder / "stock_vs_fused.json").write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1))
    said = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    (folder / "stock_vs_fused.md").write_text(
        f"# Stock and fused models\n\n    {facts['command']}\n\n{said}\n\n{table(rows)}\n"
    )
    with (folder / "stock_vs_fused.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "batch", "tokens", "dtype", "direction", "candidate", "milliseconds"])
        for row in rows:
            for name, value in row.milliseconds.items():
                writer.writerow([row.model, row.batch, row.tokens, row.dtype, row.direction, name, value])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="add torch.compile's columns (cuda: on)"
    )
    parser.add_argument(
        "--full-size", action=argparse.BooleanOptionalAction, help="blocks of the real models (cuda: on)"
    )
    parser.add_argument("--keep-freed-memory", action="store_true", help="CPU: no page faults for new tensors")
    parser.add_argument("--batch", type=int, help="another batch size")
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on each candidate")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table, CSV and JSON there")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if arguments.keep_freed_memory:
        keep_freed_memory()
    compiled = on_gpu if arguments.compile is None else arguments.compile
    full = on_gpu if arguments.full_size is None else arguments.full_size
    models = (Z_IMAGE, KLEIN_4B) if full else (MINIATURE, KLEIN_MINIATURE)
    dtypes = (torch.bfloat16,) if full else (torch.float32, torch.bfloat16)
    rows: list[Row] = []
    for model in models:
        chosen = model if arguments.batch is None else replace(model, batch=arguments.batch)
        for dtype in dtypes:
            rows += measure(chosen, dtype, arguments.device, compiled, arguments.seconds)
    print(table(rows))
    if arguments.out:
        save(rows, arguments.out, arguments.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
