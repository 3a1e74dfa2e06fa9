"""What makes two commands the same run: the recipe fields and fingerprints that decide its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields that an interrupted run may change: none of them changes a weight or a metric.
_HARMLESS = {
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.validate_every",
    "train.validation_samples",
    "train.sample_every",
    "train.max_nonfinite",
    "train.track",
    "train.strategy",
    "train.rank_timeout",
    "data.num_workers",
    "data.worker_timeout",
    "data.max_bad_fraction",
    "data.remote_schemes",
    "data.stream_buffer",
    "data.max_fetched_bytes",
    "data.shards",  # data and models may move; their contents are compared by fingerprint
    "data.val_shards",
    "data.quarantine",
    "data.filter.clip_score.scores",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer.path",
    "start_from",
    "cache",
    "variant",
    "loss.perceptual_clip",
    "eval.clip",
    "eval.inception",
    "eval.dinov2",
    "eval.vae",
    "eval.pipeline",
}


EVERY_BYTE = "every byte of data"
"""Name of the fingerprint that a run has only if its shards were hashed whole before it began."""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """In what two recipes, as plain data, differ: the harmless changes, and those that make another run."""
    before, after = flatten(old), flatten(new)
    harmless: list[str] = []
    harmful: list[str] = []
    for name in _differing(before, after):
        is_listed = name in _HARMLESS or name.startswith("eval.pipelines.")
        is_harmless = is_listed or _is_extension(name, before, after) or _is_other_parts(name, after)
        (harmless if is_harmless else harmful).append(_change(name, before, after))
    return harmless, harmful


def fingerprint_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """In what the fingerprints of data and models differ."""
    names = [name for name in _differing(old, new) if name != EVERY_BYTE or name in old]
    return [f"the fingerprint of {_change(name, old, new)}" for name in names]


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [name for name in names if old.get(name, "absent") != new.get(name, "absent")]


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"{name}: {old.get(name, 'absent')!r} → {new.get(name, 'absent')!r}"


def _is_other_parts(name: str, new: Mapping[str, Any]) -> bool:
    """Other parts, like other ranks, change the last bits, unless they are those of the one sum for all ranks."""
    return name == "train.micro_batch" and new.get("train.deterministic") != "elastic"


def _is_extension(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """More steps at a constant rate repeat the steps that were taken; with a cosine they would differ."""
    is_constant = new.get("train.lr_schedule") == "constant"
    return name == "train.steps" and is_constant and new[name] > old.get(name, new[name])
