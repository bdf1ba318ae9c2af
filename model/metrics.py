"""Distances between images, one number an image. Images are float32 [B, 3, H, W] in [0, 1]."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error over pixels and channels, [B]."""
    return (images - reconstructions).abs().flatten(1).mean(1)


def mse(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error over pixels and channels, [B]."""
    return (images - reconstructions).square().flatten(1).mean(1)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, [B]; infinite for identical images."""
    return -10 * torch.log10(mse(images, reconstructions))


METRICS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"l1": l1, "mse": mse, "psnr": psnr})
