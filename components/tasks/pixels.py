"""Metrics of pixels: one number an image, [B], from two batches float32 [B, 3, H, W] in [0, 1]."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from model.recipes import PerceptualConfig

if TYPE_CHECKING:
    from torch import Tensor

    PixelMetric = Callable[[Tensor, Tensor], Tensor]

WINDOW_PX = 11  # a Gaussian of sigma 1.5, as in the papers
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales, finest first


def ssim(originals: "Tensor", restored: "Tensor") -> "Tensor":
    """Structural similarity (Wang et al. 2004) by torchmetrics, peak 1, mean over colours; 1 for equal images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(restored, originals, data_range=1.0, reduction="none").reshape(-1)


def ms_ssim(originals: "Tensor", restored: "Tensor") -> "Tensor":
    """Multi-scale structural similarity (Wang et al. 2003) by torchmetrics, peak 1; 1 for equal images.

    Five scales want 176 px; smaller images have fewer, see :func:`num_scales`, and the weights of those sum to 1. So
    its values compare within one image size. Negative similarities count as 0.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scales = num_scales(min(originals.shape[2:]))
    betas = tuple(beta / sum(BETAS[:scales]) for beta in BETAS[:scales])
    similarity = multiscale_structural_similarity_index_measure(
        restored, originals, data_range=1.0, betas=betas, normalize="relu", reduction="none"
    )
    return similarity.reshape(-1)


def num_scales(side_px: int) -> int:
    """Scales of :func:`ms_ssim` for images whose shorter side is ``side_px``: 5 from 176 px, 4 from 99, 3 from 44, 2.

    Each halves the image, and the coarsest must hold the window; torchmetrics asks for more at four scales.
    """
    fits = [n for n in range(2, 6) if side_px >= WINDOW_PX << (n - 1) and side_px // (n - 1) ** 2 >= WINDOW_PX]
    return max(fits, default=1)


def build_pixel_metrics(names: tuple[str, ...], perceptual: PerceptualConfig) -> "Mapping[str, PixelMetric]":
    """Functions by name; raises ValueError when "perceptual" is asked for and its weights aren't there."""
    from model.metrics import METRICS

    known: dict[str, PixelMetric] = {**METRICS, "ssim": ssim, "ms_ssim": ms_ssim}
    if "perceptual" in names:
        from model.perceptual import build_perceptual

        distance = build_perceptual(perceptual)
        if distance is None:
            raise ValueError("perceptual.kind = 'none': allowed are 'efficientnet', 'lpips' where it is measured")
        known["perceptual"] = distance
    return {name: known[name] for name in names}
