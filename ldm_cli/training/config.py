"""The training section of a recipe: the same fields for all trainers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm_cli.config import Config
from ldm_cli.errors import RecipeError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(Config):
    """Length, batch, optimizer, precision, and how often to log, save, validate and sample."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Annotated[int, Field(ge=1, le=2**22)]
    """Samples per optimizer step, over all ranks and accumulation parts: the global batch."""
    gradient_accumulation: Positive = 1
    """Each rank runs its part of the batch in this many equal parts, to save memory; must divide `batch_size`."""
    deterministic: Literal["run", "elastic"] = "run"
    """run: the same bits every time with the same number of ranks, parts and threads. elastic: the same bits for every
    number of ranks and parts; the batch is run in chunks of `chunk_size`, with one thread per rank on the CPU."""
    chunk_size: Positive | None = None
    """Samples whose gradient is computed at once where `deterministic` is elastic; must divide `batch_size`. null: an
    eighth of it, or the next smaller part that divides it."""
    strategy: Literal["replicated", "sharded"] = "replicated"
    """How several ranks hold the model. replicated: each a full copy (data parallel). sharded: each a part of weights,
    gradients, moments and averages (ZeRO-3, FSDP2), for models that are too large otherwise; `channels_last` has no
    effect, and `muon` and `elastic` are refused."""
    rank_timeout: Annotated[float, Field(ge=1)] = 120.0
    """Seconds of silence after which a rank counts as lost."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all; or Muon for hidden matrices and kernels, with AdamW for the rest: often fewer steps to a loss."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate, of both optimizers."""
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
    """Decoupled weight decay; applied to matrices and kernels, not to biases, norms and gains."""
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
    compile: bool = False
    """Compile residual blocks, Transformers and layers by torch.compile: minutes at the first start, seconds at later
    ones. Meant for GPUs: on a CPU it gains nothing. Validation and sample pictures run uncompiled."""
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
        if self.chunk_size is not None and self.batch_size % self.chunk_size:
            raise ValueError(f"chunk_size={self.chunk_size} does not divide batch_size={self.batch_size}")
        if self.strategy == "sharded" and self.deterministic == "elastic":
            raise ValueError("strategy=sharded adds up gradients as parts, not in the order of deterministic=elastic")
        if self.strategy == "sharded" and self.compile:
            raise ValueError("strategy=sharded does not work with compile=true yet")
        if self.strategy == "sharded" and self.optimizer == "muon":
            raise ValueError("strategy=sharded cuts the matrices that optimizer=muon needs whole")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}")
        return self

    def chunk(self) -> int:
        """Samples per chunk of the canonical sum: `chunk_size` or its default."""
        if self.chunk_size is not None:
            return self.chunk_size
        return max(d for d in range(1, max(1, self.batch_size // 8) + 1) if self.batch_size % d == 0)

    def parts_per_rank(self, world_size: int) -> int:
        """Number of parts in which each of `world_size` ranks runs its share of the batch.

        Raises:
            RecipeError: the batch cannot be divided so.
        """
        if self.deterministic == "elastic":
            num_parts, unit = self.batch_size // self.chunk(), f"chunks of {self.chunk()} samples"
            if num_parts % world_size == 0:
                return num_parts // world_size
            cause = f"train.batch_size={self.batch_size} makes {num_parts} {unit}"
        else:
            if self.batch_size % (world_size * self.gradient_accumulation) == 0:
                return self.gradient_accumulation
            cause = (
                f"train.batch_size={self.batch_size} is no multiple of {world_size} ranks × "
                f"train.gradient_accumulation={self.gradient_accumulation}"
            )
        raise RecipeError(
            f"cannot divide the batch among {world_size} ranks", cause, "change train.batch_size or the number of ranks"
        )
