"""The training section of a recipe: the same fields for all trainers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm_cli.config import Config
from ldm_cli.errors import RecipeError
from ldm_cli.training.mirror import TrackerName

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(Config):
    """Length, batch, optimizer, precision, and how often to log, save, validate and sample."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Annotated[int, Field(ge=1, le=2**22)]
    """Samples per optimizer step, over all ranks and accumulation parts: the global batch."""
    micro_batch: Positive | None = None
    """Most samples that a device runs at once, to save memory: it runs its share of the batch in equal parts, and adds
    up their gradients. null: the whole share."""
    deterministic: Literal["run", "elastic"] = "run"
    """run: the same bits every time with the same number of ranks, parts and threads; on CUDA, the same samples and
    random numbers, and sums that agree to rounding. elastic: the same bits for every number of ranks. The batch is run
    in parts of `micro_batch` samples (null: an eighth of it, or the next smaller part that divides it), with one thread
    per rank on the CPU, and by torch's deterministic kernels on CUDA, as far as there are any."""
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
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Compute type under autocast; weights and optimizer state stay fp32. fp16 scales the loss. null: bf16 on CUDA,
    else fp32."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the exponential moving average of the weights; null keeps none."""
    ema_warmup: bool = True
    """The decay grows as (1 + step) / (10 + step) up to `ema_decay`: short runs forget their start."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    channels_last: bool = True
    """Keep convolution weights and activations in NHWC memory order."""
    compile: bool | Literal["auto"] = "auto"
    """Compile residual blocks, Transformers and layers by torch.compile: minutes at the first start, seconds at later
    ones. Validation and sample pictures run uncompiled. auto: on CUDA, for 1,000 steps or more, where a compiler is
    there; on a CPU it gains nothing."""
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
    track: tuple[TrackerName, ...] = ()
    """Mirrors of figures and sample grids: `tensorboard` (in the run's folder), `wandb`. Neither can stop a run."""
    max_nonfinite: Annotated[int, Field(ge=0)] = 10
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.deterministic == "elastic" and self.batch_size % (self.micro_batch or 1):
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}")
        if self.strategy == "sharded" and self.deterministic == "elastic":
            raise ValueError("strategy=sharded adds up gradients as parts, not in the order of deterministic=elastic")
        if self.strategy == "sharded" and self.compile is True:
            raise ValueError("strategy=sharded does not work with compile=true yet")
        if self.strategy == "sharded" and self.optimizer == "muon":
            raise ValueError("strategy=sharded cuts the matrices that optimizer=muon needs whole")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}")
        return self

    def part_size(self, world_size: int = 1) -> int:
        """Samples that each of `world_size` ranks runs at once; errors as in `parts_per_rank`."""
        return self.batch_size // (world_size * self.parts_per_rank(world_size))

    def parts_per_rank(self, world_size: int) -> int:
        """Number of parts in which each of `world_size` ranks runs its share of the batch.

        Raises:
            RecipeError: the batch cannot be divided so.
        """
        if self.deterministic == "elastic":
            size = self.micro_batch or _largest_divisor(self.batch_size, max(1, self.batch_size // 8))
            num_parts = self.batch_size // size
            if num_parts % world_size == 0:
                return num_parts // world_size
            cause = f"train.batch_size={self.batch_size} makes {num_parts} parts of {size} samples"
        else:
            share = self.batch_size // world_size
            num_parts = -(-share // (self.micro_batch or share or 1))
            if share and self.batch_size % (world_size * num_parts) == 0:
                return num_parts
            cause = f"train.batch_size={self.batch_size} is no multiple of {world_size} ranks"
            cause += f" × {num_parts} parts of at most train.micro_batch={self.micro_batch}" if self.micro_batch else ""
        remedy = "change train.batch_size, train.micro_batch or the number of ranks"
        raise RecipeError(f"cannot divide the batch among {world_size} ranks", cause, remedy)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`."""
    return max(d for d in range(1, limit + 1) if number % d == 0)
