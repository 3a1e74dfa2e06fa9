"""Collate samples into a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.bad_samples import BadSample
from ldm_cli.data.sample_decoder import Sample
from ldm_cli.errors import LdmError, printable


@dataclass(frozen=True)
class Batch:
    """Samples of one step (B of them).

    Attributes:
        images: uint8 [B, 3, H, W], H = W = S without aspect buckets; [B, 0, 0, 0] without images.
        captions: B texts, empty without captions.
        labels: class indexes int64 [B], if the recipe names their place.
        keys: B names `shard/key`.
        epoch: int64 [B].
        position: int64 [B], within the epoch; with `epoch` the counter of all random numbers of a sample.
        metadata: B parsed JSON members, if requested; {} where a sample has none.
        sizes: int64 [B, 6], `picture_sizes` of the images; None without images.
        masks: uint8 [B, 1, H, W], 255 where the loss counts in full; None: everywhere.
        loss_weights: float32 [B], by which each sample's loss is multiplied; None: 1.
        moments: from a cache, in place of images: a codec's output, and the masks at its size, tensors [B, …] by name.
        condition: from a cache: an encoder's output for the captions, tensors [B, …] by name.
        tokens: of the captions, from `Task.prepare`: tensors [B, …] by name.
    """

    images: Tensor
    captions: list[str]
    labels: Tensor | None
    keys: list[str]
    epoch: Tensor
    position: Tensor
    metadata: list[dict[str, Any]] | None = None
    sizes: Tensor | None = None
    masks: Tensor | None = None
    loss_weights: Tensor | None = None
    moments: dict[str, Tensor] | None = None
    condition: dict[str, Tensor] | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def parts(self, num_parts: int) -> list[Batch]:
        """The batch as `num_parts` equal parts, in order."""
        size = len(self) // num_parts
        parts = [slice(start, start + size) for start in range(0, len(self), size)]
        return [self._with(itemgetter(rows)) for rows in parts]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each of its tensors."""
        return self._with(lambda value: change(value) if isinstance(value, Tensor) else value)

    def _with(self, change: Callable[[Any], Any]) -> Batch:
        """The batch with `change` applied to each field, or to each tensor of a field."""
        return replace(self, **{f.name: _changed(getattr(self, f.name), change) for f in fields(self)})

    def trace(self, step: int) -> Iterator[str]:
        """A line `step shard key` for each sample, to compare two runs."""
        for name in self.keys:
            shard, _, key = name.partition("/")
            yield f"{step} {printable(shard)} {printable(key)}"


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: change(tensor) for name, tensor in value.items()}
    return None if value is None else change(value)


@dataclass(frozen=True)
class Delivery:
    """A batch and the findings made on the way, or the error that prevented it. It travels between processes.

    Attributes:
        batch: None if there is an error.
        remarks: counts of repairs to captions, by kind.
        error: class, what, cause and remedy.
    """

    batch: Batch | None
    bad: list[BadSample]
    remarks: Counter[str]
    error: tuple[type[LdmError], str, str, str] | None = None


def filled(
    step: int,
    places: slice,
    epoch: Tensor,
    position: Tensor,
    find: Callable[[int, list[BadSample]], tuple[Sample, str]],
) -> Delivery:
    """The part of a step's batch in `places`.

    Args:
        epoch, position: int64 [B], of the samples.
        find: returns sample and name for the n-th of the places, and appends bad samples to the list.
    """
    samples: list[Sample] = []
    keys: list[str] = []
    bad: list[BadSample] = []
    remarks: Counter[str] = Counter()
    try:
        for number in range(len(epoch)):
            found: list[BadSample] = []
            try:
                sample, key = find(number, found)
            finally:
                bad += [replace(one, step=step, place=places.start + number) for one in found]
            samples.append(sample)
            keys.append(key)
            remarks.update(sample.remarks)
    except LdmError as error:
        return Delivery(None, bad, remarks, (type(error), error.what, error.cause, error.remedy))
    return Delivery(collate(samples, keys, epoch, position), bad, remarks)


def collate(samples: list[Sample], keys: list[str], epoch: Tensor, position: Tensor) -> Batch:
    """The batch of these samples; arguments as the attributes of `Batch`."""
    images = [sample.image for sample in samples if sample.image is not None]
    sizes = [sample.sizes for sample in samples if sample.sizes is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    masks = [sample.mask for sample in samples if sample.mask is not None]
    loss_weights = [sample.loss_weight for sample in samples if sample.loss_weight is not None]
    has_metadata = bool(samples) and samples[0].metadata is not None
    return Batch(
        images=torch.stack(images) if images else torch.empty(len(samples), 0, 0, 0, dtype=torch.uint8),
        captions=[sample.caption for sample in samples],
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
        keys=keys,
        epoch=epoch,
        position=position,
        metadata=[sample.metadata or {} for sample in samples] if has_metadata else None,
        sizes=torch.stack(sizes) if sizes else None,
        masks=torch.stack(masks) if masks else None,
        loss_weights=torch.tensor(loss_weights) if loss_weights else None,
        moments=_stacked([sample.moments for sample in samples]),
        condition=_stacked([sample.condition for sample in samples]),
    )


def _stacked(samples: list[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """The tensors of all samples, name by name; None where samples have none."""
    found = [sample for sample in samples if sample is not None]
    return {name: torch.stack([sample[name] for sample in found]) for name in found[0]} if found else None
