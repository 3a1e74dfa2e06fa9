"""Drawn scenes and one small run of each trainer, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.core.models.inception import NUM_FEATURES
from ldm_cli.data.scenes import write_scenes
from ldm_cli.evaluation.inception_features import InceptionFeatures, prepared
from ldm_cli.reporting import SilentReporter

from .tiny import clip_recipe, trained, unet_recipe, vae_recipe

LONG = {"steps": 40, "log_every": 10, "ema_decay": 0.9, "validation_samples": 12}
"""Training in which something is learnt; validation has a second batch, which is not full."""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training scenes in three shards, 24 held-out ones, 32 px."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 64, 32, 0, SilentReporter(), val_samples=24, shard_samples=25)
    return folder


@pytest.fixture(scope="session")
def clip_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clip"
    trained(clip_recipe(scenes, batch_size=16, lr=3e-3, **LONG), out)
    return out


@pytest.fixture(scope="session")
def vae_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vae"
    trained(vae_recipe(scenes, lr=1e-2, **LONG), out)
    return out


@pytest.fixture(scope="session")
def unet_run(scenes: Path, clip_run: Path, vae_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unet"
    recipe = unet_recipe(scenes, clip_run / "model", vae_run / "model", lr=5e-3, **LONG)
    trained(recipe, out)
    return out


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve features and four classes in place of the Inception network's."""

    def features(self: InceptionFeatures, images: Any, taps: Any = ("2048",)) -> dict[str, Tensor]:
        pixels = torch.cat([prepared(image[None], self._preprocessing) for image in images])
        pooled = F.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return {tap: pooled if tap == "2048" else 5 * pooled[:, :4] for tap in taps}

    monkeypatch.setattr(InceptionFeatures, "__call__", features)
    monkeypatch.setitem(NUM_FEATURES, "2048", 12)
    monkeypatch.setitem(NUM_FEATURES, "logits", 4)
