"""What a filter or aspect buckets must know of every sample before the first step: size, and whether it is kept.

A shard is surveyed once, by reading its headers, captions and JSON; the answer is kept beside its index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError, read_bad_samples
from ldm_cli.data.captions import field_of
from ldm_cli.data.config import DataConfig, FieldRule, SampleFilter
from ldm_cli.data.decode import upright_size
from ldm_cli.data.index_cache import cache_folder
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import InputNotFoundError, StorageError
from ldm_cli.reporting import Reporter
from ldm_cli.storage import whole_file

_VERSION = 1


@dataclass(frozen=True)
class ShardSurvey:
    """Facts of a shard's samples (N of them).

    Attributes:
        sizes: int32 [N, 2], width and height as shown; 0 × 0 where they cannot be read.
        kept: bool [N], whether the filter lets the sample pass.
    """

    sizes: Tensor
    kept: Tensor


def choose_samples(shards: ShardSet, config: DataConfig, reporter: Reporter) -> ShardSet:
    """The samples that `config.filter` and `config.quarantine` leave, with sizes if `config` needs them.

    Raises:
        InputNotFoundError: none are left, or there is no such quarantine file.
        StorageError, DataError: reading failed.
    """
    quarantined: set[tuple[str, str]] = set()
    if config.quarantine is not None:
        quarantined = {(Path(bad.shard).name, bad.key) for bad in read_bad_samples(Path(config.quarantine))}
    surveys = _surveys(shards, config, reporter) if config.filter or config.aspect_buckets else None
    if not quarantined and surveys is None:
        return shards
    indexes, sizes = [], []
    for number, index in enumerate(shards.indexes):
        name = shards.paths[number].name
        kept = torch.ones(index.num_samples, dtype=torch.bool) if surveys is None else surveys[number].kept.clone()
        for sample in range(index.num_samples) if quarantined else ():
            if (name, index.key(sample)) in quarantined:
                kept[sample] = False
        chosen = kept.nonzero().flatten()
        indexes.append(index.select(chosen.tolist()))
        if surveys is not None:
            sizes.append(surveys[number].sizes[chosen])
    result = replace(shards, indexes=tuple(indexes), image_sizes=tuple(sizes) if config.aspect_buckets else None)
    if not result.num_samples:
        raise InputNotFoundError(
            f"none of {shards.num_samples} samples is left",
            "data.filter and data.quarantine leave all of them out",
            "see `ldm data stats`, or relax data.filter",
        )
    reporter.info(f"data.filter and data.quarantine leave {result.num_samples} of {shards.num_samples} samples")
    return result


def _surveys(shards: ShardSet, config: DataConfig, reporter: Reporter) -> list[ShardSurvey]:
    surveys = []
    # A caption that is not there is no reason to leave a sample out: it is counted as bad, or empty, when met.
    reading = config.model_copy(update={"missing_caption": "empty"})
    decoder = SampleDecoder(shards, reading, Wanted(image=False, label=False, metadata=True))
    with reporter.progress("looking at samples", len(shards.paths), unit="shard") as progress:
        for shard in range(len(shards.paths)):
            file = _file(shards, shard, config)
            survey = _load(file)
            if survey is None:
                survey = _survey(shards, shard, config, decoder)
                if not _save(file, survey):
                    reporter.warn(f"cannot keep what was found out in '{file.parent}'")
            surveys.append(survey)
            progress.update(shard + 1)
    decoder.close()
    return surveys


def _survey(shards: ShardSet, shard: int, config: DataConfig, decoder: SampleDecoder) -> ShardSurvey:
    count = shards.indexes[shard].num_samples
    sizes, kept = torch.zeros(count, 2, dtype=torch.int32), torch.ones(count, dtype=torch.bool)
    for sample in range(count):
        try:
            size = upright_size(decoder.image_bytes(shard, sample), config.max_pixels)
            sizes[sample] = torch.tensor(size, dtype=torch.int32)
            found = decoder.decode(shard, sample, Draw())
        except BadSampleError:
            continue  # whoever reads it counts and lists it
        if config.filter is not None:
            kept[sample] = passes(config.filter, size, found.caption, found.metadata or {})
    return ShardSurvey(sizes, kept)


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
    """Where the survey of a shard is kept: its name tells the content and everything that was asked."""
    rules = config.filter.to_mapping() if config.filter else None
    facts = [_VERSION, shards.indexes[shard].fingerprint(), rules, config.caption, config.max_pixels]
    facts += [config.max_member_bytes, config.image]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / f"{name}.survey.safetensors"


def _load(file: Path) -> ShardSurvey | None:
    try:
        with safe_open(file, framework="pt") as found:
            return ShardSurvey(found.get_tensor("sizes"), found.get_tensor("kept"))
    except (OSError, RuntimeError, SafetensorError):  # torch opens it, too
        return None


def _save(file: Path, survey: ShardSurvey) -> bool:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            save_file({"sizes": survey.sizes, "kept": survey.kept}, partial)
    except (OSError, StorageError, SafetensorError):
        return False
    return True
