"""``alit gc``: what a workspace holds that nothing refers to any more.

Kept is what the present plan of a config, an MLflow run that isn't deleted, or a registered model refers to, and all
that was made from, found through the manifests. So deleting runs in MLflow is what lets artifacts go. Logs, and
MLflow's own files, stay.
"""

import logging
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pyarrow import fs

from components.artifacts import DRAFTS, Manifest, read_manifest
from components.registry import runs_of_versions
from components.store import filesystem, folder_bytes, join, remove
from components.tracking import Store, known_runs, redact, store_for, used_by_runs
from pipelines.build import build
from pipelines.config import AnyConfig, ConfigError
from pipelines.dag import RESERVED_NAMES, STAGE_NAME
from pipelines.lock import LOCK, hold, holder_of
from pipelines.runner import absolute
from pipelines.summary import table
from pipelines.unfinished import PartialFile, PartialUpload, unfinished

KEY = re.compile(r"[0-9a-f]{16}")
SCRATCH = "scratch"
RUNS_TOLD = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """One of a workspace, by the stage and the key it is for; ``manifest``: of an artifact that is finished."""

    uri: str
    stage: str
    key: str
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Garbage:
    """A folder that may go."""

    uri: str
    why: str

    @property
    def bytes(self) -> int:
        """Of its files."""
        return folder_bytes(self.uri)

    def remove(self) -> None:
        """Delete it."""
        remove(self.uri)


Rubbish = Garbage | PartialFile | PartialUpload


def reachable(artifacts: Iterable[Folder], roots: Iterable[str]) -> set[str]:
    """The keys ``roots`` and those of everything that these were made from, as far as it is there."""
    inputs = {one.key: set(one.manifest.inputs.values()) for one in artifacts if one.manifest}
    found: set[str] = set()
    queue = set(roots)
    while queue:
        found |= queue
        queue = set().union(*(inputs.get(key, set()) for key in queue)) - found
    return found


def marked(artifacts: Iterable[Folder], scratch: Iterable[Folder], roots: set[str]) -> Iterator[Garbage]:
    """Artifacts that can't be reached from ``roots``, unfinished ones, and scratch that no stage will go on from."""
    known = list(artifacts)
    kept = reachable(known, roots)
    for one in known:
        if one.manifest is None:
            yield Garbage(one.uri, "was never finished")
        elif one.key not in kept:
            yield Garbage(one.uri, "no run, no registered model and no plan refers to it")
    finished = {one.key for one in known if one.manifest}
    for one in scratch:
        if one.key in finished:
            yield Garbage(one.uri, "scratch of a finished stage")
        elif one.key not in roots:
            yield Garbage(one.uri, "scratch that no run and no plan refers to")


def collect(config: AnyConfig, *, delete: bool = False, keep_runs: int | None = None) -> Iterator[str]:
    """Find garbage in the config's workspace and, with ``delete``, remove it; yields a table's lines.

    ``keep_runs``: only so many of the newest pipeline runs count; None: all that aren't deleted.
    Raises ConfigError when the plan can't be made or MLflow knows no run that made an artifact here, and WorkspaceHeld
    when a run is on and something is to be deleted.
    """
    workspace = absolute(config.workspace)
    if not delete:
        running = holder_of(workspace) is not None
        found = list(_found(config, workspace, keep_runs))
        left = [] if running else list(_left_by_dead_runs(workspace, found))
        yield from _told(workspace, [*found, *left], "would go; --delete removes them")
        return
    with hold(workspace, f"gc-{uuid.uuid4().hex[:6]}", config.wait_s):
        began = _modified(join(workspace, LOCK))
        found = list(_found(config, workspace, keep_runs))
        left = list(_left_by_dead_runs(workspace, found, began))
        lines = list(_told(workspace, [*found, *left], "removed"))
        for one in [*found, *left]:
            one.remove()
        yield from lines


def _found(config: AnyConfig, workspace: str, keep_runs: int | None) -> Iterator[Garbage]:
    artifacts = list(_artifacts(workspace))
    store = store_for(config.mlflow, workspace)
    strange = _made_by_strangers(artifacts, store)
    roots = {*build(config).keys().values(), *used_by_runs(store, keep_runs, runs_of_versions(store.uri)), *strange}
    yield from marked(artifacts, list(_scratch(workspace)), roots)


def _made_by_strangers(artifacts: Iterable[Folder], store: Store) -> set[str]:
    """Keys of artifacts whose runs are none of ``store``'s; raises ConfigError when all are, for it is another's then.

    What a run made that MLflow missed names no run.
    """
    made_by = {one.key: one.manifest.mlflow_run_id for one in artifacts if one.manifest and one.manifest.mlflow_run_id}
    known = known_runs(store) if made_by else set()
    strange = {key: run_id for key, run_id in made_by.items() if run_id not in known}
    if not strange:
        return set()
    ids = sorted(set(strange.values()))
    some = f"{', '.join(ids[:RUNS_TOLD])}{', …' if len(ids) > RUNS_TOLD else ''}"
    where = f"experiment {store.experiment!r} of {redact(store.uri)}"
    if len(strange) == len(made_by):
        raise ConfigError(
            f"{where} knows none of the {len(ids)} runs that made what is here ({some}), so nothing is garbage by it; "
            "set MLFLOW_TRACKING_URI, or mlflow.uri and mlflow.experiment, to where they were recorded"
        )
    _log.warning("%d artifacts are kept: %s doesn't know the runs that made them (%s)", len(strange), where, some)
    return set(strange)


def _left_by_dead_runs(workspace: str, found: Iterable[Garbage], before: float | None = None) -> Iterator[Rubbish]:
    """Drafts, and what was half written before the time ``before`` and is not in one of the folders ``found``."""
    yield from _drafts(workspace)
    folders = tuple(f"{one.uri}/" for one in found)
    yield from (one for one in unfinished(workspace, before) if not one.uri.startswith(folders))


def _modified(uri: str) -> float:
    store, path = filesystem(uri)
    return (store.get_file_info(path).mtime_ns or 0) / 1e9


def _drafts(workspace: str) -> Iterator[Garbage]:
    for name in _folders(join(workspace, DRAFTS)):
        yield Garbage(join(workspace, DRAFTS, name), "draft of a run that has ended")


def _told(workspace: str, found: Iterable[Rubbish], verb: str) -> Iterator[str]:
    sized = [(one, one.bytes) for one in found]
    rows = [(one.uri.removeprefix(f"{workspace}/"), f"{size / 1e6:.1f} MB", one.why) for one, size in sized]
    if rows:
        yield from table(("what", "size", "why"), rows)
    folders = sum(isinstance(one, Garbage) for one, _ in sized)
    partial = f" and {len(rows) - folders} unfinished files" if len(rows) > folders else ""
    yield f"{folders} folders{partial}, {sum(size for _, size in sized) / 1e6:.1f} MB {verb}"


def _artifacts(workspace: str) -> Iterator[Folder]:
    for stage in _folders(workspace):
        if STAGE_NAME.fullmatch(stage) and stage not in RESERVED_NAMES:
            for key in _folders(join(workspace, stage)):
                if KEY.fullmatch(key):
                    uri = join(workspace, stage, key)
                    yield Folder(uri, stage, key, read_manifest(uri))


def _scratch(workspace: str) -> Iterator[Folder]:
    for stage in _folders(join(workspace, SCRATCH)):
        for key in _folders(join(workspace, SCRATCH, stage)):
            yield Folder(join(workspace, SCRATCH, stage, key), stage, key)


def _folders(uri: str) -> list[str]:
    """Names of the folders in ``uri``, sorted; none when it isn't there."""
    store, path = filesystem(uri)
    infos = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)
