"""The model registry: tokenizers and judges go in as new versions, and come out as folders; aliases move.

It and serving.py, which MLflow runs beside the weights, are the modules besides tracking.py that import mlflow.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from components.artifacts import MANIFEST, TOKENIZER_FILES, Publication, digest_of
from components.buckets import check, is_bucket
from components.config import RuleConfig
from components.environment import restored
from components.rules import HEADS
from components.store import exists, filled_folder, join, local_folder, read_json
from components.tracking import Tracker, redact
from model.starter import model_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVING = Path(__file__).with_name("serving.py")
PACKAGES = ("model", "components")  # what serving.py imports, at the version that made the weights
REFERENCE = "reference.json"  # beside the weights: what the images of the training were like
TRACKING_URI, REGISTRY_URI = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
STANDING = "\n## Standing\n\n"  # the end of a version's description, which its aliases write
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"  # aliases
DIGEST, JUDGE = "alit.digest", "alit.judge."  # tags of a version; the second one with a task's name behind it
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "pillow", "pandas", "pydantic")


@dataclass(frozen=True)
class ModelVersion:
    """A registered model."""

    name: str
    version: int

    @classmethod
    def of(cls, publication: Publication) -> Self:
        """The one that was published."""
        made = read_json(join(publication.uri, "publication.json"))
        return cls(made["model"], int(made["version"]))

    @property
    def uri(self) -> str:
        """As MLflow takes it."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Companions:
    """What travels with the weights."""

    rules: Mapping[str, Any]  # task -> rule config, so that tasks can be named
    heads: Mapping[str, str]  # task -> URI of the LengthHead of a rule that predicts
    judges: Mapping[str, int] = field(default_factory=dict)  # task -> version of its registered judge
    reference: Mapping[str, Any] = field(default_factory=dict)  # components.distributions.reference_of


def register_tokenizer(
    tracker: Tracker, folder: str, *, name: str, companions: Companions, example_png: bytes
) -> ModelVersion:
    """Register the tokenizer in ``folder`` under ``name``, logged by the tracker's run.

    The code that serves it is this software's own,
    copied beside it; nothing is pickled.
    """
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, "tokenizer")
        shutil.copytree(folder, weights, ignore=shutil.ignore_patterns("artifact.json"))
        (weights / "rules.json").write_text(json.dumps(dict(companions.rules), indent=2))
        (weights / REFERENCE).write_text(json.dumps(dict(companions.reference)))
        for task, uri in companions.heads.items():
            with local_folder(uri) as head:
                shutil.copytree(head, weights / HEADS / task)
        with _one_registry(tracker.uri) as mlflow, mlflow.start_run(run_id=tracker.run_id):
            info = mlflow.pyfunc.log_model(
                name="tokenizer",
                python_model=str(SERVING),
                artifacts={"tokenizer": str(weights)},
                code_paths=_code(Path(scratch)),
                signature=_signature(),
                input_example=_example(example_png),
                pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in REQUIREMENTS],
                registered_model_name=name,
            )
        made = ModelVersion(name, int(info.registered_model_version))
        judges = {f"{JUDGE}{task}": str(number) for task, number in companions.judges.items()}
        tag_version(tracker.uri, made, {DIGEST: digest_of(weights, TOKENIZER_FILES), **judges})
    return made


def describe_version(tracker: Tracker, made: ModelVersion, *, card: str, tags: Mapping[str, str]) -> None:
    """Give a version its model card (markdown) and tags."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    client.update_model_version(made.name, str(made.version), description=card)
    for name, value in tags.items():
        client.set_model_version_tag(made.name, str(made.version), name, value)


def register_judge(tracker: Tracker, folder: str, *, name: str, figures: Mapping[str, Any]) -> ModelVersion:
    """Register the judge in ``folder`` under ``name``: its files, no pickle, and what it scored as tags."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    client.log_artifacts(tracker.run_id, folder, f"judges/{name}")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(tracker.run_id).info.artifact_uri}/judges/{name}"
    tags = {f"judge.{key}": str(value) for key, value in figures.items()} | {DIGEST: judge_digest(folder)}
    made = client.create_model_version(name, source, run_id=tracker.run_id, tags=tags)
    return ModelVersion(name, int(made.version))


@dataclass(frozen=True)
class Found:
    """A registered tokenizer, as much of it as a plan needs."""

    model: ModelVersion
    digest: str  # of its weights and its config
    config: Mapping[str, Any]  # the tokenizer's: model.config.AlitConfig
    judges: Mapping[str, int]  # task -> version of the judge that was registered with it


def find_tokenizer(registry: str, uri: str) -> Found:
    """What ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` means in ``registry`` (a tracking URI) now.

    Raises ValueError when it means nothing there.
    """
    name, _, which = uri.removeprefix("models:/").replace("/", "@", 1).partition("@")
    with _registry_errors(registry, f"model = {uri!r}"):
        client = _client(registry)
        by_alias = "@" in uri
        number = client.get_model_version_by_alias(name, which).version if by_alias else which
        version = client.get_model_version(name, str(number))  # one that was found by alias lacks its tags
        model = ModelVersion(name, int(version.version))
        with tempfile.TemporaryDirectory() as folder:
            config = read_json(download(registry, model, "artifacts/tokenizer/config.json", folder))["config"]
            digest = version.tags.get(DIGEST) or digest_of(
                Path(download(registry, model, "artifacts/tokenizer", folder)), TOKENIZER_FILES
            )
    tags = {tag.removeprefix(JUDGE): int(number) for tag, number in version.tags.items() if tag.startswith(JUDGE)}
    return Found(model, digest, config, tags)


def find_judge(registry: str, model: ModelVersion) -> str:
    """The digest of a registered judge; raises ValueError when it isn't there."""
    with _registry_errors(registry, f"judge {model.name} version {model.version}"):
        tags = _client(registry).get_model_version(model.name, str(model.version)).tags
        if DIGEST in tags:
            return str(tags[DIGEST])
        with tempfile.TemporaryDirectory() as folder:
            return judge_digest(download(registry, model, "", folder))


def download(registry: str, model: ModelVersion, path: str, folder: str) -> str:
    """Where the file or folder ``path`` of a registered model is after it was copied into the local ``folder``."""
    uri = f"{model.uri}/{path}".rstrip("/")
    with _one_registry(registry) as mlflow:
        return str(mlflow.artifacts.download_artifacts(uri, dst_path=folder))


def copy_tokenizer(registry: str, model: ModelVersion, uri: str) -> None:
    """Weights and config of a registered tokenizer, without what travelled with them, into the folder ``uri``."""
    with tempfile.TemporaryDirectory() as scratch, filled_folder(uri) as output:
        folder = download(registry, model, "artifacts/tokenizer", scratch)
        for name in TOKENIZER_FILES:
            shutil.copy(Path(folder, name), output)


def read_reference(registry: str, model: ModelVersion) -> Any:
    """What the images of a model's training were like; None when it was registered without that."""
    with _one_registry(registry) as mlflow:
        files = mlflow.artifacts.list_artifacts(f"{model.uri}/artifacts/tokenizer")
    if not any(Path(file.path).name == REFERENCE for file in files):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return read_json(download(registry, model, f"artifacts/tokenizer/{REFERENCE}", scratch)) or None


def judge_digest(folder: str) -> str:
    """sha256 over the files of a judge, its record and its gallery included."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST]
    return digest_of(Path(folder), [path.relative_to(folder).as_posix() for path in files])


def tag_version(registry: str, model: ModelVersion, tags: Mapping[str, str]) -> None:
    """Set tags of a registered model."""
    for name, value in tags.items():
        _client(registry).set_model_version_tag(model.name, str(model.version), name, value)


def aliases_of(registry: str, name: str) -> dict[str, int]:
    """Alias -> version; raises ValueError when there is no such model."""
    with _registry_errors(registry, f"model {name!r}"):
        return {alias: int(at) for alias, at in _client(registry).get_registered_model(name).aliases.items()}


def move_aliases(registry: str, name: str, *, to: Mapping[str, int | None], reason: str) -> None:
    """Point aliases to versions, or to none, and say in each version's tags and description why.

    The champion moves after what else gets a version and before any alias goes, so that whoever is killed on the way
    can begin anew and no former champion is lost. Raises ValueError when a version isn't there; nothing has moved then.
    """
    client = _client(registry)
    with _registry_errors(registry, f"model {name!r}"):
        for wanted in {number for number in to.values() if number is not None}:
            client.get_model_version(name, str(wanted))
        for alias, number in sorted(to.items(), key=lambda move: (move[1] is None, move[0] == CHAMPION)):
            if number is None:
                client.delete_registered_model_alias(name, alias)
                continue
            client.set_registered_model_alias(name, alias, str(number))
            client.set_model_version_tag(name, str(number), f"alit.{alias}", reason)
            card = (client.get_model_version(name, str(number)).description or "").partition(STANDING)[0]
            client.update_model_version(name, str(number), f"{card}{STANDING}{alias}: {reason}\n")


def runs_of_versions(registry: str) -> list[str]:
    """The MLflow runs that registered the versions of all models."""
    runs, token, client = set(), None, _client(registry)
    while True:
        page = client.search_model_versions(max_results=1000, page_token=token)
        runs |= {version.run_id for version in page if version.run_id}
        token = page.token
        if not token:
            return sorted(runs)


def _client(registry: str) -> "MlflowClient":
    import mlflow

    return mlflow.MlflowClient(tracking_uri=registry, registry_uri=registry)


@contextmanager
def _one_registry(registry: str) -> Iterator[Any]:
    """MLflow with ``registry`` for both its stores, for functions that know none but the process's.

    Put back afterwards, in the environment too: MLflow writes them there, where they would overrule configs, and
    the registry of one run would be another's.
    """
    import mlflow

    with restored(TRACKING_URI, REGISTRY_URI):
        try:
            mlflow.set_tracking_uri(registry)
            mlflow.set_registry_uri(registry)
            yield mlflow
        finally:
            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)


@contextmanager
def _registry_errors(registry: str, what: str) -> Iterator[None]:
    """What MLflow says, in one line; raises ValueError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        said = redact(str(error)).splitlines()[0]
        raise ValueError(f"{what}: not in the registry {redact(registry)}: {said}") from error


def download_tokenizer(uri: str) -> str:
    """The local folder of the tokenizer behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises ValueError when there is no such model; the registry is the one of MLFLOW_TRACKING_URI.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    where = mlflow.get_tracking_uri()
    try:
        with _one_registry(where):
            return str(mlflow.artifacts.download_artifacts(f"{uri}/artifacts/tokenizer"))
    except MlflowException as error:
        raise ValueError(f"--model {uri!r}: not found in {where} (set MLFLOW_TRACKING_URI): {error}") from error


def _code(scratch: Path) -> list[str]:
    """Copies of our packages without weights and caches."""
    root = SERVING.parent.parent
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.png", "*.md")
        shutil.copytree(root / package, scratch / "code" / package, ignore=ignored)
    return [str(scratch / "code" / package) for package in PACKAGES]


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "num_tokens"),
                ColSpec(Array(DataType.long), "token_ids", required=False),
                ColSpec(DataType.string, "image", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("rule", DataType.string, ""),
                ParamSpec("num_tokens", DataType.long, 0),
                ParamSpec("output", DataType.string, "tokens"),
            ]
        ),
    )


def _example(png: bytes) -> Any:
    import pandas as pd

    return pd.DataFrame({"image": [png]})


def resolve_model(name: str) -> str:
    """The folder of ``starter``, a Tokenizer's (local or s3://), or a registered ``models:/NAME@ALIAS`` (downloaded).

    Raises ValueError when there is no tokenizer.
    """
    registered = ":/" in name and not is_bucket(name)
    folder = download_tokenizer(name) if registered else model_folder(name)
    if is_bucket(name):
        check(name, "--model")
    if not all(exists(join(folder, file)) for file in ("weights.safetensors", "config.json")):
        raise ValueError(f"--model {name!r}: no tokenizer there; starter, a Tokenizer's folder or models:/NAME@ALIAS")
    return folder


def registered_rules(folder: str) -> dict[str, RuleConfig]:
    """The rule of each task that the model in ``folder`` was published with; none for a bare Tokenizer artifact."""
    file = join(folder, "rules.json")
    rules = read_json(file) if exists(file) else {}
    return {task: RuleConfig.model_validate(rule) for task, rule in rules.items()}
