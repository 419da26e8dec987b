"""What a backbone is conditioned on: features of captions, and images shown beside them. Opaque to methods.

A batch of contexts is one padded tensor and the lengths of its rows. The lengths live on the CPU: positions, masks and
shapes are derived from them, and a GPU never has to be asked. `encoder` is the fingerprint of what made the features,
so that a context never meets a backbone, or another context, that it does not belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    features: Tensor  # [B, L, C]; what stands beyond a sample's length is padding and never read
    # [B] on the CPU, tokens of each sample; [B, S] where a caption has S segments; None: all L
    lengths: Tensor | None = None
    references: tuple[Tensor, ...] = ()  # clean latents shown beside the caption, each [B, C, H, W]
    vision: tuple[Tensor, ...] = ()  # a vision encoder's features of the references, each [B, H, W, C]
    encoder: str = ""  # fingerprint of the encoder and the template; empty: not known

    def __post_init__(self) -> None:
        if self.features.dim() != 3:
            raise ValueError(
                f"Context: features have shape {list(self.features.shape)}, expected [batch, tokens, channels]"
            )
        if self.lengths is not None:
            self._check_lengths(self.lengths)
        for name, images in (("references", self.references), ("vision", self.vision)):
            for image in images:
                if image.dim() != 4 or len(image) != self.batch:
                    raise ValueError(
                        f"Context: {name} hold a tensor of shape {list(image.shape)}, expected 4 dimensions and a "
                        f"batch of {self.batch}"
                    )

    def _check_lengths(self, lengths: Tensor) -> None:
        batch, tokens, _ = self.features.shape
        if not isinstance(lengths, Tensor):
            raise TypeError(f"Context: lengths are {type(lengths).__name__}, expected a tensor of integers on the CPU")
        if lengths.dim() not in (1, 2) or len(lengths) != batch:
            raise ValueError(
                f"Context: lengths have shape {list(lengths.shape)}, expected [{batch}] or [{batch}, segments]"
            )
        if lengths.device.type != "cpu" or lengths.is_floating_point():
            raise ValueError(
                f"Context: lengths are {lengths.dtype} on {lengths.device}, expected integers on the CPU (shapes come "
                f"from them)"
            )
        total = lengths if lengths.dim() == 1 else lengths.sum(1)
        if batch and (int(lengths.min()) < 1 or int(total.max()) > tokens):
            raise ValueError(
                f"Context: lengths {lengths.tolist()} do not fit features of {tokens} tokens: every length is at least "
                f"1, and a sample's lengths add up to at most {tokens}"
            )

    @property
    def batch(self) -> int:
        return len(self.features)

    @property
    def token_lengths(self) -> Tensor:
        """[B]: how many tokens each sample has, all its segments together."""
        if self.lengths is None:
            return torch.full((self.batch,), self.features.shape[1], dtype=torch.int64)
        return self.lengths if self.lengths.dim() == 1 else self.lengths.sum(1)

    def lengths_of_samples(self) -> list[int]:
        """token_lengths as numbers."""
        if self.lengths is None:
            return [self.features.shape[1]] * self.batch
        return self.token_lengths.tolist()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Context:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=True)

        return replace(
            self,
            features=move(self.features),
            references=tuple(map(move, self.references)),
            vision=tuple(map(move, self.vision)),
        )

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Context:
        """Some samples of the batch: a slice, or a list or tensor of indices. Trailing padding that nobody needs is
        cut."""
        if not isinstance(index, slice):
            index = self._indices(index)

        def take(tensor: Tensor) -> Tensor:
            return tensor[index] if isinstance(index, slice) else tensor[index.to(tensor.device)]

        lengths = None if self.lengths is None else take(self.lengths)
        features = take(self.features)
        if lengths is not None and len(lengths):
            totals = lengths if lengths.dim() == 1 else lengths.sum(1)
            features = features[:, : int(totals.max())]
        return replace(
            self,
            features=features,
            lengths=lengths,
            references=tuple(map(take, self.references)),
            vision=tuple(map(take, self.vision)),
        )

    def _indices(self, index: Sequence[int] | Tensor | int) -> Tensor:
        found = torch.as_tensor(index)
        if found.dim() == 0:
            raise TypeError(
                f"Context: index {found.item()} names one sample; take a batch of one with [{found.item()} : "
                f"{found.item()} + 1]"
            )
        if found.dtype == torch.bool and found.shape == (self.batch,):
            return found.nonzero().squeeze(1)
        if found.numel() == 0:
            return found.to(torch.int64)  # of an empty list, which has no dtype of its own
        if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise TypeError(
                f"Context: given indices of shape {list(found.shape)} and dtype {found.dtype}, expected a slice, whole "
                f"numbers, or a mask of {self.batch} booleans"
            )
        return found.to(torch.int64)

    def repeat(self, times: int) -> Context:
        """Every sample `times` times, one after the other: [a, b] becomes [a, a, b, b]."""
        return self[torch.arange(self.batch).repeat_interleave(times)]

    @staticmethod
    def cat(contexts: Sequence[Context]) -> Context:
        """One batch of several, padded to the longest."""
        if not contexts:
            raise ValueError("Context.cat: there are no contexts, expected at least one")
        first = contexts[0]
        for other in contexts[1:]:
            first._check_joins(other)
        if len(contexts) == 1:
            return first
        longest = max(c.features.shape[1] for c in contexts)
        features = [torch.nn.functional.pad(c.features, (0, 0, 0, longest - c.features.shape[1])) for c in contexts]
        even = all(c.lengths is None and c.features.shape[1] == longest for c in contexts)
        segmented = first.lengths is not None and first.lengths.dim() == 2

        def lengths_of(c: Context) -> Tensor:  # None and [B] are captions of one segment, as [B, 1] is
            if not segmented:
                return c.token_lengths
            return c.token_lengths.unsqueeze(1) if c.lengths is None or c.lengths.dim() == 1 else c.lengths

        return replace(
            first,
            features=torch.cat(features),
            lengths=None if even else torch.cat([lengths_of(c) for c in contexts]),
            references=tuple(torch.cat(images) for images in zip(*(c.references for c in contexts), strict=True)),
            vision=tuple(torch.cat(images) for images in zip(*(c.vision for c in contexts), strict=True)),
        )

    def _check_joins(self, other: Context) -> None:
        if self.encoder != other.encoder:
            raise ValueError(
                f"Context: contexts of two encoders cannot share a batch: {self.encoder!r} and {other.encoder!r}; "
                "encode both with the same text encoder and template"
            )

        def shape(c: Context) -> str:
            segments = 1 if c.lengths is None or c.lengths.dim() == 1 else c.lengths.shape[1]
            return (
                f"{c.features.shape[2]} channels, {segments} segments, references "
                f"{[list(r.shape[1:]) for r in c.references]}, vision {[list(v.shape[1:]) for v in c.vision]}"
            )

        if shape(self) != shape(other):
            raise ValueError(f"Context: contexts of two shapes cannot share a batch: {shape(self)}; and {shape(other)}")
