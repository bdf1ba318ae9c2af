"""Where the HTML report of a workspace is."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from components.artifacts import read_manifest
from components.store import join, read_bytes
from pipelines.dag import Pipeline, newest_manifest
from pipelines.runner import absolute

STAGE, FILE = "report", "report.html"


@dataclass(frozen=True)
class Page:
    """A report; ``current``: whether it is of the pipeline as it is now."""

    uri: str
    current: bool


def find_page(pipeline: Pipeline, workspace: str) -> Page | None:
    """The report of ``pipeline``, else the newest in ``workspace``; None when there is none."""
    folder = join(absolute(workspace), STAGE)
    key = pipeline.keys()[STAGE]
    if read_manifest(join(folder, key)) is not None:
        return Page(join(folder, key, FILE), current=True)
    newest = newest_manifest(workspace, STAGE)
    return None if newest is None else Page(join(folder, newest.key, FILE), current=False)


def local_copy(uri: str) -> str:
    """The page as a local file, which it is already unless the workspace is in a bucket."""
    if "://" not in uri:
        return uri
    copy = Path(tempfile.mkdtemp(prefix="alit-report-"), FILE)
    copy.write_bytes(read_bytes(uri))
    return str(copy)
