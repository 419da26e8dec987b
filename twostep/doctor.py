"""`twostep doctor`: what is here, what runs on what, and what is broken, with the command that mends it.

Everything is looked at behind a guard, so that the doctor answers also where torch is missing or the kernels do not
load. Optional packages are really imported, in another process: an installed package that cannot be imported breaks
those that try it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from twostep import build, toolchain
from twostep.version import __version__

State = Literal["ok", "info", "warning", "broken"]

OPS = (
    *("norm_modulate", "gated_residual", "gated_residual_norm_modulate", "qk_norm_rope", "rope", "swiglu"),
    *("euler_step", "two_step_split", "inject_gradient", "gradient_norms", "dmd_direction"),
)
# Distribution, and a statement that needs the whole of it: diffusers and transformers import their parts lazily.
OPTIONAL = {
    "diffusers": "from diffusers import AutoencoderKL",
    "transformers": "from transformers import AutoModel, AutoTokenizer",
    "peft": "import peft",
    "safetensors": "import safetensors.torch",
    "flash-attn": "from flash_attn import flash_attn_func",
    "xformers": "import xformers.ops",
    "wandb": "import wandb",
    "torchao": "import torchao.quantization",
    "bitsandbytes": "import bitsandbytes",
    "liger-kernel": "import liger_kernel.ops.rms_norm",
}
IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    state: State = "ok"


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# What is here


def look_at_torch(torch: toolchain.TorchFiles | None) -> list[Finding]:
    if torch is None:
        return [Finding("torch", "torch", "not installed. Install it:  pip install torch", "broken")]
    findings = [Finding("torch", "version", f"{torch.version} in {torch.root}")]
    if toolchain.parse_version(torch.version) < toolchain.parse_version(toolchain.ABI_TARGET):
        text = f"{torch.version} is older than {toolchain.ABI_TARGET}. Upgrade:  pip install --upgrade torch"
        findings = [Finding("torch", "version", text, "broken")]
    try:
        import torch as module
    except Exception as error:  # an undefined symbol, a missing libcudart: whatever it is, it is what to report
        text = f"installed, but `import torch` fails: {_first_line(error)}. Reinstall it:  "
        return [*findings, Finding("torch", "import", text + "pip install --force-reinstall torch", "broken")]
    threads = f"{module.get_num_threads()} of {toolchain.available_cpus()} CPUs"
    findings.append(Finding("torch", "threads", threads, "info"))
    findings.append(Finding("torch", "CUDA", torch.cuda or "none (a CPU build)", "info"))
    return findings


def look_at_gpu(
    torch: toolchain.TorchFiles | None, driver: toolchain.Driver | None, stamp: build.Stamp | None
) -> list[Finding]:
    """Driver and GPUs, and whether the compiled kernels run on them."""
    if driver is None:
        missing: State = "info" if torch is None or torch.cuda is None else "warning"
        return [Finding("GPU", "driver", "no NVIDIA driver (no libcuda.so.1)", missing)]
    findings = [Finding("GPU", "driver", f"runs CUDA up to {driver.cuda}")]
    if stamp is not None:
        old = build.old_driver_message(stamp, driver.cuda)
        if old is not None:
            findings.append(Finding("GPU", "driver", old, "broken"))
    if not driver.capabilities:
        if torch is not None and torch.cuda is not None and stamp is not None and stamp["cuda"] is not None:
            return [*findings, Finding("GPU", "visible", build.no_gpu_message(stamp, torch.cuda), "warning")]
        return [*findings, Finding("GPU", "visible", "none", "info")]
    for index, (major, minor) in enumerate(driver.capabilities):
        findings.append(Finding("GPU", f"device {index}", f"compute capability {major}.{minor}"))
        if stamp is not None and stamp["cuda"] is not None:
            wrong = build.check_arch((major, minor), stamp["archs"])
            if wrong is not None:
                findings.append(Finding("GPU", f"device {index}", wrong, "broken"))
    return findings


def look_at_toolchain(torch: toolchain.TorchFiles | None, env: Mapping[str, str]) -> list[Finding]:
    """What a build would use. None of it is needed once the kernels are built, so nothing here counts as broken."""
    findings = []
    try:
        compiler = toolchain.host_compiler(env)
        findings.append(Finding("toolchain", "C++", f"{' '.join(compiler)}: {toolchain.compiler_name(compiler)}"))
    except toolchain.ToolchainError as error:
        findings.append(Finding("toolchain", "C++", str(error), "warning"))
    try:
        toolkit = toolchain.find_toolkit(env)
        if toolkit is None:
            findings.append(Finding("toolchain", "nvcc", "none in CUDA_HOME, on PATH or in /usr/local/cuda", "info"))
        else:
            findings.append(Finding("toolchain", "nvcc", f"CUDA {toolkit.version}: {toolkit.nvcc}"))
        if torch is not None:
            chosen = toolchain.choose_toolkit(torch, env, lambda _: toolkit)
            kind = "the CPU alone" if chosen is None else f"CUDA {chosen.version} and the CPU"
            findings.append(Finding("toolchain", "a build here", f"would be for {kind}", "info"))
    except toolchain.ToolchainError as error:
        findings.append(Finding("toolchain", "nvcc", str(error), "warning"))
    return findings


def look_at_cpu() -> list[Finding]:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        model = (re.search(r"model name\s*:\s*(.+)", cpuinfo) or [None, model])[1] or model
        listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        flags = set(listed.group(1).split()) if listed else set()
    except OSError:
        pass  # no /proc: the instruction sets stay unknown, and the kernels find them out themselves
    known = [flag for flag in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl") if flag in flags]
    return [
        Finding("CPU", "processor", f"{model} ({platform.machine()})", "info"),
        Finding("CPU", "instruction sets", " ".join(known) or "baseline", "info"),
    ]


def look_at_build(status: build.Status, torch: toolchain.TorchFiles | None) -> list[Finding]:
    findings = []
    if status.stamp is not None:
        for key, value in status.stamp.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            findings.append(Finding("kernels", key, str(shown) if shown else "none", "info"))
    if not status.usable:
        return [*findings, Finding("kernels", "binary", str(status.reason), "broken")]
    findings.append(Finding("kernels", "binary", str(status.path)))
    if torch is not None and torch.cuda is not None and status.stamp is not None and status.stamp["cuda"] is None:
        message = build.no_cuda_kernels_message(status.stamp, torch.cuda)
        findings.append(Finding("kernels", "CUDA", message, "warning"))
    return findings


def look_at_ops() -> list[Finding]:
    """Which backend each op would use, asked of the ops themselves."""
    try:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an op falls back is what the report says
            from twostep import ops

            info = ops.build_info()
            devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
            tensors = [torch.empty(1, 1, 8, device=device) for device in devices]
            text = ", ".join(f"{tensor.device.type} tensors: {ops.backend(tensor)}" for tensor in tensors)
            findings = [Finding("ops", op, text) for op in OPS]
    except Exception as error:  # the doctor reports what broke, whatever it is
        return [Finding("ops", "import", f"twostep.ops does not import: {_first_line(error)}", "broken")]
    if info.get("cpu_isa"):
        findings.append(Finding("ops", "CPU kernels", f"use {info['cpu_isa']}", "info"))
    return findings


# Optional packages

# Imports one statement after the other; says which one it begins, so that a crash can be laid at its door.
_TRY_IMPORTS = """
import json, sys, warnings
warnings.simplefilter("ignore")
for name, statement in json.loads(sys.argv[1]):
    print(json.dumps([name, "begins"]), file=sys.__stdout__, flush=True)
    try:
        exec(statement)
        result = ""
    except BaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = type(error).__name__ + (": " + lines[0] if lines else "")
    print(json.dumps([name, result]), file=sys.__stdout__, flush=True)
"""


def try_imports(statements: Mapping[str, str], seconds: float = IMPORT_SECONDS) -> dict[str, str]:
    """The error of each import statement, "" where it works; run in another process, restarted behind a crash."""
    results: dict[str, str] = {}
    while len(results) < len(statements):
        waiting = [(name, statement) for name, statement in statements.items() if name not in results]
        command = [sys.executable, "-c", _TRY_IMPORTS, json.dumps(waiting)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            output, ending = done.stdout, f"the process died with status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            output = printed.decode() if isinstance(printed, bytes) else printed
            ending = f"not imported within {seconds:g} s"
        unfinished = waiting[0][0]
        for line in output.splitlines():
            if not line.startswith("["):
                continue  # a package that prints while it is imported
            name, result = json.loads(line)
            if result == "begins":
                unfinished = name
            else:
                results[name] = result
        if len(results) < len(statements):
            results[unfinished] = ending
    return results


def look_at_optional(optional: Mapping[str, str]) -> list[Finding]:
    versions: dict[str, str] = {}
    for name in optional:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    errors = try_imports({name: optional[name] for name in versions})
    findings = []
    for name in optional:
        if name not in versions:
            findings.append(Finding("optional", name, "not installed", "info"))
        elif errors[name]:
            text = f"{versions[name]} is installed, but `{optional[name]}` fails: {errors[name]}. Mend or remove it:  "
            findings.append(Finding("optional", name, text + f"pip install --force-reinstall {name}", "broken"))
        else:
            findings.append(Finding("optional", name, versions[name]))
    return findings


# The report


def examine(env: Mapping[str, str], optional: Mapping[str, str] = OPTIONAL) -> list[Finding]:
    torch = toolchain.find_torch()
    status = build.status()
    findings = [
        Finding("twostep", "version", f"{__version__} in {Path(__file__).parent}"),
        Finding("twostep", "Python", f"{platform.python_version()} ({sys.executable})", "info"),
    ]
    findings += look_at_torch(torch)
    findings += look_at_gpu(torch, toolchain.query_driver(), status.stamp)
    findings += look_at_cpu()
    findings += look_at_toolchain(torch, env)
    findings += look_at_build(status, torch)
    findings += look_at_ops()
    findings += look_at_optional(optional)
    return findings


def table(findings: Iterable[Finding]) -> str:
    marks = {"ok": "ok", "info": "", "warning": "warn", "broken": "BROKEN"}
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(f"\n{section}" if lines else section)
        lines.append(f"  {marks[finding.state]:<7}{finding.name:<29} {finding.value}".rstrip())
    return "\n".join(lines)


def exit_status(findings: Sequence[Finding]) -> int:
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    findings = examine(os.environ)
    status = exit_status(findings)
    if args.json:
        report: dict[str, Any] = {"broken": status == 1, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
        return status
    print(table(findings))
    broken = sum(finding.state == "broken" for finding in findings)
    print("\nNothing is broken." if not broken else f"\n{broken} broken: see the lines marked BROKEN.")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m twostep.doctor", description="Check this installation of twostep.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
