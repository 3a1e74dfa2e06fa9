"""What a recipe says about data."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config

ColorByte = Annotated[int, Field(ge=0, le=255)]


class AspectBuckets(Config):
    """Shapes of about `image_size`² pixels, and the samples that go into each."""

    step: Annotated[int, Field(ge=8)] = 64
    """Heights and widths are multiples of this many pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Longest shape, longer side by shorter."""


class FieldRule(Config):
    """What a field of the JSON member must be; a sample without the field does not pass."""

    min: float | None = None
    """A number of at least this."""
    max: float | None = None
    """A number of at most this."""
    any_of: tuple[str | int | bool, ...] | None = None
    """One of these values."""


class SampleFilter(Config):
    """Conditions on samples. What cannot be read is not sorted out here but counted as bad when it is met."""

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


class DataConfig(Config):
    """Which shards, which members of a sample, and how an image becomes a tensor."""

    shards: str | tuple[str, ...]
    """Training shards: a path, glob, folder, or pattern such as `data/train-{000..127}.tar`; or several."""
    remote_schemes: tuple[str, ...] = ()
    """Kinds of addresses that shards may be fetched from, such as `[https, s3]`; all others are refused. Each needs the
    fsspec back end of that name. With `stream`, `pipe` allows `pipe:COMMAND` for a shard, which runs in a shell."""
    max_fetched_bytes: Annotated[int, Field(ge=1)] = 100 * 2**30
    """Room in the cache folder for remote shards; those not used for longest are removed."""
    stream: bool = False
    """Read training shards as they come, through webdataset, and do not index them: for commands, named pipes and sets
    that no disk here can hold. What a step takes then depends on workers, ranks and interruptions."""
    stream_buffer: Annotated[int, Field(ge=1)] = 1000
    """Samples of a stream that each reader holds, undecoded, to shuffle them."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """With several `shards`, one weight for each: a step takes samples of them in these proportions, and the smaller
    ones come round more often. By default all are one data set, every sample of it once an epoch."""
    val_shards: str | tuple[str, ...] | None = None
    """Held-out shards, for validation during training and for evaluation."""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    """Height and width of the square training image, in pixels."""
    crop: Literal["center", "random", "squash"] = "center"
    """Central or random square, resized to `image_size`; `squash` takes all and loses the aspect ratio."""
    aspect_buckets: AspectBuckets | None = None
    """Batches of one shape each, near the pictures' own, in place of squares of `image_size`."""
    filter: SampleFilter | None = None
    """Only samples of which all of this is true are used, found out once and kept with the index."""
    quarantine: str | None = None
    """A `bad_samples.jsonl` of an earlier run: the samples in it are left out from the start."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a training image is mirrored left to right."""
    background: tuple[ColorByte, ColorByte, ColorByte] = (255, 255, 255)
    """Colour that transparent pixels are laid over."""
    image: str | None = None
    """Which member is the picture, by its extension, such as `input.jpg`; null: `jpg`, `png` or another usual one."""
    caption: str = "txt"
    """Where the caption is: a member's extension (`txt`) or a field of a JSON member (`json:caption`)."""
    label: str | None = None
    """Where an integer class label is: `cls` or `json:label`; none by default."""
    missing_caption: Literal["skip", "empty"] = "skip"
    """A sample without a caption, or with a blank one, is skipped as bad, or kept with the empty caption."""
    shuffle_window: Annotated[int, Field(ge=1)] = 16
    """Samples are shuffled within windows of this many (shuffled) shards."""
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that decode; the order and content of batches do not depend on it."""
    worker_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without any news after which a worker that is waited for is taken to hang, and the run stops."""
    max_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    """An image whose header claims more pixels is refused before it is decoded."""
    max_member_bytes: Annotated[int, Field(ge=1)] = 256 * 2**20
    """A shard member larger than this is refused before it is read."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run stops when more than this fraction of the samples read (and more than 10) was bad."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """A damaged shard stops the run, or contributes the whole samples before the damage."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        count = 1 if isinstance(self.shards, str) else len(self.shards)
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"weights has {len(self.weights)} numbers, shards has {count}")
        indexed = ("weights", "aspect_buckets", "filter", "quarantine")
        if self.stream and (given := [name for name in indexed if getattr(self, name) is not None]):
            raise ValueError(f"stream leaves no choice of samples: remove {', '.join(given)}")
        return self
