"""The report stage of every pipeline."""

from collections.abc import Sequence

from components.config import ReportResources, ReportStageConfig
from pipelines.config import AnyConfig, to_yaml
from pipelines.dag import Stage
from pipelines.demands import TokenizerStage


def report_stage(
    config: AnyConfig, tokenizer: TokenizerStage, made: Sequence[Stage], *, model_name: str, version: int | None = None
) -> Stage:
    """The page; it reads every artifact of the run, if only to say when it was made."""
    named = {"images": "ingest", "tokenizer": tokenizer.name, "codes": "tokenize", "scores": "score"}
    others = [stage.name for stage in made if stage.name not in named.values()]
    return Stage(
        "report",
        run="components.report:report",
        produces="Report",
        version="2",
        config=ReportStageConfig(settings=config.report, model_name=model_name, version=version),
        resources=ReportResources(run_config=to_yaml(config)),
        needs={**named, **{name.replace(".", "_"): name for name in others}},
        headline=("sections", "bytes"),
    )
