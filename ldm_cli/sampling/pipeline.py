"""From prompts to images: text encoder, U-Net, sampler and decoder as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from ldm_cli.core.compiling import compile_whole
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.guidance import Network, along_score, guided
from ldm_cli.core.diffusion.level import Level
from ldm_cli.core.diffusion.schedule import NoiseSchedule
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.latent_space import standardized
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.formats import pipeline_folder as layout
from ldm_cli.formats.model_folder import TRANSFORMERS_WEIGHTS, save_model, weights_sha256
from ldm_cli.formats.pipeline_folder import SchedulerSettings
from ldm_cli.reporting import Progress, Reporter, SilentReporter
from ldm_cli.sampling.components import (
    check_fit,
    load_autoencoder,
    load_text_encoder,
    load_unet,
    place,
    resolve_model,
    takes_mask,
)
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import Start, denoise
from ldm_cli.sampling.edit_input import Canvas, LatentCanvas, adain, latent_mask
from ldm_cli.sampling.fixed_rows import filled, images_per_call, latents_per_call
from ldm_cli.sampling.groups import Group, Lanes, lanes_here, rounds
from ldm_cli.sampling.guidance_models import Guides, spoilt_network
from ldm_cli.sampling.known_rows import rows_that_do
from ldm_cli.sampling.network import in_windows, keep_known_region, with_inpainting_channels
from ldm_cli.sampling.noise import initial_noise, step_noise
from ldm_cli.sampling.request import GeneratedImage, ImageRequest
from ldm_cli.sampling.sample_options import PLAIN, Extras, Look
from ldm_cli.sampling.text_states import TextStates
from ldm_cli.sampling.tiling import in_parts


@dataclass
class Pipeline:
    """A text-to-image latent diffusion model.

    Attributes:
        unet, vae, text_encoder: on one device; `unet` and `text_encoder` of one type.
        tokenizer: of the text encoder.
        settings: noise schedule, prediction type, default time spacing.
        folder: where it was loaded from, if it was.
        is_compiled: whether `unet` and `vae` are.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    settings: SchedulerSettings
    folder: Path | None = None
    is_compiled: bool = False

    @classmethod
    def load(
        cls, path: Path, device: torch.device | str = "cpu", precision: str = "fp32", *, compiled: bool = False
    ) -> Pipeline:
        """Read a Stable Diffusion folder (from anywhere), a run of `train-unet` or one of its checkpoints.

        Args:
            path: the folder.
            device: where to put the networks.
            precision: `fp32`, `bf16` or `fp16`; an autoencoder with `force_upcast` is not put in fp16.
            compiled: whether U-Net and autoencoder are compiled.

        Raises:
            InputNotFoundError: the folder or a part of it is missing.
            CheckpointError: it is of another kind, damaged, or asks for something that is not implemented.
        """
        folder = resolve_model(path)
        layout.check_index(folder)
        settings = layout.read_scheduler(folder)
        try:
            DiffusionConfig.from_mapping(settings.diffusion)
        except ValidationError as error:
            causes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise CheckpointError(f"cannot use '{folder / layout.SCHEDULER_FILE}'", "; ".join(causes)) from error
        pipeline = cls(
            unet=load_unet(folder / layout.UNET),
            vae=load_autoencoder(folder / layout.VAE),
            text_encoder=load_text_encoder(folder / layout.TEXT_ENCODER),
            tokenizer=Tokenizer.load(folder / layout.TOKENIZER),
            settings=settings,
            folder=folder,
            is_compiled=compiled,
        )
        check_fit(folder, pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
        place(device, precision, pipeline.unet, pipeline.text_encoder)
        place(device, "fp32" if precision == "fp16" and pipeline.vae.config.force_upcast else precision, pipeline.vae)
        if compiled:
            compile_whole(pipeline.unet, pipeline.vae.decoder, pipeline.vae.encoder)
        return pipeline

    def save(self, folder: Path) -> None:
        """Write a folder that `StableDiffusionPipeline.from_pretrained` opens, and `load`.

        The autoencoder's shift, unknown to that pipeline, is folded into the weights if they allow it.

        Raises:
            StorageError, OutputError: writing failed.
        """
        self.save_denoiser(folder)
        self.save_companions(folder)

    def save_denoiser(self, folder: Path) -> None:
        """Write the U-Net's part of the folder; errors as in `save`."""
        save_model(folder / layout.UNET, self.unet.state_dict(), self.unet.config.to_hugging_face())

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net's part of the folder; errors as in `save`."""
        vae_state, vae_config = self.vae.state_dict(), self.vae.config
        if vae_config.shift_factor:
            ones = torch.ones(vae_config.latent_channels)
            folded = standardized(vae_state, vae_config.shift_factor * ones, ones)
            if folded is not None:
                vae_state, vae_config = folded, vae_config.model_copy(update={"shift_factor": None})
        save_model(folder / layout.VAE, vae_state, vae_config.to_hugging_face())
        save_model(
            folder / layout.TEXT_ENCODER,
            self.text_encoder.state_dict(),
            self.text_encoder.config.to_hugging_face(),
            TRANSFORMERS_WEIGHTS,
        )
        # diffusers pads to what the tokenizer says; the text encoder takes no more than it has positions.
        self.tokenizer.model_max_length = self.context_length
        self.tokenizer.save(folder / layout.TOKENIZER)
        layout.write_scheduler(folder, self.settings)
        layout.write_index(folder, self.settings)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise levels the U-Net was trained at."""
        return NoiseSchedule.from_config(DiffusionConfig.from_mapping(self.settings.diffusion))

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Hex sha256 of each component's tensors, of a pipeline that was loaded; else empty."""
        if self.folder is None:
            return {}
        return {n: weights_sha256(self.folder / n) for n in (layout.UNET, layout.VAE, layout.TEXT_ENCODER)}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def context_length(self) -> int:
        """Tokens per prompt, both special tokens included."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """Height and width of the pictures, in pixels.

        Raises:
            UsageError: not a multiple of the autoencoder's factor, or not known.
        """
        factor, trained = self.vae.downscale_factor, self.unet.config.sample_size
        defaults = trained if isinstance(trained, tuple) else (trained, trained)
        sizes = []
        for name, asked, default in zip(("height", "width"), (config.height, config.width), defaults, strict=True):
            if asked is None and default is None:
                raise UsageError(f"no {name} given", "the model does not say its own", "give --size WxH")
            size = asked if asked is not None else (default or 0) * factor
            if size % factor:
                nearest = max(factor, round(size / factor) * factor)
                raise UsageError(f"{name} {size} is not possible", f"not a multiple of {factor}", f"take {nearest}")
            sizes.append(size)
        return sizes[0], sizes[1]

    def latent_shape(self, config: SamplingConfig) -> tuple[int, int, int]:
        """C×h×w of the latents behind one picture; errors as in `image_size`."""
        height, width = self.image_size(config)
        factor = self.vae.downscale_factor
        return self.vae.config.latent_channels, height // factor, width // factor

    def generate(
        self,
        requests: Sequence[ImageRequest],
        config: SamplingConfig,
        latents: Tensor | None = None,
        reporter: Reporter | None = None,
        extras: Extras = PLAIN,
    ) -> Iterator[GeneratedImage]:
        """Draw pictures, in the order of the requests.

        On a CPU each picture is bit for bit the same in whatever company it is drawn; on a GPU it is so up to
        rounding when `config.batch_size` differs.

        Args:
            requests: what to draw.
            config: how.
            latents: initial noise, standard normal [N, C, h, w], one per request; None: drawn from the seeds.
            reporter: hears of progress and of prompts that are cut.
            extras: what beside: a picture to work on, windows, weighted words, looks on the way.

        Raises:
            UsageError: a size or a number of steps that the model cannot do.
            ValueError: `latents` of another shape.
        """
        reporter = reporter or SilentReporter()
        shape = self.latent_shape(config)
        if latents is not None and latents.shape != (len(requests), *shape):
            raise ValueError(f"latents of shape {tuple(latents.shape)}, expected {(len(requests), *shape)}")
        self._check_task(extras)
        canvas = None if extras.canvas is None else self.prepare(extras.canvas, extras.window)
        guides = Guides.load(config.guidance, self.unet)
        texts = [*(r.prompt for r in requests), *(r.blend.prompt for r in requests if r.blend), config.negative]
        contexts = self.text_states(extras.weighted).encode(texts, reporter)

        def draw(group: Group, progress: Progress | None, go_on: Callable[[], None]) -> Tensor:
            drawn = list(requests[group.start : group.start + group.count])
            padded = drawn + [drawn[-1]] * (group.rows - group.count)
            given = None if latents is None else latents[group.start : group.start + group.count]
            noise = initial_noise(padded, shape) if given is None else filled(given, group.rows)
            show = partial(self._preview, group.count, extras)
            look = Look(progress, group.start, config.steps, extras, show, go_on)
            return self._draw(padded, config, contexts, noise, canvas, extras, guides, look)[: group.count]

        side_by_side = Lanes(lanes_here())
        with reporter.progress("sampling", len(requests), unit="image") as progress, side_by_side:
            for groups in self._rounds(len(requests), config, shape, extras):
                watched = [progress, *[None] * (len(groups) - 1)]
                x0 = torch.cat(side_by_side.run([partial(draw, g, p) for g, p in zip(groups, watched, strict=True)]))
                for index, pixels in enumerate(self.decode(x0, extras.window), start=groups[0].start):
                    shown = pixels if extras.canvas is None else extras.canvas.pasted(pixels)
                    yield GeneratedImage(index, requests[index], shown)
                progress.update(groups[0].start + len(x0))

    def text_states(self, weighted: bool = False) -> TextStates:
        """What encodes prompts, with or without weighted words."""
        return TextStates(self.text_encoder, self.tokenizer, self.context_length, weighted)

    @torch.inference_mode()
    def decode(self, latents: Tensor, window: int | None = None) -> Tensor:
        """Latents [N, C, h, w] → pictures, uint8 [N, 3, H, W] on the CPU; in windows of so many latents, if given."""
        weight, factor = next(self.vae.parameters()), self.vae.downscale_factor
        height, width = (s if window is None else min(s, window) for s in latents.shape[-2:])
        size = images_per_call(height * width * factor**2)
        images = []
        for start in range(0, len(latents), size):
            part = latents[start : start + size]
            z = self.vae.from_latents(filled(part, size).to(weight.device)).to(weight.dtype)
            image = in_parts(self.vae.decode, z, window, 1, factor)
            image = (image[: len(part)].float() / 2 + 0.5).clamp(0, 1)
            images.append((image * 255).round().to(torch.uint8).cpu())
        return torch.cat(images)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, window: int | None = None, hidden: Tensor | None = None) -> Tensor:
        """A picture → the mean of its latents, float32 [1, C, h, w].

        Args:
            pixels: uint8 [3, H, W].
            window: side, in latents, of the windows that the encoder sees; None: it sees all.
            hidden: bool [H, W], true where grey takes the picture's place.
        """
        weight = next(self.vae.parameters())
        image = pixels[None].float() / 127.5 - 1.0
        image = (image if hidden is None else image.masked_fill(hidden, 0.0)).to(weight.device, weight.dtype)
        mean = in_parts(lambda x: self.vae.encode(x).mode(), image, window, self.vae.downscale_factor, 1)
        return self.vae.to_latents(mean.float())

    def prepare(self, canvas: Canvas, window: int | None = None) -> LatentCanvas:
        """A canvas in latents, in its style."""
        latents = self.encode(canvas.pixels, window)
        if canvas.style is not None:
            latents = adain(latents, self.encode(canvas.style, window), canvas.style_strength)
        mask = masked = None
        if canvas.mask is not None:
            mask = latent_mask(canvas.mask, self.vae.downscale_factor).to(latents)
            masked = self.encode(canvas.pixels, window, canvas.mask)
        return LatentCanvas(latents, mask, masked, canvas.strength)

    @torch.inference_mode()
    def _draw(
        self,
        group: Sequence[ImageRequest],
        config: SamplingConfig,
        contexts: dict[str, Tensor],
        noise: Tensor,
        canvas: LatentCanvas | None,
        extras: Extras,
        guides: Guides,
        look: Look,
    ) -> Tensor:
        """Latents float32 [N, C, h, w] of one group of requests."""
        device, noise = self.device, noise.to(device=self.device, dtype=torch.float32)
        conditional = torch.cat([_context(r, contexts) for r in group])
        unconditional = contexts[config.negative].expand_as(conditional)
        guidance, kind = config.guidance, self.schedule.prediction_type
        network = self._network(self.unet, canvas, extras)
        weaker = None if guides.weaker is None else self._network(guides.weaker, canvas, extras)
        spoilt = None if guidance.perturb is None else spoilt_network(network, self.unet, guidance.perturb)
        model = guided(network, conditional, unconditional, guidance, kind, weaker, spoilt)
        if guidance.clip is not None and guides.clip is not None:
            score = guides.clip.of([r.prompt for r in group], partial(self._decoded, window=extras.window))
            model = along_score(model, score, guidance.clip.scale)
        model = look.at(model)
        blends = canvas is not None and canvas.mask is not None and not self.takes_mask
        if canvas is not None and blends:
            model = keep_known_region(model, canvas, noise)
        x0 = denoise(
            model,
            noise,
            self.schedule,
            self.settings,
            config,
            lambda i: step_noise(group, i, tuple(noise.shape[1:])).to(device),
            None if canvas is None else Start(canvas.latents.expand_as(noise), canvas.strength),
        )
        if canvas is not None and canvas.mask is not None and blends:
            x0 = torch.where(canvas.mask > 0, x0, canvas.latents)
        return x0

    def _decoded(self, latents: Tensor, window: int | None) -> Tensor:
        """Latents [N, C, h, w] → images in [−1, 1], of the autoencoder's type, all at once."""
        z = self.vae.from_latents(latents).to(next(self.vae.parameters()).dtype)
        return in_parts(self.vae.decode, z, window, 1, self.vae.downscale_factor)

    def _network(self, unet: UNet2DConditionModel, canvas: LatentCanvas | None, extras: Extras) -> Network:
        """A U-Net, in windows, shown the mask if it takes one."""
        dtype = next(unet.parameters()).dtype

        def network(x: Tensor, level: Level, context: Tensor) -> Tensor:
            # Timesteps stay float32: half precision cannot tell 998 from 999.
            timestep = torch.full((1,), level.t, device=x.device)
            rows = torch.cat([x.to(dtype)] * (len(context) // len(x)))
            prediction: Tensor = unet(rows, timestep, context)
            return prediction.float()

        shown: Network = network if extras.window is None else in_windows(network, extras.window)
        return with_inpainting_channels(shown, canvas) if canvas is not None and self.takes_mask else shown

    @property
    def takes_mask(self) -> bool:
        """Whether the U-Net is one for inpainting."""
        return takes_mask(self.unet, self.vae)

    def _preview(self, count: int, extras: Extras, x0: Tensor) -> None:
        if extras.on_preview is not None:
            extras.on_preview(self.decode(x0[:count], extras.window))

    def _check_task(self, extras: Extras) -> None:
        """Raise a UsageError where an inpainting model has no mask to fill."""
        if self.takes_mask and (extras.canvas is None or extras.canvas.mask is None):
            raise UsageError("this model fills masks", "no mask is given", "add --init and --mask, or --extend")

    def _rounds(
        self, total: int, config: SamplingConfig, latent_shape: tuple[int, int, int], extras: Extras
    ) -> Iterator[list[Group]]:
        """Which of `total` images are drawn together."""
        guidance, window, on_cpu = config.guidance, extras.window, self.device.type == "cpu"
        height, width = (side if window is None else min(side, window) for side in latent_shape[1:])
        size = latents_per_call(height, width) if on_cpu else config.batch_size
        # Each number of rows would be compiled.
        if not on_cpu or guidance.model or guidance.perturb or guidance.clip or window or self.is_compiled:
            return rounds(total, size, 1, lambda count: size, lambda count: 0)
        halves = {1} if guidance.scale in (0.0, 1.0) else {1, 2} if guidance.interval else {2}
        context_shape = self.context_length, self.text_encoder.config.hidden_size

        def rows(count: int, *, alone: bool = False) -> int:
            return rows_that_do(self.unet, count, size, latent_shape[1:], context_shape, halves, alone=alone)

        is_watched = extras.on_preview is not None and extras.preview_every > 0
        return rounds(total, size, 1 if is_watched else lanes_here(), rows, partial(rows, alone=True))


def _context(request: ImageRequest, contexts: dict[str, Tensor]) -> Tensor:
    """The text states of a request [1, L, D], on the line between its two prompts if it has two."""
    context, blend = contexts[request.prompt], request.blend
    return context if blend is None else torch.lerp(context, contexts[blend.prompt], blend.weight)
