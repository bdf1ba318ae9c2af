"""One YAML file a run: typed, and checked before any work starts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationError, ValidationInfo, model_validator

from components.analyze.settings import AnalyzeConfig, SweepConfig
from components.config import (
    DataConfig,
    DriftConfig,
    InferenceResources,
    IngestConfig,
    IngestResources,
    MatrixConfig,
    MlflowSettings,
    OptimizerConfig,
    PackConfig,
    PrecisionConfig,
    PromoteConfig,
    PublishConfig,
    QualityConfig,
    RaySettings,
    ReportConfig,
    S3Settings,
    Settings,
    TablesConfig,
    TrainConfig,
    TrainResources,
)
from components.rules import columns_of
from components.task_config import TaskConfig
from model.config import SIZES, AlitConfig, BaseObjectiveConfig, DistillConfig
from model.recipes import FinetuneConfig
from model.starter import STARTER_NAME
from pipelines.paths import with_paths

READY = Path(__file__).parent / "configs"
MODEL = re.compile(r"models:/(?P<name>[A-Za-z0-9_.-]+)(@[A-Za-z0-9_.-]+|/[1-9][0-9]*)")


class ConfigError(ValueError):
    """A config or argument is wrong; the message names field, value and what is allowed."""


@contextmanager
def user_errors() -> Iterator[None]:
    """What a component says is wrong with its input is the user's to mend."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


class IngestSection(IngestConfig, IngestResources):
    """Limits and resources of ingest."""


class InferenceSection(InferenceResources, PrecisionConfig):
    """How images are tokenized and their tokens decoded for scores."""

    def resources(self) -> InferenceResources:
        """The part that must not change results."""
        return InferenceResources(**{name: getattr(self, name) for name in InferenceResources.model_fields})

    def config(self) -> PrecisionConfig:
        """The part that does."""
        return PrecisionConfig(precision=self.precision)


class TrainSection(TrainConfig):
    """A training stage as the run config has it."""

    further_steps: NonNegativeInt = 0  # instead of steps, when weights are given (training.from)

    def config(self, start: str | None) -> TrainConfig:
        """What the stage does from ``start``."""
        values = {name: getattr(self, name) for name in TrainConfig.model_fields}
        return TrainConfig(**{**values, "steps": self.further_steps if start else self.steps})


class FinetuneSection(TrainSection):
    """The finetuning stage: two players, each with its own optimizer."""

    discriminator: OptimizerConfig | None = None  # None: as the model's; the authors' has a weight decay of 0.01


class TrainingSection(TrainResources):
    """How the tokenizer is trained."""

    start: str = Field("scratch", alias="from")  # scratch, starter (comes with the software), or a Tokenizer's folder
    base: TrainSection
    base_objective: BaseObjectiveConfig = BaseObjectiveConfig()
    distill: TrainSection
    distill_objective: DistillConfig = DistillConfig()
    store_grids: bool = False  # the base's of every image, once, for a distill stage that doesn't augment its images
    finetune: FinetuneSection | None = None  # None: the distilled tokenizer is the result
    finetune_objective: FinetuneConfig = FinetuneConfig()

    @property
    def start_folder(self) -> str | None:
        """The folder of the tokenizer to go on from, or "starter", which each node has; None from scratch."""
        return None if self.start == "scratch" else self.start

    def resources(self) -> TrainResources:
        """The part that must not change results."""
        values = {name: getattr(self, name) for name in TrainResources.model_fields}
        return TrainResources(**{**values, "start": self.start_folder})

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "TrainingSection":
        sections = {"base": self.base, "distill": self.distill, "finetune": self.finetune}
        for name, section in ((name, section) for name, section in sections.items() if section is not None):
            if section.batch_size < self.worker_range.max:
                raise ValueError(
                    f"{name}.batch_size = {section.batch_size}: at least one image a worker, and there are up to "
                    f"{self.worker_range.max} workers"
                )
            if self.start == "scratch" and not section.steps:
                raise ValueError(f"{name}.steps = 0: at least 1 when training.from is scratch")
        self._check_strategy()
        if self.store_grids and (self.distill.crop_scale is not None or self.distill.recolour):
            augmented = f"crop_scale = {self.distill.crop_scale} and recolour = {self.distill.recolour}"
            raise ValueError(
                f"store_grids = true: a grid is of the whole image as it is, so distill needs crop_scale = null and "
                f"recolour = 0, not {augmented}"
            )
        folder = self.start_folder
        here = (info.context or {}).get("folders_exist", True)
        known = folder is None or folder == STARTER_NAME or "://" in folder
        if folder and not known and here and not (Path(folder) / "config.json").is_file():
            raise ValueError(f"from = {self.start!r}: scratch, starter, or the folder of a Tokenizer artifact")
        return self

    def _check_strategy(self) -> None:
        if self.strategy == "ddp":
            return
        refused = {
            "base_objective.revive_every": self.base_objective.revive_every,
            "distill_objective.revive_every": self.distill_objective.revive_every,
            "distill_objective.decoder_first_steps": self.distill_objective.decoder_first_steps,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name} = {value}: 0 is needed with strategy = 'fsdp', whose weights are in pieces")
        if self.finetune is not None:
            raise ValueError("finetune = {…}: none with strategy = 'fsdp'; its two players need whole weights")


class PublishSection(PublishConfig, PromoteConfig):
    """What is registered, and what becomes the champion."""


class PipelineConfig(Settings):
    """What every pipeline needs to know."""

    workspace: str
    data: DataConfig
    ingest: IngestSection = IngestSection()
    inference: InferenceSection = InferenceSection()
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    pack: PackConfig = PackConfig()
    quality: QualityConfig | None = None  # none: no such stage; {} takes the defaults
    matrix: MatrixConfig | None = MatrixConfig()
    report: ReportConfig = ReportConfig()
    ray: RaySettings = RaySettings()
    mlflow: MlflowSettings = MlflowSettings()
    s3: S3Settings = S3Settings()
    retries: NonNegativeInt = 2  # of a stage that failed from infrastructure
    wait_s: NonNegativeFloat = 0.0  # for another run of the workspace to end

    @model_validator(mode="after")
    def _task_names_differ(self) -> "PipelineConfig":
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: the names {names} must differ")
        distances = {task.perceptual for task in self.tasks if "perceptual" in task.pixel_metrics}
        if len(distances) > 1:
            raise ValueError(f"tasks: perceptual is one column for all tasks, not {sorted(map(str, distances))}")
        return self

    def task(self, name: str) -> TaskConfig:
        """The task of that name; raises ConfigError."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ConfigError(f"--task {name!r}: allowed are {[task.name for task in self.tasks]}")


class RunConfig(PipelineConfig):
    """Everything a run of the train pipeline needs to know."""

    tokenizer: AlitConfig
    training: TrainingSection
    analyze: AnalyzeConfig | None = None  # none: no such stage; {} takes the defaults
    sweep: SweepConfig | None = None  # what `alit sweep` runs and compares
    publish: PublishSection = PublishSection()

    @model_validator(mode="after")
    def _probes_have_an_image_a_worker(self) -> "RunConfig":
        workers = self.training.worker_range.max
        for number, task in enumerate(self.tasks):
            batch = task.judge_options.train.batch_size
            if task.judge == "probe" and batch < workers:
                raise ValueError(
                    f"tasks.{number}.judge_options.train.batch_size = {batch}: at least one image a worker, and "
                    f"there are up to {workers} workers"
                )
        return self

    @model_validator(mode="after")
    def _gate_can_be_measured(self) -> "RunConfig":
        gate = self.publish.gate
        if gate is None:
            return self
        columns = list(dict.fromkeys(name for task in self.tasks for name in columns_of(task)))
        if gate.metric not in columns:
            raise ValueError(f"publish.gate.metric = {gate.metric!r}: allowed are {columns}")
        if gate.budget not in self.tokenizer.budgets:
            raise ValueError(f"publish.gate.budget = {gate.budget}: allowed are {list(self.tokenizer.budgets)}")
        return self


class RerunConfig(PipelineConfig):
    """Everything a rerun with a registered model needs to know; the model brings image size and budgets."""

    model: str  # models:/NAME@ALIAS or models:/NAME/VERSION
    drift: DriftConfig | None = DriftConfig()
    publish: TablesConfig = TablesConfig()

    @model_validator(mode="after")
    def _model_is_registered(self) -> "RerunConfig":
        if not MODEL.fullmatch(self.model):
            raise ValueError(f"model = {self.model!r}: models:/NAME@ALIAS or models:/NAME/VERSION is needed")
        return self

    @model_validator(mode="after")
    def _scores_decide(self) -> "RerunConfig":
        for number, task in enumerate(self.tasks):
            rules = {"rule": task.rule, **{f"rules.{at}": rule for at, rule in enumerate(task.rules)}}
            for place, rule in rules.items():
                if rule.kind == "predicted":
                    raise ValueError(
                        f"tasks.{number}.{place}.kind = 'predicted': a rerun has the true scores; take 'threshold'"
                    )
        return self

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        found = MODEL.fullmatch(self.model)
        assert found is not None
        return found["name"]


AnyConfig: TypeAlias = RunConfig | RerunConfig


def to_yaml(config: AnyConfig) -> str:
    """``config`` in full, as :func:`load_config` takes it."""
    raw = config.model_dump(mode="json", by_alias=True)
    raw.get("tokenizer", {}).pop("image_size", None)  # it is data.image_size
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def load_config(path: str, overrides: Sequence[str] = (), *, folders_exist: bool = True) -> AnyConfig:
    """The config in ``path`` (a file, or the name of a ready one) with ``key.path=value`` overrides.

    With ``model`` in it, it is one of a rerun, else of a training.
    ``folders_exist``: whether the folders it names must be there; not so for a run that another machine will do.
    Raises ConfigError.
    """
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    try:
        checked = with_paths(_rerun(raw) if "model" in raw else _with_sizes(raw))
        kind: type[AnyConfig] = RerunConfig if "model" in raw else RunConfig
        return kind.model_validate(checked, context={"folders_exist": folders_exist})
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "\n".join(_lines(error))) from error


def config_file(path: str) -> Path:
    """The file that ``path`` (a file, or the name of a ready config) means; raises ConfigError when there is none."""
    for file in (Path(path), READY / f"{path}.yaml"):
        if file.is_file():
            return file
    ready = sorted(found.stem for found in READY.glob("*.yaml"))
    raise ConfigError(f"config {path!r}: no such file; ready ones are {ready}")


def _read(path: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(config_file(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of sections is needed, this is {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    """Set one dotted path, e.g. ``training.workers=4`` or ``tasks.0.rule.max=0.05``."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text!r}: KEY=VALUE is needed, e.g. training.workers=4")
    *parents, last = path.split(".")
    place: Any = raw
    for name in parents:
        place = _child(place, name, text)
    if isinstance(place, list):
        _child(place, last, text)
    try:
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML") from error


def _child(place: Any, name: str, text: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(name, {})
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    raise ConfigError(f"--set {text!r}: there is nothing at {name!r} to set")


def _rerun(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rerun's config as it is; raises ConfigError for what the registered model decides."""
    for section in ("tokenizer", "training"):
        if section in raw:
            raise ConfigError(f"{section}: a config with a model is a rerun's, which trains nothing; leave out one")
    data = raw.get("data")
    if isinstance(data, dict) and "image_size" in data:
        raise ConfigError(f"data.image_size = {data['image_size']!r}: leave it out, the registered model brings it")
    return raw


def _with_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with ``tokenizer.size`` written out and the tokenizer's image size taken from ``data``."""
    given = raw.get("tokenizer", {})
    if not isinstance(given, dict):
        raise ConfigError(f"tokenizer = {given!r}: a mapping is needed, e.g. {{size: demo}}")
    size = given.get("size", "alit_small")
    if size not in SIZES:
        raise ConfigError(f"tokenizer.size = {size!r}: allowed are {sorted(SIZES)}")
    if "image_size" in given:
        raise ConfigError(f"tokenizer.image_size = {given['image_size']!r}: set data.image_size, the two are one")
    merged = _merged(asdict(SIZES[size]), {name: value for name, value in given.items() if name != "size"})
    data = raw.get("data")
    side = data.get("image_size", DataConfig.model_fields["image_size"].default) if isinstance(data, dict) else None
    if isinstance(side, int):
        merged["image_size"] = (side, side)
    return {**raw, "tokenizer": merged}


def _merged(default: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``default`` with ``given`` laid over it; a base of another kind replaces the default one."""
    result = dict(default)
    for name, value in given.items():
        old = result.get(name)
        same_kind = isinstance(value, dict) and isinstance(old, dict) and value.get("kind") in (None, old.get("kind"))
        result[name] = _merged(old, value) if same_kind and isinstance(old, dict) else value
    return result


def _is_branch(part: str) -> bool:
    """Whether pydantic put it into a place to say which of several types it tried."""
    return part.endswith("Config") or part in {"count", "range"}


def _lines(error: ValidationError) -> list[str]:
    """One line a mistake: field, value, what is allowed."""
    items = error.errors(include_url=False)
    # A base is one of two kinds; pydantic tries both and also reports what is wrong with the one that isn't meant.
    other = {item["loc"][:-1] for item in items if item["type"] == "literal_error" and item["loc"][-1] == "kind"}
    inner = [item for item in items if item["type"] != "too_short"]
    lines = []
    for item in inner or items:
        if item["loc"][:-1] in other and len(other) == 1:
            continue
        path = ".".join(str(part) for part in item["loc"] if not _is_branch(str(part)))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{path} = {item['input']!r}: there is no such key")
        elif item["type"] == "value_error" and path == "tokenizer" and message.startswith("image_size"):
            lines.append(f"data.{message}")
        elif item["type"] == "value_error":
            lines.append(f"{path}.{message}" if path and "=" in message.split(":")[0] else f"{path}: {message}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{path}: missing, a value is needed")
        else:
            lines.append(f"{path} = {item['input']!r}: {message[0].lower()}{message[1:]}")
    return lines
