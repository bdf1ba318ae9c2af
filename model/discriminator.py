"""The patch discriminator of pix2pix: says of every patch whether it is a photograph's.

Legend: B batch, h w rows and columns of patches.
"""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to logits [B, 1, h, w], high for photographs.

    ``num_layers`` halvings, channels doubling from ``channels``; batch norm, statistics of photographs and
    reconstructions apart (paper section 4: 3 layers, 64 channels). Raises from torch when the image is too small:
    a side of at least ``2 ** (num_layers + 2)`` px is needed.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        previous = channels
        for number in range(1, num_layers + 1):
            width = channels * min(2**number, 8)
            stride = 2 if number < num_layers else 1
            layers += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
            previous = width
        layers.append(nn.Conv2d(previous, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Judge."""
        return self.layers(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
