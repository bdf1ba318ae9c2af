"""A small trained tokenizer that comes with the software: ``AlitTokenizer.load(STARTER)``."""

from pathlib import Path

STARTER = Path(__file__).parent
