"""The fields of `diffusion` that training alone takes, and no scheduler."""

from __future__ import annotations

TRAINING_FIELDS = frozenset(
    {
        *("caption_dropout", "encoder_dropout", "flow_shift", "logit_mean", "logit_std", "mode_scale", "snr_gamma"),
        "timestep_sampling",
    }
)
