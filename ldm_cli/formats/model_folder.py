"""A model of a folder in the Hugging Face layout, or of a single file, as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm_cli.config import causes
from ldm_cli.errors import CheckpointError, first_line
from ldm_cli.formats.model_source import has_model_json, load_tensors, read_model_json
from ldm_cli.formats.weight_files import CONFIG_NAME, named, release
from ldm_cli.formats.weight_values import FLOAT8, ValueProblems
from ldm_cli.storage import resolve_model_folder

# Attention of autoencoders written before diffusers 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8)

T = TypeVar("T")
ModuleT_co = TypeVar("ModuleT_co", bound=nn.Module, covariant=True)


class ModelClass(Protocol[ModuleT_co]):
    """A class of models; its argument is the result of `config_class.from_hugging_face(mapping)`."""

    config_class: Any

    def __call__(self, config: Any) -> ModuleT_co:
        """The model with fresh weights."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; errors as in `read_model_json` and `resolve_model_folder`."""
    return read_model_json(resolve_model_folder(folder) / CONFIG_NAME)


def load_model(
    model_class: ModelClass[ModuleT_co],
    folder: Path,
    parse: Callable[[Mapping[str, Any]], Any] | None = None,
    allow_extra: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ModuleT_co:
    """A model folder as a module on the CPU; errors as in `resolve_model_folder` and `load_weights`.

    Args:
        model_class: the class of the module.
        folder: the model folder, or `FILE/PART` of a single file.
        parse: makes the configuration of config.json's content; None: `from_hugging_face`.
        allow_extra: as in `load_weights`.
        dtype: of the weights; each is read in its own type and converted by itself.
    """
    module = _unfilled(model_class, folder, parse)
    load_weights(module, folder, allow_extra=allow_extra, dtype=dtype)
    return module


def outline_model(
    model_class: ModelClass[ModuleT_co],
    folder: Path,
    parse: Callable[[Mapping[str, Any]], Any] | None = None,
    allow_extra: bool = False,
) -> ModuleT_co:
    """The module of `load_model` on the meta device, once the folder's tensors are known to fit it; none is read.

    Arguments and errors are those of `load_model`, but that values may be anything.
    """
    module = _unfilled(model_class, folder, parse)
    fitting_tensors(module, folder, allow_extra)
    return module


def _unfilled(
    model_class: ModelClass[ModuleT_co], folder: Path, parse: Callable[[Mapping[str, Any]], Any] | None
) -> ModuleT_co:
    file = resolve_model_folder(folder) / CONFIG_NAME
    return unfilled(model_class, read_as(parse or model_class.config_class.from_hugging_face, file), file)


def unfilled(model_class: ModelClass[ModuleT_co], config: Any, file: Path) -> ModuleT_co:
    """A module on the meta device, of a configuration that was read from `file`.

    Raises:
        CheckpointError: a tensor would have more bytes than an int64 counts.
    """
    try:
        with without_weights():
            return model_class(config)
    except RuntimeError as error:
        raise CheckpointError(f"cannot use '{file}'", first_line(error)) from error


def read_as(parse: Callable[[Mapping[str, Any]], T], file: Path) -> T:
    """What `parse` makes of a JSON file, such as the `from_hugging_face` of a configuration.

    Errors are those of `read_model_json`, and:

    Raises:
        CheckpointError: the file is of another model, or asks for something that is not implemented.
    """
    return parse_as(parse, read_model_json(file), file)


def parse_as(parse: Callable[[Mapping[str, Any]], T], mapping: Mapping[str, Any], file: Path) -> T:
    """What `parse` makes of the content of a JSON file; errors as in `read_as`."""
    try:
        return parse(mapping)
    except ValidationError as error:
        raise CheckpointError(f"cannot use '{file}'", named(causes(error), "; ")) from error
    except ValueError as error:
        raise CheckpointError(f"cannot use '{file}'", str(error)) from error


def read_image_processor(parse: Callable[[Mapping[str, Any]], T], folder: Path) -> T | None:
    """What `parse` makes of the image processor of a CLIP folder; errors as in `read_as`.

    Transformers 5 writes it into processor_config.json, which has the last word; 4 into preprocessor_config.json. None:
    the folder has neither.
    """
    folder = resolve_model_folder(folder)
    nested = folder / "processor_config.json"
    if has_model_json(nested) and isinstance(read_model_json(nested).get("image_processor"), dict):
        return read_as(lambda content: parse(content["image_processor"]), nested)
    file = folder / "preprocessor_config.json"
    return read_as(parse, file) if has_model_json(file) else None


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules are made on the meta device: no memory is allocated and no weight initialised before it is read."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Skips every initialisation of weights.

    The meta device has no numbers to initialise, and normal numbers on it make torch import its compiler, which takes
    longer than the rest of reading a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def load_weights(
    module: nn.Module, folder: Path, allow_extra: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Give a module the weights of a model folder, in the types of the module; errors as in `load_tensors`.

    Known other spellings of the names are understood: with or without `text_model.`, attention names of old
    autoencoders, the `position_ids` buffer. A module on the meta device is brought to the CPU.

    Args:
        module: has the parameter names of the format.
        allow_extra: the folder may hold more than the module has (a CLIPModel, for its text tower).
        dtype: of a module on the meta device.

    Raises:
        CheckpointError: tensors are not finite, or zeros; or as in `fitting_tensors`.
    """
    expected = module.state_dict()
    tensors = fitting_tensors(module, folder, allow_extra)
    converted: dict[str, Tensor] = {}
    problems = ValueProblems()
    for name, tensor in tensors.items():
        problems.look_at(name, tensor)
        # A copy: a tensor that lies in the mapped file at any offset may take another path through a BLAS than an
        # aligned one, and results would hang on the layout of the file.
        wanted = dtype if expected[name].is_meta else expected[name].dtype
        converted[name] = tensor.to(wanted, copy=True)
        release(tensor)
    problems.expect_none(folder)
    module.load_state_dict(converted, assign=any(value.is_meta for value in expected.values()))


def fitting_tensors(module: nn.Module, folder: Path, allow_extra: bool = False) -> dict[str, Tensor]:
    """The tensors of a model folder under the module's names; they are mapped, and none is read yet.

    Args:
        module: may be on the meta device.
        allow_extra: as in `load_weights`.

    Raises:
        CheckpointError: float8 weights have scales; or as in `check_tensors`, `load_tensors`.
    """
    return fitted(module, load_tensors(folder), folder, allow_extra)


def fitted(
    module: nn.Module, tensors: Mapping[str, Tensor], folder: Path, allow_extra: bool = False
) -> dict[str, Tensor]:
    """The tensors of a folder under the module's names; arguments and errors as in `fitting_tensors`."""
    expected = module.state_dict()
    tensors = _in_names_of(expected, tensors)
    if scales := _float8_scales(expected, tensors):
        cause = f"float8 weights with scales are not supported: {named(scales)}"
        raise CheckpointError(f"cannot use the tensors in '{folder}'", cause, "convert them to fp16")
    if allow_extra:
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
    check_tensors(expected, tensors, folder)
    return tensors


def _float8_scales(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that lie beside a float8 weight and scale it."""
    layers = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.dtype in FLOAT8}
    parts = [(name, *name.rpartition(".")[::2]) for name in tensors if name not in expected]
    return [name for name, layer, last in parts if layer in layers and "scale" in last and last != "logit_scale"]


def _in_names_of(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the module uses, as far as they are known spellings of them."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids") and name not in expected:
            continue
        known = (n for n in _spellings(name) if n in expected and (n == name or n not in tensors))
        renamed[next(known, name)] = tensor
    return renamed


def _spellings(name: str) -> Iterable[str]:
    yield name
    yield f"text_model.{name}"
    yield name.removeprefix("text_model.")
    head, _, last = name.rpartition(".")
    head, _, layer = head.rpartition(".")
    if layer in _OLD_ATTENTION:
        yield f"{head}.{_OLD_ATTENTION[layer]}.{last}"


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Make sure that `tensors`, read from `source`, are those that `expected` wants, with its shapes.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or not of a floating-point type that is read;
            up to five are named.
    """
    problems = [f"missing: {named(missing)}"] if (missing := [n for n in expected if n not in tensors]) else []
    if extra := [n for n in tensors if n not in expected]:
        problems.append(f"unexpected: {named(extra)}")
    shapes = {n: (list(t.shape), list(expected[n].shape)) for n, t in tensors.items() if n in expected}
    if wrong := [f"{n} is {found}, not {wanted}" for n, (found, wanted) in shapes.items() if found != wanted]:
        problems.append(f"of another shape: {named(wrong)}")
    types = {n: t.dtype for n, t in tensors.items() if n in expected and expected[n].is_floating_point()}
    if strange := [f"{n} is {str(dtype).removeprefix('torch.')}" for n, dtype in types.items() if dtype not in _FLOATS]:
        problems.append(f"of an unsupported type: {named(strange)}")
    if problems:
        remedy = "check that the configuration belongs to them"
        raise CheckpointError(f"the tensors in '{source}' do not fit", "; ".join(problems), remedy)
