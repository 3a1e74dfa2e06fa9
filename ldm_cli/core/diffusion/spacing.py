"""How timesteps 0 … T − 1, or an interval, are cut into the steps of a sampler: numbers only.

`leading`, `linspace` and `trailing` are those of Lin et al. 2023, table 2, arXiv:2305.08891.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LinearSpacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True)
class SigmaSpacing:
    """Levels with equal steps in σ^(1/7) (`karras`) or log σ (`exponential`).

    Attributes:
        kind: in which the steps are equal.
        between: the linear spacing whose first and last level are the ends; None: the levels of training are.
        sigma_min, sigma_max: ends in place of these.
    """

    kind: Literal["karras", "exponential"]
    between: LinearSpacing | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None


Spacing = LinearSpacing | SigmaSpacing


def from_to(first: float, last: float, count: int) -> list[float]:
    """`count` numbers with equal differences; only `first` when `count` is 1."""
    if count == 1:
        return [first]
    return [first + (last - first) * (i / (count - 1)) for i in range(count - 1)] + [last]


def fractional_timesteps(num_timesteps: int, num_steps: int) -> list[float]:
    """`num_steps` numbers from T − 1 to 0 with equal differences; only 0 when there is one step."""
    if num_steps == 1:
        return [0.0]
    # Products in this order are rounded as those of numpy's linspace.
    rising = [i * ((num_timesteps - 1) / (num_steps - 1)) for i in range(num_steps - 1)]
    return [float(num_timesteps - 1), *reversed(rising)]


def whole_timesteps(
    num_timesteps: int, num_steps: int, spacing: LinearSpacing, offset: int, drop_last: bool = False
) -> list[int]:
    """`num_steps` whole timesteps, falling.

    Args:
        num_timesteps: T.
        num_steps: 1 … T.
        spacing: `linspace` rounds equal parts of [0, T − 1], `trailing` starts at T − 1, `leading` ends at 0.
        offset: added to every timestep of `leading`, as far as T − 1 allows.
        drop_last: `linspace` and `leading` are cut into one part more, and the last timestep is dropped.

    Raises:
        ValueError: more steps than timesteps.
    """
    count = num_steps + (drop_last and spacing != "trailing")
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"num_steps={num_steps} with {num_timesteps} levels and {spacing} spacing")
    if spacing == "linspace":
        return [round(t) for t in fractional_timesteps(num_timesteps, count)][:num_steps]
    if spacing == "trailing":
        # The stride as floating point leaves it at T: ties of `round` then fall as they do in numpy's arange.
        stride = num_timesteps - (num_timesteps - num_timesteps / num_steps)
        return [round(num_timesteps - i * stride) - 1 for i in range(num_steps)]
    timesteps = [i * (num_timesteps // count) for i in reversed(range(count))][:num_steps]
    # With almost as many steps as timesteps the offset would lead past the last.
    offset = min(offset, num_timesteps - 1 - timesteps[0])
    return [t + offset for t in timesteps]
