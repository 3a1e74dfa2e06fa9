"""Enlarging: whole or in parts, alone or among others, after a generator or of a photo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.codec import PixelCodec
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.shared_statistics import SharedStatistics
from ldm_cli.core.window import Window
from ldm_cli.errors import DivergedError, UsageError
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.pixel_diffusion import pixel_settings
from ldm_cli.families.pixel_upscale import NOISING_BETAS, PixelUpscale
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.sampling import upscaling as upscaling_module
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.noise import noise_of_window
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.upscale_pipeline import UpscaledPipeline, UpscalePipeline
from ldm_cli.sampling.upscaling import Upscaling, upscale
from tests.sampling.tiny import UNET, randomize, tiny_pipeline

SAMPLERS = ("ddim", "ddpm")


class Pointwise(nn.Module):
    """Predicts a mixture of the noisy and the small picture, pixel by pixel; darker where there is text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.4))
        self.config = SimpleNamespace(sample_size=16)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.concat is not None
        assert condition.tokens is not None
        self.calls.append(tuple(x.shape))
        x0 = self.weight * x.tanh() + (1 - self.weight) * condition.concat - 0.1 * condition.tokens.view(-1, 1, 1, 1)
        return torch.cat([x0, torch.zeros_like(x0)], dim=1)


class Lengths:
    """An encoder of prompts to their lengths."""

    models = ()

    def check(self, reading: PromptReading) -> None: ...

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        return 1

    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        return Condition(torch.tensor([[[float(len(prompt))]] for prompt in prompts]))


def family(**low: Any) -> PixelUpscale:
    settings = pixel_settings(DiffusionConfig(prediction_type="sample").to_mapping())
    fields = {"factor": 2, "latent_factor": 2, "max_noise_level": 300, "noise_level": 50} | low
    given: Any = (Pointwise(), PixelCodec(), Lengths(), settings)
    return PixelUpscale(*given, low_resolution=LowResolution(**fields, diffusion=NOISING_BETAS))


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def enlarged(pictures: list[Tensor], seeds: list[int], prompt: str = "", **given: Any) -> list[Tensor]:
    config = SamplingConfig.from_mapping({"steps": 3, "sampler": given.pop("sampler", "ddim"), "guidance": 2.0})
    upscaling = Upscaling(given.pop("family", None) or family(), config, **given)
    requests = [ImageRequest(prompt, seed) for seed in seeds]
    return [image.pixels for image in upscale(upscaling, pictures, requests)]


def test_a_part_has_the_size_of_the_training_or_512_pixels() -> None:
    of_small, of_large = family(), family()
    of_large.denoiser.config = SimpleNamespace(sample_size=640)
    assert [2 * Upscaling(model, SamplingConfig()).window for model in (of_small, of_large)] == [512, 640]
    assert len(Upscaling(of_small, SamplingConfig()).tiles(256, 256)) == 1


def test_the_noise_of_a_part_is_a_part_of_the_noise() -> None:
    shape, device = (3, 70, 150), torch.device("cpu")
    whole = noise_of_window([3, 4], "purpose", shape, Window(0, 0, 70, 150), device)(2)
    assert abs(float(whole.mean())) < 0.02
    assert abs(float(whole.std()) - 1) < 0.02
    for window in (Window(10, 60, 20, 80), Window(69, 0, 1, 64), Window(0, 149, 70, 1)):
        assert torch.equal(noise_of_window([3, 4], "purpose", shape, window, device)(2), whole[window.area])
    assert not torch.equal(noise_of_window([3, 4], "purpose", shape, Window(0, 0, 70, 150), device)(1), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parts_and_the_whole_are_one_picture(sampler: str) -> None:
    picture = photo(40, 70)
    whole = enlarged([picture], [5], sampler=sampler, tile=200)[0]
    parts = enlarged([picture], [5], sampler=sampler, tile=32)[0]
    assert whole.shape == parts.shape == (3, 80, 140)
    assert whole.float().std() > 20
    assert (whole.int() - parts.int()).abs().max() <= 1


class Normed(Pointwise):
    """The small picture goes through a group norm first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.concat is not None
        return super().forward(x, t, replace(condition, concat=0.5 * self.norm(condition.concat)))


def lit_photo(height: int, width: int) -> Tensor:
    """A photo that is dark on the left and bright on the right, so that no part is like the whole."""
    return (photo(height, width).float() * torch.linspace(0.1, 1, width)).to(torch.uint8)


def test_parts_of_a_network_with_a_norm_are_one_picture() -> None:
    model, picture = replace(family(), denoiser=Normed()), lit_photo(24, 70)
    model = replace(model, settings=replace(model.settings, threshold=None))
    whole, parts = (enlarged([picture], [5], family=model, tile=tile)[0].int() for tile in (200, 40))
    assert (whole - parts).abs().max() <= 1


def test_parts_of_a_unet_are_one_pass_but_for_the_statistics_of_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}
    blocks |= {"up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 8)}
    fields = {"in_channels": 6, "out_channels": 6, "class_embed_type": "timestep", "sample_size": 16}
    unet = randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET | blocks | fields)), 3)
    model, picture = replace(family(), denoiser=unet), lit_photo(13, 150)
    model = replace(model, settings=replace(model.settings, threshold=None))
    statistics = SharedStatistics([unet])
    with statistics.measured():
        whole = enlarged([picture], [5], family=model, tile=1000)[0]
    monkeypatch.setattr(statistics, "measured", nullcontext)
    monkeypatch.setattr(upscaling_module, "SharedStatistics", lambda networks: statistics)
    parts = enlarged([picture], [5], family=model, tile=256)[0]
    assert whole.float().std() > 20
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_a_part_is_all_that_the_network_sees_at_a_time() -> None:
    sizes = []
    for side in (64, 128):
        model = family()
        enlarged([photo(side, side)], [5], family=model, tile=64)
        sizes.append({shape[-2:] for shape in model.denoiser.calls})  # type: ignore[attr-defined]
    assert sizes == [{(64, 64)}, {(64, 64)}]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_the_others(sampler: str) -> None:
    pictures, seeds = [photo(16, 20, i) for i in range(11)], list(range(11))
    together = enlarged(pictures, seeds, "red", sampler=sampler)
    for i in (0, 7, 10):
        assert torch.equal(enlarged([pictures[i]], [seeds[i]], "red", sampler=sampler)[0], together[i])
    assert not torch.equal(together[0], enlarged([pictures[0]], [99], "red", sampler=sampler)[0])


def test_equal_prompts_need_no_guidance() -> None:
    model = family()
    enlarged([photo(8, 8)], [1], "", family=model)
    rows = {shape[0] for shape in model.denoiser.calls}  # type: ignore[attr-defined]
    enlarged([photo(8, 8)], [1], "text", family=model)
    guided = {shape[0] for shape in model.denoiser.calls} - rows  # type: ignore[attr-defined]
    assert guided == {2 * count for count in rows}


def test_more_noise_on_the_small_picture_leaves_less_of_it() -> None:
    picture = torch.where(torch.arange(32) < 16, 0, 255).to(torch.uint8).expand(3, 32, 32).contiguous()
    spread = [
        float(enlarged([picture], [1], noise_level=level, tile=64)[0].float()[..., 40:].std())
        for level in (0, 100, 300)
    ]
    assert spread[0] < spread[1] < spread[2]


def test_what_a_model_cannot_do_is_said_before() -> None:
    with pytest.raises(UsageError, match="noise_level=301 is not possible"):
        enlarged([photo(8, 8)], [1], noise_level=301)
    with pytest.raises(UsageError, match="tile=8 px is too small"):
        enlarged([photo(8, 8)], [1], tile=8)
    with pytest.raises(UsageError, match="none is given"):
        list(pipeline_of(family()).generate([ImageRequest("", 1)], SamplingConfig(steps=2)))
    assert isinstance(pipeline_of(family()), UpscalePipeline)


def test_a_picture_that_is_not_finite_is_named_and_the_others_are_made() -> None:
    model = family()

    def spoiled(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x0 = torch.where(condition.tokens.view(-1, 1, 1, 1) > 2, torch.nan, x)  # type: ignore[union-attr]
        return torch.cat([x0, x0], dim=1)

    model.denoiser.forward = spoiled  # type: ignore[method-assign, assignment]
    requests = [ImageRequest("no", 1), ImageRequest("long", 2)]
    failures: list[DivergedError] = []
    upscaling = Upscaling(model, SamplingConfig(steps=2))
    found = list(upscale(upscaling, [photo(8, 8)] * 2, requests, on_nonfinite=failures.append))
    assert [image.index for image in found] == [0]
    assert "'long' with seed 2" in failures[0].what


def test_what_another_pipeline_generates_is_enlarged() -> None:
    small = tiny_pipeline()
    config = SamplingConfig.from_mapping({"steps": 2, "guidance": 1.0})
    requests = [ImageRequest("a blue square", seed) for seed in range(10)]
    upscaling = Upscaling(family(), SamplingConfig(steps=2))
    found = list(UpscaledPipeline(small, upscaling).generate(requests, config))
    before = [image.pixels for image in small.generate(requests, config)]
    expected = list(upscale(upscaling, before, requests))
    assert [image.index for image in found] == list(range(10))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, expected, strict=True))
    assert found[0].pixels.shape == (3, 32, 32)
