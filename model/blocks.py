"""Transformer blocks and how weights start.

Legend: B batch, T tokens of a sequence, W width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL = slice(None)


class Attention(nn.Module):
    """Multi-head self-attention without mask or dropout: [B, T, W] -> [B, T, W]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def heads(self, x_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, T, W / H]."""
        batch, length, width = x_BTW.shape
        qkv = self.qkv(x_BTW).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x_BTW: Tensor, wanted: slice = ALL) -> Tensor:
        """Mix the tokens of each sequence; the ``wanted`` ones are returned."""
        q, k, v = self.heads(x_BTW)
        mixed = F.scaled_dot_product_attention(q[:, :, wanted], k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm residual block: attention, then a GELU MLP of ratio 4."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor, wanted: slice = ALL) -> Tensor:
        """[B, T, W] -> [B, T, W], or of the ``wanted`` tokens alone, for which the others are read but not updated."""
        x_BTW = x_BTW[:, wanted] + self.attention(self.norm_1(x_BTW), wanted)
        return x_BTW + self.contract(F.gelu(self.expand(self.norm_2(x_BTW))))


class Blocks(nn.Sequential):
    """Blocks in a row."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__(*(Block(width, num_heads) for _ in range(num_layers)))

    def forward(self, x_BTW: Tensor, wanted: slice = ALL) -> Tensor:
        """[B, T, W] -> [B, T, W], or the ``wanted`` tokens: the last block does no more than those need."""
        *blocks, last = self
        for block in blocks:
            x_BTW = block(x_BTW)
        return last(x_BTW, wanted)


def initialise(module: nn.Module) -> None:
    """The paper's start: linear and patch weights truncated normal (std 0.02), biases 0, norms 1 / 0, qkv xavier."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-2.0, b=2.0)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for part in module.modules():  # an Attention is visited before its own Linear, which would overwrite it
        if isinstance(part, Attention):
            nn.init.xavier_uniform_(part.qkv.weight)


def table(*shape: int, width: int) -> nn.Parameter:
    """A learned table of tokens or positions: normal with std ``width ** -0.5``."""
    return nn.Parameter(torch.randn(*shape) * width**-0.5)
