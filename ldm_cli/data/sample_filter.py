"""Which samples filters, quarantine and aspect buckets leave, found in one pass before the first step.

Sizes, captions and JSON are read once per shard, and kept beside its table; so is the choice, for all processes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError, read_bad_samples
from ldm_cli.data.buckets import nearest_shapes, shapes_of
from ldm_cli.data.captions import field_of
from ldm_cli.data.choice import Choice, ShardChoice, choice_file
from ldm_cli.data.columns import read_columns, write_columns
from ldm_cli.data.config import CLIPScoreRule, DataConfig, FieldRule, SampleFilter
from ldm_cli.data.decode import image_header
from ldm_cli.data.index_cache import cache_folder
from ldm_cli.data.prefetch import made_ahead
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.inputs import read_input
from ldm_cli.reporting import Reporter

_VERSION = 3
_NAME_BYTES = 16
_MOST_BYTES = 2**30


def choose_samples(shards: ShardSet, config: DataConfig, reporter: Reporter) -> ShardSet:
    """The samples that pass `config.filter` and `config.quarantine`, divided into buckets if `config` has some.

    Raises:
        InputNotFoundError: no samples remain, or there is no such file of scores or for quarantine.
        StorageError, DataError: reading failed, or a shard has no scores.
    """
    chooser = _Chooser(shards, config)
    file = cache_folder() / f"{chooser.key[:32]}.choice.safetensors"
    choice = Choice.read(file)
    if choice is None:
        choice = chooser.choose(reporter)
        if not choice.held:
            with suppress(OSError):
                choice.write(file)
    num_chosen = sum(choice.counts)
    if not num_chosen:
        raise InputNotFoundError(
            f"none of {shards.num_samples} samples remains",
            "data.filter and data.quarantine exclude all of them",
            "see `ldm data stats`, or relax data.filter",
        )
    if num_chosen < shards.num_samples:
        reporter.info(f"data.filter and data.quarantine keep {num_chosen} of {shards.num_samples} samples")
    return replace(shards, indexes=shards.indexes.chosen(choice), choice=choice)


class _Chooser:
    """Chooses the samples of a data set, in one pass over all of them."""

    def __init__(self, shards: ShardSet, config: DataConfig) -> None:
        self._shards, self._config = shards, config
        self._quarantined: dict[str, set[str]] = defaultdict(set)
        for bad in read_bad_samples(Path(config.quarantine)) if config.quarantine is not None else ():
            self._quarantined[Path(bad.shard).name].add(bad.key)
        self._rule = config.filter.clip_score if config.filter else None
        self._scores = _scores(Path(self._rule.scores)) if self._rule else {}
        self._shapes = shapes_of(config) if config.aspect_buckets else []
        # A missing caption does not exclude a sample here: the loader counts it as bad, or takes the empty caption.
        reading = config.model_copy(update={"missing_caption": "empty"})
        self._decoder = SampleDecoder(shards, reading, Wanted(image=False, label=False, metadata=True))
        rules = config.filter.to_mapping() if config.filter else None
        inputs: list[Any] = [_VERSION, rules, self._shapes, config.caption, config.max_pixels, config.max_member_bytes]
        inputs += [config.image, sorted((name, sorted(keys)) for name, keys in self._quarantined.items())]
        inputs += [sorted(self._scores.items())]
        self._settings = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        self.key = hashlib.sha256(f"{self._settings} {shards.fingerprint} {_names(shards)}".encode()).hexdigest()

    def choose(self, reporter: Reporter) -> Choice:
        """The choice; workers share the shards if the recipe has some."""
        counts, bucket_counts, digests, names = array("q"), array("i"), bytearray(), bytearray()
        held: dict[int, ShardChoice] = {}
        numbers, num_workers = range(len(self._shards.paths)), self._config.num_workers
        with (
            closing(self._decoder),
            closing(self._made(numbers, num_workers)) as made,
            reporter.progress("reading sample sizes and captions", len(numbers), unit="shard") as progress,
        ):
            for shard, (chosen, name, problem) in enumerate(made):
                counts.append(chosen.num_samples)
                bucket_counts.extend(end - first for first, end in pairwise((0, *chosen.bucket_ends)))
                digests += chosen.digest()
                names += name
                if problem:
                    if not held:
                        reporter.warn(f"cannot keep facts about samples: {problem}; every run reads them again")
                    held[shard] = chosen
                progress.update(shard + 1)
        return Choice(counts, bucket_counts, bytes(digests), bytes(names), held)

    def _made(self, numbers: range, num_workers: int) -> Generator[tuple[ShardChoice, bytes, str]]:
        if not num_workers:
            return (self._choose(shard) for shard in numbers)
        return made_ahead(self._choose, numbers, num_workers=num_workers, timeout=self._config.worker_timeout)

    def _choose(self, shard: int) -> tuple[ShardChoice, bytes, str]:
        """The choice of a shard, the name of the file that keeps it, and why it could not be written."""
        shards, path = self._shards, self._shards.paths[shard]
        reads = self._config.filter is not None or bool(self._shapes)
        quarantined = self._quarantined.get(path.name, ())
        if not reads and not quarantined:
            return ShardChoice(None, shards.sizes[shard]), bytes(_NAME_BYTES), ""
        inputs = f"{self._settings} {shards.facts.contents_of(shard)} {path.name}"
        name = hashlib.sha256(inputs.encode()).digest()[:_NAME_BYTES]
        if (known := ShardChoice.read(choice_file(name))) is not None:
            return known, name, ""
        count, problem = shards.sizes[shard], ""
        index = shards.indexes[shard]
        kept = torch.ones(count, dtype=torch.bool)
        for sample in range(count) if quarantined else ():
            kept[sample] = index.key(sample) not in quarantined
        sizes = torch.zeros(count, 2, dtype=torch.int32)
        if reads:
            sizes, passing, problem = self._facts(shard)
            kept &= passing
        if self._rule is not None:
            scores = [self._scores.get(shards.name(shard, sample)) for sample in range(count)]
            kept &= _fitting(self._rule, scores, path.name)
        chosen = self._divided(kept, sizes)
        try:
            chosen.write(choice_file(name))
        except OSError as error:
            problem = str(error)
        if self._shards.staging is not None:
            self._shards.staging.release(path)
        return chosen, name, problem

    def _divided(self, kept: Tensor, sizes: Tensor) -> ShardChoice:
        """The choice of these samples, with their buckets."""
        numbers = kept.nonzero().flatten()
        whole = len(numbers) == len(kept)
        column = None if whole else array("I", numbers.tolist())
        if not self._shapes:
            return ShardChoice(column, len(numbers))
        nearest = nearest_shapes(sizes[numbers], self._shapes)
        ends = torch.bincount(nearest, minlength=len(self._shapes)).cumsum(0)
        places = array("I", torch.argsort(nearest, stable=True).tolist())
        return ShardChoice(column, len(numbers), places, array("I", ends.tolist()))

    def _facts(self, shard: int) -> tuple[Tensor, Tensor, str]:
        """Sizes int32 [N, 2] of a shard's pictures, width and height as shown, 0 × 0 where they cannot be read; whether
        each sample passes the filter, bool [N]; and why that could not be kept. They are read once."""
        file, problem = self._facts_file(shard), ""
        if (found := read_columns(file)) is not None:
            sizes, kept = array("i", bytes(found[0]["sizes"])), bytearray(found[0]["kept"])
        else:
            sizes, kept = _read_facts(self._shards, shard, self._config, self._decoder)
            try:
                write_columns(file, {"sizes": sizes, "kept": kept}, {})
            except OSError as error:
                problem = str(error)
        tensor = torch.tensor(sizes.tolist(), dtype=torch.int32).view(-1, 2)
        return tensor, torch.tensor([*kept], dtype=torch.bool), problem

    def _facts_file(self, shard: int) -> Path:
        """The file with the facts of a shard; its name is a hash of its content and of all settings that matter."""
        # Scores are looked up each time: they are in memory in any case.
        config = self._config
        rules = config.filter.model_copy(update={"clip_score": None}).to_mapping() if config.filter else None
        inputs = [_VERSION, self._shards.facts.contents_of(shard), rules, config.caption, config.max_pixels]
        inputs += [config.max_member_bytes, config.image]
        name = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        return cache_folder() / f"{name}.facts.safetensors"


def _names(shards: ShardSet) -> str:
    """A hash of the names of the shards' files, by which quarantine and scores name them."""
    digest = hashlib.sha256()
    for path in shards.paths:
        digest.update(path.name.encode(errors="surrogateescape") + b"/")
    return digest.hexdigest()


def _read_facts(
    shards: ShardSet, shard: int, config: DataConfig, decoder: SampleDecoder
) -> tuple[array[int], bytearray]:
    """Width and height of each picture, 0 where they cannot be read, and whether each sample passes the filter."""
    count = shards.sizes[shard]
    sizes, kept = array("i", bytes(8 * count)), bytearray(b"\1" * count)
    for sample in range(count):
        try:
            _, width, height = image_header(decoder.image_bytes(shard, sample), config.max_pixels)
            sizes[2 * sample : 2 * sample + 2] = array("i", (width, height))
            found = decoder.decode(shard, sample, Draw())
        except BadSampleError:
            continue  # the loader counts and lists it
        if config.filter is not None:
            kept[sample] = passes(config.filter, (width, height), found.caption, found.metadata or {})
    return sizes, kept


def _scores(file: Path) -> dict[str, float]:
    """The cosines that `ldm clip score --json` measured, by name."""
    try:
        content = json.loads(read_input(file, _MOST_BYTES))
        return {str(picture["name"]): float(picture["cosine"]) for picture in content["pictures"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        cause = f"it is not the JSON of `ldm clip score`: {error!r:.100}"
        raise DataError(f"cannot read '{file}'", cause, "write it with `ldm clip score SHARDS --json`") from error


def _fitting(rule: CLIPScoreRule, scores: Sequence[float | None], shard: str) -> Tensor:
    """Whether each sample of a shard has a score of at least the minimum, bool [N]."""
    if scores and not any(score is not None for score in scores):
        cause = f"no sample of '{shard}' has one in '{rule.scores}'"
        raise DataError("data.filter.clip_score has no scores", cause, "score all shards of the recipe, val_shards too")
    return torch.tensor([score is not None and score >= rule.min for score in scores], dtype=torch.bool)


def passes(rules: SampleFilter, size: tuple[int, int], caption: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a sample of this size (width, height), caption and JSON member meets all conditions."""
    short, long = sorted(size)
    length = len(caption)
    return (
        (rules.min_side is None or short >= rules.min_side)
        and (rules.max_aspect is None or long <= rules.max_aspect * short)
        and (rules.min_caption_length is None or length >= rules.min_caption_length)
        and (rules.max_caption_length is None or length <= rules.max_caption_length)
        and all(_holds(rule, field_of(dict(metadata), path)) for path, rule in rules.fields.items())
    )


def _holds(rule: FieldRule, value: Any) -> bool:
    if value is None:
        return False
    if rule.any_of is not None and not any(type(value) is type(one) and value == one for one in rule.any_of):
        return False
    if rule.min is None and rule.max is None:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (rule.min is None or value >= rule.min) and (rule.max is None or value <= rule.max)
