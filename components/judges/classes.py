"""Which labels mean which class of a judge."""

from functools import lru_cache
from pathlib import Path

Classes = tuple[tuple[str, ...], ...]

IMAGENET = Path(__file__).with_name("imagenet.txt")  # the order of ImageNet-1k: WordNet ids, sorted; then their words


@lru_cache(maxsize=4)
def read_classes(path: str | Path) -> Classes:
    """Line i of a text file: the labels that mean class i, with commas between them. Raises ValueError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"judge_options.classes = {str(path)!r}: it can't be read: {error}") from error
    if not lines:
        raise ValueError(f"judge_options.classes = {str(path)!r}: it is empty; line i has the labels of class i")
    return tuple(tuple(label.strip() for label in line.split(",") if label.strip()) for line in lines)


def imagenet_classes() -> Classes:
    """WordNet id and words of each of ImageNet's 1000 classes."""
    return read_classes(IMAGENET)
