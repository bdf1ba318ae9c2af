"""From the bytes of a file to the pixels a model sees: the one preprocessing of training, tokenizing and scoring.

Legend: B batch, C channels (3, RGB), H and W height and width in px, T tries. Pixels are uint8 in 0..255 where they
are stored and float32 in [0, 1] where they are computed with. Colour profiles are ignored, as the paper's data
loading does.
"""

import hashlib
import io
import math
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_ASPECT = 100  # the centre square of a longer image would show less than 1% of it
RATIO = (3 / 4, 4 / 3)  # of the width to the height of a random crop
TRIES = 10

_ID_HEX = 20  # 80 bits: among a billion images two share an id with a chance below one in a million
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
class Prepared:
    """``image``: RGB at the working size; ``width`` and ``height``: of the original, px, upright."""

    image: Image.Image
    width: int
    height: int


def image_id(path: str, data: bytes) -> str:
    """The stable id of the file at the source-relative ``path`` with content ``data``: 20 hex digits."""
    return hashlib.sha256(path.encode() + b"\0" + data).hexdigest()[:_ID_HEX]


def prepare(data: bytes, *, size: int, max_pixels: int) -> Prepared:
    """The file ``data`` as an upright RGB image of ``size`` x ``size`` px.

    The same as :func:`decode` and :func:`to_working_size`, but a large JPEG is decoded at a fraction of its size, never
    below twice the working size. Raises BadImage.
    """
    image, width, height = _decode(data, max_pixels, smallest=2 * size)
    return Prepared(to_working_size(image, size), width, height)


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """The file ``data`` as an upright RGB image at its full size.

    EXIF orientation is applied; alpha is composited on white; of an animation the first frame counts; values of more
    than 8 bits are scaled to 8 (:func:`_narrow`). Raises BadImage when the file is empty, damaged, of another kind,
    of more than ``max_pixels`` (told by its header, before anything is decoded) or longer than MAX_ASPECT times its
    other side.
    """
    return _decode(data, max_pixels, smallest=None)[0]


def to_working_size(image: Image.Image, size: int) -> Image.Image:
    """The centre square of ``image``, resized to ``size`` x ``size`` px (bicubic, antialiased).

    That is: resize the short side to ``size``, keep the centre; in one step, so a thin image needs no huge canvas.
    """
    if image.size == (size, size):
        return image
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))


def encode_png(image: Image.Image) -> bytes:
    """``image`` as PNG: lossless, fast rather than smallest."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)  # 20% faster for 1% more bytes (photographs)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The RGB PNG ``data`` as uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))


def stack(pngs: Sequence[bytes]) -> np.ndarray:
    """RGB PNGs of one size as contiguous uint8 [B, 3, H, W]; raises ValueError for none or for several sizes."""
    pixels = [decode_png(png) for png in pngs]
    shapes = sorted({array.shape for array in pixels})
    if len(shapes) != 1:
        raise ValueError(f"stack: images of one size are needed, not {shapes}")
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))


def to_float(images_BCHW: "torch.Tensor") -> "torch.Tensor":
    """uint8 pixels in 0..255 as float32 in [0, 1]; raises ValueError for another dtype."""
    import torch

    if images_BCHW.dtype != torch.uint8:
        raise ValueError(f"to_float: dtype uint8 is needed, not {images_BCHW.dtype}")
    return images_BCHW.to(torch.float32) / 255


@dataclass(frozen=True)
class Share:
    """Which images of a training batch these are: numbers ``start`` up to ``stop`` of ``of``.

    What is drawn for an image then depends on its place in the batch alone, not on how workers share the batch.
    """

    start: int
    stop: int
    of: int

    @classmethod
    def of_rank(cls, rank: int, world: int, batch: int) -> "Share":
        """The share of worker ``rank`` of ``world``: as even as whole images allow."""
        return cls(batch * rank // world, batch * (rank + 1) // world, batch)

    def __len__(self) -> int:
        return self.stop - self.start


def random_resized_crop(
    images_BCHW: "torch.Tensor",
    *,
    scale: tuple[float, float],
    generator: "torch.Generator",
    share: Share | None = None,
) -> "torch.Tensor":
    """A random crop of each image, resized back to H x W, and every second one mirrored: the paper's augmentation.

    ``images_BCHW`` is uint8, or float32 in [0, 1]; the result is float32 in [0, 1] on the same device. A crop has a
    share of the area in ``scale`` and a ratio of width to height in 3/4..4/3 (uniform in its logarithm); the whole
    image is kept where none of 10 tries fits, as in torchvision's RandomResizedCrop, which the official code uses. The
    resize is bilinear; it only ever enlarges, so it needs no antialiasing. All randomness is ``generator``'s.
    ``share``: the images' places in a larger batch; None: they are all of it.
    """
    import torch

    images_BCHW = to_float(images_BCHW) if images_BCHW.dtype == torch.uint8 else images_BCHW
    batch, _, height, width = images_BCHW.shape
    share = share or Share(0, batch, batch)
    boxes = _random_boxes(share.of, height, width, scale=scale, generator=generator)[share.start : share.stop]
    mirrored = torch.rand(share.of, generator=generator, device=generator.device)[share.start : share.stop] < 0.5
    return _crop(images_BCHW, boxes.to(images_BCHW.device), mirrored.to(images_BCHW.device))


def recolour(
    images_BCHW: "torch.Tensor", *, part: float, generator: "torch.Generator", share: Share | None = None
) -> "torch.Tensor":
    """A ``part`` of the images with their channels permuted and each channel's contrast and brightness changed.

    float32 in [0, 1] in and out; ``share`` as in :func:`random_resized_crop`. Not the paper's: it makes many colour
    schemes of few photographs.
    """
    import torch

    share = share or Share(0, len(images_BCHW), len(images_BCHW))

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.rand(share.of, *shape, generator=generator, device=generator.device)
        return drawn[share.start : share.stop].to(images_BCHW.device)

    order = draw(3).argsort(dim=1)
    permuted = images_BCHW.gather(1, order[:, :, None, None].expand_as(images_BCHW))
    contrast, brightness = 0.6 + 0.8 * draw(3, 1, 1), 0.3 * (draw(1, 1, 1) - 0.5)
    changed = ((permuted - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
    return torch.where(draw(1, 1, 1) < part, changed, images_BCHW)


def _decode(data: bytes, max_pixels: int, smallest: int | None) -> tuple[Image.Image, int, int]:
    try:
        image = _open(data, max_pixels)
        width, height = image.size
        if smallest is not None and image.format == "JPEG":
            image.draft(None, (smallest, smallest))  # what it picks is at least that large
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # parsers fail on damaged bytes in every way there is; each is a bad image
        raise BadImage(f"cannot be decoded: {_one_line(error)}") from error
    if orientation in _TURNED:
        width, height = height, width
    return (rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb), width, height


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with only its header read, its size and integrity checked."""
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


def _orientation(image: Image.Image) -> int:
    """1..8; TIFF files are turned by Pillow while they load and then say 1."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, of which the parser fails in many ways, says nothing against the pixels
        return 1


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


def _random_boxes(
    batch: int, height: int, width: int, *, scale: tuple[float, float], generator: "torch.Generator"
) -> "torch.Tensor":
    """Crop boxes [B, 4]: left, top, width, height in whole px."""
    import torch

    area, log_ratio, across, down = torch.rand(4, TRIES, batch, generator=generator, device=generator.device)
    area = (scale[0] + area * (scale[1] - scale[0])) * height * width
    ratio = torch.exp(math.log(RATIO[0]) + log_ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
    widths_TB, heights_TB = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits_TB = (widths_TB >= 1) & (widths_TB <= width) & (heights_TB >= 1) & (heights_TB <= height)
    first_B = fits_TB.int().argmax(dim=0)  # 0 too where none fits
    rows_B, any_B = torch.arange(batch, device=area.device), fits_TB.any(dim=0)
    widths_B = torch.where(any_B, widths_TB[first_B, rows_B], float(width))
    heights_B = torch.where(any_B, heights_TB[first_B, rows_B], float(height))
    left_B = (across[0] * (width - widths_B + 1)).floor()
    top_B = (down[0] * (height - heights_B + 1)).floor()
    return torch.stack([left_B, top_B, widths_B, heights_B], dim=1)


def _crop(images_BCHW: "torch.Tensor", boxes: "torch.Tensor", mirrored: "torch.Tensor") -> "torch.Tensor":
    """Each image's box resized to H x W, as ``interpolate`` does it on the crop alone, mirrored where asked."""
    import torch

    height, width = images_BCHW.shape[-2:]
    left, top, crop_width, crop_height = boxes[:, :, None].unbind(dim=1)
    x_BW = _centres(left, crop_width, width)
    y_BH = _centres(top, crop_height, height)
    x_BW = torch.where(mirrored[:, None], x_BW.flip(1), x_BW)
    grid_x = (2 * x_BW + 1) / width - 1
    grid_y = (2 * y_BH + 1) / height - 1
    size = (len(boxes), height, width)
    grid = torch.stack([grid_x[:, None, :].expand(size), grid_y[:, :, None].expand(size)], dim=-1)
    return torch.nn.functional.grid_sample(
        images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _centres(start: "torch.Tensor", length: "torch.Tensor", count: int) -> "torch.Tensor":
    """Where ``count`` output pixels lie between the first and the last of ``length`` source pixels [B, count]."""
    import torch

    steps = (torch.arange(count, device=start.device) + 0.5) / count
    return torch.minimum((steps * length - 0.5).clamp(min=0), length - 1) + start
