"""Feature networks: images in, a row of numbers each out. Metrics of two networks are not comparable.

`MiniatureFeatures` are what the miniature's detector reads its answers from; `load_features` takes a vision model from
a local folder of transformers:

    dinov2, dinov2_with_registers, dinov3_vit     the class token after the last norm
    clip, clip_vision_model                       the projected image embedding, before it is normalised

or the Inception network of FID in the form that StyleGAN3 and clean-fid use: a file inception-2015-12-05.pt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from twostep.zoo.miniature.detector import Detector
from twostep.zoo.miniature.shapes import CELLS, SIDE

from . import arguments
from .preprocessing import Preprocessing, read_preprocessing

LAYOUTS = ("mean", "each")


class FeatureNetwork(Protocol):
    @property
    def name(self) -> str:
        """The network and what it is set to: features of equal names may be compared."""
        ...

    @property
    def width(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor:
        """images: [N, 3, H, W] in [-1, 1]; gives float32 [N, width], without a graph."""
        ...


@dataclass(frozen=True)
class MiniatureFeatures:
    """The detector's penultimate features, of images [N, 3, 64, 64].

    Args:
        layout: "mean" has the mean over the 9 cells beside the whole image's, 224 in all: what is there, hardly where.
            "each" has the cells one by one, 1248: where as well. For diversity: one shape in 9 places has 0.23 (64
            random drawings 0.38, speckle on one drawing 0.016), in "mean" 0.006 (0.13 and 0.003).
        batch: images that go through the detector at a time.
    """

    detector: Detector
    layout: str = "mean"
    batch: int = 256

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"MiniatureFeatures: layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        arguments.check_count("MiniatureFeatures", "batch", self.batch)

    @property
    def name(self) -> str:
        return f"miniature detector, {self.layout}"

    @property
    def width(self) -> int:
        cell = self.detector.cells[0].bias.numel()  # type: ignore[operator]
        return self.detector.background.in_features + cell * (1 if self.layout == "mean" else CELLS)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_miniature_images("MiniatureFeatures", images)
        return torch.cat([self._features(part.float()) for part in images.split(self.batch)])

    def _features(self, images: Tensor) -> Tensor:
        cells, whole = self.detector.penultimate(images)  # [n, C, 3, 3], [n, W]
        cells = cells.mean((2, 3)) if self.layout == "mean" else cells.flatten(1)
        return torch.cat([cells, whole], 1)

    def cells_of(self, features: Tensor) -> Tensor:
        """[N, 9, 224] of features of layout "each": an image as 9 samples of what stands in a cell, and around it.

        For Frechet distances: a half-drawn shape in one cell is lost in the mean of nine, and 1248 features take more
        images than anybody draws.
        """
        if self.layout != "each":
            raise ValueError(f"MiniatureFeatures: cells are told apart in layout 'each', and this is {self.layout!r}")
        cells, whole = features.tensor_split([-self.detector.background.in_features], 1)
        cells = cells.unflatten(1, (-1, CELLS)).transpose(1, 2)
        return torch.cat([cells, whole[:, None].expand(-1, CELLS, -1)], 2)


def check_miniature_images(name: str, images: Tensor) -> None:
    arguments.check_images(name, images)
    if images.shape[2:] != (SIDE, SIDE):
        raise ValueError(
            f"{name}: images are {images.shape[2]} x {images.shape[3]}, expected {SIDE} x {SIDE}, the miniature's"
        )


@dataclass(frozen=True)
class ModelFeatures:
    """A vision model with the preprocessing that its folder asks for; `load_features` makes them."""

    name: str
    width: int
    embed: Callable[[Tensor], Tensor]  # pixel values [n, 3, h, w] to [n, width]
    preprocessing: Preprocessing
    dtype: torch.dtype
    device: torch.device
    batch: int

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        arguments.check_images(self.name, images)
        found = [
            self.embed(self.preprocessing(part.to(self.device)).to(self.dtype)).float()
            for part in images.split(self.batch)
        ]
        return torch.cat(found)


def load_features(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 64,
) -> ModelFeatures:
    """A feature network from a local folder: config.json, safetensors and preprocessor_config.json; or FID's Inception
    network from its file inception-2015-12-05.pt, a TorchScript, which is a program: take it from whom you trust.

    Args:
        dtype: of the model; features are float32. A reference must have been made in the same one.
        batch: images that go through the model at a time.
    """
    arguments.check_count("load_features", "batch", batch)
    if Path(folder).suffix == ".pt":
        return _inception(Path(folder).expanduser(), torch.device(device), dtype, batch)
    model, kind = load_model("load_features", folder, VISION)
    model.to(device, dtype)
    embed: Callable[[Tensor], Tensor]
    if kind in ("clip", "clip_vision_model"):
        width = model.visual_projection.out_features

        def embed(pixels: Tensor) -> Tensor:
            return clip_image_embedding(model, pixels)
    else:
        width = model.config.hidden_size

        def embed(pixels: Tensor) -> Tensor:
            return model(pixels).pooler_output

    name = f"{kind} {Path(folder).resolve().name}, {str(dtype).removeprefix('torch.')}"
    return ModelFeatures(name, width, embed, read_preprocessing(folder), dtype, torch.device(device), batch)


INCEPTION = 2048  # features of the last pooling layer


def _inception(file: Path, device: torch.device, dtype: torch.dtype, batch: int) -> ModelFeatures:
    """It resizes (as TensorFlow 1 did) and normalises by itself, from pixels of 0 to 255."""
    if not file.is_file():
        raise ValueError(f"load_features: there is no {file}; give a folder, or a file inception-2015-12-05.pt")
    if dtype != torch.float32:
        raise ValueError(f"load_features: dtype is {dtype}, and FID is defined by its Inception network in float32")
    model = torch.jit.load(file, map_location=device).eval()

    def embed(pixels: Tensor) -> Tensor:
        features: Tensor = model((pixels * 255).round().to(torch.uint8), return_features=True)
        if features.dim() != 2 or features.shape[1] != INCEPTION:
            raise ValueError(f"load_features: {file} gives {list(features.shape)}, expected [n, {INCEPTION}]")
        return features

    as_it_is = Preprocessing(size=None, resample="bilinear", crop=None, mean=(0.0,) * 3, std=(1.0,) * 3)
    return ModelFeatures("inception-2015-12-05", INCEPTION, embed, as_it_is, dtype, device, batch)


VISION = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
}


def load_model(name: str, folder: str | Path, classes: dict[str, str]) -> tuple[Any, str]:
    """A model of transformers in eval mode, all its weights from the folder, and its model_type."""
    import transformers

    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}: there is no {folder / 'config.json'}; give a folder that transformers has saved a model in"
        )
    kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind not in classes:
        raise ValueError(f"{name}: {folder} holds a model of type {kind!r}, known are {', '.join(sorted(classes))}")
    loader = getattr(transformers, classes[kind])
    model, report = loader.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name}: {folder} lacks {len(missing)} weights of {classes[kind]} ({', '.join(missing[:3])}, ...), which "
            f"would stay random; download the model again"
        )
    return model.eval().requires_grad_(False), kind


def clip_image_embedding(model: Any, pixels: Tensor) -> Tensor:
    """[n, width]. Not get_image_features, a tensor in some versions of transformers and an output in others."""
    embedding: Tensor = model.visual_projection(model.vision_model(pixels).pooler_output)
    return embedding
