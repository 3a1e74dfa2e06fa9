"""The typed recipe of `ldm sample`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel
from ldm_cli.pictures.job import PromptEntry
from ldm_cli.pictures.prompt_adapters import EmbeddingEntry, ImagePromptEntry, LoraEntry
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.upscale_config import UpscaleConfig

Variant = Literal["fp16", "bf16"] | None


class SampleRecipe(Config):
    """`ldm sample`: pictures from prompts."""

    command: Literal["sample"]
    """Which command this recipe is for."""
    model: Annotated[str, NamesModel()] = ""
    """A pipeline, a run or a checkpoint of `train-unet`: by its folder, or by its name on the hub. Empty: `upscale`
    enlarges the picture in `edit.image`."""
    variant: Variant = None
    """Precision of the weights of models that are named by hub name; null: full, where there is such."""
    prompts: tuple[str | PromptEntry, ...] = ()
    """Prompts, one entry each, as text or with settings of its own; `--prompts FILE` and `-p` come on top."""
    weighted_words: bool = True
    """Whether `(word:1.3)` in a prompt is a weight, or text like all else."""
    loras: tuple[LoraEntry, ...] = ()
    """Adapters: LoRA, LoHa, LoKr, DoRA. `<lora:NAME:WEIGHT>` in a prompt adds to the weight in its pictures."""
    lora_dir: str | None = None
    """Folder of further adapters that prompts may name; null: none."""
    embeddings: tuple[EmbeddingEntry, ...] = ()
    """Embeddings of textual inversion, each under a word for prompts."""
    image_prompts: tuple[ImagePromptEntry, ...] = ()
    """Pictures that prompt beside the text; `sampling.image_scale` scales all of them."""
    wildcards: str | None = None
    """Folder of word lists: `__color__` in a prompt becomes a line of `color.txt`, by the seed; null: it is text."""
    out: str | None = None
    """Folder for the pictures; null: `samples/PROMPT-HASH`, a folder of its own for every job."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampler, steps, guidance, size."""
    edit: EditConfig = EditConfig()
    """A picture to work on."""
    upscale: UpscaleConfig | None = None
    """Enlarge the pictures by a second model; null: leave them as they are."""
    variation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Above 0, all images of a prompt resemble the first: this is how far each leans towards its own seed."""
    interpolate: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Pictures from each prompt to the next, as a strip and an animation; 0: none."""
    xy: Annotated[tuple[str, ...], Field(max_length=2)] = ()
    """One or two of `field=a,b,c`: a labelled grid with a picture for each value, or pair of values."""
    tile: Annotated[int, Field(ge=16)] | None = None
    """Side in pixels of the windows in which larger pictures are denoised, decoded and encoded; null: all at once."""
    format: Literal["png", "jpg", "webp"] = "png"
    """Of the pictures; only PNG keeps every pixel as it was generated."""
    metadata: bool = True
    """Whether pictures say how they were generated: for web UIs, and for `ldm sample --repeat`."""
    preview_every: Annotated[int, Field(ge=0)] = 0
    """Predictions after which `preview.png` shows the unfinished pictures again; some samplers predict twice per step.
    0: never."""
    preview_vae: Annotated[str | None, NamesModel(("vae",))] = None
    """An autoencoder of the same latents that decodes previews, such as an AutoencoderTiny, which takes a
    fraction of the time; null: the model's own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model and self.upscale is None:
            raise ValueError("model is missing: name one, or upscale alone with edit.image")
        if not self.model and self.edit.image is None:
            raise ValueError("upscale without a model enlarges a picture, and edit.image is null")
        if not self.model and self.upscale is not None and self.upscale.sampling != SamplingConfig():
            raise ValueError("upscale.sampling is for what a model generates; for a photo set sampling")
        return self
