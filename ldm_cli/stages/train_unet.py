"""`ldm train-unet`: a text-conditional denoiser in the latent space of a trained autoencoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.diffusion.loss import diffusion_loss
from ldm_cli.core.diffusion.schedule import NoiseSchedule
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from ldm_cli.data.loader import Batch
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import RecipeError
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.pipeline_folder import our_settings
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.components import load_autoencoder, load_text_encoder
from ldm_cli.sampling.images import image_grid, save_png
from ldm_cli.sampling.pipeline import Pipeline, requests_for
from ldm_cli.stages.caption_tokens import CaptionTokens
from ldm_cli.stages.options import RunOptions
from ldm_cli.stages.train_vae import to_signed
from ldm_cli.stages.training_run import Workbench, run_training, split
from ldm_cli.training.task import Losses, in_parts

_NUM_NOISE_LEVELS = 5


def run(recipe: TrainUnetRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the denoiser of `recipe`; the result is a whole Stable Diffusion pipeline folder."""
    uses = {"vae": recipe.vae, "text_encoder": recipe.text_encoder}
    return run_training(recipe, options, reporter, lambda bench: DenoiserTask(recipe, bench), uses=uses)


class DenoiserTask:
    """Predict the noise (or v, or x_0) in noised latents, given the caption (Rombach et al. 2022, eq. 2)."""

    def __init__(self, recipe: TrainUnetRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        self.vae = load_autoencoder(Path(recipe.vae)).to(bench.device).requires_grad_(False).eval()
        self.text_encoder = load_text_encoder(Path(recipe.text_encoder)).to(bench.device).requires_grad_(False).eval()
        self.tokenizer = Tokenizer.load(Path(recipe.text_encoder))
        if recipe.train.channels_last:
            self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = fitted_config(recipe, self.vae, self.text_encoder.config.hidden_size)
        self.unet = UNet2DConditionModel(config)
        if recipe.train.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.schedule = NoiseSchedule.from_config(recipe.diffusion)
        self.modules = {"unet": self.unet}
        self.auxiliary: dict[str, torch.nn.Module] = {}
        keys = ("posterior noise", "noise", "timestep", "caption dropout")
        self._keys = {purpose: philox.key(recipe.seed, purpose) for purpose in keys}
        self._fixed_keys = {purpose: philox.key(recipe.seed, f"validation {purpose}") for purpose in keys}
        length = self.text_encoder.config.max_position_embeddings
        self._tokens = CaptionTokens(self.tokenizer, length, bench.run.warn)
        self._empty = self._encode([""])

    def losses(self, batch: Batch, num_parts: int, step: int) -> Losses:
        """The loss on equal parts of the batch; each sample has its own level, noise and dropout."""

        def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            epoch, position = part.epoch, part.position
            t = philox.integers(self._keys["timestep"], epoch, position, 1, self.schedule.num_timesteps)[:, 0]
            dropped = philox.uniform(self._keys["caption dropout"], epoch, position, 1)[:, 0]
            context = self._encode(part.captions)
            is_dropped = (dropped < self.recipe.diffusion.caption_dropout).to(self.bench.device)
            context = torch.where(is_dropped[:, None, None], self._empty, context)
            return self._denoising_error(part, context, t, self._keys).mean(), {}

        return in_parts(loss, split(batch, num_parts))

    def _denoising_error(self, batch: Batch, context: Tensor, t: Tensor, keys: dict[str, philox.Key]) -> Tensor:
        """Weighted squared error per sample, float32 [B]."""
        latents = self._latents(batch, keys["posterior noise"])
        noise = self._normal(keys["noise"], batch, latents)
        t = t.to(self.bench.device)
        noised = self.schedule.add_noise(latents, noise, t)
        output = self.unet(noised, t, context)
        return diffusion_loss(self.schedule, output, latents, noise, t, self.recipe.diffusion.snr_gamma)

    @torch.no_grad()
    def _latents(self, batch: Batch, key: philox.Key) -> Tensor:
        posterior = self.vae.encode(to_signed(batch.images, self.bench.device))
        return self.vae.to_latents(posterior.sample(self._normal(key, batch, posterior.mean))).float()

    def _normal(self, key: philox.Key, batch: Batch, like: Tensor) -> Tensor:
        return philox.normal(key, batch.epoch, batch.position, tuple(like.shape[1:])).to(like.device)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> Tensor:
        """Captions → the text tower's last hidden states, [B, L, D]."""
        ids = self._tokens(captions).to(self.bench.device)
        states: Tensor = self.text_encoder(ids).last_hidden_state
        return states

    def validate(self) -> dict[str, float]:
        """Held-out loss with fixed noise at fixed levels, the middles of equal ranges of t: mean and each."""
        sums = torch.zeros(_NUM_NOISE_LEVELS, dtype=torch.float64, device=self.bench.device)
        count = 0
        for batch in self.bench.held_out:
            context = self._encode(batch.captions)
            for level in range(_NUM_NOISE_LEVELS):
                middle = int((level + 0.5) / _NUM_NOISE_LEVELS * self.schedule.num_timesteps)
                t = torch.full((len(batch),), middle)
                sums[level] += self._denoising_error(batch, context, t, self._fixed_keys).double().sum()
            count += len(batch)
        if count == 0:
            return {}
        means = (sums / count).tolist()
        return {"val_loss": sum(means) / len(means)} | {f"val_loss/level{i}": m for i, m in enumerate(means)}

    def picture(self, folder: Path) -> None:
        """`grid.png` of the fixed prompts and seeds; `prompts.json` names them."""
        samples = self.recipe.samples
        held_out = [caption for batch in self.bench.held_out for caption in batch.captions]
        prompts = list(samples.prompts) or held_out[: samples.num_prompts]
        if not prompts:
            return
        requests = requests_for(prompts, samples.sampling)
        images = [image.pixels for image in self._pipeline().generate(requests, samples.sampling)]
        save_png(folder / "grid.png", image_grid(images, columns=min(8, len(images))))
        (folder / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            settings=our_settings(self.recipe.diffusion.to_mapping()),
        )

    def export(self, folder: Path) -> None:
        """Write the pipeline folder: this denoiser with its autoencoder and text encoder."""
        self._pipeline().save(folder)

    def restore(self, folder: Path) -> None:
        """Read the denoiser's weights of `export` back."""
        load_weights(self.unet, folder / "unet")

    def finalize(self) -> dict[str, float]:
        """Nothing is left to do."""
        return {}


def fitted_config(recipe: TrainUnetRecipe, vae: AutoencoderKL, text_width: int) -> UNet2DConditionConfig:
    """The denoiser's configuration for latents of this size, if it fits autoencoder and text encoder.

    Raises:
        RecipeError: channels or widths do not fit together.
    """
    config = recipe.unet
    problems = []
    channels = vae.config.latent_channels
    if config.in_channels != channels or config.out_channels != channels:
        problems.append(
            f"unet.in_channels={config.in_channels} and unet.out_channels={config.out_channels}, "
            f"but the latents of '{recipe.vae}' have {channels} channels"
        )
    widths = config.cross_attention_dim
    if any(width != text_width for width in ((widths,) if isinstance(widths, int) else widths)):
        problems.append(
            f"unet.cross_attention_dim={config.cross_attention_dim}, but '{recipe.text_encoder}' gives {text_width}"
        )
    if recipe.data.image_size % vae.downscale_factor:
        problems.append(f"data.image_size={recipe.data.image_size} is no multiple of {vae.downscale_factor}")
    if problems:
        raise RecipeError(
            "the parts do not fit together",
            "; ".join(problems),
            "change the recipe",
            problems=tuple(problems),
        )
    return config.model_copy(update={"sample_size": recipe.data.image_size // vae.downscale_factor})
