"""The checkpoint at which a process begins: the newest of its run, or the one that `--resume` names."""

from __future__ import annotations

import json
from pathlib import Path

from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.weight_files import refuse_foreign_content
from ldm_cli.training.checkpoint import latest_checkpoint, problem_with
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.optim import learning_rate
from ldm_cli.training.saving import restore
from ldm_cli.training.trainer import Trainer

_LOW_RATE = 0.05
"""Share of the peak learning rate below which the rest of a schedule hardly trains."""


def resume(trainer: Trainer, start: Path | None) -> Path | None:
    """Restore the run's newest checkpoint, which is returned, or the one it is to start at.

    Args:
        trainer: at step 0.
        start: a checkpoint or a run folder, whose newest checkpoint counts, for a run without checkpoints of its own.

    Raises:
        CheckpointError: none can be used, or the one given leaves no step to train.
        InputNotFoundError: the one given does not exist.
    """
    run, ranks = trainer.run, trainer.ranks
    own = latest_checkpoint(run.checkpoints, run.warn, run.frozen) if ranks.is_first else None
    source = own
    if ranks.is_first and own is None and start is not None:
        source = _checkpoint_at(start, trainer)
    # Rank 0 has verified the checkpoint, or found an earlier one; the others take the same.
    found, is_own = json.loads(ranks.from_first(json.dumps([str(source or ""), own is not None])))
    source = Path(found) if found else None
    if source is None:
        return None
    restore(trainer, source)
    step, config = trainer.step, trainer.config
    if step > config.steps or (step == config.steps and not is_own):
        raise CheckpointError(
            f"cannot continue from '{source}'",
            f"it is at step {step}, train.steps={config.steps}: no step is left",
            "raise train.steps, or begin a new training at its weights with start_from",
        )
    if is_own:
        trainer.saved_step = step
    if ranks.is_first:
        run.log(f"continuing '{source}' at step {step} of {config.steps}")
        if not is_own and (rate := _largest_rate(config, step)) < _LOW_RATE * config.lr:
            run.warn(f"the learning rate is at most {rate:.2g} from here on; start_from begins a new schedule")
    return source if is_own else None


def _checkpoint_at(start: Path, trainer: Trainer) -> Path:
    """The checkpoint that a user names, verified; errors as of `resume`."""
    if start.is_file():
        refuse_foreign_content(start)
    if not start.is_dir():
        cause = "it is a file" if start.exists() else "no such folder"
        raise InputNotFoundError(f"no checkpoint '{start}'", cause, "give a run, or a folder like …/step-00000500")
    if (start / "checkpoints").is_dir():
        newest = latest_checkpoint(start / "checkpoints", trainer.run.warn)
        if newest is None:
            raise CheckpointError(f"cannot continue from '{start}'", "this run has no checkpoint", "give another")
        return newest
    if (problem := problem_with(start)) is not None:
        raise CheckpointError(f"cannot continue from '{start}'", problem, "give another checkpoint")
    return start


def _largest_rate(config: TrainConfig, step: int) -> float:
    """The largest learning rate of the steps after `step`: that of the next one, or of the last of the warm-up."""
    return learning_rate(config, max(step + 1, config.warmup_steps))
