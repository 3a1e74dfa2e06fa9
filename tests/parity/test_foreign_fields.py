"""Each field of a foreign configuration does what docs/foreign-models.md says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.parity.foreign_fields import CLASSES, Foreign

DOCUMENT = Path(__file__).parents[2] / "docs" / "foreign-models.md"
HONOURED = [(c, name, value) for c in CLASSES for name, values in c.honoured.items() for value in values]
REFUSED = [(c, name, value) for c in CLASSES for name, value in c.refused.items()]
HARMLESS = [(c, name, value) for c in CLASSES for name, value in c.harmless.items()]


def ids(cases: list[tuple[Foreign, str, Any]]) -> list[str]:
    return [f"{c.name} {name} {i}" for i, (c, name, _) in enumerate(cases)]


def table(foreign: Foreign) -> str:
    """The part of the document on one class, each stretch of blanks and line ends as one blank."""
    parts = [f"### {foreign.name} ({foreign.file})"]
    for word in ("honoured", "refused", "harmless"):
        if names := sorted(getattr(foreign, word)):
            parts.append(f"- {word}: {', '.join(f'`{name}`' for name in names)}")
    return " ".join(parts)


@pytest.mark.parametrize("foreign", CLASSES, ids=lambda c: c.name)
def test_every_field_of_the_installed_library_is_known(foreign: Foreign) -> None:
    known = [*foreign.honoured, *foreign.refused, *foreign.harmless]
    assert len(known) == len(set(known))
    assert set(known) == foreign.names


@pytest.mark.parametrize("foreign", CLASSES, ids=lambda c: c.name)
def test_the_document_says_what_becomes_of_every_field(foreign: Foreign) -> None:
    assert table(foreign) in " ".join(DOCUMENT.read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("foreign", "name", "value"), HONOURED, ids=ids(HONOURED))
def test_an_honoured_field_does_what_it_does_in_the_library(foreign: Foreign, name: str, value: Any) -> None:
    found, expected = foreign.both(foreign.varied(name, value))
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected.double(), atol=2e-5)


@pytest.mark.parametrize(("foreign", "name", "value"), REFUSED, ids=ids(REFUSED))
def test_a_refused_field_is_named(foreign: Foreign, name: str, value: Any) -> None:
    with pytest.raises(Exception, match=name) as caught:
        foreign.both(foreign.varied(name, value))
    assert type(caught.value).__name__ in ("ValidationError", "CheckpointError", "ValueError")


@cache
def unvaried(name: str) -> torch.Tensor:
    """What we compute with the fields as they are."""
    (foreign,) = [one for one in CLASSES if one.name == name]
    return foreign.both(foreign.base)[0]


@pytest.mark.parametrize(("foreign", "name", "value"), HARMLESS, ids=ids(HARMLESS))
def test_a_harmless_field_changes_nothing_in_either_program(foreign: Foreign, name: str, value: Any) -> None:
    found, expected = foreign.both(foreign.varied(name, value))
    assert torch.equal(found, unvaried(foreign.name))
    assert torch.allclose(found.double(), expected.double(), atol=2e-5)
