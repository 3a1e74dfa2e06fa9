"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config

ColorByte = Annotated[int, Field(ge=0, le=255)]


class AspectBuckets(Config):
    """Image shapes of about `image_size`² pixels; a sample goes into the nearest one."""

    step: Annotated[int, Field(ge=8)] = 64
    """Heights and widths are multiples of this many pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Largest ratio of the longer side to the shorter."""


class FieldRule(Config):
    """Condition on a field of the JSON member; a sample without the field does not pass."""

    min: float | None = None
    """A number of at least this."""
    max: float | None = None
    """A number of at most this."""
    any_of: tuple[str | int | bool, ...] | None = None
    """One of these values."""


class CLIPScoreRule(Config):
    """Captions that fit their pictures; a sample without a score does not pass."""

    scores: str
    """The JSON of `ldm clip score SHARDS --json`, in which samples are named `shard/key`."""
    min: Annotated[float, Field(ge=-1, le=1)]
    """Cosine of picture and caption, at least."""


class SampleFilter(Config):
    """Conditions on samples. Unreadable samples pass here; the loader counts them as bad."""

    min_side: Annotated[int, Field(ge=1)] | None = None
    """Shorter side of the picture, in pixels, at least."""
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    """Longer side by shorter side, at most."""
    min_caption_length: Annotated[int, Field(ge=0)] | None = None
    """Characters of the caption, at least."""
    max_caption_length: Annotated[int, Field(ge=1)] | None = None
    """Characters of the caption, at most."""
    fields: dict[str, FieldRule] = Field(default_factory=dict)
    """Rules for fields of the JSON member, by name or dotted path, such as `similarity: {min: 0.3}`."""
    clip_score: CLIPScoreRule | None = None
    """Leave out pictures whose captions do not fit, by scores measured before."""


class DataConfig(Config):
    """Which shards, which members of a sample, and how an image becomes a tensor."""

    shards: str | tuple[str, ...]
    """Training shards: a path, glob, folder, or pattern such as `data/train-{000..127}.tar`; or several."""
    remote_schemes: tuple[str, ...] = ()
    """Schemes of addresses that shards may be fetched from, such as `[https, s3]`; all others are refused. Each needs
    the fsspec back end of that name. With `stream`, `pipe` allows `pipe:COMMAND` as a shard, which runs in a shell."""
    max_fetched_bytes: Annotated[int, Field(ge=1)] = 100 * 2**30
    """Room in the cache folder for remote shards; the least recently used are removed."""
    stream: bool = False
    """Read training shards in sequence, without an index: for commands, named pipes and data sets that exceed the disk.
    The samples of a step then depend on workers, ranks and interruptions."""
    stream_buffer: Annotated[int, Field(ge=1)] = 1000
    """Samples of a stream that each reader holds, undecoded, to shuffle them."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """With several `shards`, one weight for each: steps take samples in these proportions, so that small sources repeat
    more often. By default all are one data set, and every sample comes once an epoch."""
    loss_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """With several `shards`, one number for each, by which the loss of its samples is multiplied: that of the class
    pictures of prior preservation. `train-unet` only; null: 1 for all."""
    val_shards: str | tuple[str, ...] | None = None
    """Held-out shards, for validation during training and for evaluation."""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    """Height and width of the square training image, in pixels."""
    crop: Literal["center", "random", "squash", "native"] = "center"
    """Central or random square, resized to `image_size`; `squash` takes the whole image and changes its aspect
    ratio; `native` takes a random part of `image_size` pixels a side and does not resize it, unless it has fewer."""
    aspect_buckets: AspectBuckets | None = None
    """Batches of one shape each, near the shapes of the images, in place of squares of `image_size`."""
    filter: SampleFilter | None = None
    """Use only samples that meet all of these conditions; the result is kept with the index."""
    quarantine: str | None = None
    """A `bad_samples.jsonl` of an earlier run: exclude its samples from the start."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a training image is mirrored left to right."""
    background: tuple[ColorByte, ColorByte, ColorByte] = (255, 255, 255)
    """Colour behind transparent pixels."""
    image: str | None = None
    """Extension of the member that is the picture, such as `input.jpg`; null: `jpg`, `png` or another usual one."""
    mask: str | None = None
    """Extension of the member that is the picture's mask, such as `mask.png`: the loss counts its white parts alone. A
    sample without one counts in full. `train-unet` only; null: no masks."""
    caption: str = "txt"
    """Place of the caption: a member's extension (`txt`) or a field of the JSON member (`json:caption`)."""
    label: str | None = None
    """Place of an integer class label: `cls` or `json:label`; none by default."""
    missing_caption: Literal["skip", "empty"] = "skip"
    """Skip a sample with a missing or blank caption as bad, or keep it with the empty caption."""
    shuffle_window: Annotated[int, Field(ge=1)] = 16
    """Samples are shuffled within windows of this many (shuffled) shards."""
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that decode; the order and content of batches do not depend on it."""
    worker_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without an answer of a worker after which the run stops."""
    max_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    """An image with more pixels by its header is refused before decoding."""
    max_member_bytes: Annotated[int, Field(ge=1)] = 256 * 2**20
    """A shard member larger than this is refused before it is read."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run stops when more than this fraction of the samples read (and more than 10) was bad."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """A damaged shard stops the run, or contributes the complete samples before the damage."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        count = 1 if isinstance(self.shards, str) else len(self.shards)
        for name in ("weights", "loss_weights"):
            if (numbers := getattr(self, name)) is not None and len(numbers) != count:
                raise ValueError(f"{name} has {len(numbers)} numbers, shards has {count}")
        indexed = ("weights", "loss_weights", "aspect_buckets", "filter", "quarantine")
        if self.stream and (given := [name for name in indexed if getattr(self, name) is not None]):
            raise ValueError(f"stream cannot choose samples: remove {', '.join(given)}")
        return self
