"""tokenize, score and select give the same rows whatever the batch size and the number of actors."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.artifacts import CodeBook, ImageSet, Job, ScoreTable, Tokenizer
from components.config import (
    DataConfig,
    InferenceResources,
    IngestResources,
    IngestStageConfig,
    NoConfig,
    PrecisionConfig,
    RuleConfig,
)
from components.ingest import ingest
from components.score import score
from components.select_counts import select
from components.task_config import ScoreStageConfig, TaskConfig
from components.tokenize_images import tokenize
from tests.by_hand import finish
from tests.integration.conftest import Workspace

pytestmark = pytest.mark.slow

WAYS = {
    "one by one": InferenceResources(batch_size=1, actors=1),
    "two actors": InferenceResources(batch_size=7, actors=2, cpus_per_actor=0.5),
}
TASK = TaskConfig(name="reconstruction", rule=RuleConfig(kind="threshold", metric="l1", max=0.08))


def job(output: Path) -> Job:
    output.mkdir(parents=True)
    return Job(stage="test", key="0", workspace="", output=str(output), scratch="")


def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / "table").to_pylist()


@pytest.mark.usefixtures("own_ray")
def test_results_do_not_depend_on_resources(finished: Workspace, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(str(finished.artifact("distill")))
    config = IngestStageConfig(data=DataConfig(source="demo", image_size=64, crops=40))
    images_folder = tmp_path / "images"
    ingest(job(images_folder), config=config, resources=IngestResources(tasks=1, files_per_block=10))
    images = ImageSet(uri=str(images_folder), key="0")
    found = {}
    for number, (name, resources) in enumerate(WAYS.items()):
        codes, scores, counts = (tmp_path / f"{stage}{number}" for stage in ("codes", "scores", "counts"))
        tokenize(job(codes), config=PrecisionConfig(), resources=resources, images=images, tokenizer=tokenizer)
        finish(codes, CodeBook)
        score(
            job(scores),
            config=ScoreStageConfig(metrics=("l1", "mse", "psnr", "ssim", "ms_ssim")),
            resources=resources,
            images=images,
            codes=CodeBook(uri=str(codes), key="0"),
            tokenizer=tokenizer,
        )
        select(job(counts), config=TASK, resources=NoConfig(), scores=ScoreTable(uri=str(scores), key="0"))
        found[name] = [rows(codes), rows(scores), rows(counts)]
    first = found.pop("one by one")
    assert len(first[0]) == 40
    for name, others in found.items():
        assert others == first, name
