"""What a recipe says about data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm_cli.config import Config

ColorByte = Annotated[int, Field(ge=0, le=255)]


class DataConfig(Config):
    """Which shards, which members of a sample, and how an image becomes a tensor."""

    shards: str | tuple[str, ...]
    """Training shards: a path, glob, folder, or pattern such as `data/train-{000..127}.tar`; or several."""
    val_shards: str | tuple[str, ...] | None = None
    """Held-out shards, for validation during training and for evaluation."""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    """Height and width of the square training image, in pixels."""
    crop: Literal["center", "random", "squash"] = "center"
    """Central or random square, resized to `image_size`; `squash` takes all and loses the aspect ratio."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a training image is mirrored left to right."""
    background: tuple[ColorByte, ColorByte, ColorByte] = (255, 255, 255)
    """Colour that transparent pixels are laid over."""
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
