from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL, DiagonalGaussian
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig

from .weights import golden_shapes, gradients, num_parameters, randomise, shapes


def autoencoder(channels: tuple[int, ...] = (32, 64), **changes: Any) -> AutoencoderKL:
    levels = len(channels)
    defaults: dict[str, Any] = {"norm_num_groups": 8, "block_out_channels": channels}
    defaults["down_block_types"] = ("DownEncoderBlock2D",) * levels
    defaults["up_block_types"] = ("UpDecoderBlock2D",) * levels
    return AutoencoderKL(AutoencoderKLConfig(**defaults | changes))


class Reconstruction(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.posterior(images)
        return self.vae.decode_z(posterior.sample(torch.ones_like(posterior.mean)))


def test_parameter_names_and_shapes_are_the_published_ones() -> None:
    assert shapes(autoencoder()) == golden_shapes("autoencoder_kl")


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = autoencoder((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    assert num_parameters(model) == 83_653_863


def test_a_model_made_on_the_meta_device_can_be_filled_and_run() -> None:
    original = autoencoder()
    with torch.device("meta"):
        copy = AutoencoderKL(original.config)
    copy.to_empty(device="cpu").load_state_dict(original.state_dict())
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(copy.encode(images), original.encode(images))


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (2, 2), (4, 8)])
def test_latents_are_smaller_by_the_factor(levels: int, factor: int) -> None:
    model = autoencoder((8,) * levels, latent_channels=16)
    assert model.factor == factor
    assert model.channels == 16
    moments = model.moments(torch.randn(2, 3, 3 * factor, 2 * factor))
    assert moments["mean"].shape == moments["logvar"].shape == (2, 16, 3, 2)
    assert model.decode(model.latents(moments)).shape == (2, 3, 3 * factor, 2 * factor)


def test_an_image_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="9×8 px: not a multiple of factor=2"):
        autoencoder().encode(torch.zeros(1, 3, 9, 8))


@torch.no_grad()
def test_latents_are_scaled_samples_of_the_posterior_and_decoding_undoes_the_scale() -> None:
    model = autoencoder((8,))
    randomise(model)
    images, noise = torch.rand(2, 3, 3, 3) * 2 - 1, torch.randn(2, 4, 3, 3)
    posterior = model.posterior(images)
    assert torch.equal(model.encode(images), posterior.mean * 0.18215)
    measured = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    model.config = model.config.model_copy(update=measured)
    latents = model.latents(model.moments(images), noise)
    torch.testing.assert_close(latents, (posterior.sample(noise) - 0.0609) * 1.5305)
    torch.testing.assert_close(model.decode(latents), model.decode_z(posterior.sample(noise)))


@torch.no_grad()
def test_a_codec_in_bf16_takes_float32_images_and_keeps_float32_moments() -> None:
    model = autoencoder((8,)).bfloat16()
    moments = model.moments(torch.rand(1, 3, 4, 4))
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    assert model.decode(model.latents(moments)).dtype == torch.bfloat16


def test_the_posterior_is_a_normal_distribution() -> None:
    torch.manual_seed(0)
    posterior = DiagonalGaussian.from_moments(torch.randn(3, 8, 2, 2))
    normal = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected.float())
    noise = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(posterior.sample(noise), (normal.mean + normal.stddev * noise).float())
    assert torch.equal(posterior.mode(), posterior.mean)


def test_the_variance_is_clamped() -> None:
    posterior = DiagonalGaussian.from_moments(torch.tensor([0.0, 0.0, -1e9, 1e9]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_gradient_checkpointing_leaves_gradients_as_they_are() -> None:
    model = autoencoder()
    randomise(model)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = gradients(Reconstruction(model), images)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.enable_gradient_checkpointing()
    actual = gradients(Reconstruction(model), images)
    assert expected.keys() == actual.keys()
    assert len(expected) == len(list(model.parameters()))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@torch.no_grad()
def test_channels_last_and_batching_do_not_change_the_numbers() -> None:
    model = autoencoder()
    randomise(model)
    images = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    reconstruct = Reconstruction(model)
    expected = reconstruct(images)
    alone = torch.cat([reconstruct(image[None]) for image in images])
    torch.testing.assert_close(alone, expected, atol=2e-5, rtol=0)
    model.to(memory_format=torch.channels_last)
    actual = reconstruct(images.to(memory_format=torch.channels_last))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
