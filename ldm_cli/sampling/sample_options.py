"""What a job may want beside prompts and a sampler: a picture to work on, windows, weights, looks on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor
from ldm_cli.reporting import Progress
from ldm_cli.sampling.edit_input import Canvas

OnPreview = Callable[[Tensor], None]
"""(what a group of pictures looks like so far: uint8 [N, 3, H, W])."""


@dataclass(frozen=True)
class Extras:
    """Further wishes.

    Attributes:
        canvas: a picture to work on; None: from nothing.
        window: side, in latents, of the windows that networks see of larger pictures; None: they see all.
        weighted: whether `(word:1.3)` in a prompt is a weight.
        preview_every: steps between looks; 0: none.
        on_preview: is shown them.
    """

    canvas: Canvas | None = None
    window: int | None = None
    weighted: bool = False
    preview_every: int = 0
    on_preview: OnPreview | None = None


PLAIN = Extras()


@dataclass
class Look:
    """Watches a group of pictures come to be: counts its steps, and shows it every now and then.

    Attributes:
        progress: hears of every step; None: another group is watched.
        done: pictures before this group.
        steps: steps to come.
        extras: how often to show it.
        show: is given the x_0 that the network sees, [N, C, h, w].
        go_on: called at every step; raises where it should be the last.
    """

    progress: Progress | None
    done: int
    steps: int
    extras: Extras
    show: Callable[[Tensor], None]
    go_on: Callable[[], None]

    def at(self, model: CleanPredictor) -> CleanPredictor:
        """The model, watched."""
        calls, every = 0, self.extras.preview_every if self.extras.on_preview is not None else 0

        def watched(x: Tensor, level: Level) -> Tensor:
            nonlocal calls
            calls += 1
            self.go_on()
            if self.progress is not None:
                self.progress.update(self.done, {"step": f"{calls}/{self.steps}"})
            x0 = model(x, level)
            if every and calls % every == 0:
                self.show(x0)
            return x0

        return watched
