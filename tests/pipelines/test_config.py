"""Mistakes in a config: exit 2, and one message that names the field, the value and what is allowed."""

from pathlib import Path

import pytest
import yaml

from pipelines.cli import main
from pipelines.config import READY, ConfigError, RunConfig, load_config
from pipelines.train import build

MISTAKES = {
    "foo=1": ("foo = 1", "no such key"),
    "training.distill.typo=1": ("training.distill.typo = 1", "no such key"),
    "training.workers=two": ("training.workers = 'two'", "integer"),
    "inference.precision=fp8": ("inference.precision = 'fp8'", "'bf16'"),
    "training.recompute=some": ("training.recompute = 'some'", "'light'"),
    "training.workers=0": ("training.workers = 0", "greater than 0"),
    "data.image_size=66": ("data.image_size = (66, 66)", "8 px"),
    "tokenizer.budgets=[8, 8]": ("budgets = [8, 8]", "increasing"),
    "tokenizer.budgets=[16, 8]": ("budgets = [16, 8]", "increasing"),
    "tokenizer.base.typo=3": ("tokenizer.base.typo = 3", "no such key"),
    "tokenizer.size=huge": ("tokenizer.size = 'huge'", "alit_small"),
    "tokenizer.encoder_width=130": ("encoder_width = 130", "multiple of encoder_heads"),
    "tasks.0.rule.max=null": ("'threshold' rule", "max or min"),
    "tasks.0.rule.metric=ssim": ("tasks.0.rule.metric = 'ssim'", "'l1'"),
    "tasks.0.metrics=[l1, sharpness]": ("tasks.0.metrics = 'sharpness'", "'ms_ssim'"),
    "tasks.0.rule={kind: fixed, metric: l1, num_tokens: 7}": ("num_tokens = 7", "[8, 16"),
    "tasks.0.rule={kind: mean_tokens, metric: l1, mean: 2}": ("mean = 2", "smallest budget, 8"),
    "tasks.0.rule={kind: within, metric: l1, ratio: 0.5}": ("tasks.0.rule.ratio = 0.5", "greater than or equal to 1"),
    "matrix.mean_tokens=1": ("matrix.mean_tokens = 1", "smallest budget, 8"),
    "training.distill_objective.sampled_rollouts=0": ("sampled_rollouts = 0", "at least 1"),
    "training.distill.optimizer={betas: [0.9, 1.0]}": ("betas", "less than 1"),
    "tasks.0={name: classification, judge: probe, judge_options: {train: {batch_size: 1}}, rule: {kind: best, metric: "
    "correct}}": ("judge_options.train.batch_size = 1", "up to 2 workers"),
    "tasks.0={name: classification, judge: probe, judge_options: {train: {crop_scale: [0.5, 1]}}, rule: {kind: best, "
    "metric: correct}}": ("crop_scale = (0.5, 1.0)", "not cropped"),
    "tasks.0.kind=depth": ("tasks.0.metrics = 'l1'", "'abs_rel'"),
    "tasks.0.kind=sharpness": ("tasks.0.kind = 'sharpness'", "'package.module:Class' of your own"),
    "tasks.0={name: depth, rule: {kind: best, metric: abs_rel}}": ("tasks.0.judge = 'none'", "'probe'"),
    "tasks.0={name: depth, judge: efficientnet-lite0, rule: {kind: best, metric: rmse}}": (
        "tasks.0.judge = 'efficientnet-lite0'",
        "the task asks for 'depth'",
    ),
    "tasks.0={name: segmentation, judge: probe, rule: {kind: best, metric: miou}}": ("num_classes = None", "needs"),
    "tasks.0={name: features, judge: 'timm', rule: {kind: best, metric: cosine}}": ("judge = 'timm'", "timm:NAME"),
    "tasks.0={name: depth, judge: 'onnx:/no/model', rule: {kind: best, metric: rmse}}": ("/no/model", "can't be read"),
    "tasks.0={name: mine, kind: 'no_module:Task', metrics: [x], rule: {kind: best, metric: x}}": (
        "no_module:Task",
        "no module 'no_module'",
    ),
    "tasks=[]": ("tasks", "at least 1"),
    "data.source=/no/such/folder": ("/no/such/folder", "no such folder"),
    "training.from=/no/such/model": ("training.from = '/no/such/model'", "scratch, starter"),
    "training.distill.batch_size=1": ("distill.batch_size = 1", "at least one image a worker"),
    "training.workers={min: 3, max: 2}": ("training.workers", "min = 3"),
    "training.workers={min: 1, max: 2, step: 1}": ("training.workers.step", "no such key"),
    "training.strategy=fsdp": ("base_objective.revive_every = 100", "fsdp"),
    "training.store_grids=true": ("training.store_grids = true", "crop_scale = (0.8, 1.0) and recolour = 0.7"),
    "nonsense": ("nonsense", "KEY=VALUE"),
    "tasks.7.name=x": ("tasks.7.name=x", "nothing at '7'"),
}


def test_grids_that_are_kept_are_what_distill_reads(capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["training.store_grids=true", "training.distill.crop_scale=null", "training.distill.recolour=0"]
    for overrides, maker in (([], "ingest"), (kept, "grids")):
        assert main(["graph", "demo", *(word for one in overrides for word in ("--set", one))]) == 0
        drawn = capsys.readouterr().out
        assert f"{maker} -- images --> distill" in drawn and ("GridSet" in drawn) == bool(overrides)


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_told_in_one_message(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--set", override]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    for part in MISTAKES[override]:
        assert part in said


def test_a_missing_file_lists_the_ready_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert "demo" in capsys.readouterr().err


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize("file", sorted(READY.glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_configs_are_valid(file: Path) -> None:
    overrides = [] if yaml.safe_load(file.read_text())["data"]["source"] == "demo" else ["data.source=demo"]
    overrides += ["training.finetune_objective.perceptual={kind: efficientnet}"] * ("lpips" in file.read_text())
    config = load_config(str(file), overrides)
    if isinstance(config, RunConfig):  # a rerun is built from a registry, see test_rerun.py
        assert [stage.name for stage in build(config).order()][-3:] == ["publish", "promote", "report"]


def test_weights_that_are_not_there_are_told_while_planning(tmp_path: Path) -> None:
    def keys() -> dict[str, str]:
        lpips = f"training.finetune_objective.perceptual={{kind: lpips, weights: {tmp_path}/lpips.pth}}"
        return dict(build(load_config("photos", ["data.source=demo", lpips])).keys())

    with pytest.raises(ConfigError, match=r"perceptual.weights = '.*lpips.pth' can't be read: .*kind efficientnet"):
        keys()
    (tmp_path / "lpips.pth").write_bytes(b"one")
    before = keys()
    (tmp_path / "lpips.pth").write_bytes(b"other")
    changed = {stage for stage, key in keys().items() if key != before[stage]}
    assert "finetune" in changed and not changed & {"ingest", "base", "distill"}


def test_what_changes_no_result_changes_no_key() -> None:
    keys = build(load_config("demo")).keys()
    more = ["training.workers=4", "inference.actors=2", "inference.batch_size=3", "ingest.tasks=1", "ray.num_cpus=8"]
    assert build(load_config("demo", more)).keys() == keys


def test_a_threshold_changes_only_what_follows_from_it() -> None:
    before = build(load_config("demo")).keys()
    after = build(load_config("demo", ["tasks.0.rule.max=0.05"])).keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"select.reconstruction", "pack.reconstruction", "matrix", "report", "publish", "promote"}


def test_graph_is_mermaid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flowchart LR"
    assert any("distill -- tokenizer --> tokenize" in line for line in lines)


def test_help_needs_no_heavy_import() -> None:
    import subprocess
    import sys

    code = "import sys, pipelines.cli; print(sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
    code = code.replace("print", "pipelines.cli.main(['plan', 'demo']); print")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("[]")


def test_a_further_task_changes_nothing_but_score_and_what_reads_it() -> None:
    before = build(load_config("tasks", ["data.source=demo"])).keys()
    after = build(load_config("tasks", ["data.source=demo", "tasks.5.judge_options.gallery=100"])).keys()
    changed = {name for name in before if before[name] != after[name]}
    assert "judge.retrieval" in changed and "score" in changed
    assert not changed & {"ingest", "base", "distill", "tokenize", "judge.depth", "judge.features"}


def test_files_in_a_task_are_found_from_where_the_command_was_given(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    task = "tasks.0={name: depth, judge: 'onnx:model.onnx', rule: {kind: best, metric: rmse}}"
    assert load_config("demo", [task]).tasks[0].judge == f"onnx:{tmp_path}/model.onnx"


def test_precision_is_in_the_keys_of_codes_and_scores_and_actors_are_not():
    exact, rounded, wider = (
        build(load_config("demo", [setting])).keys()
        for setting in ("inference.precision=fp32", "inference.precision=bf16", "inference.actors=2")
    )
    changed = {name for name, key in exact.items() if rounded[name] != key}
    assert {"tokenize", "score"} <= changed and not changed & {"ingest", "base", "distill"}
    assert wider == exact
