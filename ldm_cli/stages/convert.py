"""`ldm convert`: model folders to single files and back, to another type of numbers, in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_cli.core.precision import DTYPES
from ldm_cli.data.tokenizer_files import MOST_TOKENIZER_BYTES
from ldm_cli.errors import CheckpointError, InputNotFoundError, OutputError, UsageError
from ldm_cli.evaluation.inception_features import inception_tensors
from ldm_cli.evaluation.perceptual_distance import lpips_tensors
from ldm_cli.families.ip_adapter import is_ip_adapter
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.hub import model_path
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_source import outside_file, split_at_file
from ldm_cli.formats.pipeline_folder import INDEX_NAME, SCHEDULER_FILE, TOKENIZER, TRANSFORMER
from ldm_cli.formats.save_model import save_sharded
from ldm_cli.formats.single_file import CONFIGS_KEY, as_single_file
from ldm_cli.formats.weight_files import (
    CONFIG_NAME,
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    is_pickle,
    named,
    read_pickle,
    write_tensors,
)
from ldm_cli.formats.weight_values import is_finite
from ldm_cli.manifest import read_listed
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.convertible import (
    FoundModel,
    FoundModels,
    read_file,
    read_folder,
    text_encoders_beside,
    tokenizer_files,
)
from ldm_cli.stages.support.folded_projection import without_projection
from ldm_cli.stages.support.joined_prior import joined_with_prior
from ldm_cli.stages.support.merged_adapters import merged
from ldm_cli.stages.support.modelspec import modelspec, published_name
from ldm_cli.storage import TEMPORARY_PREFIX, storage_errors

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class ConvertOptions:
    """What to read of the source, and how to write it."""

    dtype: str | None = None
    """`fp32`, `fp16` or `bf16`; None: as in the source."""
    shard_bytes: int | None = None
    """Most bytes in a file of a folder; None: one file for each model."""
    config: Path | None = None
    """Folder whose configurations a single file has; None: as its metadata say, or its shapes tell."""
    tokenizer: Path | None = None
    """Folder of a tokenizer, or of a pipeline with tokenizers; or a name on the hub."""
    prediction_type: str | None = None
    """`epsilon` or `v_prediction`; None: as the source says."""
    ema: bool = False
    """Take the averaged weights of a single file's U-Net."""
    allow_pickle: bool = False
    """Read files of `torch.save`."""
    overwrite: bool = False
    """Replace what is there."""
    lpips_heads: Path | None = None
    """Published heads of LPIPS, for a source that is a classifier of torchvision."""
    variant: str | None = None
    """`fp16` or `bf16`: which weights of a model on the hub; None: those in full precision."""
    loras: tuple[tuple[Path, float], ...] = ()
    """Files of adapters and their weights, which become part of the model."""
    prior: Path | None = None
    """A prior, which the source, a decoder of image embeddings, is joined to."""


def run(source: Path, out: Path, options: ConvertOptions, reporter: Reporter) -> dict[str, Any]:
    """Convert a model.

    Args:
        source: a folder, a run, a single file, or a name on the hub.
        out: a file if its name ends in `.safetensors`, else a folder.
        options: see there.
        reporter: receives the progress of downloads.

    Returns:
        `out`, `models` (class by subfolder), `parameters`, `bytes` and `opens_in`; `recognised_by`, `left_out` and
        `metadata` where there are any.

    Raises:
        UsageError: an option does not apply.
        InputNotFoundError, CheckpointError: the source is missing, unknown, damaged or asks for more.
        UnavailableError: the hub cannot be reached.
        OutputError, StorageError: `out` exists, or cannot be written.
    """
    is_file = out.suffix == ".safetensors"
    if is_file and options.shard_bytes is not None:
        raise UsageError("--shard-size is for folders", f"'{out}' is one file", "leave it out, or give a folder")
    if not is_file and out.suffix in _PICKLE_SUFFIXES:
        raise UsageError(f"cannot write '{out}'", "pickles are not written", "give a name that ends in .safetensors")
    if out.exists() and not options.overwrite:
        raise OutputError(f"'{out}' exists", remedy="choose another place, or give --overwrite")
    is_replaced = out.is_file() if is_file else any((out / name).is_file() for name in (INDEX_NAME, CONFIG_NAME))
    if out.exists() and not is_replaced:
        kind = "file" if is_file else "model folder"
        raise OutputError(f"'{out}' is no {kind}", "--overwrite replaces only those", "choose another place")
    source = model_path(str(source), (), options.variant, reporter)
    if is_file and (network := _pickled_network(source, options)) is not None:
        kind, weights, programs = network
        write_tensors(out, weights, {})
        return _result(out, {"model": kind}, weights.values()) | {"opens_in": programs}
    if options.prior is not None:
        return _join(source, out, options, reporter)
    models = _changed(merged(_read(source, options), options.loras, options.dtype), options)
    if is_file:
        models = without_projection(models)
        metadata = _write_file(models, out)
    else:
        metadata = models.metadata
        models = text_encoders_beside(source, models)
        complete = _with_tokenizers(models, source, options, reporter)
        _write_folder(out, partial(_fill, complete, shard_bytes=options.shard_bytes))
    tensors = [tensor for model in models.models.values() for tensor in model.tensors.values()]
    kinds = {name or "model": model.kind for name, model in models.models.items()}
    found = {
        "recognised_by": models.recognised_by,
        "left_out": named(models.left_out),
        "metadata": {name: value for name, value in metadata.items() if name != CONFIGS_KEY},
    }
    return (
        _result(out, kinds, tensors)
        | {name: value for name, value in found.items() if value}
        | {"opens_in": _programs(models, is_file)}
    )


def _result(out: Path, kinds: dict[str, str], tensors: Collection[Tensor]) -> dict[str, Any]:
    return {
        "out": str(out),
        "models": kinds,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }


def _join(source: Path, out: Path, options: ConvertOptions, reporter: Reporter) -> dict[str, Any]:
    """Write the whole unCLIP model of a decoder and a prior."""
    given = ConvertOptions(prior=options.prior, variant=options.variant, overwrite=options.overwrite)
    if out.suffix == ".safetensors" or options != given:
        raise UsageError("--prior makes a folder of both models", remedy="give no other option, and a folder as OUT")
    joined = joined_with_prior(source, model_path(str(options.prior), (), options.variant, reporter))
    _write_folder(out, joined.save)
    networks = joined.networks
    weights = [parameter for network in networks.values() for parameter in network.parameters()]
    kinds = {name: type(network).__name__ for name, network in networks.items()}
    return _result(out, kinds, weights) | {"opens_in": ["ldm", f"diffusers {joined.pipeline}.from_pretrained"]}


def _pickled_network(source: Path, options: ConvertOptions) -> tuple[str, dict[str, Tensor], str] | None:
    """Name, tensors and users of an IP-Adapter, FID's Inception network or LPIPS, if the source is its file."""
    if not (options.allow_pickle and source.is_file() and is_pickle(source)):
        return None
    tensors, _ = read_pickle(source)
    if "Mixed_5b.branch1x1.conv.weight" in tensors:
        return "InceptionV3", inception_tensors(tensors, source), "ldm compare, ldm eval"
    if is_ip_adapter(tensors):
        return "IP-Adapter", tensors, "ldm sample --ip-adapter, diffusers load_ip_adapter"
    if options.lpips_heads is not None:
        heads, _ = read_pickle(options.lpips_heads)
        return "LPIPS", lpips_tensors({**tensors, **heads}, source), "ldm eval"
    return None


def _read(source: Path, options: ConvertOptions) -> FoundModels:
    """The models of a source, all or the one that its path names."""
    path = resolve_model(source)
    found = split_at_file(path)
    if found is None:
        if options.ema or options.config is not None:
            raise UsageError("--ema and --config are for single files", f"'{path}' is a folder", "leave them out")
        return read_folder(path, allow_pickle=options.allow_pickle)
    file, inside = found
    models = read_file(file, config=options.config, ema=options.ema, allow_pickle=options.allow_pickle)
    if inside == Path():
        is_alone = len(models.models) == 1
        return replace(models, models={"": next(iter(models.models.values()))}) if is_alone else models
    if str(inside) not in models.models:
        raise InputNotFoundError(f"no '{inside}' in '{file}'", f"it holds {', '.join(models.models)}")
    return replace(models, models={"": models.models[str(inside)]}, json_files={}, metadata={})


def _with_tokenizers(models: FoundModels, source: Path, options: ConvertOptions, reporter: Reporter) -> FoundModels:
    """The models with the tokenizers that the options name, or that a pipeline needs and does not hold."""
    index = models.json_files.get(INDEX_NAME, {})
    needed = [name for name, kind in index.items() if name.startswith(TOKENIZER) and kind[1] is not None]
    if options.tokenizer is None and (models.companions or not needed):
        return models
    given = options.config
    if options.tokenizer is not None:
        given = model_path(str(options.tokenizer), needed or [TOKENIZER], None, reporter)
    companions = dict(models.companions)
    for name in needed or [""]:
        companions |= tokenizer_files(outside_file(source, name) if given is None else given, name)
    return replace(models, companions=companions)


def _changed(models: FoundModels, options: ConvertOptions) -> FoundModels:
    """The models in the type, and with the prediction, that the options name."""
    json_files = dict(models.json_files)
    if options.prediction_type is not None:
        if str(SCHEDULER_FILE) not in json_files or TRANSFORMER in models.models:
            raise UsageError("--prediction-type is for whole pipelines with a U-Net", remedy="leave it out")
        scheduler = json_files[str(SCHEDULER_FILE)] | {"prediction_type": options.prediction_type}
        json_files[str(SCHEDULER_FILE)] = scheduler
    changed = {name: _retyped(model, options.dtype) for name, model in models.models.items()}
    return replace(models, models=changed, json_files=json_files)


def _retyped(model: FoundModel, dtype: str | None) -> FoundModel:
    tensors = model.tensors
    if dtype is not None:
        tensors = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors.items()}
        if infinite := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
            raise CheckpointError(f"not finite in {dtype}: {named(infinite)}", remedy="give --dtype bf16 or fp32")
    elif small := [name for name, tensor in tensors.items() if tensor.element_size() == 1]:
        raise CheckpointError(f"float8 weights: {named(small)}", remedy="give --dtype fp16, bf16 or fp32")
    found = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    names = {name: found for name in ("dtype", "torch_dtype") if name in model.content}
    return replace(model, tensors=tensors, content=model.content | names)


def _write_file(models: FoundModels, out: Path) -> dict[str, str]:
    """Write a single file; returns its metadata."""
    parts = {name: (model.complete, model.tensors) for name, model in models.models.items()}
    tensors = as_single_file(parts)
    configs = {str(Path(name, CONFIG_NAME)): model.complete for name, model in models.models.items()}
    metadata = models.metadata | modelspec(models, out.stem) | {CONFIGS_KEY: json.dumps(configs | models.json_files)}
    with storage_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(out, tensors, metadata)
    return metadata


def _write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder, which appears whole or not at all."""
    temporary = out.with_name(TEMPORARY_PREFIX + out.name)
    with storage_errors(out):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            fill(temporary)
            if out.exists():
                shutil.rmtree(out)
            temporary.rename(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _fill(models: FoundModels, folder: Path, *, shard_bytes: int | None) -> None:
    metadata = models.metadata  # of the first model, which is the denoiser of a pipeline
    for name, model in models.models.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / CONFIG_NAME, model.content)
        weights = DIFFUSERS_WEIGHTS if "_class_name" in model.content else TRANSFORMERS_WEIGHTS
        save_sharded(folder / name, model.tensors, weights, metadata, shard_bytes)
        metadata = {}
    for path, content in models.json_files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / path, content)
    for path, file in models.companions.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(read_listed(file, MOST_TOKENIZER_BYTES))


def _programs(models: FoundModels, is_file: bool) -> list[str]:
    """The programs that open what was written."""
    kind = next(iter(models.models.values())).kind
    index = models.json_files.get(INDEX_NAME)
    name = kind if index is None else str(index.get("_class_name"))
    library = "transformers" if name.startswith(("CLIP", "T5")) else "diffusers"
    if not is_file:
        return ["ldm", f"{library} {name}.from_pretrained"]
    if library == "transformers":
        return ["ldm", "open_clip" if kind == "CLIPModel" else "ComfyUI"]
    is_known = published_name(models) is not None
    theirs = f"diffusers {name}.from_single_file" + ("" if is_known or index is None else ", with config=FOLDER")
    return ["ldm", theirs, *(["ComfyUI", "AUTOMATIC1111"] if is_known else [])]
