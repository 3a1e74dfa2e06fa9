"""Values that no training writes are refused; those that it does write are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_cli.errors import CheckpointError
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.weight_values import expect_sound, is_finite
from tests.sampling.tiny import tiny_pipeline


def test_a_matrix_of_zeros_is_refused_by_name(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    save_file(state | {"1.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"nothing but zeros: 1\.weight"):
        load_weights(layer, tmp_path)
    save_file(state | {"1.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    load_weights(layer, tmp_path)


def test_layers_that_begin_as_zeros_may_be_zeros() -> None:
    names = ("conv_out.weight", "a.conv2.weight", "b.proj_out.weight", "norm1.linear.weight")
    expect_sound({name: torch.zeros(2, 2) for name in names}, Path("x"))
    expect_sound({"position_ids": torch.zeros(1, 1, dtype=torch.int64), "none": torch.zeros(0, 2)}, Path("x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_found_in_every_type(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 2, 12).to(dtype)
    assert is_finite(tensor)
    for bad in (torch.nan, torch.inf, -torch.inf):
        if dtype == torch.float8_e4m3fn and bad != torch.nan:
            continue  # it has no infinity
        changed = tensor.float()
        changed[5] = bad
        assert not is_finite(changed.to(dtype))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_foreign_model_whose_file_is_filled_with_zeros_is_refused(part: str, tmp_path: Path) -> None:
    tiny_pipeline().family.save(tmp_path)
    (file,) = (tmp_path / part).glob("*.safetensors")
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for begin in (start, start + (len(data) - start) // 2):
        file.write_bytes(data[:begin] + bytes(len(data) - begin))
        with pytest.raises(CheckpointError, match="nothing but zeros"):
            open_family(tmp_path)
    file.write_bytes(data)
    open_family(tmp_path)
    assert load_file(file)
