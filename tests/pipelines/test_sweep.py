"""A sweep's pipeline: what variants share is made once."""

import pytest

from pipelines.cli import main
from pipelines.config import ConfigError, load_config
from pipelines.sweep import build_sweep
from pipelines.train import build

DEMO = ["data.source=demo"]


def test_what_no_setting_touches_is_an_ordinary_runs() -> None:
    pipeline = build_sweep("ablations", DEMO)
    alone = build(load_config("ablations", DEMO)).keys()
    own = ("ingest", "base", "distill", "tokenize", "score", "select.reconstruction", "analyze")
    assert {name: pipeline.keys()[name] for name in own} == {name: alone[name] for name in own}
    assert pipeline.order()[-1].name == "compare" and not any(name.startswith("publish") for name in pipeline.names)


def test_a_variant_of_the_rule_alone_trains_nothing() -> None:
    pipeline = build_sweep("ablations", DEMO)
    needs = pipeline["compare"].needs
    assert needs["tokenizer_fixed_count"] == needs["tokenizer_full"] == "distill"
    assert needs["scores_fixed_count"] == "score"
    assert needs["counts_fixed_count"] == "select.reconstruction.fixed_count"
    assert pipeline["distill.continuous"].config.tokenizer.codebook_size is None
    assert pipeline["tokenize.continuous"].needs == {"images": "ingest", "tokenizer": "distill.continuous"}


def test_variants_of_the_data_have_their_own_images() -> None:
    needs = build_sweep("scale", DEMO)
    assert needs["base.less_data"].needs == {"images": "ingest.less_data"}
    assert needs["base"].needs == {"images": "ingest"}


def test_fewer_variants_change_no_key() -> None:
    keys = build_sweep("ablations", DEMO).keys()
    few = "sweep.variants=[{name: full}, {name: halting, set: ['tokenizer.halting={enabled: true, threshold: 0.02}']}]"
    less = build_sweep("ablations", [*DEMO, few]).keys()
    assert {name: key for name, key in less.items() if name != "compare"}.items() <= keys.items()
    assert "distill.halting" in less and "distill.continuous" not in less


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep=null", "needs the sections sweep and analyze"),
        ("analyze=null", "needs the sections sweep and analyze"),
        ("sweep.variants.1.set=[workspace=elsewhere]", "workspace is the whole sweep's"),
        ("sweep.variants.1.set=[tokenizer.typo=1]", "no such key"),
        ("sweep.variants.1.name=full", "must differ"),
    ],
)
def test_mistakes(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=said):
        build_sweep("ablations", [*DEMO, override])
    assert main(["sweep", "ablations", "--plan", "--set", "data.source=demo", "--set", override]) == 2
    assert said in capsys.readouterr().err


def test_the_plan(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "ablations", "--plan", "--set", "data.source=demo", "--set", f"workspace={tmp_path}"]) == 0
    assert "30 of 30 stages would run" in capsys.readouterr().out
