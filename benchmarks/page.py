"""docs/performance.md and the README's numbers, from the raw results in benchmarks/results.

    python benchmarks/page.py            writes what stands between the marks of both, and the pictures
    python benchmarks/page.py --check    writes nothing; the exit status is 1 where a text is not what the results say

All results are in the table of runs; the newest of CPUs and the newest of GPUs, and of each other benchmark the newest
that there is, are printed in full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from committed import Folder, folders

from twostep.bench import cases, report
from twostep.bench import launch as overhead
from twostep.bench.measure import Row
from twostep.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE, README, PICTURES = ROOT / "docs" / "performance.md", ROOT / "README.md", ROOT / "docs" / "pictures"
BEGIN, END = "<!-- from benchmarks/results, by benchmarks/page.py -->", "<!-- end -->"
WITH_NORM = cases.OPS[:4]
BLOCK_OPS = cases.OPS[:6]


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value < 9.95 else f"{value:.0f}x"


# The table of runs


def mean_ratio(rows: Sequence[Row], ops: Sequence[str], candidate: str) -> str:
    chosen = [r for r in rows if r.op in ops and r.direction == "both" and r.ratio(candidate) is not None]
    return times(report.geometric_mean([r.ratio(candidate) or 0.0 for r in chosen])) if chosen else ""


def largest_shape(rows: Sequence[Row]) -> str:
    def elements(text: str) -> int:
        shape = cases.Shape.parse(text)
        return shape.batch * shape.length * shape.width

    return max({row.shape for row in rows}, key=elements, default="")


def copy_share(rows: Sequence[Row]) -> str:
    """Of the largest shape, both directions: the least and the most of the transformer blocks' operators."""
    largest = largest_shape(rows)
    found = [r.percent_of_copy for r in rows if r.shape == largest and r.direction == "both" and r.op in BLOCK_OPS]
    return f"{min(found):.0f} to {max(found):.0f} %" if found else ""


def model_ratios(folder: Folder, dtype: str) -> str:
    rows = [
        r for r in folder.rows("stock_vs_fused") if r["dtype"] == dtype and r["model"].lower().startswith("z-image")
    ]
    return ", ".join(f"{r['milliseconds']['stock'] / r['milliseconds']['fused']:.2f}x" for r in rows)


def trainer_ratios(folder: Folder) -> str:
    found = {(r["weights"], r["dtype"]): r["ratio"] for r in folder.rows("train_speed")}
    return "; ".join(f"{weights}, {dtype}: {ratio:.2f}x" for (weights, dtype), ratio in found.items())


def runs(found: Sequence[Folder]) -> str:
    head = ["run", "four operators with a norm: eager, compiled", "all six", "share of a copy, large shape"]
    head += ["Z-Image float32: forward, with backward", "bfloat16", "an iteration of Turbo++"]
    lines = []
    for folder in found:
        rows = folder.kernels()
        pairs = [
            ", ".join(filter(None, (mean_ratio(rows, ops, other) for other in ("eager", "compile"))))
            for ops in (WITH_NORM, BLOCK_OPS)
        ]
        models = [model_ratios(folder, dtype) for dtype in ("float32", "bfloat16")]
        cells = [*pairs, copy_share(rows), *models, trainer_ratios(folder)]
        if any(cells):
            lines.append([folder.name, *cells])
    return markdown(head, lines)


def slower(found: Sequence[Folder]) -> str:
    """Of all runs' kernels, each case in which another candidate takes less time."""
    head = ["run", "op", "shape", "dtype", "direction", "faster", "takes of our time"]
    lines = []
    for folder in found:
        for row in folder.kernels():
            for name in row.seconds:
                ratio = row.ratio(name)
                if name != "twostep" and ratio is not None and ratio < 0.995:
                    case = [folder.name, f"`{row.op}`", row.shape, row.dtype, row.direction]
                    lines.append([*case, name, f"{ratio:.2f}"])
    return markdown(head, lines)


# In full


def kernels(folder: Folder) -> str:
    rows = folder.kernels()
    others = [name for name in dict.fromkeys(name for row in rows for name in row.seconds) if name != "twostep"]
    head = ["op", "shape", "dtype", "ms", "% of copy: forward", "backward", "both", *others]
    lines = []
    for (op, shape, dtype), group in groupby(rows, key=lambda row: (row.op, row.shape, row.dtype)):
        by_direction = {row.direction: row for row in group}
        whole = by_direction.get("both") or by_direction["forward"]
        shares = [by_direction.get(name) for name in ("forward", "backward", "both")]
        cells = ["" if row is None else f"{row.percent_of_copy:.0f}" for row in shares]
        ratios = [times(whole.ratio(name)) for name in others]
        lines.append([f"`{op}`", shape, dtype, f"{whole.seconds['twostep'] * 1e3:.2f}", *cells, *ratios])
    return markdown(head, lines)


def launch(folder: Folder) -> str:
    return overhead.table([overhead.Row(**row) for row in folder.rows("launch")])


def models(folder: Folder) -> str:
    rows = folder.rows("stock_vs_fused")
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    memory = any(row["peak_mib"] for row in rows)
    head = [
        "model",
        "batch x tokens",
        "dtype",
        "direction",
        *(f"{name}: ms" for name in names),
        "stock / fused",
        "limit",
    ]
    head += [f"{name}: peak MiB" for name in names] if memory else []
    lines = []
    for row in rows:
        taken = row["milliseconds"]
        cells = [row["model"], f"{row['batch']} x {row['tokens']}", row["dtype"], row["direction"]]
        cells += [f"{taken[name]:.1f}" if name in taken else "" for name in names]
        cells += [f"{taken['stock'] / taken['fused']:.2f}x", f"{taken['stock'] / row['floor']:.2f}x"]
        cells += [f"{row['peak_mib'][name]:.0f}" if name in row["peak_mib"] else "" for name in names] if memory else []
        lines.append(cells)
    return markdown(head, lines)


def iterations(folder: Folder) -> str:
    head = ["student", "dtype", "batch", "stock: s", "fused: s", "ratio", "least and most of the pairs"]
    lines = []
    for row in folder.rows("train_speed"):
        taken, ratios = row["seconds"], row["ratios"]
        spread = f"{ratios[0]:.2f}x to {ratios[-1]:.2f}x"
        cells = [row["weights"], row["dtype"], str(row["batch"]), f"{taken['stock']:.2f}", f"{taken['fused']:.2f}"]
        lines.append([*cells, f"{row['ratio']:.2f}x", spread])
    return markdown(head, lines)


def full_size(folder: Folder) -> str:
    head = ["what", "latents", "update", "seconds", "peak GiB", "planned GiB", "measured / planned"]
    lines = []
    for row in folder.rows("full_size"):
        for update, planned in row["planned_gib"].items():
            seconds, peak = row["seconds"].get(update), row["peak_gib"].get(update)
            cells = [row["name"], row["latents"], update, row["fault"] or ("" if seconds is None else f"{seconds:.2f}")]
            cells += ["" if peak is None else f"{peak:.1f}", f"{planned:.1f}"]
            lines.append([*cells, "" if peak is None else f"{peak / planned:.2f}"])
    return markdown(head, lines)


Render = Callable[[Folder], str]
CPU_OR_GPU = ("kernels", "launch", "stock_vs_fused")
PARTS: dict[str, tuple[str, str, Render]] = {
    "kernels": (
        "Operators",
        "Milliseconds of forward and backward together, or of the one direction that there is; the share of the copy "
        "bandwidth of the same run, counting only bytes that no implementation can avoid; and how many times longer "
        "the others take. Inputs rotate through more memory than the caches hold.",
        kernels,
    ),
    "launch": (
        "Overhead of a call",
        "Microseconds that the host spends on a call, forward without a graph and forward with backward, on tensors so "
        "small that arithmetic does not count. On a GPU it hides behind a kernel that runs longer; a CUDA graph has "
        "none of it.",
        launch,
    ),
    "stock_vs_fused": (
        "Models",
        "A stock diffusers model against the same model after `fuse`. The limit is stock over the fused model's matrix "
        "products and attention alone: nothing that leaves those as they are can be faster.",
        models,
    ),
    "train_speed": (
        "A whole iteration of the trainer",
        "Turbo++ on the miniature, five guidance updates and one of the generator: `compute.fused` true against stock "
        "diffusers' forwards, in turns in one process.",
        iterations,
    ),
    "full_size": (
        "The full-size two-step update",
        "Z-Image's real dimensions with random weights, by the trainer's own parts, batch 1, captions of 512 tokens: "
        "the recipe `z-image-turbo-pp-lora` (two frozen networks; adapters of rank 64 for each step and the fake "
        "score), and one network in full. The plan is what `twostep train --dry-run` says; it knows no stash.",
        full_size,
    ),
}


def shown(found: Sequence[Folder], file: str) -> list[Folder]:
    """The newest that has the file; where CPUs and GPUs are two things, the newest of each."""
    having = [folder for folder in found if folder.rows(file)]
    if file not in CPU_OR_GPU:
        return having[:1]
    on_gpu = [is_gpu(folder, file) for folder in having]
    return [having[on_gpu.index(kind)] for kind in (True, False) if kind in on_gpu]


def is_gpu(folder: Folder, file: str) -> bool:
    found: dict[str, Any] = folder.read(file) or {}
    return "cuda" in found.get("environment", {}) or any(row.get("peak_mib") for row in found["rows"])


def sections(found: Sequence[Folder]) -> str:
    text = ["## Runs", RUNS, runs(found)]
    for file, (title, explained, render) in PARTS.items():
        for folder in shown(found, file):
            facts = folder.facts(file)
            said = ", ".join(facts["device"] if key == "device" else f"{key} {value}" for key, value in facts.items())
            command = (folder.read(file) or {}).get("command", "")
            if file == "full_size" and not any(row["seconds"] for row in folder.rows(file)):
                explained += " **No GPU has run it yet**: this is the plan alone."
            text += [f"## {title}: {facts['device']}", explained, f"{said}; `{command}`", render(folder)]
            if file == "kernels":
                text.append(f"![Share of the copy bandwidth, by operator](pictures/{picture(folder).name})")
    text += ["## Where something else is faster", SLOWER, slower(found)]
    return "\n\n".join(text)


RUNS = (
    "Geometric means of how many times longer others take, forward and backward together; the least and the most of a "
    "copy's speed at the large shape (more than all where a kernel writes past the caches and the copy does not); "
    "whole models and iterations against stock diffusers. Names are those of the folders in `benchmarks/results`."
)


SLOWER = (
    "Every case of the runs above in which an operator takes longer than what stands beside it. `torch.add` is one "
    "call with `alpha`, which takes tensors of one dtype alone."
)


def picture(folder: Folder) -> Path:
    return PICTURES / f"kernels-{'gpu' if is_gpu(folder, 'kernels') else 'cpu'}.png"


def draw(found: Sequence[Folder]) -> None:
    for folder in shown(found, "kernels"):
        rows = [row for row in folder.kernels() if row.direction == "both"]
        largest = largest_shape(rows)
        facts = folder.facts("kernels")
        title = f"{facts['device']}, {facts['date']}: forward and backward"
        report.plot([row for row in rows if row.shape == largest], picture(folder), title)


def between(text: str, content: str, path: Path) -> str:
    """The text with the content between its marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path}: expected one {BEGIN} and one {END}")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{content}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the texts are what the results say")
    check = parser.parse_args(arguments).check
    found = folders()
    stale = []
    for path, content in ((PAGE, sections(found)), (README, runs(found))):
        text = path.read_text(encoding="utf-8")
        new = between(text, content, path)
        if new != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    if not check:
        draw(found)
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is not what the results say' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
