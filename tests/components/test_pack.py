"""pack.<task> through its door: what it packs decodes to what was scored, and what its sizes are."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components.artifacts import TokenCounts
from components.config import NoConfig, PackConfig, RuleConfig
from components.images import stack, to_float
from components.pack import pack
from components.select_counts import select
from components.task_config import TaskConfig
from model import AlitTokenizer, TokenBatch
from model.metrics import METRICS
from model.starter import STARTER
from tests.by_hand import code_book, image_set, job, of_photographs, photographs, tokenizer_artifact

TASK = TaskConfig(name="reconstruction", rule=RuleConfig(kind="threshold", metric="l1", max=0.08))


def packed(folder: Path, crops: int = 40, task: TaskConfig = TASK, sizes_images: int = 10) -> tuple[Path, dict]:
    """The folder of the archive and the stage's figures."""
    made = photographs(crops)
    scores = of_photographs(folder / "scores", made)
    select(job(folder / "counts"), config=task, resources=NoConfig(), scores=scores)
    figures = pack(
        job(folder / "archive"),
        config=PackConfig(sizes_images=sizes_images),
        resources=NoConfig(),
        images=image_set(folder / "images", made),
        codes=code_book(folder / "codes", made),
        scores=scores,
        counts=TokenCounts(uri=str(folder / "counts"), key="0"),
        tokenizer=tokenizer_artifact(),
    )
    return folder / "archive", figures


def test_the_archive_decodes_to_the_bit_to_what_was_scored(tmp_path: Path) -> None:
    archive, _ = packed(tmp_path)
    made, rows = photographs(40), pq.read_table(archive / "table").to_pydict()
    tokenizer = AlitTokenizer.load(STARTER)
    tokens = TokenBatch.from_numpy([np.array(ids) for ids in rows["token_ids"]], tokenizer.config.codebook_size)
    originals = to_float(torch.from_numpy(stack([row["image"] for row in made.rows])))
    assert rows["image_id"] == [row["image_id"] for row in made.rows]
    at = [made.budgets.index(number) for number in rows["num_tokens"]]
    for metric, measure in METRICS.items():
        found = measure(originals, tokenizer.decode(tokens))
        assert found.tolist() == made.scores[metric][np.arange(40), at].tolist()


def test_sizes_add_up(tmp_path: Path) -> None:
    archive, figures = packed(tmp_path)
    rows = pq.read_table(archive / "table").to_pydict()
    header, sizes = (json.loads((archive / name).read_text()) for name in ("tokenizer.json", "sizes.json"))
    bits = header["bits_per_token"]
    assert figures["mean_bits"] == sizes["packed"] == bits * np.mean(rows["num_tokens"])
    assert sizes["fixed"] == bits * 64 and sizes["count_bits"] == 3
    held_out = [row["split"] == "val" for row in photographs(40).rows]
    assert sizes["packed_held_out"] == pytest.approx(bits * np.mean(np.array(rows["num_tokens"])[held_out]))
    assert sizes["png"] > sizes["jpeg75"] > sizes["packed"]
    assert sizes["jpeg_matched"] > 8 * 300 and 1 <= sizes["jpeg_matched_at"] <= 95


def test_the_entropy_estimate_is_of_tokens_it_has_not_counted(tmp_path: Path) -> None:
    archive, figures = packed(tmp_path)
    rows = pq.read_table(archive / "table").to_pydict()
    size, budgets = (json.loads((archive / "tokenizer.json").read_text())[n] for n in ("codebook_size", "budgets"))
    split = [row["split"] for row in photographs(40).rows]
    seen = np.ones((len(budgets), size))
    for ids, part in zip(rows["token_ids"], split, strict=True):
        for place, code in enumerate(ids):
            seen[place // 8, code] += part == "train"
    share = seen / seen.sum(axis=1, keepdims=True)
    bits = [
        -sum(np.log2(share[place // 8, code]) for place, code in enumerate(ids))
        for ids, part in zip(rows["token_ids"], split, strict=True)
        if part == "val"
    ]
    assert figures["mean_entropy_bits"] == pytest.approx(np.mean(bits))


def test_no_sample_no_files(tmp_path: Path) -> None:
    _, figures = packed(tmp_path, sizes_images=0)
    assert "mean_png_bits" not in figures and "mean_entropy_bits" in figures


def test_one_image(tmp_path: Path) -> None:
    archive, figures = packed(tmp_path, crops=1)
    assert figures["images"] == 1 and "mean_entropy_bits" not in figures
    assert len(pq.read_table(archive / "table")) == 1
