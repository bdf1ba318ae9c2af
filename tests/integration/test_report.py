"""The report as its readers meet it: in a browser, on a phone, in the dark, on paper, with the keyboard."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from components.artifacts import (
    REJECTED_SCHEMA,
    Analysis,
    CodeBook,
    ImageSet,
    Job,
    Manifest,
    Publication,
    ScoreTable,
    TokenArchive,
    TokenCounts,
    Tokenizer,
)
from components.config import ReportConfig, ReportResources
from components.report import report
from components.store import write_json, write_table
from pipelines.config import load_config
from tests.browser import DESKTOP, PHONE, Browser, chromium
from tests.integration.conftest import Workspace, alit

pytestmark = pytest.mark.slow

EVIL = "<script>document.title='it ran'</script>"
EVIL_FILE = "\"><img src=x onerror=document.title='it ran'>.png"
CONTRAST = """
(() => {
  const parts = text => {
    const numbers = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const scale = text.startsWith('color(') ? 255 : 1;
    return [...numbers.slice(0, 3).map(one => one * scale), numbers[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const ground = element => {
    if (!element) return [255, 255, 255];
    const own = parts(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(one => one / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const poor = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest('.hidden, .skip')) continue;
    const style = getComputedStyle(element), inSvg = element.namespaceURI.endsWith('svg');
    const below = ground(element), text = over(parts(inSvg ? style.fill : style.color), below);
    const [a, b] = [light(text), light(below)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as window:
        yield window


@pytest.fixture(scope="module")
def page(finished: Workspace) -> Path:
    """The page of a run, by the command."""
    said = alit("report", *finished.arguments)
    assert said.code == 0, said.err
    return Path(said.out.strip())


def with_evil_names(images: Path, folder: Path) -> ImageSet:
    """The ImageSet with names that would be code if they weren't escaped, and two rejected files, one a picture."""
    shutil.copytree(images, folder)
    for file in (folder / "table").glob("*.parquet"):
        rows = pq.read_table(file)
        named = pa.array([EVIL] * len(rows))
        pq.write_table(rows.set_column(rows.schema.get_field_index("uri"), rows.schema.field("uri"), named), file)
    picture = folder / EVIL_FILE
    Image.fromarray(np.zeros((8, 200, 3), dtype=np.uint8)).save(picture)
    shutil.rmtree(folder / "rejected")
    bad = [{"uri": str(picture), "reason": "depth: missing"}, {"uri": EVIL, "reason": EVIL}]
    write_table(str(folder / "rejected"), pa.Table.from_pylist(bad, REJECTED_SCHEMA))
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["counts"]["rejected"] = 2
    (folder / "artifact.json").write_text(json.dumps(manifest))
    return ImageSet.open(str(folder))


def findings(folder: Path) -> Analysis:
    """An analysis that keeps to the contract of sections.json."""
    folder.mkdir()
    Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(folder / "plot.png")
    table = {"title": "By label", "columns": ["label", "tokens"], "rows": [[EVIL, 12.5], ["cat", float("nan")]]}
    section = {
        "id": "labels",
        "title": "Labels and tokens",
        "claim": "Animals take more tokens.",
        "finding": f"They do: {EVIL}",
        "images": 24,
        "figures": [{"file": "plot.png", "alt": "a grey plot", "caption": "Grey."}],
        "tables": [table],
    }
    write_json(str(folder / "sections.json"), {"sections": [section]})
    made = Manifest(schema="analysis", version=1, stage="analyze", key="a" * 16, inputs={}, config={}, counts={})
    write_json(str(folder / "artifact.json"), asdict(made))
    return Analysis.open(str(folder))


@pytest.fixture(scope="module")
def evil(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of images with evil names, with an analysis, without a matrix."""
    folder = tmp_path_factory.mktemp("evil")
    report(
        Job(stage="report", key="k", workspace=str(folder), output=str(folder / "page"), scratch=""),
        config=ReportConfig(examples=3),
        resources=ReportResources(run_config="mlflow: {uri: 'http://me:secret@host'}"),
        images=with_evil_names(finished.artifact("ingest"), folder / "images"),
        tokenizer=Tokenizer.open(str(finished.artifact("distill"))),
        codes=CodeBook.open(str(finished.artifact("tokenize"))),
        scores=ScoreTable.open(str(finished.artifact("score"))),
        publication=Publication.open(str(finished.artifact("publish"))),
        select_reconstruction=TokenCounts.open(str(finished.artifact("select.reconstruction"))),
        pack_reconstruction=TokenArchive.open(str(finished.artifact("pack.reconstruction"))),
        analyze=findings(folder / "findings"),
    )
    return folder / "page" / "report.html"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_is_readable(browser: Browser, page: Path, tmp_path: Path, width: int, theme: str) -> None:
    browser.requests(), browser.complaints()
    browser.visit(page.as_uri(), width=width, theme=theme)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    sizes = browser.ask("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(sizes) == 12 * 9 and all(sizes)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask(CONTRAST) == []
    browser.shoot(tmp_path / f"report-{theme}-{width}.png")


def test_it_is_built_for_those_who_cannot_see_it(browser: Browser, page: Path) -> None:
    browser.visit(page.as_uri())
    levels = browser.ask("[...document.querySelectorAll('h1, h2, h3')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False)), levels
    assert browser.ask("document.documentElement.lang") == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert browser.ask(f"document.querySelectorAll('{landmark}').length") == 1
    unnamed = "[...document.querySelectorAll('img:not([alt]), svg[role=img]:not([aria-label])')].length"
    assert browser.ask(unnamed) == 0
    assert browser.ask("[...document.querySelectorAll('table')].every(one => one.caption)")
    assert browser.ask("[...document.querySelectorAll('th')].every(one => one.scope)")
    assert browser.ask("[...document.querySelectorAll('nav a')].every(one => document.querySelector(one.hash))")
    assert browser.ask("new Set([...document.querySelectorAll('[id]')].map(one => one.id)).size") == browser.ask(
        "document.querySelectorAll('[id]').length"
    )


def test_the_keyboard_reaches_the_findings(browser: Browser, page: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.visit(page.as_uri())
    ActionChains(browser.driver).send_keys(Keys.TAB).perform()
    assert browser.ask("document.activeElement.className") == "skip"
    assert browser.ask("document.activeElement.getBoundingClientRect().top >= 0")
    ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    assert browser.ask("document.activeElement.id") == "content"


def test_names_are_text_and_never_code(browser: Browser, evil: Path, tmp_path: Path) -> None:
    browser.requests(), browser.complaints()
    browser.visit(evil.as_uri())
    assert "it ran" not in browser.ask("document.title")
    assert browser.ask("document.scripts.length") == 0
    assert browser.complaints() == [] and browser.requests() == [evil.as_uri()]
    seen = browser.ask("document.body.innerText")
    assert EVIL in seen and EVIL_FILE in seen
    browser.shoot(tmp_path / "evil.png")


def test_what_is_there_has_a_section_and_what_is_missing_none(browser: Browser, evil: Path, page: Path) -> None:
    browser.visit(evil.as_uri())
    seen = browser.ask("document.body.innerText")
    for text in ("Labels and tokens", "Animals take more tokens.", "n = 24 images", "Grey.", "depth: missing"):
        assert text in seen
    assert browser.ask("document.querySelector('img[alt=\"a grey plot\"]').naturalWidth") == 60
    assert browser.ask("document.querySelectorAll('.rejected img').length") == 1
    assert "NaN" not in seen and browser.ask("document.querySelector('#matrix')") is None
    assert "secret" not in evil.read_text()
    browser.visit(page.as_uri())
    assert browser.ask("document.querySelector('#matrix')") is not None
    assert browser.ask("document.querySelector('#rejected')") is None


def test_it_says_what_the_run_found(finished: Workspace, browser: Browser, page: Path) -> None:
    browser.visit(page.as_uri())
    seen = browser.ask("document.body.innerText")
    (rule,) = json.loads((finished.artifact("select.reconstruction") / "rules.json").read_text())["rules"]
    tokenizer = json.loads((finished.artifact("pack.reconstruction") / "tokenizer.json").read_text())
    assert f"{rule['mean_tokens']:.1f}" in seen and tokenizer["digest"] in seen
    for stage in ("ingest", "base", "distill", "pack.reconstruction"):
        assert finished.artifact(stage).name in seen, stage
    assert browser.ask("document.querySelectorAll('.tile.chosen').length") == 12
    registered = json.loads((finished.artifact("publish") / "publication.json").read_text())
    name, version = registered["model"], registered["version"]
    assert f"{name}, version {version}" in seen and f'"models:/{name}/{version}"' in seen
    assert f"Version {version} of {name} is now the champion: the first one." in seen


def test_its_config_makes_the_same_run(page: Path, finished: Workspace, tmp_path: Path) -> None:
    import base64

    (encoded,) = re.findall(r'download="config.yaml" href="data:application/yaml;base64,([^"]+)"', page.read_text())
    (tmp_path / "config.yaml").write_bytes(base64.b64decode(encoded))
    overrides = finished.arguments[2::2]
    assert load_config(str(tmp_path / "config.yaml")) == load_config("demo", overrides)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["workspace"] == str(finished.path)
    planned = alit("plan", str(tmp_path / "config.yaml"))
    assert re.search(r"^0 of", planned.out, re.MULTILINE), planned.out


def test_it_prints(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.visit(page.as_uri())
    printed = browser.print()
    (tmp_path / "report.pdf").write_bytes(printed)
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 2 <= pages <= 12


def test_the_command_finds_the_newest_page_of_another_plan(finished: Workspace, page: Path, tmp_path: Path) -> None:
    other = alit("report", *finished.arguments, "--set", "report.examples=3")
    assert other.code == 0 and other.out.strip() == str(page) and "changed since" in other.err
    none = alit("report", "demo", "--set", f"workspace={tmp_path}/none")
    assert none.code == 1 and "alit run demo" in none.err
