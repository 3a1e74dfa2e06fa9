"""A family of another kind needs one file: a class-conditional network on pixels, from its folder to pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ldm_cli import families
from ldm_cli.core.codec import PixelCodec
from ldm_cli.core.condition import Condition
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.families.family import Family
from ldm_cli.families.open_family import open_family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest

FILE = """
from tests.families.test_family import is_mine, open_folder
"""


class OnePicturePerClass(nn.Module):
    """Predicts the noise in pictures of 4×4 pixels of one of two classes; a class has one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = nn.Parameter(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.pooled is not None
        return self.pictures[condition.pooled].view(x.shape)


class ClassNames:
    """`red` and `blue` to class indices; other prompts are class 0."""

    key: ClassVar[dict[str, str]] = {}

    def check(self, reading: PromptReading) -> None:
        pass

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        return 1

    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        classes = {"red": 1, "blue": 2}
        return Condition(pooled=torch.tensor([classes.get(prompt, 0) for prompt in prompts]))


@dataclass(frozen=True, eq=False)
class PixelFamily(Family):
    """Pictures of 4×4 pixels."""

    components: ClassVar[tuple[str, ...]] = ("denoiser",)

    @property
    def sample_size(self) -> tuple[int | None, int | None]:
        return 4, 4

    def save_denoiser(self, folder: Path) -> None:
        save_model(folder / "denoiser", self.denoiser.state_dict(), {})

    def save_companions(self, folder: Path) -> None:
        write_json(folder / "model_index.json", {"_class_name": "OnePicturePerClass"})


def pixel_family(folder: Path | None = None) -> PixelFamily:
    settings = our_settings({"prediction_type": "sample"})
    return PixelFamily(OnePicturePerClass(), PixelCodec(), ClassNames(), settings, folder)


def is_mine(folder: Path) -> bool:
    return "OnePicturePerClass" in (folder / "model_index.json").read_text()


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> PixelFamily:
    family = pixel_family(folder)
    load_weights(family.denoiser, folder / "denoiser")
    return family


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of the family, beside those of the package."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/one_picture_per_class.py").write_text(FILE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "package")])
    monkeypatch.delitem(sys.modules, f"{families.__name__}.one_picture_per_class", raising=False)
    return families


def test_a_new_family_is_one_new_file(known: ModuleType, tmp_path: Path) -> None:
    original = pixel_family()
    nn.init.uniform_(original.denoiser.get_parameter("pictures"), -1, 1)
    original.save(tmp_path / "model")
    family = open_family(tmp_path / "model")
    assert family.weights_sha256.keys() == {"denoiser"}
    config = SamplingConfig(steps=4, guidance=1.0, sampler="euler")
    requests = [ImageRequest(prompt, 0) for prompt in ("red", "blue", "red")]
    drawn = torch.stack([image.pixels for image in Pipeline(family).generate(requests, config)])
    pictures = original.denoiser.get_parameter("pictures").detach().view(3, 3, 4, 4)
    expected = ((pictures / 2 + 0.5) * 255).round()[[1, 2, 1]]
    assert drawn.shape == (3, 3, 4, 4)
    assert (drawn.float() - expected).abs().max() <= 1, "the denoiser knows each class's only picture"


def test_a_folder_of_no_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputNotFoundError, match=r"no pipeline in .*model_index\.json is missing"):
        open_family(tmp_path)
    write_json(tmp_path / "model_index.json", {"_class_name": "KandinskyPipeline"})
    with pytest.raises(CheckpointError, match="it holds a 'KandinskyPipeline', which is not supported"):
        open_family(tmp_path)


def test_what_is_there_instead_of_a_pipeline_is_said(tmp_path: Path) -> None:
    vae, clip, unet = tmp_path / "vae", tmp_path / "clip", tmp_path / "whole/unet"
    for folder, config in (
        (vae, {"_class_name": "AutoencoderKL"}),
        (clip, {"architectures": ["CLIPModel"], "model_type": "clip"}),
        (unet, {"_class_name": "UNet2DConditionModel"}),
    ):
        folder.mkdir(parents=True)
        write_json(folder / "config.json", config)
    write_json(unet.parent / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    for folder, kind in ((vae, "AutoencoderKL"), (clip, "CLIPModel")):
        with pytest.raises(InputNotFoundError, match=f"it holds one model, {kind}, .*; give a folder of Stable Diff"):
            open_family(folder)
    with pytest.raises(InputNotFoundError, match=rf"UNet2DConditionModel, .*; give '{unet.parent}'"):
        open_family(unet)
