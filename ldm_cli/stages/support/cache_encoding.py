"""Samples and captions for a cache: decoded as training decodes them, and encoded in its batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.core.codec import Codec
from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.cache_manifest import CacheKey
from ldm_cli.data.cache_writer import moments_files
from ldm_cli.data.config import DataConfig
from ldm_cli.data.latent_cache import MIRRORED, SIZES
from ldm_cli.data.picture_sizes import picture_sizes
from ldm_cli.data.prefetch import made_ahead
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import DivergedError
from ldm_cli.families.autoregressive import CodeGrid
from ldm_cli.families.clip_image_encoder import outline_image_tower
from ldm_cli.families.codec_folder import outline_codec
from ldm_cli.families.ip_adapter import num_features
from ldm_cli.formats.model_folder import outline_model
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.batch_encoder import BatchEncoder
from ldm_cli.stages.support.code_encoder import CodeEncoder
from ldm_cli.stages.support.prior_encoder import PriorBatchEncoder

CachedRecipe = TrainUnetRecipe | TrainArRecipe | TrainPriorRecipe
FrozenEncoder = BatchEncoder | CodeEncoder
_TAR_OVERHEAD = 1536  # of a sample: headers of tar and safetensors, padding
_NEVER = 2.0  # a random number above every probability


@dataclass(frozen=True)
class Pictures:
    """Consecutive samples of a shard: images uint8 [n, 3, S, S], masks uint8 [n, 1, S, S] if the recipe names some, and
    `picture_sizes` [n, 6] of the good ones, and why others are bad."""

    images: Tensor
    masks: Tensor | None
    sizes: Tensor
    bad: dict[int, tuple[str, str]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Pictures:
        """The pictures with `change` applied to images and masks; the sizes are needed on the host."""
        masks = None if self.masks is None else change(self.masks)
        return replace(self, images=change(self.images), masks=masks)


@dataclass(frozen=True)
class EncodedChunk:
    """`Pictures`, encoded: a file per image; why others are bad; how many samples there are in all."""

    files: list[bytes]
    bad: dict[int, tuple[str, str]]
    size: int


class Chunks:
    """The pictures of chunk n, (shard, its samples), as training sees them without random choices."""

    def __init__(self, shards: ShardSet, config: DataConfig, chunks: list[tuple[int, range]]) -> None:
        self._chunks, self._config = chunks, config
        self._decoder = SampleDecoder(shards, config, Wanted(caption=False, label=False))

    def __call__(self, number: int) -> Pictures:
        """Read and decode chunk `number`."""
        shard, samples = self._chunks[number]
        images: list[Tensor] = []
        masks: list[Tensor] = []
        sizes: list[Tensor] = []
        bad: dict[int, tuple[str, str]] = {}
        for sample in samples:
            try:
                found = self._decoder.decode(shard, sample, Draw(flip=_NEVER))
            except BadSampleError as error:
                bad[sample] = error.reason, error.detail
            else:
                assert found.image is not None
                assert found.sizes is not None
                images.append(found.image)
                sizes.append(found.sizes)
                masks += [] if found.mask is None else [found.mask]
        if not images:
            return Pictures(torch.empty(0), None, torch.empty(0), bad)
        return Pictures(torch.stack(images), torch.stack(masks) if masks else None, torch.stack(sizes), bad)

    def ahead(self) -> Generator[Pictures]:
        """All of them in order, made by a thread or by `data.num_workers` processes."""
        config = self._config
        numbers = range(len(self._chunks))
        return made_ahead(self, numbers, num_workers=config.num_workers, timeout=config.worker_timeout)


def open_encoder(recipe: CachedRecipe, device: torch.device, warn: Callable[[str], None]) -> FrozenEncoder:
    """The frozen models of a recipe on a device; `warn` is called once if captions are cut."""
    if isinstance(recipe, TrainPriorRecipe):
        return PriorBatchEncoder(recipe, device, warn)
    return CodeEncoder(recipe, device) if isinstance(recipe, TrainArRecipe) else BatchEncoder(recipe, device, warn)


def bytes_per_sample(recipe: CachedRecipe, key: CacheKey) -> int:
    """What a sample takes in a latents file, about."""
    side, width = recipe.data.image_size, DTYPES[key.dtype].itemsize
    if isinstance(recipe, TrainPriorRecipe):
        return width * recipe.model.embedding_dim * len(key.flips) + _TAR_OVERHEAD
    codec: Codec
    if isinstance(recipe, TrainArRecipe):
        codec = CodeGrid(outline_model(VQModel, Path(recipe.vq)))
    else:
        codec = outline_codec(Path(recipe.vae))
    moments = codec.moments(torch.empty(1, 3, side, side, device="meta")).values()
    size = sum(tensor.numel() * (width if tensor.is_floating_point() else tensor.itemsize) for tensor in moments)
    if isinstance(recipe, TrainUnetRecipe) and recipe.image_embedding is not None:
        size += width * outline_image_tower(Path(recipe.image_embedding.image_encoder)).config.projection_dim
    if recipe.data.mask is not None:
        size += width * (side // codec.factor) ** 2
    if isinstance(recipe, TrainUnetRecipe) and (prompt := recipe.image_prompt) is not None:
        size += width * num_features(outline_image_tower(Path(prompt.image_encoder)).config, prompt.kind)
    return size * len(key.flips) + _TAR_OVERHEAD


class CacheEncoder:
    """The networks of a recipe, run on batches of the size that training uses.

    Kernels are chosen by shape and round differently, so that a cache equals training bit for bit at that size alone.

    Attributes:
        size: samples per batch.
    """

    def __init__(self, encoder: FrozenEncoder, recipe: CachedRecipe, key: CacheKey) -> None:
        self._encoder, self._key, self._dtype = encoder, key, DTYPES[key.dtype]
        self._crop, self.size = recipe.data.crop, recipe.train.part_size()

    def chunk(self, pictures: Pictures) -> EncodedChunk:
        """The moments of a chunk of pictures.

        Raises:
            DivergedError: some are not finite.
        """
        size = len(pictures.images) + len(pictures.bad)
        moments = self._moments(pictures.images, pictures.masks) | self._sizes(pictures.sizes)
        return EncodedChunk(moments_files(moments), pictures.bad, size)

    def conditions(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """The fields of each caption's condition as they are kept; at most `size` captions; errors as in `chunk`."""
        encoder, filled = self._encoder, [*captions, *[""] * (self.size - len(captions))]
        assert isinstance(encoder, BatchEncoder)
        fields = self._kept(lambda: encoder.condition(filled).tensors)
        return [{name: tensor[i] for name, tensor in fields.items()} for i in range(len(captions))]

    def _moments(self, images: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
        """Moments of images [n, 3, S, S] and their masks, as they are and mirrored, as the recipe asks; each
        [n, C, h, w]."""
        if not len(images):
            return {}
        number = len(images)
        # Every batch has the size of training's: the last one is filled up.
        images = torch.cat([images, images[-1:].expand(self.size - number, -1, -1, -1)])
        moments: dict[str, Tensor] = {}
        for mirrored in self._key.flips:
            suffix = MIRRORED if mirrored else ""
            own = masks.flip(-1) if mirrored and masks is not None else masks
            seen = images.flip(-1) if mirrored else images
            encoded = self._kept(partial(self._encoder.moments, seen, own))
            moments |= {name + suffix: tensor[:number].contiguous() for name, tensor in encoded.items()}
        return moments

    def _sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        """The sizes [n, 6] of images, as they are and mirrored, as the recipe asks."""
        found: dict[str, Tensor] = {}
        for mirrored in self._key.flips if len(sizes) else ():
            rows = [
                picture_sizes((height, width), (new_height, new_width), self._crop, mirror=mirrored)
                for height, width, _, _, new_height, new_width in sizes.tolist()
            ]
            found[SIZES + MIRRORED if mirrored else SIZES] = torch.stack(rows)
        return found

    def _kept(self, encode: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The numbers to write; integers stay as they are.

        Raises:
            DivergedError: some are not finite; it names where they begin.
        """
        kept = {}
        for name, tensor in encode().items():
            kept[name] = tensor.to("cpu", self._dtype if tensor.is_floating_point() else None).contiguous()
        if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
            origin = first_nonfinite(self._encoder.networks, encode) or "the type that they are kept in"
            precision = f"in {self._key.latents.get('train.precision')}, kept as {self._key.dtype}"
            raise DivergedError(
                "an encoder gives numbers that are not finite",
                f"{precision}; the first such value is in {origin}",
                "set train.precision=fp32 or bf16, or --dtype fp32",
            )
        return kept
