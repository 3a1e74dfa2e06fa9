"""Toy runs for the fault tests, and what two runs that should be the same must share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoint_name
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.run_folder import RunFolder

from ..training.toy import ToyTask, batches

Source = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
CONFIG = TrainConfig(steps=20, batch_size=12, lr=1e-2, lr_schedule="constant", ema_decay=0.9, log_every=7, save_every=5)


def configured(**changes: Any) -> TrainConfig:
    return CONFIG.model_copy(update=changes)


def run(
    path: Path,
    config: TrainConfig = CONFIG,
    task: Any = None,
    source: Source = batches,
    start: Path | None = None,
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """One life of a toy run; its result."""
    with RunFolder(path, SilentReporter()) as folder, StopRequest(max_seconds) as stop:
        return train(
            task or ToyTask(),
            source,
            config,
            folder,
            SilentReporter(),
            device=torch.device("cpu"),
            stop=stop,
            start=start,
        )


def until(step: int, act: Callable[[], None]) -> Source:
    """Batches; `act` is called when the one after `step` is asked for."""

    def source(start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches(start, end), start=start):
            if index == step:
                act()
            yield batch

    return source


def die() -> None:
    raise KeyboardInterrupt


def status(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "status.json").read_text())
    return result


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, as strict JSON, without the one figure that time decides."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in parsed]


def tensors(path: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of the finished model and of the checkpoint of `step`."""
    folders = [path / "model", path / "checkpoints" / checkpoint_name(step)]
    return {
        f"{file.relative_to(path)}:{name}": value
        for folder in folders
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_run(one: Path, two: Path, step: int) -> None:
    """Weights, averages, optimizer state and metrics are equal, bit for bit."""
    left, right = tensors(one, step), tensors(two, step)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert metrics(one) == metrics(two)
