"""Shards cut everywhere, and members made to exhaust memory, read as training reads them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import textwrap
import zlib
from pathlib import Path

import pytest
from PIL import Image

from ldm_cli.data.loader import Loader, sequential_batches
from ldm_cli.errors import DataError, InputNotFoundError
from tests.data.tars import numbered_sample, opened, png, png_chunk, png_with, write_tar


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_at_every_256th_byte_is_never_short_and_never_mispaired(tmp_path: Path, format: int) -> None:
    whole = write_tar(tmp_path / "whole.tar", [m for k in range(4) for m in numbered_sample(k)], format).read_bytes()
    end = (len(whole.rstrip(b"\0")) + 511) // 512 * 512 + 1024
    folder = tmp_path / "cut"
    folder.mkdir()
    for cut in range(0, end, 256):
        (folder / "a.tar").write_bytes(whole[:cut])
        with pytest.raises((DataError, InputNotFoundError)) as caught:
            opened(folder)
        assert "a.tar" in str(caught.value)
        try:
            shards, config = opened(folder, on_bad_shard="skip")
        except (DataError, InputNotFoundError):
            continue  # not one whole sample before the cut
        (batch,) = sequential_batches(shards, config, 4)
        assert batch.labels is not None
        numbers = batch.labels.tolist()
        assert numbers == list(range(len(numbers)))
        assert batch.captions == [f"caption {n}" for n in numbers]
        assert batch.images[:, 0, 0, 0].tolist() == numbers
        assert len(numbers) >= cut // (end // 4) - 1, "whole samples are used"


def _animation(frames: int) -> bytes:
    stream = io.BytesIO()
    images = [Image.new("L", (16, 16), k % 256) for k in range(2)]
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:] * (frames // 2))
    return stream.getvalue()


def _bombs() -> dict[str, bytes]:
    bomb = zlib.compress(bytes(1 << 28), 9)
    return {
        "pixels.png": png_with(50_000, 50_000),
        "text.png": png_with(8, 8, png_chunk(b"zTXt", b"a\0\0" + bomb)),
        "profile.png": png_with(8, 8, png_chunk(b"iCCP", b"a\0\0" + bomb)),
        "frames.gif": _animation(3000),
        "caption.txt": b"x" * (1 << 20),
    }


def test_bombs_are_refused_or_read_within_bounded_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is compared with that of a clean shard before."""
    good = [m for k in range(4) for m in numbered_sample(k)]
    bombs = []
    for name, data in _bombs().items():
        stem = name.split(".")[0]
        bombs.append((name, data))
        bombs += [] if name.endswith("txt") else [(f"{stem}.txt", b"t")]
        bombs += [(f"{stem}.png", png())] if name.endswith("txt") else []
    script = textwrap.dedent(
        """
        import json, resource, sys
        from ldm_cli.data.config import DataConfig
        from ldm_cli.data.loader import sequential_batches
        from ldm_cli.data.open_shards import open_shards
        from ldm_cli.reporting import SilentReporter
        found = []
        for path in sys.argv[1:]:
            bad = []
            config = DataConfig(shards=path, image_size=8, max_bad_fraction=1.0)
            shards = open_shards(config.shards, config, SilentReporter())
            batches = sequential_batches(shards, config, 4, report_bad=lambda one: bad.append((one.key, one.reason)))
            keys = [key for batch in batches for key in batch.keys]
            found.append([keys, bad, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024])
        print(json.dumps(found))
        """
    )
    shards = [write_tar(tmp_path / "clean.tar", good), write_tar(tmp_path / "bombs.tar", [*good, *bombs])]
    command = [sys.executable, "-c", script, *map(str, shards)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    (_, _, clean), (keys, bad, peak) = json.loads(answer.stdout)
    assert {key.split("/")[1] for key in keys} >= {"0000", "0001", "0002", "0003", "frames", "caption"}
    assert dict(bad)["pixels"] == "too many pixels"
    assert peak < clean + 300


def test_fewer_shards_and_samples_than_ranks_and_workers_hang_nowhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [m for k in range(2) for m in numbered_sample(k)])
    shards, config = opened(tmp_path, num_workers=3)
    ranks = [list(Loader(shards, config, seed=0, batch_size=8, rank=r, world_size=4).batches(0, 3)) for r in range(4)]
    for step in range(3):
        keys = [key for rank in ranks for key in rank[step].keys]
        assert len(keys) == 8
        assert all(keys.count(key) == 4 for key in keys), "each sample once an epoch"
