"""CLIP's symmetric contrastive loss (Radford et al. 2021, arXiv:2103.00020, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    rows: slice | None = None,
    groups: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of the cross-entropies of choosing the text of an image and the image of a text.

    Args:
        image_features, text_features: [B, D], row i of both belonging together; any length, normalised here.
        logit_scale: scalar factor of the cosines (the exponential of the learnt parameter).
        rows: which images and texts choose, among all; None: all. The loss of the batch is the mean over equal
            parts of its rows.
        groups: int64 [B]; all images and texts of one number match one another, and the target is uniform over them
            (Yang et al. 2022, "Unified contrastive learning", eq. 2 and 3, arXiv:2204.03610); None: row i matches
            row i alone, as in CLIP.

    Returns:
        The scalar loss, and the figure `accuracy`: the share of images for which a text that matches scores highest.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(f"image features {tuple(image_features.shape)}, text features {tuple(text_features.shape)}")
    image = F.normalize(image_features.float(), dim=-1)
    text = F.normalize(text_features.float(), dim=-1)
    chosen = slice(0, len(image)) if rows is None else rows
    device = "cpu" if image.is_meta else image.device.type  # the meta device has no autocast to switch off
    with torch.autocast(device, enabled=False):  # bf16 rounds a logit of 100 to a multiple of 0.5
        of_images = logit_scale * image[chosen] @ text.T
        of_texts = logit_scale * text[chosen] @ image.T
    index = torch.arange(len(image), device=image.device)
    group = index if groups is None else groups
    matches = group[chosen, None] == group[None]
    target = index[chosen] if groups is None else matches / matches.sum(dim=1, keepdim=True)
    loss = (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2
    hits = matches.gather(1, of_images.argmax(dim=1, keepdim=True))
    return loss, {"accuracy": hits.float().mean()}
