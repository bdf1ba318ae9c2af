"""What a person reads at the terminal when a run has ended, and when they ask how things stand."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from components.artifacts import WorkspaceError, read_manifest
from components.store import folder_bytes, join
from pipelines.dag import Pipeline, newest_manifest
from pipelines.recorder import RunRecord, StageRecord
from pipelines.remedies import next_step


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table with aligned columns."""
    cells = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for number, row in enumerate(cells):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        if number == 0:
            yield "  ".join("-" * width for width in widths)


def number(value: float | int | str) -> str:
    """A figure, short enough for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"


def figures_line(figures: Mapping[str, float | int | str], names: Sequence[str]) -> str:
    """The figures called ``names``, those that are there."""
    return "  ".join(f"{name} {number(figures[name])}" for name in names if name in figures)


def lines_of(record: RunRecord) -> Iterator[str]:
    """The end of a run: a table of its stages, what went wrong, where to look."""
    yield ""
    yield from table(("stage", "state", "time", "figures"), [_row(stage) for stage in record.stages])
    for stage in record.stages:
        if stage.state == "failed":
            yield f"\n{stage.name} failed: {stage.error}"
            yield f"  next: {next_step(stage.error)}"
            yield f"  log:  {_from_here(stage.log)}"
    if news := record.news:
        yield f"\nimages  {news.pop('images', 0)}, of which in this run: {figures_line(news, list(news))}"
    for stage in record.stages:
        if "drift" in stage.figures and stage.figures["drift"] != "none":
            yield f"drift:  {stage.figures['drift']}"
    yield f"\n{record.pipeline} {record.state} in {clock(record.seconds)}"
    yield f"artifacts   {_from_here(record.workspace)}"
    for stage in record.stages:
        if stage.name == "report" and stage.state in ("done", "reused"):
            yield f"report      {_from_here(join(stage.uri, 'report.html'))}"
    yield f"MLflow run  {record.mlflow_run_id} in {_from_here(record.mlflow_uri)}"
    if record.mlflow_uri.startswith("sqlite"):
        yield f"look        mlflow ui --backend-store-uri {shlex.quote(_from_here(record.mlflow_uri))}"


def lines_of_refusal(error: WorkspaceError) -> Iterator[str]:
    """Why a run didn't begin, or broke off: cause, next step, and the file with the trace where there is one."""
    yield f"error: {error}"
    if error.trace:
        yield f"  next: {next_step(f'{type(error).__name__}: {error}')}"
        yield f"  log:  {_from_here(error.trace)}"


def _from_here(place: str) -> str:
    """A path or URI with the current folder left out of it, as a person would type it there."""
    return place.replace(f"{Path.cwd()}/", "", 1)


def _row(stage: StageRecord) -> tuple[str, str, str, str]:
    told = stage.error if stage.state in ("failed", "blocked") else figures_line(stage.figures, stage.headline)
    ran = stage.state in ("done", "failed")
    return stage.name, stage.state, clock(stage.seconds) if ran else "", told[:100]


def status_rows(pipeline: Pipeline, workspace: str) -> Iterator[tuple[str, ...]]:
    """One row a stage: whether its artifact stands, when it was made, its size, its figures, the run that made it."""
    keys = pipeline.keys()
    for stage in pipeline.order():
        uri = join(workspace, stage.name, keys[stage.name])
        manifest = read_manifest(uri)
        if manifest is None:
            older = newest_manifest(workspace, stage.name)
            yield stage.name, keys[stage.name], "missing" if older is None else "outdated", "", "", "", ""
            continue
        size = f"{folder_bytes(uri) / 1e6:.1f} MB"
        run = (manifest.mlflow_run_id or "")[:8]
        figures = figures_line(manifest.counts, stage.headline)
        yield stage.name, manifest.key, "stands", manifest.created, size, figures, run
