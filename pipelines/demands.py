"""What stages take of the cluster, and which of them makes the tokenizer."""

from dataclasses import dataclass

from pipelines.config import PipelineConfig, RunConfig
from pipelines.dag import Demand


@dataclass(frozen=True)
class TokenizerStage:
    """The stage that makes the Tokenizer everything after it uses, and what is known of it beforehand."""

    name: str
    budgets: tuple[int, ...]


def trained(config: RunConfig) -> TokenizerStage:
    """The last stage of training."""
    return TokenizerStage("finetune" if config.training.finetune else "distill", config.tokenizer.budgets)


def inference_demand(config: PipelineConfig, actors: int | None = None) -> Demand:
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
