"""Image prompt adapters (IP-Adapter): their files, and what they take of an image encoder.

The published flat layout is the state dict of the module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_cli.core.image_prompt_config import HEAD_WIDTH, ImagePromptConfig, Kind
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder, processor_folder
from ldm_cli.families.family import model_sha256
from ldm_cli.formats.model_folder import fitted, read_image_processor, without_weights
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER
from ldm_cli.formats.weight_files import named, read_tensors, write_tensors
from ldm_cli.formats.weight_values import expect_finite

IP_ADAPTER = "ip_adapter.safetensors"
"""Name of the files that `train-unet` writes."""
PROMPT_ENCODER = "image_prompt.image_encoder"
"""What users call the image encoder of an adapter; a decoder of image embeddings has one of its own."""
IMAGE_FEATURES = "image_features"
"""Name of `ImageFeatures` among the moments of pictures."""
_PROJECTION = "image_proj."
# Names that tell the kinds that are not implemented.
_OTHER_KINDS = {
    "perceiver_resampler.proj_in.weight": "FaceID-plus, which needs a network that recognises faces",
    "proj.3.weight": "full-face",
    "proj.2.weight": "FaceID, which needs a network that recognises faces",
}


def ip_adapter_file(path: Path) -> Path:
    """The file of an adapter that a path means: itself, or that of a folder or of a run.

    Raises:
        InputNotFoundError: there is none.
    """
    for file in (path, path / IP_ADAPTER, path / "model" / IP_ADAPTER):
        if file.is_file():
            return file
    cause = f"it holds no {IP_ADAPTER}" if path.is_dir() else "no such file, nor a folder with one"
    raise InputNotFoundError(f"no image prompt adapter in '{path}'", cause, "give its .safetensors file")


def image_encoder_beside(file: Path) -> Path:
    """The folder of the image encoder of a file, which lies beside it.

    Raises:
        InputNotFoundError: there is none.
    """
    folder = file.parent / IMAGE_ENCODER
    if not folder.is_dir():
        remedy = "name the image encoder that the adapter was trained with: --image-encoder DIR"
        raise InputNotFoundError(f"no image encoder beside '{file}'", f"there is no folder '{folder}'", remedy)
    return folder


def is_ip_adapter(names: Collection[str]) -> bool:
    """Whether a file with tensors of these names is one of an adapter."""
    return any(name.startswith(_PROJECTION) for name in names)


def read_ip_adapter(file: Path, unet: nn.Module) -> IPAdapter:
    """The adapter in a file, in float32 on the CPU.

    Args:
        file: safetensors.
        unet: the UNet2DConditionModel that it is for.

    Raises:
        CheckpointError: it holds something else, belongs to another U-Net, is of a kind that is not implemented, a
            pickle, or damaged.
        InputNotFoundError, StorageError: it cannot be read.
    """
    tensors = read_tensors(file)
    layers = cross_attentions(unet)
    with without_weights():
        adapter = IPAdapter(_projection(tensors, file), layers)
    found = fitted(adapter, tensors, file)
    expect_finite(found, file)
    # Copies: the mapped file may be replaced, and its tensors may lie at any offset.
    adapter.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in found.items()}, assign=True)
    return adapter.requires_grad_(False).eval()


def _projection(tensors: Mapping[str, Tensor], file: Path) -> ImageProjection | Resampler:
    """The module that makes tokens, of the sizes of its tensors."""
    own = {name.removeprefix(_PROJECTION): t.shape for name, t in tensors.items() if name.startswith(_PROJECTION)}
    try:
        if "proj.weight" in own:
            (width, image_dim), (dim,) = own["proj.weight"], own["norm.weight"]
            return ImageProjection(image_dim, dim, width // dim)
        if "latents" in own:
            (_, num_tokens, width), image_dim = own["latents"], own["proj_in.weight"][1]
            num_heads = own["layers.0.0.to_q.weight"][0] // HEAD_WIDTH
            return Resampler(image_dim, own["proj_out.weight"][0], num_tokens, width, num_heads)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        cause = f"its {_PROJECTION}* have no known names and shapes: {named(list(own))}"
        raise CheckpointError(f"cannot use '{file}'", cause, "download or save it again") from error
    if kind := next((kind for name, kind in _OTHER_KINDS.items() if name in own), None):
        cause = f"it is an adapter of the kind {kind}"
        raise CheckpointError(f"cannot use '{file}'", cause, "give one of the kinds base or plus")
    cause = f"it has {named(list(tensors)) or 'no tensors'}, and none of {_PROJECTION}*"
    raise CheckpointError(f"'{file}' is no image prompt adapter", cause, "give a file of IP-Adapter")


def write_ip_adapter(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the state dict of an `IPAdapter`; errors as in `write_tensors`."""
    write_tensors(file, {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()})


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What adapters of a kind take of pictures; E numbers, of `plus` E for each of L places."""

    encoder: CLIPImageEncoder
    kind: Kind

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, H, W], on the encoder's device → [B, E] or [B, L, E]."""
        if self.kind == "base":
            embeddings: Tensor = self.encoder(images)
            return embeddings
        return self._states(self.encoder.processor(images))

    def absent(self) -> Tensor:
        """What stands for no picture, [1, …]: an embedding of zeros; of `plus` the states of a picture of zeros."""
        config, weight = self.encoder.model.config, self.encoder.model.visual_projection.weight
        if self.kind == "base":
            return weight.new_zeros(1, config.projection_dim)
        return self._states(weight.new_zeros(1, config.num_channels, config.image_size, config.image_size))

    def _states(self, pixels: Tensor) -> Tensor:
        """Of prepared pixels the states before the tower's last layer, [B, L, E]."""
        pixels = pixels.to(self.encoder.model.visual_projection.weight.dtype)
        states: Tensor = self.encoder.model(pixels, output_hidden_states=True).hidden_states[-2]
        return states


def open_image_features(config: ImagePromptConfig) -> ImageFeatures:
    """The features that an adapter is trained with; errors as in `CLIPImageEncoder.load`."""
    return ImageFeatures(CLIPImageEncoder.load(Path(config.image_encoder)), config.kind)


def expect_fitting_encoder(adapter: IPAdapter, config: CLIPVisionConfig, folder: Path) -> None:
    """Raise CheckpointError unless the image encoder of a folder, so configured, gives what the adapter takes."""
    width, wanted = feature_width(config, adapter.kind), adapter.image_proj.image_dim
    if width != wanted:
        cause = f"it gives {width} numbers, and the adapter takes {wanted}"
        remedy = "name the image encoder that the adapter was trained with: --image-encoder DIR"
        raise CheckpointError(f"the image encoder in '{folder}' does not fit the adapter", cause, remedy)


def feature_width(config: CLIPVisionConfig, kind: Kind) -> int:
    """E of `ImageFeatures`."""
    return config.hidden_size if kind == "plus" else config.projection_dim


def num_features(config: CLIPVisionConfig, kind: Kind) -> int:
    """Numbers of a picture's `ImageFeatures`: E, of `plus` L · E."""
    places = 1 + (config.image_size // config.patch_size) ** 2
    return feature_width(config, kind) * (places if kind == "plus" else 1)


def image_features_key(folder: Path, kind: Kind) -> dict[str, str]:
    """What decides the `ImageFeatures` of an image encoder's folder, by names that users know."""
    processor = read_image_processor(CLIPImageProcessor.from_hugging_face, processor_folder(folder))
    return {PROMPT_ENCODER: model_sha256(folder), "image_prompt.kind": kind, "the image processor": repr(processor)}
