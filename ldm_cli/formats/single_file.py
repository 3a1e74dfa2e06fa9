"""A checkpoint in one file, as CompVis, Stability AI and OpenAI wrote them: which models it holds, and as which folder.

Its architecture is recognised by names and shapes. Each model is then one `Part`, which gives the config.json and the
tensors of a model folder.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.errors import CheckpointError
from ldm_cli.formats import single_file_configs as measured
from ldm_cli.formats import single_file_names as names
from ldm_cli.formats import single_file_sd3 as sd3
from ldm_cli.formats.pipeline_folder import SCHEDULER_FILE, TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, UNET
from ldm_cli.formats.single_file_index import pipeline_files, sample_size
from ldm_cli.formats.single_file_layout import ALONE, EMA_PREFIX, KINDS, NO_WEIGHTS, OTHERS, PLACES, UNPROJECTED
from ldm_cli.formats.weight_files import CONFIG_NAME, named

CONFIGS_KEY = "ldm_cli.configs"
"""Where in a file's metadata we keep the JSON files of the folder it was made of."""


@dataclass(frozen=True)
class Part:
    """One model of a single file.

    Attributes:
        prefix: of its tensors in the file.
        config: content of its config.json.
        table: names in the model folder → places below the prefix.
        tensors: by the names in the file, without the prefix.
    """

    prefix: str
    config: dict[str, Any]
    table: names.Table
    tensors: dict[str, Tensor]

    def as_in_folder(self) -> dict[str, Tensor]:
        """The tensors under the names of a model folder."""
        return names.from_file(self.tensors, self.table)


@dataclass(frozen=True)
class SingleFile:
    """A single file as the model folder that it stands for.

    Attributes:
        parts: its models by the subfolder of a pipeline; a model by itself is at "".
        json_files: content of each JSON file of the folder, by relative path.
        recognised_by: up to five names of tensors that only this architecture has.
        left_out: names of tensors that no folder holds.
    """

    parts: dict[str, Part]
    json_files: dict[str, dict[str, Any]]
    recognised_by: list[str]
    left_out: list[str]


def single_file(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: Path,
    configs: Mapping[str, dict[str, Any]] | None = None,
    *,
    ema: bool = False,
) -> SingleFile:
    """Recognise what a file holds.

    Args:
        tensors: all of the file, by name.
        metadata: of the file. The JSON files that `ldm convert` keeps there have precedence over what shapes tell.
        source: the file, for messages.
        configs: JSON files by relative path, with precedence over both.
        ema: take the averaged weights of the U-Net.

    Raises:
        CheckpointError: the architecture is unknown, a tensor belongs to none of its models, or averaged weights are
            asked for and are not there.
    """
    found = _recognised(tensors, source)
    if ema:
        tensors = _averaged(tensors, found, source)
    own = {folder: _below(tensors, prefix) for folder, (prefix, _) in found.items()}
    try:
        kinds = {folder: kind for folder, (_, kind) in found.items()}
        files = _measured(kinds, own, source, tensors, metadata)
    except KeyError as error:
        raise CheckpointError(f"cannot use '{source}'", f"the tensor {error} is missing") from error
    except (IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot use '{source}'", "the shape of a tensor is not that of its name") from error
    parts = {}
    try:
        given = json.loads(metadata.get(CONFIGS_KEY, "{}")) | (configs or {})
        if len(found) == 1 and CONFIG_NAME in given:
            given |= {str(Path(folder, CONFIG_NAME)): given[CONFIG_NAME] for folder in found}
        files |= {name: dict(content) for name, content in given.items() if name in files}
        for folder, (prefix, kind) in found.items():
            config = files[str(Path(folder, CONFIG_NAME))]
            parts[folder] = Part(prefix, config, KINDS[kind].table(config), _in_use(own[folder], kind, config))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot use '{source}'", f"{CONFIGS_KEY} in its metadata is damaged") from error
    taken = {part.prefix + name for part in parts.values() for name in part.tensors}
    left_out = [name for name in tensors if name not in taken]
    _expect_no_foreign(left_out, found, source)
    marks = [[prefix + mark for mark in KINDS[kind].marks] for prefix, kind in found.values()]
    recognised_by = [mark for rank in zip_longest(*marks) for mark in rank if mark is not None]
    return SingleFile(parts, files, recognised_by[:5], left_out)


def _recognised(tensors: Mapping[str, Tensor], source: Path) -> dict[str, tuple[str, str]]:
    """Prefix and kind of each model, by subfolder."""
    for sign, architecture in OTHERS.items():
        if foreign := [name for name in tensors if sign in name]:
            raise CheckpointError(f"cannot use '{source}'", f"its names are those of {architecture}: {named(foreign)}")
    found: dict[str, tuple[str, str]] = {}
    for folder, prefix, kind in (*PLACES, *ALONE):
        is_free = folder not in found if folder else not found
        if is_free and all(prefix + mark in tensors for mark in KINDS[kind].marks):
            found[folder] = prefix, kind
    if not found:
        known = named(list(tensors)) or "nothing"
        raise CheckpointError(f"cannot tell the architecture of '{source}'", f"it holds {known}")
    return found


def _averaged(tensors: Mapping[str, Tensor], found: Mapping[str, tuple[str, str]], source: Path) -> dict[str, Tensor]:
    """The tensors with the averages of the U-Net in place of its own; dots are left out of the averages' names."""
    prefix = found.get(UNET, ("", ""))[0]
    averages = {
        name: EMA_PREFIX + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(prefix)
    }
    if missing := [average for average in averages.values() if average not in tensors]:
        raise CheckpointError(f"no averaged weights in '{source}'", f"missing: {named(missing)}", "leave --ema out")
    return {name: tensors[averages.get(name, name)] for name in tensors}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a model, without its prefix."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if prefix == UNPROJECTED:
        table = own["text_model.embeddings.token_embedding.weight"]
        own["text_projection.weight"] = torch.eye(table.shape[-1]).to(table.dtype)
    return own


def _measured(
    kinds: Mapping[str, str],
    own: Mapping[str, Mapping[str, Tensor]],
    source: Path,
    names_in_file: Collection[str],
    metadata: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """The JSON files as names and shapes tell."""
    shapes = {folder: {name: tuple(tensor.shape) for name, tensor in inside.items()} for folder, inside in own.items()}
    is_3 = TRANSFORMER in kinds
    is_xl = TEXT_ENCODER_2 in kinds and not is_3
    configs: dict[str, dict[str, Any]] = {}
    for folder, kind in kinds.items():
        inside = shapes[folder]
        if kind == "unet":
            pooled_width = shapes[TEXT_ENCODER_2]["text_projection"][1] if is_xl else 1280
            configs[folder] = measured.unet_config(inside, pooled_width)
        elif kind == "vae":
            space = (1.5305, 0.0609) if is_3 else (0.13025 if is_xl else 0.18215, None)
            configs[folder] = measured.vae_config(inside, *space)
        elif kind == "transformer":
            configs[folder] = sd3.transformer_config(inside)
        elif kind == "t5":
            configs[folder] = sd3.t5_config(inside)
        elif kind == "clip":
            # Only OpenAI's own files say their sizes; the others are of open_clip.
            configs[folder] = measured.clip_config(inside, "quick_gelu" if "input_resolution" in inside else "gelu")
        elif kind == "openai text":
            configs[folder] = measured.text_config(inside, is_projected=folder != TEXT_ENCODER)
        else:
            configs[folder] = measured.transformers_config(inside)
            if folder == TEXT_ENCODER_2:  # that of OpenCLIP
                configs[folder]["hidden_act"] = "gelu"
    files = pipeline_files(configs, source, names_in_file, metadata)
    for folder in (folder for folder, kind in kinds.items() if kind == "unet"):
        configs[folder]["sample_size"] = sample_size(files.get(str(SCHEDULER_FILE), {}), configs)
    return files | {str(Path(folder, CONFIG_NAME)): config for folder, config in configs.items()}


def _in_use(own: Mapping[str, Tensor], kind: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model without those that it never reads."""
    unused = KINDS[kind].unused
    if kind == "openai text":
        unused += (f"transformer.resblocks.{config['num_hidden_layers']}.",)
        unused += () if "WithProjection" in config["architectures"][0] else ("text_projection",)
    return {name: tensor for name, tensor in own.items() if not (name in NO_WEIGHTS or name.startswith(unused))}


def _expect_no_foreign(left_out: Sequence[str], found: Mapping[str, tuple[str, str]], source: Path) -> None:
    """Raises CheckpointError that names the tensors which belong to no model of the file."""
    prefixes = tuple(prefix for prefix, _ in found.values())
    foreign = [n for n in left_out if not (n in NO_WEIGHTS or n.startswith((*prefixes, EMA_PREFIX)))]
    if foreign:
        holds = ", ".join(folder or kind for folder, (_, kind) in found.items())
        cause = f"it holds {holds}, and tensors that belong to none of these: {named(foreign)}"
        raise CheckpointError(f"cannot use '{source}'", cause)


def as_single_file(parts: Mapping[str, tuple[names.Content, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The tensors of model folders under the names of a single file: the inverse of `Part.as_in_folder`.

    Args:
        parts: complete configuration and tensors of each model, by subfolder of a pipeline; a model by itself at "".

    Raises:
        CheckpointError: single files have no name for a tensor, which is named.
    """
    towers = "text_encoders" if TRANSFORMER in parts else "conditioner" if TEXT_ENCODER_2 in parts else "cond_stage"
    renamed: dict[str, Tensor] = {}
    for folder, (config, tensors) in parts.items():
        prefix, kind = _place(folder, config, towers)
        try:
            inside = names.to_file(tensors, KINDS[kind].table(config))
        except ValueError as error:
            cause = f"it has no name for the tensor {error} of '{folder or kind}'"
            raise CheckpointError("the model does not fit the layout of single files", cause) from error
        inside |= {name: inside[first].clone() for name, first in KINDS[kind].repeated.items()}
        renamed |= {prefix + name: tensor for name, tensor in inside.items()}
    return renamed


def _place(folder: str, config: names.Content, towers: str) -> tuple[str, str]:
    """Prefix and kind of a model in a file that is written, whose prefixes of text encoders begin with `towers`."""
    if config.get("_class_name") == "SD3Transformer2DModel":
        return "model.diffusion_model.", "transformer"
    if config.get("_class_name") == "UNet2DConditionModel":
        return "model.diffusion_model.", "unet"
    if config.get("_class_name") == "AutoencoderKL":
        return "first_stage_model." if folder else "", "vae"
    if "vision_config" in config:
        return "", "clip"
    # Towers of open_clip keep its names, and only those have the exact GELU. Of XL's two it is always the second.
    is_of_open_clip = folder == TEXT_ENCODER_2 if towers == "conditioner" else config.get("hidden_act") == "gelu"
    kind = "openai text" if is_of_open_clip and towers != "text_encoders" else "transformers text"
    kind = "t5" if config.get("model_type") == "t5" else kind
    prefixes = [p for name, p, k in PLACES if (name, k) == (folder, kind) and p.startswith(towers)]
    if folder and not prefixes:
        raise CheckpointError("the model does not fit the layout of single files", f"it has no place for '{folder}'")
    return (prefixes or [""])[0], kind
