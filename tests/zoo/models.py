"""Small stock models with random weights, in the configurations that the tests ask for, and inputs for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from twostep.zoo import Backbone, Context, fuse
from twostep.zoo.flux2 import packing as flux2_packing
from twostep.zoo.flux2.backbone import Flux2Backbone
from twostep.zoo.z_image.backbone import ZImageBackbone


@dataclass(frozen=True)
class Case:
    """A model, and one batch for it: the size of the latents, the captions' lengths (per segment), references."""

    family: str
    config: dict[str, Any] = field(hash=False)
    size: tuple[int, int] = (8, 12)
    lengths: tuple[Any, ...] | None = (5, 40, 33)
    references: tuple[tuple[int, int], ...] = ()
    vision: tuple[tuple[int, int], ...] = ()

    @property
    def batch(self) -> int:
        return 3 if self.lengths is None else len(self.lengths)


def z_image(**changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 4,
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 20,
        "axes_dims": [8, 8, 8],
        "axes_lens": [256, 64, 64],
    }
    return {**config, **changes}


def flux2(**changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return {**config, **changes}


CASES = {
    "z-image": Case("z-image", z_image(n_refiner_layers=2)),
    "z-image, even captions": Case("z-image", z_image(), lengths=(9, 20)),
    "z-image, odd width, no refiners, nothing to pad": Case(
        "z-image",
        z_image(dim=42, n_heads=3, n_kv_heads=3, n_refiner_layers=0, axes_dims=[2, 6, 6]),
        size=(16, 16),
        lengths=(32, 64),
    ),
    "z-image, no norm of queries and keys": Case("z-image", z_image(qk_norm=False), size=(2, 6)),
    "z-image, one sample": Case("z-image", z_image(), size=(6, 2), lengths=(1,)),
    # in_channels 16: stock's filler for a missing image is 64 wide, its patches of 2 x 2 x 16.
    "z-image omni": Case(
        "z-image",
        z_image(in_channels=16),
        lengths=((5, 40, 3), (33, 2, 9)),
        references=((4, 6),),
    ),
    "z-image omni, no image": Case("z-image", z_image(in_channels=16), lengths=((5,), (33,))),
    "z-image omni, two references with vision": Case(
        "z-image",
        z_image(in_channels=16, siglip_feat_dim=12),
        lengths=((5, 40, 3, 7), (33, 2, 9, 32)),
        references=((4, 6), (8, 8)),
        vision=((5, 7), (2, 3)),
    ),
    "flux2": Case("flux2", flux2(), size=(3, 5), lengths=None),
    "flux2, masked captions": Case("flux2", flux2(), size=(3, 5), lengths=(5, 11, 7)),
    "flux2, references": Case("flux2", flux2(), size=(4, 3), lengths=None, references=((2, 3), (3, 3))),
    "flux2, odd width, guidance input": Case(
        "flux2",
        flux2(
            attention_head_dim=14,
            num_attention_heads=3,
            axes_dims_rope=(2, 4, 4, 4),
            guidance_embeds=True,
            num_layers=1,
            num_single_layers=3,
        ),
        size=(3, 3),
        lengths=None,
    ),
}


def stock_model(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """diffusers' own model with random weights, every norm's weight and every pad token among them."""
    torch.manual_seed(seed)
    kind = ZImageTransformer2DModel if case.family == "z-image" else Flux2Transformer2DModel
    model = kind(**case.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name and parameter.dim() == 1 else 0.0, std=0.08)
    for parameter in model.parameters():  # not model.to(): stock keeps some modules in float32, and warns
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def backbone_of(model: nn.Module, case: Case) -> Backbone:
    if case.family == "z-image":
        return ZImageBackbone(model)
    return Flux2Backbone(model, embedded_guidance=4.0 if case.config["guidance_embeds"] else None)


def fused_backbone(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> Backbone:
    return backbone_of(fuse(stock_model(case, seed, dtype)), case)


@dataclass
class Batch:
    x: Tensor  # [B, C, H, W]
    sigma: Tensor  # [B]
    context: Context

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.x.to(dtype), self.sigma, self.context.to(dtype=dtype))


def batch_of(case: Case, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    channels = case.config["in_channels"]
    width = case.config["cap_feat_dim" if case.family == "z-image" else "joint_attention_dim"]
    n = case.batch
    if case.lengths is None:
        features, lengths = normal(n, 7, width), None
    else:
        lengths = torch.tensor(case.lengths)
        totals = lengths if lengths.dim() == 1 else lengths.sum(1)
        features = pad_sequence([normal(int(total), width) for total in totals], batch_first=True)
    context = Context(
        features,
        lengths,
        tuple(normal(n, channels, *size) for size in case.references),
        tuple(normal(n, *size, case.config.get("siglip_feat_dim") or 0) for size in case.vision),
    )
    return Batch(normal(n, channels, *case.size), torch.rand(n, generator=g) * 0.9 + 0.05, context)


def call_stock(model: nn.Module, case: Case, batch: Batch) -> Tensor:
    """v = eps - x from a diffusers model by its own API, as the public pipelines call it: the oracle of the wrapper."""
    return _call_z_image(model, batch) if case.family == "z-image" else _call_flux2(model, case, batch)


def _call_z_image(model: nn.Module, batch: Batch) -> Tensor:
    t = (1000 - batch.sigma * 1000) / 1000
    images = list(batch.x.unsqueeze(2).unbind(0))
    context = batch.context
    lengths = context.lengths if context.lengths is not None else context.token_lengths
    if lengths.dim() == 1:
        captions = [f[:n] for f, n in zip(context.features, lengths.tolist(), strict=True)]
        return -torch.stack(model(images, t, captions, return_dict=False)[0]).squeeze(2)
    captions = [list(f[: sum(n)].split(n)) for f, n in zip(context.features, lengths.tolist(), strict=True)]
    count = len(context.references)
    pictures = [[*(r[i].unsqueeze(1) for r in context.references), image] for i, image in enumerate(images)]
    vision = [[*(v[i] for v in context.vision), None] if context.vision else None for i in range(len(images))]
    mask = [[0] * count + [1]] * len(images)
    out = model(pictures, t, captions, siglip_feats=vision, image_noise_mask=mask, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def _call_flux2(model: nn.Module, case: Case, batch: Batch) -> Tensor:
    context = batch.context
    images = [batch.x, *context.references]
    tokens = torch.cat([image.flatten(2).transpose(1, 2) for image in images], 1)
    text = context.features.shape[1]
    kwargs = None
    if context.lengths is not None:
        seen = torch.arange(text) < context.lengths.unsqueeze(1)
        seen = torch.cat([seen, seen.new_ones(len(seen), tokens.shape[1])], 1)
        kwargs = {"attention_mask": seen[:, None, None, :]}
    guided = case.config["guidance_embeds"]
    out = model(
        tokens,
        context.features,
        batch.sigma,
        flux2_packing.ids([(image.shape[2], image.shape[3]) for image in images]),
        flux2_packing.text_ids(text),
        guidance=torch.full_like(batch.sigma, 4.0) if guided else None,
        joint_attention_kwargs=kwargs,
        return_dict=False,
    )[0]
    own = batch.x.shape[2] * batch.x.shape[3]
    return out[:, :own].transpose(1, 2).unflatten(2, batch.x.shape[2:])


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def relative_error(value: Tensor, true: Tensor) -> float:
    value, true = value.detach().double(), true.detach().double()
    scale, error = true.norm(), (value - true).norm()
    return float(error / scale) if scale > 0 else float(error)
