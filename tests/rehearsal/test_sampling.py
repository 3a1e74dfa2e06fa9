"""Samplers do not touch the host in a step, and a picture costs the rows of one."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from ldm_cli.sampling.config import SamplerName

from . import worker as work

# Their noise of each step is made on the host yet.
_WITH_HOST_NOISE = {"ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "lcm"}


@pytest.mark.parametrize("sampler", sorted({*get_args(SamplerName)} - _WITH_HOST_NOISE))
def test_steps_do_not_touch_the_host(sampler: str, pipeline: Path, worker: ProcessPoolExecutor) -> None:
    made = worker.submit(work.sample, pipeline, sampler=sampler, steps=4).result()
    assert made["touches"] == []
    assert len(made["rows"]) >= 4


@pytest.mark.parametrize(("scale", "of_each"), [(7.5, 2), (1.0, 1)])
@pytest.mark.parametrize("count", [1, 9])
def test_n_pictures_are_n_rows_or_twice_as_many_guided(
    count: int, scale: float, of_each: int, pipeline: Path, worker: ProcessPoolExecutor
) -> None:
    sampling = {"sampler": "ddim", "steps": 2, "images_per_prompt": count, "guidance": {"scale": scale}}
    made = worker.submit(work.sample, pipeline, **sampling).result()
    assert sum(made["rows"]) == 2 * count * of_each
