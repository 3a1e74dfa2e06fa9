"""What training may do with a transformer's patches: leave some out, or compare them with an image tower's features.

Letters: B batch, L patches, K of them that are seen, D width, F width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli import philox
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionTransformer


@dataclass(frozen=True)
class PatchSubset:
    """The patches that all blocks see (Sehwag et al. 2024, arXiv:2407.15811, "deferred masking").

    Attributes:
        indices: int64 [B, K] in [0, L), rising.
        first_block: the blocks before this one see all patches.
    """

    indices: Tensor
    first_block: int

    def of(self, tokens: Tensor) -> Tensor:
        """The seen ones of tokens [B, L, D]: [B, K, D]."""
        return tokens.gather(1, self.indices[..., None].expand(-1, -1, tokens.shape[2]))

    def spread(self, tokens: Tensor, num_patches: int) -> Tensor:
        """[B, K, D] → [B, L, D], zeros where nothing was seen."""
        whole = tokens.new_zeros(len(tokens), num_patches, tokens.shape[2])
        return whole.scatter(1, self.indices[..., None].expand_as(tokens), tokens)

    def weights(self, rows: int, columns: int, side: int) -> Tensor:
        """How much each latent pixel counts in the loss, float32 [B, 1, h, w]: L / K where patches are seen, else 0.

        Args:
            rows, columns: L is their product.
            side: of a patch, in latent pixels.
        """
        share = self.indices.shape[1] / (rows * columns)
        seen = torch.full(self.indices.shape, 1.0 / share, device=self.indices.device)
        grid = self.spread(seen[..., None], rows * columns).view(-1, 1, rows, columns)
        return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)


def random_subset(
    key: philox.Key, epoch: Tensor, position: Tensor, num_patches: int, left_out: float, first_block: int
) -> PatchSubset:
    """Of each sample other patches, all subsets alike; at least one is seen.

    Args:
        epoch, position: of the samples, int64 [B].
        num_patches: L.
        left_out: share of the patches that are not seen, rounded.
        first_block: see `PatchSubset`.
    """
    num_seen = max(1, num_patches - round(left_out * num_patches))
    order = philox.uniform(key, epoch, position, num_patches).argsort(dim=1)
    return PatchSubset(order[:, :num_seen].sort(dim=1).values, first_block)


class PatchAlignment(nn.Module):
    """1 − cosine of projected image tokens and the features of an image tower (REPA, Yu et al. 2024, eq. 8).

    Its parameters are those of the projection, three linear layers; the tower is not among them.

    Args:
        width: D.
    """

    def __init__(self, tower: CLIPVisionTransformer, processor: CLIPImageProcessor, width: int) -> None:
        super().__init__()
        self._tower = [tower.requires_grad_(False).eval()]  # in a list, no part of the module
        self._processor, inner = processor, 2 * width
        self.net = nn.Sequential(
            *(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU()),
            nn.Linear(inner, tower.config.hidden_size),
        )

    def forward(self, tokens: Tensor, images: Tensor, rows: int) -> Tensor:
        """The mean over all patches, a scalar in [0, 2].

        Args:
            tokens: [B, L, D], row by row.
            images: uint8 [B, 3, H, W].
            rows: of patches.
        """
        with torch.no_grad():
            states = self._tower[0](self._processor(images), output_hidden_states=True).hidden_states[-1][:, 1:]
            side = round(states.shape[1] ** 0.5)
            grid = states.float().transpose(1, 2).unflatten(2, (side, side))
            size = rows, tokens.shape[1] // rows
            if size != (side, side):
                grid = F.interpolate(grid, size, mode="bilinear", antialias=True)
        found: Tensor = self.net(tokens)
        return (1.0 - F.cosine_similarity(found.float(), grid.flatten(2).transpose(1, 2), dim=2)).mean()
