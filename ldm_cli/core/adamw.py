"""AdamW by torch's fused kernel, without what torch's own class adds to it: for every parameter a count of its own to
increase and a copy of what lies in channels-last order; and torch's compiler, which optimizers import at their first
step so as to keep out of compiled code (1.3 s at the start of every training). Nothing here calls an optimizer from
compiled code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_DISABLED = "__dynamo_disable"  # where torch._disable_dynamo remembers what the compiler has made of a function


def _leave_compiler_out() -> None:
    """Say of the methods of all optimizers that they have been dealt with."""
    for method in vars(torch.optim.Optimizer).values():
        plain = inspect.unwrap(method) if inspect.isfunction(method) else method
        if plain is not method and not hasattr(plain, _DISABLED):
            setattr(plain, _DISABLED, plain)


_leave_compiler_out()


class AdamW(torch.optim.Optimizer):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    State of a parameter: `step` (scalar), `exp_avg` and `exp_avg_sq` (of its shape and memory order).

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Attributes:
        grad_scale: the gradients are divided by it; scalar tensor, or None.
        found_inf: where it is 1 the step is not taken; scalar tensor, or None.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._counts = [_Counts() for _ in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group, counts in zip(self.param_groups, self._counts, strict=True):
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            states = [self.state[p] or self._begun(p) for p in moved]
            total = counts.of(states)
            total += 1
            torch._fused_adamw_(
                [_in_memory_order(p, p) for p in moved],
                [_in_memory_order(_laid_like(p.grad, p), p) for p in moved],
                [_in_memory_order(s["exp_avg"], p) for s, p in zip(states, moved, strict=True)],
                [_in_memory_order(s["exp_avg_sq"], p) for s, p in zip(states, moved, strict=True)],
                [],
                [s["step"] for s in states],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
            )
            if self.found_inf is not None:
                total -= self.found_inf

    def _begun(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        self.state[parameter] = state
        return state


class _Counts:
    """Counts of steps, which lie in one tensor: it is counted up once for all of them."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(0)
        self.parts: tuple[Tensor, ...] = ()

    def of(self, states: list[dict[str, Tensor]]) -> Tensor:
        """The tensor [N] of which each state's count is an element; made anew where they are others than last time."""
        if len(states) != len(self.parts) or any(s["step"] is not p for s, p in zip(states, self.parts, strict=True)):
            self.total = torch.stack([state["step"] for state in states])
            self.parts = self.total.unbind()
            for state, part in zip(states, self.parts, strict=True):
                state["step"] = part
        return self.total


def _in_memory_order(x: Tensor, parameter: nn.Parameter) -> Tensor:
    """A kernel [O, I, H, W] that lies in channels-last order as [O, H, W, I]; what lies otherwise as it is.

    The fused kernel copies what is not contiguous, once more for each step. x lies as the parameter does.
    """
    return x.permute(0, 2, 3, 1) if _is_channels_last(parameter) else x


def _laid_like(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    """The gradient in the parameter's memory order."""
    return gradient.contiguous(memory_format=torch.channels_last) if _is_channels_last(parameter) else gradient


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
