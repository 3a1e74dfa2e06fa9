"""Files of adapters, written: low-rank updates of the weights of one or more components of a pipeline."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ldm_cli.core.low_rank import LowRank
from ldm_cli.formats.lora_names import kohya_prefix
from ldm_cli.formats.single_file_names import THIRDS, Form, Table, place_of, rows_of
from ldm_cli.formats.weight_files import write_tensors
from ldm_cli.storage import storage_errors


def write_lora(
    path: Path,
    adapters: Mapping[str, Mapping[str, LowRank]],
    layout: Literal["diffusers", "kohya"],
    metadata: Mapping[str, str],
    tables: Mapping[str, Table] | None = None,
) -> None:
    """Write adapters as one safetensors file; the tensors keep their types.

    diffusers knows no alpha: there it becomes part of `up`. A kohya file has an `.alpha` for each module, and the
    metadata that its name, ranks and content give.

    Args:
        path: the file; `pytorch_lora_weights.safetensors` in a folder of its own is what diffusers looks for. Parents
            are made.
        adapters: component (`unet`, `text_encoder`, `text_encoder_2`, …) → path of a module in it → its update.
        layout: of names and scales.
        metadata: further text. For kohya: at least `ss_base_model_version` and `modelspec.architecture`.
        tables: of the components whose modules kohya's files name as single files do.

    Raises:
        OutputError, StorageError: writing failed.
    """
    tensors: dict[str, Tensor] = {}
    for component, updates in adapters.items():
        if layout == "kohya" and component in (tables or {}):
            updates = _as_in_single_file(updates, (tables or {})[component])
        for module, update in updates.items():
            named = _diffusers(component, module, update)
            if layout == "kohya":
                named = _kohya(kohya_prefix(component, adapters), module, update)
            tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    if layout == "kohya":
        found = [update for updates in adapters.values() for update in updates.values()]
        metadata = {**_kohya_metadata(path.stem, found, tensors), **metadata}
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, metadata)


def _as_in_single_file(updates: Mapping[str, LowRank], table: Table) -> dict[str, LowRank]:
    """Updates of the modules of a single file, in which one module holds queries, keys and values.

    Magnitudes of some of these three alone cannot be written so: such modules keep their names.
    """
    renamed: dict[str, LowRank] = {}
    three: dict[str, dict[Form, str]] = {}
    for module, update in updates.items():
        place = place_of(f"{module}.weight", table)
        if place is None:
            renamed[module] = update
        elif place.form in THIRDS:
            three.setdefault(place.path.removesuffix(".weight"), {})[place.form] = module
        else:
            magnitude = None if update.magnitude is None else rows_of(update.magnitude, place.form)
            changed = replace(update, up=rows_of(update.up, place.form), magnitude=magnitude)
            renamed[place.path.removesuffix(".weight")] = changed
    for name, modules in three.items():
        own = {form: updates[module] for form, module in modules.items()}
        if len(own) < len(THIRDS) and any(update.magnitude is not None for update in own.values()):
            renamed |= {module: updates[module] for module in modules.values()}
        else:
            renamed[name] = _stacked(own)
    return renamed


def _stacked(updates: Mapping[Form, LowRank]) -> LowRank:
    """One update of all rows, Δ = diag(B_q, B_k, B_v) · (A_q, A_k, A_v); what is absent is zeros."""
    first, rank = next(iter(updates.values())), max(update.rank for update in updates.values())
    rows, scale = len(first.up), first.alpha / first.rank
    down, up = first.down.new_zeros(3 * rank, first.down.shape[1]), first.up.new_zeros(3 * rows, 3 * rank)
    for form, update in updates.items():
        at, own = THIRDS.index(form), update.alpha / update.rank
        rest = range(at * rank, at * rank + update.rank)
        down[rest.start : rest.stop] = update.down
        up[at * rows : (at + 1) * rows, rest.start : rest.stop] = update.up * (own / scale)
    norms = [updates[form].magnitude for form in THIRDS if form in updates]
    magnitude = torch.cat([norm for norm in norms if norm is not None]) if norms[0] is not None else None
    return LowRank(down, up, 3 * rank * scale, magnitude)


def _diffusers(component: str, module: str, update: LowRank) -> dict[str, Tensor]:
    name, scale = f"{component}.{module}", update.alpha / update.rank
    up = update.up if scale == 1 else (update.up.float() * scale).to(update.up.dtype)
    tensors = {f"{name}.lora_A.weight": update.down, f"{name}.lora_B.weight": up}
    if update.magnitude is not None:
        is_convolution = update.down.ndim == 4
        magnitude = update.magnitude.view(1, -1, 1, 1) if is_convolution else update.magnitude
        # Transformers 5 passes over the name without `.weight`.
        tensors[f"{name}.lora_magnitude_vector.weight"] = magnitude
    return tensors


def _kohya(prefix: str, module: str, update: LowRank) -> dict[str, Tensor]:
    name = f"{prefix}_{module.replace('.', '_')}"
    alpha = update.down.new_tensor(update.alpha)
    tensors = {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up, f"{name}.alpha": alpha}
    if update.magnitude is not None:
        tensors[f"{name}.dora_scale"] = update.magnitude.view(-1, *[1] * (update.down.ndim - 1))
    return tensors


def _kohya_metadata(name: str, updates: list[LowRank], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What web interfaces show: the commonest rank and alpha, and the hash of the content."""
    [((rank, alpha), _)] = Counter((update.rank, update.alpha) for update in updates).most_common(1)
    content = save(dict(tensors))
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    sha256 = hashlib.sha256(payload).hexdigest()
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": name,
        "sshs_model_hash": sha256,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.hash_sha256": f"0x{sha256}",
    }
