"""The typed settings of every stage. Light on purpose: the command line reads these without torch, Ray or MLflow.

A stage's *config* decides its result and is hashed into its key; its *resources* (workers, batch sizes at inference,
how often to log) must not change the result and are left out of the key.
"""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from model.config import AlitConfig, BaseConfig, BaseObjectiveConfig, DistillConfig
from model.recipes import FinetuneConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Settings):
    """Where the images are and what becomes of them before a model sees them."""

    source: str  # "demo"; or, local or s3://, a folder, tar shards, Parquet tables or a manifest
    image_size: PositiveInt = 256  # px; the short side is resized to it, the centre is kept
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of images in the val split where the source names none
    limit: PositiveInt | None = None  # the first so many files of the listing
    crops: PositiveInt = 320  # demo source only: how many crops are cut from the photographs


class IngestConfig(Settings):
    """Limits of the ingest stage."""

    max_rejected: Annotated[int, Field(ge=0)] = 1000  # more bad images among the files that a run reads fail it
    max_pixels: PositiveInt = 100_000_000  # width x height of a source image; larger ones are rejected
    max_bytes: PositiveInt = 200_000_000  # of a source file


class IngestStageConfig(Settings):
    """What decides an ImageSet, besides the listing of its source."""

    data: DataConfig
    limits: IngestConfig = IngestConfig()


class IngestResources(Settings):
    """How ingest is spread out."""

    tasks: PositiveInt = 2  # decoding tasks at once, one CPU each
    memory_mb_per_task: NonNegativeInt = 0  # set aside by Ray for each, MiB; 0: nothing is
    files_per_block: PositiveInt = 64


class OptimizerConfig(Settings):
    """AdamW with a linear warm-up and half a cosine down to min_lr."""

    base_lr: PositiveFloat = 1.5e-4  # for an effective batch of 256; the rate used is base_lr * batch / 256
    lr: PositiveFloat | None = None  # the rate itself, instead of base_lr
    min_lr: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 100
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.05  # of matrices; norms, biases, tokens, positions and codebooks have none
    clip_norm: PositiveFloat = 3.0
    ema_decay: Fraction = 0.9999


class TrainConfig(Settings):
    """One training stage, whatever it minimises."""

    steps: NonNegativeInt
    batch_size: PositiveInt = 256  # images a step over all workers
    seed: int = 0
    # Random resized crop: share of the area, and half of the images mirrored; null: neither.
    crop_scale: tuple[Fraction, Fraction] | None = (0.8, 1.0)
    recolour: Fraction = 0.0  # share of the images whose colours are shuffled and shifted; for few photographs
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast; fp16 scales the loss
    eval_images: PositiveInt = 256  # held-out images looked at in an evaluation
    optimizer: OptimizerConfig = OptimizerConfig()
    result: Literal["last", "best"] = "last"  # the checkpoint whose averaged weights are the artifact


class WorkerRange(Settings):
    """An elastic number of workers or actors: fewer go on when a node is lost, more when there is room."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min = {self.min}: at most max = {self.max}")
        return self


def _workers_kind(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "count"


Workers = Annotated[
    Annotated[PositiveInt, Tag("count")] | Annotated[WorkerRange, Tag("range")], Discriminator(_workers_kind)
]


def _range(given: int | WorkerRange) -> WorkerRange:
    return given if isinstance(given, WorkerRange) else WorkerRange(min=given, max=given)


class TrainResources(Settings):
    """How training is spread out and how often it saves and speaks.

    The batch of a step is the config's whatever is here: with fewer workers each has more images of it, and takes them
    ``micro_batch`` at a time. So neither the learning rate nor the number of steps follows the number of workers.
    """

    workers: Workers = 2  # or {min: …, max: …}
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    memory_mb_per_worker: NonNegativeInt = 0  # set aside by Ray for each, MiB; 0: nothing is
    micro_batch: PositiveInt | None = None  # images a worker takes at once, gradients summed; None: its whole share
    strategy: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and optimizer are cut over the workers
    compile: bool = False  # the transformer blocks through torch.compile
    recompute: Literal["none", "light", "medium", "full"] = "none"  # activations, to keep fewer: model/recompute.py
    checkpoint_every: PositiveInt = 500  # steps
    keep_checkpoints: PositiveInt = 2  # the newest so many, and the best one
    eval_every: PositiveInt = 500  # steps
    pictures: Annotated[int, Field(ge=0, le=16)] = 4  # held-out images shown in MLflow after each evaluation
    log_every: PositiveInt = 10  # steps
    data_tasks: PositiveInt = 2  # files read and decoded at once, on CPUs that the workers may hold
    cache_mb: NonNegativeInt = 512  # a train split of at most so many MB, decoded, stays in each worker's memory
    max_failures: NonNegativeInt = 2  # restarts of the worker group from the last checkpoint
    max_skipped: NonNegativeInt = 20  # more steps in a row without a finite gradient, seen at log_every, end it
    stall_s: PositiveFloat = 1800.0  # a worker that keeps the others waiting for so long counts as dead
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5  # a worker so much slower than the middle one is named
    resize_s: PositiveFloat = 60.0  # elastic: how often it is looked whether there is room for more workers
    start: str | None = None  # folder of the Tokenizer to go on from; its digest is in the key

    @property
    def worker_range(self) -> WorkerRange:
        """The number of workers as a range, of one where it is fixed."""
        return _range(self.workers)


class StageTraining(Settings):
    """What every stage that trains has in its config."""

    image_size: PositiveInt
    train: TrainConfig


class BaseStageConfig(StageTraining):
    """What decides a base tokenizer."""

    base: BaseConfig
    objective: BaseObjectiveConfig


class DistillStageConfig(StageTraining):
    """What decides a tokenizer, besides its base."""

    tokenizer: AlitConfig
    objective: DistillConfig


class FinetuneStageConfig(StageTraining):
    """What decides a finetuned tokenizer, besides the distilled one it begins with."""

    objective: FinetuneConfig
    discriminator: OptimizerConfig


class NoConfig(Settings):
    """A stage that its inputs alone decide."""


class PrecisionConfig(Settings):
    """At what precision codes and reconstructions are computed."""

    precision: Literal["fp32", "bf16", "int8"] = "fp32"  # model/inference.py


class InferenceResources(Settings):
    """How tokenize and score are spread out."""

    batch_size: PositiveInt = 32
    actors: Workers = 1  # or {min: …, max: …}: the pool grows with the work, and an autoscaling cluster with the pool
    cpus_per_actor: PositiveFloat = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    memory_mb_per_actor: NonNegativeInt = 0  # set aside by Ray for each, MiB; 0: nothing is

    @property
    def actor_range(self) -> WorkerRange:
        """The number of actors as a range, of one where it is fixed."""
        return _range(self.actors)


class LengthConfig(Settings):
    """How the head of a predicted length is trained (model/predicted.py)."""

    images: PositiveInt = 10_000  # of the train split, at most
    steps: PositiveInt = 400
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 3e-3
    hidden: PositiveInt = 128
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the metric given the image; higher spends more tokens
    seed: int = 0


class RuleConfig(Settings):
    """One of the rules of model/selection.py; ``predicted`` is the threshold on what a trained head predicts."""

    kind: Literal["threshold", "within", "best", "mean_tokens", "fixed", "predicted"]
    metric: str  # of the task, by its short name, or a metric of pixels
    max: float | None = None
    min: float | None = None
    ratio: Annotated[float, Field(ge=1)] | None = None  # to the image's best value
    mean: PositiveFloat | None = None
    num_tokens: PositiveInt | None = None
    length: LengthConfig | None = None  # of kind predicted; none: the defaults

    @model_validator(mode="after")
    def _needs(self) -> "RuleConfig":
        parameters = ("max", "min", "ratio", "mean", "num_tokens")
        given = {name for name in parameters if getattr(self, name) is not None}
        allowed: dict[str, list[set[str]]] = {
            "threshold": [{"max"}, {"min"}],
            "within": [{"ratio"}],
            "best": [set()],
            "mean_tokens": [{"mean"}],
            "fixed": [{"num_tokens"}],
            "predicted": [{"max"}, {"min"}],
        }
        if given not in allowed[self.kind]:
            wanted = " or ".join("+".join(sorted(names)) or "no parameter" for names in allowed[self.kind])
            raise ValueError(f"a {self.kind!r} rule takes {wanted}, it was given {sorted(given) or 'none'}")
        if self.length is not None and self.kind != "predicted":
            raise ValueError(f"length = {self.length!r}: only a 'predicted' rule has one, this is {self.kind!r}")
        return self


class LengthStageConfig(Settings):
    """What decides the head of a task's predicted lengths."""

    metric: str
    column: str  # of the score table
    length: LengthConfig


class PackConfig(Settings):
    """Packed sizes are compared with image files over a sample."""

    sizes_images: NonNegativeInt = 100  # held-out images (any, where none is held out) also written as PNG and JPEG


class MatrixConfig(Settings):
    """The criterion x task matrix."""

    mean_tokens: PositiveFloat | None = None  # that every criterion may spend; none: half of the largest budget
    resamples: PositiveInt = 1000  # of the bootstrap
    seed: int = 0


class MatrixStageConfig(Settings):
    """What decides the matrix, besides scores and counts."""

    settings: MatrixConfig
    criteria: dict[str, str]  # task -> column of the score table that its rule reads


class QualityConfig(Settings):
    """Whole-set quality over a bounded sample."""

    images: Annotated[int, Field(ge=2)] = 1000  # held-out images looked at (any, where none is held out), at most
    probe_images: NonNegativeInt = 2000  # labelled images of the train split that the linear probe is fitted to
    inception: str | None = None  # a file with the Inception weights of torch-fidelity: rFID too


class TablesConfig(Settings):
    """What is shown in MLflow of a run's results."""

    pictures: Annotated[int, Field(ge=0, le=64)] = 6


class PublishConfig(TablesConfig):
    """What is registered in MLflow and under which name."""

    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "alit"


class GateConfig(Settings):
    """What a new model must do better than the champion, on the same held-out images."""

    metric: str  # a column of the score table: one of pixels, or TASK.METRIC
    budget: PositiveInt  # tokens an image
    margin: NonNegativeFloat = 0.0  # by more than so much, in the metric's own unit


class PromoteConfig(Settings):
    """What makes a newly registered model the champion."""

    gate: GateConfig | None = None  # none: the first model is, a later one waits as challenger


class RegisteredModel(Settings):
    """A version in the model registry of the run's MLflow."""

    name: str
    version: PositiveInt


class DriftConfig(Settings):
    """When new images differ so much from those of the training that somebody should look."""

    psi: PositiveFloat = 0.2  # population stability index above which a difference is large ...
    p_value: Annotated[float, Field(gt=0, lt=1)] = 0.01  # ... and probability below which it isn't chance: both flag
    min_images: PositiveInt = 30  # fewer new images say too little


class ClusterSize(Settings):
    """What an autoscaling cluster has when it has grown; what it has already is known without this."""

    cpus: NonNegativeFloat = 0.0
    gpus: NonNegativeFloat = 0.0
    memory_gb: NonNegativeFloat = 0.0  # GiB


class ReportConfig(Settings):
    """The page."""

    examples: Annotated[int, Field(ge=0, le=48)] = 12  # images shown with their reconstructions, easy to hard


class ReportResources(Settings):
    """What the page also shows, and is not made again for."""

    run_config: str = ""  # YAML, as `alit run` takes it


class RaySettings(Settings):
    """Which Ray runs the stages: RAY_ADDRESS in the environment, else ``address``, else one started for the run."""

    address: str | None = None  # host:port of a running cluster's head, or "auto"
    num_cpus: PositiveInt | None = None  # of a Ray that is started here; none: what this process may use
    object_store_mb: Annotated[int, Field(ge=80)] = 300  # of a Ray that is started here, MiB
    grows_to: ClusterSize = ClusterSize()  # of an autoscaling cluster: what it may grow to


class S3Settings(Settings):
    """Where buckets are and how patient we are: AWS_* variables in the environment, else these; never credentials."""

    endpoint_url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None = None  # None: AWS; no user or password
    region: Annotated[str, Field(min_length=1)] | None = None
    profile: Annotated[str, Field(min_length=1)] | None = None  # of ~/.aws, which then every node needs
    max_attempts: PositiveInt = 8  # of a request that was throttled, failed or cut off


class MlflowSettings(Settings):
    """Where runs are recorded: MLFLOW_TRACKING_URI in the environment, else ``uri``, else the workspace."""

    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "alit"
