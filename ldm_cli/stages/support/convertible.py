"""Any model that `ldm convert` takes, read into one form: the models of a folder, or of a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_vision import CLIPVisionModelWithProjection
from ldm_cli.core.models.image_normalizer import ImageNormalizer
from ldm_cli.core.models.prior_transformer import PriorTransformer
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.model_folder import fitted, parse_as, read_config, unfilled
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.formats.pipeline_folder import (
    IMAGE_ENCODER,
    INDEX_NAME,
    SCHEDULER_FILE,
    TEXT_ENCODER_3,
    TOKENIZER,
    TRANSFORMER,
    UNET,
    VAE,
    tokenizer_of,
)
from ldm_cli.formats.single_file import single_file
from ldm_cli.formats.weight_files import CONFIG_NAME, is_pickle, read_metadata, read_pickle, read_tensors, weight_files
from ldm_cli.formats.weight_values import expect_sound

_CLASSES: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "SD3Transformer2DModel": SD3Transformer2DModel,
    "AutoencoderKL": AutoencoderKL,
    "VQModel": VQModel,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "CLIPModel": CLIPModel,
    "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection,
    "PriorTransformer": PriorTransformer,
    "StableUnCLIPImageNormalizer": ImageNormalizer,
    "T5EncoderModel": T5EncoderModel,
}
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")


@dataclass(frozen=True)
class FoundModel:
    """One model.

    Attributes:
        kind: its class in diffusers or transformers.
        content: of its config.json.
        complete: the same with every field.
        tensors: by the names of a folder, in the types of the source, mapped.
    """

    kind: str
    content: dict[str, Any]
    complete: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class FoundModels:
    """What a folder or a single file holds.

    Attributes:
        models: by subfolder of a pipeline; a model by itself at "".
        json_files: index and scheduler of a pipeline, by relative path.
        companions: files of tokenizers and image processors, by relative path.
        recognised_by: names of tensors by which a single file was recognised.
        left_out: tensors and components that are not converted.
    """

    models: dict[str, FoundModel]
    json_files: dict[str, dict[str, Any]]
    companions: dict[str, Path]
    metadata: dict[str, str]
    recognised_by: list[str]
    left_out: list[str]


def read_file(file: Path, *, config: Path | None, ema: bool, allow_pickle: bool) -> FoundModels:
    """The models of a single file; errors as in `read_tensors`, `single_file` and `fitted`.

    Args:
        file: safetensors, or a pickle.
        config: folder of configurations that the file has, whatever its shapes tell.
        ema: take the averaged weights of the U-Net.
        allow_pickle: read a file of `torch.save`.
    """
    if allow_pickle and is_pickle(file):
        tensors, metadata = read_pickle(file)
    else:
        tensors, metadata = read_tensors(file), read_metadata(file)
    metadata = {name: value for name, value in metadata.items() if name != "format"}
    opened = single_file(tensors, metadata, file, _configs(config), ema=ema)
    models = {}
    for folder, part in opened.parts.items():
        model = _model(part.config, part.as_in_folder(), file / folder)
        models[folder] = replace(model, content=model.complete)
    json_files = {name: content for name, content in opened.json_files.items() if Path(name).name != CONFIG_NAME}
    return FoundModels(models, json_files, {}, metadata, opened.recognised_by, opened.left_out)


def read_folder(folder: Path, *, allow_pickle: bool) -> FoundModels:
    """The models of a folder; errors as in `load_tensors` and `fitted`.

    Args:
        folder: of a pipeline or of one model.
        allow_pickle: read weights of `torch.save` where there are no others.

    Raises:
        CheckpointError: no model in it is of a class that is converted.
    """
    if not (folder / INDEX_NAME).is_file():
        companions = _files(folder, "", (*_TOKENIZER_FILES, *_PROCESSOR_FILES))
        model = _model(read_config(folder), _tensors(folder, allow_pickle), folder)
        return FoundModels({"": model}, {}, companions, _metadata(folder, allow_pickle), [], [])
    index = read_json(folder / INDEX_NAME)
    components = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1] is not None}
    kept = {name for name, kind in components.items() if kind in _CLASSES}
    denoiser = TRANSFORMER if TRANSFORMER in components else UNET
    for name in (denoiser, VAE):
        if name not in kept:
            kind = f"is of class {components[name]}" if name in components else "is missing"
            cause = f"the {name} of its {index.get('_class_name')} {kind}"
            raise CheckpointError(f"cannot convert '{folder}'", cause, f"it must be one of {', '.join(_CLASSES)}")
    models = {
        name: _model(read_config(folder / name), _tensors(folder / name, allow_pickle), folder / name)
        for name in sorted(kept, key=lambda name: (name != denoiser, name))
    }
    has_images = IMAGE_ENCODER in kept
    companions = {
        path: file
        for name, kind in components.items()
        if TOKENIZER in name or (has_images and kind.startswith("CLIPImageProcessor"))
        for path, file in _files(folder / name, name, (*_TOKENIZER_FILES, *_PROCESSOR_FILES)).items()
    }
    schedulers = [
        str(Path(name, SCHEDULER_FILE.name)) for name, kind in components.items() if kind.endswith("Scheduler")
    ]
    copied = {str(Path(path).parent) for path in (*companions, *schedulers)}
    left_out = [name for name in components if name not in kept | copied and not name.startswith(TOKENIZER)]
    index |= {name: [None, None] for name in left_out}
    json_files = {INDEX_NAME: index} | {path: read_json(folder / path) for path in schedulers}
    metadata = _metadata(folder / denoiser, allow_pickle)
    return FoundModels(models, json_files, companions, metadata, [], left_out)


def tokenizer_files(folder: Path, component: str) -> dict[str, Path]:
    """The files of a tokenizer, by their path in a pipeline.

    Args:
        folder: of the tokenizer, or with subfolders for each.
        component: `tokenizer`, `tokenizer_2`, `tokenizer_3`, or "" for that of a model by itself.

    Raises:
        InputNotFoundError: it is not there.
        CheckpointError: it is no tokenizer of a CLIP, or of T5.
    """
    inside = folder / component
    if not inside.is_dir() and component in (TOKENIZER, folder.name):
        inside = folder
    files = _files(inside, component, _TOKENIZER_FILES)
    if not files:
        cause = f"there is no folder '{inside}' with its files"
        raise InputNotFoundError(
            f"no {component or TOKENIZER}", cause, "give its folder, or that around it, as --tokenizer"
        )
    if component == tokenizer_of(TEXT_ENCODER_3):
        UnigramTokenizer.load(inside)
    return files


def text_encoders_beside(file: Path, models: FoundModels) -> FoundModels:
    """The models of a single file with the text encoders that its pipeline needs and that lie in folders beside it.

    Raises:
        InputNotFoundError, CheckpointError: one is missing or damaged.
    """
    index = models.json_files.get(INDEX_NAME, {})
    needed = [name for name in index if name.startswith("text_encoder") and index[name][1] is not None]
    further = {
        name: _model(read_config(file / name), load_tensors(file / name), file / name)
        for name in needed
        if name not in models.models
    }
    return replace(models, models=models.models | further)


def _files(folder: Path, inside: str, names: tuple[str, ...]) -> dict[str, Path]:
    """Those files that a folder has, by their path in a pipeline; CheckpointError: its tokenizer is damaged."""
    if (folder / "merges.txt").is_file():
        Tokenizer.load(folder)
    return {str(Path(inside, name)): folder / name for name in names if (folder / name).is_file()}


def _configs(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Complete configurations and the scheduler of a folder, by relative path."""
    if folder is None:
        return {}
    found = {}
    for file in [folder / CONFIG_NAME, *sorted(folder.glob(f"*/{CONFIG_NAME}"))]:
        content = read_json(file) if file.is_file() else {}
        if _kind(content) in _CLASSES:
            found[str(file.relative_to(folder))] = _complete(content, file)
    if (folder / SCHEDULER_FILE).is_file():
        found[str(SCHEDULER_FILE)] = read_json(folder / SCHEDULER_FILE)
    if not found:
        raise InputNotFoundError(f"no configuration of a model in '{folder}'", remedy="check --config")
    return found


def _kind(content: Mapping[str, Any]) -> str:
    """The class that a config.json names."""
    return str(content.get("_class_name") or next(iter(content.get("architectures") or [""])))


def _complete(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    parsed = parse_as(_CLASSES[_kind(content)].config_class.from_hugging_face, content, file).to_hugging_face()
    # One configuration serves a tower with projection and one without.
    return {**parsed, "architectures": [_kind(content)]} if "architectures" in parsed else dict(parsed)


def _model(content: dict[str, Any], tensors: Mapping[str, Tensor], source: Path) -> FoundModel:
    kind = _kind(content)
    if kind not in _CLASSES:
        raise CheckpointError(f"cannot convert '{source}'", f"it holds a {kind!r}")
    config = parse_as(_CLASSES[kind].config_class.from_hugging_face, content, source / CONFIG_NAME)
    module = unfilled(_CLASSES[kind], config, source / CONFIG_NAME)
    found = fitted(module, tensors, source)
    expect_sound(found, source)
    return FoundModel(kind, content, _complete(content, source), found)


def _tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    pickle = _pickle(folder) if allow_pickle else None
    return load_tensors(folder) if pickle is None else read_pickle(pickle)[0]


def _metadata(folder: Path, allow_pickle: bool) -> dict[str, str]:
    if allow_pickle and _pickle(folder) is not None:
        return {}
    return {name: value for name, value in read_metadata(weight_files(folder)[0]).items() if name != "format"}


def _pickle(folder: Path) -> Path | None:
    """The weights of `torch.save` in a folder without safetensors."""
    if any(folder.glob("*.safetensors*")):
        return None
    return next((folder / name for name in _PICKLES if (folder / name).is_file()), None)
