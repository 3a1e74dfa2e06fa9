"""What guidance asks besides the U-Net: a weaker one, the same one with spoilt layers, and CLIP's opinion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import eagerly
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.diffusion.config import GuidanceConfig, PerturbationConfig
from ldm_cli.core.diffusion.guidance import Network
from ldm_cli.core.diffusion.level import Level
from ldm_cli.core.models.attention import Attention, BasicTransformerBlock
from ldm_cli.core.models.clip import CLIPModel, normalize_images
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.formats.model_folder import load_model, weights_sha256
from ldm_cli.formats.pipeline_folder import INDEX_NAME, UNET
from ldm_cli.sampling.components import load_unet, resolve_model


@dataclass(frozen=True)
class CLIPScore:
    """How well pictures show their prompts, with a gradient.

    Attributes:
        model: images and texts to one space.
        tokenizer: of its texts.
    """

    model: CLIPModel
    tokenizer: Tokenizer

    def of(self, prompts: Sequence[str], decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Cosine similarity of each picture and its prompt, as a function of latents [B, C, h, w] → [B].

        Args:
            prompts: B texts; what one has too much is cut off.
            decode: latents → images in [−1, 1], [B, 3, H, W].
        """
        config = self.model.config
        size, device = config.vision_config.image_size, next(self.model.parameters()).device
        ids = self.tokenizer.encode(list(prompts), config.text_config.max_position_embeddings).input_ids
        with torch.inference_mode(False), torch.no_grad():
            # One by one: a text's features must not depend on the others (see fixed_rows).
            texts = torch.cat([self.model.get_text_features(row[None].to(device)) for row in ids])

        def score(latents: Tensor) -> Tensor:
            pixels = (decode(latents).float() / 2 + 0.5).clamp(0, 1) * 255
            if pixels.shape[-2:] != (size, size):
                pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
            return F.cosine_similarity(self.model.get_image_features(normalize_images(pixels)), texts)

        return score


@dataclass(frozen=True)
class Guides:
    """The further networks of a guidance; None where it asks for none.

    Attributes:
        weaker: takes the place of the unconditional prediction.
        clip: whose score is followed.
    """

    weaker: UNet2DConditionModel | None = None
    clip: CLIPScore | None = None

    @classmethod
    def load(cls, config: GuidanceConfig, unet: UNet2DConditionModel) -> Guides:
        """Read what `config` names, in the place and type of the U-Net.

        Raises:
            InputNotFoundError, CheckpointError: a folder is missing, or cannot be used with this U-Net.
        """
        weight, folders = next(unet.parameters()), guide_folders(config)
        weaker = clip = None
        if (folder := folders.get("model")) is not None:
            weaker = load_unet(folder)
            for name in ("in_channels", "out_channels", "cross_attention_dim"):
                ours, theirs = getattr(unet.config, name), getattr(weaker.config, name)
                if ours != theirs:
                    cause = f"its {name} is {theirs}, the guided model's {ours}"
                    raise CheckpointError(f"'{folder}' cannot guide this model", cause)
            tune_for_cpu(weaker.to(weight).requires_grad_(False).eval())
        if (folder := folders.get("clip")) is not None:
            model = load_model(CLIPModel, folder).to(weight.device).requires_grad_(False).eval()
            tune_for_cpu(model)
            clip = CLIPScore(model, Tokenizer.load(folder))
        return cls(weaker, clip)


def guide_folders(config: GuidanceConfig) -> dict[str, Path]:
    """Folder of the weights of each further network that `config` asks for: `model`, `clip`.

    Raises:
        InputNotFoundError: there is no model.
    """
    folders = {}
    if config.model is not None:
        folder = resolve_model(Path(config.model))
        folders["model"] = folder / UNET if (folder / INDEX_NAME).is_file() else folder
    if config.clip is not None and config.clip.scale > 0.0:
        folders["clip"] = resolve_model(Path(config.clip.model))
    return folders


def guide_hashes(config: GuidanceConfig) -> dict[str, str]:
    """Hex sha256 of the weights in each of `guide_folders`; errors as there."""
    return {name: weights_sha256(folder) for name, folder in guide_folders(config).items()}


def with_absolute_paths(config: GuidanceConfig) -> GuidanceConfig:
    """The same, in the words of any working directory."""
    clip = config.clip
    if clip is not None:
        clip = clip.model_copy(update={"model": str(Path(clip.model).absolute())})
    model = None if config.model is None else str(Path(config.model).absolute())
    return config.model_copy(update={"model": model, "clip": clip})


@contextmanager
def spoilt_layers(unet: nn.Module, config: PerturbationConfig) -> Iterator[None]:
    """Within, the transformer blocks that `config` names attend to nothing but themselves, or do nothing.

    Raises:
        UsageError: it names none.
    """
    blocks = {name: block for name, block in unet.named_modules() if isinstance(block, BasicTransformerBlock)}
    chosen = [b for name, b in blocks.items() if any(name == p or name.startswith(p + ".") for p in config.layers)]
    if not chosen:
        stems = sorted({name.split(".transformer_blocks")[0] for name in blocks})
        raise UsageError(
            f"guidance.perturb.layers {', '.join(config.layers)} name no transformer block",
            f"the U-Net has them in {', '.join(stems) or 'no place'}",
            "name one of these, or its beginning",
        )
    if config.kind == "layer":
        handles = [block.register_forward_hook(_left_out) for block in chosen]
    else:
        handles = [block.attn1.register_forward_hook(_own_value) for block in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spoilt_network(network: Network, unet: nn.Module, config: PerturbationConfig) -> Network:
    """`network`, which runs `unet`, with that one's layers spoilt; errors as in `spoilt_layers`."""

    def spoilt(x: Tensor, level: Level, context: Tensor) -> Tensor:
        # Code that was compiled without hooks is run without them.
        with spoilt_layers(unet, config), eagerly():
            return network(x, level, context)

    return spoilt


def _left_out(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Any:
    return inputs[0]


def _own_value(attention: Attention, inputs: tuple[Any, ...], output: Tensor) -> Any:
    """Self-attention with the identity for a map (Ahn et al. 2024, eq. 15)."""
    return attention.to_out[0](attention.to_v(inputs[0]))
