"""load_backbone: what diffusers saves loads, in any dtype and sharding, and what is no model is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline

from twostep.train.source_identity import source_identity
from twostep.zoo import load_backbone
from twostep.zoo.flux2.backbone import Flux2Backbone
from twostep.zoo.place import repository
from twostep.zoo.z_image.backbone import ZImageBackbone

from .models import CASES, batch_of, call_stock, relative_error, stock_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stock_model(CASES["z-image"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["z-image", "flux2, masked captions"])
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
@pytest.mark.parametrize("fused", [True, False])
def test_it_computes_what_was_saved(name: str, shard: str, fused: bool, tmp_path: Path) -> None:
    case = CASES[name]
    model, batch = stock_model(case), batch_of(case)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    backbone = load_backbone(tmp_path, dtype=torch.float32, fused=fused)
    assert isinstance(backbone, ZImageBackbone if case.family == "z-image" else Flux2Backbone)
    assert backbone.fused is fused and not backbone.training
    with torch.no_grad():
        found = backbone.velocity(batch.x, batch.sigma, batch.context)
        assert relative_error(found, call_stock(model, case, batch)) <= 1e-5


def test_dtypes(folder: Path) -> None:
    batch = batch_of(CASES["z-image"])
    assert load_backbone(folder).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.float64):
        backbone = load_backbone(folder, dtype=dtype)
        assert backbone.dtype == dtype
        out = backbone.velocity(batch.x, batch.sigma, batch.context)
        assert out.dtype == batch.x.dtype and bool(out.isfinite().all())


def test_a_dtype_that_is_none_is_not_taken_for_float32(folder: Path) -> None:
    for wrong in ("bfloat16", None, torch.int8):
        with pytest.raises(TypeError, match=r"expected a torch\.dtype such as torch\.bfloat16"):
            load_backbone(folder, dtype=wrong)  # type: ignore[arg-type]


def test_weights_are_not_initialised_before_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta-device loading: a linear layer that is made with real memory and random numbers would call this."""

    def not_on_meta(linear: torch.nn.Linear) -> None:
        assert linear.weight.is_meta

    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", not_on_meta)
    load_backbone(folder)


def test_a_pipelines_folder_gives_its_transformer_and_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock_model(CASES["z-image"])
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=6.0), vae, None, None, model).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.default_shift(16, 16, 8) == 6.0
    assert load_backbone(tmp_path / "transformer").default_shift(16, 16, 8) == 6.0  # of the pipeline that it lies in
    monkeypatch.chdir(tmp_path / "transformer")
    assert load_backbone(".").default_shift(16, 16, 8) == 6.0
    (tmp_path / "transformer").rename(tmp_path / "transformer_2")
    assert load_backbone(tmp_path, subfolder="transformer_2").default_shift(16, 16, 8) == 6.0


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; expected a diffusers folder, or a hub id"):
        load_backbone(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        load_backbone(tmp_path / "file")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("x")
    with pytest.raises(ValueError, match=r"config\.json is missing.*it holds holiday\.txt"):
        load_backbone(tmp_path)


def test_a_class_that_is_not_supported(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a AutoencoderKL; supported are ZImageTransformer2DModel"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe{}", "config.json is not valid JSON"),
        (b"[]", "config.json holds a list, expected a JSON object"),
    ],
)
def test_a_broken_config(folder: Path, written: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(written)
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_a_config_that_contradicts_itself(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "axes_dims": [2, 2, 2]}))
    with pytest.raises(ValueError, match=r"diffusers makes no ZImageTransformer2DModel of the config in .*contradict"):
        load_backbone(folder)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("written", "message"), [("{", "index.json is not valid JSON"), ("{}", "index.json has no weight_map")]
)
def test_a_broken_index(tmp_path: Path, written: str, message: str) -> None:
    stock_model(CASES["z-image"]).save_pretrained(tmp_path, max_shard_size="100KB")
    (index,) = tmp_path.glob("*.index.json")
    index.write_text(written)
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_a_variant_alone_is_what_is_loaded(tmp_path: Path, shard: str) -> None:
    model = stock_model(CASES["z-image"])
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    loaded = load_backbone(tmp_path, dtype=torch.float32, fused=False).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    if shard == "100KB":
        gone = sorted(tmp_path.glob("*.safetensors"))[1]
        gone.rename(tmp_path / "kept")
        with pytest.raises(ValueError, match=rf"lacks 1 of \d+ shards .*{gone.name}"):
            load_backbone(tmp_path)
        (tmp_path / "kept").rename(gone)
    stock_model(CASES["z-image"], seed=1).save_pretrained(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match="the variants bf16, fp16 and none without"):
        load_backbone(tmp_path)
    stock_model(CASES["z-image"], seed=2).save_pretrained(tmp_path)  # weights with the usual name come first
    loaded = load_backbone(tmp_path, dtype=torch.float32, fused=False).model.state_dict()
    assert all(torch.equal(v, loaded[n]) for n, v in stock_model(CASES["z-image"], seed=2).state_dict().items())


def test_a_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_backbone("~/model").channels == load_backbone(folder).channels


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    stock_model(CASES["z-image"]).save_pretrained(tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ shards .*{gone.name}"):
        load_backbone(tmp_path)


def test_no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        load_backbone(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(stock_model(CASES["z-image"]).state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        load_backbone(folder)


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["layers.1.attention.to_q.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys.*layers\.1\.attention\.to_q\.weight"):
        load_backbone(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "cap_feat_dim": 28}))
    with pytest.raises((ValueError, RuntimeError), match="cap_embedder"):
        load_backbone(folder)


def test_a_truncated_file_is_an_error(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|corrupt|metadata"):
        load_backbone(folder)


def test_guidance_input(tmp_path: Path) -> None:
    stock_model(CASES["flux2, odd width, guidance input"]).save_pretrained(tmp_path / "dev")
    with pytest.raises(ValueError, match=r"embedded_guidance=\.\.\., 4\.0"):
        load_backbone(tmp_path / "dev")
    assert load_backbone(tmp_path / "dev", embedded_guidance=4.0).embedded_guidance == 4.0
    stock_model(CASES["flux2"]).save_pretrained(tmp_path / "klein")
    with pytest.raises(ValueError, match="has no guidance input"):
        load_backbone(tmp_path / "klein", embedded_guidance=4.0)
    stock_model(CASES["z-image"]).save_pretrained(tmp_path / "z")
    with pytest.raises(ValueError, match=r"embedded_guidance is for FLUX\.2"):
        load_backbone(tmp_path / "z", embedded_guidance=4.0)
    shutil.rmtree(tmp_path / "z")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository owner/name as huggingface_hub has it on disk after a download, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    stock_model(CASES["z-image"]).save_pretrained(snapshot / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(snapshot / "scheduler")
    return snapshot


def test_a_hub_id_loads_as_its_folder_does(hub: Path) -> None:
    batch = batch_of(CASES["z-image"])
    backbone = load_backbone("owner/name", dtype=torch.float32)
    assert backbone.fused and backbone.default_shift(16, 16, 8) == 6.0
    with torch.no_grad():
        found = backbone.velocity(batch.x, batch.sigma, batch.context)
        assert relative_error(found, call_stock(stock_model(CASES["z-image"]), CASES["z-image"], batch)) <= 1e-5


def test_a_hub_model_in_shards_loads_off_line(hub: Path) -> None:
    shutil.rmtree(hub / "transformer")
    stock_model(CASES["z-image"]).save_pretrained(hub / "transformer", max_shard_size="200KB")
    assert (hub / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert load_backbone("owner/name").default_shift(16, 16, 8) == 6.0


def test_a_hub_id_may_name_a_revision(hub: Path) -> None:
    """A tag, a branch or a commit; none is the newest."""
    tagged = hub.parent / ("1" * 40)
    shutil.copytree(hub, tagged)
    shutil.rmtree(tagged / "scheduler")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tagged / "scheduler")
    (hub.parent.parent / "refs" / "v1").write_text("1" * 40)
    for name, keywords, shift in (
        ("owner/name", {}, 6.0),
        ("owner/name@v1", {}, 2.0),
        ("owner/name@" + "1" * 40, {}, 2.0),
        ("owner/name@main", {}, 6.0),
        ("owner/name", {"revision": "v1"}, 2.0),
        ("owner/name@v1", {"revision": "v1"}, 2.0),
    ):
        assert load_backbone(name, **keywords).default_shift(16, 16, 8) == shift, name
    assert source_identity("owner/name@v1", "transformer") == source_identity("owner/name", "transformer")
    with pytest.raises(OSError, match=r"there is no folder owner/name@v2 here.* hf download owner/name --revision v2"):
        load_backbone("owner/name@v2")
    with pytest.raises(ValueError, match=r"owner/name@v1 names a revision, and another is given: main"):
        load_backbone("owner/name@v1", revision="main")
    for name in ("owner/name@", "owner/name@@", "owner/name@v1@v2", "runs/exp@2/student"):
        with pytest.raises(ValueError, match=rf"{name} does not exist; expected .* owner/name or owner/name@revision"):
            load_backbone(name)


def test_a_folder_may_have_an_at_in_its_name(hub: Path) -> None:
    place = hub.parent / "run@2"
    shutil.copytree(hub, place)
    assert load_backbone(place, subfolder="transformer").default_shift(16, 16, 8) == 6.0
    assert repository(str(place)) == (str(place), None)
    assert repository("owner/name@v1") == ("owner/name", "v1") and repository("owner/name") == ("owner/name", None)


def test_a_repository_that_is_a_transformer_alone(hub: Path) -> None:
    for file in (hub / "transformer").iterdir():
        shutil.move(file, hub)
    shutil.rmtree(hub / "scheduler")
    assert load_backbone("owner/name", subfolder="").default_shift(16, 16, 8) == 3.0


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_what_the_cache_does_not_hold_is_told_off_line(hub: Path, name: str) -> None:
    with pytest.raises(
        OSError, match=r"there is no folder owner/other here, .* With a connection: {2}hf download owner"
    ):
        load_backbone("owner/other")
    (hub / "transformer" / name).unlink()  # as a dry run leaves it
    absent = rf"of the hub's owner/name there is no transformer/.*{name[-5:]}: .* the cache holds"
    with pytest.raises(OSError, match=absent):
        load_backbone("owner/name")


def test_a_pipeline_without_a_scheduler_has_turbos_grid_and_says_so(hub: Path) -> None:
    """To whom the grid matters: a network that is loaded for its features has none."""
    shutil.rmtree(hub / "scheduler")
    backbone = load_backbone("owner/name")
    with pytest.warns(UserWarning, match="has no scheduler/, and the sigma grid is Z-Image-Turbo's: give the shift"):
        assert backbone.default_shift(16, 16, 8) == 3.0


@pytest.mark.parametrize(
    ("setting", "shift"),
    [({"use_dynamic_shifting": True}, 3.0), ({"shift_terminal": 0.1}, 6.0), ({"use_karras_sigmas": True}, 6.0)],
)
def test_a_schedulers_settings_that_are_not_followed_are_named(hub: Path, setting: dict, shift: float) -> None:
    FlowMatchEulerDiscreteScheduler(shift=6.0, **setting).save_pretrained(hub / "scheduler")
    backbone = load_backbone("owner/name")
    with pytest.warns(UserWarning, match=f"has {next(iter(setting))}, and the sigma grid is that of"):
        assert backbone.default_shift(16, 16, 8) == shift
