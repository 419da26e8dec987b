"""`miniature()`: the parts in one object, from this package's weights, from a folder, or untrained.

A saved folder is what stock diffusers makes of a `ZImagePipeline`, and beside it two folders for the vision-language
twin:

    model_index.json scheduler/ text_encoder/ tokenizer/ transformer/ vae/     DiffusionPipeline.from_pretrained(folder)
    vision_tower/     Qwen3-VL's vision model; the twin's language weights are those of text_encoder/
    processor/        its image processor
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..autoencoder import Autoencoder

# transformers is imported where it is used: it takes seconds, and the drawn data does not need it.
if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import PreTrainedTokenizerBase, Qwen3Model, Qwen3VLModel

    from .architecture import Pieces
    from .processor import ImageTextProcessor

WEIGHTS = Path(__file__).parent / "weights"
# Of load_text_to_image: where more than nine in ten of the base's images show what their captions say, at the smallest
# Frechet distance of the settings that were tried (docs/miniature.md), on captions that no table is measured on.
BASE_AT_ITS_BEST: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 28,
        "guidance": 2.5,
        "guidance_interval": (0.5, 0.9),
        "eta": 1.0,
        "eta_interval": (0.3, 0.9),
        "subfolder": "base",
    }
)
_VISION_TOWER = "vision_tower"
Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass
class Miniature:
    transformer: ZImageTransformer2DModel
    vae: AutoencoderKL
    text_encoder: Qwen3Model
    vision_language_encoder: Qwen3VLModel  # its language weights are text_encoder's
    tokenizer: PreTrainedTokenizerBase
    processor: ImageTextProcessor
    scheduler: FlowMatchEulerDiscreteScheduler

    def pipeline(self) -> ZImagePipeline:
        """diffusers' own pipeline of these very parts; call it with height=64, width=64."""
        from diffusers import ZImagePipeline

        return ZImagePipeline(
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=self.transformer,
        )

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [n, 4, 16, 16], of mean 0 and variance 1 over the data, of images [n, 3, 64, 64] in [-1, 1].

        The latents are the posterior's mean; with a generator they are drawn from it.
        """
        return Autoencoder(self.vae).encode(images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [n, 3, 64, 64], about [-1, 1] and not clamped, of latents as the transformer makes them."""
        return Autoencoder(self.vae).decode(latents)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that `miniature(folder)` and diffusers load; a dtype rounds what is written to it."""
        from diffusers import ZImagePipeline

        folder = Path(folder)
        parts = {name: _rounded(getattr(self, name), dtype) for name in ("transformer", "vae", "text_encoder")}
        ZImagePipeline(scheduler=self.scheduler, tokenizer=self.tokenizer, **parts).save_pretrained(folder)
        _rounded(self.vision_language_encoder.visual, dtype).save_pretrained(folder / _VISION_TOWER)
        self.processor.save(folder)


def miniature(
    folder: str | Path | None = None,
    *,
    untrained_seed: int | None = None,
    transformer: str = "transformer",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Miniature:
    """The miniature, ready to run.

    Args:
        folder: a folder that `Miniature.save` wrote; None for the weights that come with the package.
        untrained_seed: build random weights from this seed instead of loading any.
        transformer: the subfolder to take the transformer from, where a folder holds several.
        dtype, device: of all networks.
    """
    if untrained_seed is not None:
        if folder is not None:
            raise ValueError(f"miniature: folder {folder} and untrained_seed {untrained_seed} exclude each other")
        from .architecture import build

        return _assemble(build(untrained_seed), dtype, device)
    return _load(weights_folder(folder), transformer, dtype, device)


def weights_folder(folder: str | Path | None = None) -> Path:
    """The folder of a saved miniature, by default the package's own; ValueError if none is saved there."""
    path = WEIGHTS if folder is None else Path(folder)
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"miniature: {'this package comes without trained weights' if folder is None else 'no miniature is saved'} "
            f"({path} has no model_index.json); train one (docs/miniature.md says how) and pass the folder that "
            f"Miniature.save wrote, or pass untrained_seed=0 for random weights"
        )
    return path


def _assemble(pieces: Pieces, dtype: torch.dtype, device: torch.device | str) -> Miniature:
    from .architecture import join_twin

    for network in (pieces.transformer, pieces.vae, pieces.text_encoder, pieces.vision_tower):
        if network.dtype != dtype:  # diffusers warns about every change of type, also about none
            network.to(dtype)
        network.to(device).eval()
    return Miniature(
        pieces.transformer,
        pieces.vae,
        pieces.text_encoder,
        join_twin(pieces.text_encoder, pieces.vision_tower, pieces.tokenizer),
        pieces.tokenizer,
        pieces.processor,
        pieces.scheduler,
    )


def _load(folder: Path, transformer: str, dtype: torch.dtype, device: torch.device | str) -> Miniature:
    """Every part by its own from_pretrained, as anybody would."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Model
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    from .architecture import Pieces
    from .processor import ImageTextProcessor

    if not (folder / transformer).is_dir():
        raise ValueError(f"miniature: {folder} has no subfolder {transformer!r} to take the transformer from")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pieces = Pieces(
        ZImageTransformer2DModel.from_pretrained(folder / transformer, torch_dtype=dtype),
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        Qwen3Model.from_pretrained(folder / "text_encoder", dtype=dtype),
        Qwen3VLVisionModel.from_pretrained(folder / _VISION_TOWER, dtype=dtype),
        tokenizer,
        ImageTextProcessor.load(folder, tokenizer),
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    return _assemble(pieces, dtype, device)


def _rounded(network: Network, dtype: torch.dtype | None) -> Network:
    return network if dtype in (None, network.dtype) else copy.deepcopy(network).to(dtype)
