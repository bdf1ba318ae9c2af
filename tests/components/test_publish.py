"""What goes into the registry with the weights can be used there: a rule by its name, the card's own lines."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest

from components import publish as stage
from components.artifacts import MANIFEST, TokenCounts
from components.config import NoConfig, PublishConfig, RuleConfig
from components.registry import ModelVersion
from components.rules import build_rule, serves_alone
from components.select_counts import select
from components.serving import AlitModel
from components.store import join, write_json
from components.task_config import TaskConfig
from model import AlitTokenizer
from model.starter import STARTER
from tests.bench.precision_error import squares
from tests.by_hand import finish, image_set, job, of_photographs, photographs, tokenizer_artifact

THRESHOLD = RuleConfig(kind="threshold", metric="l1", max=0.08)
OVER_ALL = RuleConfig(kind="mean_tokens", metric="l1", mean=32)
RULES = (
    THRESHOLD,
    OVER_ALL,
    RuleConfig(kind="within", metric="psnr", ratio=1.1),
    RuleConfig(kind="best", metric="mse"),
    RuleConfig(kind="fixed", metric="accuracy", num_tokens=16),
    RuleConfig(kind="threshold", metric="accuracy", min=0.5),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.metric}")
def test_a_rule_serves_alone_where_the_tokenizer_can_apply_it(rule: RuleConfig) -> None:
    tokenizer = AlitTokenizer.load(STARTER)
    try:
        tokenizer.encode(squares(64, 1), build_rule(rule))
    except (ValueError, KeyError):
        assert not serves_alone(rule)
    else:
        assert serves_alone(rule)


@pytest.mark.parametrize(
    ("rules", "registered"), [((OVER_ALL,), []), ((OVER_ALL, THRESHOLD), ["second"]), ((THRESHOLD,), ["first"])]
)
def test_the_card_names_what_was_registered(
    rules: tuple[RuleConfig, ...], registered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = photographs(40), {}
    images, scores = image_set(tmp_path / "images", made), of_photographs(tmp_path / "scores", made)
    manifest = Path(images.uri, MANIFEST)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"counts": {"train": 30, "val": 10}}))
    write_json(join(scores.uri, "summary.json"), {"split": "val", "rows": []})
    counts = {}
    for name, rule in zip(("first", "second"), rules, strict=False):
        task, folder = TaskConfig(name=name, kind="reconstruction", rule=rule), tmp_path / name
        select(job(folder), config=task, resources=NoConfig(), scores=scores)
        finish(folder, TokenCounts, config=task.model_dump(mode="json"))
        counts[f"counts_{name}"] = TokenCounts.open(str(folder))

    def register(_tracker, folder, *, name, companions, example_png):
        model = AlitModel()
        (tmp_path / "rules.json").write_text(json.dumps(companions.rules))
        for file in Path(folder).iterdir():
            (tmp_path / file.name).symlink_to(file)
        model.load_context(SimpleNamespace(artifacts={"tokenizer": str(tmp_path)}))
        said.update(model=model, png=example_png, rules=list(companions.rules))
        return ModelVersion(name, 1)

    monkeypatch.setattr(stage, "register_tokenizer", register)
    monkeypatch.setattr(stage, "describe_version", lambda _tracker, _made, *, card, tags: said.update(card=card))
    inputs = {"images": images, "tokenizer": tokenizer_artifact(), "scores": scores, **counts}
    stage.publish(job(tmp_path / "out"), config=PublishConfig(pictures=0), resources=NoConfig(), **inputs)

    (code,) = [part.split("```")[0] for part in said["card"].split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(said["png"])
    served = SimpleNamespace(predict=lambda rows, params=None: said["model"].predict(None, rows, params))
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda _uri: served)
    names: dict = {}
    exec(code, names)
    assert len(names["tokens"]["token_ids"][0]) in made.budgets
    assert said["rules"] == registered
    for row in said["card"].split("## Rules")[1].splitlines():
        if row.startswith(("| first", "| second")):
            assert row.endswith("| yes |") == (row.split()[1] in registered)
    by_default = served.predict(pd.DataFrame({"image": [said["png"]]}))
    if not registered:
        assert by_default["num_tokens"].tolist() == [made.budgets[-1]]
