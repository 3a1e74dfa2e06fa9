"""The tiny autoencoder by itself; tests/parity compares it with diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.core.models.autoencoder_tiny_config import AutoencoderTinyConfig

from .weights import num_parameters


def tiny(levels: int = 4, **fields: Any) -> AutoencoderTiny:
    sides = {f"{side}_block_out_channels": (8,) * levels for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1,) * levels for side in ("encoder", "decoder")}
    return AutoencoderTiny(AutoencoderTinyConfig(**{**sides, **blocks, **fields}))


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = AutoencoderTiny(AutoencoderTinyConfig())
    assert (num_parameters(model.encoder), num_parameters(model.decoder)) == (1_222_532, 1_222_531)


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (2, 2), (4, 8)])
def test_latents_are_smaller_by_the_factor(levels: int, factor: int) -> None:
    model = tiny(levels, latent_channels=5)
    assert (model.factor, model.channels) == (factor, 5)
    moments = model.moments(torch.randn(2, 3, 3 * factor, 2 * factor))
    assert moments["z"].shape == (2, 5, 3, 2)
    assert model.decode(model.latents(moments)).shape == (2, 3, 3 * factor, 2 * factor)


def test_noise_changes_nothing_and_the_scale_multiplies_the_latents() -> None:
    model, image = tiny(2), torch.rand(1, 3, 8, 8)
    latents = model.encode(image)
    assert torch.equal(model.latents(model.moments(image), torch.randn_like(latents)), latents)
    scaled = AutoencoderTiny(model.config.model_copy(update={"scaling_factor": 0.5}))
    scaled.load_state_dict(model.state_dict())
    torch.testing.assert_close(scaled.encode(image), latents / 2)
    torch.testing.assert_close(scaled.decode(latents / 2), model.decode(latents))


def test_an_image_that_is_no_multiple_of_the_factor_is_refused() -> None:
    with pytest.raises(ValueError, match="10×8 px: not a multiple of factor=8"):
        tiny().encode(torch.zeros(1, 3, 10, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_block_out_channels": (8, 8, 8, 16)}, "expected one number, once per level"),
        ({"num_decoder_blocks": (1, 1)}, "num_decoder_blocks has 2 entries, decoder_block_out_channels 4"),
        ({"num_decoder_blocks": (1,), "decoder_block_out_channels": (8,)}, "encoder has 4 levels, the decoder 1"),
    ],
)
def test_levels_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**fields)
