"""Reports on shards: `check` decodes every sample, `stats` counts and measures, `index` lists shards and sizes."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm_cli.data.bad_samples import BadSample, BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import IMAGE_EXTENSIONS, image_header
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted, image_extensions
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.tar_index import ShardIndex
from ldm_cli.errors import OutputError
from ldm_cli.reporting import Reporter
from ldm_cli.storage import storage_errors

_NUM_FREQUENT = 10
_MOST_LISTED = 20


def check(shards: ShardSet, config: DataConfig, reporter: Reporter) -> dict[str, Any]:
    """Decode every sample as training would.

    Returns:
        `ok`, `samples`, `good`, `bad` (reason to count), `bad_samples` (shard, key, reason, detail of the first),
        `bad_samples_file` (a new file with all of them, for `data.quarantine`, where there are more),
        `remarks` (conversions of captions and colours, counted), `ignored` (members passed over, by reason),
        `not_used` (members that no setting reads, by extension), `first_not_used` (one of each), `hidden` and
        `hidden_samples` (how many parts of samples look like one, by a dot in their keys, and the first),
        `damaged_shards` (path to damage).
    """
    bad: list[BadSample] = []
    remarks: Counter[str] = Counter()
    members = _MembersNotUsed(config)
    with closing(SampleDecoder(shards, config, Wanted())) as decoder:
        for shard, index, number in _each(shards, "checking samples", reporter):
            members.add(shards.name(shard, number), index.sample(number))
            try:
                remarks.update(decoder.decode(shard, number, Draw()).remarks)
            except BadSampleError as error:
                bad.append(BadSample(str(shards.paths[shard]), index.key(number), error.reason, error.detail))
    damaged = {
        str(shards.paths[shard]): str(index.damage) for shard, index in shards.indexes.held.items() if index.damage
    }
    return {
        "ok": not bad and not damaged and not members.hidden,
        "samples": shards.num_samples,
        "good": shards.num_samples - len(bad),
        "bad": dict(Counter(sample.reason for sample in bad).most_common()),
        "bad_samples": [asdict(sample) for sample in bad[:_MOST_LISTED]],
        **({"bad_samples_file": _listed(bad)} if len(bad) > _MOST_LISTED else {}),
        "remarks": dict(remarks.most_common()),
        "ignored": shards.ignored,
        "not_used": dict(members.counts.most_common()),
        "first_not_used": list(members.first.values()),
        "hidden": len(members.hidden),
        "hidden_samples": members.hidden[:_MOST_LISTED],
        "damaged_shards": damaged,
    }


def _listed(bad: Sequence[BadSample]) -> str:
    """A new temporary file with a line for each; errors as in `storage_errors`."""
    with storage_errors(Path(tempfile.gettempdir())):
        descriptor, name = tempfile.mkstemp(prefix="ldm-bad-samples-", suffix=".jsonl")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)
    return name


def _each(shards: ShardSet, title: str, reporter: Reporter) -> Iterator[tuple[int, ShardIndex, int]]:
    """Shard, its index and the number within it of each sample, with progress."""
    places = ((shard, index, n) for shard, index in enumerate(shards.indexes) for n in range(index.num_samples))
    with reporter.progress(title, shards.num_samples, unit="sample") as progress:
        for done, place in enumerate(places, start=1):
            yield place
            progress.update(done)


class _MembersNotUsed:
    """Members that no setting reads."""

    def __init__(self, config: DataConfig) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.hidden: list[str] = []
        self._images, self._is_named = image_extensions(config), config.image is not None
        named = [place for place in (config.caption, config.label, config.mask) if place]
        self._named = {"json" if place.startswith("json:") else place for place in named}

    def add(self, name: str, extensions: Collection[str]) -> None:
        """Count those of a sample, and note what looks like a sample within it: `5.jpg` with `5.txt`."""
        picture = next((extension for extension in self._images if extension in extensions), None)
        for extension in extensions:
            if extension == picture or extension in self._named:
                continue
            self.counts[extension] += 1
            self.first.setdefault(extension, f"{name}.{extension}")
            part, _, last = extension.rpartition(".")
            has_text = f"{part}.txt" in extensions or f"{part}.caption" in extensions
            if part and last in IMAGE_EXTENSIONS and has_text and not self._is_named:
                self.hidden.append(f"{name}.{part}")


def stats(shards: ShardSet, config: DataConfig, reporter: Reporter) -> dict[str, Any]:
    """Count and measure; of images only the headers are read.

    Returns:
        `shards`, `samples`, `bytes`, `extensions` (to count), `formats` (to count), `width` and `height`
        (min, median, max), `captions`: how many, `distinct`, `length` in characters (min, median, max) and
        the most `frequent` ones, `unusable` (reason to count), `ignored`.
    """
    extensions, formats, captions, unusable = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    sizes: list[tuple[int, int]] = []
    with closing(SampleDecoder(shards, config, Wanted(image=False))) as decoder:
        for shard, index, number in _each(shards, "reading samples", reporter):
            extensions.update(list(index.sample(number)))
            try:
                form, width, height = image_header(decoder.image_bytes(shard, number), config.max_pixels)
                formats[form.lower()] += 1
                sizes.append((width, height))
                captions[decoder.decode(shard, number, Draw()).caption] += 1
            except BadSampleError as error:
                unusable[error.reason] += 1
    return {
        "shards": len(shards.paths),
        "samples": shards.num_samples,
        "bytes": sum(shards.facts.stamps[::3]),
        "extensions": dict(extensions.most_common()),
        "formats": dict(formats.most_common()),
        "width": _spread([width for width, _ in sizes]),
        "height": _spread([height for _, height in sizes]),
        "captions": {
            "samples": captions.total(),
            "distinct": len(captions),
            "length": _spread([len(caption) for caption in captions.elements()]),
            "frequent": dict(captions.most_common(_NUM_FREQUENT)),
        },
        "unusable": dict(unusable.most_common()),
        "ignored": shards.ignored,
    }


def index(shards: ShardSet, sizes_file: Path | None = None) -> dict[str, Any]:
    """What the indexes of the shards say; opening the shards has made them.

    Args:
        sizes_file: where to write `sizes.json` (shard's file name to number of samples), as other loaders
            read it; None: nowhere.

    Returns:
        `shards` (path to number of samples), `samples`, `members` (by extension), `ignored`,
        `fingerprint`, `sha256` (of every byte, if the shards were hashed whole).

    Raises:
        OutputError: `sizes_file` exists or cannot be written.
    """
    if sizes_file is not None:
        sizes = {path.name: size for path, size in zip(shards.paths, shards.sizes, strict=True)}
        try:
            with sizes_file.open("x", encoding="utf-8") as file:
                file.write(json.dumps(sizes, indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write '{sizes_file}'", os.strerror(error.errno or 0)) from error
    return {
        "shards": {str(path): size for path, size in zip(shards.paths, shards.sizes, strict=True)},
        "samples": shards.num_samples,
        "members": shards.facts.members,
        "ignored": shards.ignored,
        "fingerprint": shards.fingerprint,
        "sha256": shards.sha256,
    }


def _spread(values: Sequence[int]) -> dict[str, int] | None:
    """Least, median (the lower one of two) and greatest."""
    if not values:
        return None
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "max": ordered[-1]}
