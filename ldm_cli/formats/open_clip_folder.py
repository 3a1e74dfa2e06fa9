"""Folders of open_clip: what open_clip_config.json says beyond the shapes of the tensors.

The tensors have OpenAI's names, and the file is read as any other single file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.weight_files import CONFIG_NAME, named

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
# Fields that a Vision Transformer and its text tower have; shapes tell all but the heads and the activation.
_KNOWN = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"},
    "preprocess_cfg": {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"},
}
_NEUTRAL = {"pool_type": ("tok", "argmax"), "custom_text": (False,), "mode": ("RGB",), "fill_color": (0,)}
_FILTERS = {"bilinear": 2, "bicubic": 3}


def open_clip_weights(folder: Path) -> Path | None:
    """The weights of a folder of open_clip; None for other folders, and for those that have a config.json as well."""
    if not (folder / OPEN_CLIP_CONFIG).is_file() or (folder / CONFIG_NAME).is_file():
        return None
    return next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)


def open_clip_files(folder: Path, measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json and preprocessor_config.json of the CLIP in a folder of open_clip.

    Args:
        folder: has the file `OPEN_CLIP_CONFIG`.
        measured: config.json as the tensors' shapes tell it.

    Raises:
        CheckpointError: the model has a field that is not supported, which is named.
    """
    source = folder / OPEN_CLIP_CONFIG
    whole = read_json(source)
    model, prepared = _section(whole, "model_cfg", source), _section(whole, "preprocess_cfg", source)
    vision, text = _section(model, "vision_cfg", source), _section(model, "text_cfg", source)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    side = measured["vision_config"]["image_size"]
    heads = measured["vision_config"]["hidden_size"] // vision.get("head_width", 64)
    towers = {
        "text_config": {"num_attention_heads": text.get("heads", 8), "hidden_act": activation},
        "vision_config": {"num_attention_heads": heads, "hidden_act": activation},
    }
    config = {**measured, **{name: {**measured[name], **changes} for name, changes in towers.items()}}
    is_squashed = prepared.get("resize_mode") == "squash"
    interpolation = prepared.get("interpolation", "bicubic")
    if prepared.get("resize_mode", "shortest") not in ("shortest", "squash") or interpolation not in _FILTERS:
        cause = f"resize_mode={prepared.get('resize_mode')!r}, interpolation={interpolation!r} is not supported"
        raise CheckpointError(f"cannot use '{source}'", cause)
    processor = {
        "size": {"height": side, "width": side} if is_squashed else {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": not is_squashed,
        "resample": _FILTERS[interpolation],
        **{f"image_{name}": prepared[name] for name in ("mean", "std") if name in prepared},
    }
    return {CONFIG_NAME: config, "preprocessor_config.json": processor}


def _section(whole: Mapping[str, Any], name: str, source: Path) -> Mapping[str, Any]:
    """A part of the file, all of whose fields are known or have no effect."""
    section = whole.get(name, {})
    if not isinstance(section, dict):
        raise CheckpointError(f"cannot use '{source}'", f"{name} is no object")
    unknown = [
        f"{name}.{field}={value!r}"
        for field, value in section.items()
        if value not in (None, False) and field not in _KNOWN[name] and value not in _NEUTRAL.get(field, ())
    ]
    if isinstance(section.get("layers"), list):
        unknown.append(f"{name}.layers={section['layers']}, a ResNet")
    if unknown:
        raise CheckpointError(f"cannot use '{source}'", f"not supported: {named(unknown)}")
    return section
