"""Reads the PNG files that the package writes."""

import struct
import zlib


def pixels(data: bytes) -> list[list[tuple[int, ...]]]:
    """The pixels of a PNG file without filters, row by row."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, body, header = 8, b"", b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunk = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + chunk
        )
        body += chunk if kind == b"IDAT" else b""
        header = chunk if kind == b"IHDR" else header
        at += 12 + size
    width, height, _, colour = struct.unpack(">IIBB", header[:10])
    channels = 3 if colour == 2 else 1
    raw = zlib.decompress(body)
    step = width * channels + 1
    assert len(raw) == step * height
    rows = []
    for y in range(height):
        assert raw[y * step] == 0
        line = raw[y * step + 1 : (y + 1) * step]
        rows.append([tuple(line[i : i + channels]) for i in range(0, len(line), channels)])
    return rows
