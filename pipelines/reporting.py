"""The report stage of every pipeline."""

from collections.abc import Sequence

from components.config import ReportResources
from pipelines.config import AnyConfig, to_yaml
from pipelines.dag import Stage
from pipelines.demands import TokenizerStage


def report_stage(config: AnyConfig, tokenizer: TokenizerStage, made: Sequence[Stage]) -> Stage:
    """The page, after all stages ``made``: it reads every artifact of the run, if only to say when it was made."""
    named = {
        "images": "ingest",
        "tokenizer": tokenizer.name,
        "codes": "tokenize",
        "scores": "score",
        "publication": "publish",
    }
    others = [stage.name for stage in made if stage.name not in named.values()]
    return Stage(
        "report",
        run="components.report:report",
        produces="Report",
        version="3",
        config=config.report,
        resources=ReportResources(run_config=to_yaml(config)),
        needs={**named, **{name.replace(".", "_"): name for name in others}},
        headline=("sections", "bytes"),
    )
