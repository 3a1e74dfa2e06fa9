"""Rows of the fault matrix: recipes, terminals, and secrets in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..conftest import REPOSITORY
from .matrix import Bench, Row

_HEAD = "command: train-vae\nname: x\n"
_REST = "data: {shards: a.tar, image_size: 32}\nvae: {}\ntrain: {steps: 1, batch_size: 1}\n"
BAD_RECIPES = {
    "unknown key": _HEAD + _REST + "trian: {}\n",
    "wrong type": _HEAD + _REST.replace("steps: 1", "steps: ten"),
    "out of range": _HEAD + _REST.replace("steps: 1", "steps: 0"),
    "duplicate key": _HEAD + "name: y\n" + _REST,
    "octal": _HEAD + _REST.replace("steps: 1", "steps: 010"),
    "sexagesimal": _HEAD + _REST.replace("steps: 1", "steps: 12:30:00"),
    "norway": _HEAD + _REST.replace("batch_size: 1", "batch_size: 1, ema_warmup: no"),
    "billion laughs": "a: &a [x,x]\n"
    + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merge key": _HEAD + "base: &b {steps: 1}\ntrain: {<<: *b}\n",
    "python tag": _HEAD + "vae: !!python/object/apply:os.system ['touch executed']\n",
    "deep": "a: " + "[" * 100_000,
    "long": "a: " + "x" * 3_000_000,
    "two documents": _HEAD + _REST + "---\n" + _HEAD,
    "control characters": _HEAD.replace("x", "x\x00") + _REST,
    "not UTF-8": "name: \udcff",
    "binary": "\x7fELF\x02\x01\x01",
    "empty": "",
    "tab": "train:\n\tsteps: 1\n",
    "absurd size": _HEAD + _REST.replace("batch_size: 1", "batch_size: 1" + "0" * 40),
    "path as a name": _HEAD.replace("x", "../../x") + _REST,
}
SECRETS = {"HF_TOKEN": "hf_fa1lt", "AWS_SECRET_ACCESS_KEY": "aws_fa1lt", "WANDB_API_KEY": "wandb_fa1lt"}


def _environment(**changes: str | None) -> dict[str, str]:
    merged = {**os.environ, "PYTHONPATH": str(REPOSITORY), **changes}
    return {name: value for name, value in merged.items() if value is not None}


def bad_recipe(bench: Bench) -> None:
    """Traps, bombs and slips: 78, with a place, in two seconds of work; nothing created, nothing executed."""
    import resource

    for name, text in list(BAD_RECIPES.items())[: bench.trials or None]:
        folder = bench.fresh().parent
        (folder / "r.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        command = [sys.executable, "-m", "ldm_cli", "train-vae", "r.yaml"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        bench.tally.judge_words(done.returncode, done.stderr, {78}, name)
        if "r.yaml:" not in done.stderr:
            bench.tally.codes.append(f"{name}: no place: {done.stderr[-200:]}")
        if took > 3.0:
            bench.tally.hangs.append(f"{name}: {took:.1f} s of processor time")
        if [path.name for path in folder.iterdir()] != ["r.yaml"]:
            bench.tally.silent.append(f"{name}: something was created")
        if any(c in done.stderr for c in "\x00\x1b\x7f"):
            bench.tally.silent.append(f"{name}: control characters on stderr")
        bench.tally.trials += 1


def terminal(bench: Bench) -> None:
    """stdout full, closed or gone; no home; an ASCII locale."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    recipe = "command: sample\nmodel: m\nprompts: [猫 é]\n"
    cases: list[tuple[str, dict[str, str | None], set[int]]] = [
        ("{ldm} recipe schema > /dev/full", {}, {74}),
        ("{ldm} recipe schema | true; exit ${{PIPESTATUS[0]}}", {}, {141}),
        ("{ldm} recipe list >&-", {}, {0}),
        ("{ldm} recipe list > /dev/null 2>&-", {}, {0}),
        ("{ldm} recipe check r.yaml > out", ascii_only, {0}),
        ("{ldm} recipe show r.yaml --resolved > out", ascii_only, {0}),
        ("{ldm} recipe list > out", {"HOME": None, "XDG_CACHE_HOME": None}, {0}),
        ("{ldm} data synth scenes --samples 4 --val-samples 1 2> /dev/full > out", {"HOME": "/nonexistent"}, {0}),
        ("{ldm} recipe list < /dev/null > out", {"TERM": None, "COLUMNS": None}, {0}),
    ]
    for command, changes, allowed in cases[: bench.trials or None]:
        folder = bench.fresh().parent
        (folder / "r.yaml").write_text(recipe, encoding="utf-8")
        script = command.format(ldm=f"{sys.executable} -m ldm_cli")
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=_environment(**changes), capture_output=True, timeout=120
        )
        bench.tally.judge_words(done.returncode, done.stderr.decode("utf-8", "replace"), allowed, command)
        bench.tally.trials += 1


def secrets(bench: Bench) -> None:
    """Tokens in the environment are in no file of a run, nor in what is said."""
    os.environ |= SECRETS
    try:
        out = bench.fresh()
        bench.tally.judge(bench.home.life("vae", out), {0}, "a run")
        lost = bench.fresh()
        bench.tally.judge(bench.home.life("vae", lost, "data.shards=nowhere.tar"), {66}, "a failure")
    finally:
        for name in SECRETS:
            del os.environ[name]
    for file in (*out.parent.rglob("*"), *lost.parent.rglob("*")):
        if file.is_file() and b"_fa1lt" in file.read_bytes():
            bench.tally.silent.append(f"a token is in {file}")
    bench.tally.trials += 1


def killed_while_sampling(bench: Bench) -> None:
    """SIGKILL or Ctrl-C during `ldm sample`: whole pictures only; the same command draws the missing ones alike."""
    import signal

    from .lives import Life

    model = bench.home.finished("unet") / "model"

    def life(out: Path) -> Life:
        words = ["sample", "--model", str(model), "-p", "a red circle", "-n", "12", "--steps", "4", "--out", str(out)]
        return Life([*words, "--size", "32", "--batch-size", "1"], out.parent / "sample.log")

    whole = bench.fresh()
    undisturbed = life(whole)
    bench.tally.judge(undisturbed, {0}, "undisturbed")
    wanted = {file.name: file.read_bytes() for file in whole.glob("0*.png")}
    while bench.tally.trials < bench.trials:
        out, number = bench.fresh(), bench.random.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        drawing = life(out)
        drawing.computes(bench.random.uniform(0, undisturbed.took), bench.random)
        drawing.send(number)
        bench.tally.judge(drawing, {0, 130, -signal.SIGKILL, -signal.SIGTERM}, f"sample, {number.name}")
        for file in out.glob("*.png"):
            if file.name in wanted and file.read_bytes() != wanted[file.name]:
                bench.tally.silent.append(f"{file} differs")
        bench.tally.judge(life(out), {0}, "sample, again")
        if {file.name: file.read_bytes() for file in out.glob("0*.png")} != wanted:
            bench.tally.silent.append(f"{out} differs")
        bench.tally.trials += 1


ROWS: dict[str, tuple[Row, int]] = {
    "bad-recipe": (bad_recipe, 0),
    "terminal": (terminal, 0),
    "secrets": (secrets, 1),
    "kill-while-sampling": (killed_while_sampling, 12),
}
