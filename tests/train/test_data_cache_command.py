"""`twostep cache` fills a folder that training reads, alone or on several ranks, and stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from twostep import cli
from twostep.train.data import TeacherCache, cache_command, pairs
from twostep.zoo import Teacher, load_backbone
from twostep.zoo.context_cache import ContextCache
from twostep.zoo.encoders import load_text_encoder
from twostep.zoo.miniature import miniature

PROMPTS = ["a red circle", "two shapes", "a blue square", "a green ring", "one shape"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    miniature(untrained_seed=0).save(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def arguments(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    given = {"--model": model, "--prompts": prompts, "--out": out, "--teacher-steps": 2, "--size": "32x48"}
    given |= {"--dtype": "float32", "--batch": 2, "--shard-size": 2, "--device": "cpu", "--seed": 5}
    return ["cache", *(str(part) for pair in given.items() for part in pair), *more]


def check(out: Path, model: Path, guidance: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
    """The folder holds what the library makes of the same model."""
    encoder = load_text_encoder(model, dtype=torch.float32)
    contexts = ContextCache(out / "contexts", encoder)
    assert len(contexts) == 6 and contexts[PROMPTS].features.dtype == torch.float32
    assert torch.allclose(contexts[[*PROMPTS, ""]].features, encoder.encode([*PROMPTS, ""]).features, atol=1e-5)
    negative = contexts[[""]] if guidance != 1 else None
    teacher = Teacher(
        load_backbone(model, dtype=torch.float32),
        steps=2,
        guidance=guidance,
        negative=negative,
        guidance_interval=interval,
    )
    cache = TeacherCache(out / "teacher")
    cache.check(teacher, PROMPTS)
    found = cache[range(5)]["latents"]
    assert found.shape == (5, 4, 8, 12) and cache.seed == 5
    expected = teacher.sample(cache.noise(range(5)), contexts[PROMPTS])
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


def test_writes_contexts_and_samples_and_goes_on(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert cli.main(arguments(model, prompts, out, "--contexts-only")) == 0
    assert not (out / "teacher").exists()
    assert "5 prompts: " in capsys.readouterr().err
    write, written = pairs._write_shard, []

    def interrupted(folder: Path, plan: Any, shard: int, *rest: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(shard)
        write(folder, plan, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_write_shard", interrupted)
        assert cli.main(arguments(model, prompts, out, "--guidance", "3")) == 130
    said = capsys.readouterr().err
    assert f"interrupted; the same command goes on at what {out} lacks" in said and "Traceback" not in said
    before = (out / "teacher" / "pairs-00000-of-00003.safetensors").stat()
    assert cli.main(arguments(model, prompts, out, "--guidance", "3")) == 0
    after = (out / "teacher" / "pairs-00000-of-00003.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    said = capsys.readouterr()
    assert (
        "0 bytes of contexts and " in said.err
        and "are free" in said.err
        and said.err.count("teacher samples: 5 of 5") == 1
    )
    assert "5 samples of 4 x 8 x 12, 2 steps each" in said.out and "6 contexts of z-image:" in said.out
    check(out, model, guidance=3.0)
    assert cli.main(arguments(model, prompts, out, "--guidance-interval", ".8", ".9")) == 2
    assert "and guidance is 1, which is none" in capsys.readouterr().err
    limited = ("--guidance", "3", "--guidance-interval", ".8", ".9")
    assert cli.main(arguments(model, prompts, out, *limited)) == 2
    assert "guidance" in capsys.readouterr().err
    assert cli.main(arguments(model, prompts, out, *limited, "--overwrite")) == 0
    check(out, model, guidance=3.0, interval=(0.8, 0.9))


def test_several_ranks_write_one_cache(model: Path, prompts: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "twostep", *arguments(model, prompts, out)]
    ranks = [  # as torchrun starts them
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "samples of" in said[0] and "samples of" not in said[1]
    check(out, model)


# A shell that starts jobs in the background lets them ignore SIGINT, and a test run may be such a job.
SLOW = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from twostep import cli
from twostep.zoo import context_cache
write = context_cache._write_shard
def slow(*arguments):
    write(*arguments)
    print("one shard", flush=True)
    sys.stdin.read()  # until the signal comes
context_cache._write_shard = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_control_c_leaves_one_line_and_status_130(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments(model, prompts, out)], text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "one shard\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("twostep cache: interrupted;") and "Traceback" not in said
    assert [path.name for path in (out / "contexts").iterdir()] == ["contexts-00000-of-00003.safetensors"]


def test_mistakes_are_one_line(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    wrong = {
        "--size is 30x48, expected multiples of 8": ["--size", "30x48"],
        "does not exist; give a .txt": ["--prompts", str(tmp_path / "no.txt")],
        "no diffusers pipeline with vae/": ["--model", str(tmp_path)],
        "--device is 'foo', expected cpu, cuda or cuda:N": ["--device", "foo"],
    }
    for message, more in wrong.items():
        assert cli.main(arguments(model, prompts, out, *more)) == 2
        said = capsys.readouterr().err
        assert message in said and said.startswith("twostep cache: ") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(arguments(model, prompts, out, "--size", "32"))
    assert "'32' is no size; give height and width in pixels" in capsys.readouterr().err
    monkeypatch.setattr(cache_command, "_latents", lambda *_: cache_command.Latents(10**9, 10**4, 10**4))
    assert cli.main(arguments(model, prompts, out)) == 2
    said = capsys.readouterr().err
    assert "are free there; free some, choose another disk" in said and "twostep cache: twostep cache" not in said
    assert not list(out.rglob("*.safetensors"))  # nothing was written
    (tmp_path / "file").touch()
    assert cli.main(arguments(model, prompts, tmp_path / "file" / "out")) == 1  # the system's fault
    said = capsys.readouterr().err
    assert f"{tmp_path}/file/out: Not a directory; once that is mended the same command goes on" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert cli.main(arguments(model, prompts, out)) == 2
    assert "start several ranks with torchrun" in capsys.readouterr().err


def test_sizes_of_latents_come_from_the_models_own_configurations(model: Path, tmp_path: Path) -> None:
    assert cache_command._latents(str(model), "transformer", None) == cache_command.Latents(
        4, 16, 16
    )  # 64 x 64 pixels, by 4
    # FLUX.2-klein's published numbers: 8 pixels a latent, 2 x 2 latents of 32 channels packed into 128.
    levels = {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}
    vae = {"_class_name": "AutoencoderKLFlux2", "latent_channels": 32, **levels}
    for part, config in (("vae", vae), ("transformer", {"in_channels": 128})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert cache_command._latents(str(tmp_path), "transformer", (768, 1024)) == cache_command.Latents(128, 48, 64)
    with pytest.raises(ValueError, match="expected multiples of 16"):
        cache_command._latents(str(tmp_path), "transformer", (1024, 1000))


def test_offering_the_command_imports_nothing_of_it() -> None:
    code = "import sys, twostep.cli; twostep.cli.make_parser(None); sys.exit('twostep.train' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
