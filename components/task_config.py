"""The typed settings of tasks, their judges and what is measured for them; as light as config.py."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from components.config import Fraction, OptimizerConfig, PrecisionConfig, RuleConfig, Settings, TrainConfig
from model.recipes import PerceptualConfig

Answer = Literal["classes", "depth", "segments", "features"]  # what a judge says of an image
Target = Literal["label", "depth", "mask"]  # columns of an ImageSet that say what is true of an image
PIXEL_METRICS = ("l1", "mse", "psnr", "ssim", "ms_ssim", "perceptual")


@dataclass(frozen=True)
class TaskKind:
    """A kind of task that comes with the software."""

    metrics: tuple[str, ...]
    default: tuple[str, ...]  # measured unless the config names others
    answer: Answer | None = None  # what it asks its judge for; None: it has no judge
    target: Target | None = None  # what it compares with, where an image has it


def _judged(answer: Answer, target: Target | None, *metrics: str) -> TaskKind:
    return TaskKind(metrics, metrics, answer, target)


TASK_KINDS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "reconstruction": TaskKind(PIXEL_METRICS, PIXEL_METRICS[:-1]),  # perceptual needs weights: only when named
        "classification": _judged("classes", "label", "correct", "agreement", "probability", "probability_label"),
        "depth": _judged("depth", "depth", "abs_rel", "rmse", "delta1", "abs_rel_judge", "rmse_judge", "delta1_judge"),
        "segmentation": _judged("segments", "mask", "miou", "miou_judge"),
        "features": _judged("features", None, "cosine"),
        "retrieval": _judged("features", None, "recall1", "recall5"),
    }
)
JUDGE_KINDS: Mapping[str, tuple[Answer, ...]] = MappingProxyType(  # by name or by what comes before the colon
    {
        "probe": ("classes", "depth", "segments"),
        "efficientnet-lite0": ("classes", "features"),
        "torchvision": ("classes", "segments", "features"),
        "timm": ("classes", "features"),
        "hf": ("classes", "depth", "segments", "features"),
        "torchscript": ("classes", "depth", "segments", "features"),
        "onnx": ("classes", "depth", "segments", "features"),
    }
)
JUDGE_SPECS = "probe, efficientnet-lite0, torchvision:NAME, timm:NAME, hf:NAME, torchscript:FILE, onnx:FILE"
OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # package.module:Class


class ProbeOptimizer(OptimizerConfig):
    """Of a small head: OptimizerConfig with other defaults."""

    lr: PositiveFloat | None = 2e-3
    warmup_steps: NonNegativeInt = 20
    weight_decay: NonNegativeFloat = 0.01
    ema_decay: Fraction = 0.99


class ProbeTraining(TrainConfig):
    """How a probe learns; images keep their place on the canvas, so that depth and masks stay theirs."""

    steps: PositiveInt = 300
    batch_size: PositiveInt = 32
    crop_scale: tuple[Fraction, Fraction] = (1.0, 1.0)
    optimizer: ProbeOptimizer = ProbeOptimizer()

    @model_validator(mode="after")
    def _is_not_cropped(self) -> "ProbeTraining":
        if self.crop_scale != (1.0, 1.0):
            raise ValueError(f"crop_scale = {self.crop_scale}: a probe's images are not cropped, (1.0, 1.0) is allowed")
        return self


class JudgeOptions(Settings):
    """What a judge needs to know besides its name; each kind of judge reads its own part."""

    size: PositiveInt | None = None  # px it sees, both sides; None: its own, a file's: as the images are
    mean: tuple[float, float, float] | None = None  # taken off pixels in [0, 1]; None: its own, a file's: 0
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None  # then divided by; None: its own, a file's: 1
    classes: str | None = None  # a file: line i has the labels that mean class i, with commas between them
    num_classes: Annotated[int, Field(ge=2, le=255)] | None = None  # of masks; a probe of masks needs it
    ignore: tuple[int, ...] = ()  # class ids of masks that don't count
    arguments: dict[str, bool | int | float | str] = {}  # of one's own judge, by name
    target: Target | None = None  # what a probe learns; None: what the task compares with
    train: ProbeTraining = ProbeTraining()  # of a probe
    min_skill: float = 0.05  # a judge is refused below it: 0 is as good as a constant answer, 1 is perfect
    eval_images: PositiveInt = 500  # originals that it is tried on, held-out ones where there are any
    gallery: Annotated[int, Field(ge=6)] = 2000  # originals among which retrieval looks for neighbours


class JudgeStageConfig(Settings):
    """What decides a judge."""

    spec: str
    kind: str  # of the task
    options: JudgeOptions = JudgeOptions()
    image_size: PositiveInt = 256
    labels: tuple[str, ...] = ()  # of a probe of labels while it trains: its classes in order

    @property
    def train(self) -> ProbeTraining:
        """As components.config.StageTraining has it."""
        return self.options.train

    @property
    def target(self) -> Target | None:
        """What a probe learns."""
        kind = TASK_KINDS.get(self.kind)
        return self.options.target or (kind.target if kind else None)


class ScoredTask(Settings):
    """What is measured of a task that isn't one of pixels."""

    name: str
    kind: str
    metrics: tuple[str, ...]


class ScoreStageConfig(PrecisionConfig):
    """What is measured at each budget, on images decoded at which precision."""

    metrics: tuple[str, ...]  # of pixels
    perceptual: PerceptualConfig = PerceptualConfig()
    tasks: tuple[ScoredTask, ...] = ()


class TaskConfig(Settings):
    """A task: what is measured at each budget, by which judge, and the rule that picks a budget."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    kind: str  # of TASK_KINDS, or "package.module:Class" of one's own; left out, the name says it
    judge: str = "none"  # of JUDGE_SPECS, or "package.module:Class" of one's own
    judge_options: JudgeOptions = JudgeOptions()
    metrics: tuple[str, ...]  # left out: the kind's default
    perceptual: PerceptualConfig = PerceptualConfig(kind="efficientnet")  # what the metric of that name is
    rule: RuleConfig
    rules: tuple[RuleConfig, ...] = ()  # further ones, reported beside

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kind = values.get("kind", values.get("name"))
        known = isinstance(kind, str) and kind in TASK_KINDS
        if "kind" not in values and not known:
            raise ValueError(f"kind: missing, since the name {kind!r} is none; allowed are {_kinds()}")
        filled = {"metrics": TASK_KINDS[kind].default if known else (), **values, "kind": kind}
        return filled

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        _check_kind(self)
        _check_judge(self)
        allowed = self.metrics if self.kind == "reconstruction" else (*self.metrics, *PIXEL_METRICS)
        for place, rule in (("rule", self.rule), *((f"rules.{i}", rule) for i, rule in enumerate(self.rules))):
            if rule.metric not in allowed:
                raise ValueError(f"{place}.metric = {rule.metric!r}: allowed are this task's {list(allowed)}")
        return self

    @property
    def pixel_metrics(self) -> tuple[str, ...]:
        """What has to be measured of pixels for it: its own metrics of that kind, and its rules'."""
        own = self.metrics if self.kind == "reconstruction" else ()
        ruled = {rule.metric for rule in (self.rule, *self.rules)} - set(self.metrics)
        return tuple(metric for metric in PIXEL_METRICS if metric in own or metric in ruled)


def _kinds() -> str:
    return f"{list(TASK_KINDS)}, or 'package.module:Class' of your own"


def _check_kind(task: TaskConfig) -> None:
    """Raises ValueError for a kind that there isn't, or metrics that aren't its."""
    if task.kind not in TASK_KINDS:
        if not OWN.fullmatch(task.kind):
            raise ValueError(f"kind = {task.kind!r}: allowed are {_kinds()}")
        if not task.metrics:
            raise ValueError("metrics: missing; for a task of your own name those it measures")
        return
    allowed = TASK_KINDS[task.kind].metrics
    for metric in task.metrics:
        if metric not in allowed:
            raise ValueError(f"metrics = {metric!r}: allowed for the kind {task.kind!r} are {list(allowed)}")
    if not task.metrics:
        raise ValueError(f"metrics = []: at least one of {list(allowed)}")


def _check_judge(task: TaskConfig) -> None:
    """Raises ValueError for a judge that there isn't, or that can't answer what the task asks."""
    kind, judge = TASK_KINDS.get(task.kind), task.judge
    if judge == "none":
        if kind and kind.answer:
            able = [name for name, answers in JUDGE_KINDS.items() if kind.answer in answers]
            raise ValueError(f"judge = 'none': a {task.kind!r} task needs one, of the kind {able} or your own")
        return
    if kind and not kind.answer:
        raise ValueError(f"judge = {judge!r}: a {task.kind!r} task compares pixels, leave it out")
    name, colon, rest = judge.partition(":")
    named = (
        name in JUDGE_KINDS and bool(rest) != (name in ("probe", "efficientnet-lite0")) and bool(colon) == bool(rest)
    )
    if not named and (name in JUDGE_KINDS or not OWN.fullmatch(judge)):
        raise ValueError(f"judge = {judge!r}: allowed are none, {JUDGE_SPECS}, or 'package.module:Class' of your own")
    if named and kind and kind.answer not in JUDGE_KINDS[name]:
        raise ValueError(f"judge = {judge!r}: it answers {list(JUDGE_KINDS[name])}, the task asks for {kind.answer!r}")
    if name == "probe":
        _check_probe(task, kind)


def _check_probe(task: TaskConfig, kind: TaskKind | None) -> None:
    target = task.judge_options.target or (kind.target if kind else None)
    if target is None:
        raise ValueError("judge_options.target = None: what the probe learns, of 'label', 'depth', 'mask'")
    if kind and target != kind.target:
        raise ValueError(f"judge_options.target = {target!r}: a {task.kind!r} task compares with {kind.target!r}")
    if target == "mask" and task.judge_options.num_classes is None:
        raise ValueError("judge_options.num_classes = None: a probe of masks needs their number of classes")
