"""Maker of files that are not whole images, each broken in its own way, with what a fair reason says of it."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Broken:
    name: str
    data: bytes
    reason: str  # regular expression


def picture(width: int = 120, height: int = 90) -> Image.Image:
    """Smooth colours with some noise, so that every format needs more than a few bytes for it."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3))
    ramp = np.stack([x * 200 // width, y * 200 // height, (x + y) * 200 // (width + height)], axis=-1)
    return Image.fromarray((ramp + noise).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int) -> bytes:
    """A valid header that claims any size, and next to no pixels behind it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(64))) + png_chunk(b"IEND", b"")


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def _not_finite() -> bytes:
    values = np.zeros((40, 40), np.float32)
    values[3, 4] = np.nan
    return saved(Image.fromarray(values), "TIFF")


def broken_files() -> list[Broken]:
    """Twenty files, no two broken in the same way."""
    good = picture()
    jpeg, png, webp = saved(good, "JPEG"), saved(good, "PNG"), saved(good, "WEBP")
    gif, tiff, bmp = saved(good.convert("P"), "GIF"), saved(good, "TIFF"), saved(good, "BMP")
    huge_bmp = bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:]
    damaged = "cannot be decoded"
    unknown = "not an image of a known format"
    return [
        Broken("empty.jpg", b"", "empty file"),
        Broken("text.jpg", b"The dog ate my photograph.\n" * 40, unknown),
        Broken("error_page.png", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", unknown),
        Broken("zeros.jpg", bytes(5000), unknown),
        Broken("noise.webp", np.random.default_rng(1).bytes(5000), unknown),
        Broken("document.png", b"%PDF-1.7\n" + bytes(300), unknown),
        Broken("archive.jpeg", b"PK\x03\x04" + bytes(300), unknown),
        Broken("half.jpg", _half(jpeg), f"{damaged}.*truncated"),
        Broken("half.png", _half(png), damaged),
        Broken("half.webp", _half(webp), f"{damaged}|WEBP with a damaged header"),
        Broken("half.gif", _half(gif), f"{damaged}.*truncated"),
        Broken("half.tif", _half(tiff), f"{damaged}|TIFF with a damaged header"),
        Broken("half.bmp", _half(bmp), f"{damaged}.*truncated"),
        Broken("start_only.jpg", jpeg[:20], "JPEG with a damaged header"),
        Broken("signature_only.png", png[:8], "PNG with a damaged header"),
        Broken("flipped_byte.png", _flipped(png, len(png) // 2), f"{damaged}.*(checksum|broken)"),
        Broken("bomb.png", png_of_size(50_000, 50_000), "too large: 50000 x 50000 px"),
        Broken("bomb.bmp", huge_bmp, "too large: 60000 x 60000 px"),
        Broken("thread.png", saved(Image.new("RGB", (3000, 7)), "PNG"), "too thin: 3000 x 7 px"),
        Broken("not_finite.tiff", _not_finite(), "not finite"),
    ]
