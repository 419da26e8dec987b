"""The parts of a pipeline are those that its own loaders give, loaded when they are wanted and not before."""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.zoo import tiny_encoders
from twostep.train import parts as parts_module
from twostep.train.parts import Parts
from twostep.zoo import load_autoencoder, load_text_encoder, load_vision_encoder, miniature
from twostep.zoo.context import Context
from twostep.zoo.context_cache import ContextCache
from twostep.zoo.encoders import text_encoder_files
from twostep.zoo.miniature import model as miniature_module
from twostep.zoo.miniature import samples

CAPTIONS = ["a red circle", "two shapes"]


@cache
def mini_folder() -> Path:
    folder = tiny_encoders.folder("parts-miniature")
    miniature(untrained_seed=0).save(folder)
    return folder


@cache
def klein_folder() -> Path:
    """Of as many layers as klein's features want: hidden states 9, 18 and 27."""
    folder = tiny_encoders.folder("parts-klein")
    Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"),
        tiny_encoders.flux2_vae(),
        tiny_encoders.qwen3(Qwen3ForCausalLM, num_hidden_layers=28),
        tiny_encoders.tokenizer(),
        None,
    ).save_pretrained(folder)
    return folder


def parts_of(folder: Path | str, **more: Any) -> Parts:
    return Parts(str(folder), dtype=torch.float32, device="cpu", **more)


def pictures() -> Tensor:
    """Drawn images in steps of 8 bits, as files have them."""
    images = samples(3, 0, 2).images
    return ((images + 1) * 127.5).round() / 127.5 - 1


def equal(one: Context, other: Context) -> bool:
    return (
        torch.equal(one.features, other.features)
        and torch.equal(one.token_lengths, other.token_lengths)
        and one.encoder == other.encoder
    )


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was not to be loaded")


def test_the_miniature_is_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(miniature_module, "WEIGHTS", mini_folder())
    assert parts_of("miniature").path == str(mini_folder())
    monkeypatch.setattr(miniature_module, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match=r"^miniature: this package comes without trained weights .* train one"):
        parts_of("miniature").path  # noqa: B018


def test_folders_are_found_and_hub_ids_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert parts_of("~/model").path == str(tmp_path / "model")
    assert parts_of("Tongyi-MAI/Z-Image-Turbo").path == "Tongyi-MAI/Z-Image-Turbo"
    with pytest.raises(ValueError, match="does not exist; expected a diffusers folder"):
        parts_of(tmp_path / "no").autoencoder  # noqa: B018


def test_parts_are_the_pipelines_and_loaded_once() -> None:
    parts = parts_of(mini_folder())
    encoder = load_text_encoder(mini_folder(), dtype=torch.float32)
    assert equal(parts.text_encoder.encode(CAPTIONS), encoder.encode(CAPTIONS))
    assert parts.text_encoder is parts.text_encoder and parts.autoencoder is parts.autoencoder
    expected = load_autoencoder(mini_folder()).encode(pictures())
    assert torch.equal(parts.autoencoder.encode(pictures()), expected)
    assert (parts.latent_space.channels, parts.latent_space.sample_size) == (4, 64)
    klein = parts_of(klein_folder())
    assert (klein.latent_space.channels, klein.latent_space.factor, klein.latent_space.sample_size) == (16, 4, 32)
    rounded = Parts(str(mini_folder()), dtype=torch.bfloat16, device="cpu")
    assert rounded.autoencoder.dtype == torch.bfloat16
    assert rounded.text_encoder.encode(CAPTIONS).features.dtype == torch.bfloat16


def test_contexts_come_from_a_cache_or_the_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = parts_of(mini_folder())
    fresh = parts.contexts(None)
    assert fresh.stored is None and equal(fresh[CAPTIONS], parts.text_encoder.encode(CAPTIONS))
    assert fresh.encoder == parts.text_encoder.fingerprint
    ContextCache.write(tmp_path / "c", parts.text_encoder, CAPTIONS, dtype=torch.bfloat16, progress=False)
    stored = parts_of(mini_folder()).contexts(tmp_path / "c")
    assert stored.stored is not None and stored.encoder == fresh.encoder
    assert torch.equal(stored[CAPTIONS].features, fresh[CAPTIONS].features.bfloat16())
    other = miniature(untrained_seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was made with the text encoder .* they differ in weights"):
        parts_of(tmp_path / "other").contexts(tmp_path / "c")
    # A large encoder is not loaded for this, as long as its files are those that the contexts were made by.
    monkeypatch.setattr(parts_module, "CHEAP", 1000)
    monkeypatch.setattr(parts_module, "load_text_encoder", forbidden)
    large = parts_of(mini_folder())
    assert equal(large.contexts(tmp_path / "c")[CAPTIONS], stored[CAPTIONS])
    assert large.contexts(None).stored is None  # nor before the first caption
    with pytest.raises(AssertionError, match="not to be loaded"):
        large.contexts(None)[CAPTIONS]


def test_contexts_of_another_encoder_are_told_however_large_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its files, and where these are others by its weights: the same weights may lie in shards."""
    monkeypatch.setattr(parts_module, "CHEAP", 0)
    ContextCache.write(tmp_path / "c", parts_of(mini_folder()).text_encoder, CAPTIONS, progress=False)
    miniature(untrained_seed=1).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was made with the text encoder .* they differ in weights"):
        parts_of(tmp_path / "other").contexts(tmp_path / "c")
    again = parts_of(mini_folder()).text_encoder
    sharded = tmp_path / "sharded"
    shutil.copytree(mini_folder(), sharded)
    shutil.rmtree(sharded / "text_encoder")
    miniature(mini_folder()).text_encoder.save_pretrained(sharded / "text_encoder", max_shard_size="500KB")
    assert (sharded / "text_encoder" / "model.safetensors.index.json").is_file()
    loaded = load_text_encoder(sharded, dtype=torch.float32)
    assert loaded.files == text_encoder_files(sharded) != again.files
    parts = parts_of(sharded)
    assert parts.contexts(tmp_path / "c").encoder == again.fingerprint
    assert "text_encoder" not in parts.__dict__  # it was looked at, and let go
    short = load_text_encoder(mini_folder(), dtype=torch.float32, max_tokens=30)
    ContextCache.write(tmp_path / "short", short, CAPTIONS, progress=False)
    with pytest.raises(ValueError, match=r"was made with the text encoder .* they differ in max_tokens"):
        parts_of(mini_folder()).contexts(tmp_path / "short")

    # What a cache of before does not know cannot be told of a large one; and nobody looks twice.
    bare = parts_of(mini_folder()).text_encoder
    bare.files = None
    ContextCache.write(tmp_path / "bare", bare, CAPTIONS, progress=False)
    monkeypatch.setattr(parts_module, "load_text_encoder", forbidden)
    assert parts_of(tmp_path / "other").contexts(tmp_path / "bare").encoder == again.fingerprint
    assert parts.contexts(tmp_path / "c").encoder == again.fingerprint


def test_a_tokenizer_is_told_by_every_byte(tmp_path: Path) -> None:
    shutil.copytree(mini_folder(), tmp_path / "m")
    file = tmp_path / "m" / "tokenizer" / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 7] ^= 1
    file.write_bytes(content)
    (tmp_path / "m" / "tokenizer" / ".DS_Store").touch()
    changed = text_encoder_files(tmp_path / "m")
    file.write_bytes((mini_folder() / "tokenizer" / "tokenizer.json").read_bytes())
    assert changed != text_encoder_files(tmp_path / "m") == text_encoder_files(mini_folder())


@pytest.mark.parametrize("absent", ["text_encoder", "tokenizer", "text_encoder/config.json"])
def test_a_pipeline_without_its_text_encoder_trains_on_contexts(
    absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a machine has it that only trains; what cannot be compared is said."""
    monkeypatch.setattr(parts_module, "CHEAP", 0)
    ContextCache.write(tmp_path / "c", parts_of(mini_folder()).text_encoder, CAPTIONS, progress=False)
    shutil.copytree(mini_folder(), tmp_path / "m")
    place = tmp_path / "m" / absent
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.warns(UserWarning, match="text encoder, unseen: it is not on this machine"):
        assert parts_of(tmp_path / "m").contexts(tmp_path / "c").stored is not None


def test_an_encoder_of_the_hub_is_told_by_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ContextCache.write(tmp_path / "c", parts_of(mini_folder()).text_encoder, CAPTIONS, progress=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    miniature(untrained_seed=1).save(tmp_path / "other")
    for name, commit, folder in (("owner", "0", mini_folder()), ("other", "1", tmp_path / "other")):
        place = tmp_path / f"models--{name}--name"
        shutil.copytree(folder, place / "snapshots" / (commit * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit * 40)

    def contexts(model: str) -> ContextCache | None:
        return Parts(model, dtype=torch.float32, device="cpu").contexts(tmp_path / "c").stored

    with pytest.raises(ValueError, match=r"was made with the text encoder .* they differ in weights"):
        contexts("other/name")
    with pytest.warns(UserWarning, match="taken for those of absent/name's text encoder, unseen: it is not on this"):
        assert contexts("absent/name") is not None
    (tmp_path / "models--other--name" / "snapshots" / ("1" * 40) / "text_encoder" / "model.safetensors").write_bytes(
        b""
    )
    with pytest.warns(UserWarning, match="other/name's text encoder, unseen: it does not load"):
        assert contexts("other/name") is not None
    monkeypatch.setattr(parts_module, "load_text_encoder", forbidden)
    assert contexts("owner/name") is not None


def test_the_empty_caption_is_the_caches_if_it_has_it(tmp_path: Path) -> None:
    encoder = parts_of(mini_folder()).text_encoder
    expected = encoder.encode([""])
    for captions, dtype in (([*CAPTIONS, ""], torch.bfloat16), (CAPTIONS, torch.float32)):
        folder = tmp_path / str(len(captions))
        ContextCache.write(folder, encoder, captions, dtype=torch.bfloat16, progress=False)
        found = parts_of(mini_folder(), cache=folder).empty
        assert found.features.dtype == dtype and equal(found, expected.to(dtype=dtype))
    found = parts_of(mini_folder()).empty
    assert found.batch == 1 and equal(found, expected)


def test_the_text_encoder_serves_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, meeting, met = parts_of(mini_folder()), threading.Barrier(2), []
    encode = parts.text_encoder.encode

    def slowly(prompts: list[str], **settings: Any) -> Context:
        with suppress(threading.BrokenBarrierError):
            met.append(meeting.wait(timeout=0.2))
        return encode(prompts, **settings)

    monkeypatch.setattr(parts.text_encoder, "encode", slowly)
    threads = [threading.Thread(target=lambda: parts.contexts(None)[CAPTIONS]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met


@torch.no_grad()
def test_a_pipeline_with_a_twin_shows_it_the_images() -> None:
    mini, parts = miniature(mini_folder()), parts_of(mini_folder())
    target = parts.target_encoder(None, 512 * 512)
    assert target.reads_images and target.fingerprint.startswith("z-image-vision:")
    context = target(CAPTIONS, pictures(), parts.contexts(None)[CAPTIONS], None)
    seen = mini.processor(CAPTIONS, pictures())
    states = mini.vision_language_encoder(**seen, output_hidden_states=True).hidden_states[-2]
    lengths = seen["attention_mask"].sum(1)
    assert context.lengths is not None and torch.equal(context.lengths, lengths)
    for found, expected, length in zip(context.features, states, lengths, strict=True):
        assert torch.allclose(found[:length], expected[:length], atol=1e-4)
    small = parts.target_encoder(None, 32 * 32)(CAPTIONS, pictures(), context, None)
    assert int(small.token_lengths[0]) == int(lengths[0]) - 16 + 4  # 16 x 16 pixels a token


def test_z_image_sees_through_the_vision_model_that_is_named() -> None:
    parts = parts_of(tiny_encoders.zimage())
    images = pictures()[:, :, :32, :32]
    target = parts.target_encoder(str(tiny_encoders.vision()), 24 * 24)
    expected = load_vision_encoder(tiny_encoders.vision(), parts.text_encoder, max_pixels=24 * 24)
    assert equal(target(CAPTIONS, images, parts.empty, None), expected.encode(CAPTIONS, images / 2 + 0.5))
    assert target.fingerprint == expected.fingerprint


def test_klein_sees_the_latents_beside_the_caption() -> None:
    parts = parts_of(klein_folder())
    context, latents = parts.contexts(None)[CAPTIONS], parts.autoencoder.encode(pictures())
    target = parts.target_encoder(None, 1)
    assert not target.reads_images and target.fingerprint == context.encoder
    found = target(CAPTIONS, None, context, latents)
    assert equal(found, context) and found.references[0] is latents


def test_says_what_to_set_for_images_beside_captions() -> None:
    with pytest.raises(ValueError, match=r"data\.vision is null, and .* has no vision_tower/ and processor/.* set"):
        parts_of(tiny_encoders.zimage()).target_encoder(None, 1)
    with pytest.raises(ValueError, match=r"data\.vision is 'some/model', and .* leave data\.vision null"):
        parts_of(klein_folder()).target_encoder("some/model", 1)
    with pytest.raises(ValueError, match=r"known for z-image and flux2-klein, and .* is a z-image-omni"):
        parts_of(tiny_encoders.zimage_omni()).target_encoder(None, 1)
