"""How few rows will do: asked once of each network, machine and version of the code, and asked again when in doubt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.sampling import known_rows
from ldm_cli.sampling.known_rows import rows_that_do
from tests.sampling.tiny import UNET


def network(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(UNet2DConditionConfig.from_mapping({**UNET, **changes}))


class Asked:
    """Stands in for `enough`: answers 2, and counts."""

    def __init__(self) -> None:
        self.times, self.answer = 0, 2

    def __call__(self, outputs: object, count: int, size: int, *, alone: bool) -> int:
        self.times += 1
        return self.answer


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer = Asked()
    monkeypatch.setattr(known_rows, "enough", answer)
    return answer


def rows(
    unet: UNet2DConditionModel, count: int = 1, size: int = 8, halves: tuple[int, ...] = (2,), *, alone: bool = False
) -> int:
    return rows_that_do(unet, count, size, (8, 8), (40, 24), set(halves), alone=alone)


def test_the_same_question_is_asked_once(asked: Asked) -> None:
    assert rows(network()) == rows(network()) == 2
    assert asked.times == 1


def test_other_shapes_networks_and_types_are_other_questions(asked: Asked) -> None:
    rows(network())
    rows(network(), count=2)
    rows(network(), size=4)
    rows(network(), halves=(1, 2))
    rows(network(layers_per_block=2))
    rows(network().to(torch.bfloat16))
    assert asked.times == 6


def test_what_one_thread_does_is_another_question(asked: Asked) -> None:
    rows(network())
    asked.answer = 0  # one thread may not
    assert rows(network(), alone=True) == rows(network(), alone=True) == 0
    assert rows(network()) == 2
    assert asked.times == 2


def test_a_whole_group_is_a_question_for_one_thread_only(asked: Asked) -> None:
    assert rows(network(), count=8) == 8
    assert asked.times == 0
    rows(network(), count=8, alone=True)
    assert asked.times == 1


def test_another_machine_switch_or_version_is_asked_again(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(network())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    rows(network())
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch, "__version__", "9.9")
    rows(network())
    monkeypatch.undo()
    assert asked.times == 3
    assert known_rows._machine()[1]


def test_edited_code_is_asked_again(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "layer.py").write_text("one = 1\n")
    monkeypatch.setattr(known_rows, "models", type("Package", (), {"__path__": [str(tmp_path)]}))
    rows(network())
    rows(network())
    os.utime(tmp_path / "layer.py", ns=(0, 1))
    rows(network())
    assert asked.times == 2


@pytest.mark.parametrize("content", ["", "two", "-1", "9", "0"])
def test_an_answer_that_cannot_be_is_asked_again(asked: Asked, tmp_path: Path, content: str) -> None:
    rows(network())
    (file,) = (tmp_path / "ldm" / "rows").iterdir()
    file.write_text(content)
    assert rows(network()) == 2
    assert asked.times == 2
    assert file.read_text() == "2"


def test_a_cache_that_cannot_be_written_is_done_without(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert rows(network()) == rows(network()) == 2
    assert asked.times == 2
