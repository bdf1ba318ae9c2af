"""report: the stage."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from components.artifacts import (
    Artifact,
    CodeBook,
    Figures,
    ImageSet,
    Job,
    Publication,
    ScoreTable,
    Tokenizer,
)
from components.config import ReportConfig, ReportResources
from components.model_card import choice_of
from components.report import content
from components.report.examples import KINDS, data_uri, examples_of, rejected_of
from components.report.plots import draw_bars, draw_curve, draw_histogram
from components.report.read import Run
from components.report.timing import gantt
from components.rules import serves_alone
from components.store import filled_folder
from components.tracking import Tracker, redact

PAGE = "report.html"


def report(
    job: Job,
    *,
    config: ReportConfig,
    resources: ReportResources,
    images: ImageSet,
    tokenizer: Tokenizer,
    codes: CodeBook,
    scores: ScoreTable,
    publication: Publication,
    **made: Artifact,
) -> Figures:
    """Write ``report.html``: one page without scripts or addresses to fetch; MLflow gets a copy.

    ``made``: all other artifacts of the run. What is missing among them, an analysis or the matrix, has no section.
    """
    run = Run(images, tokenizer, codes, scores, publication, made)
    page = _render(_content(run, config, resources, job)).encode()
    tracker = Tracker(**job.tracking)
    with filled_folder(job.output) as folder:
        file = Path(folder, PAGE)
        file.write_bytes(page)
        for target in (tracker, tracker.parent):
            target.artifact(file)
    return {"images": images.manifest.counts["images"], "sections": page.count(b"<section"), "bytes": len(page)}


def _content(run: Run, config: ReportConfig, resources: ReportResources, job: Job) -> dict[str, Any]:
    settings = redact(resources.run_config)
    examples = examples_of(run, config.examples, job.progress)
    return {
        "model": run.model,
        "model_uri": run.registered.uri,
        "choice": choice_of([task.name for task in run.tasks if serves_alone(task.config.rule)], run.budgets),
        "run": run,
        "headline": content.headline(run),
        "kinds": list(KINDS),
        "examples": examples,
        "example_metric": content.metric_label(run.shown.column),
        "rejected": rejected_of(run.images),
        "curves": [
            (
                curve,
                content.metric_label(curve.name),
                draw_curve(curve, run.tasks, metric=content.metric_label(curve.name)),
            )
            for curve in run.curves
            if curve.rows
        ],
        "histograms": [(task, draw_histogram(task.histogram, mean=task.mine["mean_tokens"])) for task in run.tasks],
        "rules": content.rules_table(run),
        "matrix": content.matrix_of(run),
        "quality": content.quality_of(run),
        "sizes": content.sizes_table(run),
        "sizes_svg": draw_bars(content.sizes_of(run.shown), unit="bits a mean image") if run.shown.sizes else None,
        "sections": content.sections_of(run),
        "gantt": gantt(run.artifacts),
        "lineage": content.lineage_tables(run),
        "settings": settings,
        "settings_uri": data_uri(settings.encode(), "application/yaml"),
    }


def _render(values: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": content.short, "percent": content.percent, "three": content.three}
    style = Markup((here / "page.css").read_text())
    return environment.get_template("page.html").render(style=style, **values)
