"""What a cache keeps of samples and captions: decoded as training decodes them, and encoded in its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.cache_writer import moments_files
from ldm_cli.data.config import DataConfig
from ldm_cli.data.latent_cache import DTYPES, CacheKey
from ldm_cli.data.prefetch import prefetched
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.workers import made_by_workers
from ldm_cli.errors import DivergedError
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.frozen_encoders import FrozenEncoders

NUM_AHEAD = 2
"""Chunks that each thread may be ahead of the next one."""
_NEVER = 2.0  # a draw of chance that no probability reaches


@dataclass(frozen=True)
class Pictures:
    """Consecutive samples of a shard: images uint8 [n, 3, S, S] of those that can be used, why others cannot."""

    images: Tensor
    bad: dict[int, tuple[str, str]]


@dataclass(frozen=True)
class EncodedChunk:
    """What has become of `Pictures`: a file per image, and how many samples there are, with bad ones."""

    files: list[bytes]
    bad: dict[int, tuple[str, str]]
    size: int


class Chunks:
    """The pictures of chunk n, (shard, its samples), as training sees them where nothing is left to chance."""

    def __init__(self, shards: ShardSet, config: DataConfig, chunks: list[tuple[int, range]]) -> None:
        self._chunks, self._config = chunks, config
        self._decoder = SampleDecoder(shards, config, Wanted(caption=False, label=False))

    def __call__(self, number: int) -> Pictures:
        """Read and decode chunk `number`."""
        shard, samples = self._chunks[number]
        images: list[Tensor] = []
        bad: dict[int, tuple[str, str]] = {}
        for sample in samples:
            try:
                image = self._decoder.decode(shard, sample, Draw(flip=_NEVER)).image
            except BadSampleError as error:
                bad[sample] = error.reason, error.detail
            else:
                assert image is not None
                images.append(image)
        return Pictures(torch.stack(images) if images else torch.empty(0), bad)

    def ahead(self) -> AbstractContextManager[Iterator[Pictures]]:
        """All of them in order, made by a thread or by `data.num_workers` processes."""
        numbers = range(len(self._chunks))
        if not self._config.num_workers:
            return prefetched((self(number) for number in numbers), NUM_AHEAD, alone=True)
        return closing(
            made_by_workers(
                self,
                numbers,
                num_workers=self._config.num_workers,
                num_ahead=NUM_AHEAD,
                timeout=self._config.worker_timeout,
            )
        )


class CacheEncoder:
    """The encoders of a recipe, in the batches of its training: kernels of another shape would round otherwise.

    Attributes:
        size: samples per batch.
    """

    def __init__(self, encoders: FrozenEncoders, recipe: TrainUnetRecipe, key: CacheKey) -> None:
        self._encoders, self._key, self._dtype = encoders, key, DTYPES[key.dtype]
        train = recipe.train
        elastic = train.deterministic == "elastic"
        self.size = train.chunk() if elastic else train.batch_size // train.gradient_accumulation

    def chunk(self, pictures: Pictures) -> EncodedChunk:
        """The moments of a chunk of pictures.

        Raises:
            DivergedError: some are not finite.
        """
        size = len(pictures.images) + len(pictures.bad)
        return EncodedChunk(moments_files(self._moments(pictures.images)), pictures.bad, size)

    def states(self, captions: Sequence[str]) -> Tensor:
        """Captions, at most `size` → text states [n, L, D] of the kind that is kept; errors as in `chunk`."""
        filled = [*captions, *[""] * (self.size - len(captions))]
        return self._kept(self._encoders.states(filled))[: len(captions)]

    def _moments(self, images: Tensor) -> dict[str, Tensor]:
        """Moments of images [n, 3, S, S], as they are and mirrored, as the recipe asks; each [n, C, h, w]."""
        if not len(images):
            return {}
        number = len(images)
        # A batch that is not full is filled up, so that every batch has the kernels of training.
        images = torch.cat([images, images[-1:].expand(self.size - number, -1, -1, -1)])
        moments: dict[str, Tensor] = {}
        for mirrored in self._key.flips:
            posterior = self._encoders.posterior(images.flip(-1) if mirrored else images)
            suffix = "_mirrored" if mirrored else ""
            moments |= {"mean" + suffix: posterior.mean, "logvar" + suffix: posterior.logvar}
        return {name: self._kept(tensor[:number]) for name, tensor in moments.items()}

    def _kept(self, tensor: Tensor) -> Tensor:
        """The numbers to write."""
        tensor = tensor.to("cpu", self._dtype).contiguous()
        if not bool(tensor.isfinite().all()):
            raise DivergedError(
                "an encoder gives numbers that are not finite",
                f"in {self._key.latents['train.precision']}, kept as {self._key.dtype}",
                "set train.precision=fp32 or bf16, or --dtype fp32",
            )
        return tensor
