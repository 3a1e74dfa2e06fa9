"""unCLIP on latents (Ramesh et al. 2022, arXiv:2204.06125; Stable unCLIP): a U-Net that decodes image embeddings.

In a whole model there is also the prior that makes embeddings of captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import Process, process_of
from ldm_cli.core.models.image_normalizer import ImageNormalizer
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder, outline_image_tower
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, outline_encoder
from ldm_cli.families.codec_folder import Autoencoder, codec_dtype, open_codec, outline_codec
from ldm_cli.families.family import place
from ldm_cli.families.latent_diffusion import LatentDiffusion, expect_fitting_parts, pipeline_of, read_settings
from ldm_cli.families.prior import Prior, open_prior, outline_prior, part_classes, read_clipping_scheduler
from ldm_cli.formats.clipping_scheduler import ClippingScheduler
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.model_source import has_model_json, weights_sha256
from ldm_cli.formats.pipeline_folder import (
    FEATURE_EXTRACTOR,
    IMAGE_ENCODER,
    IMAGE_NORMALIZER,
    PRIOR,
    PRIOR_PREFIX,
    TEXT_ENCODER,
    UNET,
    VAE,
    tokenizer_of,
)
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import CONFIG_NAME

IMAGE_NOISING = "image_noising_scheduler"
_PRIOR_TEXT = PRIOR_PREFIX + TEXT_ENCODER
_NOISING = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2"}


def our_noising() -> ClippingScheduler:
    """The noise on embeddings of a decoder that we train."""
    return ClippingScheduler.ours(_NOISING | {"prediction_type": "epsilon"})


@dataclass(frozen=True, eq=False)
class UnCLIP(LatentDiffusion):
    """A decoder of image embeddings, with a prior or without.

    `save` writes a folder that diffusers opens as a StableUnCLIPPipeline if there is a prior, and as a
    StableUnCLIPImg2ImgPipeline if there is an image encoder.

    Attributes:
        normalizer: of the embeddings, float32.
        noising: how noise is added to them.
        image_encoder: pictures to embeddings; None: variations of pictures are not possible.
        prior: captions to embeddings; None: only variations are possible.
    """

    denoiser: UNet2DConditionModel
    encoder: CLIPTextEncoder
    normalizer: ImageNormalizer = field(kw_only=True)
    noising: ClippingScheduler = field(kw_only=True, default_factory=our_noising)
    image_encoder: CLIPImageEncoder | None = field(kw_only=True, default=None)
    prior: Prior | None = field(kw_only=True, default=None)

    components: ClassVar[tuple[str, ...]] = (UNET, VAE, TEXT_ENCODER, IMAGE_NORMALIZER)
    pipelines: ClassVar[tuple[str, ...]] = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")
    absent: ClassVar[tuple[str, ...]] = ()

    @property
    def pipeline(self) -> str:
        """By whether there is a prior."""
        return self.pipelines[0] if self.prior is not None else self.pipelines[1]

    @cached_property
    def noise_process(self) -> Process:
        """The levels of the noise on embeddings."""
        return process_of(DiffusionConfig.from_mapping(self.noising.settings.diffusion))

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Of prior and image encoder as well, where there are such."""
        found = dict(super().weights_sha256)
        if self.folder is not None:
            further = [IMAGE_ENCODER] if self.image_encoder is not None else []
            further += [PRIOR, _PRIOR_TEXT] if self.prior is not None else []
            found |= {name: weights_sha256(self.folder / name) for name in further}
        return found

    @property
    def networks(self) -> dict[str, nn.Module]:
        """See `Family`; with those of the prior and the image encoder."""
        found = dict(super().networks)
        if self.image_encoder is not None:
            found[IMAGE_ENCODER] = self.image_encoder
        if self.prior is not None:
            found |= {PRIOR: self.prior.denoiser, _PRIOR_TEXT: self.prior.encoder.model}
        return found

    def with_prior(self, prior: Prior) -> UnCLIP:
        """The whole model of this decoder and a prior.

        Raises:
            CheckpointError: their embeddings differ in size.
        """
        sizes = self.normalizer.config.embedding_dim, prior.codec.channels
        if sizes[0] != sizes[1]:
            cause = f"the decoder's embeddings have {sizes[0]} numbers, the prior's {sizes[1]}"
            raise CheckpointError("prior and decoder do not fit", cause, "train both with one CLIP")
        return replace(self, prior=prior)

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`."""
        self.save_codec(folder)
        self.encoder.save(folder)
        classes = {TEXT_ENCODER: "CLIPTextModel", tokenizer_of(TEXT_ENCODER): "CLIPTokenizer"}
        save_model(folder / IMAGE_NORMALIZER, self.normalizer.state_dict(), self.normalizer.config.to_hugging_face())
        self.noising.write(folder / IMAGE_NOISING, "DDPMScheduler")
        classes |= {IMAGE_NORMALIZER: "StableUnCLIPImageNormalizer", IMAGE_NOISING: "DDPMScheduler"}
        if self.image_encoder is not None:
            self.image_encoder.save(folder)
            classes |= {IMAGE_ENCODER: "CLIPVisionModelWithProjection", FEATURE_EXTRACTOR: "CLIPImageProcessor"}
        if self.prior is not None:
            self.prior.save_as_part(folder)
            classes |= part_classes()
        self.save_index(folder, classes, **self.encoder.index_settings)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds an unCLIP pipeline on latents."""
    return pipeline_of(folder) in UnCLIP.pipelines


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> UnCLIP:
    """Read a folder; see `open_family`."""
    settings, dtype = read_settings(folder), DTYPES[precision]
    has_prior, has_images = (has_model_json(folder / name / CONFIG_NAME) for name in (PRIOR, IMAGE_ENCODER))
    normalizer = load_model(ImageNormalizer, folder / IMAGE_NORMALIZER).to(device)
    images = CLIPImageEncoder.load(folder / IMAGE_ENCODER, dtype) if has_images else None
    if images is not None:
        place(device, dtype, images)
    family = UnCLIP(
        denoiser=load_model(UNet2DConditionModel, folder / UNET, dtype=dtype),
        codec=open_codec(folder / VAE, codec_dtype(precision)),
        encoder=CLIPTextEncoder.load(folder / TEXT_ENCODER, dtype=dtype),
        settings=settings,
        folder=folder,
        is_compiled=compiled,
        normalizer=normalizer,
        noising=read_clipping_scheduler(folder / IMAGE_NOISING),
        image_encoder=images,
        prior=open_prior(folder, device, precision, PRIOR_PREFIX) if has_prior else None,
    )
    widths = {} if images is None else {IMAGE_ENCODER: images.width}
    widths |= {} if family.prior is None else {PRIOR: family.prior.codec.channels}
    _check_parts(folder, family.denoiser.config, family.codec, family.encoder, normalizer, widths)
    family.placed(device, precision)
    return family


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    read_settings(folder)
    read_clipping_scheduler(folder / IMAGE_NOISING)
    unet, vae = outline_model(UNet2DConditionModel, folder / UNET), outline_codec(folder / VAE)
    encoder = outline_encoder(folder / TEXT_ENCODER)
    normalizer = outline_model(ImageNormalizer, folder / IMAGE_NORMALIZER)
    found: dict[str, nn.Module] = {UNET: unet, VAE: vae, TEXT_ENCODER: encoder.model}
    widths: dict[str, int] = {}
    if has_model_json(folder / IMAGE_ENCODER / CONFIG_NAME):
        found[IMAGE_ENCODER] = tower = outline_image_tower(folder / IMAGE_ENCODER)
        widths[IMAGE_ENCODER] = tower.config.projection_dim
    if has_model_json(folder / PRIOR / CONFIG_NAME):
        found |= outline_prior(folder, PRIOR_PREFIX)
        config: Any = found[PRIOR].config
        widths[PRIOR] = config.embedding_dim
    _check_parts(folder, unet.config, vae, encoder, normalizer, widths)
    return found


def decoder_problems(config: UNet2DConditionConfig, width: int) -> list[str]:
    """Why a U-Net does not decode embeddings of a width, one text per problem."""
    if config.class_embed_type != "projection":
        return [f"unet.class_embed_type={config.class_embed_type}, but image embeddings need projection"]
    found = config.projection_class_embeddings_input_dim
    if found == 2 * width:
        return []
    return [
        f"unet.projection_class_embeddings_input_dim={found}, but embedding and noise level have {2 * width} numbers"
    ]


def _check_parts(
    folder: Path,
    unet: UNet2DConditionConfig,
    codec: Autoencoder,
    encoder: CLIPTextEncoder,
    normalizer: ImageNormalizer,
    widths: dict[str, int],
) -> None:
    """Make sure that the components belong together.

    Raises:
        CheckpointError: their channels, widths or vocabularies differ, or the U-Net needs conditions that none gives.
    """
    width = normalizer.config.embedding_dim
    further = [f"{IMAGE_NORMALIZER}.embedding_dim={width}, {n} gives {w}" for n, w in widths.items() if w != width]
    expect_fitting_parts(folder, unet, codec, {TEXT_ENCODER: encoder}, further + decoder_problems(unet, width))
