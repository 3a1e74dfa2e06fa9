"""The autoencoder's loss: reconstruction, latent, perceptual and adversarial terms in one scalar.

The discriminator learns in the same backward pass as the autoencoder: its own loss sees the reconstruction
detached, and the autoencoder's adversarial term sees the discriminator's weights detached, so each gradient
reaches only its own side and one loss, one loop and one step suffice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm_cli.core.models.autoencoder_kl import DiagonalGaussian
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionTransformer
from ldm_cli.core.models.patch_discriminator import PatchDiscriminator, hinge_loss
from ldm_cli.core.vae_loss_config import VAELossConfig


def reconstruction_loss(kind: Literal["l1", "l2"], reconstruction: Tensor, images: Tensor) -> Tensor:
    """Scalar mean of |x̂ − x| or (x̂ − x)² over [B, C, H, W]."""
    return F.l1_loss(reconstruction, images) if kind == "l1" else F.mse_loss(reconstruction, images)


def kl_loss(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL divergence of the posterior of images [B, 3, H, W], divided by the values of an image: scalar, in nats."""
    return posterior.kl().mean() / images[0].numel()


class PerceptualDistance(nn.Module):
    """Mean squared distance of unit-length features, over all layers of a frozen CLIP image tower.

    As LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1) without its learnt channel weights, on a
    Transformer's tokens.

    Args:
        tower: its parameters no longer require gradients.
    """

    def __init__(self, tower: CLIPVisionTransformer, processor: CLIPImageProcessor) -> None:
        super().__init__()
        self.tower, self.processor = tower.requires_grad_(False).eval(), processor

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Two times [B, 3, H, W] in [−1, 1] → scalar."""
        pair = self.processor((torch.cat((reconstruction, images)) + 1) * 127.5)
        distances = []
        for layer in self.tower(pair, output_hidden_states=True).hidden_states[1:]:
            ours, theirs = F.normalize(layer.float(), dim=-1).chunk(2)
            distances.append((ours - theirs).square().sum(dim=-1).mean())
        return torch.stack(distances).mean()


class VAELoss(nn.Module):
    """All terms of the loss of one batch; holds the discriminator and the perceptual distance, if any."""

    def __init__(self, config: VAELossConfig, perceptual: PerceptualDistance | None = None) -> None:
        super().__init__()
        if config.perceptual_weight > 0 and perceptual is None:
            raise ValueError(f"perceptual_weight={config.perceptual_weight}, but no perceptual distance was given")
        self.config = config
        self.perceptual = perceptual
        self.discriminator = (
            PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
            if config.adversarial_weight > 0
            else None
        )

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor,
        latent: Mapping[str, tuple[float, Tensor]],
        last_layer: Tensor,
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms.

        Args:
            images: [B, 3, H, W] in [−1, 1].
            reconstruction: of the images, with gradient.
            latent: name → weight and value of the terms that the latent adds, scalars.
            last_layer: the decoder's weight at which the adversarial term is balanced.
            step: 1-based training step.
        """
        config, reconstruction = self.config, reconstruction.float()
        terms = {"reconstruction": reconstruction_loss(config.reconstruction, reconstruction, images)}
        terms |= {name: term for name, (_, term) in latent.items()}
        loss = terms["reconstruction"]
        for weight, term in latent.values():
            loss = loss + weight * term
        if config.perceptual_weight > 0 and self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, images)
            loss = loss + config.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None and step > config.adversarial_start:
            terms |= self._adversarial(loss, reconstruction, images, last_layer)
            balance = config.adversarial_weight * terms["adaptive_weight"]
            loss = loss + balance * terms["adversarial"] + terms["discriminator"]
        return loss, terms

    def _adversarial(
        self, loss: Tensor, reconstruction: Tensor, images: Tensor, last_layer: Tensor
    ) -> dict[str, Tensor]:
        assert self.discriminator is not None
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adversarial = -functional_call(self.discriminator, frozen, reconstruction).float().mean()
        real, fake = self.discriminator(torch.cat((images, reconstruction.detach()))).float().chunk(2)
        adaptive = torch.ones((), device=images.device)
        if self.config.adversarial_adaptive:
            (ours,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
            (theirs,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
            adaptive = (ours.norm() / (theirs.norm() + 1e-4)).clamp(0.0, 1e4).detach()
        return {"adversarial": adversarial, "discriminator": hinge_loss(real, fake), "adaptive_weight": adaptive}
