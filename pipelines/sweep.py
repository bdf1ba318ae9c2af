"""A sweep: variants of one run config as a single pipeline, whose last stage compares them.

A stage that is the same as without the variant's settings, such as ``ingest``, keeps its name, and so its artifact is
the one of an ordinary run; another is called after the first variant that has it (``distill.no_recurrence``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from components.analyze.settings import CompareStageConfig
from components.config import NoConfig
from components.rules import column
from components.store import join, read_json
from pipelines.config import ConfigError, RunConfig, load_config
from pipelines.dag import Pipeline, Stage
from pipelines.demands import trained
from pipelines.summary import table
from pipelines.train import build

LAST = "analyze"
COMPARE = "compare"
TOLD = ("variant", "at the most", "difference at the most", "chosen", "tokens", "difference", "hard", "seconds")
SHARED = ("workspace", "ray", "mlflow", "s3")  # what a variant can't have for itself


def build_sweep(path: str, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of the variants of the config in ``path``; raises ConfigError when it has none or one is wrong."""
    config = _load(path, overrides)
    if config.sweep is None or config.analyze is None:
        raise ConfigError(f"{path}: a sweep needs the sections sweep and analyze")
    pipelines = {}
    for variant in config.sweep.variants:
        changed = _load(path, [*overrides, *variant.set])
        for name in SHARED:
            if getattr(changed, name) != getattr(config, name):
                raise ConfigError(f"sweep.variants.{variant.name}.set: {name} is the whole sweep's")
        pipelines[variant.name] = (changed, build(changed).until(LAST))
    names = _names(build(config).keys(), {name: pipeline.keys() for name, (_, pipeline) in pipelines.items()})
    stages: dict[str, Stage] = {}
    for variant_name, (_, pipeline) in pipelines.items():
        for stage in _renamed(pipeline, names[variant_name]):
            stages.setdefault(stage.name, stage)
    compare = _compare(config, {name: one for name, (one, _) in pipelines.items()}, names)
    return Pipeline("sweep", (*stages.values(), compare))


def _load(path: str, overrides: Sequence[str]) -> RunConfig:
    config = load_config(path, overrides)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: a sweep trains its variants; a rerun's config, with a model, has none")
    return config


def _names(plain: Mapping[str, str], keys: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Variant -> stage -> its name in the sweep, from the stages' keys without and with each variant's settings."""
    first = {(stage, key): stage for stage, key in plain.items()}
    return {
        variant: {stage: first.setdefault((stage, key), f"{stage}.{variant}") for stage, key in found.items()}
        for variant, found in keys.items()
    }


def _renamed(pipeline: Pipeline, names: Mapping[str, str]) -> Iterator[Stage]:
    for stage in pipeline.order():
        needs = {argument: names[need] for argument, need in stage.needs.items()}
        yield replace(stage, name=names[stage.name], needs=needs)


def _compare(config: RunConfig, variants: Mapping[str, RunConfig], names: Mapping[str, Mapping[str, str]]) -> Stage:
    """The stage that reads every variant's scores, counts and analysis."""
    assert config.sweep is not None and config.analyze is not None
    task = config.tasks[0]
    needs: dict[str, str] = {}
    for variant, one in variants.items():
        of_variant = {
            "tokenizer": trained(one).name,
            "scores": "score",
            "counts": f"select.{task.name}",
            "analysis": LAST,
        }
        needs |= {f"{argument}_{variant}": names[variant][stage] for argument, stage in of_variant.items()}
    return Stage(
        COMPARE,
        run="components.analyze.comparison:compare",
        produces="Analysis",
        config=CompareStageConfig(
            variants=config.sweep.variants,
            task=task.name,
            column=column(task, task.rule.metric),
            resamples=config.analyze.resamples,
            seed=config.analyze.seed,
        ),
        resources=NoConfig(),
        needs=needs,
        headline=("variants", "images"),
    )


def comparison_lines(uri: str) -> Iterator[str]:
    """The comparison at ``uri`` for the terminal: the finding, and a table."""
    (section,) = read_json(join(uri, "sections.json"))["sections"]
    (found,) = section["tables"]
    places = [found["columns"].index(name) for name in TOLD]
    yield from table(TOLD, [[row[place] for place in places] for row in found["rows"]])
    yield ""
    yield section["finding"]
