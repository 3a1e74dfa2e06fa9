"""The experiments of the lesson: noising, three ways of sampling, and classes, with the code of the picture models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.core.diffusion.guidance import guided
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor, clean_predictor, euler
from ldm_cli.core.diffusion.timesteps import Timesteps, ddpm_timesteps
from ldm_cli.lesson import measures
from ldm_cli.lesson.network import NO_CLASS, Trained
from ldm_cli.lesson.spiral import NUM_CLASSES, Points

NUM_SAMPLES = 900
"""Points that each method generates, all from the same initial noise."""
DDIM_STEPS = 50
GRID_SIZE = 21
GRID_REACH = 2.4
"""The field is plotted at GRID_SIZE² points of the square [−GRID_REACH, GRID_REACH]²."""


@dataclass(frozen=True)
class Walk:
    """The same points at several times.

    Attributes:
        times: t of each stop; −1 means clean points.
        stops: the points at these times, float32 [S, N, 2].
    """

    times: tuple[float, ...]
    stops: Tensor

    @property
    def end(self) -> Tensor:
        """The last stop, [N, 2]."""
        return self.stops[-1]

    def at(self, t: float) -> Tensor:
        """The stop nearest to time t, [N, 2]."""
        return self.stops[self.index(t)]

    def index(self, t: float) -> int:
        """The number of the stop nearest to time t."""
        return min(range(len(self.times)), key=lambda i: abs(self.times[i] - t))


@dataclass(frozen=True)
class Lesson:
    """The data of all figures.

    Attributes:
        levels: the training levels, t = 0 … T − 1.
        grid: the points at which the field is plotted, [G, 2].
        field: x̂_0 of the network at each level and grid point, [T, G, 2].
        directions: per level, the cosines of `measures.directions`.
        forward: from data to noise, t = −1 … T − 1.
        backward: from noise to data, by method (`ddpm`, `quiet`: DDPM without its noise, `ddim`).
        classes: by guidance scale, samples [N, 2] of the labels in `labels`.
        labels: int64 [N].
    """

    data: Points
    levels: tuple[Level, ...]
    grid: Tensor
    field: Tensor
    directions: tuple[Mapping[str, float], ...]
    forward: Walk
    backward: Mapping[str, Walk]
    classes: Mapping[float, Tensor]
    labels: Tensor


def normal(seed: int, purpose: str, count: int, step: int = 0) -> Tensor:
    """Standard normal noise [count, 2], a function of (seed, purpose, step)."""
    return philox.normal(philox.key(seed, purpose), torch.full((count,), step), torch.arange(count), (2,))


def experiment(trained: Trained, data: Points, guidance: float, seed: int) -> Lesson:
    """Run all experiments with a trained network.

    Args:
        trained: network and process.
        data: its training data, at least NUM_SAMPLES points.
        guidance: the guidance scale to compare with 1, which means no guidance.
    """
    process = trained.process
    all_levels = ddpm_timesteps(process, process.num_timesteps, "leading", 0)
    few_levels = ddpm_timesteps(process, DDIM_STEPS, "trailing", 0)
    levels = tuple(start for start, _ in all_levels.steps)[::-1]
    chosen = data.xy[torch.linspace(0, len(data.xy) - 1, NUM_SAMPLES).long()]

    def network(x: Tensor, t: float) -> Tensor:
        return trained.network.forward(x, t, torch.full((len(x),), NO_CLASS))

    denoise = clean_predictor(network, process.prediction)
    axis = torch.linspace(-GRID_REACH, GRID_REACH, GRID_SIZE)
    grid = torch.cartesian_prod(axis, axis)
    forward = _forward(chosen, levels, seed)
    # Every fourth data point gives the cosines to three digits.
    noised = zip(levels, forward.stops[1:], strict=True)
    cosines = [measures.directions(x, denoise(x, level), level, data.xy[::4]) for level, x in noised]
    labels = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    return Lesson(
        data,
        levels,
        grid,
        torch.stack([denoise(grid, level) for level in levels]),
        tuple(cosines),
        forward,
        {
            "ddpm": _backward(denoise, all_levels, seed, eta=1.0),
            "quiet": _backward(denoise, all_levels, seed, eta=1.0, noise_scale=0.0),
            "ddim": _backward(denoise, few_levels, seed, eta=0.0),
        },
        {scale: _of_class(trained, labels, scale, all_levels, seed) for scale in (1.0, guidance)},
        labels,
    )


def _forward(x: Tensor, levels: tuple[Level, ...], seed: int) -> Walk:
    """Noise is added step by step (Ho et al. 2020, eq. 2): x' = (a'/a) x + √(b'² − (b a'/a)²) ε."""
    stops, before = [x], Level(-1.0, 1.0, 0.0)
    for step, level in enumerate(levels):
        kept = level.signal / before.signal
        added = (level.noise**2 - (kept * before.noise) ** 2) ** 0.5
        stops.append(kept * stops[-1] + added * normal(seed, "spiral forward walk", len(x), step))
        before = level
    return Walk((-1.0, *(level.t for level in levels)), torch.stack(stops))


def _backward(denoise: CleanPredictor, timesteps: Timesteps, seed: int, eta: float, noise_scale: float = 1.0) -> Walk:
    """Sample by the sampler of `ldm sample` and keep every stop; `noise_scale` scales the noise that it adds."""
    stops: list[Tensor] = []

    def watched(x: Tensor, level: Level) -> Tensor:
        stops.append(x)
        return denoise(x, level)

    def step_noise(i: int) -> Tensor:
        return noise_scale * normal(seed, "spiral sampling noise", NUM_SAMPLES, i)

    end = euler(watched, normal(seed, "spiral initial noise", NUM_SAMPLES), timesteps, step_noise, eta)
    return Walk((*timesteps.times, -1.0), torch.stack([*stops, end]))


def _of_class(trained: Trained, labels: Tensor, scale: float, timesteps: Timesteps, seed: int) -> Tensor:
    """Samples [N, 2] of the classes `labels`, with classifier-free guidance; scale 1 means none."""

    def network(x: Tensor, level: Level, condition: Condition) -> Tensor:
        assert condition.pooled is not None
        return trained.network.forward(x, level.t, condition.pooled)

    none = Condition(pooled=torch.full_like(labels, NO_CLASS))
    config, prediction = GuidanceConfig(scale=scale), trained.process.prediction
    model = guided(network, Condition(pooled=labels), none, config, prediction)
    return _backward(model, timesteps, seed, eta=1.0).end


def facts(lesson: Lesson) -> dict[str, object]:
    """The lesson in numbers, as plain JSON data."""
    data = lesson.data
    samples = {"data": data.xy, **{name: walk.end for name, walk in lesson.backward.items()}}
    count = len(lesson.levels)
    shown = (count - 1, count * 3 // 4, count // 2, count // 4, count // 10, count // 40)
    guidance = {f"scale_{scale:g}": measures.describe_classes(x, lesson.labels) for scale, x in lesson.classes.items()}
    return {
        "methods": {name: measures.describe(x, data.xy) for name, x in samples.items()},
        "field": {f"t={t}": dict(lesson.directions[t]) for t in shown},
        "guidance": {"data": measures.describe_classes(data.xy, data.labels), **guidance},
    }
