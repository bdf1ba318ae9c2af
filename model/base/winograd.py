"""3x3 convolutions in a quarter of the products: Winograd's minimal filtering, F(4x4, 3x3), as matrix products.

A tile of 4x4 outputs reads 6x6 inputs. Each of 36 places multiplies a sum of those by a sum of the kernel's weights,
and outputs are sums of the products: 36 where convolving as written takes 144. When the input is an image of twice its
side, so that neighbours are copies, 25 do. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(https://arxiv.org/abs/1509.09308), section 4.

Sums cost accuracy: in float32 an output is about 1e-6 of the outputs' size off.

Legend: C channels in, O channels out, T tiles; along one side of a tile I pixels read and S places; P = S * S places.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 4  # of a tile's outputs, px
AT_ONCE = 64  # tiles of a thread, so that a processor's cache holds them
# Along one side; a row of READ and WEIGHTED and a column of WRITTEN is a place: 0, 1, -1, 2, -2 and infinity.
READ = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
WEIGHTED = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]).double() / 24
WRITTEN = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
COPIES = F.one_hot(torch.tensor([0, 1, 1, 2, 2, 3])).float()  # which pixel each of an upsampled six is a copy of


class Filter:
    """The sums of one kind of 3x3 convolution with padding 1."""

    def __init__(self, *, upsampled: bool) -> None:
        read = READ @ COPIES if upsampled else READ
        places = read.any(1)  # of an upsampled image's the one of -1 reads nothing
        self.reads, self.step = read.shape[1], SIDE // 2 if upsampled else SIDE
        self.read_SI, self.written_4S = read[places], WRITTEN[:, places].contiguous()
        self.weighted = torch.kron(WEIGHTED[places], WEIGHTED[places])
        self.everywhere = len(self.read_SI) + 1  # the place of 1 and 1, whose product is in each output, once

    def tiles(self, height: int, width: int) -> int:
        """How many tiles an input [height, width] has; 0 where it doesn't divide into tiles."""
        return 0 if height % self.step or width % self.step else height * width // self.step**2

    def kernels(self, weight: Tensor) -> Tensor:
        """Weights [O, C, 3, 3] as sums [P, C, O], taken in float64; of a place the column comes first."""
        flat = weight.detach().double().permute(3, 2, 1, 0).reshape(9, -1)
        return (self.weighted @ flat).to(weight.dtype).view(-1, weight.shape[1], weight.shape[0])

    def convolved(
        self, x: Tensor, kernels_PCO: Tensor, bias: Tensor | None, affine: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Float32 [B, C, h, w], of a size that divides into tiles, to [B, O, H, W], channels-last.

        ``affine``: scale and shift, each [B, C]; what is convolved is then silu(x * scale + shift).
        """
        batch, _, height, width = x.shape
        tall, wide, outputs = height // self.step, width // self.step, kernels_PCO.shape[2]
        result = x.new_empty(batch, tall, SIDE, wide, SIDE, outputs)
        rows = min(tall, max(1, torch.get_num_threads() * AT_ONCE // wide))  # of tiles
        memory = x.new_empty(2, len(kernels_PCO) * rows * wide * max(kernels_PCO.shape[1:]))
        for number, into in enumerate(result):
            of_image = None if affine is None else (affine[0][number], affine[1][number])
            bands = _bands(x[number].permute(1, 2, 0), of_image, rows * self.step)
            for band, rows_of_tiles in zip(bands, into.split(rows), strict=True):
                self._convolve(band, kernels_PCO, bias, memory, rows_of_tiles)
        return result.view(batch, tall * SIDE, wide * SIDE, outputs).permute(0, 3, 1, 2)

    def _convolve(self, band: Tensor, kernels_PCO: Tensor, bias: Tensor | None, memory: Tensor, into: Tensor) -> None:
        """Padded rows to [tall, 4, wide, 4, O]; a step writes what the one before has read, which a cache holds."""
        (tall, _, wide, _, outputs), side = into.shape, len(self.read_SI)
        padded, channels = band.shape[1:]
        one, other = memory
        rows = band.unfold(0, self.reads, self.step).permute(3, 0, 1, 2)
        read = _summed(self.read_SI, rows.reshape(self.reads, -1), other).view(side, tall, padded, channels)
        columns = _first(one, self.reads, side, tall, wide, channels)
        columns.copy_(read.unfold(2, self.reads, self.step).permute(4, 0, 1, 2, 3))
        sums_PTC = _summed(self.read_SI, columns.view(self.reads, -1), other).view(-1, tall * wide, channels)
        products_PTO = torch.bmm(sums_PTC, kernels_PCO, out=_first(one, side * side, tall * wide, outputs))
        if bias is not None:
            products_PTO[self.everywhere] += bias
        columns = _summed(self.written_4S, products_PTO.view(side, -1), other).view(SIDE, side, -1)
        rows = torch.bmm(self.written_4S.expand(SIDE, -1, -1), columns, out=_first(one, SIDE, SIDE, columns.shape[2]))
        into.copy_(rows.view(SIDE, SIDE, tall, wide, outputs).permute(2, 1, 3, 0, 4))


def _first(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _summed(weights: Tensor, parts: Tensor, memory: Tensor) -> Tensor:
    return torch.mm(weights, parts, out=_first(memory, len(weights), parts.shape[1]))


def _bands(image_hwC: Tensor, affine: tuple[Tensor, Tensor] | None, rows: int) -> Iterator[Tensor]:
    """So many rows of an image after the others, with a pixel more on each side; the next are written over the last."""
    height, width, channels = image_hwC.shape
    band = image_hwC.new_empty(rows + 2, width + 2, channels)
    for edge in (band[0], band[:, 0], band[:, -1]):
        edge.zero_()
    filled = 0
    for top in range(0, height, rows):
        needed = min(height, top + rows + 1)
        if top:
            band[:2] = band[-2:]
        _fill(band[filled - top + 1 : needed - top + 1, 1:-1], image_hwC[filled:needed], affine)
        if needed == height:
            band[height - top + 1].zero_()
        filled = needed
        yield band[: min(rows, height - top) + 2]


def _fill(rows: Tensor, image: Tensor, affine: tuple[Tensor, Tensor] | None) -> None:
    """The next rows of an image, while a processor's cache holds them."""
    if affine is None:
        rows.copy_(image)
    else:
        scale_C, shift_C = affine
        F.silu(torch.addcmul(shift_C, image, scale_C, out=rows), inplace=True)


PLAIN, UPSAMPLED = Filter(upsampled=False), Filter(upsampled=True)
