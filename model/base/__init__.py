"""2D base tokenizers behind one protocol; a third one is one more file and one line in :func:`build_base`."""

from model.base.base import BaseTokenizer, Grid
from model.config import BaseConfig


def build_base(config: BaseConfig) -> BaseTokenizer:
    """The base tokenizer that ``config`` describes, with fresh weights."""
    if config.kind == "vqgan":
        from model.base.vqgan import VQGAN

        return VQGAN(config)
    from model.base.vae import VAE

    return VAE(config)


__all__ = ["BaseTokenizer", "Grid", "build_base"]
