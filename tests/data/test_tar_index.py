"""The tar index against Python's tarfile, and against every way an archive may be cut."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm_cli.data.shards import ShardReader
from ldm_cli.data.tar_index import ShardIndex, index_tar
from ldm_cli.errors import DataError, InputNotFoundError
from tests.data.tars import numbered_sample, write_tar

BLOCK = 512


def _content(path: Path, index: ShardIndex) -> dict[str, dict[str, list[bytes]]]:
    """Everything the index finds, read through it: key → extension → data."""
    shards = SimpleNamespace(paths=[path], file=lambda shard: path, staging=None)
    reader = ShardReader(shards)  # type: ignore[arg-type]
    return {
        index.key(i): {ext: [reader.read(0, m) for m in found] for ext, found in index.sample(i).items()}
        for i in range(index.num_samples)
    }


def _keys(index: ShardIndex) -> list[str]:
    return [index.key(i) for i in range(index.num_samples)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_name_length_gives_what_tarfile_reads(tmp_path: Path, format: int) -> None:
    names = ["a.png", "a.txt", "b/c.d/é猫.JPG", "./x.seg.png", "d" * 60 + "/" + "e" * 90 + ".txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["p" * 300 + ".txt", "q" * 101 + ".json", "中" * 200 + ".txt"]
    members = [(name, name.encode() * (n * 50)) for n, name in enumerate(names)]
    path = write_tar(tmp_path / "a.tar", members, format)
    with tarfile.open(path) as tar:
        expected = sorted(tar.extractfile(m).read() for m in tar)  # type: ignore[union-attr]
    content = _content(path, index_tar(path))
    assert sorted(data for sample in content.values() for found in sample.values() for data in found) == expected
    assert content["a"].keys() == {"png", "txt"}
    assert content["b/c.d/é猫"].keys() == {"jpg"}
    assert content["./x"].keys() == {"seg.png"}


def test_base_256_and_pax_sizes_are_understood(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"12345"), ("b.txt", b"678")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    path.write_bytes(data)
    assert _content(path, index_tar(path)) == {"a": {"txt": [b"12345"]}, "b": {"txt": [b"678"]}}
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("c.txt")
        info.size, info.pax_headers = 4, {"size": "4", "comment": "a=b c"}
        tar.addfile(info, io.BytesIO(b"data"))
    assert _content(tmp_path / "b.tar", index_tar(tmp_path / "b.tar")) == {"c": {"txt": [b"data"]}}


def test_members_of_a_key_belong_together_wherever_they_stand(tmp_path: Path) -> None:
    members = [("a.png", b"A"), ("b.png", b"B"), ("b.txt", b"bb"), ("c.d.txt", b"dotted"), ("a.TXT", b"aa")]
    path = write_tar(tmp_path / "a.tar", members)
    assert _content(path, index_tar(path)) == {
        "a": {"png": [b"A"], "txt": [b"aa"]},
        "b": {"png": [b"B"], "txt": [b"bb"]},
        "c": {"d.txt": [b"dotted"]},
    }


def test_duplicate_members_are_both_kept_so_that_the_sample_can_be_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")])
    assert _content(path, index_tar(path))["a"] == {"txt": [b"1", b"3"]}


def test_everything_but_plain_data_members_is_ignored_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("l.txt", tarfile.SYMTYPE),
            ("h.txt", tarfile.LNKTYPE),
            ("f.txt", tarfile.FIFOTYPE),
            ("n.txt", tarfile.CHRTYPE),
            ("d.txt", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("/abs.txt", "../up.txt", "x/../y.txt", "README", ".hidden.txt", "__meta__/x.json"):
            tar.addfile(tarfile.TarInfo(name))
        for name in ("a.pkl", "a.pyd", "a.x.PTH", "a.npy"):
            tar.addfile(tarfile.TarInfo(name))
        tar.addfile(tarfile.TarInfo("good.txt"))
    index = index_tar(path)
    assert _keys(index) == ["good"]
    assert index.ignored == {
        "link": 2,
        "fifo": 1,
        "device": 1,
        "directory": 1,
        "absolute or '..' name": 3,
        "name without extension": 2,
        "webdataset meta member": 1,
        "pickle or array member": 4,
    }


def test_sparse_members_are_ignored_and_what_follows_is_found(tmp_path: Path) -> None:
    sparse = tmp_path / "s.txt"
    with sparse.open("wb") as file:
        for n in range(30):  # more holes than the header's own map can hold
            file.seek(n * 100_000)
            file.write(b"x" * 4096)
    (tmp_path / "t.txt").write_bytes(b"after")
    for style in ("gnu", "posix"):
        path = tmp_path / f"{style}.tar"
        command = f"tar -C {tmp_path} --format={style} -S -cf {path} s.txt t.txt"
        if os.system(command):
            pytest.skip("no GNU tar here")
        index = index_tar(path)
        assert _keys(index) == ["t"]
        assert index.ignored == {"sparse file": 1}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_is_never_silent_wherever_it_is(tmp_path: Path, format: int) -> None:
    long = "n" * 90 if format == tarfile.USTAR_FORMAT else "n" * 200
    members = [(f"{long}{k}.{ext}", ext.encode() * size) for k in range(3) for ext, size in (("png", 300), ("txt", 3))]
    whole = write_tar(tmp_path / "whole.tar", members, format).read_bytes()
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK  # of the last member's padding
    path = tmp_path / "cut.tar"
    for cut in range(1, end + 2 * BLOCK, 64):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=f"byte {cut}") as caught:
            index_tar(path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole[: end + 2 * BLOCK])
    assert index_tar(path).num_samples == 3


def test_skip_takes_exactly_the_whole_samples_before_the_cut(tmp_path: Path) -> None:
    members = [(f"{k}.{ext}", bytes([65 + k]) * size) for k in range(4) for ext, size in (("png", 700), ("txt", 5))]
    path = write_tar(tmp_path / "whole.tar", members)
    whole, complete = path.read_bytes(), index_tar(path)
    members_of = [[m for found in complete.sample(k).values() for m in found] for k in range(4)]
    ends = [max(member.offset + member.size for member in found) for found in members_of]
    path = tmp_path / "cut.tar"
    for cut in range(BLOCK, len(whole), 64):
        path.write_bytes(whole[:cut])
        index = index_tar(path, "skip")
        expected = [str(k) for k in range(4) if ends[k] <= cut]
        if expected == ["0"] and cut < members_of[1][0].offset:
            expected = []  # nothing tells yet whether a third member of this first sample was to follow
        assert _keys(index) == expected, cut
        if cut < complete.end + 2 * BLOCK:
            assert index.damage
            assert str(cut) in index.damage


def test_a_sample_whose_members_stand_apart_is_dropped_when_the_cut_takes_one(tmp_path: Path) -> None:
    members = [("a.png", b"A"), ("b.png", b"B"), ("b.txt", b"b"), ("a.txt", b"a" * 600)]
    path = write_tar(tmp_path / "a.tar", members)
    offset = index_tar(path).sample(0)["txt"][0].offset
    path.write_bytes(path.read_bytes()[: offset + 100])
    assert _content(path, index_tar(path, "skip")) == {"b": {"png": [b"B"], "txt": [b"b"]}}


def test_a_cut_in_a_member_that_is_never_read_costs_no_other_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", b"A"), ("b.pkl", b"b" * 600)])
    path.write_bytes(path.read_bytes()[: 3 * BLOCK + 100])
    assert _content(path, index_tar(path, "skip")) == {"a": {"png": [b"A"]}}


@pytest.mark.parametrize("position", [0, 100, 124, 148, 156, 345])
def test_a_flipped_bit_in_any_header_is_noticed(tmp_path: Path, position: int) -> None:
    path = write_tar(tmp_path / "a.tar", [m for k in range(3) for m in numbered_sample(k)])
    data = bytearray(path.read_bytes())
    header = index_tar(path).sample(1)["png"][0].offset - BLOCK
    data[header + position] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"byte {header}"):
        index_tar(path)


def test_a_second_archive_behind_the_first_is_not_dropped_in_silence(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", [("a.txt", b"1")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    with pytest.raises(DataError, match="concatenated"):
        index_tar(tmp_path / "a.tar")


def test_compressed_empty_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"1")]).read_bytes()
    for name, content, error, words in (
        ("gzip.tar", gzip.compress(tar), DataError, "gzip.*decompress"),
        ("html.tar", b"<html>" * 500, DataError, "not a tar"),
        ("zeros.tar", b"\0" * 5 + b"x" * 2000, DataError, "not a tar"),
        ("empty.tar", b"", InputNotFoundError, "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=f"{name}.*{words}"):
            index_tar(tmp_path / name)
    with pytest.raises(InputNotFoundError, match="No such file"):
        index_tar(tmp_path / "missing.tar")


def test_a_size_beyond_the_file_costs_no_memory_and_names_the_member(tmp_path: Path) -> None:
    info = tarfile.TarInfo("bomb.png")
    info.size = 2**60
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"bomb\.png"):
        index_tar(tmp_path / "a.tar")


def test_an_extended_header_of_absurd_size_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**31
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match="extended header of 2147483648 bytes"):
        index_tar(tmp_path / "a.tar")


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    members = numbered_sample(1)
    first = index_tar(write_tar(tmp_path / "a.tar", members)).contents
    assert index_tar(write_tar(tmp_path / "b.tar", members)).contents == first
    members[1] = ("0001.txt", b"another caption")
    assert index_tar(write_tar(tmp_path / "c.tar", members)).contents != first
