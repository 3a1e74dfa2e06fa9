"""Read, check and decode the members of one sample as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.captions import caption_candidates, clean_caption, decode_text, field_of, parse_json, parse_label
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import CENTRE, IMAGE_EXTENSIONS, Crop, Place, decode_rgb, to_rectangle
from ldm_cli.data.masks import decode_mask
from ldm_cli.data.picture_sizes import picture_sizes
from ldm_cli.data.shards import ShardReader, ShardSet
from ldm_cli.data.tables import CAPTION_COLUMNS, column_among
from ldm_cli.data.tar_format import Member

_JSON = "json:"
_MOST_FIELDS = 12


@dataclass(frozen=True)
class Draw:
    """The random numbers of one sample, each in [0, 1), and the height and width of its image (None: the square of
    the recipe); the defaults are what evaluation uses.
    """

    across: float = 0.5
    flip: float = 1.0
    caption: float = 0.0
    shape: tuple[int, int] | None = None
    down: float = 0.5

    def place(self, crop: Crop) -> Place:
        """Where the part of a picture lies."""
        if crop == "native":
            return self.across, self.down
        return (self.across, self.across) if crop == "random" else CENTRE


@dataclass(frozen=True)
class Wanted:
    """Which parts of a sample are wanted."""

    image: bool = True
    caption: bool = True
    label: bool = True
    metadata: bool = False


@dataclass(frozen=True)
class Sample:
    """A decoded sample: image uint8 [3, S, S], caption, class index, JSON member, remarks on its text; from a cache,
    in place of the image, the moments of the image and the condition of the caption, tensors by name. `sizes` are the
    image's `picture_sizes`, `mask` uint8 [1, S, S] if the recipe names one, `loss_weight` that of its source.
    """

    image: Tensor | None
    caption: str
    label: int | None
    metadata: dict[str, Any] | None
    remarks: tuple[str, ...]
    sizes: Tensor | None = None
    moments: dict[str, Tensor] | None = None
    condition: dict[str, Tensor] | None = None
    mask: Tensor | None = None
    loss_weight: float | None = None


class Members:
    """The members of one sample.

    Args:
        read: gives the bytes of the member with an extension, or None if the sample has none.
        extensions: those of all members.
    """

    def __init__(self, read: Callable[[str], bytes | None], extensions: Collection[str]) -> None:
        self.read, self._extensions = read, extensions
        self._metadata: dict[str, Any] | None = None

    def image(self, extensions: Sequence[str]) -> bytes:
        """The bytes of the image, of the first of these extensions that there is."""
        for extension in extensions:
            data = self.read(extension)
            if data is not None:
                return data
        raise BadSampleError("missing image", f"no member .{', .'.join(extensions)}; data.image can name another")

    def metadata(self) -> dict[str, Any] | None:
        """The parsed JSON member, or None if there is none."""
        if self._metadata is None:
            data = self.read("json")
            self._metadata = None if data is None else parse_json(data)
        return self._metadata

    def field(self, place: str) -> Any:
        """The value at `json:PATH` in the JSON member; None if there is none."""
        return field_of(self.metadata() or {}, place.removeprefix(_JSON))

    def no_caption(self, place: str) -> BadSampleError:
        """The error that there is no text at `place`. It says what the sample has, and which part may be a caption."""
        fields: dict[str, Any] = {}
        with suppress(BadSampleError):  # a damaged JSON member is not what is wrong here
            fields = self.metadata() or {}
        texts = {extension: extension for extension in self._extensions if extension != place}
        texts |= {name: f"{_JSON}{name}" for name, value in fields.items() if caption_candidates(value)}
        likely = column_among(list(texts), CAPTION_COLUMNS)
        shown = f"json (fields: {', '.join(list(fields)[:_MOST_FIELDS])})" if fields else "json"
        held = ", ".join(shown if extension == "json" else extension for extension in self._extensions)
        remedy = f"take data.caption={texts[likely]}" if likely else "data.caption can name another"
        return BadSampleError("missing caption", f"no text in {place}; the sample has {held}; {remedy}")


def image_extensions(config: DataConfig) -> tuple[str, ...]:
    """Of the members that may be the picture, the preferred ones first."""
    return IMAGE_EXTENSIONS if config.image is None else (config.image.lower(),)


class MembersDecoder:
    """Decodes the members of a sample.

    Args:
        config: which members, and how images become tensors.
        wanted: parts to read; the others are None, or the empty caption.
    """

    def __init__(self, config: DataConfig, wanted: Wanted) -> None:
        self._config, self._wanted = config, wanted
        self._image_extensions = image_extensions(config)

    def extensions(self) -> set[str]:
        """The extensions of all members that may be read."""
        named = [self._config.caption] if self._wanted.caption else []
        named += [self._config.label] if self._wanted.label and self._config.label else []
        named += [_JSON] if self._wanted.metadata else []
        needed = {"json" if name.startswith(_JSON) else name for name in named}
        if not self._wanted.image:
            return needed
        return needed | {*self._image_extensions} | ({self._config.mask} if self._config.mask else set())

    def decode_members(self, members: Members, draw: Draw) -> Sample:
        """The sample with its image cropped and flipped as `draw` says.

        Raises:
            BadSampleError: it cannot be used.
            DataError, StorageError: a member cannot be read.
        """
        caption, remarks = self._caption(members, draw.caption) if self._wanted.caption else ("", ())
        label = self._label(members) if self._wanted.label and self._config.label else None
        metadata = (members.metadata() or {}) if self._wanted.metadata else None
        image = sizes = mask = None
        if self._wanted.image:
            config, data = self._config, members.image(self._image_extensions)
            shape = draw.shape or (config.image_size, config.image_size)
            picture = decode_rgb(
                data, config.background, config.max_pixels, None if config.crop == "native" else max(shape)
            )
            remarks += picture.remarks
            mirror, place = draw.flip < config.flip_probability, draw.place(config.crop)
            image = to_rectangle(picture.image, shape, config.crop, place, mirror)
            sizes = picture_sizes(picture.size, shape, config.crop, place, mirror)
            if config.mask is not None:
                mask = torch.full((1, *shape), 255, dtype=torch.uint8)
                if (found := members.read(config.mask)) is None:
                    remarks += ("no mask",)
                else:
                    mask = decode_mask(found, picture, config, shape, place, mirror)
        return Sample(image, caption, label, metadata, remarks, sizes, mask=mask)

    def _caption(self, members: Members, choice: float) -> tuple[str, tuple[str, ...]]:
        """The caption by the recipe's rule, and remarks about it."""
        texts, remarks = self._texts(members)
        if not texts and self._config.missing_caption == "skip":
            raise members.no_caption(self._config.caption)
        return self._cleaned(texts[int(choice * len(texts))] if texts else "", remarks)

    def _texts(self, members: Members) -> tuple[list[str], tuple[str, ...]]:
        """The texts that may be the caption, and remarks about them."""
        try:
            if self._config.caption.startswith(_JSON):
                return caption_candidates(members.field(self._config.caption)), ()
            data = members.read(self._config.caption)
        except BadSampleError as bad:
            if bad.reason != "damaged json" or self._config.missing_caption == "skip":
                raise
            return [], ("damaged json",)
        if data is None:
            return [], ()
        text, remarks = decode_text(data)
        return [text], remarks

    def _cleaned(self, text: str, remarks: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """The caption that a text gives, which may be empty if the recipe allows it."""
        caption, more = clean_caption(text)
        if not caption and self._config.missing_caption == "skip":
            raise BadSampleError("blank caption")
        return caption, (*remarks, *more, *(() if caption else ("empty caption",)))

    def _label(self, members: Members) -> int:
        where = self._config.label or ""
        if where.startswith(_JSON):
            return parse_label(members.field(where))
        data = members.read(where)
        return parse_label(None if data is None else decode_text(data).text.strip())


class SampleDecoder(MembersDecoder):
    """Reads samples of a shard set.

    Args:
        config, wanted: as for any `MembersDecoder`.
    """

    def __init__(self, shards: ShardSet, config: DataConfig, wanted: Wanted) -> None:
        super().__init__(config, wanted)
        self._shards = shards
        self._reader = ShardReader(shards)
        self._wanted_extensions = self.extensions()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def keep(self, shards: Collection[int]) -> None:
        """Close the files of all other shards."""
        self._reader.keep(shards)

    def decode(self, shard: int, sample: int, draw: Draw) -> Sample:
        """`decode_members` of the sample with this number in its shard. A changed shard raises DataError."""
        return self.decode_members(self._members(shard, sample), draw)

    def captions(self, shard: int, sample: int) -> list[str]:
        """Every caption that `decode` may choose for a sample; none if it is bad. Other errors are those of
        `decode`."""
        found: list[str] = []
        with suppress(BadSampleError):
            texts, remarks = self._texts(self._members(shard, sample))
            for text in texts or ("",):
                with suppress(BadSampleError):
                    found.append(self._cleaned(text, remarks)[0])
        return found

    def image_bytes(self, shard: int, sample: int) -> bytes:
        """The sample's image file; raises as `decode`."""
        return self._members(shard, sample).image(self._image_extensions)

    def _members(self, shard: int, sample: int) -> Members:
        members = self._shards.indexes[shard].sample(sample)
        limits = (self._wanted_extensions, self._config.max_member_bytes)
        return Members(_IndexedRead(self._reader, shard, members, *limits), members)


class _IndexedRead:
    """Reads members at the places of the index, all wanted ones together."""

    def __init__(
        self, reader: ShardReader, shard: int, members: dict[str, list[Member]], wanted: set[str], max_bytes: int
    ) -> None:
        self._reader, self._shard, self._wanted, self._max_bytes = reader, shard, wanted, max_bytes
        self._members: dict[str, Member] = {}
        self._data: dict[str, bytes] = {}
        for extension, found in members.items():
            if len(found) > 1:
                raise BadSampleError("duplicate members", f"{len(found)} × .{extension}")
            self._members[extension] = found[0]

    def __call__(self, extension: str) -> bytes | None:
        member = self._members.get(extension)
        if member is None:
            return None
        if member.size > self._max_bytes:
            raise BadSampleError(
                "member too large", f".{extension} of {member.size} bytes, data.max_member_bytes={self._max_bytes}"
            )
        if extension not in self._data:
            places = {
                name: place for name, place in self._members.items() if name == extension or self._joins(name, place)
            }
            self._data.update(zip(places, self._reader.read_all(self._shard, [*places.values()]), strict=True))
        return self._data[extension]

    def _joins(self, extension: str, member: Member) -> bool:
        """Whether to read this member together with the first one that is requested."""
        return extension in self._wanted and extension not in self._data and member.size <= self._max_bytes
