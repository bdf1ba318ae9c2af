"""quality: what a set of reconstructions is worth as a whole, at every budget and at every task's own counts."""

from components.quality.stage import quality

__all__ = ["quality"]
