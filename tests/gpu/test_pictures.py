"""Random numbers and pictures of a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_cli import philox
from ldm_cli.families.open_family import open_family
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import requests_for

from ..rehearsal.conftest import pipeline as pipeline  # a fixture

pytestmark = pytest.mark.gpu


def test_random_numbers_are_those_of_the_cpu(cuda: torch.device) -> None:
    key, position = philox.key(3, "test"), torch.arange(64) + (1 << 40)
    epoch = torch.full_like(position, 7)
    on_cpu = philox.bits(key, epoch, position, 1001)
    assert torch.equal(philox.bits(key, epoch.to(cuda), position.to(cuda), 1001).cpu(), on_cpu)
    normal = philox.normal(key, epoch.to(cuda), position.to(cuda), (1001,)).cpu()
    torch.testing.assert_close(normal, philox.normal(key, epoch, position, (1001,)), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral"])
def test_pictures_are_those_of_the_cpu(sampler: str, pipeline: Path, cuda: torch.device) -> None:
    config = SamplingConfig.from_mapping({"sampler": sampler, "steps": 6, "images_per_prompt": 3})
    made = []
    for device in (cuda, torch.device("cpu")):
        pictures = Pipeline(open_family(pipeline, device)).generate(requests_for(["a red circle"], config), config)
        made.append(torch.stack([picture.pixels for picture in pictures]).int())
    assert int((made[0] - made[1]).abs().max()) <= 2
