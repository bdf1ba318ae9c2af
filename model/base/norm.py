"""The group norm of a base tokenizer.

Legend: B batch, C channels, h w rows and columns, N groups, K = C / N channels in one.
"""

import torch
from torch import Tensor, nn

AT_ONCE = 2**18  # numbers that a processor's cache holds while they are squared


def inferred_on_cpu(x: Tensor) -> bool:
    """Whether it is float32 on a CPU and nobody wants gradients: what this base does in ways of its own."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


class GroupNorm(nn.GroupNorm):
    """Without gradients as accurate channels-last as it is otherwise, and as quick.

    On a CPU torch adds a group's squares up one by one there (2.13): at 256 px outputs are up to 1e-3 off, and another
    number of threads gives others, which is enough to change codes. Here rows are added up first, less what is near
    their mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] of the same."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if not (last and inferred_on_cpu(x)):
            return super().forward(x)
        scale_BC, shift_BC = self.scale_and_shift(x)
        return torch.addcmul(shift_BC[..., None, None], x, scale_BC[..., None, None])

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What [B, C, h, w] is multiplied by and what is added then, each [B, C]."""
        batch, channels, height, width = x.shape
        near_BC = x[:, :, height // 2].mean(2)  # their mean, or near it
        sums_B2hC, ones_1w = x.new_empty(batch, 2, height, channels), x.new_ones(1, width)
        at_once = max(1, AT_ONCE // (width * channels))
        memory = x.new_empty(at_once, width, channels)
        for image_hwC, near_C, sums_2hC in zip(x.permute(0, 2, 3, 1), near_BC, sums_B2hC, strict=True):
            for rows, (sums, squares) in zip(image_hwC.split(at_once), sums_2hC.split(at_once, 1), strict=True):
                left = torch.sub(rows, near_C, out=memory[: len(rows)])
                torch.matmul(ones_1w, left, out=sums.unsqueeze(1))
                torch.matmul(ones_1w, left.square_(), out=squares.unsqueeze(1))
        left_BC, square_BC = sums_B2hC.double().mean(2).div(width).unbind(1)
        mean_BC = near_BC + left_BC
        square_BC += mean_BC.square() - left_BC.square()
        mean_BNK, square_BNK = (part.view(batch, self.num_groups, -1) for part in (mean_BC, square_BC))
        mean_BN1 = mean_BNK.mean(2, keepdim=True)
        deviation_BN1 = (square_BNK.mean(2, keepdim=True) - mean_BN1.square() + self.eps).sqrt()
        scale_BNK = self.weight.view(1, self.num_groups, -1) / deviation_BN1
        shift_BNK = self.bias.view(1, self.num_groups, -1) - mean_BN1 * scale_BNK
        return scale_BNK.to(x.dtype).flatten(1), shift_BNK.to(x.dtype).flatten(1)
