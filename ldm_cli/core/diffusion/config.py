"""What a recipe says about the diffusion process and its loss; the first fields are those of a diffusers
scheduler_config.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm_cli.config import Config


class DiffusionConfig(Config):
    """Noise schedule, what the network predicts, and how the loss weighs noise levels."""

    num_train_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Number of discrete noise levels T."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    """First variance β_1."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    """Last variance β_T."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """β linear in t (Ho et al. 2020), √β linear in t (Rombach et al. 2022), or ᾱ a squared cosine (Nichol
    & Dhariwal 2021)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """The network predicts the noise ε, v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022), or x_0."""
    rescale_betas_zero_snr: bool = False
    """Shift the schedule so that the last level is pure noise (Lin et al. 2023, arXiv:2305.08891)."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Min-SNR-γ loss weights (Hang et al. 2023, arXiv:2303.09556); null: the plain mean squared error."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance that a training caption is replaced by the empty one, which classifier-free guidance needs."""

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
                "at zero signal, ε says nothing about x_0"
            )
        return self
