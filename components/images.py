"""From the bytes of a file to the pixels a model sees: the one preprocessing of training, tokenizing and scoring.

Legend: B batch, C channels (3, RGB), H and W height and width in px, T tries. Pixels are uint8 in 0..255 where they
are stored and float32 in [0, 1] where they are computed with.
"""

import hashlib
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from components.image_files import decode

if TYPE_CHECKING:
    import torch

RATIO = (3 / 4, 4 / 3)  # of the width to the height of a random crop
TRIES = 10

_ID_HEX = 20  # 80 bits: among a billion images two share an id with a chance below one in a million


@dataclass(frozen=True)
class Prepared:
    """``image``: RGB at the working size; the rest of the original: size in px, upright, and EXIF orientation, 1..8."""

    image: Image.Image
    width: int
    height: int
    orientation: int


def image_id(path: str, data: bytes) -> str:
    """The stable id of the file at the source-relative ``path`` with content ``data``: 20 hex digits."""
    return hashlib.sha256(path.encode() + b"\0" + data).hexdigest()[:_ID_HEX]


def prepare(data: bytes, *, size: int, max_pixels: int) -> Prepared:
    """The file ``data`` as an upright RGB image of ``size`` x ``size`` px.

    A large JPEG is decoded at a fraction of its size, never below twice the working size. Raises BadImage.
    """
    picture = decode(data, max_pixels=max_pixels, smallest=2 * size)
    return Prepared(to_working_size(picture.image, size), picture.width, picture.height, picture.orientation)


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


def to_uint8(images_BCHW: "torch.Tensor") -> np.ndarray:
    """float pixels [B, C, H, W] in [0, 1] as uint8 [B, H, W, C] in 0..255, rounded, values beyond clamped."""
    import torch

    return (images_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


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
