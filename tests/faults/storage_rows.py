"""Rows of the fault matrix: disks that are full, broken or read-only, and what is damaged or foreign on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

from .interruption_rows import calls_with_one_save
from .lives import Life, Strace
from .matrix import Bench, Row


def _older_are_sound(bench: Bench, out: Path, what: str) -> None:
    from ldm_cli.training.checkpoint import checkpoints, problem_with

    found = [problem_with(folder) for folder in checkpoints(out / "checkpoints")]
    if any(found):
        bench.tally.silent.append(f"{what}: damaged checkpoint: {found}")


def failing_system_call(bench: Bench, *, error: str, for_good: bool) -> None:
    """The n-th system call on the run folder fails, once or from then on."""
    found = calls_with_one_save(bench, "vae")
    # What fails for good must not be stderr, on which the failure is told: opening, syncing and renaming is enough.
    calls = "openat,fsync,rename,mkdir,linkat,link" if for_good else "all"
    for held, number in found if bench.trials == 0 else sorted(bench.random.sample(found, bench.trials)):
        out = bench.copy_of(bench.home.half_done("vae"))
        life = bench.home.life("vae", out, held=held)
        when = f"{number // 3}+" if for_good else str(number)
        tracer = Strace(life, Path(os.devnull), "-e", f"inject={calls}:error={error}:when={when}")
        life.go()
        what = f"{error} at {when} after {held}"
        bench.tally.judge(life, {0, 66, 73, 74, 83} if for_good else {0, 73, 74}, what)
        tracer.wait()
        bench.tally.trials += 1
        _older_are_sound(bench, out, what)
        bench.finish("vae", out, what, is_clean=False)  # what could not be deleted may be left


class _Small:
    """A tmpfs of so many bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    @staticmethod
    def _mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)

    def change(self, option: str) -> None:
        """Remount with another option."""
        self._mount("-o", f"remount,{option}", str(self.folder))

    def __enter__(self) -> _Small:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False)


def _needs_mounts(bench: Bench) -> bool:
    if os.geteuid() != 0:
        bench.tally.note = "skipped: only root may mount"
    return os.geteuid() == 0


def full_disk(bench: Bench) -> None:
    """A disk that is too small by some bytes, or that another process fills; then it grows."""
    if not _needs_mounts(bench):
        return
    while bench.tally.trials < bench.trials:
        size = bench.random.randrange(64 * 2**10, 6 * 2**20)
        place = bench.fresh()
        with _Small(place, size) as disk:
            out, what = disk.folder / "run", f"disk of {size} bytes"
            life = bench.home.life("vae", out, log=place.with_suffix(".log"))
            # The plan is refused before the first step where it can be seen; ballast that comes later cannot.
            if bench.tally.trials % 2 and life.computes(bench.random.uniform(0, 1), bench.random):
                _fill(disk.folder / "ballast")
            bench.tally.judge(life, {0, 74}, what)
            bench.tally.trials += 1
            _older_are_sound(bench, out, what)
            (disk.folder / "ballast").unlink(missing_ok=True)
            disk.change("size=64m")
            bench.finish("vae", out, what)


def _fill(file: Path) -> None:
    with suppress(OSError), file.open("wb") as stream:
        while True:
            stream.write(bytes(4096))
            stream.flush()


def read_only(bench: Bench) -> None:
    """The file system is read-only for the next life of a run that was killed; then it is repaired."""
    if not _needs_mounts(bench):
        return
    while bench.tally.trials < bench.trials:
        place = bench.fresh()
        with _Small(place, 64 * 2**20) as disk:
            out, moment = disk.folder / "run", bench.random.uniform(0, 1.5)
            life = bench.home.life("vae", out, log=place.with_suffix(".log"))
            life.computes(moment, bench.random)
            life.send(signal.SIGKILL)
            bench.tally.judge(life, {0, -signal.SIGKILL}, "before")
            disk.change("ro")
            is_finished = (out / "model").is_dir()
            second = bench.home.life("vae", out, log=place.with_suffix(".log"))
            bench.tally.judge(second, {0} if is_finished else {73}, f"read-only after {moment:.2f} s")
            bench.tally.trials += 1
            disk.change("rw")
            bench.finish("vae", out, "read-only")


def file_size_limit(bench: Bench) -> None:
    """RLIMIT_FSIZE: any file beyond so many bytes fails with EFBIG."""
    while bench.tally.trials < bench.trials:
        out, limit = bench.fresh(), bench.random.randrange(4 * 2**10, 200 * 2**10)
        life = bench.home.life("vae", out, max_file_bytes=limit)
        bench.tally.judge(life, {0, 74}, f"at most {limit} bytes")
        bench.tally.trials += 1
        _older_are_sound(bench, out, f"at most {limit} bytes")
        bench.finish("vae", out, f"at most {limit} bytes")


def damaged_checkpoint(bench: Bench) -> None:
    """A file of the newest checkpoint is flipped, cut, emptied or missing: an older one is used, or 83."""
    while bench.tally.trials < bench.trials:
        name = ("vae", "unet")[bench.tally.trials % 2]
        out = bench.copy_of(bench.home.half_done(name))
        newest = max((out / "checkpoints").glob("step-*"))
        file = bench.random.choice(sorted(f for f in newest.rglob("*") if f.is_file()))
        # A flipped bit of the manifest may be one of a version, on which nothing depends.
        how = bench.random.choice(("cut", "empty", "missing", *(("flipped",) if file.name != "manifest.json" else ())))
        content = bytearray(file.read_bytes())
        if how == "flipped":
            content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
        if how == "missing":
            file.unlink()
        else:
            keep = {"cut": bench.random.randrange(len(content)), "empty": 0, "flipped": len(content)}[how]
            with file.open("r+b") as stream:  # in place, so that what is linked is damaged everywhere
                stream.write(content[:keep])
                stream.truncate(keep)
        what = f"{name}: {file.relative_to(out)} {how}"
        bench.tally.trials += 1
        log = out.parent / f"{out.name}.log"
        bench.tally.judge(bench.home.life(name, out), {0}, what)
        if "damaged" not in log.read_text():
            bench.tally.silent.append(f"{what}: not announced")
        bench.finish(name, out, what)


def foreign_checkpoint(bench: Bench) -> None:
    """--resume with what is no checkpoint of this model: 83 or 66, and nothing begun."""
    whole = {name: bench.home.finished(name) / "checkpoints/step-00000012" for name in ("vae", "clip", "unet")}
    folder = bench.folder / "foreign"
    folder.mkdir()
    pickle = folder / "model.ckpt"
    with zipfile.ZipFile(pickle, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    disguised = folder / "disguised"
    shutil.copytree(whole["vae"], disguised)
    shutil.copy(pickle, disguised / "training.safetensors")
    _reseal(disguised)
    cases = [
        *((name, source, 83) for name in whole for other, source in whole.items() if other != name),
        ("vae", whole["vae"] / "state.json", 66),
        ("vae", pickle, 83),
        ("vae", disguised, 83),
        ("vae", folder / "nowhere", 66),
        ("vae", whole["vae"].parent, 83),
    ]
    for name, source, code in cases:
        out = bench.fresh()
        bench.tally.judge(bench.home.life(name, out, "--resume", str(source)), {code}, f"{name} from {source}")
        if (out / "metrics.jsonl").exists():
            bench.tally.silent.append(f"{name} trained from {source}")
        bench.tally.trials += 1


def _reseal(folder: Path) -> None:
    """Give a checkpoint that was tampered with a manifest that verifies."""
    from hashlib import sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_owner(bench: Bench) -> None:
    """A live owner (73, named), a dead owner's lock (taken over), another recipe (83), a file in the way (73)."""
    out = bench.fresh()
    first = bench.home.life("vae", out)
    while not (out / "status.json").exists() and first.lasts(0.001):
        pass
    second = bench.home.life("vae", out)
    second.end()
    if second.code != 0:  # else the first was done before
        bench.tally.judge_words(second.code or 0, second.errors, {73}, "a live owner")
        if f"pid {first.pid} on " not in second.errors:
            bench.tally.codes.append(f"a live owner is not named: {second.errors}")
    bench.tally.judge(first, {0}, "the owner")
    (out / ".lock").write_text("pid 1 on another-host, in step 3\n")
    bench.tally.judge(bench.home.life("vae", out, "train.lr=0.5"), {83}, "another recipe")
    bench.finish("vae", out, "a dead owner's lock")
    blocked = bench.fresh()
    blocked.write_text("")
    bench.tally.judge(Life(bench.home.arguments("vae", blocked), blocked.parent / "log"), {73}, "a file in the way")
    bench.tally.trials += 4


ROWS: dict[str, tuple[Row, int]] = {
    "io-error-at-system-call": (partial(failing_system_call, error="EIO", for_good=False), 24),
    "no-space-at-system-call": (partial(failing_system_call, error="ENOSPC", for_good=False), 24),
    "no-space-from-system-call": (partial(failing_system_call, error="ENOSPC", for_good=True), 12),
    "read-only-at-system-call": (partial(failing_system_call, error="EROFS", for_good=False), 24),
    "quota-at-system-call": (partial(failing_system_call, error="EDQUOT", for_good=False), 6),
    "full-disk": (full_disk, 16),
    "read-only-disk": (read_only, 8),
    "file-size-limit": (file_size_limit, 12),
    "damaged-checkpoint": (damaged_checkpoint, 24),
    "foreign-checkpoint": (foreign_checkpoint, 1),
    "other-owner": (other_owner, 1),
}
