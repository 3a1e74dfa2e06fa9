"""What a recipe says about sampling."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ldm_cli.config import Config
from ldm_cli.core.diffusion.config import GuidanceConfig

SamplerName = Literal[
    "ddpm",
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm2",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_3m_sde",
    "unipc",
    "pndm",
    "flow_euler",
    "flow_heun",
    "lcm",
]


Pixels = Annotated[int, Field(ge=0)]
Extent = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class SizesConfig(Config):
    """Sizes that Stable Diffusion XL is conditioned on, each as [height, width] in pixels (Podell et al. 2023,
    arXiv:2307.01952, section 2.2): of a training picture that would have looked like this one."""

    original: Extent | None = None
    """Of the picture before it was resized; small ones are blurred. null: that of the picture."""
    crop: tuple[Pixels, Pixels] = (0, 0)
    """Cut off at the top and at the left; 0 for whole, centred objects."""
    target: Extent | None = None
    """Of the picture after it was resized and cut. null: that of the picture."""

    def resolved(self, height: int, width: int) -> tuple[int, ...]:
        """The six numbers of `Condition.with_sizes` for a picture of height × width."""
        return *(self.original or (height, width)), *self.crop, *(self.target or (height, width))


class PriorConfig(Config):
    """unCLIP: how its prior makes an image embedding of a prompt, and how closely a picture follows it."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    """Denoising steps of the prior."""
    scale: Annotated[float, Field(ge=0, le=1000)] = 4.0
    """Classifier-free guidance scale of the prior: 1 is the conditional model."""
    noise_level: Annotated[int, Field(ge=0, lt=1000)] = 0
    """Noise that is added to the embedding, whether it is the prior's or a picture's: the more, the freer."""


class SamplingConfig(Config):
    """Sampler, steps, guidance and size of the pictures; every field is also an option of `ldm sample`."""

    sampler: SamplerName | None = None
    """How x_0 is found; docs/samplers.md says what each is, and what it costs. null: as the scheduler in the model's
    folder does, which is `ddim` for models that `train-unet` made, of flow matching `flow_euler`."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Number of steps; `heun`, `dpm2`, `dpmpp_2s_ancestral`, `dpmpp_sde` and `flow_heun` predict twice in each."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much fresh noise: 0 none, 1 as much as the reverse process has. null: 0 for `ddim`, 1 for the ancestral and
    SDE samplers, whose deterministic siblings 0 gives; the others have no choice."""
    guidance: GuidanceConfig = GuidanceConfig()
    """How the prompt steers; a plain number is its `scale`."""
    negative: str = ""
    """Prompt that guidance steers away from; empty: the unconditional model."""
    long_prompts: bool = False
    """Encode prompts of more tokens than the text encoder takes in several chunks, instead of cutting them; `BREAK`
    begins one."""
    clip_skip: Annotated[int, Field(ge=1)] | None = None
    """Layer of CLIP's text encoder that gives the text states: 1 the last one, 2 the last but one; null: the one that
    the model was trained with."""
    timestep_spacing: Literal["leading", "linspace", "trailing", "karras", "exponential"] | None = None
    """Which timesteps are visited (Lin et al. 2023, table 2), or σ with equal steps in σ^(1/7) (Karras et al. 2022, eq.
    5) or in log σ over all of the model's range; null: as the model's scheduler says."""
    timesteps: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """A table of timesteps to visit, falling, in place of a spacing, such as those of Align Your Steps (Sabour et al.
    2024, arXiv:2404.14507); with another number of `steps` it is resampled, linearly in log σ, as they do."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Autoregressive models: logits are divided by it; below 1 probable tokens become more so, 0 takes the most
    probable."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Autoregressive models: choose among so many of the most probable tokens; null: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Autoregressive models: choose among the most probable tokens that together have this probability (Holtzman et al.
    2020, arXiv:1904.09751); 1: all."""
    prior: PriorConfig = PriorConfig()
    """unCLIP: the way from a prompt to an image embedding."""
    image_scale: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """Image prompts: their scales are multiplied by it; 0: the text alone."""
    images_per_prompt: Annotated[int, Field(ge=1)] = 4
    """Image i of a prompt has the seed `seed + i`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first image of every prompt."""
    width: Annotated[int, Field(ge=8)] | None = None
    """Image width in pixels; null: the size the model was trained at."""
    height: Annotated[int, Field(ge=8)] | None = None
    """Image height in pixels; null: the size the model was trained at."""
    sizes: SizesConfig = SizesConfig()
    """Stable Diffusion XL: sizes that the prompt comes with."""
    negative_sizes: SizesConfig | None = None
    """Stable Diffusion XL: sizes that the negative prompt comes with; null: those of `sizes`."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Most images that are denoised together on a GPU; on a CPU the image size decides. It changes pictures by no more
    than rounding, on a CPU not at all."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of weights and activations; null: bf16 on CUDA, fp32 elsewhere."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the U-Net and the autoencoder by torch.compile: minutes at the first start, seconds at later ones, then
    less time per picture. Changes pictures by rounding. auto: on CUDA, for 500 pictures or more, where a compiler is
    there."""

    @field_validator("guidance", mode="before")
    @classmethod
    def _scale_alone(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"scale": value}
        return value

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        if self.timesteps is not None and any(a <= b for a, b in pairwise(self.timesteps)):
            raise ValueError("timesteps must fall from each to the next")
        return self
