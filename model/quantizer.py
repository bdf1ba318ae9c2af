"""From latents to codebook entries and back.

Legend: B batch, L latent tokens, D numbers in a latent, K codebook entries.
"""

from typing import Any, NamedTuple

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
        """Index of the nearest entry (on the unit sphere: the largest dot product); ties take the lowest index."""
        return (unit_BLD @ self.entries().T).argmax(dim=-1)


class Continuous(nn.Module):
    """The same call without a codebook: latents pass unchanged."""

    def forward(self, latents_BLD: Tensor) -> Quantized:
        """Latents as they are, no codes, zero loss."""
        return Quantized(latents_BLD, None, latents_BLD.new_zeros(()))


class CodebookHealth:
    """Which entries of a codebook training uses, and a new place for those that nobody does.

    An objective records every training step, without a host sync. No module and no buffers: the tensors belong to one
    rank, and DDP would copy rank 0's over the others'. To keep ranks equal a trainer sums ``counts`` over the ranks in
    place before it reads or revives, calls :meth:`revive` on rank 0 and broadcasts rank 0's ``codebook.weight``.
    """

    def __init__(self, codebook: nn.Embedding, *, unit_length: bool, keep: int = 4096) -> None:
        self.codebook = codebook
        self.unit_length = unit_length
        self.keep = keep
        self.counts = torch.zeros(codebook.num_embeddings, dtype=torch.int64)  # uses since the last reset
        self.recent = torch.zeros(0, codebook.embedding_dim)  # float32 latents, the newest first

    @torch.no_grad()
    def record(self, codes: Tensor, latents: Tensor) -> None:
        """Count ``codes`` (int64 [...]) and remember some of the ``latents`` [..., D] that they stand for."""
        codes = codes.flatten()
        self.counts = self.counts.to(codes.device)
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))
        rows = latents.detach().flatten(0, -2).float()
        stride = max(1, 4 * len(rows) // self.keep)  # at most about a quarter of what is kept changes in one call
        self.recent = torch.cat([rows[::stride], self.recent.to(rows.device)])[: self.keep]

    def usage(self) -> Tensor:
        """Share of the entries used since the last reset, scalar in [0, 1]."""
        return (self.counts > 0).float().mean()

    def perplexity(self) -> Tensor:
        """exp of the entropy of the counts: how many entries, evenly used, would be as varied; scalar, 1 to K."""
        share = self.counts / self.counts.sum().clamp(min=1)
        return torch.special.entr(share).sum().exp()

    def reset(self) -> None:
        """Start counting anew."""
        self.counts.zero_()

    @torch.no_grad()
    def revive(self, generator: torch.Generator) -> int:
        """Move entries unused since the last reset onto recent latents, each its own; reset; returns how many moved.

        With more dead entries than latents kept, the rest wait for the next call. Syncs with the host.
        """
        dead = torch.nonzero(self.counts == 0).flatten()
        order = torch.randperm(len(self.recent), generator=generator, device=generator.device)
        chosen = self.recent[order.to(self.recent.device)[: len(dead)]]
        dead = dead[: len(chosen)]
        rows = F.normalize(chosen, dim=-1) if self.unit_length else chosen
        self.codebook.weight[dead] = rows.to(self.codebook.weight)
        self.reset()
        return len(dead)

    def state_dict(self) -> dict[str, Any]:
        """For a training checkpoint."""
        return {"counts": self.counts, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.counts, self.recent = state["counts"].clone(), state["recent"].clone()
