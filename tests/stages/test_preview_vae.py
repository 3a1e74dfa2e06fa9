"""Previews may be decoded by another autoencoder; the pictures never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.core.models.autoencoder_tiny_config import AutoencoderTinyConfig
from ldm_cli.errors import InputNotFoundError, UsageError
from ldm_cli.formats.save_model import save_model
from ldm_cli.pictures.images import read_image
from ldm_cli.pictures.sheets import Sheets
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.sample import run
from ldm_cli.stages.support.options import RunOptions
from tests.sampling.tiny import randomize, tiny_pipeline


def tiny_autoencoder(folder: Path, **fields: Any) -> Path:
    sides = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    model = randomize(AutoencoderTiny(AutoencoderTinyConfig(**{**sides, **blocks, **fields})), 9)
    save_model(folder, model.state_dict(), model.config.to_hugging_face())
    return folder


def pictures(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Tensor, list[Tensor]]:
    """The picture of a job, and its previews."""
    previews: list[Tensor] = []
    monkeypatch.setattr(Sheets, "write_preview", lambda self, images: previews.append(images))
    sampling = {"steps": 3, "images_per_prompt": 1}
    recipe = {"command": "sample", "model": str(model), "prompts": ["a"], "sampling": sampling, "preview_every": 1}
    result = run(SampleRecipe.from_mapping({**recipe, **fields}), RunOptions(out, "cpu"), SilentReporter())
    return read_image(Path(result["images"][0]["file"])), previews


def test_previews_are_those_of_the_other_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    pipeline.family.save(tmp_path / "model")
    tiny = tiny_autoencoder(tmp_path / "tiny")
    own, its_previews = pictures(tmp_path / "model", tmp_path / "own", monkeypatch)
    same = str(tmp_path / "model/vae")
    again, same_previews = pictures(tmp_path / "model", tmp_path / "same", monkeypatch, preview_vae=same)
    other, tiny_previews = pictures(tmp_path / "model", tmp_path / "other", monkeypatch, preview_vae=str(tiny))
    assert len(its_previews) == len(same_previews) == len(tiny_previews) == 3
    assert all(torch.equal(a, b) for a, b in zip(its_previews, same_previews, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(its_previews, tiny_previews, strict=True))
    assert torch.equal(own, again)
    assert torch.equal(own, other)


def test_an_autoencoder_of_other_latents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pipeline().family.save(tmp_path / "model")
    tiny = tiny_autoencoder(tmp_path / "tiny", latent_channels=5)
    with pytest.raises(UsageError, match="its latents have 5 channels at 1/2 of the size, not 4 channels at 1/2"):
        pictures(tmp_path / "model", tmp_path / "out", monkeypatch, preview_vae=str(tiny))
    with pytest.raises(InputNotFoundError):
        pictures(tmp_path / "model", tmp_path / "out", monkeypatch, preview_vae=str(tmp_path / "nothing"))
