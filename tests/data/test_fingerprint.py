from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest

from ldm_cli.data.fingerprint import BLOCK_BYTES, NUM_BLOCKS, fingerprint_of_contents, sampled_blocks
from ldm_cli.data.open_shards import open_shards
from ldm_cli.reporting import SilentReporter

from .tars import numbered_shards, opened


def test_a_small_file_is_hashed_to_its_last_byte(tmp_path: Path) -> None:
    content = os.urandom(3 * BLOCK_BYTES + 5)
    (tmp_path / "a").write_bytes(content)
    expected = hashlib.sha256(len(content).to_bytes(8, "little") + content).hexdigest()
    assert fingerprint_of_contents(tmp_path / "a") == expected


def test_each_stratum_of_a_large_file_has_one_block_and_other_sizes_have_other_blocks() -> None:
    num_blocks = 1000 * NUM_BLOCKS
    blocks = sampled_blocks(num_blocks * BLOCK_BYTES)
    assert [block // 1000 for block in blocks] == list(range(NUM_BLOCKS))
    assert len({block % 1000 for block in blocks}) > 40, "not at random"
    assert sampled_blocks(num_blocks * BLOCK_BYTES - 1) != blocks
    last = max(max(sampled_blocks(n * BLOCK_BYTES + 1)) - n for n in range(49, 400))
    assert last == 0, "the last block of all, and none beyond"


def test_a_change_is_caught_as_often_as_is_stated(tmp_path: Path) -> None:
    """A tenth of the blocks of 200 sizes, changed at random: 1 - 0.9^48 = 0.994 of the changes are caught."""
    dice, caught = random.Random(1), 0
    for n in range(200):
        num_blocks = 500 + n
        changed = set(dice.sample(range(num_blocks), num_blocks // 10))
        caught += not changed.isdisjoint(sampled_blocks(num_blocks * BLOCK_BYTES))
    assert caught >= 196
    for first in range(4800 - 200):  # 1/24 of the blocks without a gap
        assert not set(range(first, first + 200)).isdisjoint(sampled_blocks(4800 * BLOCK_BYTES))


@pytest.mark.parametrize("member", [b"caption 1", b"IDAT"])
def test_captions_and_pictures_of_the_same_size_are_other_data(tmp_path: Path, member: bytes) -> None:
    path = numbered_shards(tmp_path / "d", [3]) / "000.tar"
    before, status = opened(tmp_path / "d")[0], path.stat()
    members, content = bytes(before.indexes[0].members), bytearray(path.read_bytes())
    content[content.index(member) + len(member) - 1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = opened(tmp_path / "d")[0]
    assert after.fingerprint != before.fingerprint
    assert bytes(after.indexes[0].members) == members


def test_a_hard_link_or_new_permissions_index_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered_shards(tmp_path / "d", [3]) / "000.tar"
    before = opened(tmp_path / "d")[0]
    monkeypatch.setattr("ldm_cli.data.indexing.index_tar", None)  # whoever indexes again fails
    (tmp_path / "link").hardlink_to(path)
    path.chmod(0o600)
    assert opened(tmp_path / "d")[0].fingerprint == before.fingerprint
    monkeypatch.setattr("ldm_cli.data.index_cache.fingerprint_of_contents", None)
    assert opened(tmp_path / "d")[0].fingerprint == before.fingerprint, "the new time of change was not kept"


def test_the_hash_of_every_byte_is_made_once_and_is_that_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 2])
    assert opened(folder)[0].sha256 is None
    config = opened(folder)[1]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]
    expected = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert open_shards(str(folder), config, SilentReporter(), hashed=True).sha256 == expected
    monkeypatch.setattr("ldm_cli.data.indexing.file_sha256", None)  # whoever hashes again fails
    assert open_shards(str(folder), config, SilentReporter()).sha256 == expected
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert opened(moved)[0].sha256 is None
