"""Depth maps and masks: from their files to the working size, where their image's pixels went, and back to numbers.

Legend: N rows, H and W height and width in px.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from components.image_files import BadImage, decoding, open_header, stated_orientation, upright
from components.images import Prepared, encode_png

Kind = Literal["depth", "mask"]

BYTES_A_PIXEL = {"label": 0, "depth": 4, "mask": 2}  # of decode_targets
MISSING_ID = -1  # every pixel of the mask of a row that has none
WANTED: dict[Kind, str] = {
    "depth": "a 16-bit grayscale PNG of millimetres is needed",
    "mask": "an 8-bit grayscale or palette PNG of class ids is needed",
}
_GREY, _PALETTE = 0, 3  # PNG's colour types
_COLOURS = {_GREY: "grayscale", 2: "RGB", _PALETTE: "palette", 4: "grayscale with alpha", 6: "RGBA"}


def prepare_target(data: bytes, kind: Kind, *, like: Prepared, size: int, max_pixels: int) -> bytes:
    """The depth map or mask in the file ``data`` as grayscale PNG of ``size`` x ``size`` px, over its image's pixels.

    The same square as :func:`components.images.to_working_size` keeps, by nearest neighbour: no value is invented.
    Depth stays uint16 millimetres (0: no reading), a mask uint8 class ids, those of a palette file its indices. It may
    be larger or smaller than the image, of the same aspect up to the rounding of a resize, and lies over the pixels as
    the image's file stores them: the image's EXIF orientation turns both, unless the target's file states its own.
    Raises BadImage.
    """
    with decoding():
        file = open_header(data, max_pixels=max_pixels)
        _check_pixels(file, data, kind)
        file.load()
        orientation = stated_orientation(file) or like.orientation
        values = np.asarray(upright(file, orientation)).astype(np.uint16 if kind == "depth" else np.uint8)
    height, width = values.shape
    _check_aspect(width, height, like)
    return encode_png(Image.fromarray(_nearest_square(values, size)))


def depth_to_metres(png: bytes) -> np.ndarray:
    """A stored depth map as float32 [H, W] in metres, NaN where there is no reading."""
    millimetres = _pixels(png).astype(np.float32)
    return np.where(millimetres == 0, np.float32(np.nan), millimetres / 1000)


def mask_ids(png: bytes) -> np.ndarray:
    """A stored mask as uint8 [H, W] class ids."""
    return _pixels(png).astype(np.uint8)


def decode_targets(table: Any, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Target columns of an Arrow table or batch with columns of IMAGES_SCHEMA, as arrays.

    label: objects [N], str or None. depth: float32 [N, H, W] metres, NaN without a reading and all over a row that has
    none. mask: int16 [N, H, W] class ids, -1 all over a row that has none. H and W are those of any PNG in ``table``,
    so ``image`` must be in it where no row may have a target. Raises ValueError for a column that is no target or
    isn't there, and when nothing tells H and W.
    """
    return {name: _decode_column(table, name) for name in columns}


def _decode_column(table: Any, name: str) -> np.ndarray:
    if name not in ("label", "depth", "mask"):
        raise ValueError(f"columns = {name!r}: allowed are label, depth, mask")
    if name not in table.schema.names:
        raise ValueError(f"columns = {name!r}: the table has {table.schema.names}")
    values = table[name].to_pylist()
    if name == "label":
        return np.array([*values, None], dtype=object)[:-1]  # the None keeps numpy from looking into the values
    shape = _height_width(table) if values else (0, 0)
    if name == "depth":
        return _stack(values, depth_to_metres, np.full((len(values), *shape), np.nan, np.float32))
    return _stack(values, mask_ids, np.full((len(values), *shape), MISSING_ID, np.int16))


def _stack(pngs: Sequence[bytes | None], read: Callable[[bytes], np.ndarray], into: np.ndarray) -> np.ndarray:
    for place, png in enumerate(pngs):
        if png is not None:
            into[place] = read(png)
    return into


def _height_width(table: Any) -> tuple[int, int]:
    """Height and width in px of the first PNG in ``table``: an ImageSet's are all of one size."""
    for name in ("depth", "mask", "image"):
        column = table[name].drop_null() if name in table.schema.names else ()
        if len(column):
            with Image.open(io.BytesIO(column[0].as_py()), formats=("PNG",)) as image:
                return image.height, image.width
    raise ValueError("decode_targets: no row has a target, so the column 'image' is needed to tell height and width")


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image)


def _check_pixels(file: Image.Image, data: bytes, kind: Kind) -> None:
    """By the header, not by Pillow's mode: that scales the values of grey files of fewer than 8 bits."""
    if file.format != "PNG":
        raise BadImage(f"{file.format}: {WANTED[kind]}")
    bits, colour = data[24], data[25]
    fits = (bits, colour) == (16, _GREY) if kind == "depth" else colour == _PALETTE or (bits, colour) == (8, _GREY)
    if not fits:
        raise BadImage(f"{bits}-bit {_COLOURS.get(colour, 'unknown')} PNG: {WANTED[kind]}")


def _check_aspect(width: int, height: int, like: Prepared) -> None:
    """Of the target, upright. Equal up to one px of the smaller of the two, as rounded or cut-off sizes are."""
    if abs(width * like.height - height * like.width) > max(width, height, like.width, like.height):
        raise BadImage(f"{width} x {height} px, its image is {like.width} x {like.height} px: one aspect is needed")


def _nearest_square(values: np.ndarray, size: int) -> np.ndarray:
    """The centre square of ``values``, ``size`` x ``size`` px, each the value at its centre."""
    height, width = values.shape
    short = min(height, width)
    steps = (2 * np.arange(size) + 1) * short  # in whole numbers, so that a centre between two pixels is no accident
    rows, columns = (((side - short) * size + steps) // (2 * size) for side in (height, width))
    return values[rows[:, None], columns]
