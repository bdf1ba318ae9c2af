"""The 2D -> 1D encoder and the 1D -> 2D decoder of ALIT (paper section 3).

Legend: B batch, E base channels, h w grid, G grid tokens, S image tokens (class + grid), L latents, D numbers in a
latent, W width, T = S + L, O outputs per grid token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import ALL, Blocks, table
from model.config import AlitConfig


class LatentEncoder(nn.Module):
    """Distils grid tokens into latent tokens, one rollout a call."""

    def __init__(self, config: AlitConfig) -> None:
        super().__init__()
        width, patch = config.encoder_width, config.base.patch
        grid_tokens, most_added = config.grid[0] * config.grid[1], max(config.steps)
        self.patch_embed = nn.Conv2d(3, width - config.base.embed_dim, patch, stride=patch)
        self.class_token = table(1, width, width=width)
        self.positions = table(1 + grid_tokens, width, width=width)  # row 0 belongs to the class token
        self.mask_token = table(1, 1, width, width=width)
        self.latent_tokens = table(most_added, width, width=width)
        self.latent_positions = table(most_added, width, width=width)
        self.rollout_embedding = table(len(config.budgets), most_added, width, width=width)
        self.norm_in = nn.LayerNorm(width)
        self.norm_rollout = nn.LayerNorm(width)
        self.blocks = Blocks(width, config.encoder_layers, config.encoder_heads)
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.latent_dim) if config.latent_dim else nn.Identity()

    def image_tokens(self, images: Tensor, features_BEhw: Tensor) -> Tensor:
        """Class and grid tokens [B, S, W]: base features beside embedded pixels, each token of unit length."""
        joined = torch.cat([features_BEhw, self.patch_embed(images)], dim=1)
        grid_BGW = F.normalize(joined.flatten(2).transpose(1, 2), dim=-1)
        class_B1W = self.class_token.expand(len(images), 1, -1)
        return torch.cat([class_B1W, grid_BGW], dim=1) + self.positions

    def new_latents(self, rollout: int, count: int, batch: int) -> Tensor:
        """The ``count`` latents [B, count, W] that ``rollout`` adds."""
        latents_LW = self.latent_tokens + self.latent_positions + self.rollout_embedding[rollout]
        return latents_LW[:count].expand(batch, -1, -1)

    def masked(self, x_BTW: Tensor, halted_BG: Tensor) -> Tensor:
        """The sequence with halted grid tokens replaced by the mask token at their positions."""
        num_grid = halted_BG.shape[1]
        blank = self.mask_token + self.positions[1:]
        grid = torch.where(halted_BG.unsqueeze(-1), blank.to(x_BTW.dtype), x_BTW[:, 1 : 1 + num_grid])
        return torch.cat([x_BTW[:, :1], grid, x_BTW[:, 1 + num_grid :]], dim=1)

    def forward(self, x_BTW: Tensor, wanted: slice = ALL) -> Tensor:
        """One pass of the recurrent encoder over the whole sequence; the ``wanted`` tokens of it."""
        return self.blocks(x_BTW, wanted)

    def to_latents(self, hidden_BLW: Tensor) -> Tensor:
        """Hidden latents to what is quantized: [B, L, W] -> [B, L, D]."""
        return self.project(self.norm_out(hidden_BLW))


class GridDecoder(nn.Module):
    """Predicts every grid token from any number of latents; the same weights serve every rollout."""

    def __init__(self, config: AlitConfig, output_dim: int) -> None:
        super().__init__()
        width, grid_tokens = config.decoder_width, config.grid[0] * config.grid[1]
        # The query tables start at the encoder's scale, as in the paper's code.
        self.class_token = table(1, width, width=config.encoder_width)
        self.positions = table(1 + grid_tokens, width, width=config.encoder_width)  # row 0: the class token's
        self.mask_token = table(1, 1, width, width=config.encoder_width)
        self.latent_positions = table(config.budgets[-1], width, width=width)
        self.embed = nn.Linear(config.latent_dim, width) if config.latent_dim else nn.Identity()
        self.norm_in = nn.LayerNorm(width)
        self.blocks = Blocks(width, config.decoder_layers, config.decoder_heads)
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, output_dim))

    def forward(self, latents_BLD: Tensor) -> Tensor:
        """Latents to grid outputs: [B, L, D] -> [B, G, O]."""
        batch, length, _ = latents_BLD.shape
        num_grid = len(self.positions) - 1
        queries_SW = torch.cat([self.class_token, self.mask_token[0].expand(num_grid, -1)]) + self.positions
        latents_BLW = self.embed(latents_BLD) + self.latent_positions[:length]
        x = self.norm_in(torch.cat([queries_SW.expand(batch, -1, -1), latents_BLW], dim=1))
        return self.head(self.norm_out(self.blocks(x, slice(1, 1 + num_grid))))
