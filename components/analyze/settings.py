"""What an analysis looks at, and how much of it. Light: the command line reads it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from components.config import RuleConfig, Settings

Topic = Literal["complexity", "familiarity", "specialization", "representation", "single_pass", "regions"]
TOPICS: tuple[Topic, ...] = (
    "complexity",
    "familiarity",
    "specialization",
    "representation",
    "single_pass",
    "regions",
)


class StrangeSource(Settings):
    """Images of another kind than the tokenizer was trained on."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    source: str  # as data.source
    kind: Literal["near", "far"] | None = None  # from the training data, as its owner judges; none: not said


class AnalyzeConfig(Settings):
    """The sections, and a bound on the images of each; all are held out where any are, and sampled by id, a hash."""

    sections: tuple[Topic, ...] = TOPICS
    images: Annotated[int, Field(ge=4)] = 500  # of complexity, familiarity, representation, single_pass and regions
    strange_images: Annotated[int, Field(ge=4)] = 150  # of familiarity, of each set that isn't the held-out one
    attention_images: Annotated[int, Field(ge=2)] = 100  # of specialization
    pictures: Annotated[int, Field(ge=1, le=8)] = 4  # images whose attention is shown
    probe_images: PositiveInt = 2000  # labelled images of the train split that the linear probe is fitted to
    timed_images: PositiveInt = 64  # that single_pass encodes once to warm up and then against the clock
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = 90
    ood: tuple[StrangeSource, ...] = ()  # of familiarity
    ignore: tuple[int, ...] = ()  # class ids of masks that don't count
    resamples: PositiveInt = 1000  # of the bootstrap
    seed: int = 0

    @model_validator(mode="after")
    def _names_differ(self) -> "AnalyzeConfig":
        names = [one.name for one in self.ood]
        if len(set(names)) < len(names):
            raise ValueError(f"ood = {names}: the names must differ")
        return self


class Criterion(Settings):
    """A task's rules, the chosen one first, each with the column of the score table that it reads."""

    task: str
    rules: tuple[tuple[RuleConfig, str], ...]


class AnalyzeStageConfig(Settings):
    """What decides an analysis, besides its inputs."""

    settings: AnalyzeConfig
    criteria: tuple[Criterion, ...]


class Variant(Settings):
    """A run that differs from its config in some keys."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    about: str = ""  # what it is, for people
    set: tuple[str, ...] = ()  # KEY=VALUE, as --set takes them
    at: dict[str, float] = {}  # its place on axes of size, such as {steps: 300}, for a plot


class SweepConfig(Settings):
    """Variants to run and compare; the first is what the others are compared with."""

    variants: Annotated[tuple[Variant, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _names_differ(self) -> "SweepConfig":
        names = [one.name for one in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"variants = {names}: the names must differ")
        return self


class CompareStageConfig(Settings):
    """What decides a comparison, besides its inputs."""

    variants: tuple[Variant, ...]
    task: str
    column: str  # of the score table, that the task's rule reads
    resamples: PositiveInt
    seed: int
