"""How different images are: of one prompt over seeds, and of a whole set.

    diversity   1 - the mean cosine of all pairs of different images of a prompt       (DP-DMD, arXiv 2602.03139)
    vendi       exp(-sum l log l), l the eigenvalues of K / n, K the cosines           (arXiv 2210.02410)

Vendi is the effective number of different images: 1 when all are equal, n when all are orthogonal. Both see features
only, and noise has features too: speckle looks diverse. Read them beside precision or alignment.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from . import arguments
from .groups import rows_by_label

DISTANCES = ("cosine", "euclidean")


def pairwise_distance(features: Tensor, *, distance: str = "cosine") -> float:
    """The mean distance of all pairs of different rows of features [N, F], N >= 2.

    Args:
        distance: "cosine" is 1 - the cosine, "euclidean" the features' distance as it is.
    """
    if distance not in DISTANCES:
        raise ValueError(f"pairwise_distance: distance is {distance!r}, expected one of {', '.join(DISTANCES)}")
    arguments.check_features("pairwise_distance", "features", features, least=2)
    rows = features.detach().double()
    if distance == "euclidean":
        return torch.nn.functional.pdist(rows).mean().item()
    # Differences of unit vectors, |u - v|^2 = 2 (1 - cos): equal rows are at exactly 0.
    return torch.nn.functional.pdist(_unit("pairwise_distance", rows)).square().mean().item() / 2


def diversity_by_prompt(
    features: Tensor, prompts: Sequence[Hashable], *, distance: str = "cosine"
) -> dict[Hashable, float]:
    """`pairwise_distance` among the images of each prompt that has at least two; prompts with one have no pair.

    Args:
        features: [N, F].
        prompts: N of them; images with equal prompts are one group.
    """
    name = "diversity_by_prompt"
    arguments.check_features(name, "features", features)
    arguments.check_labels(name, "prompts", prompts, len(features))
    groups = {prompt: rows for prompt, rows in rows_by_label(prompts).items() if len(rows) > 1}
    if not groups:
        raise ValueError(
            f"{name}: none of the {len(features)} prompts comes twice, expected at least two images of one prompt; "
            f"sample prompts with several seeds"
        )
    return {
        prompt: pairwise_distance(features[rows.to(features.device)], distance=distance)
        for prompt, rows in groups.items()
    }


def prompt_diversity(features: Tensor, prompts: Sequence[Hashable], *, distance: str = "cosine") -> float:
    """The mean of `diversity_by_prompt` over the prompts, each counting once."""
    values = diversity_by_prompt(features, prompts, distance=distance).values()
    return sum(values) / len(values)


def vendi_score(features: Tensor) -> float:
    """The effective number of different rows in features [N, F], between 1 and min(N, F), by their cosines."""
    arguments.check_features("vendi_score", "features", features)
    rows = _unit("vendi_score", features.detach().double())
    # The non-zero eigenvalues of U U^T [N, N] are those of U^T U [F, F], and the squared singular values of U.
    return _effective_number(torch.linalg.svdvals(rows).square() / len(rows))


def vendi_score_of_kernel(kernel: Tensor) -> float:
    """The same for any similarity kernel [N, N]: symmetric, positive semidefinite, 1 on the diagonal."""
    name = "vendi_score_of_kernel"
    arguments.check_features(name, "kernel", kernel)
    if kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"{name}: kernel has shape {list(kernel.shape)}, expected [N, N]")
    allowed = torch.finfo(kernel.dtype).eps * len(kernel) * 4
    kernel = kernel.detach().double()
    if (skew := (kernel - kernel.T).abs().max().item()) > allowed:
        raise ValueError(f"{name}: kernel is not symmetric, entries differ from their mirrors by {skew:g}")
    if (off := (kernel.diagonal() - 1).abs().max().item()) > allowed:
        raise ValueError(f"{name}: the kernel's diagonal differs from 1 by {off:g}, expected k(x, x) = 1")
    values = torch.linalg.eigvalsh(kernel / len(kernel))
    if (least := values[0].item()) < -allowed:
        raise ValueError(f"{name}: kernel / N has the eigenvalue {least:g}, expected none below 0")
    return _effective_number(values.clamp_min(0))  # what is below 0 is rounding of 0


def _effective_number(weights: Tensor) -> float:
    """exp of the entropy of weights that sum to 1; 0 log 0 is 0."""
    return torch.special.entr(weights).sum().exp().item()


def _unit(name: str, rows: Tensor) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    if zero := int((lengths == 0).sum()):
        raise ValueError(
            f"{name}: {zero} of {len(rows)} rows of features are all 0 and have no direction, expected non-zero rows"
        )
    return rows / lengths
