"""Reading the headers of a tar archive, and nothing else: where each regular member lies and whether the
archive is whole.

Formats: v7, ustar, GNU (long names, base-256 sizes) and PAX (`path`, `size`). Sources: POSIX.1-2001 pax,
"ustar Interchange Format"; GNU tar manual, "Basic Tar Format". Every header's checksum is verified, every
member's data must lie inside the file, and the two zero blocks at the end must be there, so that a cut
archive never reads as a short one.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20  # bytes of a GNU long name or a PAX header; real ones have a few hundred
_MAX_TRAILER = 1 << 20  # bytes looked at behind the end-of-archive blocks; tar pads to 10 KiB
_ZERO_BLOCK = bytes(BLOCK)
_KINDS = {
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "fifo",
    b"S": "sparse file",
}
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_EXTENDED = frozenset((b"L", b"K", b"x", b"g", b"X"))
_REGULAR = frozenset((b"0", b"\0", b"7"))
_NO_TAR, _BAD_HEADER = "not a tar archive: no header", "damaged header"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How files begin that are no plain tars."""


class TarMember(NamedTuple):
    """A regular file in an archive.

    Attributes:
        name: its path in the archive, as stored.
        offset: first byte of its data; its header is the block before.
        size: bytes of data.
        header_crc: CRC-32 of its header block, by which a reader notices that the archive was changed.
    """

    name: bytes
    offset: int
    size: int
    header_crc: int


class TarDamage(Exception):
    """The archive is not whole.

    Attributes:
        byte: where reading had to stop.
        reason: what is wrong there.
        member: the name of the member that is not whole, where it is known.
        at_end: all members were read; only the end of the archive is damaged.
    """

    def __init__(self, byte: int, reason: str, member: bytes | None = None, at_end: bool = False) -> None:
        super().__init__(f"{reason} at byte {byte}")
        self.byte, self.reason, self.member, self.at_end = byte, reason, member, at_end


class TarScan:
    """One pass over the headers of an archive.

    Attributes:
        ignored: how many members of each kind were passed over (links, devices, directories, …).
        end: offset of the end-of-archive blocks, once the iteration has finished.
    """

    def __init__(self, file_descriptor: int, file_size: int) -> None:
        self.ignored: Counter[str] = Counter()
        self.end = 0
        self._fd, self._file_size = file_descriptor, file_size
        self._buffer, self._buffer_start = b"", 0
        self._num_headers = 0
        self._global_pax: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarMember]:
        """The regular members in file order.

        Raises:
            TarDamage: after the last whole member, if the archive is cut or a header is damaged.
        """
        self._refuse_compressed()
        position = 0
        overrides: dict[bytes, bytes] = {}
        while (block := self._block(position)) != _ZERO_BLOCK:
            self._verify(block, position)
            kind = block[156:157]
            data = position + BLOCK
            if kind in _EXTENDED:
                content, position = self._extended(block, data)
                if kind == b"L":
                    overrides[b"path"] = content.split(b"\0", 1)[0]
                elif kind == b"g":
                    self._global_pax.update(_pax_records(content, data))
                elif kind != b"K":
                    overrides.update(_pax_records(content, data))
                continue
            if self._global_pax:
                overrides = self._global_pax | overrides
            name = overrides.get(b"path") or _name(block)
            size = _decimal(overrides[b"size"], data) if b"size" in overrides else _number(block[124:136], position)
            if kind == b"S":
                data = self._after_sparse_map(block, data)
            stored = 0 if kind in _WITHOUT_DATA else size
            if data + stored > self._file_size:
                raise TarDamage(self._file_size, f"the file ends inside the member {_shown(name)}", name)
            if kind not in _REGULAR:
                self.ignored[_KINDS.get(kind, "special member")] += 1
            elif overrides and any(key.startswith(b"GNU.sparse") for key in overrides):
                self.ignored["sparse file"] += 1
            elif name.endswith(b"/"):
                self.ignored["directory"] += 1
            else:
                yield TarMember(name, data, size, zlib.crc32(block))
            position = data + -(-stored // BLOCK) * BLOCK
            if overrides:
                overrides = {}
        self._check_end(position)

    def _refuse_compressed(self) -> None:
        start = os.pread(self._fd, 8, 0)
        for magic, name in COMPRESSED.items():
            if start.startswith(magic):
                raise TarDamage(0, f"compressed with {name}")

    def _block(self, position: int) -> bytes:
        """The 512 bytes at `position`, through a read-ahead that suits the size of the members."""
        start = position - self._buffer_start
        block = self._buffer[start : start + BLOCK] if start >= 0 else b""
        if len(block) < BLOCK:
            # Small members: their data comes along in large reads. Large ones: only headers are worth
            # reading.
            length = 1 << 18 if self._num_headers << 15 >= position else 1 << 12
            self._buffer, self._buffer_start = os.pread(self._fd, length, position), position
            block = self._buffer[:BLOCK]
        if len(block) < BLOCK:
            at_end = bool(block) and not any(block)
            where = "inside a header" if block and not at_end else "without the end-of-archive blocks"
            raise TarDamage(self._file_size, f"the file ends {where}", at_end=at_end)
        self._num_headers += 1
        return block

    def _verify(self, block: bytes, position: int) -> None:
        """Compare the header's checksum (unsigned as POSIX says, or signed as some old tars wrote)."""
        stored = _number(block[148:156], position)
        total = _byte_sum(block) - sum(block[148:156]) + 8 * 0x20
        if total != stored:
            high = sum(byte >= 128 for byte in block[:148]) + sum(byte >= 128 for byte in block[156:])
            if total - 256 * high != stored:
                raise TarDamage(position, _BAD_HEADER if position else _NO_TAR)

    def _extended(self, block: bytes, data: int) -> tuple[bytes, int]:
        """The content of a GNU long name or PAX header, and where the next header is."""
        size = _number(block[124:136], data - BLOCK)
        if size > _MAX_EXTENDED_HEADER:
            raise TarDamage(data, f"extended header of {size} bytes")
        content = os.pread(self._fd, size, data)
        following = data + -(-size // BLOCK) * BLOCK
        if len(content) < size:
            raise TarDamage(self._file_size, "the file ends inside an extended header")
        return content, following

    def _after_sparse_map(self, block: bytes, data: int) -> int:
        """Where the data of a GNU sparse member begins: its map may continue over several blocks."""
        extended = block[482]
        while extended:
            extended = self._block(data)[504]
            data += BLOCK
        return data

    def _check_end(self, position: int) -> None:
        """Both zero blocks are there, and nothing but zeros follows."""
        self.end = position
        tail = os.pread(self._fd, _MAX_TRAILER, position + BLOCK)
        if len(tail) < BLOCK:
            raise TarDamage(self._file_size, "the file ends inside the end-of-archive blocks", at_end=True)
        if any(tail):
            byte = position + BLOCK + len(tail) - len(tail.lstrip(b"\0"))
            raise TarDamage(byte, "data behind the end of the archive (concatenated tars?)", at_end=True)


def _byte_sum(block: bytes) -> int:
    """Sum of a block's bytes: the low half of Adler-32 is 1 + sum mod 65,521, which 256 bytes cannot reach."""
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


def _shown(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))


def _name(block: bytes) -> bytes:
    """The member's path: `prefix/name` in ustar; GNU headers use the prefix bytes for other things."""
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(field: bytes, position: int) -> int:
    """A header's number: octal digits, or GNU base-256 when the top bit of the first byte is set."""
    try:
        if field[0] & 0x80:
            value = -1 if field[0] & 0x40 else int.from_bytes(bytes((field[0] & 0x3F,)) + field[1:], "big")
        else:
            value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise TarDamage(position, _BAD_HEADER if position else _NO_TAR) from None
    if value < 0:
        raise TarDamage(position, "negative number in a header")
    return value


def _decimal(text: bytes, position: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise TarDamage(position, "damaged PAX header")
    return int(text)


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    """The `length key=value` records of a PAX header."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content) and content[start]:
        digits, _, _ = content[start : start + 20].partition(b" ")
        length = _decimal(digits, position)
        key, separator, value = content[start + len(digits) + 1 : start + length].partition(b"=")
        if length <= len(digits) + 2 or not separator or value[-1:] != b"\n" or start + length > len(content):
            raise TarDamage(position, "damaged PAX header")
        records[key] = value[:-1]
        start += length
    return records
