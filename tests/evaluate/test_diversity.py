"""Diversity is the mean over pairs, by prompt; the Vendi score counts different images."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.evaluate.strategies import SEEDS, normal, permutation, rotation
from twostep.evaluate import (
    diversity_by_prompt,
    pairwise_distance,
    prompt_diversity,
    vendi_score,
    vendi_score_of_kernel,
)


@given(SEEDS, st.integers(2, 9), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_it_is_the_mean_over_pairs(seed: int, n: int, width: int) -> None:
    features = normal(seed, n, width)
    pairs = list(itertools.combinations(features, 2))
    cosine = sum(1 - float(F.cosine_similarity(x, y, 0)) for x, y in pairs) / len(pairs)
    euclidean = sum(float((x - y).norm()) for x, y in pairs) / len(pairs)
    assert pairwise_distance(features) == pytest.approx(cosine, rel=1e-10, abs=1e-12)
    assert pairwise_distance(features, distance="euclidean") == pytest.approx(euclidean, rel=1e-10)


def test_equal_images_have_none_and_orthogonal_ones_have_1() -> None:
    assert pairwise_distance(normal(0, 1, 7).expand(5, 7)) == 0
    assert pairwise_distance(rotation(0, 5)) == pytest.approx(1, rel=1e-12)
    assert pairwise_distance(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(2)


@given(SEEDS, st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_a_rotation_changes_nothing_and_a_scale_only_euclidean_distances(seed: int, scale: float) -> None:
    features, turn = normal(seed, 6, 4), rotation(seed + 1, 4)
    for distance, factor in (("cosine", 1), ("euclidean", scale)):
        expected = pairwise_distance(features, distance=distance) * factor
        moved = (features @ turn * scale)[permutation(seed, 6)]
        assert pairwise_distance(moved, distance=distance) == pytest.approx(expected, rel=1e-9)


def test_only_images_of_one_prompt_are_compared_and_each_prompt_counts_once() -> None:
    features = torch.eye(6, dtype=torch.float64)
    features[3] = features[0]
    prompts = ["a", "b", "b", "a", "alone", "b"]
    assert diversity_by_prompt(features, prompts) == pytest.approx({"a": 0, "b": 1})
    assert prompt_diversity(features, prompts) == pytest.approx(0.5)
    assert prompt_diversity(10 * features, prompts, distance="euclidean") == pytest.approx(10 * 2**0.5 / 2)


@given(st.integers(1, 9), st.integers(1, 5), SEEDS)
@settings(deadline=None, max_examples=30)
def test_the_vendi_score_counts_directions(different: int, copies: int, seed: int) -> None:
    features = rotation(seed, 9)[:different].repeat_interleave(copies, 0)
    assert vendi_score(features) == pytest.approx(different, rel=1e-10)
    moved = (features * (1 + normal(seed, len(features), 1).abs()))[permutation(seed, len(features))]
    assert vendi_score(moved) == pytest.approx(different, rel=1e-10)


@given(SEEDS, st.integers(1, 12), st.integers(2, 12))
@settings(deadline=None, max_examples=30)
def test_the_vendi_score_is_that_of_the_cosines(seed: int, n: int, width: int) -> None:
    rows = normal(seed, n, width)
    unit = F.normalize(rows)
    kernel = unit @ unit.T
    weights = torch.linalg.eigvalsh(kernel / n).clamp_min(1e-300)
    expected = float((-(weights * weights.log()).sum()).exp())
    assert vendi_score(rows) == pytest.approx(expected, rel=1e-9)
    assert vendi_score_of_kernel(kernel) == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-12 <= vendi_score(rows) <= min(n, width) + 1e-9


def test_two_images_have_the_vendi_score_of_their_cosine() -> None:
    # Eigenvalues (1 + c) / 2 and (1 - c) / 2 for a cosine of c = 0.6.
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    expected = torch.special.entr(torch.tensor([0.8, 0.2], dtype=torch.float64)).sum().exp()
    assert vendi_score(features) == pytest.approx(float(expected), rel=1e-12)


def test_mistakes_are_named() -> None:
    features = normal(0, 4, 3)
    with pytest.raises(ValueError, match=r"none of the 4 prompts comes twice"):
        prompt_diversity(features, list("abcd"))
    with pytest.raises(ValueError, match=r"3 prompts and 4 images"):
        prompt_diversity(features, list("abc"))
    with pytest.raises(TypeError, match=r"prompts is one text"):
        prompt_diversity(features, "aaaa")
    with pytest.raises(ValueError, match=r"'manhattan', expected one of cosine, euclidean"):
        pairwise_distance(features, distance="manhattan")
    with pytest.raises(ValueError, match=r"1 of 4 rows of features are all 0"):
        vendi_score(torch.cat([features[:3], features[:1] * 0]))
    with pytest.raises(ValueError, match=r"diagonal differs from 1 by 1"):
        vendi_score_of_kernel(2 * torch.eye(3))
    with pytest.raises(ValueError, match=r"eigenvalue -0\.5"):
        vendi_score_of_kernel(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
