"""Progress as plain lines, and the arithmetic of rates."""

from __future__ import annotations

import math

import pytest

from ldm_cli.cli.report import LiveReporter, Pace, PlainReporter, _joined, show_figures


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_comes_every_few_seconds_and_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with PlainReporter(clock).progress("demo", total=100, done=20) as progress:
        for step in range(21, 101):
            clock.now += 0.125
            progress.update(step, {"loss": 1 / step, "lr": 1e-4} if step % 10 == 0 else None)
    assert capfd.readouterr().err.splitlines() == [
        "demo: step 60/100 (60%), 8 step/s, ETA 0:00:05, loss 0.01667, lr 0.0001",
        "demo: step 100/100 (100%), 8 step/s, loss 0.01, lr 0.0001",
    ]


def test_a_finished_task_is_not_said_twice(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with PlainReporter(clock).progress("index", total=None, unit="shard") as progress:
        clock.now = 10.0
        progress.update(4)
    assert capfd.readouterr().err == "index: shard 4, 2.5 s/shard\n"


def test_a_task_without_news_or_over_in_a_moment_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with PlainReporter(clock).progress("demo", total=5, done=5):
        clock.now = 10.0
    with PlainReporter(clock).progress("indexing", total=5) as progress:
        clock.now = 11.0
        progress.update(5)
    assert capfd.readouterr().err == ""


def test_messages_are_single_safe_lines(capfd: pytest.CaptureFixture[str]) -> None:
    PlainReporter().info("a\nb")
    PlainReporter().warn("c\x1b[0m")
    assert capfd.readouterr().err == "a\\nb\nwarning: c\\x1b[0m\n"


def test_the_pace_follows_the_last_half_minute() -> None:
    clock = Clock()
    pace = Pace(total=1000, done=0, unit="step", clock=clock)
    assert (pace.rate, str(pace), pace.count()) == (None, "", "step 0/1000 (0%)")
    for step in range(1, 101):  # 1 step a second, then 10 a second
        clock.now += 1.0 if step <= 50 else 0.1
        pace.update(step)
    for step in range(101, 501):
        clock.now += 0.1
        pace.update(step)
    assert pace.rate is not None
    assert math.isclose(pace.rate, 10.0, rel_tol=0.01)
    assert str(pace) == "10 step/s, ETA 0:00:50"


def test_one_long_pause_is_not_taken_for_the_pace() -> None:
    clock = Clock()
    pace = Pace(total=1000, done=0, unit="step", clock=clock)
    for step in range(10, 500, 10):
        clock.now += 10.0
        pace.update(step)
    clock.now += 120.0  # a validation
    pace.update(500)
    assert str(pace) == "2 s/step, ETA 0:16:40"


def test_a_high_rate_is_a_plain_number() -> None:
    clock = Clock()
    pace = Pace(total=None, done=0, unit="sample", clock=clock)
    clock.now = 2.0
    pace.update(24690)
    assert str(pace) == "12345 sample/s"


def test_hours_are_shown_as_hours() -> None:
    clock = Clock()
    pace = Pace(total=7200, done=0, unit="step", clock=clock)
    clock.now = 2.0
    pace.update(1)
    assert str(pace) == "2 s/step, ETA 3:59:58"


def test_figures_have_four_digits() -> None:
    assert show_figures({"loss": 1 / 3, "state": "ok", "n": 12345}) == "loss 0.3333, state ok, n 12345"


def test_bars_may_stand_inside_bars() -> None:
    reporter = LiveReporter()
    with reporter.progress("outer", 2) as outer:
        outer.update(1, {"loss": 0.5})
        with reporter.progress("inner [bold]", None, unit="image") as inner:
            inner.update(1)
            reporter.warn("in [between]")
        outer.update(2)
    with reporter.progress("again", 1) as again:
        again.update(1)


def test_figures_beyond_the_width_are_left_out_whole() -> None:
    pace = Pace(2000, 120, "step", lambda: 0.0)
    figures = {"loss": 0.5, "images_per_second": 123.0}
    assert _joined(pace, figures) == "step 120/2000 (6%), loss 0.5, images_per_second 123"
    assert _joined(pace, figures, 40) == "step 120/2000 (6%), loss 0.5"
    assert _joined(pace, figures, 3) == "step 120/2000 (6%)", "the count stays"
