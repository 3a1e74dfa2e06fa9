"""Sound weights that cannot be read: safetensors opens a file itself, and lets torch open it once more."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm_cli.data.index_cache import load_table, save_table, stamp_of
from ldm_cli.data.tar_index import index_tar
from ldm_cli.errors import StorageError, as_ldm_error
from ldm_cli.formats.weight_files import read_tensors

from ..data.tars import png, write_tar
from ..training.forked import ForkedRanks


def broken(name: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"unable to open file <{name}> in read-only mode: Input/output error (5)")


def test_a_device_that_fails_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", broken)
    with pytest.raises(StorageError, match=r"a\.safetensors': Input/output error"):
        read_tensors(tmp_path / "a.safetensors")


def test_an_index_that_cannot_be_read_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(shard := tmp_path / "a.tar", [("a.png", png()), ("a.txt", b"t")])
    save_table(file := tmp_path / "cache/table", index_tar(shard), stamp_of(shard))
    assert load_table(file) is not None
    monkeypatch.setattr(torch.UntypedStorage, "from_file", broken)
    assert load_table(file) is None


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_weights_beyond_the_memory_of_the_process_are_out_of_memory(tmp_path: Path, share: float) -> None:
    size, file = 2**30, tmp_path / "a.safetensors"
    header = b'{"weight":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + size)  # takes no room

    def work(rank: int) -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + int(share * size)  # for no mapping of the file, or for one and not for torch's, too
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            read_tensors(file)
        except BaseException as error:
            known = as_ldm_error(error)
            return known.code if known else 70
        return 0

    with ForkedRanks(work, tmp_path, 1) as job:
        assert job.wait() == [81], job.words()
