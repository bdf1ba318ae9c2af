"""From latents to codebook entries and back.

Legend: B batch, L latent tokens, D numbers in a latent, K codebook entries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a quantizer makes of latents."""

    latents_BLD: Tensor  # what the decoder sees; gradients pass straight through to the input
    codes_BL: Tensor | None  # int64 in [0, K); None when continuous
    loss: Tensor  # scalar: commitment (weight 0.25) + codebook term; 0 when continuous


class VectorQuantizer(nn.Module):
    """Nearest entry of a codebook on the unit sphere (paper section 4; K = 4096, D = 12 there).

    Runs in float32 whatever the autocast: the nearest of thousands of entries is not a half-precision question.
    """

    def __init__(self, codebook_size: int, latent_dim: int, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.codebook = nn.Embedding(codebook_size, latent_dim)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)

    def entries(self) -> Tensor:
        """The codebook as used: rows of unit length, float32 [K, D]."""
        return F.normalize(self.codebook.weight.float(), dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit-length entries for int codes of any shape: [...] -> [..., D]."""
        return F.normalize(self.codebook(codes).float(), dim=-1)

    def forward(self, latents_BLD: Tensor) -> Quantized:
        """Quantize latents of any length."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            unit_BLD = F.normalize(latents_BLD.float(), dim=-1)
            codes_BL = self.nearest(unit_BLD.detach())
            entries_BLD = self.lookup(codes_BL)
            commitment = F.mse_loss(unit_BLD, entries_BLD.detach())
            codebook = F.mse_loss(entries_BLD, unit_BLD.detach())
            straight = unit_BLD + (entries_BLD - unit_BLD).detach()
        return Quantized(straight, codes_BL, self.commitment * commitment + codebook)

    @torch.no_grad()
    def nearest(self, unit_BLD: Tensor) -> Tensor:
        """Index of the nearest entry; on the unit sphere that is the largest dot product. Ties take the lowest index."""
        return (unit_BLD @ self.entries().T).argmax(dim=-1)

    @torch.no_grad()
    def revive(self, counts_K: Tensor, latents_ND: Tensor, generator: torch.Generator) -> int:
        """Move entries that ``counts_K`` says nobody used onto random latents of a batch; returns how many moved."""
        dead = torch.nonzero(counts_K == 0).flatten()
        chosen = torch.randint(len(latents_ND), (len(dead),), generator=generator)
        self.codebook.weight[dead] = F.normalize(latents_ND[chosen].float(), dim=-1)
        return len(dead)


class Continuous(nn.Module):
    """The same call without a codebook: latents pass unchanged."""

    def forward(self, latents_BLD: Tensor) -> Quantized:
        """Latents as they are, no codes, zero loss."""
        return Quantized(latents_BLD, None, latents_BLD.new_zeros(()))
