"""A fuzzer: damages one file that a command reads, at a seeded place, and runs the command.

    python -m tests.faults.matrix --only corrupted-files --trials 1000 --seed 0

A trial ends well if the command refuses (a documented code, a last line with a tag), or if its result is that of the
undamaged files, bit for bit. A file of which nothing is known (a recipe, prompts, shards at the first run) may also
have a result of its own. Everything else is counted: a wrong result in silence, an end that takes longer than 30 s,
more than a gigabyte of memory, a traceback, a code that is not documented, 70 among them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from .lives import Home, Life
from .matrix import Bench, Row, content_of
from .runs import metrics

PATIENCE = 30.0
"""Seconds; more on a machine so busy that the command takes three with sound files."""
REFUSALS = {2, 65, 66, 73, 74, 78, 80, 81, 83}
_MOST_BYTES = 1 << 30
_NUM_STRATA = 16

Result = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command, the files that it reads, and its result.

    Attributes:
        arguments: of the command line; `{stage}` stands for the folder of all files.
        checked: patterns below that folder of files whose damage must be noticed or mended.
        free: patterns of files that no other one vouches for.
        result: what the command made, to be compared.
        shards_by_content: whether shards that exchange their names are only read in another order, and a missing one
            is only missed: a cache knows them by their content, and a pattern takes what is there.
    """

    name: str
    arguments: tuple[str, ...]
    checked: tuple[str, ...]
    free: tuple[str, ...]
    result: Result
    shards_by_content: bool = False

    def files(self, stage: Path) -> list[tuple[Path, bool]]:
        """Every file to damage, and whether its damage must be noticed."""
        found = [(path, True) for pattern in self.checked for path in sorted(stage.glob(pattern))]
        found += [(path, False) for pattern in self.free for path in sorted(stage.glob(pattern))]
        return [(path, is_checked) for path, is_checked in found if path.is_file() and path.name != ".lock"]


def pictures(folder: str) -> Result:
    """The bytes of the pictures in a folder."""
    return lambda stage: {p.name: sha256(p.read_bytes()).hexdigest() for p in (stage / folder).glob("0*.png")}


def training(folder: str, *, reads_checkpoint: bool = True) -> Result:
    """Weights of the model, those of the last checkpoint if the command reads it, and metrics of the steps.

    Figures of validation are left out: the recipes of the cases validate more seldom than the runs that they continue.
    """

    def result(stage: Path) -> Any:
        run = stage / folder
        weights = {str(f.relative_to(run)): content_of(f) for f in sorted(run.glob("model/**/*.safetensors"))}
        if reads_checkpoint:
            last = max((run / "checkpoints").glob("step-*"))
            weights |= {f.name: content_of(f) for f in last.glob("*.safetensors")}
        lines = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in metrics(run)]
        return weights, [line for line in lines if len(line) > 1]

    return result


def tars(folder: str) -> Result:
    """The files of a cache."""
    return lambda stage: {p.name: sha256(p.read_bytes()).hexdigest() for p in (stage / folder).glob("*.tar")}


def figures(file: str) -> Result:
    """The metrics of an evaluation."""
    return lambda stage: json.loads((stage / file).read_text())["metrics"]


MODEL = ("whole-unet/model/*", "whole-unet/model/*/*")
PARTS = ("whole-vae/model/*", "whole-clip/model/*")
CACHE = ("cache/*.tar", "cache/cache.json", "home/ldm/index/*")

CASES = (
    Case(
        "sample",
        ("sample", "{stage}/sample.json", "--prompts", "{stage}/prompts.txt", "--out", "{stage}/new"),
        MODEL,
        ("sample.json", "prompts.txt", "wildcards/*"),
        pictures("new"),
    ),
    Case(
        "complete pictures", ("sample", "{stage}/sample.json", "--out", "{stage}/out"), ("out/*",), (), pictures("out")
    ),
    Case(
        "continue training",
        ("train-vae", "{stage}/vae.json", "--out", "{stage}/half-vae"),
        (
            "half-vae/*",
            "half-vae/checkpoints/*/*",
            "half-vae/checkpoints/*/*/*",
            "scenes/train-*.tar",
            "home/ldm/index/*",
        ),
        ("vae.json", "scenes/val-*.tar"),
        training("half-vae"),
    ),
    Case(
        "sample a foreign model",
        ("sample", "{stage}/foreign.json", "--out", "{stage}/new"),
        (),
        ("foreign/*", "foreign/*/*", "foreign.json"),
        pictures("new"),
    ),
    Case(
        "finished training",
        ("train-vae", "{stage}/vae.json", "--out", "{stage}/whole-vae"),
        ("whole-vae/*", "whole-vae/model/*", "whole-vae/checkpoints/*/*", "scenes/train-*.tar"),
        ("vae.json",),
        # A finished run leaves its checkpoints alone; the command that continues them finds the damage.
        training("whole-vae", reads_checkpoint=False),
    ),
    Case(
        "train from a cache",
        ("train-unet", "{stage}/cached.json", "--out", "{stage}/new"),
        (*CACHE, *PARTS, "scenes/train-*.tar"),
        ("cached.json",),
        training("new"),
        shards_by_content=True,
    ),
    Case(
        "precompute",
        ("precompute", "{stage}/cached.json"),
        CACHE,
        ("cached.json", "scenes/train-*.tar"),
        tars("cache"),
    ),
    Case(
        "start from a model",
        ("train-unet", "{stage}/started.json", "--out", "{stage}/new"),
        MODEL,
        ("started.json",),
        training("new"),
    ),
    Case(
        "eval",
        ("eval", "{stage}/eval.json", "--out", "{stage}/new"),
        (*MODEL, *PARTS),
        ("eval.json", "scenes/val-*.tar"),
        figures("new/eval.json"),
    ),
    Case(
        "convert",
        ("convert", "{stage}/whole-unet", "{stage}/new.safetensors"),
        MODEL,
        (),
        lambda stage: content_of(stage / "new.safetensors"),
    ),
    Case(
        "pictures of a model of others",
        (
            "sample",
            "--model",
            "{stage}/foreign",
            "-p",
            "a red circle",
            "--steps",
            "2",
            "-n",
            "1",
            "--out",
            "{stage}/new",
        ),
        (),
        ("foreign/*", "foreign/*/*"),
        pictures("new"),
    ),
    Case(
        "data check", ("data", "check", "{stage}/scenes/train-*.tar"), ("home/ldm/index/*",), ("scenes/*",), lambda _: 0
    ),
)


def flip(file: Path, dice: random.Random, place: float) -> None:
    """One bit."""
    content = bytearray(file.read_bytes()) or bytearray(1)
    content[int(place * len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def cut(file: Path, dice: random.Random, place: float) -> None:
    """The end is missing."""
    content = file.read_bytes()
    file.write_bytes(content[: int(place * len(content))])


def zero_fill(file: Path, dice: random.Random, place: float) -> None:
    """Zeros, from a place on or in a block."""
    content = bytearray(file.read_bytes())
    first = int(place * len(content))
    last = dice.choice((len(content), min(len(content), first + 512)))
    content[first:last] = bytes(last - first)
    file.write_bytes(content)


def swap(file: Path, dice: random.Random, place: float) -> None:
    """Two files of one kind in one tree are exchanged."""
    stage = next(parent for parent in file.parents if parent.name == "stage")
    others = [p for p in sorted(stage.rglob(f"*{file.suffix}")) if p.is_file() and p != file]
    other = dice.choice([p for p in others if p.parent == file.parent] or others or [file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def link(file: Path, dice: random.Random, place: float) -> None:
    """A symbolic link: to nothing, itself, a device, the file's folder, another file."""
    stage = next(parent for parent in file.parents if parent.name == "stage")
    victim = dice.choice([p for p in sorted(stage.rglob("*")) if p.is_file() and p != file])
    file.unlink()
    file.symlink_to(
        dice.choice((file.parent / "nothing", file, Path("/dev/zero"), Path("/dev/null"), file.parent, victim))
    )


def replace(file: Path, dice: random.Random, place: float) -> None:
    """Other content: random bytes, text, other JSON, deep JSON, numbers beyond all bounds."""
    size = file.stat().st_size
    contents = [b"", b"{}", b"[]", b"null", b"x" * size, dice.randbytes(size), b"\xff\xfe" + b"a\0" * 9, b"[" * 100_000]
    contents += [b'{"a": ' * 50_000, b"1e999", b"9" * 5_000, b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.", b"\n" * 9]
    file.write_bytes(dice.choice(contents))


def special(file: Path, dice: random.Random, place: float) -> None:
    """A named pipe, a folder, or nothing in its place."""
    file.unlink()
    dice.choice((os.mkfifo, os.mkdir, lambda _: None))(file)


def append(file: Path, dice: random.Random, place: float) -> None:
    """More after the end."""
    with file.open("ab") as stream:
        stream.write(dice.choice((b"\0" * 512, b"more", b"{}\n", dice.randbytes(100))))


def substitute(file: Path, dice: random.Random, place: float) -> None:
    """A digit or letter is another one: the file remains well formed."""
    content = bytearray(file.read_bytes())
    first = int(place * len(content))
    for index in [*range(first, len(content)), *range(first)]:
        if chr(content[index]).isdigit() or chr(content[index]).isalpha():
            content[index] = ord(dice.choice("0123456789" if chr(content[index]).isdigit() else "abcdefxyz"))
            break
    file.write_bytes(content)


DAMAGES = (flip, flip, cut, zero_fill, swap, link, replace, special, append, substitute)


def corrupted_files(bench: Bench, cases: Sequence[Case] = CASES) -> None:
    """One damaged file of those that a command reads."""
    stage = Stage(bench.home, bench.folder)
    expected = {case.name: stage.undamaged(case) for case in cases}
    outcomes: Counter[str] = Counter()
    while bench.tally.trials < bench.trials:
        case = cases[bench.tally.trials % len(cases)]
        what, outcome = trial(bench, stage, case, expected[case.name])
        outcomes[outcome] += 1
        bench.tally.trials += 1
        with (bench.folder / "trials.txt").open("a") as journal:
            journal.write(f"{what}: {outcome}\n")
    bench.tally.note = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())


class Stage:
    """A folder with the files of all cases, which each trial finds as they were.

    Args:
        home: where runs are trained.
        folder: to work in.
    """

    def __init__(self, home: Home, folder: Path) -> None:
        self.path, self.whole = folder / "stage", folder / "whole"
        self.path.mkdir(parents=True)
        finished = [home.finished(name) for name in ("unet", "vae", "clip")]
        for source in (home.folder / "scenes", home.half_done("vae"), *finished):
            subprocess.run(["cp", "-a", str(source), str(self.path)], check=True)
        seldom = {"validate_every": 0, "validation_samples": 2}
        unet, vae = (self._recipe(home, name) for name in ("unet", "vae"))
        vae["train"] |= seldom
        self._write("vae", vae)
        unet["train"] |= seldom | {"steps": 2, "save_every": 1}
        cached = unet | {"cache": str(self.path / "cache")}
        self._write("cached", cached)
        started = {name: value for name, value in unet.items() if name not in ("unet", "vae", "text_encoder")}
        self._write("started", started | {"start_from": str(self.path / "whole-unet")})
        sampling = {"steps": 2, "images_per_prompt": 1}
        model = {"model": str(self.path / "whole-unet/model"), "prompts": ["a red circle", "a blue square"]}
        self._write(
            "sample", {"command": "sample", "sampling": sampling, **model, "wildcards": str(self.path / "wildcards")}
        )
        foreign = self.path / "foreign"
        shutil.copytree(self.path / "whole-unet/model", foreign)
        for name in ("manifest.json", "tokenizer/tokenizer.json"):
            (foreign / name).unlink()
        self._write("foreign", {"command": "sample", "sampling": sampling, **model, "model": str(foreign)})
        (self.path / "prompts.txt").write_text("a __color__ circle\na blue square\n")
        (self.path / "wildcards").mkdir()
        (self.path / "wildcards/color.txt").write_text("red\ngreen\n")
        parts = {"clip": str(self.path / "whole-clip/model"), "vae": str(self.path / "whole-vae/model")}
        names = ["clip_score", "retrieval", "reconstruction", "frechet_distance", "attribute_accuracy"]
        measured = {
            "pipeline": str(self.path / "whole-unet/model"),
            "metrics": names,
            "num_samples": 6,
            "num_generated": 4,
        }
        data = {"shards": str(self.path / "scenes/val-*.tar"), "image_size": 32}
        self._write("eval", {"command": "eval", "data": data, "eval": {**parts, **measured, "sampling": {"steps": 1}}})
        for arguments in (("precompute", "{stage}/cached.json"), CASES[1].arguments, CASES[-1].arguments):
            assert (life := self.life(arguments)).end() == 0, life.errors
        max((self.path / "out").glob("0*.png")).unlink()
        self.path.rename(self.whole)

    def _recipe(self, home: Home, name: str) -> dict[str, Any]:
        """A recipe of `home` with the paths of this folder."""
        text = (home.folder / f"{name}.json").read_text().replace(str(home.folder), str(self.path))
        recipe: dict[str, Any] = json.loads(text)
        return recipe

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self.path / f"{name}.json").write_text(json.dumps(content))

    def restore(self) -> None:
        """All files as they were."""
        shutil.rmtree(self.path, ignore_errors=True)
        subprocess.run(["cp", "-a", str(self.whole), str(self.path)], check=True)

    def life(self, arguments: Sequence[str]) -> Life:
        """A process of a command."""
        before, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME"), str(self.path / "home")
        filled = [argument.replace("{stage}", str(self.path)) for argument in arguments]
        device = [] if arguments[0] in ("data", "convert") else ["--device", "cpu"]
        try:
            return Life([*filled, *device], self.path.with_suffix(".log"), max_bytes=8 * _MOST_BYTES)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            os.environ |= {} if before is None else {"XDG_CACHE_HOME": before}

    def undamaged(self, case: Case) -> tuple[Any, int, float]:
        """What a case makes of sound files, the memory that it takes, and seconds for which to wait for its end."""
        self.restore()
        began, life = time.monotonic(), self.life(case.arguments)
        assert life.end() == 0, life.errors
        return case.result(self.path), life.peak, max(PATIENCE, 10 * (time.monotonic() - began))


def trial(bench: Bench, stage: Stage, case: Case, expected: tuple[Any, int, float]) -> tuple[str, str]:
    """One damage; what it was, and in a word what it came to."""
    dice, tally = bench.random, bench.tally
    stage.restore()
    file, is_checked = dice.choice(case.files(stage.path))
    damage, stratum = dice.choice(DAMAGES), tally.trials // len(CASES) % _NUM_STRATA
    before = file.read_bytes()
    damage(file, dice, (stratum + dice.random()) / _NUM_STRATA)
    what = f"trial {tally.trials}: {case.name}: {damage.__name__} of {file.relative_to(stage.path)}"
    life = stage.life(case.arguments)
    code = life.end(expected[2])
    last, what = (life.errors.splitlines() or [""])[-1], f"{what} [{life.took:.1f} s]"
    if life.hung:
        tally.hangs.append(what)
        return what, "hung"
    if life.peak > expected[1] + _MOST_BYTES:
        tally.hangs.append(f"{what}: {(life.peak - expected[1]) >> 20} MiB")
    tally.judge_words(code, life.errors, {0, *REFUSALS}, what)
    if code != 0:
        if "[E-" not in last:
            tally.codes.append(f"{what}: no tag: {last!r}")
        return what, f"refused ({code})"
    if case.result(stage.path) == expected[0]:
        return what, "right"
    are_others = damage is swap or not os.path.lexists(file)
    if not is_checked or (case.shards_by_content and are_others and file.parent.name == "scenes"):
        return what, "another input"
    if file.is_file() and file.read_bytes() == before:
        return what, "right"  # the damage changed nothing
    tally.silent.append(f"{what}: another result")
    return what, "silent"


ROWS: dict[str, tuple[Row, int]] = {"corrupted-files": (corrupted_files, 1000)}
