"""report: one page that says what a run found, for whoever has only a browser."""

from components.report.stage import report

__all__ = ["report"]
