"""The paper in torch: ``from model import AlitTokenizer``. Needs torch, numpy and safetensors alone.

Names are loaded when first used, so that configs can be read without torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AlitTokenizer": "model.tokenizer",
    "AlitConfig": "model.config",
    "SIZES": "model.config",
    "TokenBatch": "model.tokens",
    "RolloutStep": "model.rollout",
    "Threshold": "model.selection",
    "Within": "model.selection",
    "Best": "model.selection",
    "MeanTokens": "model.selection",
    "FixedTokens": "model.selection",
    "PredictedThreshold": "model.predicted",
    "LengthHead": "model.predicted",
    "load_official": "model.official",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
