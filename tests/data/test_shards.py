"""Finding shards, keeping their indexes, and noticing when they change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.index_cache import cache_folder
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.patterns import expand_braces, find_sources
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardReader
from ldm_cli.errors import DataError, InputNotFoundError, RecipeError, UnavailableError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_sample, numbered_shards, opened, png, write_tar


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{,.old}.tar", ["x.tar", "x.old.tar"]),
        ("{name}.tar", ["{name}.tar"]),
        ("{a..c}", ["{a..c}"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert list(expand_braces(pattern)) == expected


def test_a_pattern_of_absurd_length_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="1,000,000"):
        expand_braces("{0..99999}{0..99999}")


def test_folders_globs_braces_and_lists_find_the_same_shards_in_order(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [1, 1, 1])
    expected = tuple(folder / f"{k:03d}.tar" for k in range(3))
    (folder / "notes.txt").write_text("not a shard")
    for patterns in (str(folder), f"{folder}/*.tar", f"{folder}/{{000..002}}.tar"):
        assert _found(patterns) == [expected]
    assert _found((str(expected[2]), f"{folder}/00*.tar")) == [expected[2:], expected[:2]]


def _found(patterns: str | tuple[str, ...]) -> list[tuple[Path, ...]]:
    found = find_sources(patterns)
    return [tuple(Path(found.names[number]) for number in source) for source in found.sources]


@pytest.mark.parametrize("folder", ["photos [2021]", "a[b-d]", "x[!y]z/deep"])
def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path: Path, folder: str) -> None:
    numbered_shards(tmp_path / folder, [1, 1])
    numbered_shards(tmp_path / "ab", [1])
    expected = tuple(tmp_path / folder / name for name in ("000.tar", "001.tar"))
    for pattern in ("*.tar", "00[01].tar", "00{0,1}.tar"):
        assert _found(f"{tmp_path}/{folder}/{pattern}") == [expected]


def test_all_holes_are_listed_at_once(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [1, 1, 1])
    (folder / "001.tar").unlink()
    (folder / "002.tar").write_bytes(b"")
    (tmp_path / "bare").mkdir()
    patterns = (f"{folder}/{{000..003}}.tar", f"{tmp_path}/x*.tar", str(tmp_path / "bare"))
    with pytest.raises(InputNotFoundError) as caught:
        find_sources(patterns)
    text = str(caught.value)
    assert "cannot read 5 shards" in text
    for part in ("001.tar' (missing)", "002.tar' (empty)", "003.tar' (missing)", "x*.tar' (matches nothing)"):
        assert part in text
    assert "bare' (a folder without *.tar files)" in text


@pytest.mark.parametrize("source", ["s3://bucket/a.tar", "https://host/{0..9}.tar", "pipe:cat /etc/passwd"])
def test_remote_and_piped_sources_are_refused_and_not_run(source: str) -> None:
    with pytest.raises(UnavailableError, match="not allowed"):
        find_sources(source)


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(InputNotFoundError, match="no samples"):
        opened(tmp_path)


def test_a_damaged_shard_stops_or_gives_its_whole_samples(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [4, 4])
    path = folder / "001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"001\.tar"):
        opened(folder)
    shards, config = opened(folder, on_bad_shard="skip")
    assert shards.sizes[0] == 4
    assert 0 < shards.sizes[1] < 4
    reporter = SilentReporter()
    open_shards(str(folder), config, reporter)
    assert any("001.tar" in message and "warning" in message for message in reporter.messages)
    with pytest.raises(DataError, match=r"001\.tar"):
        opened(folder)  # the partial index was not kept


def test_an_index_is_made_once_and_equals_a_fresh_one(
    tmp_path: Path, index_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 2])
    first, _ = opened(folder)
    assert len(list(index_cache.iterdir())) == 3, "a table for each shard, and the facts of the set"
    monkeypatch.setattr("ldm_cli.data.indexing.index_tar", None)  # whoever indexes again fails
    again, _ = opened(folder)
    assert again.fingerprint == first.fingerprint
    assert [again.name(s, i) for s in range(2) for i in range(again.sizes[s])] == [
        first.name(s, i) for s in range(2) for i in range(first.sizes[s])
    ]
    assert again.indexes[0].sample(1) == first.indexes[0].sample(1)


def test_a_shard_that_was_replaced_is_indexed_again_even_with_its_old_size_and_time(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3])
    path = folder / "000.tar"
    before, _ = opened(folder)
    status = path.stat()
    write_tar(path, [m for k in (7, 8, 9) for m in numbered_sample(k)])
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, _ = opened(folder)
    assert after.name(0, 0) == "000/0007"
    assert after.fingerprint != before.fingerprint


def test_a_shard_that_was_cut_or_extended_is_noticed_despite_its_cached_index(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3])
    opened(folder)
    path = folder / "000.tar"
    whole, status = path.read_bytes(), path.stat()
    for content in (whole[:-10_000], whole + b"more"):
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(DataError, match=r"000\.tar"):
            opened(folder)


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100])
def test_a_broken_cache_file_is_replaced(tmp_path: Path, index_cache: Path, damage: bytes) -> None:
    folder = numbered_shards(tmp_path / "d", [3])
    fingerprint = opened(folder)[0].fingerprint
    assert opened(folder)[0].indexes[0].key(2) == "0002"
    files = sorted(index_cache.iterdir())
    assert len(files) == 2
    for file in files:
        whole = file.read_bytes()
        for content in (damage, whole[:-1], whole[:-100] + bytes(100)):
            file.write_bytes(content)
            shards = opened(folder)[0]
            assert shards.fingerprint == fingerprint
            assert shards.indexes[0].key(2) == "0002"
        assert len(file.read_bytes()) == len(whole)


def test_a_fifo_in_the_place_of_an_index_is_replaced(tmp_path: Path, index_cache: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3])
    fingerprint = opened(folder)[0].fingerprint
    files = list(index_cache.iterdir())
    assert len(files) == 2, "a table, and the facts of the set"
    for file in files:
        file.unlink()
        os.mkfifo(file)
    shards = opened(folder)[0]
    assert (shards.fingerprint, shards.indexes[0].key(2)) == (fingerprint, "0002")
    assert all(file.is_file() for file in files)


def test_moved_data_has_the_same_fingerprint_and_times_do_not_matter(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 2])
    fingerprint = opened(folder)[0].fingerprint
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    os.utime(moved / "000.tar", (0, 0))
    assert opened(moved)[0].fingerprint == fingerprint


def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = numbered_shards(tmp_path / "d", [1, 1, 1])
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    config, reporter = opened(folder)[1], SilentReporter()
    assert open_shards(str(folder), config, reporter).num_samples == 3
    assert len([m for m in reporter.messages if m.startswith("warning: cannot keep shard indexes")]) == 1


def test_the_cache_is_in_the_home_or_where_there_is_none_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ldm" / "index"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().name == "index"


def test_a_member_that_changed_after_indexing_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3])
    shards, _ = opened(folder)
    member = shards.indexes[0].sample(1)["txt"][0]
    assert ShardReader(shards).read(0, member) == b"caption 1"
    numbers = [m for k in (0, 5, 2) for m in numbered_sample(k)]
    write_tar(folder / "000.tar", numbers)
    with pytest.raises(DataError, match=f"changed.*byte {member.offset - 512}"):
        ShardReader(shards).read(0, member)
    (folder / "000.tar").write_bytes(b"short")
    with pytest.raises(DataError, match="changed"):
        ShardReader(shards).read(0, member)


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads from now on."""
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: sizes.append(size) or pread(file, size, offset))
    return sizes


@pytest.mark.parametrize("gap", [0, 5000, 2 << 20])
def test_members_that_lie_together_are_read_at_once(tmp_path: Path, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    between = [("b.bin", bytes(gap))] if gap else []
    write_tar(tmp_path / "x.tar", [("a.txt", b"one"), *between, ("a.json", b"{}"), ("a.bin", bytes(range(256)) * 4)])
    shards, _ = opened(tmp_path, label=None)
    members = [found[0] for found in shards.indexes[0].sample(0).values()]
    reader, sizes = ShardReader(shards), _reads(monkeypatch)
    assert reader.read_all(0, members[::-1]) == [bytes(range(256)) * 4, b"{}", b"one"]
    assert len(sizes) == (6 if gap else 1)
    assert sum(sizes) < 8 * 1024
    assert reader.read_all(0, members[1:]) == [b"{}", bytes(range(256)) * 4]


@pytest.mark.parametrize("size", [100, 2 << 20])
@pytest.mark.parametrize("number", [0, 1])
def test_a_change_of_any_member_read_at_once_is_noticed(tmp_path: Path, number: int, size: int) -> None:
    members = [("a.bin", bytes(size)), ("a.txt", b"text")]
    path = write_tar(tmp_path / "x.tar", members)
    shards, _ = opened(tmp_path, label=None)
    places = [found[0] for found in shards.indexes[0].sample(0).values()]
    members[number] = (f"c{members[number][0][1:]}", members[number][1])
    write_tar(path, members)
    with pytest.raises(DataError, match=f"changed.*byte {places[number].offset - 512};"):
        ShardReader(shards).read_all(0, places)
    os.truncate(path, places[1].offset + 2)
    with pytest.raises(DataError, match="changed"):
        ShardReader(shards).read_all(0, places[1:])


def test_a_sample_is_read_at_once_and_nothing_beyond_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, long = png(size=(64, 64)), bytes(20_000)
    write_tar(tmp_path / "x.tar", [("a.png", picture), ("a.txt", b"text"), ("a.cls", b"7"), ("a.bin", long)])
    shards, config = opened(tmp_path)
    decoder, sizes = SampleDecoder(shards, config, Wanted()), _reads(monkeypatch)
    sample = decoder.decode(0, 0, Draw())
    assert (sample.caption, sample.label) == ("text", 7)
    assert len(sizes) == 1
    assert sizes[0] < len(picture) + 2500
    assert SampleDecoder(shards, config, Wanted(image=False)).image_bytes(0, 0) == picture


def test_a_member_that_is_too_large_is_not_read_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"text"), ("a.png", bytes(9000)), ("a.cls", b"7")])
    shards, config = opened(tmp_path, max_member_bytes=5000)
    sizes = _reads(monkeypatch)
    with pytest.raises(BadSampleError, match="member too large"):
        SampleDecoder(shards, config, Wanted()).decode(0, 0, Draw())
    assert 0 < sum(sizes) < 5000


def test_more_shards_than_open_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_cli.data.shards._MAX_OPEN_FILES", 2)
    shards, _ = opened(numbered_shards(tmp_path / "d", [1] * 5))
    reader = ShardReader(shards)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        for shard in range(5):
            member = shards.indexes[shard].sample(0)["txt"][0]
            assert reader.read(shard, member) == f"caption {shard}".encode()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
