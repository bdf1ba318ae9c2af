"""score: how well each budget serves each task, per image."""

from components.score.stage import score

__all__ = ["score"]
