"""Optimizers, the learning-rate curve, and one guarded step: clipping, loss scaling and the non-finite check
without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ldm_cli.training.config import TrainConfig
from ldm_cli.training.muon import Muon, is_hidden_matrix
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.weights import Weights

_FIRST_LOSS_SCALE = 2.0**16
_STEPS_TO_GROW = 2000
_FIELDS: dict[type, tuple[str, ...]] = {Muon: ("momentum",), AdamW: ("step", "exp_avg", "exp_avg_sq")}
"""What an optimizer keeps of a parameter; AdamW its count of steps first."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (1-based): linear warm-up, then constant or half a cosine.

    The cosine is Loshchilov & Hutter 2017, eq. 5 (arXiv:1608.03983), without restarts.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_fraction + (1.0 - config.min_lr_fraction) * cosine)


def build_optimizers(parameters: Mapping[str, nn.Parameter], config: TrainConfig, ranks: Ranks) -> list[AdamW | Muon]:
    """The optimizers of a module's trainable parameters, by name, each parameter in one of them.

    Fused AdamW with weight decay on matrices and kernels alone (ndim ≥ 2); with `optimizer: muon`, Muon instead for
    hidden matrices and kernels.
    """
    named = [(name, p) for name, p in parameters.items() if p.requires_grad]
    hidden = [p for name, p in named if config.optimizer == "muon" and is_hidden_matrix(name, p)]
    taken = {id(p) for p in hidden}
    others = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[AdamW | Muon] = []
    if others:
        filled = [group for group in groups if group["params"]]
        optimizers.append(AdamW(filled, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    if hidden:
        optimizers.append(Muon(hidden, config.lr, config.weight_decay, ranks=ranks))
    return optimizers


class GuardedOptimizers:
    """The optimizers of all modules, stepped together or, when any gradient is non-finite, not at all.

    Each module's gradients are clipped by their own norm, so that a discriminator cannot throttle the
    generator. Each optimizer divides the gradients by `grad_scale` and skips the update where `found_inf`
    is 1, so clipping, unscaling and skipping need neither a pass over the gradients nor a look at a value on
    the host.

    Attributes:
        loss_scale: float32 scalar tensor the loss is multiplied by; 1 unless the precision is fp16.
        nonfinite_run: float32 scalar tensor, consecutive skipped steps.
    """

    def __init__(self, weights: Weights, config: TrainConfig, device: torch.device) -> None:
        self.weights, self.config = weights, config
        held = weights.parameters
        built = {name: build_optimizers(held[name], config, weights.ranks) for name in held}
        self.optimizers = {name: optimizers for name, optimizers in built.items() if optimizers}
        scale = _FIRST_LOSS_SCALE if config.precision == "fp16" else 1.0
        self.loss_scale = torch.tensor(scale, device=device)
        self.steps_since_overflow = torch.tensor(0.0, device=device)
        self.nonfinite_run = torch.tensor(0.0, device=device)

    def step(self, lr: float, loss: Tensor, num_parts: int = 1) -> tuple[dict[str, Tensor], Tensor]:
        """Update all parameters from their gradients, then drop the gradients.

        Args:
            lr: learning rate of this step.
            loss: scalar; a non-finite value also skips the step.
            num_parts: number of parts whose gradients were added up; the step takes their mean.

        Returns:
            The 2-norm of each module's mean gradient, before clipping, and `kept`: 1 if the step was taken, or 0.
        """
        scale = self.loss_scale * num_parts
        norms = {name: self.weights.grad_norm(name) / scale for name in self.optimizers}
        finite = torch.isfinite(torch.stack([*norms.values(), loss.detach().to(self.loss_scale)])).all()
        found_inf = 1.0 - finite.to(torch.float32)
        for name, optimizers in self.optimizers.items():
            clip = torch.ones_like(self.loss_scale)
            if self.config.max_grad_norm is not None:
                clip = (norms[name] / self.config.max_grad_norm).clamp(min=1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # Fused AdamW reads both, but does not declare them.
                optimizer.grad_scale, optimizer.found_inf = scale * clip, found_inf  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.nonfinite_run = (self.nonfinite_run + 1.0) * found_inf
        if self.config.precision == "fp16":
            self._adapt_loss_scale(found_inf)
        return norms, 1.0 - found_inf

    def _adapt_loss_scale(self, found_inf: Tensor) -> None:
        """Halve the scale on overflow, double it after 2,000 good steps (Micikevicius et al. 2018, §3.2)."""
        self.steps_since_overflow = (self.steps_since_overflow + 1.0) * (1.0 - found_inf)
        grow = (self.steps_since_overflow >= _STEPS_TO_GROW).to(torch.float32)
        self.steps_since_overflow = self.steps_since_overflow * (1.0 - grow)
        self.loss_scale = self.loss_scale * torch.exp2(grow - found_inf)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly: moments and step counts by name, loss scale, counters.

        Moments of which this rank holds a part are DTensors.
        """
        tensors = {
            "loss_scale": self.loss_scale,
            "steps_since_overflow": self.steps_since_overflow,
            "nonfinite_run": self.nonfinite_run,
        }
        for prefix, parameter, optimizer in self._locations():
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[prefix + field] = value if field == "step" else self.weights.as_distributed(parameter, value)
        return tensors

    def empty_moments(self, names: Container[str]) -> dict[str, Tensor]:
        """Tensors to be filled with the moments of those parameters whose count of steps is among `names`."""
        return {
            prefix + field: self.weights.as_distributed(parameter, torch.empty_like(parameter.detach()))
            for prefix, parameter, optimizer in self._locations()
            for field in _FIELDS[type(optimizer)]
            if field != "step" and f"{prefix}step" in names
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`.

        Raises:
            KeyError: a tensor is missing.
        """
        for field in ("loss_scale", "steps_since_overflow", "nonfinite_run"):
            setattr(self, field, tensors[field].to(self.loss_scale.device))
        for prefix, parameter, optimizer in self._locations():
            fields = _FIELDS[type(optimizer)]
            if f"{prefix}{fields[0]}" not in tensors:
                continue  # the parameter had received no gradient yet
            for field in fields:
                value = tensors[f"{prefix}{field}"]
                if field != "step":
                    value = self.weights.local_part(parameter, value)
                # empty_like keeps the parameter's memory order, in which torch's own AdamW keeps the moments
                place = torch.empty_like(parameter.detach() if field != "step" else value, device=parameter.device)
                optimizer.state[parameter][field] = place.copy_(value)

    def _locations(self) -> Iterator[tuple[str, nn.Parameter, AdamW | Muon]]:
        """(prefix of its names in a checkpoint, parameter, the optimizer it is in) of every trained parameter."""
        for module, optimizers in self.optimizers.items():
            home = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
            for name, parameter in self.weights.parameters[module].items():
                if parameter.requires_grad:
                    yield f"{module}.{name}.", parameter, home[id(parameter)]
