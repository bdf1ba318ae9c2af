"""The main job end to end: real photographs to a registered tokenizer and packed tokens."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components.images import stack, to_float
from model import AlitTokenizer, TokenBatch
from model.metrics import l1
from tests.integration.conftest import Workspace, alit, settings

pytestmark = pytest.mark.slow

STAGES = ["ingest", "base", "distill", "tokenize", "score", "select.reconstruction", "pack.reconstruction"]
STAGES += ["matrix", "publish", "promote", "report"]


def table(finished: Workspace, stage: str) -> dict[str, list]:
    return pq.read_table(finished.artifact(stage) / "table").to_pydict()


def test_every_stage_is_done_and_told(finished: Workspace) -> None:
    for stage in STAGES:
        assert re.search(rf"^{re.escape(stage)} +done ", finished.result.out, re.MULTILINE), finished.result.out
    assert "mlflow ui" in finished.result.out
    assert "step 4/4" in finished.result.err


def test_second_run_runs_nothing_and_is_recorded(finished: Workspace) -> None:
    again = alit("run", *finished.arguments)
    assert again.code == 0
    assert again.out.count("reused") == len(STAGES)
    assert "starts" not in again.err


def test_errors_fall_with_every_budget_on_held_out_images(finished: Workspace) -> None:
    scores = pq.read_table(finished.artifact("score") / "table").to_pandas()
    held_out = np.stack(scores[scores["split"] == "val"]["l1"])
    means = held_out.mean(axis=0)
    assert (np.diff(means) < 0).all(), means
    assert means[-1] < 0.75 * means[0], means


def test_counts_differ_and_keep_their_promise(finished: Workspace) -> None:
    counts = table(finished, "select.reconstruction")
    scores = dict(zip(*[table(finished, "score")[name] for name in ("image_id", "l1")], strict=True))
    budgets = json.loads((finished.artifact("score") / "budgets.json").read_text())
    assert len(set(counts["num_tokens"])) >= 3
    for image_id, tokens, satisfied in zip(*[counts[n] for n in ("image_id", "num_tokens", "satisfied")], strict=True):
        chosen = budgets.index(tokens)
        assert (scores[image_id][chosen] <= 0.08) == satisfied
        assert not satisfied or all(value > 0.08 for value in scores[image_id][:chosen])


def test_the_archive_decodes_to_what_was_scored(finished: Workspace) -> None:
    tokenizer = AlitTokenizer.load(finished.artifact("distill"))
    archive, images = table(finished, "pack.reconstruction"), table(finished, "ingest")
    counts = table(finished, "select.reconstruction")
    assert archive["image_id"] == images["image_id"] == counts["image_id"]
    assert [len(ids) for ids in archive["token_ids"]] == archive["num_tokens"] == counts["num_tokens"]
    tokens = TokenBatch.from_numpy([np.array(ids) for ids in archive["token_ids"]], tokenizer.config.codebook_size)
    errors = l1(to_float(torch.from_numpy(stack(images["image"]))), tokenizer.decode(tokens))
    assert errors.tolist() == counts["value"]


def test_codes_are_those_of_the_tokenizer(finished: Workspace) -> None:
    tokenizer = AlitTokenizer.load(finished.artifact("distill"))
    pngs, codes = table(finished, "ingest")["image"][:3], table(finished, "tokenize")["codes"][:3]
    with torch.inference_mode():
        found = [step.codes for step in tokenizer.rollout(to_float(torch.from_numpy(stack(pngs))))]
    assert torch.cat(found, dim=1).tolist() == codes


def test_what_mlflow_holds(finished: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{finished.path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "alit"]
    parents = client.search_runs([experiment.experiment_id], "tags.alit.pipeline = 'train'", order_by=["start_time"])
    parents = [run for run in parents if "mlflow.parentRunId" not in run.data.tags]
    first = parents[0]
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{first.info.run_id}'")
    assert sorted(child.data.tags["alit.stage"] for child in children) == sorted(STAGES)
    assert {run.info.status for run in (first, *children)} == {"FINISHED"}
    assert first.inputs.dataset_inputs
    distill = next(child for child in children if child.data.tags["alit.stage"] == "distill")
    history = client.get_metric_history(distill.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    publish = next(child for child in children if child.data.tags["alit.stage"] == "publish")
    names = [file.path for file in client.list_artifacts(publish.info.run_id)]
    assert "counts_reconstruction.json" in names and "images" in names
    version = client.get_model_version("alit-demo", "1")
    assert version.run_id == publish.info.run_id

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{finished.path}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/alit-demo/1")
    png = table(finished, "ingest")["image"][0]
    import pandas as pd

    answer = model.predict(pd.DataFrame({"image": [png]}), params={"rule": "reconstruction"})
    chosen = table(finished, "select.reconstruction")["num_tokens"][0]
    assert answer["num_tokens"].tolist() == [chosen]
    assert list(answer["token_ids"][0]) == list(table(finished, "pack.reconstruction")["token_ids"][0])


def test_select_again_is_quick_and_leaves_what_a_run_would_find(finished: Workspace) -> None:
    for rule, told in ((("--max", "0.1"), "mean tokens"), (("--within", "1.2"), "mean tokens")):
        chosen = alit("select", *finished.arguments, "--task", "reconstruction", *rule)
        assert chosen.code == 0, chosen.err
        assert told in chosen.out
    mean = alit("select", *finished.arguments, "--task", "reconstruction", "--mean-tokens", "20")
    assert float(re.search(r"mean tokens +(\S+)", mean.out)[1]) <= 20
    looser = settings("tasks.0.rule.max=0.1")
    planned = alit("plan", *finished.arguments, *looser)
    assert re.search(r"select\.reconstruction +\w+ +stands", planned.out), planned.out
    assert re.search(r"score +\w+ +stands", planned.out)
    wrong = alit("select", *finished.arguments, "--task", "reconstruction", "--mean-tokens", "2")
    assert wrong.code == 2 and "smallest budget" in wrong.err
    wrong = alit("select", *finished.arguments, "--task", "reconstruction", "--within", "0.5")
    assert wrong.code == 2 and "ratio = 0.5: Input should be greater than or equal to 1" in wrong.err


def test_status_names_every_artifact(finished: Workspace) -> None:
    told = alit("status", *finished.arguments)
    assert told.code == 0
    assert told.out.count("stands") == len(STAGES)


def test_encode_and_decode_a_folder(finished: Workspace, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, png in enumerate(table(finished, "ingest")["image"][:5]):
        (photos / f"{number}.png").write_bytes(png)
    (photos / "broken.png").write_bytes(b"nothing")
    model = str(finished.artifact("distill"))
    encoded = alit(
        "encode", "--model", model, "--input", str(photos), "--output", str(tmp_path / "out"), "--max-l1", "0.08"
    )
    assert encoded.code == 0, encoded.err
    assert "5 images, 1 rejected" in encoded.out
    rows = pq.read_table(tmp_path / "out" / "table").to_pydict()
    assert rows["num_tokens"] == table(finished, "select.reconstruction")["num_tokens"][:5]
    decoded = alit(
        "decode", "--model", model, "--input", str(tmp_path / "out"), "--output", str(tmp_path / "back"), timeout_s=120
    )
    assert decoded.code == 0, decoded.err
    assert sorted(file.stem for file in (tmp_path / "back").glob("*.png")) == sorted(rows["image_id"])
    assert Image.open(next((tmp_path / "back").glob("*.png"))).size == (64, 64)
    other = alit("decode", "--model", "starter", "--input", str(tmp_path / "out"), "--output", str(tmp_path / "no"))
    assert other.code == 2 and "archive was made by" in other.err
    wrong = alit("encode", "--model", model, "--input", str(photos), "--output", str(tmp_path / "x"), "--tokens", "9")
    assert wrong.code == 2 and "budgets" in wrong.err


def test_a_demand_that_cannot_be_met_is_refused_before_anything_runs(tmp_path: Path) -> None:
    wanted = settings(f"workspace={tmp_path}/w", "training.workers=8", "training.cpus_per_worker=1", "ray.num_cpus=2")
    refused = alit("run", "demo", *wanted)
    assert refused.code == 1
    assert "8 workers" in refused.err and "the cluster has 2" in refused.err, refused.err
    assert not (tmp_path / "w" / "ingest").exists()
