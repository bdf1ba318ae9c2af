"""The VQGAN base: convolutions to a grid, a codebook, convolutions back (MAGE layout).

Legend: B batch, C channels, E codebook dimension, K codebook entries, G grid tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.base import Autoencoded, BaseTokenizer, Grid, swish
from model.base.convolution import Conv1x1, Conv3x3, UpsampleConv
from model.base.norm import GroupNorm
from model.config import VQGANConfig
from model.halting import halt_by_probability, true_probability


class ResBlock(nn.Module):
    """Two bias-free 3x3 convolutions with group norms."""

    def __init__(self, channels_in: int, channels_out: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(config.num_groups, channels_in, eps=1e-6)
        self.conv_1 = Conv3x3(channels_in, channels_out, bias=False)
        self.norm_2 = GroupNorm(config.num_groups, channels_out, eps=1e-6)
        self.conv_2 = Conv3x3(channels_out, channels_out, bias=False)
        self.skip_input = config.shortcut == "input"
        self.shortcut: Conv1x1 | None = None
        if channels_in != channels_out:
            self.shortcut = Conv1x1(channels_in if self.skip_input else channels_out, channels_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h, w]."""
        h = self.conv_1.after(self.norm_1, x)
        h = self.conv_2.after(self.norm_2, h)
        if self.shortcut is None:
            return x + h
        return self.shortcut(x if self.skip_input else h) + h


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> grid [B, E, h, w]; halves the side by average pooling after every level but the last."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = Conv3x3(3, config.channels, bias=False)
        self.levels = nn.ModuleList()
        previous = config.channels
        for width in widths:
            blocks = [ResBlock(previous if i == 0 else width, width, config) for i in range(config.num_res_blocks)]
            self.levels.append(nn.Sequential(*blocks))
            previous = width
        self.middle = nn.Sequential(ResBlock(previous, previous, config), ResBlock(previous, previous, config))
        self.norm_out = GroupNorm(config.num_groups, previous, eps=1e-6)
        self.conv_out = Conv1x1(previous, config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = level(x if i == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(swish(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Grid [B, E, h, w] -> image [B, 3, H, W]; doubles the side by nearest neighbour and a convolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        previous = widths[-1]
        self.conv_in = Conv3x3(config.embed_dim, previous)
        self.middle = nn.Sequential(ResBlock(previous, previous, config), ResBlock(previous, previous, config))
        self.levels = nn.ModuleList()  # coarsest first
        self.upsample = nn.ModuleList()
        for width in reversed(widths):
            blocks = [ResBlock(previous if i == 0 else width, width, config) for i in range(config.num_res_blocks)]
            self.levels.append(nn.Sequential(*blocks))
            if len(self.levels) < len(widths):
                self.upsample.append(UpsampleConv(width))
            previous = width
        self.norm_out = GroupNorm(config.num_groups, previous, eps=1e-6)
        self.conv_out = Conv3x3(previous, 3)

    def forward(self, code_BEhw: Tensor) -> Tensor:
        """Decode."""
        x = self.middle(self.conv_in(code_BEhw))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.upsample):
                x = self.upsample[i](x)
        return self.conv_out.after(self.norm_out, x)


class VQGAN(BaseTokenizer):
    """VQGAN whose grid tokens are indices into a codebook."""

    default_halting_threshold = 0.55

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.output_dim = config.codebook_size
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.codebook = nn.Embedding(config.codebook_size, config.embed_dim)
        nn.init.uniform_(self.codebook.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    @property
    def last_layer(self) -> Tensor:
        """The convolution that makes pixels."""
        return self.decoder.conv_out.weight

    def code_table(self) -> nn.Embedding | None:
        """The 2D codebook."""
        return self.codebook

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Grid:
        """The un-quantized features (ALIT reads those) and the indices of their nearest entries, int64 [B, G]."""
        if noise is not None:
            raise ValueError("posterior_noise: a VQGAN base has no posterior; leave it out")
        return self.grid(self.encoder(2 * images - 1 if self.config.symmetric else images))

    def grid(self, features_BEhw: Tensor) -> Grid:
        """With the indices of the nearest codebook rows."""
        return Grid(features_BEhw, self.nearest(features_BEhw.flatten(2).transpose(1, 2)))

    def autoencode(self, images: Tensor, generator: torch.Generator | None) -> Autoencoded:
        """Through the nearest codebook rows, straight-through; commitment weight 0.25."""
        grid = self.encode(images)
        latents_BGE = grid.features_BEhw.flatten(2).transpose(1, 2)
        codes_BEhw = self.codebook(grid.target).transpose(1, 2).reshape(grid.features_BEhw.shape)
        commitment = F.mse_loss(grid.features_BEhw, codes_BEhw.detach())
        codebook = F.mse_loss(codes_BEhw, grid.features_BEhw.detach())
        straight = grid.features_BEhw + (codes_BEhw - grid.features_BEhw).detach()
        return Autoencoded(self.decode(straight), codebook + 0.25 * commitment, grid.target, latents_BGE.detach())

    @torch.no_grad()
    def nearest(self, features_BGE: Tensor) -> Tensor:
        """Indices int64 [B, G] of the nearest codebook rows in squared L2, in float32."""
        with torch.autocast(features_BGE.device.type, enabled=False):
            flat, rows = features_BGE.float(), self.codebook.weight.float()
            return (rows.square().sum(-1) - 2 * flat @ rows.T).argmin(-1)

    def code(self, output_BGO: Tensor) -> Tensor:
        """The expected codebook row under softmax; no gradient to the codebook, as in the paper's code."""
        return output_BGO.softmax(-1) @ self.codebook.weight.detach().to(output_BGO.dtype)

    def decode(self, code_BEhw: Tensor) -> Tensor:
        """Codes to pixels."""
        pixels = self.decoder(code_BEhw)
        return (pixels + 1) / 2 if self.config.symmetric else pixels

    def target_code(self, target: Tensor) -> Tensor:
        """Codebook rows of the true indices, without gradient."""
        return self.codebook.weight.detach()[target]

    def distance(self, output_BGO: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy per token."""
        logits = output_BGO.float().transpose(1, 2)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)

    def halted(self, output_BGO: Tensor, target: Tensor, threshold: float, uniform_BG: Tensor | None) -> Tensor:
        """By the probability of the true index."""
        return halt_by_probability(true_probability(output_BGO, target), threshold, uniform_BG)
