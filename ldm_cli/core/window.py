"""A part of a picture or of its latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Window:
    """Place and size of a rectangle, in pixels of whatever it is a part of."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, scale: int) -> Self:
        """The same part of a picture that has `scale` pixels where this one's has one, along each side."""
        return type(self)(self.top * scale, self.left * scale, self.height * scale, self.width * scale)

    @property
    def area(self) -> tuple[Any, slice, slice]:
        """The index of the part in a tensor [..., H, W]."""
        return ..., slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
