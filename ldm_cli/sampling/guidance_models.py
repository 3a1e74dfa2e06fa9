"""Networks that guidance uses beside the denoiser: a weaker one, the same one perturbed, and CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import eagerly
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import GuidanceConfig, PerturbationConfig
from ldm_cli.core.diffusion.guidance import ConditionalNetwork
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.models.attention import Attention, BasicTransformerBlock
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.joint_transformer import JointTransformerBlock
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.clip_folder import open_clip
from ldm_cli.families.family import Family, ImageGenerator, place
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.hub import recorded
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.model_source import has_model_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.sampling.fixed_rows import texts_per_call


@dataclass(frozen=True)
class CLIPScore:
    """How well pictures match their prompts, with a gradient.

    Attributes:
        model: images and texts to one space.
    """

    model: CLIPModel
    tokenizer: Tokenizer
    processor: CLIPImageProcessor

    def of(self, prompts: Sequence[str], decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Cosine similarity of each picture and its prompt, as a function of latents [B, C, h, w] → [B].

        Args:
            prompts: B texts; those that are too long are cut.
            decode: latents → images in [−1, 1], [B, 3, H, W].
        """
        device, length = next(self.model.parameters()).device, self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer.encode(list(prompts), length).input_ids
        with torch.inference_mode(False), torch.no_grad():
            parts = torch.split(ids.to(device, non_blocking=True), texts_per_call(device))
            texts = torch.cat([self.model.get_text_features(part) for part in parts])

        def score(latents: Tensor) -> Tensor:
            pixels = (decode(latents).float() / 2 + 0.5).clamp(0, 1) * 255
            return F.cosine_similarity(self.model.get_image_features(self.processor(pixels)), texts)

        return score


@dataclass(frozen=True)
class GuidanceModels:
    """The further networks of a guidance; None where it asks for none.

    Attributes:
        weaker: takes the place of the unconditional prediction.
        clip: whose score is followed.
    """

    weaker: nn.Module | None = None
    clip: CLIPScore | None = None

    @classmethod
    def load(cls, folders: Mapping[str, Path], family: Family) -> GuidanceModels:
        """Read the networks in some `guidance_folders`, on the device and in the type of the denoiser.

        Raises:
            InputNotFoundError, CheckpointError: a folder is missing, or cannot be used with this denoiser.
        """
        weight = next(family.denoiser.parameters())
        weaker = clip = None
        if (folder := folders.get("model")) is not None:
            weaker = _weaker(folder, family)
            place(weight.device, weight.dtype, weaker)
        if (folder := folders.get("clip")) is not None:
            clip = CLIPScore(*open_clip(folder))
            place(weight.device, torch.float32, clip.model)
        return cls(weaker, clip)


def _weaker(folder: Path, family: Family) -> nn.Module:
    """A denoiser of the class of the family's own, which takes and gives tensors of the same shapes."""
    model_class: Any = type(family.denoiser)
    weaker: nn.Module = load_model(model_class, folder)
    for name in ("in_channels", "out_channels", "cross_attention_dim"):
        ours, theirs = (getattr(model.config, name, None) for model in (family.denoiser, weaker))
        if ours != theirs:
            cause = f"its {name} is {theirs}, the guided model's {ours}"
            raise CheckpointError(f"'{folder}' cannot guide this model", cause)
    return weaker


def guidance_folders(config: GuidanceConfig, family: ImageGenerator) -> dict[str, Path]:
    """Folder of each further network that `config` asks for beside those of `family`: `model`, `clip`,
    `best_of`.

    Raises:
        InputNotFoundError: there is no model.
    """
    folders = {}
    if config.model is not None:
        folder = resolve_model(Path(config.model))
        folders["model"] = folder / family.components[0] if has_model_json(folder / INDEX_NAME) else folder
    if config.clip is not None and config.clip.scale > 0.0:
        folders["clip"] = resolve_model(Path(config.clip.model))
    if config.best_of is not None:
        folders["best_of"] = resolve_model(Path(config.best_of.clip))
    return folders


def with_absolute_paths(config: GuidanceConfig) -> GuidanceConfig:
    """The same with absolute paths, and the names and commits of models of the hub: valid in any working directory."""
    clip = config.clip
    if clip is not None:
        clip = clip.model_copy(update={"model": recorded(Path(clip.model).absolute())})
    best_of = config.best_of
    if best_of is not None:
        best_of = best_of.model_copy(update={"clip": recorded(Path(best_of.clip).absolute())})
    model = None if config.model is None else recorded(Path(config.model).absolute())
    return config.model_copy(update={"model": model, "clip": clip, "best_of": best_of})


@contextmanager
def perturbed_layers(denoiser: nn.Module, config: PerturbationConfig) -> Iterator[None]:
    """Within the context, each token of the transformer blocks that `config` names attends to itself alone, or the
    blocks do nothing.

    Raises:
        UsageError: `config` names no block, or asks for the attention of blocks that have text tokens among the others.
    """
    kinds = BasicTransformerBlock, JointTransformerBlock
    blocks = {name: block for name, block in denoiser.named_modules() if isinstance(block, kinds)}
    chosen = [b for name, b in blocks.items() if any(name == p or name.startswith(p + ".") for p in config.layers)]
    if not chosen:
        stems = sorted({name.split(".transformer_blocks.")[0] for name in blocks})
        raise UsageError(
            f"guidance.perturb.layers {', '.join(config.layers)} name no transformer block",
            f"the denoiser has them in {', '.join(stems) or 'no place'}",
            "name one of these, or its beginning",
        )
    if config.kind == "layer":
        handles = [block.register_forward_hook(_skipped) for block in chosen]
    else:
        own = [block.attn1 for block in chosen if isinstance(block, BasicTransformerBlock) and not block.to_text_alone]
        if len(own) < len(chosen):
            remedy = "set guidance.perturb.kind to layer"
            raise UsageError("guidance.perturb.kind attention is not possible", "the denoiser attends jointly", remedy)
        handles = [attention.register_forward_hook(_own_value) for attention in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def perturbed_network(
    network: ConditionalNetwork, denoiser: nn.Module, config: PerturbationConfig
) -> ConditionalNetwork:
    """`network`, which runs `denoiser`, with layers of that one perturbed; errors as in `perturbed_layers`."""

    def perturbed(x: Tensor, level: Level, condition: Condition) -> Tensor:
        # Code that was compiled without hooks is run without them.
        with perturbed_layers(denoiser, config), eagerly():
            return network(x, level, condition)

    return perturbed


def _skipped(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return inputs[:2] if isinstance(block, JointTransformerBlock) else inputs[0]


def _own_value(attention: Attention, inputs: tuple[Any, ...], output: Tensor) -> Any:
    """Self-attention with the identity for a map (Ahn et al. 2024, eq. 15)."""
    return attention.to_out[0](attention.to_v(inputs[0]))
