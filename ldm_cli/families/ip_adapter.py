"""Image prompt adapters (IP-Adapter): their files, and what they take of an image encoder.

The published flat layout is the state dict of the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_cli.core.image_prompt_config import HEAD_WIDTH, Kind
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.families.clip_image_encoder import IMAGE_ENCODER, CLIPImageEncoder
from ldm_cli.formats.model_folder import fitted, without_weights
from ldm_cli.formats.weight_files import named, read_tensors, write_tensors
from ldm_cli.formats.weight_values import expect_finite

IP_ADAPTER = "ip_adapter.safetensors"
"""Name of the files that `train-unet` writes."""
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


def image_features(encoder: CLIPImageEncoder, kind: Kind, images: Tensor) -> Tensor:
    """What an adapter of a kind takes of pictures uint8 [B, 3, H, W]: [B, E], of `plus` [B, L, E]."""
    return encoder.states(images) if kind == "plus" else encoder.embeddings(images)


def absent_features(encoder: CLIPImageEncoder, kind: Kind) -> Tensor:
    """What stands for no picture, one row: an embedding of zeros; of `plus` the states of a picture of zeros."""
    weight = encoder.model.visual_projection.weight
    return encoder.black_states() if kind == "plus" else weight.new_zeros(1, encoder.model.config.projection_dim)


def expect_fitting_encoder(adapter: IPAdapter, config: CLIPVisionConfig, folder: Path) -> None:
    """Raise CheckpointError unless the image encoder of a folder, so configured, gives what the adapter takes."""
    width, wanted = feature_width(config, adapter.kind), adapter.image_proj.image_dim
    if width != wanted:
        cause = f"it gives {width} numbers, and the adapter takes {wanted}"
        remedy = "name the image encoder that the adapter was trained with: --image-encoder DIR"
        raise CheckpointError(f"the image encoder in '{folder}' does not fit the adapter", cause, remedy)


def feature_width(config: CLIPVisionConfig, kind: Kind) -> int:
    """E of `image_features`."""
    return config.hidden_size if kind == "plus" else config.projection_dim
