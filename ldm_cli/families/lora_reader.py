"""Files of adapters, read: in the layouts of kohya, LyCORIS, diffusers old and new, PEFT and lora_diffusion."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from ldm_cli.config import causes
from ldm_cli.core.low_rank import Hadamard, Kronecker, LowRank, WeightUpdate
from ldm_cli.errors import CheckpointError
from ldm_cli.formats.embedding_file import words_beside
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.lora_names import Adaptable, ModuleNames, Target
from ldm_cli.formats.lora_path import PEFT_CONFIG, PEFT_WEIGHTS, lora_file
from ldm_cli.formats.single_file_names import THIRDS, Form, rows_of
from ldm_cli.formats.weight_files import named, read_metadata, read_tensors
from ldm_cli.formats.weight_values import expect_finite

Adapters = dict[str, dict[str, WeightUpdate]]
"""Component → path of a module in it → its update."""

_PEFT_TYPES = ("LORA", "LOHA", "LOKR")
# How the names of tensors end, and what such a tensor is; what precedes names the module.
_ROLES = {
    "down": r"\.lora_down\.weight|\.lora_A(?:\.default)?\.weight|\.lora\.down\.weight|"
    r"\.lora_linear_layer\.down\.weight|(?<=_lora)\.down\.weight|:down",
    "up": r"\.lora_up\.weight|\.lora_B(?:\.default)?\.weight|\.lora\.up\.weight|"
    r"\.lora_linear_layer\.up\.weight|(?<=_lora)\.up\.weight|:up",
    "alpha": r"\.alpha",
    "magnitude": r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    **{name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: rf"\.{name}" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}
_NAMES = re.compile(r"(?P<module>.+?)(?:" + "|".join(f"(?P<{role}>{end})" for role, end in _ROLES.items()) + ")")


class _Scales(BaseModel):
    """Ranks and alphas of PEFT's configuration, for modules whose tensors do not say theirs."""

    r: PositiveInt | None = None
    rank_pattern: dict[re.Pattern[str], PositiveInt] | None = None
    lora_alpha: FiniteFloat | None = None
    alpha: FiniteFloat | None = None
    alpha_pattern: dict[re.Pattern[str], FiniteFloat] | None = None
    use_rslora: bool | None = None

    def rank_of(self, module: str) -> int | None:
        found = _matching(self.rank_pattern, module)
        return self.r if found is None else int(found)

    def alpha_of(self, module: str, rank: int) -> float:
        """What is divided by the rank to give the scale; without a configuration the rank."""
        for alpha in (_matching(self.alpha_pattern, module), self.lora_alpha, self.alpha):
            if alpha is not None:
                return alpha * (rank**0.5 if self.use_rslora else 1.0)
        return float(rank)


def _matching(patterns: Mapping[re.Pattern[str], float] | None, module: str) -> float | None:
    found = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key.pattern})", module))
    return next(found, None)


def read_lora(path: Path, models: Mapping[str, Adaptable]) -> Adapters:
    """The adapters in a file, or in a folder of diffusers or PEFT, in the types that they have, on the CPU.

    Args:
        path: as in `lora_file`.
        models: those that may be adapted, by component, the denoiser first.

    Raises:
        InputNotFoundError: as in `lora_file`.
        CheckpointError: it is damaged, of a kind that is not supported, or does not fit the models.
    """
    file = lora_file(path)
    tensors = read_tensors(file)
    expect_finite(tensors, path)
    words = words_beside(tensors, file)
    parts = _by_module({name: tensor for name, tensor in tensors.items() if name not in words}, path)
    if zero := [name for name, roles in parts.items() if not any(bool(tensor.any()) for tensor in roles.values())]:
        raise CheckpointError(f"cannot use '{path}'", f"nothing but zeros: {named(zero)}", "download or save it again")
    names, configs = ModuleNames(models), _peft_configs(file, models)
    adapters: Adapters = {}
    unknown, misfits = [], []
    for name, roles in parts.items():
        targets = names.targets(name)
        if not targets:
            unknown.append(name)
        for target in targets:
            weight = models[target.component].weight(target.module)
            update = _update(name, roles, target, weight, configs[target.component], path)
            if not _fits(found := _shape(update, name, path), expected := weight.shape):
                misfits.append(f"{name} is for {[*found]}, not {[*expected]}")
            if target.module in adapters.setdefault(target.component, {}):
                raise CheckpointError(f"cannot use '{path}'", f"it has two updates of {target.module}")
            adapters[target.component][target.module] = update
    problems = [f"no such module: {named(unknown)}"] if unknown else []
    problems += [f"of another shape: {named(misfits)}"] if misfits else []
    if problems:
        raise CheckpointError(f"the adapters in '{path}' do not fit the model", "; ".join(problems))
    return adapters


def _shape(update: WeightUpdate, name: str, path: Path) -> torch.Size:
    """That of the update, which is not computed."""
    try:
        return update.to(torch.device("meta")).delta().shape
    except RuntimeError:
        raise _misshapen(name, path) from None


def _fits(found: torch.Size, expected: torch.Size) -> bool:
    """Whether the shapes are equal, where a matrix may stand for a kernel, and a kernel of one pixel for a matrix."""
    is_same_kernel = len(found) == 2 or found[2:] == (expected[2:] or (1, 1))
    return is_same_kernel and math.prod(found) == expected.numel() and found[0] == expected[0]


def _misshapen(name: str, path: Path) -> CheckpointError:
    return CheckpointError(f"cannot use '{path}'", f"the tensors of {name} do not fit each other")


def _by_module(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by their role."""
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        found = _NAMES.fullmatch(name)
        if found is None:
            strange.append(name)
        elif not _may_be(role := str(found.lastgroup), tensor):
            raise _misshapen(found["module"], path)
        else:
            roles = parts.setdefault(found["module"], {})
            if role in roles or {role, *roles} >= {"magnitude", "dora_scale"}:
                raise CheckpointError(f"cannot use '{path}'", f"'{name}' is the second of its kind")
            roles[role] = tensor
    if not tensors:
        raise CheckpointError(f"cannot use '{path}'", "it holds no tensors")
    if strange:
        cause = f"tensors of no supported kind of adapter: {named(strange)}"
        raise CheckpointError(f"cannot use '{path}'", cause, "LoRA, DoRA, LoHa and LoKr are read")
    return parts


def _may_be(role: str, tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a type that its role may have."""
    if role == "alpha":
        return tensor.numel() == 1
    if role in ("magnitude", "dora_scale"):
        return tensor.ndim > 0 and tensor.is_floating_point()
    may_be_kernel = role in ("down", "up") or role.startswith("lokr_w2")
    return (
        (tensor.ndim == 2 or (tensor.ndim == 4 and may_be_kernel)) and tensor.numel() > 0 and tensor.is_floating_point()
    )


def _peft_configs(file: Path, models: Mapping[str, Adaptable]) -> dict[str, _Scales]:
    """PEFT's configuration of each component, from the file beside it or from its metadata."""
    if file.name == PEFT_WEIGHTS:
        config = read_json(file.with_name(PEFT_CONFIG))
        if (kind := config.get("peft_type")) not in _PEFT_TYPES:
            cause = f"adapters of PEFT's type {kind} are not supported"
            raise CheckpointError(f"cannot use '{file.parent}'", cause, f"{', '.join(_PEFT_TYPES)} are read")
        return dict.fromkeys(models, _scales(config, file))
    text = read_metadata(file).get("lora_adapter_metadata", "{}")
    try:
        flat = dict(json.loads(text))
    except (ValueError, TypeError):
        raise CheckpointError(f"cannot use '{file}'", "lora_adapter_metadata is no JSON object") from None
    return {component: _scales(_below(f"{component}.", flat), file) for component in models}


def _below(prefix: str, flat: Mapping[str, object]) -> dict[str, object]:
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _scales(config: Mapping[str, object], file: Path) -> _Scales:
    try:
        return _Scales.model_validate(config)
    except ValidationError as error:
        raise CheckpointError(f"cannot use '{file}'", f"its PEFT configuration: {'; '.join(causes(error))}") from None


def _update(
    name: str, roles: Mapping[str, Tensor], target: Target, weight: Tensor, scales: _Scales, path: Path
) -> WeightUpdate:
    """The update of one module from the tensors that a file has for it."""
    tensors = dict(roles)
    if (alpha := tensors.pop("alpha", None)) is not None:
        scales = _Scales(r=scales.rank_of(target.module), lora_alpha=float(alpha))
    magnitude = _magnitude(tensors, target, weight, name, path)
    if (make := _KINDS.get(frozenset(tensors))) is None:
        cause = f"the tensors of {name} are incomplete or of several kinds: {named(list(roles))}"
        raise CheckpointError(f"cannot use '{path}'", cause)
    try:
        update = make(tensors, target.module, scales, weight)
    except RuntimeError:
        raise _misshapen(name, path) from None
    update = replace(update, magnitude=magnitude)  # type: ignore[type-var]
    return _with_rows(update, target.form, name, path) if target.form in ("swapped", *THIRDS) else update


def _magnitude(tensors: dict[str, Tensor], target: Target, weight: Tensor, name: str, path: Path) -> Tensor | None:
    """The norms of DoRA [O], taken out of `tensors`."""
    found = tensors.pop("magnitude", None)
    if (scale := tensors.pop("dora_scale", None)) is not None:
        if scale.shape[0] != scale.numel():
            cause = f"the DoRA of {name} has norms of columns, as old versions of LyCORIS wrote them"
            raise CheckpointError(f"cannot use '{path}'", cause, "norms of rows are supported")
        found = scale
    rows = len(weight) * (3 if target.form in THIRDS else 1)
    if found is not None and found.numel() != rows:
        raise CheckpointError(f"cannot use '{path}'", f"{name} has {found.numel()} norms for {rows} rows")
    return None if found is None else found.flatten()


def _low_rank(tensors: Mapping[str, Tensor], module: str, scales: _Scales, weight: Tensor) -> WeightUpdate:
    return LowRank(tensors["down"], tensors["up"], scales.alpha_of(module, len(tensors["down"])))


def _hadamard(tensors: Mapping[str, Tensor], module: str, scales: _Scales, weight: Tensor) -> WeightUpdate:
    alpha = scales.alpha_of(module, len(tensors["hada_w1_b"]))
    return Hadamard(tensors["hada_w1_b"], tensors["hada_w1_a"], tensors["hada_w2_b"], tensors["hada_w2_a"], alpha)


def _kronecker(tensors: Mapping[str, Tensor], module: str, scales: _Scales, weight: Tensor) -> WeightUpdate:
    """LyCORIS scales by alpha / R where the file shows R, in a factor of two parts, and else by 1; PEFT always."""
    factors = []
    ranks = [] if (rank := scales.rank_of(module)) is None else [rank]
    for number in "12":
        if (whole := f"lokr_w{number}") in tensors:
            factors.append(tensors[whole])
        else:
            first, second = tensors[f"{whole}_a"], tensors[f"{whole}_b"]
            ranks.append(len(second))
            factors.append(first.float() @ second.float().flatten(1))
    left, right = factors
    if weight.ndim == 4 and weight.shape[1] % left.shape[1] == 0 and right.ndim == 2:
        right = right.view(len(right), -1, *weight.shape[2:])
    scale = scales.alpha_of(module, ranks[-1]) / ranks[-1] if ranks else 1.0
    return Kronecker(left, right, scale)


_Make = Callable[[Mapping[str, Tensor], str, _Scales, Tensor], WeightUpdate]
_KINDS: dict[frozenset[str], _Make] = {
    frozenset({"down", "up"}): _low_rank,
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): _hadamard,
    **{
        frozenset({*left, *right}): _kronecker
        for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    },
}


def _with_rows(update: WeightUpdate, form: Form, name: str, path: Path) -> WeightUpdate:
    """The update of those rows of a file's module that are ours: exact.

    An update of queries, keys and values that is a block for each, as `write_lora` makes of three, gives the block.
    """
    if not isinstance(update, LowRank):
        raise CheckpointError(f"cannot use '{path}'", f"{name} has other rows than modules of ours, for LoRA alone")
    magnitude = None if update.magnitude is None else rows_of(update.magnitude, form)
    own = replace(update, up=rows_of(update.up, form), magnitude=magnitude)
    if form not in THIRDS or update.rank % 3:
        return own
    blocks = [rows_of(own.up.T, third) for third in THIRDS]
    if any(block.any() for third, block in zip(THIRDS, blocks, strict=True) if third != form):
        return own
    block = blocks[THIRDS.index(form)].T
    return replace(own, down=rows_of(update.down, form), up=block, alpha=update.alpha / 3)
