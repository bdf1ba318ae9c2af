"""Perceptual distances behind one interface: LPIPS on VGG16 from a local file, or EfficientNet-Lite0 features.

Legend: B batch, C channels of a feature map, h w its rows and columns. Images are float [B, 3, H, W] in [0, 1].
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from model.efficientnet import EfficientNetLite0
from model.files import load_tensors
from model.recipes import PerceptualConfig
from model.weights import perceptual_weights


class PerceptualDistance(nn.Module, ABC):
    """A distance between images in the features of a frozen network; gradients flow to the images."""

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] of several depths."""

    @abstractmethod
    def distance(self, stage: int, difference_BChw: Tensor) -> Tensor:
        """Distance map [B, 1, h, w] from the squared difference of unit-length features at one depth."""

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distances float [B], 0 for equal images: at each depth a mean over positions, then their sum."""
        pairs = zip(self.features(images), self.features(reconstructions), strict=True)
        total = images.new_zeros(len(images))
        for stage, (one, other) in enumerate(pairs):
            difference = (_unit(one) - _unit(other)).square()
            total = total + self.distance(stage, difference).flatten(1).mean(1)
        return total

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: the authors' training switches dropout on in here."""
        return super().train(False)


def _unit(features_BChw: Tensor) -> Tensor:
    # The clamp keeps the gradient of the root finite where all channels are 0.
    features_BChw = features_BChw.float()
    return features_BChw / (features_BChw.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10)


VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LPIPS(PerceptualDistance):
    """LPIPS 0.1 on VGG16 (arXiv 1801.03924). Made for [-1, 1], and given that; the authors of ALIT feed it [0, 1]."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.stages = nn.ModuleList()
        previous = 3
        for number, widths in enumerate(VGG_STAGES):
            stage = nn.Sequential(nn.MaxPool2d(2)) if number else nn.Sequential()
            for width in widths:
                stage.extend([nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()])
                previous = width
            self.stages.append(stage)
        self.weights = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in VGG_STAGES)

    @classmethod
    def load(cls, path: str | Path) -> "LPIPS":
        """From a .pth or .safetensors file with the keys of ``lpips.LPIPS(net="vgg").state_dict()``.

        A finetuned ALIT checkpoint serves too: it holds them as gan_losses.0.perceptual_loss. Raises ValueError naming
        what is missing.
        """
        tensors = load_tensors(path, ("ema", "model"))
        found = {name.split("perceptual_loss.")[-1]: tensor for name, tensor in tensors.items()}
        distance = cls()
        names = distance._file_names()
        missing = sorted(set(names.values()) - set(found))
        if missing:
            raise ValueError(f"{path}: no LPIPS-VGG weights, {len(missing)} tensors are missing, e.g. {missing[:3]}")
        distance.load_state_dict({ours: found[theirs].float() for ours, theirs in names.items()})
        return distance.requires_grad_(False).eval()

    def _file_names(self) -> dict[str, str]:
        """Our names to those in the file, whose slices count VGG's layers on, pools and ReLUs included."""
        names = {"shift": "scaling_layer.shift", "scale": "scaling_layer.scale"}
        layer = 0
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, nn.Sequential)
            for index, part in enumerate(stage):
                for field in ("weight", "bias") if isinstance(part, nn.Conv2d) else ():
                    names[f"stages.{number}.{index}.{field}"] = f"net.slice{number + 1}.{layer}.{field}"
                layer += 1
            names[f"weights.{number}.weight"] = f"lin{number}.model.1.weight"
        return names

    def features(self, images: Tensor) -> list[Tensor]:
        """The last activation before each pool."""
        x = (2 * images - 1 - self.shift) / self.scale
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def distance(self, stage: int, difference_BChw: Tensor) -> Tensor:
        """Channels weighed as people judged."""
        return self.weights[stage](difference_BChw)


class EfficientNetDistance(PerceptualDistance):
    """Features of EfficientNet-Lite0 at five depths, channels unweighted. Not LPIPS: no person judged it."""

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """The output of the last block at each resolution."""
        return self.network.stages(images)

    def distance(self, stage: int, difference_BChw: Tensor) -> Tensor:
        """The plain sum over channels, a fifth for each depth."""
        return difference_BChw.sum(1, keepdim=True) / 5


def build_perceptual(config: PerceptualConfig) -> PerceptualDistance | None:
    """The distance that ``config`` names, its weights read; None for kind ``"none"``."""
    weights = perceptual_weights(config)
    if weights is None:
        return None
    if config.kind == "lpips":
        return LPIPS.load(weights)
    return EfficientNetDistance(EfficientNetLite0.load(weights))
