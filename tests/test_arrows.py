"""Imports run one way: infra -> pipelines -> components -> model."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "components", "pipelines", "infra")  # each may import those before it, and itself
LEAVES = {  # what components share
    "artifacts", "buckets", "config", "distributions", "environment", "image_files", "images", "judges", "mapping",
    "model_card", "parts", "plugins", "registry", "rules", "scores", "software", "store", "targets", "task_config",
    "tasks", "tracking",
}  # fmt: skip
MLFLOW = {"components.tracking", "components.registry", "components.serving"}  # serving is what MLflow itself runs
NOT_IN_MODEL = {"ray", "mlflow", "pydantic", "PIL"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module in the rooms."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, tree: ast.Module, *, is_package: bool) -> Iterator[str]:
    """Every name that a module imports, wherever in it, as ``package.module[.name]``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


MODULES = modules()


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return set(imports(name, ast.parse(path.read_text(), str(path)), is_package=path.name == "__init__.py"))


def wrong_arrows(name: str, imported: str) -> str | None:
    """Why ``name`` may not import ``imported``, or None when it may."""
    room, top = name.partition(".")[0], imported.partition(".")[0]
    if top in ROOMS and ROOMS.index(top) > ROOMS.index(room):
        return f"{room} must not know {top}"
    if top == "infra" and room != "infra":
        return "nothing imports infra"
    if top == "mlflow" and name not in MLFLOW:
        return f"only {sorted(MLFLOW)} import mlflow"
    if room == "model" and top in NOT_IN_MODEL:
        return f"model must do without {top}"
    if room == top == "components":
        return wrong_among_components(name, imported)
    return None


def wrong_among_components(name: str, imported: str) -> str | None:
    """Components share the leaves only; ingest, codec and analyze read the sources."""
    one, other = name.split(".")[1:2], imported.split(".")[1]
    if other in LEAVES or [other] == one or (other == "sources" and one[0] in ("ingest", "codec", "analyze")):
        return None
    return "components don't import one another, except the leaves"


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name: str) -> None:
    wrong = {imported: why for imported in imports_of(name) if (why := wrong_arrows(name, imported))}
    assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("name", MODULES)
def test_names_are_not_the_standard_librarys(name: str) -> None:
    assert not set(name.split(".")) & sys.stdlib_module_names


def test_leaves_know_no_stage() -> None:
    for leaf in LEAVES & {name.removeprefix("components.") for name in MODULES}:
        known = {i.split(".")[1] for i in imports_of(f"components.{leaf}") if i.startswith("components.")}
        assert known <= LEAVES, f"components.{leaf} imports {known - LEAVES}"


@pytest.mark.parametrize(
    ("name", "imported", "allowed"),
    [
        ("model.rollout", "components.artifacts", False),
        ("model.config", "pydantic.BaseModel", False),
        ("components.train", "pipelines.dag.Stage", False),
        ("components.score", "components.train.train", False),
        ("components.score", "components.sources.demo", False),
        ("components.ingest", "components.sources.demo", True),
        ("components.sources.s3", "components.sources.folder", True),
        ("components.score", "components.artifacts.Job", True),
        ("components.score", "mlflow", False),
        ("components.tracking", "mlflow.MlflowClient", True),
        ("pipelines.train", "components.sources.demo", True),
        ("pipelines.cli", "infra.anything", False),
        ("pipelines.cli", "model.tokenizer", True),
    ],
)
def test_the_test(name: str, imported: str, allowed: bool) -> None:
    assert (wrong_arrows(name, imported) is None) is allowed


def test_relative_imports_are_seen() -> None:
    tree = ast.parse("from . import train\nfrom ..pipelines import dag\ndef f():\n    import mlflow.entities")
    found = set(imports("components.score", tree, is_package=False))
    assert found == {"components.train", "pipelines.dag", "mlflow.entities"}
    assert set(imports("model.base", ast.parse("from .vqgan import VQGAN"), is_package=True)) == {
        "model.base.vqgan.VQGAN"
    }
