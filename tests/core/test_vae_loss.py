"""Every weighted term of the autoencoder's loss carries gradient, to its own side only."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionTransformer
from ldm_cli.core.models.patch_discriminator import PatchDiscriminator, hinge_loss
from ldm_cli.core.vae_loss import PerceptualDistance, VAELoss, kl_loss
from ldm_cli.core.vae_loss_config import VAELossConfig

SIZE = 32
TOWER = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False))


def make_loss(**weights: object) -> VAELoss:
    config = VAELossConfig.from_mapping(
        {"kl_weight": 0.0, "discriminator_channels": 8, "discriminator_layers": 2, "perceptual_clip": "x", **weights}
    )
    return VAELoss(config, PerceptualDistance(CLIPVisionTransformer(TOWER), CLIPImageProcessor.for_side(16)))


def terms_of(
    loss: VAELoss, vae: AutoencoderKL, images: Tensor, noise: Tensor, step: int
) -> tuple[Tensor, Mapping[str, Tensor]]:
    posterior = vae.posterior(images)
    latent = {"kl": (loss.config.kl_weight, kl_loss(posterior, images))}
    return loss(images, vae.decode_z(posterior.sample(noise)), latent, vae.decoder.conv_out.weight, step)


def gradients(loss: VAELoss, vae: AutoencoderKL, step: int = 10) -> tuple[Tensor, Mapping[str, Tensor]]:
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    vae.zero_grad()
    loss.zero_grad()
    total, terms = terms_of(loss, vae, images, torch.randn(2, 4, SIZE, SIZE), step)
    total.backward()
    return total.detach(), terms


def norm(module: nn.Module) -> float:
    return sum(p.grad.norm().item() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("weight", ["kl_weight", "perceptual_weight", "adversarial_weight"])
def test_each_weighted_term_changes_the_gradient_of_the_autoencoder(weight: str) -> None:
    vae, results = make_vae(), []
    for value in (0.0, 1.0, 2.0):
        torch.manual_seed(1)
        loss = make_loss(**{weight: value, "adversarial_adaptive": False})
        torch.manual_seed(2)
        gradients(loss, vae)
        results.append(
            vae.decoder.conv_in.weight.grad.clone()
            if weight != "kl_weight"
            else vae.encoder.conv_in.weight.grad.clone()
        )
    first, second = results[1] - results[0], results[2] - results[0]
    assert first.norm() > 1e-6, "the term carries no gradient"
    if weight != "adversarial_weight":
        torch.testing.assert_close(second, 2 * first, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_reconstruction_reaches_encoder_and_decoder(kind: str) -> None:
    vae = make_vae()
    gradients(make_loss(reconstruction=kind), vae)
    assert norm(vae.encoder) > 0
    assert norm(vae.decoder) > 0


def test_the_discriminator_learns_from_its_own_loss_alone() -> None:
    """The gradient of the one scalar is the generator's of −D(x̂) and the discriminator's of its hinge loss."""
    vae, loss = make_vae(), make_loss(adversarial_weight=0.7, adversarial_adaptive=False)
    assert loss.discriminator is not None
    images, noise = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.randn(2, 4, SIZE, SIZE)
    total, _ = terms_of(loss, vae, images, noise, step=1)
    total.backward()
    of_discriminator = [p.grad.clone() for p in loss.discriminator.parameters()]
    of_decoder = vae.decoder.conv_in.weight.grad.clone()

    vae.zero_grad()
    loss.zero_grad()
    again = vae.decode_z(vae.posterior(images).sample(noise))
    hinge_loss(loss.discriminator(images), loss.discriminator(again.detach())).backward()
    for expected, parameter in zip(of_discriminator, loss.discriminator.parameters(), strict=True):
        torch.testing.assert_close(expected, parameter.grad, rtol=1e-4, atol=1e-7)
    loss.zero_grad()
    ((again - images).abs().mean() - 0.7 * loss.discriminator(again).mean()).backward()
    torch.testing.assert_close(of_decoder, vae.decoder.conv_in.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer() -> None:
    vae, loss = make_vae(), make_loss(adversarial_weight=1.0)
    images, noise = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.randn(2, 4, SIZE, SIZE)
    _, terms = terms_of(loss, vae, images, noise, step=1)
    layer = vae.decoder.conv_out.weight
    (ours,) = torch.autograd.grad(terms["reconstruction"], layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(terms["adversarial"], layer)
    assert terms["adaptive_weight"].item() == pytest.approx(
        ours.norm().item() / (theirs.norm().item() + 1e-4), rel=1e-4
    )


def test_before_its_start_the_adversarial_term_is_absent() -> None:
    vae, loss = make_vae(), make_loss(adversarial_weight=1.0, adversarial_start=5)
    _, terms = gradients(loss, vae, step=5)
    assert "adversarial" not in terms
    assert loss.discriminator is not None
    assert norm(loss.discriminator) == 0
    _, terms = gradients(loss, vae, step=6)
    assert norm(loss.discriminator) > 0


def test_the_perceptual_tower_stays_frozen_and_equal_images_are_at_distance_zero() -> None:
    loss = make_loss(perceptual_weight=1.0)
    gradients(loss, make_vae())
    assert loss.perceptual is not None
    assert all(p.grad is None for p in loss.perceptual.parameters())
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    assert loss.perceptual(images, images).item() == pytest.approx(0, abs=1e-10)
    assert loss.perceptual(images, -images).item() > 1e-4


def test_the_perceptual_tower_sees_images_as_its_image_processor_says() -> None:
    """(x − m) / s of images x is as images that another processor leaves alone."""
    tower = CLIPVisionTransformer(TOWER)
    first, second = torch.rand(2, 2, 3, 16, 16)
    fields = {"size": 16, "crop_size": 16}
    plain = CLIPImageProcessor.from_hugging_face(fields | {"image_mean": 0.0, "image_std": 1.0})
    other = CLIPImageProcessor.from_hugging_face(fields | {"image_mean": 0.25, "image_std": 0.5})
    shifted = [(2 * image - 0.5) * 2 - 1 for image in (first, second)]
    expected = PerceptualDistance(tower, plain)(*shifted)
    torch.testing.assert_close(PerceptualDistance(tower, other)(first * 2 - 1, second * 2 - 1), expected)
    assert (PerceptualDistance(tower, plain)(first * 2 - 1, second * 2 - 1) - expected).abs() > 1e-3


def test_kl_is_summed_over_the_latent_and_divided_by_the_image_size() -> None:
    vae = make_vae()
    loss = make_loss(kl_weight=1.0)
    images, noise = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.randn(2, 4, SIZE, SIZE)
    total, terms = terms_of(loss, vae, images, noise, step=1)
    posterior = vae.posterior(images)
    by_hand = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.logvar.mul(0.5).exp()),
        torch.distributions.Normal(0.0, 1.0),
    )
    expected = by_hand.sum(dim=(1, 2, 3)).mean() / (3 * SIZE * SIZE)
    assert terms["kl"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert total.item() == pytest.approx((terms["reconstruction"] + expected).item(), rel=1e-5)


def test_the_discriminator_has_the_published_receptive_field() -> None:
    discriminator = PatchDiscriminator(8, 3).eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    norms = [m for m in discriminator if isinstance(m, nn.GroupNorm)]
    for layer in norms:  # group norm sees the whole image; without it the field is that of the convolutions
        discriminator[list(discriminator).index(layer)] = nn.Identity()
    verdict = discriminator(images)
    verdict[0, 0, verdict.shape[2] // 2, verdict.shape[3] // 2].backward()
    touched = images.grad.abs().sum(dim=(0, 1, 2)).nonzero()
    assert (touched.max() - touched.min() + 1).item() == 70


def test_images_below_the_least_size_are_misuse_and_at_it_are_judged() -> None:
    assert PatchDiscriminator(8, 3)(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="needs 24"):
        PatchDiscriminator(8, 3)(torch.zeros(1, 3, 23, 24))
