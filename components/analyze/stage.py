"""analyze: the stage. Sections are independent, so each is a Ray task of its own."""

from collections.abc import Callable, Mapping

from components.analyze.complexity import complexity
from components.analyze.familiarity import familiarity
from components.analyze.inputs import Inputs
from components.analyze.regions import regions
from components.analyze.representation import representation
from components.analyze.sections import Section, write_sections
from components.analyze.settings import AnalyzeStageConfig, Topic
from components.analyze.single_pass import single_pass
from components.analyze.specialization import specialization
from components.artifacts import (
    Artifact,
    CodeBook,
    Figures,
    ImageSet,
    Job,
    LengthModel,
    ScoreTable,
    TokenCounts,
    Tokenizer,
)
from components.config import InferenceResources

SECTIONS: Mapping[Topic, Callable[[Inputs], Section]] = {
    "complexity": complexity,
    "familiarity": familiarity,
    "specialization": specialization,
    "representation": representation,
    "single_pass": single_pass,
    "regions": regions,
}


def analyze(
    job: Job,
    *,
    config: AnalyzeStageConfig,
    resources: InferenceResources,
    images: ImageSet,
    tokenizer: Tokenizer,
    codes: CodeBook,
    scores: ScoreTable,
    **by_task: Artifact,
) -> Figures:
    """Write ``sections.json``, its pictures and ``table``; ``by_task``: counts_<task> and length_<task>.

    A section whose data isn't there says so in its finding.
    """
    import ray

    inputs = Inputs(
        settings=config.settings,
        criteria=config.criteria,
        images=images,
        tokenizer=tokenizer,
        codes=codes,
        scores=scores,
        counts={n.removeprefix("counts_"): one for n, one in by_task.items() if isinstance(one, TokenCounts)},
        lengths={n.removeprefix("length_"): one for n, one in by_task.items() if isinstance(one, LengthModel)},
        batch_size=resources.batch_size,
    )
    task = ray.remote(num_cpus=resources.cpus_per_actor, num_gpus=resources.gpus_per_actor, max_retries=2)(made)
    # One after the other, as the clock of one must not run beside another's work.
    sections = []
    for number, topic in enumerate(config.settings.sections, start=1):
        sections.append(ray.get(task.remote(topic, inputs)))
        job.progress(f"{topic}  {number}/{len(config.settings.sections)} sections")
    return write_sections(job.output, sections)


def made(topic: Topic, inputs: Inputs) -> Section:
    """One section."""
    return SECTIONS[topic](inputs)
