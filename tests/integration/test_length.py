"""length.<task>: the head trained on a Ray of its own, and the counts that follow from it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components.artifacts import LengthModel
from components.config import InferenceResources, LengthConfig, LengthStageConfig, NoConfig, RuleConfig
from components.images import stack, to_float
from components.length import train_length
from components.rules import rule_with_head
from components.select_counts import select
from components.task_config import TaskConfig
from model import AlitTokenizer
from model.starter import STARTER
from tests.by_hand import image_set, job, of_photographs, photographs, tokenizer_artifact

pytestmark = pytest.mark.slow
CROPS = 160


@pytest.mark.usefixtures("own_ray")
def test_a_head_is_trained_and_chooses(tmp_path: Path) -> None:
    made = photographs(CROPS)
    scores, images = of_photographs(tmp_path / "scores", made), image_set(tmp_path / "images", made)
    config = LengthStageConfig(metric="l1", column="l1", length=LengthConfig())
    found = {}
    for name, resources in {"one": InferenceResources(batch_size=64), "more": InferenceResources(batch_size=7)}.items():
        figures = train_length(
            job(tmp_path / name),
            config=config,
            resources=resources,
            images=images,
            tokenizer=tokenizer_artifact(),
            scores=scores,
        )
        found[name] = (figures, pq.read_table(tmp_path / name / "table").to_pydict())
    assert found["one"] == found["more"]  # no batch size changes a bit
    figures, table = found["one"]
    assert not (tmp_path / "one-scratch" / "latents").exists()
    train = [row["image_id"] for row in made.rows if row["split"] == "train"]
    assert figures["train_images"] == len(train) and figures["held_out_images"] == CROPS - len(train)
    assert figures["error"] < figures["error_of_the_mean"], figures
    print(json.dumps(figures))
    assert table["image_id"] == [row["image_id"] for row in made.rows]

    rule = RuleConfig(kind="predicted", metric="l1", max=0.08)
    lengths = LengthModel(uri=str(tmp_path / "one"), key="0")
    figures = select(
        job(tmp_path / "counts"),
        config=TaskConfig(name="reconstruction", rule=rule),
        resources=NoConfig(),
        scores=scores,
        lengths=lengths,
    )
    print(json.dumps(figures))
    counts = pq.read_table(tmp_path / "counts" / "table")["num_tokens"].to_pylist()
    assert len(set(counts)) > 2
    pixels = to_float(torch.from_numpy(stack([row["image"] for row in made.rows[:12]])))
    tokens = AlitTokenizer.load(STARTER).encode(pixels, rule_with_head(rule, tmp_path / "one" / "head"))
    assert np.mean(tokens.num_tokens == counts[:12]) > 0.9  # a batch may round a value that lies on the limit


@pytest.mark.usefixtures("own_ray")
def test_no_value_to_learn_from_is_an_error(tmp_path: Path) -> None:
    made = photographs(40)
    empty = {"l1": np.full((40, 8), np.nan)}
    from tests.by_hand import score_table

    scores = score_table(tmp_path / "scores", empty, made.budgets, split=["train"] * 40)
    with pytest.raises(ValueError, match="no image of the train split"):
        train_length(
            job(tmp_path / "out"),
            config=LengthStageConfig(metric="l1", column="l1", length=LengthConfig()),
            resources=InferenceResources(),
            images=image_set(tmp_path / "images", made),
            tokenizer=tokenizer_artifact(),
            scores=scores,
        )
