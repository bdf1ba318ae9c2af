"""The KL autoencoder base in the layout of LDM and MAR.

Legend: B batch, C channels, E latent channels, G grid tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.base import Autoencoded, BaseTokenizer, Grid
from model.base.convolution import Conv1x1, Conv3x3, UpsampleConv
from model.base.norm import GroupNorm
from model.config import VAEConfig
from model.halting import halt_by_error


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norms and the usual residual."""

    def __init__(self, channels_in: int, channels_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(num_groups, channels_in, eps=1e-6)
        self.conv_1 = Conv3x3(channels_in, channels_out)
        self.norm_2 = GroupNorm(num_groups, channels_out, eps=1e-6)
        self.conv_2 = Conv3x3(channels_out, channels_out)
        self.shortcut = Conv1x1(channels_in, channels_out) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h, w]."""
        h = self.conv_1.after(self.norm_1, x)
        return self.shortcut(x) + self.conv_2.after(self.norm_2, h)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        self.q = Conv1x1(channels, channels)
        self.k = Conv1x1(channels, channels)
        self.v = Conv1x1(channels, channels)
        self.out = Conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


def _middle(channels: int, num_groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels, num_groups),
        AttentionBlock(channels, num_groups),
        ResBlock(channels, channels, num_groups),
    )


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> moments [B, 2E, h, w]; attention at the coarsest level."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = Conv3x3(3, config.channels)
        self.levels = nn.ModuleList()
        self.downsample = nn.ModuleList()
        previous = config.channels
        for number, width in enumerate(widths, start=1):
            level = nn.Sequential()
            for _ in range(config.num_res_blocks):
                level.append(ResBlock(previous, width, config.num_groups))
                if number == len(widths):
                    level.append(AttentionBlock(width, config.num_groups))
                previous = width
            self.levels.append(level)
            if number < len(widths):
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2))
        self.middle = _middle(previous, config.num_groups)
        self.norm_out = GroupNorm(config.num_groups, previous, eps=1e-6)
        self.conv_out = Conv3x3(previous, 2 * config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.downsample):
                x = self.downsample[i](F.pad(x, (0, 1, 0, 1)))
        return self.conv_out.after(self.norm_out, self.middle(x))


class Decoder(nn.Module):
    """Codes [B, E, h, w] -> image [B, 3, H, W]; one more block a level than the encoder."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        previous = widths[-1]
        self.conv_in = Conv3x3(config.embed_dim, previous)
        self.middle = _middle(previous, config.num_groups)
        self.levels = nn.ModuleList()  # coarsest first
        self.upsample = nn.ModuleList()
        for width in reversed(widths):
            level = nn.Sequential()
            for _ in range(config.num_res_blocks + 1):
                level.append(ResBlock(previous, width, config.num_groups))
                previous = width
            self.levels.append(level)
            if len(self.levels) < len(widths):
                self.upsample.append(UpsampleConv(width))
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


class VAE(BaseTokenizer):
    """KL autoencoder whose grid tokens are scaled posterior codes."""

    default_halting_threshold = 0.025

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.output_dim = config.embed_dim
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to_moments = Conv1x1(2 * config.embed_dim, 2 * config.embed_dim)
        self.from_code = Conv1x1(config.embed_dim, config.embed_dim)

    @property
    def last_layer(self) -> Tensor:
        """The convolution that makes pixels."""
        return self.decoder.conv_out.weight

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the code, each [B, E, h, w], before scaling."""
        moments = self.to_moments(self.encoder(2 * images - 1 if self.config.symmetric else images))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Grid:
        """The scaled mode of the posterior, or mean + std * ``noise``; the target is the same code as tokens."""
        mean, std = self.posterior(images)
        return self.grid(self.config.latent_scale * (mean if noise is None else mean + std * noise))

    def grid(self, features_BEhw: Tensor) -> Grid:
        """With the same code as tokens."""
        return Grid(features_BEhw, features_BEhw.flatten(2).transpose(1, 2))

    def autoencode(self, images: Tensor, generator: torch.Generator | None) -> Autoencoded:
        """Through a posterior sample (the mode without a generator); KL to the standard normal, weight 1e-6 (LDM)."""
        mean, std = self.posterior(images)
        noise = torch.zeros_like(mean)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=(1, 2, 3)).mean()
        code = self.config.latent_scale * (mean + std * noise)
        return Autoencoded(self.decode(code), 1e-6 * kl, None, code.detach().flatten(2).transpose(1, 2))

    def code(self, output_BGO: Tensor) -> Tensor:
        """The prediction is the code."""
        return output_BGO

    def decode(self, code_BEhw: Tensor) -> Tensor:
        """Codes to pixels."""
        code = code_BEhw / self.config.latent_scale if self.config.unscale else code_BEhw
        pixels = self.decoder(self.from_code(code))
        return (pixels + 1) / 2 if self.config.symmetric else pixels

    def target_code(self, target: Tensor) -> Tensor:
        """The target is the code."""
        return target

    def distance(self, output_BGO: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error per token; ``label_smoothing`` means nothing for codes and must be 0."""
        if label_smoothing:
            raise ValueError(f"label_smoothing = {label_smoothing}: a VAE base has no labels; allowed is 0")
        return (output_BGO.float() - target.float()).square().mean(-1)

    def halted(self, output_BGO: Tensor, target: Tensor, threshold: float, uniform_BG: Tensor | None) -> Tensor:
        """By the error of the code; the rule is deterministic, ``uniform_BG`` is not used."""
        return halt_by_error(output_BGO, target, threshold)
