"""A small trained tokenizer that comes with the software: ``AlitTokenizer.load(STARTER)``."""

from pathlib import Path

STARTER = Path(__file__).parent
STARTER_NAME = "starter"  # for its folder, which is another one on another machine


def model_folder(name: str) -> str:
    """The folder that ``name`` means here: the starter's, or ``name`` itself."""
    return str(STARTER) if name == STARTER_NAME else name
