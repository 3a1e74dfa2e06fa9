"""The typed recipes, one per command."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel
from ldm_cli.core.codebook_config import CodebookConfig
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.image_prompt_config import ImagePromptConfig
from ldm_cli.core.lora_config import LoRAConfig
from ldm_cli.core.low_resolution_config import LowResolutionConfig
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.models.vq_model_config import VQModelConfig
from ldm_cli.core.patch_training_config import PatchTrainingConfig
from ldm_cli.core.vae_loss_config import VAELossConfig, min_image_size
from ldm_cli.data.config import DataConfig
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.cascade_recipe import CascadeRecipe
from ldm_cli.recipe.eval_section import EvalSection
from ldm_cli.recipe.image_embedding_config import ImageEmbeddingConfig
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.sample_recipe import SampleRecipe, Variant
from ldm_cli.recipe.train_recipe import SamplesConfig, StartedRecipe, TrainRecipe, known

PIXELS = "pixels"
"""In the place of an autoencoder: none."""


class TrainClipRecipe(StartedRecipe):
    """`ldm train-clip`: a contrastive image-text model from shards."""

    command: Literal["train-clip"]
    """Which command this recipe is for."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Train a vocabulary from the captions, or load one."""
    clip: CLIPConfig | None = None
    """The model; fields as in its Hugging Face config.json. null: that of `start_from`."""
    equal_captions_match: bool = False
    """Images of one batch whose captions are equal match each other's (Yang et al. 2022), instead of being negatives:
    for data whose captions repeat, such as class names. `accuracy` then counts a caption, not a pair; equal captions
    have equal features, so that the loss stays what it is."""

    @property
    def model(self) -> CLIPConfig:
        """The model's configuration, once `start_from` has been read."""
        return known(self.clip, "clip")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_start("clip")
        self._expect_plain_loss()
        if self.clip is not None and (size := self.clip.vision_config.image_size) != self.data.image_size:
            raise ValueError(f"data.image_size={self.data.image_size} is not clip.vision_config.image_size={size}")
        return self


class TrainVaeRecipe(StartedRecipe):
    """`ldm train-vae`: an image autoencoder from shards; captions are not needed."""

    command: Literal["train-vae"]
    """Which command this recipe is for."""
    start_from: Annotated[str | None, NamesModel(("vae",))] = None
    """As in every trainer; of a pipeline its autoencoder."""
    vae: AutoencoderKLConfig | None = None
    """The model, with a continuous latent; fields as in its Hugging Face config.json. null: that of `start_from`."""
    vq: VQModelConfig | None = None
    """The model, with a codebook, in place of `vae`; fields as in its Hugging Face config.json."""
    codebook: CodebookConfig = CodebookConfig()
    """With `vq`: how its codebook is learnt."""
    loss: VAELossConfig = VAELossConfig()
    """Reconstruction, KL, perceptual and adversarial terms."""

    @property
    def model(self) -> AutoencoderKLConfig | VQModelConfig:
        """The model's configuration, once `start_from` has been read."""
        return self.vq or known(self.vae, "vae or vq")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start_from is not None or self.vq is None:
            self._check_start("vae")
        self._expect_plain_loss()
        self._check_codebook()
        size, model = self.data.image_size, self.vae or self.vq
        if model is not None and size % (factor := 2 ** (len(model.block_out_channels) - 1)):
            raise ValueError(f"data.image_size={size} is no multiple of the autoencoder's factor {factor}")
        if self.train.strategy == "sharded" and self.loss.adversarial_weight > 0 and self.loss.adversarial_adaptive:
            raise ValueError("train.strategy=sharded has no whole last layer for loss.adversarial_adaptive")
        smallest = min_image_size(self.loss.discriminator_layers)
        if self.loss.adversarial_weight > 0 and size < smallest:
            raise ValueError(
                f"data.image_size={size} is too small for loss.discriminator_layers="
                f"{self.loss.discriminator_layers}, which need {smallest} px"
            )
        return self

    def _check_codebook(self) -> None:
        if self.vae is not None and self.vq is not None:
            raise ValueError("vae and vq are both given; expected one")
        if self.vae is not None and self.codebook != CodebookConfig():
            raise ValueError("codebook has no meaning with vae, which has no codebook")
        if self.vq is None:
            return
        self.codebook.expect_fitting(self.vq.num_vq_embeddings, self.vq.code_channels)
        if self.loss.kl_weight != VAELossConfig().kl_weight:
            raise ValueError("loss.kl_weight has no meaning with vq: codes have no distribution")
        if self.train.strategy == "sharded":
            raise ValueError("train.strategy=sharded has no whole codebook for vq: use replicated")


class TrainUnetRecipe(StartedRecipe):
    """`ldm train-unet`: a text-conditional denoiser in the latent space of a trained VAE."""

    command: Literal["train-unet"]
    """Which command this recipe is for."""
    vae: Annotated[str, NamesModel(("vae",))] = ""
    """The trained AutoencoderKL or VQModel (`runs/…/model`), or an AutoencoderTiny; `pixels`: none, the U-Net works on
    the pixels themselves. Empty: that of the pipeline in `start_from`."""
    text_encoder: Annotated[str, NamesModel(("text_encoder", "tokenizer"))] = ""
    """The trained CLIPModel, CLIPTextModel or, for a U-Net, T5EncoderModel, with its tokenizer (`runs/…/model`). Empty:
    that of the pipeline in `start_from`."""
    text_encoder_2: Annotated[str, NamesModel(("text_encoder_2", "tokenizer_2"))] = ""
    """Stable Diffusion XL and 3: the second text encoder, a CLIPModel or CLIPTextModelWithProjection, with its
    tokenizer. Empty: that of the pipeline in `start_from`, or none."""
    text_encoder_3: Annotated[str, NamesModel(("text_encoder_3", "tokenizer_3"))] = ""
    """Stable Diffusion 3, or a U-Net of latents with one CLIP: a T5EncoderModel beside CLIP, with its tokenizer. Empty:
    that of the pipeline in `start_from`, or none."""
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] | None = None
    """Tokens of T5, padding included; in Stable Diffusion 3 without T5 as many zeros. null: those of the pipeline in
    `start_from`; else 256, and 0 without T5."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the class labels in `data.label`, which a U-Net of pixels is conditioned on, alone or beside text; its
    `num_class_embeds` is one more, for no class. null: no classes."""
    clip_skip: Annotated[int, Field(ge=1)] | None = None
    """Layer of the CLIP text encoders that gives the text states: 1 the last one, 2 the last but one. null: that which
    the pipeline of `text_encoder` was trained with; else the last one, with two of them the last but one."""
    caption_chunks: Annotated[int, Field(ge=1, le=8)] = 1
    """Chunks of as many tokens as the text encoder takes that every caption is encoded in; longer captions are cut."""
    train_text_encoder: bool = False
    """Train the CLIP text encoder of a Stable Diffusion U-Net together with it; the model folder holds both."""
    cache: str | None = None
    """Folder that `ldm precompute` wrote for this recipe, to read latents and text states from; null computes them."""
    unet: UNet2DConditionConfig | None = None
    """The model; fields as in its Hugging Face config.json. null: that of `start_from`, or a transformer."""
    transformer: SD3Transformer2DConfig | None = None
    """Stable Diffusion 3: the model, in place of `unet`; fields as in its Hugging Face config.json."""
    patches: PatchTrainingConfig = PatchTrainingConfig()
    """Stable Diffusion 3: patches that are left out in training, or compared with the features of a CLIP."""
    low_resolution: LowResolutionConfig | None = None
    """Train a U-Net to enlarge pictures, in latents or in pixels; null: to generate them."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Noise schedule, prediction, loss weights, caption dropout. A pipeline in `start_from` gives the defaults of
    schedule and prediction."""
    image_embedding: ImageEmbeddingConfig | None = None
    """unCLIP: the U-Net also decodes CLIP's embedding of the picture. null: it is given text alone."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters of the denoiser in `start_from`, and of the text encoders, in place of the weights."""
    image_prompt: ImagePromptConfig | None = None
    """Train an image prompt adapter on the U-Net in `start_from`, in place of the weights."""
    samples: SamplesConfig = SamplesConfig()
    """Pictures generated on the way."""

    @property
    def model(self) -> UNet2DConditionConfig | SD3Transformer2DConfig:
        """The model's configuration, once `start_from` has been read."""
        return known(self.unet, "unet") if self.transformer is None else self.transformer

    @property
    def is_of_pixels(self) -> bool:
        """Whether there is no autoencoder, once `start_from` has been read."""
        return self.vae == PIXELS

    @property
    def component(self) -> str:
        """The part of the pipeline that is trained, `unet` or `transformer`, once `start_from` has been read."""
        return "unet" if isinstance(self.model, UNet2DConditionConfig) else "transformer"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.unet is not None and self.transformer is not None:
            raise ValueError("unet and transformer: one of them is trained, leave the other out")
        model, text = [] if self.transformer else ["unet"], [] if self.classes else ["text_encoder"]
        self._check_start(*model, "vae", *text, instead={"text_encoder": "classes"} if self.is_of_pixels else {})
        if self.transformer is not None and self.start_from is None:
            self._check_start("text_encoder_2")
        if self.unet is not None and self.text_encoder_2 and self.text_encoder_3:
            raise ValueError(
                "a U-Net takes text_encoder_2, a CLIP, or text_encoder_3, T5, beside text_encoder; not both"
            )
        if self.text_encoder_3 and self.max_sequence_length == 0:
            raise ValueError("max_sequence_length=0 leaves no room for text_encoder_3")
        if self.image_embedding is not None and (
            self.transformer or self.text_encoder_2 or self.text_encoder_3 or self.lora
        ):
            raise ValueError("image_embedding is for a U-Net with one text encoder, whose weights are trained")
        if self.lora is not None:
            self._check_lora(self.lora)
        if self.image_prompt is not None:
            self._check_image_prompt()
        if self.train_text_encoder:
            others = ("transformer", "text_encoder_2", "text_encoder_3", "low_resolution", "image_embedding", "lora")
            self._expect_without("train_text_encoder", *others, "image_prompt")
            if self.train.strategy == "sharded":
                raise ValueError("train_text_encoder does not work with train.strategy=sharded: use replicated")
        self._check_pixels()
        if self.low_resolution is not None:
            others = ("transformer", "cache", "classes", "lora", "image_embedding", "image_prompt")
            self._expect_without("low_resolution", *others, "data.aspect_buckets")
        return self

    def _expect_without(self, name: str, *others: str) -> None:
        if given := [other for other in others if attrgetter(other)(self)]:
            raise ValueError(f"{name} does not go with {', '.join(given)}")

    def _check_pixels(self) -> None:
        if self.is_of_pixels:
            others = ("transformer", "text_encoder_2", "text_encoder_3", "cache", "image_embedding")
            self._expect_without("vae=pixels", *others, "train_text_encoder")
            if self.diffusion.prediction_type == "flow_prediction":
                raise ValueError("vae=pixels needs another diffusion.prediction_type than flow_prediction")
        if self.classes is None:
            return
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names one class twice: a prompt could mean either")
        if self.vae and not self.is_of_pixels:
            raise ValueError("classes needs vae=pixels")
        if self.data.label is None:
            raise ValueError("classes needs data.label, the place of the labels")
        rows = None if self.unet is None else self.unet.num_class_embeds
        if self.unet is not None and rows != len(self.classes) + 1:
            raise ValueError(
                f"unet.num_class_embeds={rows}, but {len(self.classes)} classes and none need {len(self.classes) + 1}"
            )

    def _check_lora(self, lora: LoRAConfig) -> None:
        if self.start_from is None:
            raise ValueError("lora needs start_from: adapters belong to trained weights")
        if self.freeze:
            raise ValueError("lora freezes all weights: leave freeze out; a target with '!' excepts layers")
        if self.train.strategy == "sharded":
            raise ValueError("lora does not work with train.strategy=sharded: adapters are small, use replicated")
        if lora.text_encoder and self.cache is not None:
            raise ValueError("lora.text_encoder changes the text states of captions: leave cache out")
        if lora.base_precision == "bf16" and self.train.precision in ("fp32", "fp16"):
            raise ValueError("lora.base_precision=bf16 needs train.precision=bf16")

    def _check_image_prompt(self) -> None:
        if self.start_from is None:
            raise ValueError("image_prompt needs start_from: an adapter belongs to trained weights")
        if given := [name for name in ("transformer", "lora", "freeze") if getattr(self, name)]:
            raise ValueError(f"image_prompt does not go with {', '.join(given)}: the U-Net stays as it is")
        if self.train.strategy == "sharded":
            raise ValueError("image_prompt does not work with train.strategy=sharded: use replicated")


class EvalRecipe(Config):
    """`ldm eval`: metrics of trained models on shards."""

    command: Literal["eval"]
    """Which command this recipe is for."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    variant: Variant = None
    """Precision of the weights of models that are named by hub name; null: full, where there is such."""
    data: DataConfig
    """Shards to measure on (`shards`; `val_shards` is not used)."""
    eval: EvalSection
    """Models and metrics."""


Recipe = TrainRecipe | CascadeRecipe | SampleRecipe | EvalRecipe
RECIPES: dict[str, type[Recipe]] = {
    "train-clip": TrainClipRecipe,
    "train-vae": TrainVaeRecipe,
    "train-unet": TrainUnetRecipe,
    "train-ar": TrainArRecipe,
    "train-prior": TrainPriorRecipe,
    "cascade": CascadeRecipe,
    "sample": SampleRecipe,
    "eval": EvalRecipe,
}
"""By command."""
