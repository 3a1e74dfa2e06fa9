"""The network of the lesson and its training, with the objective of the picture models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli import philox
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.core.diffusion.process import Process, process_of
from ldm_cli.core.models.layers import timestep_embedding
from ldm_cli.lesson.spiral import NUM_CLASSES, Points

NO_CLASS = NUM_CLASSES
"""The label without a class, like the empty prompt of a picture model."""

DIFFUSION = DiffusionConfig(num_train_timesteps=200, beta_schedule="linear", beta_start=0.0005, beta_end=0.1)
"""The schedule of Ho et al. 2020 with a fifth of its levels, each five times as strong."""

_WIDTH = 96
_NUM_BLOCKS = 3
_FREQUENCIES = (0.5 * math.pi, math.pi)
_TIME_WIDTH = 64
_BATCH_SIZE = 256
_LEARNING_RATE = 3e-3
_CLASS_DROPOUT = 0.5


class SpiralNetwork(nn.Module):
    """(x_t, t, class) → ε, by a residual multilayer perceptron of 60 thousand weights.

    Time and class enter as in a picture model: one embedding scales and shifts the input of every block (Perez et al.
    2018, arXiv:1709.07871). With sinusoids of x, so small a network can follow the thin arm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(2 + 4 * len(_FREQUENCIES), _WIDTH)
        self.time = nn.Linear(_TIME_WIDTH, _WIDTH)
        self.label = nn.Embedding(NUM_CLASSES + 1, _WIDTH)
        self.modulation = nn.Linear(_WIDTH, 2 * _WIDTH * _NUM_BLOCKS)
        self.blocks = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(_NUM_BLOCKS))
        self.outlet = nn.Linear(_WIDTH, 2)
        nn.init.zeros_(self.outlet.weight)

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: x_t, float32 [B, 2].
            t: levels, [B], or one number for all.
            label: classes, int64 [B]; `NO_CLASS` for none.

        Returns:
            ε, float32 [B, 2].
        """
        # The sinusoids are made for 1000 levels.
        times = torch.as_tensor(t, dtype=torch.float32).reshape(-1) * (1000.0 / DIFFUSION.num_train_timesteps)
        embedded = self.time(timestep_embedding(times, _TIME_WIDTH, flip_sin_to_cos=True, freq_shift=0))
        parts = self.modulation(F.silu(embedded + self.label(label))).chunk(2 * _NUM_BLOCKS, dim=1)
        waves = [wave(frequency * x) for frequency in _FREQUENCIES for wave in (torch.sin, torch.cos)]
        h = self.inlet(torch.cat([x, *waves], dim=1))
        for block, scale, shift in zip(self.blocks, parts[::2], parts[1::2], strict=True):
            h = h + block(F.silu(h * (1.0 + scale) + shift))
        result: Tensor = self.outlet(F.silu(h))
        return result


@dataclass(frozen=True)
class Trained:
    """A trained network, its process, and its training loss.

    Attributes:
        network: in evaluation mode.
        process: the noise levels it was trained at.
        losses: mean loss of each hundredth of the training.
    """

    network: SpiralNetwork
    process: Process
    losses: tuple[float, ...]


def train(data: Points, num_steps: int, seed: int, on_step: Callable[[int, float], None]) -> Trained:
    """Fit the network to the noise in noised data points (Ho et al. 2020, algorithm 1).

    Args:
        num_steps: optimizer steps of 256 points, at least 1.
        seed: of the weights and of all random numbers.
        on_step: called with (finished steps, loss) after every step.

    Raises:
        ValueError: if `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise ValueError(f"train: num_steps={num_steps} is less than 1")
    process = process_of(DIFFUSION)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SpiralNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
    )
    per_mean = max(1, num_steps // 100)
    sums, losses = 0.0, []
    for step in range(num_steps):
        x0, label, noise, u = _batch(data, seed, step)
        a, b, time = process.at(u)
        output = network(add_noise(x0, noise, a, b), time, label)
        loss = diffusion_loss(process.prediction, output, x0, noise, a, b).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        sums += loss.item()
        if (step + 1) % per_mean == 0:
            losses.append(sums / per_mean)
            sums = 0.0
        on_step(step + 1, loss.item())
    return Trained(network.eval().requires_grad_(False), process, tuple(losses))


def _batch(data: Points, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0 [B, 2], labels, half of them dropped [B], ε [B, 2] and u of `Process.at` [B] of one step."""
    epoch, place = torch.full((_BATCH_SIZE,), step), torch.arange(_BATCH_SIZE)
    chance = philox.uniform(philox.key(seed, "spiral batch"), epoch, place, 3).double()
    noise = philox.normal(philox.key(seed, "spiral training noise"), epoch, place, (2,))
    index = (chance[:, 0] * len(data.xy)).long()
    # Small t more often: the field has fine detail there, while at large t it is almost −x.
    u = chance[:, 1].square()
    label = torch.where(chance[:, 2] < _CLASS_DROPOUT, NO_CLASS, data.labels[index])
    return data.xy[index], label, noise, u
