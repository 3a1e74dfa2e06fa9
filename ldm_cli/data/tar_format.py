"""Reading the headers of a tar archive, and nothing else: where each regular member lies and whether the
archive is whole.

Formats: v7, ustar, GNU (long names, base-256 sizes) and PAX (`path`, `size`). Sources: POSIX.1-2001 pax,
"ustar Interchange Format"; GNU tar manual, "Basic Tar Format". Every header's checksum is verified, every
member's data must lie inside the file, and the two zero blocks at the end must be there, so that a cut
archive never reads as a short one. Python's `tarfile` takes a damaged header for the end, and four times as long.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20  # bytes of a GNU long name or a PAX header; real ones have a few hundred
_CHUNK = 1 << 16
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
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How files begin that are no plain tars."""


class Member(NamedTuple):
    """Where a regular file lies in an archive.

    Attributes:
        offset: first byte of the data; the 512 bytes before are its header.
        header_crc: CRC-32 of that header, by which a reader notices that the archive was changed.
    """

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

    Args:
        file: the archive, at its beginning.
        file_size: bytes of it; None: a stream, which is read from beginning to end.

    Attributes:
        ignored: how many members of each kind were passed over (links, devices, directories, …).
        end: offset of the end-of-archive blocks, once the iteration has finished.
    """

    def __init__(self, file: IO[bytes], file_size: int | None = None) -> None:
        self.ignored: Counter[str] = Counter()
        self.end = 0
        self._file, self._file_size = file, file_size
        self._position = 0
        self._global_pax: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[tuple[bytes, Member]]:
        """Path, as stored, and place of the regular members in file order.

        Raises:
            TarDamage: after the last whole member, if the archive is cut or a header is damaged.
        """
        overrides: dict[bytes, bytes] = {}
        while (block := self._header()) != _ZERO_BLOCK:
            kind, data = block[156:157], self._position
            if kind in _EXTENDED:
                content = self._extended(block)
                if kind == b"L":
                    overrides[b"path"] = content.partition(b"\0")[0]
                elif kind == b"g":
                    self._global_pax.update(_pax_records(content, data))
                elif kind != b"K":
                    overrides.update(_pax_records(content, data))
                continue
            if self._global_pax:
                overrides = self._global_pax | overrides
            name = overrides.get(b"path") or _name(block)
            size = _decimal(overrides[b"size"], data) if b"size" in overrides else _number(block[124:136], data - BLOCK)
            if kind == b"S":
                data = self._after_sparse_map(block)
            stored = 0 if kind in _WITHOUT_DATA else size
            if self._file_size is not None and data + stored > self._file_size:
                raise self._cut(self._file_size, name)
            if kind not in _REGULAR:
                self.ignored[_KINDS.get(kind, "special member")] += 1
            elif overrides and any(key.startswith(b"GNU.sparse") for key in overrides):
                self.ignored["sparse file"] += 1
            elif name.endswith(b"/"):
                self.ignored["directory"] += 1
            else:
                yield name, Member(data, size, zlib.crc32(block))
            self._skip_to(data + -(-stored // BLOCK) * BLOCK)
            if self._position < data + stored:
                raise self._cut(self._position, name)
            if overrides:
                overrides = {}
        self._check_end()

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end: the data of the member that the iteration has just given."""
        data = self._file.read(size)
        self._position += len(data)
        return data

    def _skip_to(self, position: int) -> None:
        if self._file_size is not None:
            self._position = self._file.seek(position)
            return
        while self._position < position and self.read(min(position - self._position, _CHUNK)):
            pass

    def _header(self) -> bytes:
        """The next block, if its checksum is right (unsigned as POSIX says, or signed as some old tars wrote)."""
        position = self._position
        block = self.read(BLOCK)
        if not position:
            for magic, name in _COMPRESSED.items():
                if block.startswith(magic):
                    raise TarDamage(0, f"compressed with {name}")
        if len(block) < BLOCK:
            at_end = bool(block) and not any(block)
            where = "inside a header" if block and not at_end else "without the end-of-archive blocks"
            raise TarDamage(self._file_size or self._position, f"the file ends {where}", at_end=at_end)
        stored = _number(block[148:156], position)
        total = _byte_sum(block) - sum(block[148:156]) + 8 * 0x20
        if total != stored and block != _ZERO_BLOCK:
            high = sum(byte >= 128 for byte in block[:148]) + sum(byte >= 128 for byte in block[156:])
            if total - 256 * high != stored:
                raise TarDamage(position, _BAD_HEADER if position else _NO_TAR)
        return block

    def _extended(self, block: bytes) -> bytes:
        """The content of a GNU long name or PAX header."""
        data = self._position
        size = _number(block[124:136], data - BLOCK)
        if size > _MAX_EXTENDED_HEADER:
            raise TarDamage(data, f"extended header of {size} bytes")
        content = self.read(size)
        if len(content) < size:
            raise TarDamage(self._position, "the file ends inside an extended header")
        self._skip_to(data + -(-size // BLOCK) * BLOCK)
        return content

    def _after_sparse_map(self, block: bytes) -> int:
        """Where the data of a GNU sparse member begins: its map may continue over several blocks."""
        more = block[482:483]
        while more > b"\0":
            more = self.read(BLOCK)[504:505]
        return self._position

    def _cut(self, position: int, name: bytes) -> TarDamage:
        shown = repr(name.decode("utf-8", "backslashreplace"))
        return TarDamage(position, f"the file ends inside the member {shown}", name)

    def _check_end(self) -> None:
        """Both zero blocks are there, and nothing but zeros follows."""
        self.end = self._position - BLOCK
        if len(tail := self.read(BLOCK)) < BLOCK:
            raise TarDamage(self._position, "the file ends inside the end-of-archive blocks", at_end=True)
        while tail:
            if rest := tail.lstrip(b"\0"):
                byte = self._position - len(rest)
                raise TarDamage(byte, "data behind the end of the archive (concatenated tars?)", at_end=True)
            tail = self.read(_CHUNK)


def _byte_sum(block: bytes) -> int:
    """Sum of a block's bytes: the low half of Adler-32 is 1 + sum mod 65,521, which 256 bytes cannot reach."""
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


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
