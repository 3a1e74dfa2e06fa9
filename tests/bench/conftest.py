"""Contenders that need not import everything again: their figures are of no interest in tests."""

from __future__ import annotations

import multiprocessing.context

import pytest

from ldm_cli.bench import race


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.context.ForkServerContext()
    peers = "diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip"
    context.set_forkserver_preload(["tests.bench.test_bench", "tests.bench.test_race", *peers])
    monkeypatch.setattr(race.multiprocessing, "get_context", lambda _: context)
