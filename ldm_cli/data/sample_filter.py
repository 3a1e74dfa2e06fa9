"""Facts of every sample that filters and aspect buckets need before the first step: its size, and whether it is kept.

They are read once per shard from image headers, captions and JSON, and kept beside its index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError, read_bad_samples
from ldm_cli.data.captions import field_of
from ldm_cli.data.config import CLIPScoreRule, DataConfig, FieldRule, SampleFilter
from ldm_cli.data.decode import image_header
from ldm_cli.data.index_cache import cache_folder, load_tensors, save_tensors
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.inputs import read_input
from ldm_cli.reporting import Reporter

_VERSION = 2
_MOST_BYTES = 2**30


@dataclass(frozen=True)
class SampleFacts:
    """Facts of a shard's samples (N of them).

    Attributes:
        sizes: int32 [N, 2], width and height as shown; 0 × 0 where they cannot be read.
        kept: bool [N], whether the sample passes the filter.
    """

    sizes: Tensor
    kept: Tensor


def choose_samples(shards: ShardSet, config: DataConfig, reporter: Reporter) -> ShardSet:
    """The samples that pass `config.filter` and `config.quarantine`, with sizes if `config` needs them.

    Raises:
        InputNotFoundError: no samples remain, or there is no such file of scores or for quarantine.
        StorageError, DataError: reading failed, or a shard has no scores.
    """
    quarantined: set[tuple[str, str]] = set()
    if config.quarantine is not None:
        quarantined = {(Path(bad.shard).name, bad.key) for bad in read_bad_samples(Path(config.quarantine))}
    rule = config.filter.clip_score if config.filter else None
    scores = _scores(Path(rule.scores)) if rule else {}
    facts = _facts_of_shards(shards, config, reporter) if config.filter or config.aspect_buckets else None
    if not quarantined and facts is None:
        return shards
    indexes, sizes = [], []
    for number, index in enumerate(shards.indexes):
        name = shards.paths[number].name
        kept = torch.ones(index.num_samples, dtype=torch.bool) if facts is None else facts[number].kept.clone()
        for sample in range(index.num_samples) if quarantined else ():
            if (name, index.key(sample)) in quarantined:
                kept[sample] = False
        if rule is not None:
            kept &= _fitting(rule, [scores.get(shards.name(number, n)) for n in range(index.num_samples)], name)
        chosen = kept.nonzero().flatten()
        indexes.append(index.select(chosen.tolist()))
        if facts is not None:
            sizes.append(facts[number].sizes[chosen])
    result = replace(shards, indexes=tuple(indexes), image_sizes=tuple(sizes) if config.aspect_buckets else None)
    if not result.num_samples:
        raise InputNotFoundError(
            f"none of {shards.num_samples} samples remains",
            "data.filter and data.quarantine exclude all of them",
            "see `ldm data stats`, or relax data.filter",
        )
    if result.num_samples < shards.num_samples:
        reporter.info(f"data.filter and data.quarantine keep {result.num_samples} of {shards.num_samples} samples")
    return result


def _facts_of_shards(shards: ShardSet, config: DataConfig, reporter: Reporter) -> list[SampleFacts]:
    all_facts = []
    # A missing caption does not exclude a sample here: the loader counts it as bad, or takes the empty caption.
    reading = config.model_copy(update={"missing_caption": "empty"})
    wanted = Wanted(image=False, label=False, metadata=True)
    with (
        closing(SampleDecoder(shards, reading, wanted)) as decoder,
        reporter.progress("reading sample sizes and captions", len(shards.paths), unit="shard") as progress,
    ):
        for shard in range(len(shards.paths)):
            file = _file(shards, shard, config)
            if found := load_tensors(file):
                facts = SampleFacts(**found[0])
            else:
                facts = _read_facts(shards, shard, config, decoder)
                try:
                    save_tensors(file, vars(facts), {})
                except OSError as error:
                    reporter.warn(
                        f"cannot keep facts about samples in '{file.parent}': {error}; every run reads them again"
                    )
            all_facts.append(facts)
            progress.update(shard + 1)
    return all_facts


def _read_facts(shards: ShardSet, shard: int, config: DataConfig, decoder: SampleDecoder) -> SampleFacts:
    count = shards.indexes[shard].num_samples
    sizes, kept = torch.zeros(count, 2, dtype=torch.int32), torch.ones(count, dtype=torch.bool)
    for sample in range(count):
        try:
            _, width, height = image_header(decoder.image_bytes(shard, sample), config.max_pixels)
            sizes[sample] = torch.tensor((width, height), dtype=torch.int32)
            found = decoder.decode(shard, sample, Draw())
        except BadSampleError:
            continue  # the loader counts and lists it
        if config.filter is not None:
            kept[sample] = passes(config.filter, (width, height), found.caption, found.metadata or {})
    return SampleFacts(sizes, kept)


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


def _file(shards: ShardSet, shard: int, config: DataConfig) -> Path:
    """The file with the facts of a shard; its name is a hash of the shard's content and of all settings that matter."""
    # Scores are looked up each time: they are in memory in any case.
    rules = config.filter.model_copy(update={"clip_score": None}).to_mapping() if config.filter else None
    inputs = [_VERSION, shards.indexes[shard].fingerprint(), rules, config.caption, config.max_pixels]
    inputs += [config.max_member_bytes, config.image]
    name = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / f"{name}.facts.safetensors"
