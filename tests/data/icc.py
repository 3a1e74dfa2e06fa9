"""Color profiles by matrix and gamma, written by hand from ICC.1:2010: no code under test makes its own input."""

from __future__ import annotations

import struct

Matrix = list[list[float]]
# Linear RGB to XYZ, adapted to D50, as the profiles of these spaces have it (columns are the primaries).
SPACES: dict[str, tuple[Matrix, float]] = {
    "Display P3": ([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]], 2.2),
    "Adobe RGB": ([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]], 2.19921875),
    "ProPhoto": ([[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00008], [0.0, 0.0, 0.82491]], 1.8),
    "exchanged": ([[0.14307, 0.38515, 0.43607], [0.06061, 0.71687, 0.22249], [0.71409, 0.09708, 0.01392]], 2.2),
}


def _tag(number: float) -> bytes:
    return struct.pack(">i", round(number * 65536))


def icc_profile(matrix: Matrix, gamma: float, space: bytes = b"RGB ") -> bytes:
    """A matrix profile by ICC.1:2010, written by hand: header, tag table, XYZ and curv tags."""
    white = b"XYZ \0\0\0\0" + _tag(0.9642) + _tag(1.0) + _tag(0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for column, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(_tag(row[column]) for row in matrix)
            tags[name + b"TRC"] = curve
    return _profile(tags, space, b"XYZ ")


def _profile(tags: dict[bytes, bytes], space: bytes, connection: bytes) -> bytes:
    device = b"prtr" if space == b"CMYK" else b"mntr"
    table, content = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        padded = body + bytes(-len(body) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(body))
        content += padded
    header = struct.pack(
        ">I4sI4s4s4s12s4s",
        132 + len(table) - 4 + len(content),
        b"",
        0x02100000,
        device,
        space,
        connection,
        b"",
        b"acsp",
    )
    header += bytes(28) + _tag(0.9642) + _tag(1.0) + _tag(0.8249)
    return header.ljust(128, b"\0") + table + content


def cmyk_profile() -> bytes:
    """A printer's profile by ICC.1:2010: a table (lut8) of the sixteen mixtures of full inks as CIELAB."""
    table = b""
    for corner in range(16):
        c, m, y, k = (corner >> shift & 1 for shift in (3, 2, 1, 0))
        table += bytes((max(0, 240 - 60 * c - 70 * m - 20 * y - 200 * k), 128 - 30 * c + 60 * m, 128 - 40 * c + 70 * y))
    identity = b"".join(_tag(float(row == column)) for row in range(3) for column in range(3))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + _tag(0.9642) + _tag(1.0) + _tag(0.8249)
    return _profile({b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": white, b"A2B0": lut}, b"CMYK", b"Lab ")
