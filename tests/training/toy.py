"""A least-squares task small enough to reason about: one linear layer, data a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.training.task import WeightsByModule


class ToyTask:
    def __init__(self, poison: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            self.critic = nn.Linear(1, 1)
        self.modules = {"model": self.model}
        self.auxiliary = {"critic": self.critic}
        self.num_files = 1
        self.poison = poison
        self.seen: list[int] = []

    def parts(self, batch: tuple[Tensor, Tensor], num_parts: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(side.chunk(num_parts) for side in batch), strict=True))

    def loss(self, part: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.seen[-1:] != [step]:
            self.seen.append(step)
        prediction = self.model(part[0])
        value = (prediction - part[1]).square().mean() + self.critic(prediction.detach()).square().mean()
        return value * (float("nan") if step in self.poison else 1.0), {"size": prediction.abs().mean()}

    def validate(self) -> dict[str, float]:
        x, y = data(10**6)
        return {"val_loss": (self.model(x) - y).square().mean().item()}

    def picture(self, folder: Path | None) -> None:
        if folder is not None:
            (folder / "drawn.txt").write_text("picture")

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        folder.mkdir(exist_ok=True)
        save_file(weights["model"], folder / "model.safetensors")

    def restore(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def finalize(self) -> dict[str, float]:
        return {"final": 1.0}


def data(step: int) -> tuple[Tensor, Tensor]:
    position = torch.arange(12) + 12 * step
    x = philox.normal(philox.key(0, "toy"), torch.zeros_like(position), position, (4,))
    return x, torch.sin(x.sum(dim=1, keepdim=True))


def batches(start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(start, end):
        yield data(step)
