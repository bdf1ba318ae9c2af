"""What stages take of the cluster, and which of them makes the tokenizer."""

from pipelines.config import RunConfig
from pipelines.dag import Demand


def tokenizer_stage(config: RunConfig) -> str:
    """The stage that makes the Tokenizer everything after it uses."""
    return "finetune" if config.training.finetune else "distill"


def inference_demand(config: RunConfig, actors: int | None = None) -> Demand:
    """What a stage of inference actors takes; a pool with a range, the least it begins with."""
    inference = config.inference
    actors = inference.actor_range.min if actors is None else actors
    return Demand(
        cpus=actors * inference.cpus_per_actor,
        gpus=actors * inference.gpus_per_actor,
        memory_gb=actors * inference.memory_mb_per_actor / 1024,
        workers=actors,
        unit="actor",
        setting="inference",
    )


def training_demand(config: RunConfig) -> Demand:
    """What a stage that trains takes."""
    training = config.training
    least = training.worker_range.min  # an elastic group begins with so many, and grows where there is room
    return Demand(
        cpus=least * training.cpus_per_worker,
        gpus=least * training.gpus_per_worker,
        memory_gb=least * training.memory_mb_per_worker / 1024,
        workers=least,
        setting="training",
    )
