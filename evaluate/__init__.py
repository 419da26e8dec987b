"""Metrics of images, as pure functions of features: quality, variety, and whether captions are followed.

docs/evaluate.md has each formula, its paper and its pitfalls.
"""

from __future__ import annotations

from .alignment import Alignment, ClipScore, MiniatureAlignment, VqaScore, load_clip_score, load_vqa_score
from .diversity import diversity_by_prompt, pairwise_distance, prompt_diversity, vendi_score, vendi_score_of_kernel
from .features import FeatureNetwork, MiniatureFeatures, ModelFeatures, load_features
from .frechet import FeatureStatistics, Gaussian, frechet_distance, frechet_floor
from .intervals import Interval, bootstrap
from .neighbours import NeighbourMetrics, neighbour_metrics
from .online import ImageMetrics

__all__ = [
    "Alignment",
    "ClipScore",
    "FeatureNetwork",
    "FeatureStatistics",
    "Gaussian",
    "ImageMetrics",
    "Interval",
    "MiniatureAlignment",
    "MiniatureFeatures",
    "ModelFeatures",
    "NeighbourMetrics",
    "VqaScore",
    "bootstrap",
    "diversity_by_prompt",
    "frechet_distance",
    "frechet_floor",
    "load_clip_score",
    "load_features",
    "load_vqa_score",
    "neighbour_metrics",
    "pairwise_distance",
    "prompt_diversity",
    "vendi_score",
    "vendi_score_of_kernel",
]
