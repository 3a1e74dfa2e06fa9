"""Which prompts are encoded together: on a CPU none, elsewhere as many as a batch takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.sampling.latent_sampler import prompt_conditions
from ldm_cli.sampling.request import Blend, ImageRequest


@pytest.mark.parametrize(("device", "batches"), [("cpu", [1] * 102), ("cuda", [64, 38])])
def test_each_prompt_is_encoded_once_alone_on_a_cpu_and_in_batches_elsewhere(device: str, batches: list[int]) -> None:
    encoded: list[list[str]] = []

    def encode_prompts(prompts: list[str], reading: PromptReading, **_: Any) -> Condition:
        encoded.append(prompts)
        return Condition(tokens=torch.tensor([[[float(len(prompt))]] for prompt in prompts]))

    encoder = SimpleNamespace(encode_prompts=encode_prompts, num_chunks=lambda prompt, reading: 1)
    family: Any = SimpleNamespace(device=torch.device(device), encoder=encoder)
    requests = [ImageRequest("x" * length, seed) for length in range(1, 101) for seed in (0, 1)]
    requests.append(ImageRequest("x", 2, Blend(prompt="x" * 200, seed=3, weight=0.5)))
    conditions = prompt_conditions(family, requests, "", PromptReading(), warn=print).rows
    assert [len(prompts) for prompts in encoded] == batches
    assert len(conditions) == 102
    for (prompt, chunks), condition in conditions.items():
        assert chunks == 1
        assert condition.tokens is not None
        assert condition.tokens.tolist() == [[[len(prompt)]]]
