"""Recipe sections of the diffusion process, its loss and its guidance.

The first fields of the process are those of a diffusers scheduler_config.json."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel

MAX_MODE_SCALE = 2.0 / (math.pi - 2.0)
"""Above it, the mapping of `mode` does not rise everywhere."""
Scale = Annotated[float, Field(ge=0, le=1000)]


class DiffusionConfig(Config):
    """Noise schedule, prediction type, and how training chooses and weighs noise levels."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=2**20)] = 1000
    """Number of discrete noise levels T."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    """First variance β_1."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    """Last variance β_T."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """β linear in t (Ho et al. 2020), √β linear in t (Rombach et al. 2022), or ᾱ a squared cosine (Nichol
    & Dhariwal 2021)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    """The network predicts the noise ε, v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022), x_0, or the velocity ε − x_0 of
    flow matching (Lipman et al. 2023), whose paths are straight lines: it has no use for the β above."""
    flow_shift: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Flow matching: above 1 moves the levels towards noise, as large images need (Esser et al. 2024, eq. 23); 3 in
    Stable Diffusion 3."""
    rescale_betas_zero_snr: bool = False
    """Shift the schedule so that the last level is pure noise (Lin et al. 2023, arXiv:2305.08891)."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Min-SNR-γ loss weights (Hang et al. 2023, arXiv:2303.09556); null: the plain mean squared error."""
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """Which noise levels training visits: all alike, or mostly those in the middle (Esser et al. 2024, section 3.1,
    arXiv:2403.03206). It is the distribution of the share u of levels with less noise."""
    logit_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """`logit_normal`: m; above 0 there is more noise."""
    logit_std: Annotated[float, Field(gt=0, le=10)] = 1.0
    """`logit_normal`: s, the width."""
    mode_scale: Annotated[float, Field(ge=-1, le=MAX_MODE_SCALE)] = 1.29
    """`mode`: s; above 0 the middle levels are visited more often, below 0 the ends; 0 is uniform."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance that a training caption is replaced by the empty one, which classifier-free guidance needs."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance, of each text encoder by itself, that zeros take the place of its results; for Stable Diffusion 3, which
    can then do without T5, and for T5 beside a CLIP. Where all are left out, the caption is the empty one. 0.464 of
    three encoders drops one caption in ten (Esser et al. 2024, appendix B.3)."""

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.flow_shift != 1.0 and self.prediction_type != "flow_prediction":
            raise ValueError(f"flow_shift={self.flow_shift} needs prediction_type flow_prediction")
        if self.rescale_betas_zero_snr and self.prediction_type == "flow_prediction":
            raise ValueError("rescale_betas_zero_snr has no use for flow_prediction, which has no betas")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
                "at zero signal, ε says nothing about x_0"
            )
        return self


class ThresholdConfig(Config):
    """Dynamic thresholding (Saharia et al. 2022, section 2.3, arXiv:2205.11487)."""

    percentile: Annotated[float, Field(gt=0, le=1)] = 0.995
    """Share of an image's values |x_0| that are kept; larger ones are clipped."""
    limit: Annotated[float, Field(gt=0)] = 1.0
    """Largest |x_0| of an image after clipping: 1 for pixels, 3 to 5 for latents of standard deviation 1."""
    max_scale: Annotated[float, Field(ge=1)] | None = None
    """An image is divided by no more than this; what is then above `limit` is cut off. With 1 all values are only cut
    off. null: no limit."""


class ProjectionConfig(Config):
    """Adaptive projected guidance, APG (Sadat et al. 2024, arXiv:2410.02416)."""

    parallel: Annotated[float, Field(ge=0, le=1)] = 0.0
    """η: share of guidance parallel to the prediction that is kept; this part saturates colours. 1 keeps all."""
    norm: Annotated[float, Field(gt=0)] | None = 15.0
    """r: largest Euclidean norm of guidance over one image; null: no limit."""
    momentum: Annotated[float, Field(gt=-1, lt=1)] = -0.5
    """β: share of the previous step's guidance that is added; negative values push away from it."""


class PerturbationConfig(Config):
    """Guidance away from the same network with some of its layers perturbed."""

    kind: Literal["attention", "layer"] = "attention"
    """`attention`: each token attends to itself only (PAG, Ahn et al. 2024, arXiv:2403.17377); `layer`: the transformer
    block is skipped (skip-layer guidance, as in Stable Diffusion 3.5)."""
    scale: Scale = 3.0
    """Guidance scale; 0 is off."""
    layers: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("mid_block",)
    """Beginnings of the names of the perturbed modules, such as `mid_block` or `down_blocks.1.attentions.0`."""


class CLIPGuidanceConfig(Config):
    """Steering by the gradient of a CLIP score (Dhariwal & Nichol 2021, algorithm 2, with CLIP as the classifier)."""

    model: Annotated[str, NamesModel()]
    """A CLIP model, such as `train-clip` writes."""
    scale: Annotated[float, Field(ge=0, le=1_000_000)] = 100.0
    """Multiplies the gradient of the cosine similarity of image and prompt; 0 is off."""


class BestOfConfig(Config):
    """The best of several candidates by a CLIP score, as DALL·E does (Ramesh et al. 2021, section 2.6)."""

    candidates: Annotated[int, Field(ge=2, le=1024)] = 8
    """How many pictures are generated for one."""
    clip: Annotated[str, NamesModel()]
    """A CLIP model, such as `train-clip` writes."""


NoiseLevel = Annotated[float, Field(ge=0)]


class GuidanceConfig(Config):
    """Guidance of the conditional prediction; a plain number in place of the section means `scale`."""

    scale: Scale = 7.5
    """Classifier-free guidance scale (Ho & Salimans 2022): 1 is the conditional model, 0 the unconditional one; both
    take one network call per step where other scales take two."""
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """φ: how far the guided prediction's deviation is brought back to the conditional one's (Lin et al. 2023, eq. 15
    and 16, arXiv:2305.08891)."""
    # Not strict: where a number may stand for the section, pydantic sees a recipe's lists as lists, not as tuples.
    interval: Annotated[tuple[NoiseLevel, NoiseLevel], Field(strict=False)] | None = None
    """Noise levels σ = √(1−ᾱ)/√ᾱ, low and high, within which guidance acts (Kynkäänniemi et al. 2024,
    arXiv:2404.07724); outside the conditional model runs alone. null: everywhere."""
    threshold: ThresholdConfig | None = None
    """Dynamic thresholding of x_0; null: off."""
    apg: ProjectionConfig | None = None
    """Adaptive projected guidance in place of the plain difference; null: off."""
    perturb: PerturbationConfig | None = None
    """Perturbed-attention or skip-layer guidance, in addition; null: off."""
    model: Annotated[str | None, NamesModel(("unet",))] = None
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507): folder of a weaker denoiser, a U-Net or a pipeline. Its
    conditional prediction takes the place of the unconditional one; null: off."""
    clip: CLIPGuidanceConfig | None = None
    """Guidance by a CLIP score; null: off."""
    best_of: BestOfConfig | None = None
    """Generate several pictures for each, and keep the one that fits the prompt best; null: off."""

    @model_validator(mode="after")
    def _check(self) -> GuidanceConfig:
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"interval: low {self.interval[0]} is above high {self.interval[1]}")
        if self.apg is not None and self.rescale > 0.0:
            raise ValueError(f"rescale={self.rescale} and apg both correct the same oversaturation; choose one")
        return self
