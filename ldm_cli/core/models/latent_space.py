"""Change of the latent's units inside the autoencoder's weights, so that every reader of them agrees."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_ENCODER, _DECODER = "quant_conv", "post_quant_conv"


def standardized(vae: Mapping[str, Tensor], mean: Tensor, deviation: Tensor) -> dict[str, Tensor] | None:
    """Weights of an autoencoder with the latent z' = (z − m) / s where the given one has z; every reconstruction stays.

    Pipelines of Stable Diffusion 1 and 2 apply one `scaling_factor` and know no shift, so what differs by channel
    has to go into the 1×1 convolutions around the latent. The encoder's yields moments: μ' = (μ − m) / s and
    log σ'² = log σ² − 2 log s. With the decoder's W, b: W z + b = (W·diag(s)) z' + (b + W m).

    Args:
        vae: state dict of an AutoencoderKL.
        mean: m, [C].
        deviation: s, [C], positive.

    Returns:
        A new state dict, or None where the convolutions are missing.
    """
    names = [f"{conv}.{part}" for conv in (_ENCODER, _DECODER) for part in ("weight", "bias")]
    if any(name not in vae for name in names):
        return None
    encoder, encoder_bias, decoder, decoder_bias = (vae[name].detach().double().clone() for name in names)
    mean, deviation = mean.to(decoder_bias), deviation.to(decoder_bias)
    channels = len(mean)
    encoder[:channels] /= deviation[:, None, None, None]
    encoder_bias[:channels] = (encoder_bias[:channels] - mean) / deviation
    encoder_bias[channels:] -= 2.0 * deviation.log()
    decoder_bias += decoder[:, :, 0, 0] @ mean
    decoder *= deviation[None, :, None, None]
    new = (encoder, encoder_bias, decoder, decoder_bias)
    return {**vae, **{name: value.to(vae[name]) for name, value in zip(names, new, strict=True)}}
