"""Guidance: pushing the network's prediction further than it would go by itself.

Classifier-free (Ho & Salimans 2022, arXiv:2207.12598), with rescaling (Lin et al. 2023), within an interval of noise
levels (Kynkäänniemi et al. 2024), projected (APG, Sadat et al. 2024), thresholded (Saharia et al. 2022), away from a
weaker network (Karras et al. 2024) or a perturbed one (Ahn et al. 2024), and along the gradient of a score (Dhariwal &
Nichol 2021). Predictions of ε, v, x_0 and u are affine in x_0, so that differences of any of them mean the same.
Rescaling works on the network's prediction, projecting and thresholding on x_0, as in the papers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import GuidanceConfig, ProjectionConfig, ThresholdConfig
from ldm_cli.core.diffusion.prediction import Prediction
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor

ConditionalNetwork = Callable[[Tensor, Level, Condition], Tensor]
"""(x_t [B, …], its level, B rows of conditions) → the network's prediction, [B, …]."""


def percentile(x0: Tensor, share: float) -> Tensor:
    """What a share of the absolute values of each picture is below; [B, …] → float32 [B]."""
    return x0.flatten(1).abs().float().quantile(share, dim=1)


Percentile = Callable[[Tensor, float], Tensor]
"""As the function `percentile`."""


def guided(
    network: ConditionalNetwork,
    conditional: Condition,
    unconditional: Condition,
    config: GuidanceConfig,
    prediction: Prediction,
    weaker: ConditionalNetwork | None = None,
    perturbed: ConditionalNetwork | None = None,
    percentile: Percentile = percentile,
) -> CleanPredictor:
    """The guided prediction of x_0, for fixed conditions.

    One call of the network with twice the rows computes both predictions, conditional and unconditional. At scale 0 and
    1, and outside of the interval, it computes only the one that is used. The result serves one sampling run: APG's
    momentum depends on the previous call.

    Args:
        conditional, unconditional: B rows each; a negative prompt takes the place of the empty one.
        config: all but `model`, `clip` and the layers of `perturb`, which the caller applies.
        weaker: its prediction with the conditional rows replaces the unconditional one (autoguidance).
        perturbed: network with `config.perturb` applied.
        percentile: for thresholding.
    """
    project = None if config.apg is None else _Projection(config.apg)
    both = Condition.cat([unconditional, conditional])

    def predict(x: Tensor, level: Level, scale: float) -> tuple[Tensor, Tensor | None]:
        """The prediction to start from, and the one to move away from."""
        if scale == 1.0:
            return network(x, level, conditional), None
        if weaker is not None:
            away = weaker(x, level, conditional)
            return (away, None) if scale == 0.0 else (network(x, level, conditional), away)
        if scale == 0.0:
            return network(x, level, unconditional), None
        away, toward = network(torch.cat([x, x]), level, both).chunk(2)
        return toward, away

    def denoise(x: Tensor, level: Level) -> Tensor:
        def x0_of(output: Tensor) -> Tensor:
            return prediction.x0(output, x, level.signal, level.noise)

        active = config.interval is None or config.interval[0] <= level.sigma <= config.interval[1]
        scale = config.scale if active else 1.0
        output, away = predict(x, level, scale)
        if away is None:
            x0 = x0_of(output)
        elif project is not None:
            x0 = project(x0_of(output), x0_of(away), scale)
        else:
            x0 = x0_of(rescaled(guide(away, output, scale), output, config.rescale))
        if active and perturbed is not None and config.perturb is not None and config.perturb.scale > 0.0:
            condition = unconditional if scale == 0.0 else conditional
            x0 = x0 + config.perturb.scale * (x0_of(output) - x0_of(perturbed(x, level, condition)))
        return x0 if config.threshold is None else thresholded(x0, config.threshold, percentile)

    return denoise


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale · (conditional − unconditional), of their shape."""
    return unconditional + scale * (conditional - unconditional)


def rescaled(output: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided prediction, its deviation over each image brought to that of the conditional one, by `share`.

    Lin et al. 2023, eq. 15 and 16, arXiv:2305.08891, against overexposed pictures. Both [B, …], as is the result.
    """
    if share == 0.0:
        return output
    dimensions = tuple(range(1, output.ndim))
    ratio = conditional.std(dim=dimensions, keepdim=True) / output.std(dim=dimensions, keepdim=True)
    return share * (output * ratio) + (1.0 - share) * output


def thresholded(x0: Tensor, config: ThresholdConfig, percentile: Percentile = percentile) -> Tensor:
    """x_0 clipped to its percentile and scaled back to the limit (Saharia et al. 2022, section 2.3); [B, …]."""
    size = percentile(x0, config.percentile)
    most = None if config.max_scale is None else config.limit * config.max_scale
    bound = size.clamp(min=config.limit, max=most).to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -bound, bound) * (config.limit / bound)


def along_score(denoise: CleanPredictor, score: Callable[[Tensor], Tensor], scale: float) -> CleanPredictor:
    """The prediction of x_0, moved along the gradient of a score of it.

    x_0 + scale · (b²/a) ∇_x score(x_0(x)): ε − b · scale · ∇ of Dhariwal & Nichol 2021, algorithm 2, arXiv:2105.05233,
    in terms of x_0. By Tweedie's formula the factor is the covariance of x_0 given x: it fades with the noise.

    Args:
        denoise: predicts x_0; the gradient flows through it.
        score: x_0 [B, …] → one score per sample, [B].
    """

    def steered(x: Tensor, level: Level) -> Tensor:
        if level.signal == 0.0:
            return denoise(x, level)
        # Tensors made in inference mode cannot take part in autograd: a copy made outside of it can.
        with torch.inference_mode(False), torch.enable_grad():
            seen = x.clone().requires_grad_()
            x0 = denoise(seen, level)
            (gradient,) = torch.autograd.grad(score(x0).sum(), seen)
        return x0.detach() + scale * level.noise**2 / level.signal * gradient

    return steered


class _Projection:
    """APG, algorithm 1 of Sadat et al. 2024, arXiv:2410.02416."""

    def __init__(self, config: ProjectionConfig) -> None:
        self.config = config
        self._running: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Both x_0 [B, …] → x_0."""
        step = conditional - unconditional
        if self._running is not None:
            step = step + self.config.momentum * self._running
        self._running = step
        if self.config.norm is not None:
            step = step * (self.config.norm / _norm(step)).clamp(max=1.0)
        direction = conditional / _norm(conditional)
        parallel = (step * direction).sum(dim=tuple(range(1, step.ndim)), keepdim=True) * direction
        return conditional + (scale - 1.0) * (step - (1.0 - self.config.parallel) * parallel)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row, [B, 1, …], never 0."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norm.clamp(min=1e-12)
