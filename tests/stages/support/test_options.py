"""What `--device` decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ldm_cli.recipe.schema import TrainVaeRecipe
from ldm_cli.stages.support.options import RunOptions, resolve_device, with_precision
from ldm_cli.stages.support.training_run import _compute_alike


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch says that it has a CUDA device; what is set for it is taken back."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)


def recipe(**train: object) -> TrainVaeRecipe:
    return TrainVaeRecipe.from_mapping(
        {
            "command": "train-vae",
            "name": "tiny",
            "data": {"shards": "a.tar", "image_size": 32},
            "train": {"steps": 1, "batch_size": 1, **train},
            "vae": {},
        }
    )


@pytest.mark.usefixtures("cuda")
def test_precision_is_that_of_the_recipe_or_else_of_the_device() -> None:
    def found(device: str, **train: object) -> str | None:
        return with_precision(recipe(**train), RunOptions(device=device)).train.precision

    assert (found("cpu"), found("cuda"), found("auto")) == ("fp32", "bf16", "bf16")
    assert found("cuda", precision="fp16") == "fp16"
    assert found("cpu", precision="bf16") == "bf16"


@pytest.mark.usefixtures("cuda")
def test_float32_is_multiplied_in_tf32_on_cuda_alone() -> None:
    resolve_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    resolve_device("cuda")
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("cuda")
def test_elastic_takes_deterministic_kernels_on_cuda() -> None:
    _compute_alike(torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
