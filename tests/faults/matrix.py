"""`make faults`: every fault that a training run, a recipe or a terminal may meet, injected for real, in a table.

    python -m tests.faults.matrix [--trials N] [--only ROW ...] [--seed S] [--keep DIR]

A trial ends well if the exit code is a documented one, the last line on stderr is one `ldm: error:` line, nothing
hangs, no process survives, and the same command then ends in the bits of the run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from .lives import Home, Life
from .runs import metrics

COLUMNS = ("fault", "trials", "silent failures", "hangs", "tracebacks", "wrong codes", "survivors", "seconds")


@dataclass
class Tally:
    """What the trials of a row came to."""

    trials: int = 0
    silent: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def problems(self) -> list[str]:
        """All that went wrong, in words."""
        return [*self.silent, *self.hangs, *self.tracebacks, *self.codes, *self.survivors]

    def judge(self, life: Life, allowed: set[int], what: str) -> int:
        """Wait for the end of a life and note what was wrong with it; its exit code."""
        code = life.end()
        self.judge_words(code, life.errors, allowed, what)
        if life.hung:
            self.hangs.append(f"{what}: no end")
        if left := life.survivors():
            self.survivors.append(f"{what}: {left}")
        return code

    def judge_words(self, code: int, errors: str, allowed: set[int], what: str) -> None:
        """Note what was wrong with an exit code and the words on stderr."""
        last = (errors.splitlines() or [""])[-1]
        if "Traceback" in errors:
            self.tracebacks.append(f"{what}: {last}")
        if code not in allowed:
            self.codes.append(f"{what}: {code}, not one of {sorted(allowed)}: {last}")
        # A second signal and a reader that left end it without a word; nobody is there to hear it.
        elif code > 0 and code not in (130, 141, 143) and not last.startswith("ldm: error: "):
            self.codes.append(f"{what}: {code} without an error line: {last!r}")


@dataclass
class Bench:
    """Where a row works."""

    home: Home
    random: random.Random
    folder: Path
    trials: int
    """How many are asked for; 0: every one there is, in rows that can count them."""
    tally: Tally = field(default_factory=Tally)

    def fresh(self) -> Path:
        """A place for a new run."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def copy_of(self, source: Path) -> Path:
        """A copy of a run, links kept."""
        out = self.fresh()
        subprocess.run(["cp", "-a", str(source), str(out)], check=True)
        return out

    def finish(self, name: str, out: Path, what: str, is_clean: bool = True) -> float:
        """Run the same command to the end, and compare with the run that nothing disturbed; seconds it computed."""
        life = self.home.life(name, out)
        code = self.tally.judge(life, {0}, f"{what}, afterwards")
        if code == 0 and (difference := different(self.home.finished(name), out, is_clean)):
            self.tally.silent.append(f"{what}: {difference} ({out})")
        elif not self.tally.problems:
            shutil.rmtree(out.parent, ignore_errors=True)
        return life.took


def different(one: Path, two: Path, is_clean: bool = True) -> str | None:
    """How two finished runs differ in weights, averages, optimizer state or metrics; None: not in a bit."""
    files = [sorted(f.relative_to(run) for f in run.rglob("*.safetensors")) for run in (one, two)]
    newest = max((one / "checkpoints").iterdir()).name
    wanted = [f for f in files[0] if f.parts[0] == "model" or newest in f.parts]
    for file in wanted:
        if file not in files[1]:
            return f"{file} is missing"
        if content_of(one / file) != content_of(two / file):
            return f"{file} differs"
    if metrics(one) != metrics(two):
        return "metrics.jsonl differs"
    left = [str(f.relative_to(two)) for f in two.rglob(".tmp*")]
    return f"left behind: {left}" if left and is_clean else None


def content_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; entries of the header's metadata come in any order."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    try:
        return json.loads(raw[8 : 8 + size]), raw[8 + size :]
    except ValueError:  # damaged
        return {}, raw


Row = Callable[[Bench], None]


def rows() -> dict[str, tuple[Row, int]]:
    """Name → function, and how many trials a plain `make faults` makes."""
    from . import corrupt, interruption_rows, memory_rows, storage_rows, word_rows

    return {**interruption_rows.ROWS, **storage_rows.ROWS, **word_rows.ROWS, **memory_rows.ROWS, **corrupt.ROWS}


def main() -> int:
    """Run the rows asked for, and print the table."""
    table = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="of each row; 0: every system call; default: each row's own number")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=list(table), help=f"of: {', '.join(table)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave what there is")
    given = parser.parse_args()
    import ldm_cli.stages.data
    import ldm_cli.stages.evaluate
    import ldm_cli.stages.precompute
    import ldm_cli.stages.sample
    import ldm_cli.stages.train_clip
    import ldm_cli.stages.train_unet
    import ldm_cli.stages.train_vae  # noqa: F401

    root = given.keep or Path(tempfile.mkdtemp(prefix="ldm-faults-"))
    root.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        home = Home(root)
        widths = (max(map(len, table)), 6, 15, 5, 10, 11, 9, 7)
        print(" ".join(name.ljust(width) for name, width in zip(COLUMNS, widths, strict=True)), flush=True)
        failed = []
        for name in given.only or table:
            row, own = table[name]
            folder = root / name
            folder.mkdir(exist_ok=True)
            bench = Bench(
                home, random.Random(f"{given.seed} {name}"), folder, own if given.trials is None else given.trials
            )
            started = time.monotonic()
            row(bench)
            tally = bench.tally
            counts = [len(c) for c in (tally.silent, tally.hangs, tally.tracebacks, tally.codes, tally.survivors)]
            cells = [name, tally.trials, *counts, f"{time.monotonic() - started:.0f}"]
            line = " ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True))
            print(f"{line} {tally.note}".rstrip(), flush=True)
            for problem in tally.problems[:20]:
                print(f"    {problem}", flush=True)
            failed += [name] if tally.problems else []
    finally:
        if given.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"failed: {', '.join(failed)}" if failed else "all as it must be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
