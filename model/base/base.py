"""What the adaptive tokenizer needs of a 2D base tokenizer.

Legend: B batch, E channels of the grid, h w rows and columns of the grid, G = h * w grid tokens (row-major),
O numbers that the adaptive decoder predicts per grid token.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Grid(NamedTuple):
    """An encoded image."""

    features_BEhw: Tensor  # float, what the adaptive encoder reads
    target: Tensor  # what its decoder has to predict: indices int64 [B, G] (VQGAN) or codes float [B, G, E] (VAE)


class Autoencoded(NamedTuple):
    """A training pass of the base alone."""

    images: Tensor  # [B, 3, H, W], not clamped
    regulariser: Tensor  # scalar: the codebook and commitment terms, or the weighted KL divergence
    codes: Tensor | None  # int64 [B, G], None for a VAE
    latents_BGE: Tensor  # what those codes stand for, or the posterior's sample


class BaseTokenizer(nn.Module, ABC):
    """A pair of image -> grid and grid -> image, and the distance its grid is compared by."""

    embed_dim: int
    output_dim: int
    default_halting_threshold: float

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer: the adversarial loss is balanced by the gradients there."""

    def code_table(self) -> nn.Embedding | None:
        """The codebook that ``target`` points into; None when targets are codes themselves."""
        return None

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Grid:
        """Images float [B, 3, H, W] in [0, 1] to a grid; ``noise`` [B, E, h, w] is a VAE's posterior sample."""

    @abstractmethod
    def grid(self, features_BEhw: Tensor) -> Grid:
        """The grid whose features are these, as :meth:`encode` finds it."""

    @abstractmethod
    def autoencode(self, images: Tensor, generator: torch.Generator | None) -> Autoencoded:
        """Through the bottleneck and back, with gradients; ``generator`` draws a VAE's posterior sample."""

    @abstractmethod
    def code(self, output_BGO: Tensor) -> Tensor:
        """What the adaptive decoder predicted, as grid codes [B, G, E]."""

    @abstractmethod
    def decode(self, code_BEhw: Tensor) -> Tensor:
        """Grid codes to images [B, 3, H, W]; nominally [0, 1], not clamped."""

    @abstractmethod
    def target_code(self, target: Tensor) -> Tensor:
        """The codes [B, G, E] that ``target`` stands for."""

    @abstractmethod
    def distance(self, output_BGO: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each grid token, float [B, G]: cross-entropy in nats (VQGAN) or mean squared error (VAE)."""

    @abstractmethod
    def halted(self, output_BGO: Tensor, target: Tensor, threshold: float, uniform_BG: Tensor | None) -> Tensor:
        """Which grid tokens are reconstructed well enough to stop, bool [B, G]; see ``model.halting``."""


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x)
