"""What the base of all configurations says of invalid values."""

from __future__ import annotations

import pytest
from pydantic import ValidationError, model_validator

from ldm_cli.config import Config, causes


class Example(Config):
    """A record with a rule."""

    size: int = 1
    """A number."""
    kind: str = "A"
    """A word."""

    @model_validator(mode="after")
    def _check(self) -> Example:
        if self.kind == "B":
            raise ValueError("kind B is gone")
        return self


def test_causes_name_each_field_and_keep_the_case_of_values() -> None:
    with pytest.raises(ValidationError) as failure:
        Example.from_mapping({"size": "ABC", "Other": 1})
    first, second = causes(failure.value)
    assert first.startswith("size: input should be a valid integer")
    assert second == "Other: extra inputs are not permitted"


def test_a_cause_about_the_whole_record_is_the_rule_alone() -> None:
    with pytest.raises(ValidationError) as failure:
        Example.from_mapping({"kind": "B"})
    assert causes(failure.value) == ["kind B is gone"]
