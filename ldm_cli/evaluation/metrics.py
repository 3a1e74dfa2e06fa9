"""Metrics of image and text embeddings: CLIP score, zero-shot classification, retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.evaluation.intervals import NORMAL_QUANTILE, interval

_CHUNK = 1024
_FEWEST_FOR_INTERVAL = 20


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosine of each image and its text, in [-1, 1].

    Args:
        image_features, text_features: float [N, D], of any length.

    Returns:
        float [N].

    Raises:
        ValueError: if the shapes differ.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(f"clip_score: images {list(image_features.shape)}, texts {list(text_features.shape)}")
    return (F.normalize(image_features, dim=-1) * F.normalize(text_features, dim=-1)).sum(-1)


def summarize_clip_score(cosines: Tensor) -> dict[str, object]:
    """The mean of `clip_score` in the conventions of publications.

    Args:
        cosines: float [N], of one picture or more.

    Returns:
        `mean_cosine`; `clip_score`, the mean of 100 · max(cos, 0), as mostly reported, with `clip_score_interval`, 95 %
        (None of fewer than 20 pictures); `clipscore_hessel`, the mean of 2.5 · max(cos, 0) (Hessel et al. 2021,
        arXiv:2104.08718, eq. 1); `num_samples`.
    """
    scores = 100 * cosines.double().clamp(min=0)
    score, found = float(scores.mean()), None
    if len(scores) >= _FEWEST_FOR_INTERVAL:
        found = interval(score, float(scores.std()) / len(scores) ** 0.5, NORMAL_QUANTILE)
    return {
        "mean_cosine": float(cosines.double().mean()),
        "clip_score": score,
        "clip_score_interval": found,
        "clipscore_hessel": score / 40,
        "num_samples": len(cosines),
    }


def class_embeddings(template_features: Tensor) -> Tensor:
    """One embedding per class: the normalised mean of its templates' normalised features.

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.4.

    Args:
        template_features: float [C, T, D], the features of T prompts for each of C classes.

    Returns:
        float [C, D] of length 1.
    """
    return F.normalize(F.normalize(template_features, dim=-1).mean(1), dim=-1)


def zero_shot_accuracy(image_features: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the nearest class.

    A class exactly as near as the right one counts as nearer, so that features that have collapsed to a point score 0.

    Args:
        image_features: float [N, D], N at least 1.
        classes: float [C, D], from `class_embeddings`.
        labels: int64 [N] in [0, C).

    Returns:
        `top1`, and with more than 5 classes `top5`, over all images; `per_class`: the mean over classes of their top-1
        accuracy, in which rare classes have the same weight as frequent ones.

    Raises:
        ValueError: if there is no image, or a label is outside [0, C).
    """
    num_classes = len(classes)
    if len(labels) == 0 or len(labels) != len(image_features):
        raise ValueError(f"zero_shot_accuracy: {len(image_features)} images and {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"zero_shot_accuracy: labels {labels.min()} to {labels.max()}, but {num_classes} classes")
    similarity = F.normalize(image_features, dim=-1) @ classes.T
    own = similarity.gather(1, labels[:, None])
    rank = (similarity >= own).sum(1) - 1
    hits = (rank == 0).double()
    ones = torch.ones_like(hits)
    totals = torch.zeros(num_classes, dtype=torch.float64, device=hits.device).index_add_(0, labels, ones)
    right = torch.zeros_like(totals).index_add_(0, labels, hits)
    result = {"top1": float(hits.mean()), "per_class": float((right / totals)[totals > 0].mean())}
    if num_classes > 5:
        result["top5"] = float((rank < 5).double().mean())
    return result


def retrieval_recall(
    image_features: Tensor, text_features: Tensor, captions: Sequence[str], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k: share of queries with the right answer among the k nearest.

    Each distinct caption is one query, whose right answers are all images with that caption, and one entry of the
    gallery that images are matched with. Entries exactly as near as the right one come before it.

    Args:
        image_features, text_features: float [N, D]; row i of both belongs to `captions[i]`.
        captions: N texts.
        ks: each k at least 1.

    Returns:
        `text_to_image@k` and `image_to_text@k` for each k, in [0, 1].

    Raises:
        ValueError: if there is no caption, or the numbers differ.
    """
    if not captions or not len(captions) == len(image_features) == len(text_features):
        raise ValueError(
            f"retrieval_recall: {len(image_features)} images, {len(text_features)} texts, {len(captions)} captions"
        )
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    number = {caption: n for n, caption in enumerate(first)}
    belongs = torch.tensor([number[caption] for caption in captions], device=image_features.device)
    images = F.normalize(image_features, dim=-1)
    texts = F.normalize(text_features[list(first.values())], dim=-1)
    queries = torch.arange(len(texts), device=images.device)
    ranks = {
        "text_to_image": _ranks(texts, queries, images, belongs),
        "image_to_text": _ranks(images, belongs, texts, queries),
    }
    return {f"{name}@{k}": float((rank < k).double().mean()) for name, rank in ranks.items() for k in ks}


def _ranks(queries: Tensor, query_names: Tensor, gallery: Tensor, gallery_names: Tensor) -> Tensor:
    """Number of entries with another name that are at least as near to each query as its own nearest one: int64 [Q]."""
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        part, names = queries[start : start + _CHUNK], query_names[start : start + _CHUNK]
        similarity = part @ gallery.T
        own = names[:, None] == gallery_names[None, :]
        nearest = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= nearest) & ~own).sum(1))
    return torch.cat(ranks)
