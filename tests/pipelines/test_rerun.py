"""The rerun's config and plan: which pipeline it is, what the registry says, and mistakes in one message."""

from pathlib import Path

import pytest

from components.artifacts import digest_of
from components.registry import find_tokenizer
from model import AlitTokenizer
from model.starter import STARTER
from pipelines.build import build
from pipelines.cli import main
from pipelines.config import RerunConfig, RunConfig, load_config
from tests.registered import register, registry_at, tracker_in

JUDGED = "tasks=[{name: features, judge: efficientnet-lite0, rule: {kind: best, metric: cosine}}]"
MISTAKES = {
    "tokenizer={size: demo}": ("tokenizer", "trains nothing"),
    "training={from: starter}": ("training", "trains nothing"),
    "data.image_size=64": ("data.image_size = 64", "the registered model brings it"),
    "model=alit-demo": ("model = 'alit-demo'", "models:/NAME@ALIAS"),
    "model=models:/alit-demo@best": ("model = 'models:/alit-demo@best'", "best"),
    "model=models:/nobody@champion": ("model = 'models:/nobody@champion'", "nobody"),
    "model=models:/alit-demo/9": ("model = 'models:/alit-demo/9'", "version=9"),
    "publish.model_name=other": ("publish.model_name = 'other'", "no such key"),
    "publish.gate={metric: l1, budget: 64}": ("publish.gate", "no such key"),
    "drift.psi=0": ("drift.psi = 0", "greater than 0"),
    "drift.typo=1": ("drift.typo = 1", "no such key"),
    "tasks.0.rule.kind=predicted": ("tasks.0.rule.kind = 'predicted'", "'threshold'"),
    JUDGED: (
        "'features' needs a judge",
        "train with that task first",
    ),
}
GATES = {
    "publish.gate={metric: ssim, budget: 64}": ("publish.gate.metric = 'ssim'", "'l1'"),
    "publish.gate={metric: l1, budget: 60}": ("publish.gate.budget = 60", "64"),
    "publish.gate={metric: l1, budget: 64, margin: -1}": ("publish.gate.margin = -1", "greater than or equal to 0"),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a champion, a second version of the same weights, other weights, and a model that has a judge."""
    folder = tmp_path_factory.mktemp("rerun") / "w"
    tracker = tracker_in(folder)
    register(tracker, alias="champion")
    register(tracker)
    tokenizer = AlitTokenizer.load(STARTER)
    tokenizer.decoder.requires_grad_(False)
    next(tokenizer.decoder.parameters()).mul_(0.9)
    tokenizer.save(folder / "other")
    register(tracker, folder / "other", name="other", alias="champion")
    register(tracker, name="judged-judge-features", tags={"alit.digest": "abc"})
    register(tracker, name="judged", alias="champion", tags={"alit.judge.features": "1"})
    return folder


def overrides(workspace: Path, *more: str) -> list[str]:
    return [f"workspace={workspace}", "data.source=demo", "data.crops=8", *more]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_message(mistake: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for text in overrides(workspace, mistake) for word in ("--set", text)]
    assert main(["plan", "rerun", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    for part in MISTAKES[mistake]:
        assert part in said


@pytest.mark.parametrize("mistake", GATES)
def test_a_gate_that_cannot_be_measured(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--set", mistake]) == 2
    said = capsys.readouterr().err
    for part in GATES[mistake]:
        assert part in said


def test_the_content_says_which_pipeline_it_is(workspace: Path) -> None:
    assert isinstance(load_config("demo"), RunConfig)
    config = load_config("rerun", overrides(workspace))
    assert isinstance(config, RerunConfig) and config.model_name == "alit-demo"
    pipeline = build(config)
    assert pipeline.name == "rerun" and not {"base", "distill", "promote"} & set(pipeline.names)
    assert pipeline["tokenize"].needs["tokenizer"] == pipeline["score"].needs["tokenizer"] == "model"
    assert pipeline["ingest"].config.model_dump()["data"]["image_size"] == 64  # the starter's
    assert "version 1" in pipeline.facts["model"]


def test_versions_of_the_same_weights_share_what_is_dear(workspace: Path) -> None:
    """All but what compares with the version's own reference, and the record."""
    first, second = (
        build(load_config("rerun", overrides(workspace, f"model=models:/alit-demo/{number}"))).keys()
        for number in (1, 2)
    )
    assert {name for name in first if first[name] != second[name]} == {"drift", "report", "publish"}
    by_alias = build(load_config("rerun", overrides(workspace))).keys()
    assert by_alias == first


def test_other_weights_change_what_they_make(workspace: Path) -> None:
    keys = build(load_config("rerun", overrides(workspace, "model=models:/other@champion"))).keys()
    before = build(load_config("rerun", overrides(workspace))).keys()
    assert {name for name in keys if keys[name] == before[name]} == {"ingest"}
    found = find_tokenizer(registry_at(workspace), "models:/other@champion")
    assert found.digest == digest_of(workspace / "other", ("config.json", "weights.safetensors"))


def test_a_judge_that_was_registered_with_the_model_is_fetched(workspace: Path) -> None:
    pipeline = build(load_config("rerun", overrides(workspace, "model=models:/judged@champion", JUDGED)))
    stage = pipeline["judge.features"]
    assert stage.fingerprint == {"content": "abc"} and not stage.needs
    assert pipeline["score"].needs["judge_features"] == "judge.features"
