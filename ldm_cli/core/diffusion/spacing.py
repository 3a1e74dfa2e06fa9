"""How T training timesteps, or an interval, are cut into the steps of a sampler: numbers only.

`leading`, `linspace` and `trailing` are those of Lin et al. 2023, table 2, arXiv:2305.08891.
"""

from __future__ import annotations

from typing import Literal

LinearSpacing = Literal["leading", "linspace", "trailing"]
Spacing = Literal["leading", "linspace", "trailing", "karras", "exponential"]


def from_to(first: float, last: float, count: int) -> list[float]:
    """`count` numbers with equal differences; only `first` when `count` is 1."""
    if count == 1:
        return [first]
    return [first + (last - first) * (i / (count - 1)) for i in range(count - 1)] + [last]


def whole_timesteps(num_timesteps: int, num_steps: int, spacing: LinearSpacing, offset: int) -> list[int]:
    """`num_steps` whole timesteps in [0, T), falling.

    Args:
        num_timesteps: T.
        num_steps: 1 … T.
        spacing: `linspace` rounds both ends and the equal parts between, `trailing` starts at T − 1, `leading` ends
            at 0.
        offset: added to every timestep of `leading`, as far as T − 1 allows.

    Raises:
        ValueError: more steps than timesteps.
    """
    _check(num_timesteps, num_steps, num_steps, spacing)
    if spacing == "linspace":
        return [round(t) for t in fractional_timesteps(num_timesteps, num_steps)]
    if spacing == "trailing":
        # The stride as floating point leaves it at T: ties of `round` then fall as they do in numpy's arange.
        stride = num_timesteps - (num_timesteps - num_timesteps / num_steps)
        return [round(num_timesteps - i * stride) - 1 for i in range(num_steps)]
    return _leading(num_timesteps, num_timesteps // num_steps, range(num_steps), offset)


def open_timesteps(num_timesteps: int, num_steps: int, spacing: LinearSpacing, offset: int) -> list[int]:
    """As `whole_timesteps`, but `linspace` and `leading` are cut into one part more, and the last timestep is dropped.

    With these two at most T − 1 steps fit.
    """
    if spacing == "trailing":
        return whole_timesteps(num_timesteps, num_steps, spacing, offset)
    _check(num_timesteps, num_steps, num_steps + 1, spacing)
    if spacing == "linspace":
        return whole_timesteps(num_timesteps, num_steps + 1, spacing, offset)[:-1]
    return _leading(num_timesteps, num_timesteps // (num_steps + 1), range(1, num_steps + 1), offset)


def fractional_timesteps(num_timesteps: int, num_steps: int) -> list[float]:
    """`num_steps` numbers from T − 1 to 0 with equal differences; only 0 when there is one step."""
    if num_steps == 1:
        return [0.0]
    # In this order and by this product, for numpy's linspace rounds so.
    parts = [i * ((num_timesteps - 1) / (num_steps - 1)) for i in range(num_steps - 1)]
    return [float(num_timesteps - 1), *reversed(parts)]


def _leading(num_timesteps: int, stride: int, parts: range, offset: int) -> list[int]:
    # With almost as many steps as timesteps the offset would lead past the last.
    offset = min(offset, num_timesteps - 1 - parts[-1] * stride)
    return [i * stride + offset for i in reversed(parts)]


def _check(num_timesteps: int, num_steps: int, num_parts: int, spacing: LinearSpacing) -> None:
    if not 1 <= num_parts <= num_timesteps:
        raise ValueError(f"num_steps={num_steps} with {num_timesteps} levels and {spacing} spacing")
