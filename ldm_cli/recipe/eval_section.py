"""The `eval` section of a recipe: what is measured, and how pictures are generated for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from ldm_cli.errors import UsageError
from ldm_cli.evaluation.config import EvalConfig
from ldm_cli.pictures.job import with_changes
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig


@dataclass(frozen=True)
class SweepPoint:
    """How the pictures of one point of a sweep are generated.

    Attributes:
        settings: the fields that the sweep sets, and their values.
        sampling: all fields.
    """

    settings: Mapping[str, JsonValue]
    sampling: SamplingConfig


class EvalSection(EvalConfig):
    """Which models, which metrics of them, and how pictures are generated for those."""

    sampling: SamplingConfig = SamplingConfig()
    """How pictures are generated; `images_per_prompt` is not used."""
    sweep: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Fields of `sampling`, and the values that each takes in turn: `guidance.scale: [1, 2, 4]`. The metrics of
    pictures are measured for every combination."""

    def sweep_points(self) -> list[SweepPoint]:
        """All combinations of `sweep`, the last field varying fastest; of an empty one, `sampling` alone.

        Raises:
            UsageError: a field does not exist, or a value cannot be.
        """
        points = []
        for values in product(*self.sweep.values()):
            settings = dict(zip(self.sweep, values, strict=True))
            points.append(SweepPoint(settings, with_changes(self.sampling, EditConfig(), settings, "eval.sweep")[0]))
        return points

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if fixed := [name for name in ("precision", "compile") if name in self.sweep]:
            raise ValueError(f"eval.sweep has no {fixed[0]}: a model is loaded once, as eval.sampling says")
        if self.sweep and not self.named_pipelines:
            raise ValueError("eval.sweep needs eval.pipeline or eval.pipelines")
        try:
            self.sweep_points()
        except UsageError as error:
            raise ValueError(f"{error.what}: {error.cause}" if error.cause else error.what) from error
        return self
