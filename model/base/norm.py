"""The group norm of a base tokenizer.

Legend: B batch, C channels, h w rows and columns, N groups, K = C / N channels in one.
"""

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Without gradients as accurate channels-last as it is otherwise, and as quick.

    On a CPU torch adds a group's squares up one by one there (2.13): at 256 px outputs are up to 1e-3 off, and another
    number of threads gives others, which is enough to change codes. Here rows are added up first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] of the same."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if torch.is_grad_enabled() or not last or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        rows_BhwC = x.permute(0, 2, 3, 1)
        mean_BNK, square_BNK = (
            row_sums.double().mean(1).div(x.shape[3]).view(len(x), self.num_groups, -1)
            for row_sums in (rows_BhwC.sum(2), rows_BhwC.square().sum(2))
        )
        mean_BN1 = mean_BNK.mean(2, keepdim=True)
        deviation_BN1 = (square_BNK.mean(2, keepdim=True) - mean_BN1.square() + self.eps).sqrt()
        scale_BNK = self.weight.view(1, self.num_groups, -1) / deviation_BN1
        shift_BNK = self.bias.view(1, self.num_groups, -1) - mean_BN1 * scale_BNK
        scale, shift = (part.to(x.dtype).view(len(x), -1, 1, 1) for part in (scale_BNK, shift_BNK))
        return torch.addcmul(shift, x, scale)
