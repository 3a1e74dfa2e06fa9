"""unCLIP's prior (Ramesh et al. 2022, section 2.2, arXiv:2204.06125): a caption to the embedding of a picture.

By itself it is a folder that diffusers opens as `PRIOR_PIPELINE`. In the folder of a whole unCLIP model the
names of its parts begin with `prior`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.image_normalizer import ImageNormalizer
from ldm_cli.core.models.prior_transformer import PriorTransformer
from ldm_cli.core.models.prior_transformer_config import PriorTransformerConfig
from ldm_cli.core.pixels import to_bytes
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder, outline_image_tower
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, outline_tower
from ldm_cli.families.family import Family, place
from ldm_cli.families.latent_diffusion import expect_known_process
from ldm_cli.formats.clipping_scheduler import ClippingScheduler
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.pipeline_folder import (
    IMAGE_ENCODER,
    IMAGE_PROCESSOR,
    PRIOR,
    PRIOR_PIPELINE,
    PRIOR_PREFIX,
    SCHEDULER,
    SCHEDULER_FILE,
    TEXT_ENCODER,
    tokenizer_of,
    write_index,
)

EMBEDDINGS = "image_embeds"
"""Name of the embeddings of pictures among a cache's moments."""


class PriorTextEncoder(CLIPTextEncoder):
    """CLIP's text tower with projection; its conditions also hold `mask`, which hides what follows a caption."""

    def _condition(self, ids: Tensor, clip_skip: int | None) -> Condition:
        ids = ids.to(next(self.model.parameters()).device, non_blocking=True)
        end = (ids == self.tokenizer.end_id).int().argmax(dim=1, keepdim=True)
        mask = (torch.arange(ids.shape[1], device=ids.device) <= end).float()
        return replace(super()._condition(ids, clip_skip), mask=mask)


class EmbeddingCodec(nn.Module):
    """A `Codec` whose latents are embeddings [B, E] of mean 0 and deviation 1, as a prior has them."""

    factor = 1

    def __init__(self, normalizer: ImageNormalizer, image_encoder: CLIPImageEncoder | None) -> None:
        super().__init__()
        self.normalizer, self.image_encoder = normalizer, image_encoder

    @property
    def channels(self) -> int:
        """E."""
        return self.normalizer.config.embedding_dim

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """See `Codec`."""
        if self.image_encoder is None:
            raise ValueError("EmbeddingCodec.moments: there is no image encoder")
        return {EMBEDDINGS: self.image_encoder(to_bytes(images)).float()}

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """See `Codec`; they have no distribution."""
        return self.normalizer.normalised(moments[EMBEDDINGS])

    def encode(self, images: Tensor) -> Tensor:
        """See `Codec`."""
        return self.latents(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents → embeddings [B, E] as CLIP gives them."""
        return self.normalizer.restored(latents)


@dataclass(frozen=True, eq=False)
class Prior(Family):
    """A prior, and the CLIP whose embeddings it knows; `Family` as far as training needs one.

    Attributes:
        limit: largest |x_0| that sampling predicts; None: any.
    """

    denoiser: PriorTransformer
    codec: EmbeddingCodec
    encoder: PriorTextEncoder
    limit: float | None = None

    components: ClassVar[tuple[str, ...]] = (PRIOR, TEXT_ENCODER, IMAGE_ENCODER)

    @property
    def sample_size(self) -> tuple[int | None, int | None]:
        """An embedding has none."""
        return None, None

    def save_companions(self, folder: Path) -> None:
        """Write all but the transformer; errors as in `save`."""
        assert self.codec.image_encoder is not None
        self.codec.image_encoder.save(folder, IMAGE_PROCESSOR)
        self.encoder.save(folder)
        ClippingScheduler(self.settings, self.limit).write(folder / SCHEDULER, "UnCLIPScheduler")
        classes = {
            PRIOR: "PriorTransformer",
            IMAGE_ENCODER: "CLIPVisionModelWithProjection",
            TEXT_ENCODER: "CLIPTextModelWithProjection",
            tokenizer_of(TEXT_ENCODER): "CLIPTokenizer",
            SCHEDULER: "UnCLIPScheduler",
            IMAGE_PROCESSOR: "CLIPImageProcessor",
        }
        write_index(folder, PRIOR_PIPELINE, classes, {})

    def save_as_part(self, folder: Path) -> None:
        """Write the parts of a whole unCLIP's folder; errors as in `save`."""
        self.save_denoiser(folder)
        self.encoder.save(folder, PRIOR_PREFIX + TEXT_ENCODER)
        ClippingScheduler(self.settings, self.limit).write(folder / (PRIOR_PREFIX + SCHEDULER), "DDPMScheduler")


def part_classes() -> dict[str, str]:
    """The classes of what `save_as_part` writes, by subfolder."""
    text = PRIOR_PREFIX + TEXT_ENCODER
    classes = {PRIOR: "PriorTransformer", text: "CLIPTextModelWithProjection", tokenizer_of(text): "CLIPTokenizer"}
    return classes | {PRIOR_PREFIX + SCHEDULER: "DDPMScheduler"}


def open_prior(folder: Path, device: torch.device | str, precision: str, prefix: str = "") -> Prior:
    """Read the prior of a folder.

    Args:
        folder: of a prior, or of a whole unCLIP.
        precision: `fp32`, `bf16` or `fp16`.
        prefix: of its text encoder and scheduler; `PRIOR_PREFIX` in a whole unCLIP.

    Raises:
        InputNotFoundError, CheckpointError: a part is missing, damaged, or does not fit the others.
    """
    dtype, scheduler = DTYPES[precision], read_clipping_scheduler(folder / (prefix + SCHEDULER))
    model = load_model(PriorTransformer, folder / PRIOR, dtype=dtype)
    place_of_text, projecting = folder / (prefix + TEXT_ENCODER), CLIPTextModelWithProjection
    encoder = PriorTextEncoder.load(place_of_text, dtype=dtype, model_class=projecting)
    images = None if prefix else CLIPImageEncoder.load(folder / IMAGE_ENCODER, dtype)
    if found := size_problems(model.config, encoder.model.config, None if images is None else images.width):
        raise CheckpointError(f"the parts of '{folder}' do not fit", "; ".join(found))
    place(device, dtype, model, encoder.model, *([] if images is None else [images]))
    codec = EmbeddingCodec(ImageNormalizer.of(model.clip_mean, model.clip_std), images)
    return Prior(model, codec, encoder, scheduler.settings, folder, limit=scheduler.limit)


def outline_prior(folder: Path, prefix: str = "") -> dict[str, nn.Module]:
    """The models of a prior on the meta device, by subfolder; arguments and errors as in `open_prior`."""
    read_clipping_scheduler(folder / (prefix + SCHEDULER))
    model, text = outline_model(PriorTransformer, folder / PRIOR), prefix + TEXT_ENCODER
    tower = outline_tower(folder / text, CLIPTextModelWithProjection)
    images = {} if prefix else {IMAGE_ENCODER: outline_image_tower(folder / IMAGE_ENCODER)}
    width = images[IMAGE_ENCODER].config.projection_dim if images else None
    if found := size_problems(model.config, tower.config, width):
        raise CheckpointError(f"the parts of '{folder}' do not fit", "; ".join(found))
    return {PRIOR: model, text: tower, **images}


def read_clipping_scheduler(folder: Path) -> ClippingScheduler:
    """What the scheduler file in a folder says; errors as in `ClippingScheduler.read` and `expect_known_process`."""
    scheduler = ClippingScheduler.read(folder)
    expect_known_process(scheduler.settings, folder / SCHEDULER_FILE.name)
    return scheduler


def size_problems(config: PriorTransformerConfig, text: CLIPTextConfig, image_width: int | None) -> list[str]:
    """Why a prior does not fit a text tower with projection and image embeddings of a size, one text per problem."""
    size, length = config.embedding_dim, text.max_position_embeddings
    found = [
        f"prior.embedding_dim={size}, but the text tower's {name} is {value}"
        for name in ("projection_dim", "hidden_size")
        if (value := getattr(text, name)) != size
    ]
    if config.num_embeddings != length:
        found.append(f"prior.num_embeddings={config.num_embeddings}, but the text tower takes {length} tokens")
    if image_width not in (None, size):
        found.append(f"prior.embedding_dim={size}, but image embeddings have {image_width} numbers")
    return found
