"""From the bytes of an image file to an upright picture; what can't become one is told apart, for a fair reason.

Colour profiles are ignored, as the paper's data loading does.
"""

import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_ASPECT = 100  # the centre square of a longer image would show less than 1% of it

_FULL_SCALES = (255.0, 65535.0)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_PILLOW_LIMIT = threading.Lock()


class BadImage(ValueError):
    """A file that can't become an image; ``reason`` says why in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """``image``: upright RGB; ``width``, ``height``: of the file, px, upright; ``orientation``: what turned it."""

    image: Image.Image
    width: int
    height: int
    orientation: int  # EXIF's 1..8, of the pixels as the file stores them


def decode(data: bytes, *, max_pixels: int, smallest: int | None = None) -> Picture:
    """The file ``data`` as an upright RGB picture, at its full size.

    With ``smallest`` a large JPEG is decoded at a fraction of its size that has no side below ``smallest`` px.

    EXIF orientation is applied; alpha is composited on white; of an animation the first frame counts; values of more
    than 8 bits are scaled to 8 (:func:`_narrow`). Raises BadImage when the file is empty, damaged, of another kind,
    of more than ``max_pixels`` (told by its header, before anything is decoded) or longer than MAX_ASPECT times its
    other side.
    """
    with decoding():
        file = open_header(data, max_pixels=max_pixels)
        width, height = file.size
        by_pillow = stated_orientation(file) if file.format == "TIFF" else None  # which turns it and forgets it
        if smallest is not None and file.format == "JPEG":
            file.draft(None, (smallest, smallest))  # what it picks is at least that large
        file.load()
        left = stated_orientation(file)
        rgb = _to_rgb(file)
    if left in _TURNED:
        width, height = height, width
    return Picture(upright(rgb, left), width, height, by_pillow or left or 1)


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever fails within, except for want of memory, raises BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # parsers fail on damaged bytes in every way there is; each is a bad image
        raise BadImage(f"cannot be decoded: {_one_line(error)}") from error


def open_header(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image with only its header read, its size and integrity checked; raises BadImage."""
    if not data:
        raise BadImage("empty file")
    try:
        image = _read_header(data)
    except UnidentifiedImageError:
        kind = _signature(data)
        raise BadImage(f"{kind} with a damaged header" if kind else "not an image of a known format") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"no pixels: {width} x {height} px")
    if width * height > max_pixels:
        raise BadImage(f"too large: {width} x {height} px are more than {max_pixels} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"too thin: {width} x {height} px, one side is more than {MAX_ASPECT} times the other")
    if image.format == "PNG":  # Pillow skips the checksums of the pixel data unless asked
        _read_header(data).verify()
    return image


def _read_header(data: bytes) -> Image.Image:
    with _PILLOW_LIMIT:  # Pillow's own limit is one for the process and looser than ours, which follows at once
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _signature(data: bytes) -> str:
    starts = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"BM": "BMP", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for start, kind in starts.items() if data.startswith(start)), "")


def stated_orientation(image: Image.Image) -> int | None:
    """EXIF's 1..8 as the file states it; None when it states none, or nothing that has a meaning."""
    try:
        stated = int(image.getexif().get(ExifTags.Base.Orientation, 0))
    except Exception:  # damaged EXIF, of which the parser fails in many ways, says nothing against the pixels
        return None
    return stated if 1 <= stated <= 8 else None


def upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """``image`` turned and mirrored as ``orientation`` asks."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _narrow(np.asarray(image), _full_scale(image))
        zero_is_white = getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's PhotometricInterpretation
        return Image.fromarray(255 - grey if zero_is_white else grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _full_scale(image: Image.Image) -> float | None:
    """The value of white where the format says it; None for 32-bit integers and floats, which don't."""
    if not image.mode.startswith("I;16"):
        return None
    bits = getattr(image, "tag_v2", {}).get(258, (16,))  # TIFF's BitsPerSample: cameras also write 12
    return 2.0 ** bits[0] - 1


def _narrow(values: np.ndarray, full_scale: float | None) -> np.ndarray:
    """Grey values of more than 8 bits as uint8, rounded, black at 0 and white at ``full_scale``.

    Where there is none: the smallest of 1 (floats only), 255 and 65535 that holds all values; others, and negative
    ones, are stretched from their lowest to their highest. Raises BadImage when some aren't finite.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise BadImage("pixel values that are not finite numbers")
    black = 0.0
    if full_scale is None:
        scales = (1.0, *_FULL_SCALES) if values.dtype.kind == "f" else _FULL_SCALES
        full_scale = next((scale for scale in scales if low >= 0 and high <= scale), None)
        black = 0.0 if full_scale else low
    span = (full_scale or high) - black
    scaled = (values.astype(np.float32) - black) * (255 / (span or 1.0))
    return np.rint(scaled, out=scaled).clip(0, 255).astype(np.uint8)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
