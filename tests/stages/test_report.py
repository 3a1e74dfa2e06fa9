"""`ldm report`: what a run's page shows, damaged and growing folders, and that it loads nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_cli.errors import InputNotFoundError, OutputError
from ldm_cli.plots.lines import MAX_POINTS, thinned
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import report
from ldm_cli.stages.report import ReportOptions


def write_run(folder: Path, steps: int = 30, state: str = "finished", **recipe: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": n, "loss": 1 / n, "skipped": 0.0, "val_loss/level0": 0.5} for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"state": state, "step": steps, "steps": steps}))
    fields = {"seed": 0, "train": {"lr": 1e-3}} | recipe
    (folder / "recipe.resolved.yaml").write_text(json.dumps({"recipe": fields}))
    for step in (10, steps):
        grid = folder / f"samples/step-{step:08d}/grid.png"
        grid.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (step % 256, 0, 0)).save(grid)
    return folder


class Warnings(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def page_of(*folders: Path, out: Path | None = None, reporter: SilentReporter | None = None) -> str:
    result = report.run(folders, ReportOptions(out), reporter or SilentReporter())
    return Path(result["page"]).read_text(encoding="utf-8")


class Addresses(HTMLParser):
    """Everything that a browser would fetch, and the tags that stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1), out=tmp_path / "page.html")
    parser = Addresses()
    parser.feed(page)
    assert parser.open == []
    assert len([address for address in parser.found if address.startswith("data:image/webp")]) == 4
    assert all(address.startswith(("data:", "#")) for address in parser.found)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp", page)


def test_a_page_shows_the_last_loss_and_each_grid(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps=40))
    assert (tmp_path / "run" / "report.html").exists()
    assert "<b>finished</b> step 40 of 40" in page
    assert "loss 0.025" in page
    assert [int(step) for step in re.findall(r'data-step="(\d+)"', page)] == [10, 40]
    assert page.count("<figcaption>loss</figcaption>") == 1
    assert "<figcaption>skipped</figcaption>" not in page  # always 0
    assert "<figcaption>val_loss by noise level</figcaption>" in page


def test_recipes_show_what_differs(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=7), out=tmp_path / "page.html")
    table = page.partition("<h2>Recipes</h2>")[2].partition("</table>")[0]
    assert re.findall(r"<td>(.*?)</td>", table) == ["seed", "0", "7"]


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "<b>&amp;", note="<script>alert(1)</script>"))
    assert "<script>alert" not in page
    assert "&lt;b&gt;&amp;amp;" in page


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", b"\0\0\0\n{\"step\": 1, \"loss\": 2.0}\n{\"step\": 2, \"lo", "2 lines of metrics.jsonl"),
        ("metrics.jsonl", b"\xff\xfe[]\n7\n", "2 lines of metrics.jsonl"),
        ("status.json", b"{", "status.json"),
        ("recipe.resolved.yaml", b"[]", "recipe.resolved.yaml"),
        ("samples/step-00000010/grid.png", b"no picture", "grid.png of step 10"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    folder, reporter = write_run(tmp_path / "run"), Warnings()
    (folder / file).write_bytes(content)
    page = page_of(folder, reporter=reporter)
    assert [said in warning for warning in reporter.said] == [True]
    assert "<h2>Samples</h2>" in page


def test_a_run_without_a_step_and_numbers_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "status.json").write_text('{"state": "failed", "error": "no room"}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e999}\n')
    assert "<b>failed</b> : no room" in page_of(folder)


def test_other_folders_and_other_files_in_the_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="is no folder of a run"):
        page_of(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="it is no report"):
        page_of(folder)
    page_of(folder, out=tmp_path / "page.html")
    page_of(folder, out=tmp_path / "page.html")  # a report may be replaced


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", state="running")
    pages = []

    def wait(seconds: float) -> None:
        pages.append((folder / "report.html").read_text())
        if len(pages) == 2:
            (folder / "status.json").write_text('{"state": "finished", "step": 31, "steps": 31}')

    monkeypatch.setattr("time.sleep", wait)
    report.run([folder], ReportOptions(watch=5), SilentReporter())
    assert ['http-equiv="refresh" content="5"' in page for page in pages] == [True, True]
    assert 'http-equiv="refresh"' not in (folder / "report.html").read_text()


def test_a_thinned_line_keeps_its_ends_and_its_peaks() -> None:
    ys = [0.0] * 100_000
    ys[41_234], ys[77_777], ys[-1] = 9.0, -5.0, 3.0
    xs, kept = thinned(list(map(float, range(len(ys)))), ys)
    assert len(kept) <= MAX_POINTS + 2
    assert {0.0: 0.0, 41_234.0: 9.0, 77_777.0: -5.0, 99_999.0: 3.0}.items() <= dict(zip(xs, kept, strict=True)).items()
    assert xs == sorted(xs)
