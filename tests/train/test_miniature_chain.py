"""The chain that makes the miniature: it runs from nothing to a folder that ships, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twostep.train.journal import read_metrics
from twostep.train.miniature import autoencoder, encoders, fit, stages
from twostep.train.miniature.__main__ import main
from twostep.train.miniature.fit import Fit
from twostep.zoo.miniature import miniature, samples
from twostep.zoo.miniature.captions import judge

STEPS = {"autoencoder": 3, "encoders": 3, "base": 1, "teacher": 1}


def sizes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, with hardly a step for each stage."""
    out = tmp_path_factory.mktemp("chain")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(autoencoder, "CALIBRATION", (autoencoder.CALIBRATION[0], 64))
    monkeypatch.setattr(stages, "FRESH", (stages.FRESH[0], 16))
    steps = [word for stage, count in STEPS.items() for word in ("--steps", f"{stage}={count}")]
    base = ["data={kind: shapes}", "batch=2", "watch={samples_every: null, evaluate: null}"]
    assert main(["--out", str(out), *steps, "--images", "8", *base]) == 0
    monkeypatch.undo()
    return out


def test_it_ends_in_a_folder_that_ships(made: Path) -> None:
    weights = made / "weights"
    assert sizes_of(weights) < 12 << 20  # the detector comes on top: 16 MiB in all
    mini = miniature(weights)
    base = miniature(weights, transformer="base")
    teacher = mini.transformer.state_dict()
    assert any(not torch.equal(teacher[name], value) for name, value in base.transformer.state_dict().items())
    assert not [path for path in weights.rglob("*.json") if str(made) in path.read_text()]
    measured = json.loads((weights / "measured.json").read_text())
    assert set(measured) == {"autoencoder, psnr on fresh images", "encoders, share read rightly", "images"}
    assert set(measured["images"]["value, low, high"]) == {"real images", *stages.MEASURED}
    assert len(list((weights / "training").iterdir())) == 4
    latents = mini.encode_images(samples(5, 0, 64).images)
    assert abs(latents.mean()) < 0.2 and abs(latents.std() - 1) < 0.2


def test_every_part_comes_from_its_own_stage(made: Path) -> None:
    untrained, pipeline, weights = (
        miniature(untrained_seed=0),
        miniature(made / "pipeline"),
        miniature(made / "weights"),
    )

    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(
            torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(one.parameters(), other.parameters(), strict=True)
        )

    assert same(untrained.transformer, pipeline.transformer) and not same(untrained.transformer, weights.transformer)
    for part in ("vae", "text_encoder"):
        assert not same(getattr(untrained, part), getattr(pipeline, part))
        assert same(getattr(pipeline, part), getattr(weights, part))
    assert not same(untrained.vision_language_encoder.visual, weights.vision_language_encoder.visual)


@pytest.mark.slow
def test_the_larger_sister_has_the_packages_other_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "VARIETY", (2, 2))
    monkeypatch.setattr(stages, "MEASURED", {"teacher at 2": stages.MEASURED["teacher at 2"]})
    steps = ["--steps", "base=1", "--steps", "teacher=1"]
    quick = ["data={kind: shapes}", "batch=1", "watch={samples_every: null, evaluate: null}", "ema=null"]
    whole = ["--out", str(tmp_path), "--large", *steps, "--images", "8", *quick]
    assert main([*whole, "--until", "encoders"]) == 2
    assert "no stage 'encoders', expected one of base, teacher, weights" in capsys.readouterr().err
    assert main(whole) == 0
    own, large = miniature(), miniature(tmp_path / "weights")
    assert sum(p.numel() for p in large.transformer.parameters()) == 30_219_408
    for part in ("vae", "text_encoder"):
        pairs = zip(getattr(own, part).parameters(), getattr(large, part).parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    measured = json.loads((tmp_path / "weights" / "measured.json").read_text())
    assert set(measured["images"]["value, low, high"]) == {"real images", *stages.MEASURED}
    assert sorted(path.stem for path in (tmp_path / "weights" / "training").iterdir()) == ["base", "teacher"]
    assert main(["--out", str(tmp_path), *steps, *quick]) == 2
    assert "holds a miniature of width 384, and this one has 128" in capsys.readouterr().err


def test_a_run_that_is_asked_to_stop_is_waited_for(tmp_path: Path) -> None:
    """The child takes its time to save."""
    child = "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
    child += f"pathlib.Path({str(tmp_path)!r}, 'begun').touch()\nsignal.pause()\n"
    child += f"pathlib.Path({str(tmp_path)!r}, 'saved').touch()\nsys.exit(3)\n"
    parent = "import os, sys\nfrom twostep.train.miniature.stages import _waited\n"
    parent += f"sys.exit(_waited([sys.executable, '-c', {child!r}], dict(os.environ)))"
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 3 and (tmp_path / "saved").exists()


def test_mistakes_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--steps", "base=none"], "expected one of autoencoder, encoders, base, teacher"),
        (["--ranks", "0"], "--ranks is 0, expected at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path), *words])
        assert message in capsys.readouterr().err


# The loop


class Stopped(Exception):
    pass


def line_fit(folder: Path, stop_at: int | None = None, **changes: Any) -> tuple[nn.Linear, list[int]]:
    """Fits y = 3 x with noise; raises at a step, as a kill would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(1, 1)
    seen = []

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == stop_at:
            raise Stopped
        seen.append(step)
        x = torch.randn(8, 1, generator=generator)
        error = (model(x) - 3 * x).square().mean()
        return {"loss": error, "root": error.detach().sqrt()}

    plan = Fit(**{"steps": 60, "batch": 8, "lr": 0.2, "warmup": 5, **changes})
    fit.fit("line", dict(model.named_parameters()), loss, plan, folder)
    return model, seen


def test_a_fit_learns_and_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_KEPT", 10)
    whole, _ = line_fit(tmp_path / "whole")
    assert abs(whole.weight.item() - 3) < 0.2 and abs(whole.bias.item()) < 0.2
    with pytest.raises(Stopped):
        line_fit(tmp_path / "parts", stop_at=37)
    parts, seen = line_fit(tmp_path / "parts")
    assert seen[0] == 30
    assert torch.equal(parts.weight, whole.weight) and torch.equal(parts.bias, whole.bias)
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in read_metrics(tmp_path / "parts")]
    assert [row["iteration"] for row in rows] == [20, 40, 60] and set(rows[0]) >= {"loss", "root", "gradient_norm"}
    again, seen = line_fit(tmp_path / "parts")  # it is over: loaded, not trained
    assert not seen and torch.equal(again.weight, whole.weight)


def test_a_fit_refuses_what_another_has_left(tmp_path: Path) -> None:
    from twostep.train.checkpoint import CheckpointError

    line_fit(tmp_path, steps=20)
    with pytest.raises(CheckpointError, match="lr"):
        line_fit(tmp_path, steps=20, lr=0.1)


# What the encoders are taught


def test_everything_is_true_and_in_the_captions_order() -> None:
    drawn = samples(9, 0, 512)
    all_of_it = encoders.everything(drawn.scenes, drawn.claims)
    assert bool(judge(all_of_it, drawn.scenes).aligned.all())
    for name in ("shape", "colour", "size", "cell", "relation", "background"):
        said, whole = getattr(drawn.claims, name), getattr(all_of_it, name)
        assert bool(((said < 0) | (said == whole)).all()), name
    two = drawn.scenes.count == 2
    assert bool((all_of_it.shape[two] >= 0).all()) and bool((all_of_it.relation[two] >= 0).all())


def test_the_encoders_share_the_miniatures_weights() -> None:
    mini = miniature(untrained_seed=0)
    drawn = samples(9, 0, 4)
    taught = encoders.Encoders(mini)
    from twostep.zoo.encoders import ZImageTextEncoder

    expected = ZImageTextEncoder(mini.text_encoder, mini.tokenizer).encode(drawn.captions)
    last = expected.features[torch.arange(4), expected.token_lengths - 1]
    assert torch.allclose(taught.of_captions(drawn), last, atol=1e-5)
    taught.of_images(drawn).square().sum().backward()
    assert mini.text_encoder.layers[0].self_attn.q_proj.weight.grad is not None
    assert mini.vision_language_encoder.visual.patch_embed.proj.weight.grad is not None
