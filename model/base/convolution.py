"""The convolutions of a base tokenizer.

Legend: B batch, C channels in, O channels out, h w the input's rows and columns, P places (``model/base/winograd.py``).
"""

from threading import Lock
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.base import swish
from model.base.norm import GroupNorm, inferred_on_cpu
from model.base.winograd import PLAIN, UPSAMPLED

LEAST_CHANNELS = 128  # with fewer the sums take longer than the products that they save
LEAST_TILES = 64  # with fewer the kernels' sums, four times the weights, are read for too little
MAKING = Lock()  # threads that have an image each come to a layer's first image at once


class Conv3x3(nn.Conv2d):
    """A convolution that keeps an image's size, :attr:`by_tiles` in a quarter of the products.

    That is for float32 on CPUs, without gradients; accelerators have such ways of their own.
    """

    filter = PLAIN
    kernels_PCO: Tensor | None

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=bias)
        self.by_tiles = False
        self.register_buffer("kernels_PCO", None, persistent=False)

    def convolve_by_tiles(self, by_tiles: bool) -> None:
        """Whether to. The kernels' sums are made when the first image comes: weights are not to be edited after."""
        self.by_tiles = by_tiles and min(self.in_channels, self.out_channels) >= LEAST_CHANNELS
        self.kernels_PCO = None

    def train(self, mode: bool = True) -> Self:
        """As any module; one that is trained convolves as written from then on."""
        if mode:
            self.convolve_by_tiles(False)
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.kernels_PCO = None
        super()._load_from_state_dict(*arguments, **options)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, O, h, w]."""
        return self._in_tiles(x) if self._fits(x) else self.as_written(x)

    def after(self, norm: GroupNorm, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, O, h, w] of swish(norm(x)).

        By tiles a few rows are normed at a time, while a processor's cache holds them.
        """
        return self._in_tiles(x, norm.scale_and_shift(x)) if self._fits(x) else self(swish(norm(x)))

    def _fits(self, x: Tensor) -> bool:
        return self.by_tiles and inferred_on_cpu(x) and self.filter.tiles(*x.shape[2:]) >= LEAST_TILES

    def _in_tiles(self, x: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
        with MAKING:
            if self.kernels_PCO is None:
                self.kernels_PCO = self.filter.kernels(self.weight)
        return self.filter.convolved(x, self.kernels_PCO, self.bias, affine)

    def as_written(self, x: Tensor) -> Tensor:
        """The convolution, output by output."""
        return super().forward(x)


class UpsampleConv(Conv3x3):
    """Twice the side by nearest neighbour, then a 3x3 convolution, in 4/9 of the products.

    Of the three pixels under a kernel's row or column two are copies of one, so that an output pixel needs 2x2 of the
    input's, with weights added up in one of four ways: for even and odd rows, and columns.
    """

    filter = UPSAMPLED

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def as_written(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2h, 2w]."""
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        parts = [
            (row, column, F.conv2d(padded[..., row : height + row + 1, column : width + column + 1], kernel, self.bias))
            for row, rows in enumerate(_shared(self.weight, 2))
            for column, kernel in enumerate(_shared(rows, 3))
        ]
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        size = (len(x), self.out_channels, 2 * height, 2 * width)
        output = torch.empty(size, dtype=parts[0][2].dtype, device=x.device, memory_format=layout)
        for row, column, part in parts:
            output[:, :, row::2, column::2] = part
        return output


class Conv1x1(nn.Conv2d):
    """A linear layer over channels.

    In float32 on CPUs, without gradients, it is computed as one: torch's convolution of one image goes another way with
    one thread than with two, and rounds differently.
    """

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, O, h, w]."""
        if not inferred_on_cpu(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


def _shared(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along ``dim`` as two: for outputs at even places, and at odd ones."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)
