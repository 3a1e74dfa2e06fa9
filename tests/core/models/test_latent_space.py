"""The latent in other units: the same pictures, standard normal channels."""

from __future__ import annotations

import torch

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.latent_space import standardized


def make(quant: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        block_out_channels=(8,), norm_num_groups=4, use_quant_conv=quant, use_post_quant_conv=quant
    )
    return AutoencoderKL(config).double()


def test_standardizing_changes_the_units_of_the_latent_and_no_reconstruction() -> None:
    vae = make()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    before = vae.posterior(images)
    pictures = vae.decode_z(before.sample(noise))
    mean = torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=torch.float64)
    deviation = torch.tensor([1.0, 0.2, 5.0, 0.7], dtype=torch.float64)
    weights = standardized(vae.state_dict(), mean, deviation)
    assert weights is not None
    vae.load_state_dict(weights)
    after = vae.posterior(images)
    shift, scale = mean.view(4, 1, 1), deviation.view(4, 1, 1)
    torch.testing.assert_close(after.mean, (before.mean - shift) / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.logvar, before.logvar - 2 * scale.log(), rtol=0, atol=1e-12)
    torch.testing.assert_close(vae.decode_z(after.sample(noise)), pictures, rtol=0, atol=1e-12)


def test_without_the_convolutions_around_the_latent_nothing_can_be_folded() -> None:
    assert standardized(make(quant=False).state_dict(), torch.zeros(4), torch.ones(4)) is None


def test_the_given_weights_are_left_alone() -> None:
    state = make().state_dict()
    copies = {name: value.clone() for name, value in state.items()}
    standardized(state, torch.ones(4), torch.full((4,), 2.0))
    assert all(torch.equal(state[name], copies[name]) for name in state)
