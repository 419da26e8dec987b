"""Original names: there and back bit for bit, and diffusers' own reading of them is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from tests.zoo.models import CASES, Case, flux2, stock_model, z_image
from twostep.export import from_original, to_original

THEIRS = {
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
}
NAMES = [name for name in CASES if "omni" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(name: str) -> None:
    case = CASES[name]
    state = stock_model(case).state_dict()
    original = to_original(state, case.family)
    assert original.keys() != state.keys()
    for read in (from_original, lambda given, family: THEIRS[family](dict(given))):
        again: Any = read(original, case.family)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    again = to_original(from_original(original, case.family), case.family)
    assert again.keys() == original.keys() and all(torch.equal(again[key], original[key]) for key in again)


def test_names_are_those_of_published_files() -> None:
    """As their readers in diffusers spell them."""
    published = {
        "z-image": {
            "x_embedder.weight",
            "cap_embedder.1.weight",
            "t_embedder.mlp.0.weight",
            "layers.1.attention.qkv.weight",
            "layers.1.attention.out.weight",
            "layers.0.attention.q_norm.weight",
            "context_refiner.0.attention.k_norm.weight",
            "noise_refiner.0.feed_forward.w1.weight",
            "final_layer.adaLN_modulation.1.weight",
            "cap_pad_token",
        },
        "flux2": {
            "img_in.weight",
            "txt_in.weight",
            "time_in.in_layer.weight",
            "double_blocks.1.img_attn.qkv.weight",
            "double_blocks.1.txt_attn.norm.query_norm.scale",
            "double_blocks.0.txt_mlp.2.weight",
            "single_blocks.1.linear1.weight",
            "single_blocks.1.norm.key_norm.scale",
            "double_stream_modulation_img.lin.weight",
            "final_layer.adaLN_modulation.1.weight",
            "final_layer.linear.weight",
        },
    }
    for family, config in (("z-image", z_image()), ("flux2", flux2())):
        assert published[family] <= to_original(stock_model(Case(family, config)).state_dict(), family).keys()


def test_comfyuis_prefix_and_what_no_code_reads_are_left_out() -> None:
    state = stock_model(CASES["z-image"]).state_dict()
    given = {f"model.diffusion_model.{name}": tensor for name, tensor in to_original(state, "z-image").items()}
    given["model.diffusion_model.norm_final.weight"] = torch.ones(3)
    assert from_original(given, "z-image").keys() == state.keys()


def test_diffusers_loads_the_file(tmp_path: Path) -> None:
    for name in ("z-image", "flux2"):
        model = stock_model(CASES[name])
        model.save_pretrained(tmp_path / name)
        save_file(to_original(model.state_dict(), name), tmp_path / f"{name}.safetensors")
        again = type(model).from_single_file(
            str(tmp_path / f"{name}.safetensors"), config=str(tmp_path / name), torch_dtype=torch.float32
        )
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_what_has_no_original_is_explained() -> None:
    with pytest.raises(ValueError, match="the family is 'sd', known are z-image, flux2"):
        to_original({}, "sd")
    state = stock_model(CASES["z-image"]).state_dict()
    with pytest.raises(ValueError, match="q, k and v, and 2 of them are there"):
        to_original({k: v for k, v in state.items() if ".to_k." not in k}, "z-image")
    config = z_image(all_patch_size=[4], all_f_patch_size=[1])
    with pytest.raises(ValueError, match="belongs to patches of another size than 2"):
        to_original(stock_model(Case("z-image", config)).state_dict(), "z-image")
