"""Distances between images, one number an image. Images are float32 [B, 3, H, W] in [0, 1]."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error over pixels and channels, [B]."""
    return _means((images - reconstructions).abs())


def mse(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error over pixels and channels, [B]."""
    return _means((images - reconstructions).square())


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, [B]; infinite for identical images."""
    return -10 * torch.log10(mse(images, reconstructions))


def _means(errors: Tensor) -> Tensor:
    """The mean of each image, summed in an order that its company doesn't change."""
    return torch.stack([error.mean() for error in errors]) if len(errors) else errors.new_zeros(0)


METRICS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"l1": l1, "mse": mse, "psnr": psnr})
