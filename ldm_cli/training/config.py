"""What a recipe says about training: the same fields for all three trainers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm_cli.config import Config

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(Config):
    """Length, batch, optimizer, precision, and how often to log, save, validate and sample."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Positive
    """Samples per optimizer step, over all ranks and accumulation parts: the global batch."""
    gradient_accumulation: Positive = 1
    """The batch is run in this many equal parts, to save memory; must divide `batch_size`."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: constant, or half a cosine down to `lr × min_lr_fraction`."""
    min_lr_fraction: Fraction = 0.0
    """Last learning rate of the cosine, as a fraction of `lr`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay; applied to matrices and kernels, not to biases, norms and gains."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this total 2-norm; null leaves them alone."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute type under autocast; weights and optimizer state stay fp32. fp16 scales the loss."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the exponential moving average of the weights; null keeps none."""
    ema_warmup: bool = True
    """The decay grows as (1 + step) / (10 + step) up to `ema_decay`: short runs forget their start."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    channels_last: bool = True
    """Keep convolution weights and activations in NHWC memory order."""
    log_every: Positive = 10
    """Steps between lines in metrics.jsonl."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints to keep."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations on `data.val_shards`; 0: only at the end."""
    validation_samples: Positive = 256
    """Held-out samples per validation: the first ones, the same every time."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Steps between sample pictures; 0: only at the end."""
    max_nonfinite: Annotated[int, Field(ge=0)] = 10
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation={self.gradient_accumulation} does not divide batch_size={self.batch_size}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}")
        return self
