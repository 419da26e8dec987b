"""The miniature's text encoder and its vision tower, taught to say in their last token what they have read and seen.

A language model of the real families brings what it learnt from text and pictures; these two learn one thing: linear
readers of the hidden state that the transformer is given, hidden_states[-2], name every claim. The same readers serve
a caption alone (what it says) and a caption with its image (all that the image shows, in the caption's order), so that
an image speaks to the transformer as a caption does that leaves nothing out. The readers are thrown away.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...zoo.encoders import tower
from ...zoo.encoders.tokens import chat
from ...zoo.miniature import Claims, Miniature, Samples, Scenes, samples
from ...zoo.miniature.captions import CELLS, RELATIONS, relation_of
from ...zoo.miniature.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from .fit import Fit, fit

# Classes of each claim's column, one of them "unsaid"; a count has its 0 for that.
_CLASSES = {
    "count": 3,
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "cell": len(CELLS) + 1,
    "relation": len(RELATIONS) + 1,
    "background": len(BACKGROUNDS) + 1,
}
_COLUMNS = {name: 2 if name in ("shape", "colour", "size") else 1 for name in _CLASSES}
_SIZES = [_CLASSES[name] for name in _CLASSES for _ in range(_COLUMNS[name])]


class Readers(nn.Module):
    """Linear readers of one token's features, normalised as the transformer's own first layer does it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.linear = nn.Linear(width, sum(_SIZES))

    def forward(self, features: Tensor) -> list[Tensor]:
        return list(self.linear(self.norm(features)).split(_SIZES, 1))


def everything(scenes: Scenes, claims: Claims) -> Claims:
    """All that could be said of the scenes, with objects in the order in which the claims have them."""
    relation = relation_of(scenes)
    two = scenes.count == 2
    cell = torch.where(two, -1, scenes.cell[:, 0])
    plain = Claims(scenes.count, scenes.shape, scenes.colour, scenes.size, cell, relation, scenes.background)
    flip = [1, 0]
    turned = torch.where(relation < 0, -1, relation ^ 1)
    shape, colour, size = (x[:, flip] for x in (scenes.shape, scenes.colour, scenes.size))
    other = Claims(scenes.count, shape, colour, size, cell, turned, scenes.background)
    objects = ("shape", "colour", "size", "relation")
    wrong = torch.stack(
        [((x >= 0) & (x != y)).view(len(claims), -1).any(1) for x, y in _pairs(claims, plain, objects)]
    ).any(0)
    swap = wrong & two
    return Claims(
        *(
            torch.where(swap.view(-1, *[1] * (x.dim() - 1)), y, x)
            for x, y in _pairs(plain, other, [field.name for field in fields(Claims)])
        )
    )


def _pairs(one: Claims, other: Claims, names: Any) -> list[tuple[Tensor, Tensor]]:
    return [(getattr(one, name), getattr(other, name)) for name in names]


def _labels(claims: Claims) -> list[Tensor]:
    """[n] for each reader."""
    columns = []
    for name in _CLASSES:
        value = getattr(claims, name).view(len(claims), -1)
        columns += list((value if name == "count" else value + 1).unbind(1))
    return columns


class Encoders:
    """The two towers as far as the transformer sees them, with graphs; the weights are the miniature's own."""

    def __init__(self, mini: Miniature) -> None:
        depth = mini.text_encoder.config.num_hidden_layers - 1
        self.mini, self.text = mini, tower.cut(mini.text_encoder, depth)
        twin = mini.vision_language_encoder
        self.twin = copy.copy(twin)
        self.twin._modules = dict(twin._modules)
        self.twin.language_model = tower.cut(twin.language_model, depth)

    def parameters(self) -> dict[str, nn.Parameter]:
        text = {f"text_encoder.{name}": p for name, p in self.text.named_parameters()}
        return text | {f"vision_tower.{name}": p for name, p in self.twin.visual.named_parameters()}

    def of_captions(self, drawn: Samples) -> Tensor:
        """[n, width]: the last token's features."""
        texts = [chat(self.mini.tokenizer, caption, enable_thinking=True) for caption in drawn.captions]
        inputs = self.mini.tokenizer(texts, padding=True, return_tensors="pt")
        return _last(self.text(use_cache=False, **inputs).last_hidden_state, inputs["attention_mask"])

    def of_images(self, drawn: Samples) -> Tensor:
        """The same of captions with their images."""
        inputs = self.mini.processor(drawn.captions, drawn.images)
        return _last(self.twin(use_cache=False, **inputs).last_hidden_state, inputs["attention_mask"])


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.sum(1) - 1]


def train_encoders(mini: Miniature, plan: Fit, folder: Path) -> Readers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        readers = Readers(mini.text_encoder.config.hidden_size)
    encoders = Encoders(mini)

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = samples(plan.seed, step * plan.batch, plan.batch)
        said = _cross_entropy(readers(encoders.of_captions(drawn)), drawn.claims)
        seen = _cross_entropy(readers(encoders.of_images(drawn)), everything(drawn.scenes, drawn.claims))
        return {"loss": said + seen, "caption_loss": said.detach(), "image_loss": seen.detach()}

    parameters = encoders.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    fit("encoders", parameters | dict(readers.named_parameters()), loss, plan, folder)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return readers.eval()


def _cross_entropy(logits: list[Tensor], claims: Claims) -> Tensor:
    pairs = zip(logits, _labels(claims), strict=True)
    return torch.stack([F.cross_entropy(scores, label) for scores, label in pairs]).sum()


@torch.no_grad()
def reading(mini: Miniature, readers: Readers, seed: int, count: int, at_once: int = 128) -> dict[str, float]:
    """The part of captions all of whose claims are read rightly, and of images of which everything is."""
    encoders, right = Encoders(mini), torch.zeros(2, dtype=torch.int64)
    for start in range(0, count, at_once):
        drawn = samples(seed, start, min(at_once, count - start))
        for row, (features, claims) in enumerate(
            (
                (encoders.of_captions(drawn), drawn.claims),
                (encoders.of_images(drawn), everything(drawn.scenes, drawn.claims)),
            )
        ):
            same = [scores.argmax(1) == label for scores, label in zip(readers(features), _labels(claims), strict=True)]
            right[row] += int(torch.stack(same).all(0).sum())
    return {"captions": int(right[0]) / count, "images": int(right[1]) / count}
