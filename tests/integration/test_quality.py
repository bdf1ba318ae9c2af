"""quality on a Ray of its own: what it writes agrees with what can be worked out beside it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.artifacts import TokenCounts
from components.config import InferenceResources, NoConfig, QualityConfig, RuleConfig
from components.quality import quality
from components.select_counts import select
from components.task_config import TaskConfig
from tests.by_hand import code_book, image_set, job, of_photographs, photographs, tokenizer_artifact

pytestmark = pytest.mark.slow
CROPS = 80
TASKS = {"some": {"kind": "threshold", "max": 0.08}, "all_24": {"kind": "fixed", "num_tokens": 24}}


@pytest.mark.usefixtures("own_ray")
def test_a_whole_set(tmp_path: Path) -> None:
    made = photographs(CROPS)
    scores = of_photographs(tmp_path / "scores", made)
    images, codes = image_set(tmp_path / "images", made), code_book(tmp_path / "codes", made)
    counts = {}
    for name, rule in TASKS.items():
        task = TaskConfig(name=name, kind="reconstruction", rule=RuleConfig(metric="l1", **rule))
        select(job(tmp_path / name), config=task, resources=NoConfig(), scores=scores)
        counts[f"counts_{name}"] = TokenCounts(uri=str(tmp_path / name), key="0")
    found = {}
    for batch in (64, 5):
        figures = quality(
            job(tmp_path / f"quality{batch}"),
            config=QualityConfig(images=16),
            resources=InferenceResources(batch_size=batch),
            images=images,
            codes=codes,
            tokenizer=tokenizer_artifact(),
            **counts,
        )
        found[batch] = (figures, json.loads((tmp_path / f"quality{batch}" / "quality.json").read_text()))
    assert found[64] == found[5]  # no batch size changes anything
    figures, told = found[64]
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == [*(f"{budget} tokens" for budget in made.budgets), "some", "all_24"]
    assert told["images"] == 16 and told["split"] == "val" and told["in_halves"]["images"] == 8
    first, last = rows["8 tokens"], rows["64 tokens"]
    assert last["frechet_efficientnet"] < first["frechet_efficientnet"]
    assert figures["frechet_efficientnet@64"] == last["frechet_efficientnet"]
    for name in ("frechet_efficientnet", "kernel_efficientnet"):  # a task that gives all the same is that budget
        assert rows["all_24"][name] == rows["24 tokens"][name] == rows["all_24"][f"fixed_{name}"]
    val = [row["split"] == "val" for row in made.rows]
    tokens = np.array(pq.read_table(tmp_path / "some" / "table")["num_tokens"])
    ids = np.array([row["image_id"] for row in made.rows])
    sampled = np.isin(ids, np.sort(ids[val])[:16])
    assert rows["some"]["mean_tokens"] == tokens[sampled].mean()
    used = np.unique(made.codes[val][:, :8])
    assert told["code_images"] == sum(val) and first["usage"] == len(used) / 1024
    assert 1 <= first["perplexity"] <= len(used)
    assert 0 <= first["recall1"] <= first["recall5"] <= 1 and "recall5_continuous" in last
    # Labels of the demo are photographs' names, and whole photographs are held out: no probe can know them.
    assert first["probe_flat"] == 0 and told["probe_test"] == 16
    assert len(pq.read_table(tmp_path / "quality64" / "table")) == 10
    with Image.open(tmp_path / "quality64" / "quality.png") as picture:
        assert picture.width > 300
    for row in told["rows"]:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    print(told["in_halves"])


@pytest.mark.usefixtures("own_ray")
def test_one_image_is_no_set(tmp_path: Path) -> None:
    made = photographs(1)
    with pytest.raises(ValueError, match="two at least"):
        quality(
            job(tmp_path / "out"),
            config=QualityConfig(),
            resources=InferenceResources(),
            images=image_set(tmp_path / "images", made),
            codes=code_book(tmp_path / "codes", made),
            tokenizer=tokenizer_artifact(),
        )
