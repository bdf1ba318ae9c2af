"""3x3 convolutions in a quarter of the products: Winograd's minimal filtering, F(4x4, 3x3), as matrix products.

A tile of 4x4 outputs reads 6x6 inputs. Each of 36 places multiplies a sum of those by a sum of the kernel's weights,
and outputs are sums of the products: 36 where convolving as written takes 144. When the input is an image of twice its
side, so that neighbours are copies, 25 do. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(https://arxiv.org/abs/1509.09308), section 4.

Sums cost accuracy: in float32 an output is about 1e-6 of the outputs' size off.

Legend: C channels in, O channels out, P places, T tiles, I x I pixels that a tile reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 4  # of a tile's outputs, px
AT_ONCE = 2**15  # numbers of a place that a thread reads and writes at a time, so that a processor's cache holds them
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
        self.read_PI = torch.kron(read[places], read[places])
        self.weighted = torch.kron(WEIGHTED[places], WEIGHTED[places])
        self.written = torch.kron(WRITTEN[:, places], WRITTEN[:, places])
        self.everywhere = int(self.written.all(0).nonzero()[0])  # the place whose product is in each output, once

    def tiles(self, height: int, width: int) -> int:
        """How many tiles an input [height, width] has; 0 where it doesn't divide into tiles."""
        return 0 if height % self.step or width % self.step else height * width // self.step**2

    def kernels(self, weight: Tensor) -> Tensor:
        """Weights [O, C, 3, 3] as sums [P, C, O], taken in float64."""
        flat = weight.detach().double().permute(2, 3, 1, 0).reshape(9, -1)
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
        for number, into in enumerate(result):
            of_image = None if affine is None else (affine[0][number], affine[1][number])
            self._convolve(x[number].permute(1, 2, 0), kernels_PCO, bias, of_image, into)
        return result.view(batch, tall * SIDE, wide * SIDE, outputs).permute(0, 3, 1, 2)

    def _convolve(
        self,
        image_hwC: Tensor,
        kernels_PCO: Tensor,
        bias: Tensor | None,
        affine: tuple[Tensor, Tensor] | None,
        into: Tensor,
    ) -> None:
        height, width, channels = image_hwC.shape
        tall, _, wide, _, outputs = into.shape
        at_once = torch.get_num_threads() * AT_ONCE // (wide * (channels + outputs))
        rows, filled = min(tall, max(1, at_once)), 0  # of tiles
        band = image_hwC.new_empty(rows * self.step + 2, width + 2, channels)
        for edge in (band[0], band[:, 0], band[:, -1]):
            edge.zero_()
        tiles = band.unfold(0, self.reads, self.step).unfold(1, self.reads, self.step).permute(3, 4, 0, 1, 2)
        for row in range(0, tall, rows):
            above, needed = row * self.step - 1, min(height, (row + rows) * self.step + 1)
            if row:
                band[:2] = band[-2:]
            _fill(band[filled - above : needed - above, 1:-1], image_hwC[filled:needed], affine)
            if needed == height:
                band[height - above].zero_()
            filled = needed
            read = tiles[:, :, : min(rows, tall - row)].reshape(self.reads**2, -1)
            products_PTO = torch.bmm((self.read_PI @ read).view(len(kernels_PCO), -1, channels), kernels_PCO)
            if bias is not None:
                products_PTO[self.everywhere] += bias
            written = (self.written @ products_PTO.flatten(1)).view(SIDE, SIDE, -1, wide, outputs)
            into[row : row + rows] = written.permute(2, 0, 3, 1, 4)


def _fill(rows: Tensor, image: Tensor, affine: tuple[Tensor, Tensor] | None) -> None:
    """The next rows of an image, while a processor's cache holds them."""
    if affine is None:
        rows.copy_(image)
    else:
        scale_C, shift_C = affine
        F.silu(torch.addcmul(shift_C, image, scale_C, out=rows), inplace=True)


PLAIN, UPSAMPLED = Filter(upsampled=False), Filter(upsampled=True)
