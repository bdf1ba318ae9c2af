"""2D base tokenizers behind one protocol. A third one is one more file that ends in :func:`register_base`."""

from collections.abc import Callable
from typing import Any

from model.base.base import Autoencoded, BaseTokenizer, Grid
from model.base.vae import VAE
from model.base.vqgan import VQGAN
from model.config import BASE_CONFIGS

_BUILDERS: dict[str, Callable[[Any], BaseTokenizer]] = {"vqgan": VQGAN, "vae": VAE}


def register_base(config: type, build: Callable[[Any], BaseTokenizer]) -> None:
    """Make a kind of base known: ``AlitConfig(base=config(…))`` then builds, saves and loads.

    ``config``: a frozen dataclass whose ``kind`` has a default (its name), with ``embed_dim`` and ``patch`` (px).
    Raises ValueError when another class has that kind.
    """
    kind = getattr(config, "kind", None)
    if not isinstance(kind, str) or BASE_CONFIGS.get(kind, config) is not config:
        raise ValueError(f"base kind {kind!r} of {config.__name__}: a name is needed that isn't in {sorted(_BUILDERS)}")
    BASE_CONFIGS[kind] = config
    _BUILDERS[kind] = build


def build_base(config: Any) -> BaseTokenizer:
    """The base tokenizer that ``config`` (a VQGANConfig, VAEConfig or a registered one) describes, fresh weights."""
    return _BUILDERS[config.kind](config)


__all__ = ["Autoencoded", "BaseTokenizer", "Grid", "build_base", "register_base"]
