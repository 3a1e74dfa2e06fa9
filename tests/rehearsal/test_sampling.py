"""Samplers do not touch the host in a step, and n pictures cost n rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ldm_cli.families.open_family import open_family
from ldm_cli.sampling import latent_sampler
from ldm_cli.sampling.config import SamplerName, SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import ImageRequest, requests_for

from . import worker as work


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_steps_do_not_touch_the_host(sampler: str, pipeline: Path, worker: ProcessPoolExecutor) -> None:
    made = worker.submit(work.sample, pipeline, sampler=sampler, steps=4).result()
    assert made["touches"] == []
    assert len(made["rows"]) >= 4


def test_steps_with_sizes_do_not_touch_the_host(parts: Path, worker: ProcessPoolExecutor) -> None:
    made = worker.submit(work.sample, parts / "xl", sampler="euler_ancestral", steps=4, images_per_prompt=2).result()
    assert made["touches"] == []
    assert made["rows"] == [4] * 4


@pytest.mark.parametrize("kind", ["thresholded", "projected", "perturbed", "away from a weaker model", "along a score"])
def test_guidance_does_not_touch_the_host(kind: str, pipeline: Path, parts: Path, worker: ProcessPoolExecutor) -> None:
    settings: dict[str, dict[str, Any]] = {
        "thresholded": {"rescale": 0.7, "interval": [0.5, 10.0], "threshold": {"limit": 3.0}},
        "projected": {"apg": {}},
        "perturbed": {"perturb": {"layers": ["down_blocks"]}},
        "away from a weaker model": {"model": str(pipeline)},
        "along a score": {"clip": {"model": str(parts / "clip/model"), "scale": 20.0}},
    }
    guidance = {"scale": 3.0, **settings[kind]}
    # Constants are made for the first run of a process: the second has them.
    made = [worker.submit(work.sample, pipeline, steps=3, guidance=guidance).result() for _ in range(2)]
    assert made[1]["touches"] == []


@pytest.mark.parametrize(("scale", "rows"), [(7.5, 2), (1.0, 1)])
@pytest.mark.parametrize("count", [1, 9])
def test_a_picture_costs_one_row_or_two_guided(
    count: int, scale: float, rows: int, pipeline: Path, worker: ProcessPoolExecutor
) -> None:
    sampling = {"steps": 4, "images_per_prompt": count, "guidance": {"scale": scale}}
    made = worker.submit(work.sample, pipeline, **sampling).result()
    assert made["rows"] == [count * rows] * 4


def test_pictures_of_the_device_are_those_of_the_cpu(pipeline: Path, worker: ProcessPoolExecutor) -> None:
    sampling = {"sampler": "dpmpp_sde", "steps": 4, "images_per_prompt": 3}
    made = worker.submit(work.sample, pipeline, **sampling).result()
    config = SamplingConfig.from_mapping(sampling)
    expected = Pipeline(open_family(pipeline)).generate(requests_for(["a red circle"], config), config)
    for pixels, picture in zip(made["pixels"], expected, strict=True):
        assert (torch.tensor(pixels) - picture.pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tokens_do_not_touch_the_host(scale: float, parts: Path, worker: ProcessPoolExecutor) -> None:
    sampling = {"images_per_prompt": 3, "guidance": {"scale": scale}, "top_k": 8, "top_p": 0.9}
    made = worker.submit(work.sample, parts / "ar", **sampling).result()
    assert made["touches"] == []
    assert made["rows"] == [3 if scale == 1.0 else 6] * 16
    config = SamplingConfig.from_mapping(sampling)
    expected = pipeline_of(open_family(parts / "ar")).generate(requests_for(["a red circle"], config), config)
    assert made["pixels"] == [picture.pixels.tolist() for picture in expected]


def makes_noise_on_the_host(patch: pytest.MonkeyPatch) -> None:
    true_noise = latent_sampler.step_noise

    def step_noise(requests: Sequence[ImageRequest], shape: tuple[int, ...], device: torch.device) -> Any:
        noise = true_noise(requests, shape, torch.device("cpu"))

        def fault(step: int) -> Tensor:
            return noise(step).to(device)

        return fault

    patch.setattr(latent_sampler, "step_noise", step_noise)


def test_noise_of_the_host_is_found(pipeline: Path, worker: ProcessPoolExecutor) -> None:
    made = worker.submit(work.sample, pipeline, makes_noise_on_the_host, sampler="ddpm", steps=4).result()
    assert made["touches"] == ["send, blocking test_sampling.py:fault"] * 3
