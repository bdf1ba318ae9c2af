"""Base tokenizers on disk."""

from dataclasses import asdict
from pathlib import Path

from model.base import BaseTokenizer, build_base
from model.config import BaseConfig, base_config
from model.files import load_folder, save_folder

FORMAT = "alit-base-tokenizer"
FORMAT_VERSION = 1


def save_base(base: BaseTokenizer, config: BaseConfig, folder: str | Path) -> None:
    """Write ``base`` into ``folder``."""
    save_folder(folder, base.state_dict(), kind=FORMAT, version=FORMAT_VERSION, config=asdict(config))


def load_base(folder: str | Path) -> BaseTokenizer:
    """The base saved in ``folder``, in eval mode; raises ValueError for another or a newer format."""
    config, tensors = load_folder(folder, kind=FORMAT, version=FORMAT_VERSION)
    base = build_base(base_config(config))
    base.load_state_dict(tensors)
    return base.eval()
