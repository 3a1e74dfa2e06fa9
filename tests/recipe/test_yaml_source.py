"""Strict YAML: what values mean, where they are, and what is refused."""

from __future__ import annotations

import random
import string
import time
from typing import Any

import pytest

from ldm_cli.recipe.yaml_source import MAX_BYTES, Mark, parse_yaml, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0", 0),
        ("+7", 7),
        ("123456789012345678901", 123456789012345678901),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("True", "True"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("010", "010"),
        ("0o10", "0o10"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1e999", "1e999"),
        ("<<", "<<"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("a/{000..127}.tar", "a/{000..127}.tar"),
        ("|\n  two\n  lines", "two\nlines"),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    source = parse_yaml(f"key: {text}")
    assert source.problems == []
    assert source.data == {"key": value}
    assert type(source.data["key"]) is type(value)


def test_every_part_knows_its_line_and_column() -> None:
    source = parse_yaml("a:\n  b: [1, {c: x}]\n  'd': y\n")
    assert source.data == {"a": {"b": [1, {"c": "x"}], "d": "y"}}
    assert source.keys[("a", "b")] == Mark(2, 3)
    assert source.values[("a", "b")] == Mark(2, 6)
    assert source.keys[("a", "b", 1)] == Mark(2, 10)
    assert source.keys[("a", "b", 1, "c")] == Mark(2, 11)
    assert source.values[("a", "b", 1, "c")] == Mark(2, 14)
    assert source.values[("a", "d")] == Mark(3, 8)
    assert source.quoted == set()


def test_quotes_are_remembered() -> None:
    assert parse_yaml("a: '1'\nb: 1\nc: |\n  1\n").quoted == {("a",), ("c",)}


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, 1, "a: duplicate key, first given at line 1"),
        ("a: {b: 1, b: 2}", 1, 11, "a.b: duplicate key, first given at line 1"),
        ("a: !!python/object/apply:os.system [ls]", 1, 4, "tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: !!str 5", 1, 4, "expected a plain value, found the tag"),
        ("a: &x 1", 1, 4, "found the anchor '&x'"),
        ("a: 1\nb: *x", 2, 4, "found the alias '*x'"),
        ("? [a]\n: 1", 1, 3, "a key must be a name, not a list"),
        ("a: 1\n---\nb: 2", 2, 1, "expected one document"),
        ("a: [1, 2", 1, 9, "not valid YAML"),
        ("a: b: c", 1, 5, "not valid YAML"),
        ("\ta: 1", 1, 1, "not valid YAML"),
        ("a: x\nb: \x07", 2, 4, "not valid YAML: character U+0007"),
        ('a: "\\ud800"', 1, 4, "half a surrogate pair"),
        ("[" * 40, 1, 33, "expected at most 32 levels"),
        ("x" * (MAX_BYTES + 1), 1, 1, f"expected at most {MAX_BYTES} bytes"),
    ],
)
def test_what_a_recipe_must_not_hold_is_refused_at_its_place(text: str, line: int, column: int, message: str) -> None:
    problems = parse_yaml(text).problems
    assert problems
    assert problems[0].mark == Mark(line, column)
    assert message in problems[0].message


def test_a_bomb_of_aliases_costs_nothing() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    start = time.process_time()
    assert parse_yaml(bomb).problems
    assert parse_yaml("[" * (MAX_BYTES - 1)).problems
    assert time.process_time() - start < 2  # the bomb unfolded would take minutes


def test_plain_data_survives_being_written_and_read() -> None:
    dice = random.Random(0)

    def draw(depth: int) -> Any:
        kind = dice.randrange(7 if depth else 5)
        if kind == 0:
            return dice.randrange(-(10**6), 10**6)
        if kind == 1:
            return dice.choice([1.5, -2e-7, 1e-08, 3.0, 1e20])
        if kind == 2:
            return dice.choice([True, False, None])
        if kind in (3, 4):
            words = ["no", "010", "1e-4", "12:30:00", "", "~", "é 猫", "a: b", "{x}", "*", " x ", "a\nb"]
            return dice.choice([*words, "".join(dice.choices(string.printable[:-2], k=5)).replace("\r", "")])
        if kind == 5:
            return [draw(depth - 1) for _ in range(dice.randrange(4))]
        return {dice.choice(["a", "b", "no", "1"]): draw(depth - 1) for _ in range(dice.randrange(4))}

    for _ in range(200):
        data = {"root": draw(3)}
        source = parse_yaml(to_yaml(data))
        assert (source.data, source.problems) == (data, [])
